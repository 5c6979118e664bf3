//! `unisono train`

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use unisono_comm::{Failure, Reason};
use unisono_train::run_folder::{
    CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, holds_a_run, read_config, write_durably,
};
use unisono_train::{GenerateOptions, Opened, RunConfig, RunOptions, Summary, fast_product, generate};

use crate::args::Train;
use crate::config;
use crate::error::{BUG, CliError, DONE, REQUEUE, remedy};
use crate::job::Job;
use crate::layout::cores;
use crate::machine::{self, Hosts, Sees};
use crate::screen::{Screen, complain, say};
use crate::signals::{Signals, Then};
use crate::style::{Paint, WIDTH, program, quoted};
use crate::summary;
use crate::watch::{Seen, Watch};

/// The progress bar.
pub const BAR: &str = "[{bar:30}] step {pos}/{len}  {elapsed} gone, {eta} left  {msg}";
/// Where runs go that are not told where to go.
const RUNS: &str = "runs";

/// `unisono train`
pub fn run(args: Train) -> Result<u8, CliError> {
    let job = Job::join()?;
    let outcome = train(args, &job);
    job.end(outcome)
}

fn train(args: Train, job: &Job) -> Result<u8, CliError> {
    let leads = job.leads();
    let (config, options) = resolve(args, job)?;
    let screen = Arc::new(Screen::new(BAR));
    let notice = {
        let (screen, deck, place) = (Arc::clone(&screen), options.deck.clone(), job.place.clone());
        move || {
            // If the step never ends because another rank has died, this is what is left to know.
            let written = deck.write(&Reason::Terminated);
            if deck.is_starting() {
                // This rank may be busy for longer than it will live.
                if let Some(failure) = place.found_dead() {
                    complain("error", &failure.to_string());
                }
                return Then::End;
            }
            if leads {
                screen.complain("stopping", "after this step and a checkpoint; Ctrl-C now quits at once");
            }
            if let Err(error) = written {
                screen.complain("warning", &format!("no flight record: {error}"));
            }
            Then::Save
        }
    };
    let signals = Signals::listen(job.place.clone(), notice)?;
    job.wait_at_end(config.watchdog.limits().map(|limits| limits.max));
    let watch = Watch::new(Arc::clone(&screen), &signals, &config);
    if leads {
        screen.wait("reading the data");
    }
    job.runs_in(&options.folder, &options.deck);
    let outcome = unisono_train::train(&config, &options, &watch);
    job.dismiss_guard();
    signals.quit_at_once();
    let seen = watch.finish();
    let mut summary = outcome?;
    let code = if summary.stopped && signals.terminated() { REQUEUE } else { DONE };
    if !leads {
        return Ok(code);
    }
    let Some(started) = &seen.started else {
        return Err(CliError { code: BUG, message: "the run ended without a beginning".into() });
    };
    if !summary.stopped && seen.last.is_some() {
        sample(&config, &options, &seen, &mut summary)?;
    }
    let on_hosts = started.world.nodes.len() > 1 && job.ranks().is_some();
    say(&format!("\n{}", summary::render(&summary, started, &config, on_hosts, screen.paint)));
    say(&next_commands(&config, &options.folder, &summary, screen.paint));
    Ok(code)
}

/// A rank of this process is stuck outside of all calls, so the run can end in no other way.
pub fn abandon(failure: &Failure) {
    #[cfg(feature = "mpi")]
    if failure.cause == unisono_comm::Cause::Died {
        // Who has noticed may have no terminal, or have ended before it could say so.
        let speaker = usize::from(failure.rank == 0);
        if unisono_comm::mpi::launched().is_some_and(|launched| launched.rank == speaker) {
            let Failure { rank, cause, .. } = failure;
            complain(
                "error",
                &format!("rank {rank} {cause}; `unisono doctor` on the run's folder tells more"),
            );
        }
        crate::outlive::outlive(true, BUG);
    }
    complain("error", &failure.to_string());
    std::process::exit(i32::from(BUG));
}

