//! `unisono plan validate`

use std::path::{Path, PathBuf};

use clap::Args;
use unisono_plan::validate::{
    Cases, Group, MemoryFigures, MemoryGroup, TableError, TimeFigures, Validation, check_cases, check_models,
};

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
        for group in groups {
            for (reason, rows) in &group.reasons {
                say(&format!("  {} skips {rows}: {reason}\n", name(group)));
            }
        }
    };
    say(&format!("{}\n", LEGEND));
    section("Families (file / model / GPU)", &validation.families);
    section("By GPU, means over families", &validation.gpus);
    section("By precision, means over families", &validation.precisions);
    let mut kinds = validation.kinds.clone();
    kinds.push(validation.all.clone());
    section("Dense and MoE, means over families", &kinds);
    say(&format!("\n{}\n", paint.strong("Peak memory by what is given, means over families")));
    let mut rows = vec![MEMORY_HEADER.map(String::from).to_vec()];
    rows.extend(validation.memory_kinds.iter().map(memory_row));
    for line in table(&rows, 1) {
        say(&format!("{line}\n"));
    }
    if let Some(error) = validation.baseline_mape_of_rows {
        let published = percent(validation.published_baseline_mape);
        say(&format!(
            "\nTrivial baseline over rows instead of families: {}; published with the measurements, of 1,050 of their rows: {published}\n",
            percent(error)
        ));
    }
    say(&format!("\n{} golden values of tests count for memory, not for time.\n", validation.golden));
    say(&format!(
        "{} rows are complete, were skipped all the same and count as an error of 100%.\n",
        validation.all.lost
    ));
    say(&format!("\n{}\n", paint.strong("Rows that were skipped")));
    for (reason, rows) in validation.skipped.iter().chain(&validation.memory_skipped) {
        say(&format!("  {rows:>5}  {reason}\n"));
    }
}

const LEGEND: &str = "\
Rows: with a compared step time; gold: a test's golden value, which counts for memory only; skip: neither; lost: complete,
but skipped, which counts as an error of 100%.
Step time: mean absolute and signed error relative to the measurement, share of measurements in the 80% interval and its
width relative to the prediction; first without knowledge of the software, then with the release factor, the median of
the other rows of the same framework, GPU and precision where there are five or more. Memory: the peak that the source
gives - allocated on the fullest GPU, allocated on the last pipeline rank (Megatron's log) or reserved on the fullest GPU
(torchtitan) - with share and width of its 80% interval. tau: Kendall's, of plans of the same model on as many of the same
GPUs. base: every row at the median rate of the other rows of its GPU, precision and kind of model.";

const HEADER: [&str; 19] = [
    "", "rows", "gold", "skip", "lost", "MAPE", "bias", "in", "width", "| MAPE", "bias", "in", "width",
    "base", "tau", "| memory", "bias", "in", "width",
];

const MEMORY_HEADER: [&str; 7] = ["", "rows", "families", "memory", "bias", "in", "width"];

/// What is not printed has no name.
fn name(group: &Group) -> &str {
    if group.name.is_empty() { "not printed" } else { &group.name }
}

fn row(group: &Group) -> Vec<String> {
    let mut cells = vec![name(group).to_string()];
    cells.extend([group.timed, group.golden, group.skipped, group.lost].map(|rows| rows.to_string()));
    cells.extend(figures(group.plain));
    cells.extend(figures(group.released));
    cells.push(group.baseline_mape.map_or_else(String::new, percent));
    cells.push(group.tau.map_or_else(String::new, |tau| format!("{tau:.2}")));
    cells.extend(memory_figures(group.memory));
    cells
}

fn memory_row(group: &MemoryGroup) -> Vec<String> {
    let counts = [group.rows, group.families].map(|count| count.to_string());
    let mut cells = vec![group.kind.name().to_string()];
    cells.extend(counts);
    cells.extend(memory_figures(Some(group.figures)));
    cells
}

fn figures(figures: Option<TimeFigures>) -> Vec<String> {
    cells(figures.map(|of| [of.mape, of.bias, of.coverage, of.width]))
}

fn memory_figures(figures: Option<MemoryFigures>) -> Vec<String> {
    cells(figures.map(|of| [of.mape, of.bias, of.coverage, of.width]))
}

/// Error, signed error, coverage and width.
fn cells(figures: Option<[f64; 4]>) -> Vec<String> {
    figures.map_or_else(
        || vec![String::new(); 4],
        |[mape, bias, coverage, width]| {
            vec![percent(mape), signed(bias), format!("{:.0}%", 100.0 * coverage), percent(width)]
        },
    )
}

fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

fn signed(share: f64) -> String {
    format!("{:+.1}%", 100.0 * share)
}
