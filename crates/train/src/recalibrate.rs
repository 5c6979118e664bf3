//! What a finished run teaches the planner about this machine: the phases of its steps, from its trace.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::Deserialize;
use unisono_mesh::Fold;
use unisono_model::Lane;
use unisono_plan::engine::{LocalMachine, OTHER, Phase, step_work};

use crate::engine_layout::engine_layout;
use crate::error::TrainError;
use crate::local::step_rows;
use crate::run_folder::{TRACE_FILE, read_config, read_steps, read_summary};

/// An event of a trace: a span of a lane, or something else.
#[derive(Debug, Deserialize)]
struct Event {
    ph: String,
    name: String,
    #[serde(default)]
    cat: String,
    /// Microseconds.
    #[serde(default)]
    dur: f64,
    #[serde(default)]
    args: Arguments,
}

#[derive(Debug, Default, Deserialize)]
struct Arguments {
    step: Option<u64>,
}

/// Seconds of each `(whether it communicates, phase)`, summed over ranks.
type Spent = BTreeMap<(bool, String), f64>;

/// What was taken over from a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recalibrated {
    /// Ranks of the run.
    pub ranks: usize,
    /// Threads of each.
    pub threads: usize,
    /// Steps that were read; the first of the run is left out.
    pub steps: usize,
    /// Seconds of a step as predicted before.
    pub before_s: f64,
    /// As measured: the median step, which is predicted from now on.
    pub after_s: f64,
}

/// Fits what `machine` says of the run's mode (ranks x threads) to the trace of the run in `folder`, at its median step.
///
/// # Errors
/// If the run is not finished, has no trace, or is damaged.
pub fn recalibrate(machine: &mut LocalMachine, folder: &Path) -> Result<Recalibrated, TrainError> {
    let refuse = |text: &str| TrainError::Refused(format!("{} cannot recalibrate: {text}", folder.display()));
    let config = read_config(folder)?;
    let summary = read_summary(folder)?.ok_or_else(|| refuse("the run has not ended; let it end"))?;
    let (ranks, threads) = (summary.memory.len(), summary.threads);
    if threads == 0 {
        return Err(refuse("its summary does not say its threads; train it again"));
    }
    let trace = folder.join(TRACE_FILE);
    if !trace.exists() {
        return Err(refuse("it has no trace; train it again with --trace"));
    }
    let spans = read_spans(&trace)?;
    let first = spans.keys().next().copied();
    let records = read_steps(folder)?;
    let mut steps: Vec<(f64, &Spent)> = records
        .iter()
        .filter(|record| Some(record.step) != first)
        .filter_map(|record| Some((record.step_s, spans.get(&record.step)?)))
        .collect();
    steps.sort_by(|a, b| a.0.total_cmp(&b.0));
    let Some(&(after_s, _)) = steps.get(steps.len() / 2) else {
        return Err(refuse("its trace has less than two steps; train it again with more"));
    };
    // The middle half of the steps: whoever disturbed the others did not disturb these.
    let middle = &steps[steps.len() / 4..steps.len() - steps.len() / 4];
    let whole: f64 = middle.iter().map(|(seconds, _)| seconds).sum();
    let of = |(communicates, name): Phase| {
        let key = (communicates, name.to_string());
        middle.iter().filter_map(|(_, spent)| spent.get(&key)).sum::<f64>() / ranks as f64 / whole
    };
    let fold = Fold::new(config.grid, ranks)?;
    let layout = engine_layout(&config, &fold, |_| 0);
    let rows = step_rows(&config);
    let phases = step_work(&layout, rows);
    let named: f64 = phases.keys().filter(|phase| **phase != OTHER).map(|phase| of(*phase)).sum();
    let before_s = machine.price(&layout, rows, threads).step_s;
    machine.recalibrate(&layout, rows, threads, |phase| match phase {
        OTHER => (1.0 - named).max(0.0) * after_s,
        _ => of(phase) * after_s,
    });
    Ok(Recalibrated { ranks, threads, steps: steps.len(), before_s, after_s })
}

/// The spans of a trace by step. The writer puts one event in a line.
fn read_spans(path: &Path) -> Result<BTreeMap<u64, Spent>, TrainError> {
    let file = File::open(path).map_err(TrainError::io("open", path))?;
    let mut steps: BTreeMap<u64, Spent> = BTreeMap::new();
    for line in BufReader::new(file).lines() {
        let line = line.map_err(TrainError::io("read", path))?;
        let Ok(event) = serde_json::from_str::<Event>(line.trim_end_matches(',')) else { continue };
        let (Some(step), "X") = (event.args.step, event.ph.as_str()) else { continue };
        let spent = steps.entry(step).or_default();
        *spent.entry((event.cat == Lane::Communication.name(), event.name)).or_default() += event.dur / 1e6;
    }
    Ok(steps)
}