/// One checked value from the raw arguments.
fn resolve(args: Train, job: &Job) -> Result<(RunConfig, RunOptions), CliError> {
    let mut overrides = args.set;
    overrides.extend(args.steps.map(|steps| format!("train.steps={steps}")));
    let named = args.run.clone();
    let folder = match (args.run, args.resume) {
        (Some(folder), _) => folder,
        (None, false) => new_folder(),
        (None, true) => newest_run()?,
    };
    let config = match (&args.config, args.resume) {
        (None, true) => config_of_run(&folder, &overrides)?,
        (path, _) => config::load(path.as_deref(), &overrides)?,
    };
    let (ranks, threads) =
        job.ranks_and_threads(config.grid.slots(), args.ranks, args.threads, &args.nodes)?;
    // Each process would name it by its own clock.
    let folder = PathBuf::from(job.told_by_first(folder.display().to_string())?);
    if let Some(named) = named.filter(|named| *named != folder) {
        return Err(CliError::usage(format!(
            "--run {}: rank 0 goes to {}; give all ranks the same folder",
            named.display(),
            folder.display()
        )));
    }
    let mut options = RunOptions::new(folder, ranks, threads);
    (options.resume, options.trace, options.nodes) = (args.resume, args.trace, args.nodes);
    (options.abandon, options.place) = (abandon, job.place.clone());
    if job.leads() {
        predict(&mut options, job, &config, args.machine.as_deref(), args.cluster.as_deref())?;
    }
    Ok((config, options))
}

/// What the planner says of a step, if it knows the machine, and the hosts where there are several.
fn predict(
    options: &mut RunOptions,
    job: &Job,
    config: &RunConfig,
    machine: Option<&Path>,
    cluster: Option<&Path>,
) -> Result<(), CliError> {
    let (ranks, threads, host_of) = (options.ranks, options.threads, job.hosts());
    let host = |rank: usize| host_of.get(rank).copied().unwrap_or(0);
    let sees = if host_of.is_empty() { Sees::All } else { Sees::Some };
    let hosts = 1 + host_of.iter().copied().max().unwrap_or(0);
    let known = match (cluster, hosts) {
        (Some(path), 2..) => Some(Hosts::read(&read_cluster(path)?, path, machine, sees)?),
        (Some(path), _) => {
            return Err(CliError::usage(format!(
                "--cluster {}: these ranks are on one host; leave it out, `--machine` is for one",
                path.display()
            )));
        }
        (None, 1) => machine::load(machine, sees)?.map(|machine| Hosts { machine, cluster: None }),
        (None, _) => match machine {
            Some(file) => {
                return Err(CliError::usage(format!(
                    "--machine {}: these ranks are on {hosts} hosts; a file of --cluster says what lies between them",
                    file.display()
                )));
            }
            None => None,
        },
    };
    let threads_of_host = (ranks * threads).div_ceil(hosts);
    let Some(known) = known else {
        // Not the machine's own measurement, but enough to say how much of its rate a step reaches.
        options.peak_flops = Some((hosts * threads_of_host.min(cores())) as f64 * fast_product()?);
        return Ok(());
    };
    if let Some(path) = cluster.filter(|_| known.count() < hosts) {
        return Err(CliError::usage(format!(
            "--cluster {}: describes {} hosts, these ranks are on {hosts}",
            path.display(),
            known.count()
        )));
    }
    let price = known.price(config, ranks, threads, host)?;
    (options.predicted_step_s, options.predicted_interval_s) = (Some(price.step_s), price.interval_s);
    options.peak_flops = Some(hosts as f64 * machine::peak_flops(&known.machine, threads_of_host));
    Ok(())
}

fn read_cluster(path: &Path) -> Result<String, CliError> {
    std::fs::read_to_string(path)
        .map_err(|error| CliError::bad_input(format!("{}: {error}{}", path.display(), remedy(&error))))
}

/// The config that a run was last started with, with overrides.
fn config_of_run(folder: &Path, overrides: &[String]) -> Result<RunConfig, CliError> {
    if !holds_a_run(folder) {
        return Err(CliError::usage(format!(
            "{} holds no run to resume: name its folder with --run, or start one without --resume",
            folder.display()
        )));
    }
    let text = read_config(folder)?.to_toml().map_err(|error| CliError::usage(error.to_string()))?;
    config::parse(&text, &folder.join(CONFIG_FILE).display().to_string(), overrides)
}

