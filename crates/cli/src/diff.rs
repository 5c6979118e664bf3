//! `unisono diff`: the first step, and the quantity or tensor, in which two runs differ.

use std::collections::BTreeSet;
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
    let tables = [table(first)?, table(second)?];
    let keys_of = |table: &toml::Table| -> Vec<(String, String)> {
        let sections = table.iter().filter_map(|(section, keys)| Some((section, keys.as_table()?)));
        sections.flat_map(|(section, keys)| keys.keys().map(|key| (section.clone(), key.clone()))).collect()
    };
    // A key without a default, such as data.path, may stand in one of them only.
    let keys: BTreeSet<(String, String)> = tables.iter().flat_map(keys_of).collect();
    let line = |(section, key): (String, String)| {
        let [a, b] = tables.each_ref().map(|table| table.get(&section).and_then(|keys| keys.get(&key)));
        let text = |value: Option<&toml::Value>| value.map_or("nothing".into(), toml::Value::to_string);
        (a != b).then(|| format!("{section}.{key} = {} and {}", text(a), text(b)))
    };
    Ok(keys.into_iter().filter_map(line).collect())
}
