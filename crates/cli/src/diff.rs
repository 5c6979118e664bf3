//! `unisono diff`: the first step, and the quantity or tensor, in which two runs differ.

use std::path::Path;

use unisono_train::Comparison;
use unisono_train::run_folder::{METRICS_FILE, read_config};

use crate::args::Diff;
use crate::error::{CliError, DIFFERENT, DONE};
use crate::screen::say;

/// `unisono diff`
pub fn run(args: &Diff) -> Result<u8, CliError> {
    for folder in [&args.first, &args.second] {
        if !folder.join(METRICS_FILE).is_file() {
            return Err(CliError::no_run(folder));
        }
    }
    let comparison = Comparison::new(&args.first, &args.second)?;
    if comparison.steps == 0 && comparison.checkpoints.is_empty() {
        return Err(CliError::usage("the runs have no step in common: nothing to compare"));
    }
    say(&comparison.render());
    if comparison.is_equal() {
        return Ok(DONE);
    }
    for line in config_differences(&args.first, &args.second)? {
        say(&format!("  config: {line}\n"));
    }
    Ok(DIFFERENT)
}

/// Keys in which the configs differ, as `train.seed = 1 and 2`.
fn config_differences(first: &Path, second: &Path) -> Result<Vec<String>, CliError> {
    let unwritable = |error: unisono_train::ConfigError| CliError::usage(error.to_string());
    let table = |folder: &Path| -> Result<toml::Table, CliError> {
        let text = read_config(folder)?.to_toml().map_err(unwritable)?;
        text.parse().map_err(|error: toml::de::Error| CliError::usage(error.to_string()))
    };
    let [a, b] = [table(first)?, table(second)?];
    let mut lines = Vec::new();
    for (section, a) in &a {
        let b = b.get(section);
        for (key, value) in a.as_table().into_iter().flatten() {
            let other = b.and_then(|section| section.get(key));
            if other != Some(value) {
                let other = other.map_or_else(|| "nothing".into(), toml::Value::to_string);
                lines.push(format!("{section}.{key} = {value} and {other}"));
            }
        }
    }
    Ok(lines)
}
