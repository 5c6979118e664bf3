//! `unisono bench local` and `unisono bench layouts`: this machine for the planner, and the planner against this machine.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use unisono_plan::engine::LocalMachine;
use unisono_train::bench::{StepBench, bench_step};
use unisono_train::run_folder::write_durably;
use unisono_train::{measure_machine, recalibrate};

use crate::args::count;
use crate::config;
use crate::error::{CliError, DONE};
use crate::machine::{self, LocalLayout, MACHINE_FILE, Sees};
use crate::screen::{complain, say};
use crate::style::{duration, percent, table};

/// `unisono bench local`
#[derive(Debug, Args)]
pub struct Local {
    /// File to write
    #[arg(long, value_name = "FILE", default_value = MACHINE_FILE)]
    out: PathBuf,
    /// Fit what FILE says to a finished run, from its trace, instead of measuring the machine anew
    #[arg(long, value_name = "RUN")]
    from: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// `unisono bench layouts`
#[derive(Debug, Args)]
pub struct Layouts {
    /// TOML file [default: the built-in config]
    config: Option<PathBuf>,
    /// File of `unisono bench local` [default: local.toml]
    #[arg(long, value_name = "FILE")]
    machine: Option<PathBuf>,
    /// Steps measured of each layout in a round
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = count())]
    steps: usize,
    /// Rounds through all layouts; the one in which a layout was fastest counts
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = count())]
    rounds: usize,
    /// Override one key of the config; may be given again
    #[arg(long, value_name = "a.b=c")]
    set: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// `unisono bench local`
pub fn local(args: &Local) -> Result<u8, CliError> {
    if let Some(run) = &args.from {
        return from_run(args, run);
    }
    check_place(&args.out)?;
    let machine = measure_machine(&|what| complain("measuring", what))?;
    write(&machine, &args.out)?;
    if args.json {
        say(&format!("{}\n", json!({"file": args.out, "machine": machine})));
        return Ok(DONE);
    }
    let rate = machine.products.plain.iter().copied().fold(0.0, f64::max);
    say(&format!(
        "{}, {} cores: {rate:.0} GFLOP/s a thread at most, copies {:.1} GB/s.\nWrote {}; `unisono plan CONFIG local` and `unisono \
         train` use it.\n",
        machine.cpu,
        machine.cores,
        machine.copy_bytes_per_s / 1e9,
        args.out.display()
    ));
    Ok(DONE)
}

/// `unisono bench local --from RUN`
fn from_run(args: &Local, run: &Path) -> Result<u8, CliError> {
    let mut machine = machine::load_named(&args.out, Sees::All)?;
    let learnt = recalibrate(&mut machine, run)?;
    write(&machine, &args.out)?;
    if args.json {
        let of_run = json!({
            "run": run, "ranks": learnt.ranks, "threads": learnt.threads, "steps": learnt.steps,
            "predicted_s": learnt.before_s, "measured_s": learnt.after_s,
        });
        say(&format!("{}\n", json!({"file": args.out, "from": of_run, "machine": machine})));
        return Ok(DONE);
    }
    say(&format!(
        "{} ranks x {} threads: {} a step over {} steps of {}; {} was predicted.\nWrote {}: layouts with as many ranks and threads are \
         predicted from this run.\n",
        learnt.ranks,
        learnt.threads,
        duration(learnt.after_s),
        learnt.steps,
        run.display(),
        duration(learnt.before_s),
        args.out.display()
    ));
    Ok(DONE)
}

/// Refuses a file that cannot be written before minutes are spent on what is in it.
fn check_place(path: &Path) -> Result<(), CliError> {
    let wrong = |problem: &str| CliError::usage(format!("--out {}: {problem}", path.display()));
    if path.is_dir() {
        return Err(wrong("it is a folder; name a file in it"));
    }
    match path.parent().is_none_or(|folder| folder.as_os_str().is_empty() || folder.is_dir()) {
        true => Ok(()),
        false => Err(wrong("there is no such folder; make it first")),
    }
}

fn write(machine: &LocalMachine, path: &Path) -> Result<(), CliError> {
    let text = machine.to_toml().map_err(|error| CliError::usage(error.to_string()))?;
    write_durably(path, text.as_bytes()).map_err(CliError::from)
}

/// A layout, predicted and measured.
struct Compared {
    name: String,
    predicted_s: f64,
    interval_s: Option<[f64; 2]>,
    measured_s: f64,
    /// By how much the layout's median differed between rounds: two layouts may differ by as much for no reason.
    noise: f64,
}

