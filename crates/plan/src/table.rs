//! Comma-separated text, read by column name and without ever failing.

use std::collections::HashMap;

/// A table of text. A row may be short or long: what is absent reads as empty.
#[derive(Debug, Clone, Default)]
pub(crate) struct Table {
    columns: HashMap<String, usize>,
    rows: Vec<Vec<String>>,
}

/// One row of a [`Table`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row<'a> {
    table: &'a Table,
    index: usize,
}

impl Table {
    /// Reads RFC 4180; an unfinished quotation ends with the text.
    pub(crate) fn parse(text: &str) -> Self {
        let mut records = records(text.strip_prefix('\u{feff}').unwrap_or(text)).into_iter();
        let header = records.next().unwrap_or_default();
        let columns = header.iter().enumerate().map(|(at, name)| (name.trim().to_string(), at)).collect();
        Self { columns, rows: records.collect() }
    }

    /// Whether there is a column of this name.
    pub(crate) fn has(&self, column: &str) -> bool {
        self.columns.contains_key(column)
    }

    /// The rows below the header.
    pub(crate) fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        (0..self.rows.len()).map(|index| Row { table: self, index })
    }
}

impl<'a> Row<'a> {
    /// The trimmed text of a column; empty when the row or the table has none.
    pub(crate) fn text(&self, column: &str) -> &'a str {
        let at = self.table.columns.get(column);
        at.and_then(|at| self.table.rows[self.index].get(*at)).map_or("", |text| text.trim())
    }

    /// The first whole number in the column: `1 (2)` is 1, `1,024` is 1024, `n/a` is nothing.
    pub(crate) fn count(&self, column: &str) -> Option<u64> {
        let number = number(self.text(column))?;
        (1.0..9e15).contains(&number).then_some(number as u64)
    }

    /// The first positive number in the column.
    pub(crate) fn positive(&self, column: &str) -> Option<f64> {
        number(self.text(column)).filter(|value| *value > 0.0)
    }
}

/// The first number in a text that starts with it; thousands may be set off by commas.
fn number(text: &str) -> Option<f64> {
    let text = text.trim_start_matches(['~', '<', '>', '=', ' ']);
    let end = text
        .char_indices()
        .find(|(at, c)| !(c.is_ascii_digit() || matches!(c, '.' | ',') || exponent(text, *at)))
        .map_or(text.len(), |(at, _)| at);
    let value: f64 = text[..end].replace(',', "").trim_end_matches(['e', 'E', '.']).parse().ok()?;
    value.is_finite().then_some(value)
}

/// Whether the character at `at` belongs to an exponent: `1e-3`.
fn exponent(text: &str, at: usize) -> bool {
    let bytes = text.as_bytes();
    let digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    match bytes[at] {
        b'e' | b'E' => {
            at > 0 && (digit(at + 1) || (matches!(bytes.get(at + 1), Some(b'-' | b'+')) && digit(at + 2)))
        }
        b'-' | b'+' => at > 0 && matches!(bytes[at - 1], b'e' | b'E') && digit(at + 1),
        _ => false,
    }
}

fn records(text: &str) -> Vec<Vec<String>> {
    let (mut records, mut record, mut field) = (Vec::new(), Vec::new(), String::new());
    let mut quoted = false;
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '"' if quoted && characters.peek() == Some(&'"') => {
                characters.next();
                field.push('"');
            }
            '"' if quoted || field.is_empty() => quoted = !quoted,
            ',' if !quoted => record.push(std::mem::take(&mut field)),
            '\r' if !quoted && characters.peek() == Some(&'\n') => {}
            '\n' if !quoted => {
                record.push(std::mem::take(&mut field));
                records.push(std::mem::take(&mut record));
            }
            other => field.push(other),
        }
    }
    if !field.is_empty() || !record.is_empty() {
        record.push(field);
        records.push(record);
    }
    records.retain(|record| record.iter().any(|field| !field.trim().is_empty()));
    records
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_fields_read_as_what_they_say_or_as_nothing() {
        let cases: [(&str, Option<u64>); 14] = [
            ("8", Some(8)),
            ("1 (2)", Some(1)),
            ("\"1,024\"", Some(1024)),
            ("2.0", Some(2)),
            ("~16", Some(16)),
            ("1e3", Some(1000)),
            ("4x", Some(4)),
            ("n/a", None),
            ("NA", None),
            ("-", None),
            ("-3", None),
            ("0", None),
            ("", None),
            ("99999999999999999999999", None),
        ];
        for (text, expected) in cases {
            let table = Table::parse(&format!("a,b\nx,{text}\n"));
            let row = table.rows().next().expect("one row");
            assert_eq!(row.count("b"), expected, "{text}");
            assert_eq!(row.text("absent"), "");
        }
    }

    #[test]
    fn quotes_lines_and_short_rows_are_read() {
        let table = Table::parse("a,b,c\r\n\"x, \"\"y\"\"\nz\",2\r\n\n1,2,3,4\n\"open,5");
        let rows: Vec<_> = table.rows().map(|row| (row.text("a"), row.text("b"), row.text("c"))).collect();
        assert_eq!(rows, [("x, \"y\"\nz", "2", ""), ("1", "2", "3"), ("open,5", "", "")]);
        assert_eq!(Table::parse("").rows().count(), 0);
    }
}
