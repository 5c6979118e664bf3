//! This machine as `unisono bench local` measured it, and the layouts of a config on it.

use std::io::ErrorKind;
use std::path::Path;

use unisono_mesh::Fold;
use unisono_plan::SimulatedStep;
use unisono_plan::engine::{HostCluster, LocalMachine, LocalPrice};
use unisono_train::config::{DispatchConfig, LayoutConfig, RecomputeConfig, ReduceEvery};
use unisono_train::system::cpu_type;
use unisono_train::{RunConfig, TrainError, engine_layout, step_rows};

use crate::error::{BAD_INPUT, CliError, remedy};
use crate::layout::cores;
use crate::screen::complain;

/// What stands for this machine in place of a cluster, or of a host.
pub const LOCAL: &str = "local";
/// Where `unisono bench local` writes what it finds.
pub const MACHINE_FILE: &str = "local.toml";

/// The cores of this machine that a process sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sees {
    /// All of them.
    All,
    /// Those that a launcher has bound it to.
    Some,
}

/// The machine of a file, or that of [`MACHINE_FILE`] if there is one.
///
/// # Errors
/// If a named file cannot be read or is that of another machine.
pub fn load(named: Option<&Path>, sees: Sees) -> Result<Option<LocalMachine>, CliError> {
    if let Some(path) = named {
        return load_named(path, sees).map(Some);
    }
    let path = Path::new(MACHINE_FILE);
    if !path.exists() {
        return Ok(None);
    }
    let machine = read(path)?;
    if let Some(other) = another(&machine, sees) {
        complain("warning", &format!("{MACHINE_FILE} is not used: {other}"));
        return Ok(None);
    }
    Ok(Some(machine))
}

