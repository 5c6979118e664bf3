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

    /// The whole number that the column begins with: `1 (2)` is 1, `1,024` is 1024, `8k` is 8192, `2x8` is 16. What is no whole number
    /// (`n/a`, `2.5`), a range (`8-16`) or counts something else (`16 nodes`) is nothing.
    pub(crate) fn count(&self, column: &str) -> Option<u64> {
        count(self.text(column))
    }

    /// The positive number that the column begins with, times what its unit stands for in `units`; nothing when the unit is another.
    /// No unit stands for 1.
    pub(crate) fn quantity(&self, column: &str, units: &[(&str, f64)]) -> Option<f64> {
        let (value, rest) = number(self.text(column))?;
        let unit = unit(rest);
        let times = units.iter().find(|(name, _)| *name == unit).map(|(_, times)| *times);
        let times = if unit.is_empty() && !rest.starts_with('%') { Some(1.0) } else { times };
        times.map(|times| value * times).filter(|value| *value > 0.0 && value.is_finite())
    }
}

/// Whether a text begins with a number that nothing measures: zero, one below it or one without end.
pub(crate) fn is_impossible(text: &str) -> bool {
    let first = text.split_whitespace().next().unwrap_or("");
    let positive = text.strip_prefix('-');
    let zero = number(text).is_some_and(|(value, _)| value == 0.0);
    zero || positive.is_some_and(|rest| number(rest).is_some())
        || first.parse::<f64>().is_ok_and(f64::is_infinite)
}

/// Words after a number that make it the count of something else.
const OTHER_THINGS: [&str; 12] =
    ["node", "nodes", "server", "servers", "host", "hosts", "tokens", "tok", "m", "b", "gb", "gib"];

/// [`Row::count`] of a text.
pub(crate) fn count(text: &str) -> Option<u64> {
    let (value, rest) = number(text)?;
    let unit = unit(rest);
    let times = match unit.as_str() {
        "k" => 1024.0,
        "x" => product(rest)?,
        _ => 1.0,
    };
    let said = rest.split('(').next().unwrap_or("").to_ascii_lowercase();
    if OTHER_THINGS.contains(&unit.as_str()) || said.contains(" node") {
        return None;
    }
    let value = value * times;
    ((1.0..9e15).contains(&value) && value.fract() == 0.0).then_some(value as u64)
}

/// Tokens that a text counts: `4M tokens`, whose M is 2 to the power of 20, or `4194304 tokens`; nothing when it does not say that it
/// counts tokens.
pub(crate) fn tokens(text: &str) -> Option<u64> {
    let (value, rest) = number(text)?;
    let unit = unit(rest);
    let times = match unit.as_str() {
        "k" => 1024.0,
        "m" => 1_048_576.0,
        _ => 1.0,
    };
    let counts = unit == "m" || rest.to_ascii_lowercase().contains("tok");
    let value = value * times;
    (counts && (1.0..9e15).contains(&value) && value.fract() == 0.0).then_some(value as u64)
}

/// The letters that follow a number.
fn unit(rest: &str) -> String {
    let letters = rest.trim_start().chars().take_while(char::is_ascii_alphabetic);
    letters.map(|c| c.to_ascii_lowercase()).collect()
}

/// The factor of `2x8`; 1 of `4x`, nothing of `2x8x4`.
fn product(rest: &str) -> Option<f64> {
    let factor = rest.trim_start().trim_start_matches(['x', 'X']).trim_start();
    match number(factor) {
        None => Some(1.0),
        Some((value, rest)) => (unit(rest) != "x").then_some(value),
    }
}

/// The number that a text starts with, and what follows it; thousands may be set off by commas. A range is no number.
fn number(text: &str) -> Option<(f64, &str)> {
    let text = text.trim_start_matches(['~', '<', '>', '=', ' ']);
    let end = text
        .char_indices()
        .find(|(at, c)| !(c.is_ascii_digit() || matches!(c, '.' | ',') || exponent(text, *at)))
        .map_or(text.len(), |(at, _)| at);
    let (digits, rest) = text.split_at(end);
    let digits = digits.trim_end_matches(['e', 'E', '.', ',']);
    let mut thousands = digits.split('.').next().unwrap_or("").split(',').skip(1);
    let after = rest.trim_start();
    let continues = after
        .trim_start_matches(['-', '\u{2013}', '/', '|', '~', ' '])
        .starts_with(|c: char| c.is_ascii_digit());
    if !thousands.all(|group| group.len() == 3) || continues {
        return None;
    }
    let value: f64 = digits.replace(',', "").parse().ok()?;
    value.is_finite().then_some((value, rest))
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
        let cases: [(&str, Option<u64>); 31] = [
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
            ("8k", Some(8192)),
            ("128K tokens", Some(131_072)),
            ("1.5k", Some(1536)),
            ("8.1k", None),
            ("2x8", Some(16)),
            ("2x8x4", None),
            ("64 GPUs", Some(64)),
            ("16 nodes", None),
            ("16 DGX nodes", None),
            ("16 (2 nodes)", Some(16)),
            ("8-GPU", Some(8)),
            ("8-16", None),
            ("8 / 16", None),
            ("8 192", None),
            ("2.5", None),
            ("\"12,5\"", None),
            ("4M", None),
        ];
        for (text, expected) in cases {
            let table = Table::parse(&format!("a,b\nx,{text}\n"));
            let row = table.rows().next().expect("one row");
            assert_eq!(row.count("b"), expected, "{text}");
            assert_eq!(row.text("absent"), "");
        }
    }

    #[test]
    fn quantities_are_read_in_their_units_or_not_at_all() {
        let units = [("s", 1.0), ("ms", 1e-3)];
        let cases: [(&str, Option<f64>); 12] = [
            ("5", Some(5.0)),
            ("5000ms", Some(5.0)),
            ("5000 ms/step", Some(5.0)),
            ("5.0 s", Some(5.0)),
            ("5 (median)", Some(5.0)),
            ("5 +- 0.1", Some(5.0)),
            ("\"5,000.5\"", Some(5000.5)),
            ("5 fortnights", None),
            ("5%", None),
            ("5-6", None),
            ("\"5,2\"", None),
            ("-5", None),
        ];
        for (text, expected) in cases {
            let table = Table::parse(&format!("b,c\n{text},x\n"));
            assert_eq!(table.rows().next().expect("one row").quantity("b", &units), expected, "{text}");
        }
        let impossible = ["0", "0.0 s", "-5", "-5ms", "1e400", "-inf s", "inf"];
        assert!(impossible.iter().all(|text| is_impossible(text)));
        assert!(!["5", "", "n/a", "-", "NaN", "5-6", "1e-300"].iter().any(|text| is_impossible(text)));
        let said = ["4M tokens", "16m", "4194304 tokens", "512", "4.2M tokens"].map(tokens);
        assert_eq!(said, [Some(4_194_304), Some(16_777_216), Some(4_194_304), None, None]);
    }

    #[test]
    fn quotes_lines_and_short_rows_are_read() {
        let table = Table::parse("a,b,c\r\n\"x, \"\"y\"\"\nz\",2\r\n\n1,2,3,4\n\"open,5");
        let rows: Vec<_> = table.rows().map(|row| (row.text("a"), row.text("b"), row.text("c"))).collect();
        assert_eq!(rows, [("x, \"y\"\nz", "2", ""), ("1", "2", "3"), ("open,5", "", "")]);
        assert_eq!(Table::parse("").rows().count(), 0);
    }
}
