//! `unisono generate`

use std::path::Path;

use unisono_train::{GenerateOptions, Opened, generate};

use crate::args::Generate;
use crate::error::{CliError, DONE};
use crate::layout::cores;
use crate::screen::{complain, say};

/// A run's checkpoint; says which newer ones were passed over.
pub fn open(folder: &Path, step: Option<u64>) -> Result<Opened, CliError> {
    let opened = Opened::new(folder, step)?;
    for passed in &opened.rejected {
        complain("warning", &format!("passed over a checkpoint: {passed}"));
    }
    Ok(opened)
}

/// `unisono generate`
pub fn run(args: Generate) -> Result<u8, CliError> {
    let opened = open(&args.run, args.step)?;
    let mut sample = opened.config().sample.clone();
    sample.prompt = args.prompt.unwrap_or(sample.prompt);
    sample.tokens = args.tokens.unwrap_or(sample.tokens);
    sample.temperature = args.temperature.unwrap_or(sample.temperature);
    sample.top_p = args.top_p.unwrap_or(sample.top_p);
    if !(sample.temperature.is_finite() && sample.temperature >= 0.0) {
        let given = sample.temperature;
        return Err(CliError::usage(format!("--temperature {given}: must be finite and at least 0")));
    }
    if !(sample.top_p > 0.0 && sample.top_p <= 1.0) {
        return Err(CliError::usage(format!("--top-p {}: must be above 0, at most 1", sample.top_p)));
    }
    let threads = args.threads.unwrap_or_else(cores);
    generate(&opened, &GenerateOptions { sample, seed: args.seed, threads }, &say)?;
    say("\n");
    Ok(DONE)
}
