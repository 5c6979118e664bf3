//! Where a run begins: anew, at a checkpoint, or once more at step 0.

use std::path::Path;

use unisono_checkpoint::{Reader, latest};
use unisono_data::Dataset;

use crate::config::{OnNonFinite, RunConfig};
use crate::error::TrainError;
use crate::run::{RunOptions, fingerprint, read_extra};
use crate::run_folder::{CHECKPOINTS, CONFIG_FILE, holds_a_run, read_config};

/// Where a run begins.
#[derive(Debug, Default)]
pub(crate) struct Start {
    /// The checkpoint to go on from.
    pub checkpoint: Option<u64>,
    /// Checkpoints that were passed over, and why.
    pub rejected: Vec<String>,
    /// The folder's run ended before its first checkpoint, and begins once more.
    pub again: bool,
}

impl Start {
    /// What was written after this step is dropped.
    pub fn keep_until(&self) -> Option<u64> {
        self.checkpoint.or(self.again.then_some(0))
    }
}

/// Where the run in the options' folder goes on. Calls `read` as it gets on.
///
/// # Errors
/// If the folder holds no run to go on with, or one of another computation; without resume, if it holds one.
pub(crate) fn find_start(
    config: &RunConfig,
    options: &RunOptions,
    dataset: &Dataset,
    read: &dyn Fn(),
) -> Result<Start, TrainError> {
    let folder = &options.folder;
    if folder.is_file() {
        return Err(TrainError::Refused(format!(
            "{} is a file: name a folder for the run with --run",
            folder.display()
        )));
    }
    if !options.resume {
        if holds_a_run(folder) {
            return Err(TrainError::Refused(format!(
                "{} already holds a run: add --resume to go on with it, or name another folder with --run",
                folder.display()
            )));
        }
        return Ok(Start::default());
    }
    let found = latest(&folder.join(CHECKPOINTS), read)?;
    let rejected: Vec<String> =
        found.rejected.iter().map(|(step, why)| format!("step {step}: {why}")).collect();
    let Some(step) = found.step else { return begin_again(config, folder, &rejected) };
    let extra = read_extra(&Reader::open(&folder.join(CHECKPOINTS), step)?)?;
    check_same_computation(config, &extra.config)?;
    if extra.data != fingerprint(dataset) {
        return Err(TrainError::Refused(format!(
            "the data of {} are not the ones the run was started with: resume with the same dataset",
            folder.display()
        )));
    }
    Ok(Start { checkpoint: Some(step), rejected, again: false })
}

/// A run that was never saved has lost nothing but time.
fn begin_again(config: &RunConfig, folder: &Path, rejected: &[String]) -> Result<Start, TrainError> {
    if !rejected.is_empty() {
        return Err(TrainError::Refused(format!(
            "{} has no checkpoint that verifies ({}): start anew with another --run",
            folder.display(),
            rejected.join("; ")
        )));
    }
    if !folder.join(CONFIG_FILE).exists() {
        return Err(TrainError::Refused(format!(
            "{} holds no run to resume: name its folder with --run, or start one without --resume",
            folder.display()
        )));
    }
    check_same_computation(config, &read_config(folder)?)?;
    Ok(Start { again: true, ..Start::default() })
}

/// What may not change between start and resume, since later numbers would not be those of one run.
fn check_same_computation(now: &RunConfig, then: &RunConfig) -> Result<(), TrainError> {
    let fixed = |config: &RunConfig| {
        let mut fixed = config.clone();
        fixed.train.steps = 0;
        fixed.train.recompute = crate::config::RecomputeConfig::None;
        fixed.train.on_non_finite = OnNonFinite::Skip;
        let (optimizer, schedule) = Default::default();
        (fixed.optimizer, fixed.schedule) = (optimizer, schedule);
        (fixed.data, fixed.layout) = Default::default();
        (fixed.evaluation, fixed.checkpoint) = (Default::default(), Default::default());
        (fixed.log, fixed.watchdog, fixed.sample) = Default::default();
        fixed
    };
    let (now, then) = (fixed(now).to_toml()?, fixed(then).to_toml()?);
    match now.lines().zip(then.lines()).find(|(now, then)| now != then) {
        None => Ok(()),
        Some((now, then)) => Err(TrainError::Refused(format!(
            "resume asks for {now}, the run was started with {then}: this would be another computation; drop the change or \
             start anew with another --run"
        ))),
    }
}
