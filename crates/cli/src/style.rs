//! Numbers, tables and colours for people.

use std::io::IsTerminal;
use std::path::Path;

use unisono_plan::Ranged;

/// Columns that output is made for.
pub const WIDTH: usize = 100;

/// Colours, where the output is a terminal that has them and `NO_COLOR` (<https://no-color.org>) is not set.
#[derive(Debug, Clone, Copy)]
pub struct Paint(bool);

impl Paint {
    /// For what goes to `stream`.
    pub fn new(stream: &impl IsTerminal) -> Self {
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self(stream.is_terminal() && !set("NO_COLOR") && !dumb)
    }

    fn wrap(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.into() }
    }

    /// A heading, or what matters most in a line.
    pub fn strong(self, text: &str) -> String {
        self.wrap("1", text)
    }

    /// What matters less.
    pub fn faint(self, text: &str) -> String {
        self.wrap("2", text)
    }

    /// Something good.
    pub fn green(self, text: &str) -> String {
        self.wrap("32", text)
    }

    /// Something to look at.
    pub fn yellow(self, text: &str) -> String {
        self.wrap("33", text)
    }

    /// Something wrong.
    pub fn red(self, text: &str) -> String {
        self.wrap("1;31", text)
    }
}

/// `1234567` as `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A number of parameters: `9.4 M`.
pub fn short(number: u64) -> String {
    match number {
        0..1_000 => number.to_string(),
        1_000..1_000_000 => format!("{:.1} K", number as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} M", number as f64 / 1e6),
        _ => format!("{:.1} G", number as f64 / 1e9),
    }
}

/// `1 rank`, `2,048 ranks`.
pub fn counted(number: u64, what: &str) -> String {
    format!("{} {what}{}", grouped(number), if number == 1 { "" } else { "s" })
}

/// The unit of a number and of those beside it, in which the largest of them is at least 1 where any is that small.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    /// The unit.
    pub name: &'static str,
    size: f64,
    digits: usize,
}

impl Scale {
    /// The first of `units` (names, sizes, digits after the point), else the last.
    fn of(largest: f64, units: &[(&'static str, f64, usize)]) -> Self {
        let last = units[units.len() - 1];
        let (name, size, digits) = units.iter().copied().find(|unit| largest >= unit.1).unwrap_or(last);
        Self { name, size, digits }
    }

    /// Of the seconds of a step.
    pub fn seconds(largest: f64) -> Self {
        Self::of(largest, &[("s", 1.0, 3), ("ms", 1e-3, 3)])
    }

    /// Of the days of a run.
    pub fn days(largest: f64) -> Self {
        let smaller =
            [("hours", 1.0 / 24.0, 1), ("minutes", 1.0 / 1_440.0, 1), ("seconds", 1.0 / 86_400.0, 1)];
        Self::of(largest, &[&[("days", 1.0, 1)], &smaller[..]].concat())
    }

    /// Of dollars.
    pub fn dollars(largest: f64) -> Self {
        Self::of(largest, &[("M$", 1e6, 3), ("k$", 1e3, 2), ("$", 1.0, 2)])
    }

    /// The number in this unit, without its name.
    pub fn number(self, value: f64, digits: usize) -> String {
        format!("{:.digits$}", value / self.size)
    }

    /// The number with its unit.
    pub fn write(self, value: f64) -> String {
        format!("{} {}", self.number(value, self.digits), self.name)
    }

    /// `19.926 s (16.1 to 24.7)`: the number with its unit and its interval.
    pub fn ranged(self, of: Ranged) -> String {
        format!("{} ({})", self.write(of.value), self.range(of.interval))
    }

    /// `15.2 to 25.0`, in this unit.
    pub fn range(self, [low, high]: [f64; 2]) -> String {
        let digits = if high < 10.0 * self.size { 2 } else { 1 };
        format!("{} to {}", self.number(low, digits), self.number(high, digits))
    }
}

/// A duration: `4.3 ms`, `43 ms`, `0.43 s`, `4 min 12 s`, `2 h 05 min`, `3.5 days`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0 if (1e-4..9.95e-3).contains(&seconds) => format!("{:.1} ms", 1e3 * seconds),
        0 if seconds < 0.0995 => format!("{:.0} ms", 1e3 * seconds),
        0..10 => format!("{seconds:.2} s"),
        10..120 => format!("{seconds:.1} s"),
        120..7_200 => format!("{} min {:02} s", whole / 60, whole % 60),
        7_200..172_800 => format!("{} h {:02} min", whole / 3_600, whole / 60 % 60),
        _ => format!("{:.1} days", seconds / 86_400.0),
    }
}

/// ` (2.4 ms to 3.1 ms)`, or nothing.
pub fn between(interval_s: Option<[f64; 2]>) -> String {
    interval_s.map_or_else(String::new, |[low, high]| format!(" ({} to {})", duration(low), duration(high)))
}

/// An interval relative to its figure: `-19 +24%`.
pub fn off(of: Ranged) -> String {
    let [low, high] = of.interval.map(|end| 100.0 * (end / of.value - 1.0));
    if of.value == 0.0 { "0%".into() } else { format!("{low:+.0} {high:+.0}%") }
}

