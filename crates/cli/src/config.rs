//! Which config: the built-in one, a file's, a run's; `unisono config`.

use std::io::ErrorKind;
use std::path::Path;

use unisono_train::RunConfig;
use unisono_train::config::ConfigError;

use crate::args::Config;
use crate::error::{CliError, DONE, remedy};
use crate::screen;

/// What `unisono train` runs when it is given nothing.
pub const BUILT_IN: &str = include_str!("builtin.toml");
const REFERENCE: &str = include_str!("../../../docs/config.md");
/// How a message names it.
const BUILT_IN_NAME: &str = "the built-in config";

/// `unisono config`
pub fn run(args: &Config) -> Result<u8, CliError> {
    if args.reference {
        screen::say(REFERENCE);
        return Ok(DONE);
    }
    let config = load(args.config.as_deref(), &args.set)?;
    screen::say(&config.to_toml().map_err(|error| CliError::usage(error.to_string()))?);
    Ok(DONE)
}

/// The config of a file, or the built-in one, with overrides.
pub fn load(path: Option<&Path>, overrides: &[String]) -> Result<RunConfig, CliError> {
    match path {
        None => parse(BUILT_IN, BUILT_IN_NAME, overrides),
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|error| {
                let remedy = match error.kind() {
                    ErrorKind::NotFound => "; `unisono config --print > FILE` writes the built-in one",
                    _ => remedy(&error),
                };
                CliError::usage(format!("cannot read the config {}: {error}{remedy}", path.display()))
            })?;
            parse(&text, &path.display().to_string(), overrides)
        }
    }
}

/// Reads a config; errors name where it came from. A relative `data.path` is taken from the current folder and written
/// out, so that the run finds it from anywhere.
pub fn parse(text: &str, name: &str, overrides: &[String]) -> Result<RunConfig, CliError> {
    let mut config = RunConfig::load(text, overrides).map_err(|error| match error {
        ConfigError::Override { .. } => CliError::usage(error.to_string()),
        error => CliError::usage(format!("{name}: {error}")),
    })?;
    if let Some(path) = &mut config.data.path {
        *path = std::path::absolute(&path)
            .map_err(|error| CliError::usage(format!("{name}: data.path = {}: {error}", path.display())))?;
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use super::*;

    /// Keys and what is said about them: of the tables' rows, the key and the default.
    fn documented() -> BTreeMap<&'static str, &'static str> {
        let rows = REFERENCE.lines().filter_map(|line| line.strip_prefix("| `"));
        let row = |line: &'static str| {
            let cells: Vec<&str> = line.split(" | ").collect();
            assert!(cells.len() >= 4 || line.contains("| | "), "not a whole row: {line}");
            (cells[0].trim_end_matches('`'), cells[2].trim_matches('`'))
        };
        rows.map(row).collect()
    }

    #[test]
    fn the_reference_has_every_key_with_its_default() {
        let text = RunConfig::default().to_toml().unwrap();
        let table: toml::Table = text.parse().unwrap();
        let mut documented = documented();
        assert_eq!(documented.remove("data.path"), Some("none"));
        for (section, keys) in &table {
            for (key, default) in keys.as_table().unwrap() {
                let said = documented.remove(format!("{section}.{key}").as_str());
                let said = said.unwrap_or_else(|| panic!("docs/config.md lacks {section}.{key} = {default}"));
                let said: toml::Table = format!("value = {said}").parse().unwrap();
                assert_eq!(&said["value"], default, "docs/config.md: default of {section}.{key}");
            }
        }
        assert!(documented.is_empty(), "docs/config.md has keys that do not exist: {documented:?}");
    }

    #[test]
    fn the_built_in_config_and_the_examples_load() {
        load(None, &[]).unwrap();
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples");
        let mut examples = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "toml") {
                load(Some(&path), &[]).unwrap_or_else(|error| panic!("{error}"));
                examples += 1;
            }
        }
        assert!(examples >= 3);
    }

    #[test]
    fn a_relative_data_path_is_written_out() {
        let config = load(None, &["data.path=here".into()]).unwrap();
        assert!(config.data.path.unwrap().is_absolute());
    }
}