/// `runs/<date>-<time>`, with a number behind it where that is taken.
fn new_folder() -> PathBuf {
    let name = jiff::Zoned::now().strftime("%Y%m%d-%H%M%S").to_string();
    let numbered = (2..).map(|number| format!("{name}-{number}"));
    let mut names = std::iter::once(name.clone()).chain(numbered).map(|name| Path::new(RUNS).join(name));
    names.find(|path| !path.exists()).unwrap_or_else(|| Path::new(RUNS).join(&name))
}

/// The run below `runs/` that was written to last.
fn newest_run() -> Result<PathBuf, CliError> {
    let none =
        || CliError::usage(format!("there is no run in {RUNS}/ to resume: name its folder with --run DIR"));
    let entries = std::fs::read_dir(RUNS).map_err(|_| none())?;
    let runs = entries.filter_map(Result::ok).map(|entry| entry.path()).filter(|path| holds_a_run(path));
    let written = |path: &PathBuf| path.join(METRICS_FILE).metadata().and_then(|file| file.modified()).ok();
    runs.max_by_key(|path| (written(path), path.clone())).ok_or_else(none)
}

/// A sample of text from the last checkpoint, shown as it comes and kept in the run's summary. The other processes wait for
/// it, at their end, as long as text comes.
fn sample(
    config: &RunConfig,
    options: &RunOptions,
    seen: &Seen,
    summary: &mut Summary,
) -> Result<(), CliError> {
    let (folder, place) = (&options.folder, &options.place);
    if config.sample.tokens == 0 {
        return Ok(());
    }
    if seen.checkpoint != Some(summary.step) {
        complain("warning", "no sample: the last checkpoint could not be written");
        return Ok(());
    }
    let rule = |title: &str| {
        let paint = Paint::new(&std::io::stdout());
        let dashes = "─".repeat(WIDTH.saturating_sub(title.chars().count()));
        format!("{}\n", paint.faint(&format!("{title}{dashes}")))
    };
    say(&format!("\n{}", rule("── a sample of text ")));
    let options =
        GenerateOptions { sample: config.sample.clone(), seed: config.train.seed, threads: cores() };
    let first = AtomicBool::new(true);
    let show = |text: &str| {
        place.beat();
        match first.swap(false, Ordering::Relaxed) {
            true => say(&Paint::new(&std::io::stdout()).strong(text.trim_start())),
            false => say(text),
        }
    };
    let text = generate(&Opened::new(folder, Some(summary.step))?, &options, &show)?;
    say(&format!("\n{}", rule("")));
    summary.sample = Some(format!("{}{text}", config.sample.prompt));
    let json = serde_json::to_vec_pretty(summary)
        .map_err(|error| CliError { code: BUG, message: error.to_string() })?;
    Ok(write_durably(&folder.join(SUMMARY_FILE), &json)?)
}

/// What to do next, ready to be copied.
fn next_commands(config: &RunConfig, folder: &Path, summary: &Summary, paint: Paint) -> String {
    let (program, run) = (program(), quoted(folder));
    let mut lines = vec![String::new()];
    let steps = summary.step + config.train.steps.div_ceil(2).max(1);
    let more = format!("  {program} train --run {run} --resume --steps {steps}");
    if summary.step == 0 && !summary.stopped {
        // No step, no checkpoint to write text from.
        lines.extend([paint.strong("Next"), more]);
    } else if summary.stopped {
        lines.push(
            paint.strong(&format!(
                "Stopped after step {} of {}. Go on with",
                summary.step, config.train.steps
            )),
        );
        lines.push(format!("  {program} train --run {run} --resume"));
    } else {
        lines.push(paint.strong("Next"));
        lines.push(format!("  {program} generate --run {run} --prompt 'To be'"));
        lines.push(format!("  {program} eval --run {run}"));
        lines.push(more);
    }
    lines.push(String::new());
    lines.join("\n")
}