/// A number with four digits that matter: `1979`, `43.61`, `0.001234`.
pub fn figure(number: f64) -> String {
    let digits = match number.abs() {
        0.0 => 0.0,
        size => (3.0 - size.log10().floor()).clamp(0.0, 12.0),
    };
    format!("{number:.0$}", digits as usize)
}

/// A count with its interval: `214,000 (173,000 to 265,000)`.
pub fn grouped_range(of: Ranged) -> String {
    let [low, high] = of.interval.map(|end| grouped(end as u64));
    format!("{} ({low} to {high})", grouped(of.value as u64))
}

/// A share as `12%`.
pub fn percent(share: f64) -> String {
    format!("{:.0}%", 100.0 * share)
}

/// Rows in columns two blanks apart, indented by two: the first `left` columns flush left, the others flush right.
pub fn table(rows: &[Vec<String>], left: usize) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            line.push_str("  ");
            line.push_str(&if column < left { format!("{cell:<width$}") } else { format!("{cell:>width$}") });
        }
        line.trim_end().to_string()
    };
    rows.iter().map(line).collect()
}

/// A table without the columns that say nothing but `zero` below their head.
pub fn without_empty(rows: Vec<Vec<String>>, zero: &str) -> Vec<Vec<String>> {
    let says = |column: &usize| rows[1..].iter().any(|row| row[*column] != zero);
    let kept: Vec<usize> = (0..rows[0].len()).filter(says).collect();
    rows.iter().map(|row| kept.iter().map(|column| row[*column].clone()).collect()).collect()
}

/// A bar of up to `width` columns for `share` of the whole.
pub fn bar(share: f64, width: usize) -> String {
    "█".repeat((share.clamp(0.0, 1.0) * width as f64).round() as usize)
}

/// Small vertical bars for `values`, the tallest for `most` and above.
pub fn spark(values: &[f64], most: f64) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let bar = |value: &f64| BARS[((value / most * 8.0) as usize).min(7)];
    values.iter().map(bar).collect()
}

/// A path as a shell takes it.
pub fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+,:@%=".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// How this program was called, so that commands can be copied.
pub fn program() -> String {
    // Set by `cargo run` for the program it starts.
    if std::env::var_os("CARGO_MANIFEST_DIR").is_some() {
        return if cfg!(debug_assertions) { "cargo run --" } else { "cargo run --release --" }.into();
    }
    std::env::args_os().next().map_or_else(|| "unisono".into(), |name| quoted(Path::new(&name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        let numbers = [0, 999, 1_000, 1_234_567].map(grouped);
        assert_eq!(numbers, ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([999, 1_500, 9_400_000].map(short), ["999", "1.5 K", "9.4 M"]);
        let durations = [0.0043, 0.434, 75.0, 252.3, 7_505.0, 302_400.0].map(duration);
        assert_eq!(durations, ["4.3 ms", "0.43 s", "75.0 s", "4 min 12 s", "2 h 05 min", "3.5 days"]);
        assert_eq!([1, 2_048].map(|ranks| counted(ranks, "rank")), ["1 rank", "2,048 ranks"]);
        assert_eq!(spark(&[0.0, 1.0, 2.0, 9.0], 2.0), "▁▅██");
    }

    #[test]
    fn a_column_has_the_unit_of_its_largest_number() {
        let dollars = [5_273_000.0, 75_903.5, 953.0, 0.0].map(|usd| Scale::dollars(usd).write(usd));
        assert_eq!(dollars, ["5.273 M$", "75.90 k$", "953.00 $", "0.00 $"]);
        assert_eq!(Scale::seconds(0.0208).write(0.0208), "20.800 ms");
        assert_eq!(Scale::days(0.5).range([0.4, 0.6]), "9.6 to 14.4");
        assert_eq!(Scale::seconds(1.8).range([1.55, 2.08]), "1.55 to 2.08");
        assert_eq!(Scale::days(53.6).name, "days");
    }

    #[test]
    fn figures_have_intervals() {
        let step = Ranged { value: 19.926, interval: [16.5, 24.5] };
        assert_eq!(Scale::seconds(step.value).ranged(step), "19.926 s (16.5 to 24.5)");
        assert_eq!(off(step), "-17 +23%");
        assert_eq!([0.0, 1979.4, 43.606, 0.00123449].map(figure), ["0", "1979", "43.61", "0.001234"]);
        assert_eq!(off(Ranged { value: 0.0, interval: [0.0; 2] }), "0%");
        assert_eq!(grouped_range(step.times(1e3)), "19,926 (16,500 to 24,500)");
    }

    #[test]
    fn columns_line_up() {
        let rows = [["call", "bytes"], ["all_to_all", "7"]].map(|row| row.map(String::from).to_vec());
        assert_eq!(table(&rows, 1), ["  call        bytes", "  all_to_all      7"]);
        let rows = [["a", "b", "c"], ["0.0", "0.0", "1.0"], ["2.0", "0.0", "0.0"]];
        let rows = rows.map(|row| row.map(String::from).to_vec()).to_vec();
        assert_eq!(without_empty(rows, "0.0")[0], ["a", "c"]);
    }

    #[test]
    fn paths_survive_a_shell() {
        assert_eq!(quoted(Path::new("runs/a-1")), "runs/a-1");
        assert_eq!(quoted(Path::new("my run's")), r"'my run'\''s'");
    }
}
