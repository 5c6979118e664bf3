//! `unisono verify`: whether a layout gives the bits of one rank, before a long run.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use unisono_train::{Comparison, Event, Observer, RunOptions, verify};

use crate::args::Verify;
use crate::config;
use crate::error::{CliError, DIFFERENT, DONE};
use crate::job::Job;
use crate::screen::{Screen, say};
use crate::signals::clean_up_at_signal;
use crate::style::{counted, program, quoted};
use crate::train::abandon;

/// The progress bar.
pub const BAR: &str = "[{bar:30}] step {pos}/{len}  {elapsed} gone  {msg}";

/// Shows both runs on one bar, and a line for each.
struct Progress {
    screen: Screen,
    steps: u64,
    /// Runs that have begun.
    runs: AtomicU64,
}

impl Observer for Progress {
    fn event(&self, event: Event) {
        let length = 2 * self.steps;
        match event {
            Event::Started(started) => {
                let before = self.runs.fetch_add(1, Ordering::Relaxed);
                self.screen.line(&format!(
                    "{} with {} of {}",
                    counted(self.steps, "step"),
                    counted(started.ranks as u64, "rank"),
                    counted(started.threads as u64, "thread")
                ));
                self.screen.start(before * self.steps, length);
            }
            Event::Step(record) => {
                let before = self.runs.load(Ordering::Relaxed).saturating_sub(1) * self.steps;
                self.screen.advance(before + record.step, length, format!("loss {:.4}", record.loss));
                self.screen.line(&format!(
                    "  step {}  loss {:.6}  grad {:.6}",
                    record.step, record.loss, record.grad_norm
                ));
            }
            Event::Warning(message) => self.screen.complain("warning", &message),
            Event::Validation(_) | Event::Checkpoint { .. } => {}
        }
    }
}

/// Where both runs go; gone with this value unless it is kept.
struct Runs {
    folder: PathBuf,
    kept: bool,
}

impl Runs {
    fn new(named: Option<PathBuf>) -> Result<Self, CliError> {
        let Some(folder) = named else {
            let name = format!("unisono-verify-{}", std::process::id());
            return Ok(Self { folder: std::env::temp_dir().join(name), kept: false });
        };
        if folder.exists() {
            return Err(CliError::usage(format!(
                "{} is there already: name another folder with --run",
                folder.display()
            )));
        }
        Ok(Self::kept(folder))
    }

    fn kept(folder: PathBuf) -> Self {
        Self { folder, kept: true }
    }
}

impl Drop for Runs {
    fn drop(&mut self) {
        if !self.kept {
            remove(&self.folder);
        }
    }
}

/// Removes a temporary folder, while ranks may still be writing there. One that stays is no reason to fail.
fn remove(folder: &Path) {
    const TRIES: usize = 20;
    for _ in 0..TRIES {
        if std::fs::remove_dir_all(folder).is_ok() || !folder.exists() {
            return;
        }
    }
}

/// `unisono verify`
pub fn run(args: Verify) -> Result<u8, CliError> {
    let job = Job::join()?;
    let outcome = check(args, &job);
    job.end(outcome)
}

fn check(args: Verify, job: &Job) -> Result<u8, CliError> {
    let config = config::load(args.config.as_deref(), &args.set)?;
    let (ranks, threads) =
        job.ranks_and_threads(config.grid.slots(), args.ranks, args.threads, &args.nodes)?;
    let mut runs = if job.leads() { Runs::new(args.run)? } else { Runs::kept(PathBuf::new()) };
    if !runs.kept {
        let folder = runs.folder.clone();
        clean_up_at_signal(move || remove(&folder))?;
    }
    let folder = PathBuf::from(job.told_by_first(runs.folder.display().to_string())?);
    let mut options = RunOptions::new(&folder, ranks, threads);
    job.runs_in(&unisono_train::verified_folder(&folder), &options.deck);
    (options.nodes, options.abandon, options.place) = (args.nodes, abandon, job.place.clone());
    let progress = Progress { screen: Screen::new(BAR), steps: args.steps, runs: AtomicU64::new(0) };
    if job.leads() {
        progress.screen.wait("reading the data");
    }
    let outcome = verify(&config, args.steps, &options, &progress);
    progress.screen.finish();
    let Some(comparison) = outcome? else { return Ok(DONE) };
    runs.kept |= !comparison.is_equal();
    say(&verdict(&comparison, &folder, runs.kept));
    Ok(if comparison.is_equal() { DONE } else { DIFFERENT })
}

fn verdict(comparison: &Comparison, folder: &Path, kept: bool) -> String {
    let what = "losses, gradient norm, routing counts, parameters, optimizer moments, balance bias";
    let mut text = format!("{}  of each step: {what}\n", comparison.render());
    if kept {
        let [one, other] = [unisono_train::reference_folder(folder), unisono_train::verified_folder(folder)]
            .map(|path| quoted(&path));
        text.push_str(&format!("  both runs are kept: {} diff {one} {other}\n", program()));
    }
    text
}
