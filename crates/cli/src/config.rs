//! Which config: the built-in one, a file's, a run's; `unisono config`.

use std::path::Path;

use unisono_train::RunConfig;
use unisono_train::config::ConfigError;

use crate::args::Config;
use crate::error::{CliError, DONE};
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
                CliError::usage(format!("cannot read the config {}: {error}", path.display()))
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