impl Compared {
    fn is_inside(&self) -> bool {
        self.interval_s.is_some_and(|[low, high]| (low..=high).contains(&self.measured_s))
    }
}

/// Below this difference nothing is said about which layout is faster.
const LEAST_NOISE: f64 = 0.02;

/// `unisono bench layouts`
pub fn layouts(args: &Layouts) -> Result<u8, CliError> {
    let config = config::load(args.config.as_deref(), &args.set)?;
    let machine = machine::load(args.machine.as_deref(), Sees::All)?
        .ok_or_else(|| CliError::usage("measure this machine first: `unisono bench local`"))?;
    let layouts = machine::layouts(&config);
    let mut all = Vec::new();
    for layout in &layouts {
        let price = machine::price(&machine, &layout.config, layout.ranks, layout.threads)?;
        all.push(Compared {
            name: layout.name(),
            predicted_s: price.step_s,
            interval_s: price.interval_s,
            measured_s: f64::INFINITY,
            noise: LEAST_NOISE,
        });
    }
    let rounds = args.rounds.max(1);
    for round in 1..=rounds {
        for (one, layout) in all.iter_mut().zip(&layouts) {
            complain("measuring", &format!("{}, round {round} of {rounds}", one.name));
            let LocalLayout { ranks, threads, config, .. } = layout.clone();
            let bench = StepBench { config, ranks, threads, warmup: 1, steps: args.steps.max(1) };
            let median = bench_step(&bench)?.step_s.median;
            if round > 1 {
                one.noise = one.noise.max((median / one.measured_s).ln().abs());
            }
            one.measured_s = one.measured_s.min(median);
        }
    }
    show(args, &all);
    Ok(DONE)
}

fn show(args: &Layouts, all: &[Compared]) {
    let off = |one: &Compared| one.predicted_s / one.measured_s - 1.0;
    let mean = all.iter().map(|one| off(one).abs()).sum::<f64>() / all.len().max(1) as f64;
    let within = all.iter().filter(|one| off(one).abs() <= 0.15).count();
    let inside = all.iter().filter(|one| one.is_inside()).count();
    let (tau, pairs) = tau(all);
    if args.json {
        let entry = |one: &Compared| {
            json!({
                "layout": one.name, "predicted_s": one.predicted_s, "interval_80_s": one.interval_s,
                "measured_s": one.measured_s, "noise": one.noise,
            })
        };
        let list: Vec<_> = all.iter().map(entry).collect();
        say(&format!(
            "{}\n",
            json!({"layouts": list, "mean_error": mean, "within_15_percent": within, "inside_interval_80": inside, "tau": tau, "pairs": pairs})
        ));
        return;
    }
    let mut rows = vec![["ranks x threads", "predicted", "measured", "off"].map(String::from).to_vec()];
    rows.extend(all.iter().map(|one| {
        let [predicted, measured] = [one.predicted_s, one.measured_s].map(duration);
        vec![one.name.clone(), predicted, measured, format!("{:+.0}%", 100.0 * off(one))]
    }));
    let mut lines = table(&rows, 1);
    lines.push(format!(
        "{} of {} layouts within 15%, {inside} in their 80% interval, {} off on average; Kendall's tau {tau:.2} over {pairs} pairs that differ by more than noise",
        within,
        all.len(),
        percent(mean)
    ));
    say(&(lines.join("\n") + "\n"));
}

/// Kendall's tau of predicted and measured times among pairs whose measured times differ by more than their noise, and how
/// many those are.
fn tau(all: &[Compared]) -> (f64, usize) {
    let (mut agree, mut pairs) = (0i64, 0usize);
    for (index, a) in all.iter().enumerate() {
        for b in &all[index + 1..] {
            let measured = (a.measured_s / b.measured_s).ln();
            if measured.abs() <= a.noise + b.noise {
                continue;
            }
            pairs += 1;
            agree += if (a.predicted_s > b.predicted_s) == (measured > 0.0) { 1 } else { -1 };
        }
    }
    (agree as f64 / pairs.max(1) as f64, pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_within_noise_do_not_count() {
        let one = |predicted_s, measured_s| Compared {
            name: String::new(),
            predicted_s,
            interval_s: None,
            measured_s,
            noise: 0.02,
        };
        let all = [one(1.0, 1.0), one(0.9, 1.03), one(2.0, 2.0), one(1.9, 2.5)];
        assert_eq!(tau(&all), (3.0 / 5.0, 5));
    }
}