/// The machine of the file `path`.
///
/// # Errors
/// If the file cannot be read or is that of another machine.
pub fn load_named(path: &Path, sees: Sees) -> Result<LocalMachine, CliError> {
    let machine = read(path)?;
    match another(&machine, sees) {
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
fn another(machine: &LocalMachine, sees: Sees) -> Option<String> {
    let as_many = machine.cores == cores() || (sees == Sees::Some && machine.cores > cores());
    if machine.cpu == cpu_type() && as_many {
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

/// Where ranks run: this machine, or hosts that were measured.
#[derive(Debug, Clone)]
pub struct Hosts {
    /// One of them.
    pub machine: LocalMachine,
    /// All of them; none for this machine alone.
    pub cluster: Option<HostCluster>,
}

impl Hosts {
    /// The hosts that `text`, the content of the file `path`, describes; `machine` is the file of this machine.
    ///
    /// # Errors
    /// If it does not describe hosts, or one of them has not been measured.
    pub fn read(text: &str, path: &Path, machine: Option<&Path>, sees: Sees) -> Result<Self, CliError> {
        let cluster = HostCluster::from_toml(text).map_err(|error| bad(path, &error.to_string()))?;
        let machine = match (cluster.host.as_str(), machine) {
            (LOCAL, machine) => this_machine(machine, sees)?,
            (host, None) => read(&path.parent().unwrap_or(Path::new("")).join(host))?,
            (host, Some(_)) => {
                return Err(CliError::usage(format!(
                    "--machine is for host = \"{LOCAL}\"; {} names {host}: leave it out",
                    path.display()
                )));
            }
        };
        Ok(Self { machine, cluster: Some(cluster) })
    }

    /// This machine.
    ///
    /// # Errors
    /// If it has not been measured.
    pub fn here(machine: Option<&Path>) -> Result<Self, CliError> {
        Ok(Self { machine: this_machine(machine, Sees::All)?, cluster: None })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.cluster.as_ref().map_or(1, |cluster| cluster.hosts)
    }

    /// The step of a config on `ranks` ranks, of which rank r is on host `host(r)`.
    ///
    /// # Errors
    /// If so many ranks do not divide the slots.
    pub fn price(
        &self,
        config: &RunConfig,
        ranks: usize,
        threads: usize,
        host: impl Fn(usize) -> usize,
    ) -> Result<LocalPrice, CliError> {
        let layout = engine_layout(config, &fold(config, ranks)?, host);
        Ok(match &self.cluster {
            Some(cluster) if !cluster.levels.is_empty() => {
                self.machine.price_on(cluster, &layout, step_rows(config), threads)
            }
            _ => self.machine.price(&layout, step_rows(config), threads),
        })
    }

    /// The same op by op, without what no op stands for.
    ///
    /// # Errors
    /// If so many ranks do not divide the slots.
    pub fn simulate(&self, layout: &LocalLayout) -> Result<SimulatedStep, CliError> {
        let LocalLayout { config, ranks, threads, .. } = layout;
        let engine = engine_layout(config, &fold(config, *ranks)?, |rank| layout.host(rank));
        Ok(self.machine.simulate(&engine, step_rows(config), *threads, self.cluster.as_ref()))
    }
}

fn this_machine(named: Option<&Path>, sees: Sees) -> Result<LocalMachine, CliError> {
    load(named, sees)?
        .ok_or_else(|| CliError::usage("this machine has not been measured: `unisono bench local`"))
}

fn fold(config: &RunConfig, ranks: usize) -> Result<Fold, CliError> {
    Ok(Fold::new(config.grid, ranks).map_err(TrainError::from)?)
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
    Ok(machine.price(&engine_layout(config, &fold(config, ranks)?, |_| 0), step_rows(config), threads))
}

/// Floating-point operations a second that `threads` threads reach at most: those of the fastest product that was measured.
pub fn peak_flops(machine: &LocalMachine, threads: usize) -> f64 {
    let fastest = machine.products.plain.iter().copied().fold(0.0, f64::max);
    fastest * 1e9 * threads.min(machine.cores) as f64
}

/// A way to run a config; the numbers are the same in all.
#[derive(Debug, Clone)]
pub struct LocalLayout {
    /// Hosts.
    pub hosts: usize,
    /// Ranks, of all hosts.
    pub ranks: usize,
    /// Threads of each.
    pub threads: usize,
    /// The config, laid out.
    pub config: RunConfig,
}

impl LocalLayout {
    /// Its name: `2 x 1 zero1 selective`; over several hosts `2 x 2 x 1 zero1 selective hierarchical`.
    pub fn name(&self) -> String {
        let LayoutConfig { zero, dispatch, .. } = self.config.layout;
        let ranks = format!("{} x {} zero{zero} {}", self.ranks_per_host(), self.threads, self.recompute());
        match (self.hosts, dispatch) {
            (1, _) => ranks,
            (hosts, DispatchConfig::Flat) => format!("{hosts} x {ranks}"),
            (hosts, DispatchConfig::Hierarchical) => format!("{hosts} x {ranks} hierarchical"),
        }
    }

    /// What is computed again: `selective`.
    pub fn recompute(&self) -> &'static str {
        match self.config.train.recompute {
            RecomputeConfig::None => "none",
            RecomputeConfig::Selective => "selective",
            RecomputeConfig::Full => "full",
        }
    }

    /// Ranks of each host.
    pub fn ranks_per_host(&self) -> usize {
        self.ranks / self.hosts
    }

    /// The host of a rank: neighbours share one.
    pub fn host(&self, rank: usize) -> usize {
        rank / self.ranks_per_host()
    }
}

/// Every number of ranks, with the cores shared out among them, x ZeRO x recomputation, as the config allows.
pub fn layouts(config: &RunConfig) -> Vec<LocalLayout> {
    layouts_on(config, None, cores())
}

/// The same on `cluster`, whose hosts have so many cores: as it fixes ranks and threads, and rows flat or hierarchically where they
/// cross.
pub fn layouts_on(config: &RunConfig, cluster: Option<&HostCluster>, cores: usize) -> Vec<LocalLayout> {
    let slots = config.grid.slots();
    let hosts = cluster.map_or(1, |cluster| cluster.hosts);
    let joins_late = config.train.reduce_every == ReduceEvery::Step && config.train.accumulate > 1;
    let wanted = cluster.and_then(|cluster| cluster.ranks_per_host);
    let each = (1..=slots / hosts).filter(|each| slots.is_multiple_of(hosts * each));
    let mut all = Vec::new();
    for each in each.filter(|each| wanted.is_none_or(|wanted| wanted == *each)) {
        let ranks = hosts * each;
        let threads = cluster.and_then(|cluster| cluster.threads).unwrap_or((cores / each).max(1));
        let crosses = |fold: Fold| fold.dispatch_ranks(0).len() > each;
        let both =
            hosts > 1 && config.model.num_experts > 0 && Fold::new(config.grid, ranks).is_ok_and(crosses);
        let ways = if both {
            vec![DispatchConfig::Flat, DispatchConfig::Hierarchical]
        } else {
            vec![config.layout.dispatch]
        };
        for zero in 1..=if joins_late { 1 } else { 3 } {
            for recompute in [RecomputeConfig::None, RecomputeConfig::Selective, RecomputeConfig::Full] {
                for dispatch in &ways {
                    let mut config = config.clone();
                    (config.layout.zero, config.train.recompute, config.layout.dispatch) =
                        (zero, recompute, *dispatch);
                    all.push(LocalLayout { hosts, ranks, threads, config });
                }
            }
        }
    }
    all
}
