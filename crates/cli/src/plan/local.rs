//! `unisono plan CONFIG local`: the layouts of a config of ours on this machine, as it was measured.

use std::path::Path;

use serde_json::json;
use unisono_mesh::Fold;
use unisono_plan::MemoryEstimate;
use unisono_plan::engine::{LocalMachine, LocalPrice};
use unisono_train::system::{available_memory, readable};
use unisono_train::{RunConfig, TrainError, estimate_all};

use super::write;
use crate::error::{CliError, DONE};
use crate::machine::{self, LocalLayout};
use crate::screen::say;
use crate::style::{Paint, Scale, bar, grouped, percent, program, quoted, table};

/// What stands for this machine in place of a cluster.
pub const LOCAL: &str = "local";

/// Phases shown of the fastest layout.
const SHOWN_PHASES: usize = 8;

struct Choice {
    layout: LocalLayout,
    price: LocalPrice,
    /// All ranks.
    memory: u64,
}

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// The config.
    pub config: &'a Path,
    /// File of the machine.
    pub machine: Option<&'a Path>,
    /// Where the config of the chosen layout goes.
    pub emit: Option<&'a Path>,
    /// Layouts in the table.
    pub rows: usize,
    /// Whether one JSON object is wanted.
    pub json: bool,
}

/// Prices every layout of a config on this machine.
pub fn run(ask: &Ask<'_>) -> Result<u8, CliError> {
    let path = ask.config;
    if path.extension().is_none_or(|extension| extension != "toml") {
        return Err(CliError::usage(format!(
            "{}: this machine trains configs of unisono (.toml); `unisono config --print` writes the built-in one",
            path.display()
        )));
    }
    let config = crate::config::load(Some(path), &[])?;
    let machine = machine::load(ask.machine)?
        .ok_or_else(|| CliError::usage("this machine has not been measured: `unisono bench local`"))?;
    let free = available_memory().unwrap_or(u64::MAX);
    let mut choices = choices(&machine, &config)?;
    choices.sort_by(|a, b| {
        (a.memory > free, a.price.step_s)
            .partial_cmp(&(b.memory > free, b.price.step_s))
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    if let Some(to) = ask.emit {
        write(to, &emit(path, choices.first().filter(|choice| choice.memory <= free))?)?;
    }
    let tokens = config.tokens_per_step() as f64;
    if ask.json {
        let entry = |choice: &Choice| {
            let phases = choice.price.phases.iter();
            json!({
                "ranks": choice.layout.ranks, "threads": choice.layout.threads, "zero": choice.layout.config.layout.zero,
                "recompute": choice.layout.config.train.recompute, "step_s": choice.price.step_s,
                "memory_bytes": choice.memory, "fits": choice.memory <= free,
                "phases": phases.map(|((communicates, name), seconds)| json!({
                    "name": name, "communicates": communicates, "seconds": seconds,
                })).collect::<Vec<_>>(),
            })
        };
        say(&format!(
            "{}\n",
            json!({"cpu": machine.cpu, "layouts": choices.iter().map(entry).collect::<Vec<_>>()})
        ));
        return Ok(DONE);
    }
    show(path, &machine, &choices[..ask.rows.min(choices.len())], tokens, free);
    Ok(DONE)
}

fn choices(machine: &LocalMachine, config: &RunConfig) -> Result<Vec<Choice>, CliError> {
    let choice = |layout: LocalLayout| {
        let price = machine::price(machine, &layout.config, layout.ranks, layout.threads)?;
        let fold = Fold::new(config.grid, layout.ranks).map_err(TrainError::from)?;
        let memory = estimate_all(&layout.config, &fold).iter().map(MemoryEstimate::total).sum();
        Ok(Choice { layout, price, memory })
    };
    machine::layouts(config).into_iter().map(choice).collect()
}

/// The config of the chosen layout; ranks and threads are arguments.
fn emit(path: &Path, chosen: Option<&Choice>) -> Result<String, CliError> {
    let Some(Choice { layout, price, .. }) = chosen else {
        return Err(CliError::usage(format!(
            "--emit: no layout of {} fits the memory of this machine: make micro_batch or the model smaller",
            path.display()
        )));
    };
    let toml = layout.config.to_toml().map_err(|error| CliError::usage(format!("--emit: {error}")))?;
    Ok(format!(
        "# unisono plan: {} on this machine, {}; predicted step {:.3} s.\n# unisono train THIS_FILE --ranks {} --threads {}\n\n{toml}",
        path.display(),
        layout.name(),
        price.step_s,
        layout.ranks,
        layout.threads
    ))
}

fn show(path: &Path, machine: &LocalMachine, choices: &[Choice], tokens: f64, free: u64) {
    let paint = Paint::new(&std::io::stdout());
    say(&format!("{}, {} cores, measured by `unisono bench local`\n", machine.cpu, machine.cores));
    let Some(best) = choices.first() else { return };
    let scale = Scale::seconds(best.price.step_s);
    let mut rows =
        vec![["ranks x threads", "step", "tokens/s", "memory, all ranks", ""].map(String::from).to_vec()];
    rows.extend(choices.iter().map(|choice| {
        let fits = if choice.memory <= free { "" } else { "does not fit" };
        vec![
            choice.layout.name(),
            scale.write(choice.price.step_s),
            grouped((tokens / choice.price.step_s) as u64),
            readable(choice.memory),
            fits.into(),
        ]
    }));
    say(&format!("{}\n", table(&rows, 1).join("\n")));
    say(&format!("\n{}\n", paint.strong(&format!("Chosen: {}", best.layout.name()))));
    let mut phases = best.price.phases.clone();
    phases.sort_by(|a, b| b.1.total_cmp(&a.1));
    let longest = phases.first().map_or(1.0, |(_, seconds)| *seconds);
    let rows: Vec<Vec<String>> = phases
        .iter()
        .take(SHOWN_PHASES)
        .map(|((communicates, name), seconds)| {
            let lane = if *communicates { "communication" } else { "compute" };
            let share = percent(seconds / best.price.step_s);
            vec![
                lane.into(),
                (*name).into(),
                scale.write(*seconds),
                share,
                format!("{:<30}", bar(seconds / longest, 30)),
            ]
        })
        .collect();
    say(&format!("{}\n", table(&rows, 2).join("\n")));
    say(&format!("\n{}\n  {}\n", paint.strong("Train it"), command(path, &best.layout)));
}

/// The command that runs a layout.
fn command(path: &Path, layout: &LocalLayout) -> String {
    let recompute = layout.name();
    let recompute = recompute.rsplit(' ').next().unwrap_or_default();
    format!(
        "{} train {} --ranks {} --threads {} --set layout.zero={} --set train.recompute={recompute}",
        program(),
        quoted(path),
        layout.ranks,
        layout.threads,
        layout.config.layout.zero
    )
}
