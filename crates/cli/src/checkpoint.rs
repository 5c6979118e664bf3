//! `unisono checkpoint`

use std::path::{Path, PathBuf};
use std::time::Instant;

use unisono_checkpoint::{Listed, list, verify};
use unisono_train::run_folder::CHECKPOINTS;
use unisono_train::system::readable;

use crate::args::Checkpoint;
use crate::error::{BAD_INPUT, CliError, DONE};
use crate::screen::{complain, say};
use crate::style::{duration, grouped, table};

/// `unisono checkpoint`
pub fn run(args: Checkpoint) -> Result<u8, CliError> {
    match args {
        Checkpoint::Ls { run } => run_list(&run),
        Checkpoint::Verify { run, step } => run_verify(&run, step),
    }
}

/// The checkpoints of a run; at least one.
fn listed(run: &Path) -> Result<(PathBuf, Vec<Listed>), CliError> {
    let dir = run.join(CHECKPOINTS);
    let listed = list(&dir)?;
    if listed.is_empty() {
        return Err(CliError::usage(format!(
            "{} has no checkpoints: name the folder of a run",
            run.display()
        )));
    }
    Ok((dir, listed))
}

fn run_list(run: &Path) -> Result<u8, CliError> {
    let (_, listed) = listed(run)?;
    let mut rows = vec![["step", "size", "files", "tensors", "epoch"].map(String::from).to_vec()];
    let mut bad = Vec::new();
    for checkpoint in &listed {
        match &checkpoint.state {
            Ok(summary) => rows.push(vec![
                checkpoint.step.to_string(),
                readable(summary.bytes),
                grouped(summary.files as u64),
                grouped(summary.tensors as u64),
                summary.epoch.to_string(),
            ]),
            Err(error) => bad.push(format!("step {}: {error}", checkpoint.step)),
        }
    }
    say(&format!("{}\n", table(&rows, 0).join("\n")));
    bad.iter().for_each(|message| complain("error", message));
    Ok(if bad.is_empty() { DONE } else { BAD_INPUT })
}

fn run_verify(run: &Path, step: Option<u64>) -> Result<u8, CliError> {
    let (dir, listed) = listed(run)?;
    let steps =
        step.map_or_else(|| listed.iter().map(|checkpoint| checkpoint.step).collect(), |step| vec![step]);
    let mut code = DONE;
    for step in steps {
        let begin = Instant::now();
        match verify(&dir, step) {
            Ok(verified) => {
                let seconds = begin.elapsed().as_secs_f64();
                let rate = verified.bytes as f64 / seconds.max(1e-9);
                say(&format!(
                    "step {step}: {} files, {}, every hash is right ({}, {}/s)\n",
                    verified.files,
                    readable(verified.bytes),
                    duration(seconds),
                    readable(rate as u64)
                ));
            }
            Err(error) => {
                let error = CliError::from(error);
                complain("error", &error.message);
                code = error.code;
            }
        }
    }
    Ok(code)
}
