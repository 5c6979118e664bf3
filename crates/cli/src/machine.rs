//! This machine as `unisono bench local` measured it, and the layouts of a config on it.

use std::io::ErrorKind;
use std::path::Path;

use unisono_mesh::Fold;
use unisono_plan::engine::{LocalMachine, LocalPrice};
use unisono_train::config::{RecomputeConfig, ReduceEvery};
use unisono_train::system::cpu_type;
use unisono_train::{RunConfig, TrainError, engine_layout, step_rows};

use crate::error::{BAD_INPUT, CliError, remedy};
use crate::layout::{cores, threads_each};
use crate::screen::complain;

/// Where `unisono bench local` writes what it finds.
pub const MACHINE_FILE: &str = "local.toml";

/// The machine of a file, or that of [`MACHINE_FILE`] if there is one.
///
/// # Errors
/// If a named file cannot be read or is that of another machine.
pub fn load(named: Option<&Path>) -> Result<Option<LocalMachine>, CliError> {
    if let Some(path) = named {
        return load_named(path).map(Some);
    }
    let path = Path::new(MACHINE_FILE);
    if !path.exists() {
        return Ok(None);
    }
    let machine = read(path)?;
    if let Some(other) = another(&machine) {
        complain("warning", &format!("{MACHINE_FILE} is not used: {other}"));
        return Ok(None);
    }
    Ok(Some(machine))
}

/// The machine of the file `path`.
///
/// # Errors
/// If the file cannot be read or is that of another machine.
pub fn load_named(path: &Path) -> Result<LocalMachine, CliError> {
    let machine = read(path)?;
    match another(&machine) {
        None => Ok(machine),
        Some(other) => Err(bad(path, &other)),
    }
}

fn bad(path: &Path, text: &str) -> CliError {
    CliError { code: BAD_INPUT, message: format!("{}: {text}", path.display()) }
}

fn read(path: &Path) -> Result<LocalMachine, CliError> {
    let text = std::fs::read_to_string(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => bad(
            path,
            &format!(
                "no such file: measure this machine with `unisono bench local --out {}`",
                path.display()
            ),
        ),
        _ => bad(path, &format!("{error}{}", remedy(&error))),
    })?;
    LocalMachine::from_toml(&text).map_err(|error| bad(path, &error.to_string()))
}

/// What says that a machine is not this one.
fn another(machine: &LocalMachine) -> Option<String> {
    if (machine.cpu.as_str(), machine.cores) == (cpu_type().as_str(), cores()) {
        return None;
    }
    Some(format!(
        "measured on {} with {} cores, this is {} with {}: measure it with `unisono bench local`",
        machine.cpu,
        machine.cores,
        cpu_type(),
        cores()
    ))
}

/// The step of a config on ranks that are threads of this machine.
///
/// # Errors
/// If so many ranks do not divide the slots.
pub fn price(
    machine: &LocalMachine,
    config: &RunConfig,
    ranks: usize,
    threads: usize,
) -> Result<LocalPrice, CliError> {
    let fold = Fold::new(config.grid, ranks).map_err(TrainError::from)?;
    Ok(machine.price(&engine_layout(config, &fold, |_| 0), step_rows(config), threads))
}

/// Floating-point operations a second that `threads` threads reach at most: those of the fastest product that was measured.
pub fn peak_flops(machine: &LocalMachine, threads: usize) -> f64 {
    let fastest = machine.products.plain.iter().copied().fold(0.0, f64::max);
    fastest * 1e9 * threads.min(machine.cores) as f64
}

/// A way to run a config here; the numbers are the same in all.
#[derive(Debug, Clone)]
pub struct LocalLayout {
    /// Ranks.
    pub ranks: usize,
    /// Threads of each.
    pub threads: usize,
    /// The config, laid out.
    pub config: RunConfig,
}

impl LocalLayout {
    /// Its name: `2 x 1 zero1 selective`.
    pub fn name(&self) -> String {
        let recompute = match self.config.train.recompute {
            RecomputeConfig::None => "none",
            RecomputeConfig::Selective => "selective",
            RecomputeConfig::Full => "full",
        };
        format!("{} x {} zero{} {recompute}", self.ranks, self.threads, self.config.layout.zero)
    }
}

/// Every number of ranks, with the cores shared out among them, x ZeRO x recomputation, as the config allows.
pub fn layouts(config: &RunConfig) -> Vec<LocalLayout> {
    let slots = config.grid.slots();
    let joins_late = config.train.reduce_every == ReduceEvery::Step && config.train.accumulate > 1;
    let mut all = Vec::new();
    for ranks in (1..=slots).filter(|ranks| slots.is_multiple_of(*ranks)) {
        for zero in 1..=if joins_late { 1 } else { 3 } {
            for recompute in [RecomputeConfig::None, RecomputeConfig::Selective, RecomputeConfig::Full] {
                let mut config = config.clone();
                (config.layout.zero, config.train.recompute) = (zero, recompute);
                all.push(LocalLayout { ranks, threads: threads_each(ranks), config });
            }
        }
    }
    all
}
