//! `unisono plan validate`

use std::path::{Path, PathBuf};

use clap::Args;
use unisono_plan::validate::{Cases, Group, TableError, TimeFigures, Validation, check_cases, check_models};

use super::answer::spread;
use crate::error::{CliError, DONE, check_file, remedy};
use crate::screen::{Screen, say};
use crate::style::{Paint, table};

/// The template of the bar.
const BAR: &str = "pricing rows {bar:30} {pos}/{len}  {elapsed}";

/// `unisono plan validate`
#[derive(Debug, Args)]
pub struct Validate {
    /// Measured runs, a CSV file with the columns of `end_to_end.csv`
    #[arg(value_name = "CASES.csv")]
    pub cases: PathBuf,
    /// Architectures, a CSV file with the columns of `models.csv` [default: the built-in ones]
    #[arg(long, value_name = "FILE")]
    pub models: Option<PathBuf>,
    /// Print one JSON object, with every row
    #[arg(long)]
    pub json: bool,
}

/// Prices every row and prints how far off.
pub fn run(args: Validate) -> Result<u8, CliError> {
    check_file("CASES.csv", &args.cases, "name a table of measured runs (docs/validation.md says of what)")?;
    if let Some(models) = &args.models {
        check_file(
            "--models",
            models,
            "name a table of architectures, or leave it out for the built-in ones",
        )?;
    }
    let cases = read(&args.cases, check_cases)?;
    let models = args.models.as_deref().map(|path| read(path, check_models)).transpose()?;
    let cases = Cases::read(&cases, models.as_deref());
    let screen = Screen::new(BAR);
    let rows = spread(&screen, cases.len(), |row| cases.predict(row));
    screen.finish();
    let validation = cases.judge(rows);
    if args.json {
        say(&format!("{}\n", serde_json::json!(validation)));
    } else {
        print(&validation);
    }
    Ok(DONE)
}

/// The text of a table that passes `check`; what is not UTF-8 in it is replaced.
fn read(path: &Path, check: fn(&str) -> Result<(), TableError>) -> Result<String, CliError> {
    let bad = |error: String| CliError::bad_input(format!("{}: {error}", path.display()));
    let bytes = std::fs::read(path).map_err(|error| bad(format!("{error}{}", remedy(&error))))?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    check(&text).map_err(|error| bad(error.to_string()))?;
    Ok(text)
}

fn print(validation: &Validation) {
    let paint = Paint::new(&std::io::stdout());
    let section = |title: &str, groups: &[Group]| {
        say(&format!("\n{}\n", paint.strong(title)));
        let mut rows = vec![HEADER.map(String::from).to_vec()];
        rows.extend(groups.iter().map(row));
        for line in table(&rows, 1) {
            say(&format!("{line}\n"));
        }
    };
    say(&format!("{}\n", LEGEND));
    section("Families (file / model / GPU)", &validation.families);
    section("By GPU, means over families", &validation.gpus);
    section("By precision, means over families", &validation.precisions);
    let mut kinds = validation.kinds.clone();
    kinds.push(validation.all.clone());
    section("Dense and MoE, means over families", &kinds);
    if let Some(error) = validation.baseline_mape_of_rows {
        say(&format!("\nTrivial baseline over rows instead of families: {}\n", percent(error)));
    }
    say(&format!("\n{}\n", paint.strong("Rows without a compared step time")));
    for (reason, rows) in &validation.skipped {
        say(&format!("  {rows:>5}  {reason}\n"));
    }
}

const LEGEND: &str = "\
Step time: mean absolute and signed error relative to the measurement, share of measurements in the 80% interval and its
width relative to the prediction; first without knowledge of the software, then with the release factor, the median of
the other rows of the same framework, GPU and precision where there are five or more. Memory: peak allocated bytes of the
fullest GPU. tau: Kendall's, of plans of the same model on as many of the same GPUs. base: every row at the median rate
of its GPU, precision and kind of model.";

const HEADER: [&str; 15] = [
    "", "rows", "skip", "MAPE", "bias", "in", "width", "| MAPE", "bias", "in", "width", "base", "tau",
    "| memory", "bias",
];

fn row(group: &Group) -> Vec<String> {
    let mut cells = vec![group.name.clone(), group.timed.to_string(), group.skipped.to_string()];
    cells.extend(figures(group.plain));
    cells.extend(figures(group.released));
    cells.push(group.baseline_mape.map_or_else(String::new, percent));
    cells.push(group.tau.map_or_else(String::new, |tau| format!("{tau:.2}")));
    cells.push(group.memory_mape.map_or_else(String::new, percent));
    cells.push(group.memory_bias.map_or_else(String::new, signed));
    cells
}

fn figures(figures: Option<TimeFigures>) -> Vec<String> {
    figures.map_or_else(
        || vec![String::new(); 4],
        |of| {
            vec![percent(of.mape), signed(of.bias), format!("{:.0}%", 100.0 * of.coverage), percent(of.width)]
        },
    )
}

fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

fn signed(share: f64) -> String {
    format!("{:+.1}%", 100.0 * share)
}
