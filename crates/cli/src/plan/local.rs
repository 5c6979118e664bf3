//! `unisono plan MODEL local` and `unisono plan MODEL HOSTS.toml`: the layouts in which the engine trains a model on this machine, or on
//! several that were measured.

use std::path::Path;

use serde_json::json;
use unisono_mesh::Fold;
use unisono_plan::engine::LocalPrice;
use unisono_plan::{MemoryEstimate, SimulatedStep};
use unisono_train::config::DispatchConfig;
use unisono_train::system::{available_memory, readable};
use unisono_train::{RunConfig, TrainError, estimate_all};

use super::question::{self, Model, Origin};
use super::{engine, trace, write};
use crate::error::{CliError, DONE};
pub use crate::machine::LOCAL;
use crate::machine::{self, Hosts, LocalLayout, Sees};
use crate::screen::{complain, say};
use crate::style::{Paint, Scale, bar, grouped, percent, program, quoted, table};

/// Phases shown of the fastest layout.
const SHOWN_PHASES: usize = 8;

struct Choice {
    layout: LocalLayout,
    price: LocalPrice,
    /// All ranks of the host that needs most.
    memory: u64,
}

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// The model.
    pub model: &'a str,
    /// The file that describes several hosts; none for this machine.
    pub cluster: Option<&'a Path>,
    /// File of the machine.
    pub machine: Option<&'a Path>,
    /// Where the config of the chosen layout goes.
    pub emit: Option<&'a Path>,
    /// Where its simulated step goes.
    pub trace: Option<&'a Path>,
    /// Where the list of what it does goes.
    pub schedule: Option<&'a Path>,
    /// Layouts in the table.
    pub rows: usize,
    /// Whether one JSON object is wanted.
    pub json: bool,
}

/// Prices every layout of a model on this machine, or on `hosts`, the text of the file that describes them.
pub fn run(ask: &Ask<'_>, hosts: Option<&str>) -> Result<u8, CliError> {
    let model = question::model(ask.model)?;
    let config = config_of(&model)?;
    let hosts = match (hosts, ask.cluster) {
        (Some(text), Some(cluster)) => Hosts::read(text, cluster, ask.machine, Sees::All)?,
        _ => Hosts::here(ask.machine)?,
    };
    let free = memory_of_host(&hosts);
    let mut choices = choices(&hosts, &config)?;
    // Those that fit, the fastest first; then the others, those first that lack least.
    let lacks = |choice: &Choice| choice.memory.saturating_sub(free);
    choices.sort_by(|a, b| lacks(a).cmp(&lacks(b)).then(a.price.step_s.total_cmp(&b.price.step_s)));
    let Some(best) = choices.first() else { return Err(no_layout(&hosts, &config)) };
    let step = hosts.simulate(&best.layout)?;
    let fits = best.memory <= free;
    if let Some(to) = ask.emit {
        let data = engine::lacking_data(&config)?;
        write(to, &emit(ask, &model, Some(best).filter(|_| fits), data.as_deref())?)?;
        if let Some(lacking) = data {
            complain("warning", &lacking);
        }
    }
    if let Some(to) = ask.trace {
        trace::write(&step, to)?;
    }
    if let Some(to) = ask.schedule {
        trace::write_schedule(&step, to)?;
    }
    if ask.json {
        let entry = |choice: &Choice| entry(choice, free);
        let object = json!({
            "cpu": hosts.machine.cpu, "hosts": hosts.count(), "simulated_s": step.simulated.seconds,
            "chosen": fits.then(|| entry(best)), "layouts": choices.iter().map(entry).collect::<Vec<_>>(),
        });
        say(&format!("{object}\n"));
        return Ok(DONE);
    }
    show(ask, &hosts, &choices[..ask.rows.min(choices.len())], config.tokens_per_step() as f64, free);
    if fits {
        show_chosen(ask, &model, best, &step);
    } else {
        show_lacking(ask, best, free);
    }
    Ok(DONE)
}

/// The config that trains a model.
fn config_of(model: &Model) -> Result<RunConfig, CliError> {
    let Model { architecture, origin } = model;
    let missing = engine::missing(architecture, origin);
    if !missing.is_empty() {
        return Err(CliError::usage(format!(
            "the engine cannot train {} yet; it lacks\n  - {}",
            architecture.name,
            missing.join("\n  - ")
        )));
    }
    let built_in = crate::config::load(None, &[])?;
    engine::config(architecture, origin, built_in)
        .map_err(|error| CliError::usage(format!("{}: {error}", architecture.name)))
}

/// Bytes that ranks of one host may use, as far as that is known.
fn memory_of_host(hosts: &Hosts) -> u64 {
    let is_here = hosts.cluster.as_ref().is_none_or(|cluster| cluster.host == LOCAL);
    let said = hosts.cluster.as_ref().and_then(|cluster| cluster.memory_bytes);
    said.or_else(|| available_memory().filter(|_| is_here)).unwrap_or(u64::MAX)
}

fn choices(hosts: &Hosts, config: &RunConfig) -> Result<Vec<Choice>, CliError> {
    let choice = |layout: LocalLayout| {
        let LocalLayout { config, ranks, threads, .. } = &layout;
        let price = hosts.price(config, *ranks, *threads, |rank| layout.host(rank))?;
        let fold = Fold::new(config.grid, *ranks).map_err(TrainError::from)?;
        let hosts: Vec<usize> = (0..*ranks).map(|rank| layout.host(rank)).collect();
        let of_ranks: Vec<u64> =
            estimate_all(config, &fold, &hosts).iter().map(MemoryEstimate::total).collect();
        let of_hosts = of_ranks.chunks(layout.ranks_per_host()).map(|ranks| ranks.iter().sum());
        let memory = of_hosts.max().unwrap_or(0);
        Ok(Choice { layout, price, memory })
    };
    let layouts = machine::layouts_on(config, hosts.cluster.as_ref(), hosts.machine.cores);
    layouts.into_iter().map(choice).collect()
}

fn no_layout(hosts: &Hosts, config: &RunConfig) -> CliError {
    let slots = config.grid.slots();
    let each = hosts.cluster.as_ref().and_then(|cluster| cluster.ranks_per_host);
    let ranks = each.map_or_else(|| "any number of".into(), |each| each.to_string());
    let fitting = (1..=hosts.count()).rev().find(|hosts| slots.is_multiple_of(hosts * each.unwrap_or(1)));
    let nearest = fitting.map_or_else(
        || format!("ranks_per_host must divide {slots}"),
        |hosts| format!("the nearest that does are {hosts} hosts"),
    );
    CliError::usage(format!(
        "{ranks} ranks on each of {} hosts do not divide the grid's {slots} slots; {nearest}",
        hosts.count()
    ))
}

fn entry(choice: &Choice, free: u64) -> serde_json::Value {
    let LocalLayout { hosts, ranks, threads, config } = &choice.layout;
    let phases = choice.price.phases.iter();
    json!({
        "name": choice.layout.name(), "hosts": hosts, "ranks": ranks, "threads": threads, "zero": config.layout.zero,
        "recompute": config.train.recompute, "dispatch": config.layout.dispatch, "step_s": choice.price.step_s,
        "step_interval_80_s": choice.price.interval_s,
        "network_s": choice.price.network_s, "waited_s": choice.price.waited_s,
        "memory_bytes": choice.memory, "fits": choice.memory <= free,
        "phases": phases.map(|((communicates, name), seconds)| json!({
            "name": name, "communicates": communicates, "seconds": seconds,
        })).collect::<Vec<_>>(),
    })
}

/// The config of the chosen layout, and which data it needs; ranks and threads are arguments.
fn emit(
    ask: &Ask<'_>,
    model: &Model,
    chosen: Option<&Choice>,
    data: Option<&str>,
) -> Result<String, CliError> {
    let Some(Choice { layout, price, .. }) = chosen else {
        return Err(CliError::usage(format!(
            "--emit: no layout of {} fits the memory of a host: make micro_batch or the model smaller",
            ask.model
        )));
    };
    let toml = layout.config.to_toml().map_err(|error| CliError::usage(format!("--emit: {error}")))?;
    let place = ask.cluster.map_or_else(|| "this machine".into(), |cluster| cluster.display().to_string());
    let mut text = format!(
        "# unisono plan: {} on {place}, {}; predicted step {:.3} s.\n# {}\n# {}\n",
        ask.model,
        layout.name(),
        price.step_s,
        engine::defaults(&model.origin),
        start(ask, layout, "unisono", "THIS_FILE"),
    );
    text.extend(data.iter().map(|data| format!("# {data}.\n")));
    Ok(text + "\n" + &toml)
}

fn show(ask: &Ask<'_>, hosts: &Hosts, choices: &[Choice], tokens: f64, free: u64) {
    let machine = &hosts.machine;
    say(&format!("{}, {} cores, measured by `unisono bench local`\n", machine.cpu, machine.cores));
    if let Some((cluster, path)) = hosts.cluster.as_ref().zip(ask.cluster) {
        let level = |level: &unisono_plan::Level| {
            let speed = level.shared_bytes_per_s() / 1e9;
            format!("{} over {}: {speed} GB/s, {:.0} us", level.name, level.width, 1e6 * level.latency_s)
        };
        let levels: Vec<String> = cluster.levels.iter().map(level).collect();
        say(&format!("{} of them ({}); {}\n", cluster.hosts, path.display(), levels.join("; ")));
    }
    let Some(best) = choices.first() else { return };
    let scale = Scale::seconds(best.price.step_s);
    let [what, memory] = match ask.cluster {
        None => ["ranks x threads", "memory, all ranks"],
        Some(_) => ["hosts x ranks x threads", "memory a host"],
    };
    let mut rows = vec![[what, "step", "(80%)", "tokens/s", memory, ""].map(String::from).to_vec()];
    rows.extend(choices.iter().map(|choice| {
        let fits = if choice.memory <= free { "" } else { "does not fit" };
        vec![
            choice.layout.name(),
            scale.write(choice.price.step_s),
            choice.price.interval_s.map_or_else(String::new, |[low, high]| {
                format!("{} to {}", scale.write(low), scale.write(high))
            }),
            grouped((tokens / choice.price.step_s) as u64),
            readable(choice.memory),
            fits.into(),
        ]
    }));
    say(&format!("{}\n", table(&rows, 1).join("\n")));
}

/// What is missing where no layout fits; `nearest` lacks least.
fn show_lacking(ask: &Ask<'_>, nearest: &Choice, free: u64) {
    let (host, more) = match ask.cluster {
        None => ("this machine", "or plan several of it (`unisono plan MODEL HOSTS.toml`)"),
        Some(_) => ("a host", "or take more hosts"),
    };
    say(&format!(
        "\nNone fits: {host} has {} of memory to spare, and {}, which takes least, needs {}. Make the model, train.micro_batch or \
         train.sequence_length smaller, {more}.\n",
        readable(free),
        nearest.layout.name(),
        readable(nearest.memory),
    ));
}

/// Where the time of the chosen layout goes, and how to run it.
fn show_chosen(ask: &Ask<'_>, model: &Model, best: &Choice, step: &SimulatedStep) {
    let paint = Paint::new(&std::io::stdout());
    let scale = Scale::seconds(best.price.step_s);
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
    let [simulated, between] = [step.simulated.seconds, best.price.step_s - step.simulated.seconds]
        .map(|seconds| scale.write(seconds));
    say(&format!("  op by op {simulated} of them, as simulated, and {between} between ops\n"));
    let LocalPrice { network_s, waited_s, .. } = best.price;
    if network_s > 0.0 {
        let [all, waited] = [network_s, waited_s].map(|seconds| scale.write(seconds));
        say(&format!(
            "  exchanges are {all} between hosts; ranks wait {waited} of it, the rest is behind computation\n"
        ));
    }
    say(&format!("\n{}\n  {}\n", paint.strong("Train it"), how(ask, model, &best.layout)));
}

/// The commands that train a layout.
fn how(ask: &Ask<'_>, model: &Model, layout: &LocalLayout) -> String {
    let program = program();
    if !matches!(model.origin, Origin::Config(_)) {
        let file = quoted(ask.emit.unwrap_or(Path::new("plan.toml")));
        let train = start(ask, layout, &program, &file);
        let cluster = ask.cluster.unwrap_or(Path::new(LOCAL));
        return match ask.emit {
            Some(_) => train,
            None => format!(
                "{program} plan {} {} --emit {file}\n  {train}",
                quoted(Path::new(ask.model)),
                quoted(cluster)
            ),
        };
    }
    format!(
        "{} --set layout.zero={} --set train.recompute={}{}",
        start(ask, layout, &program, &quoted(Path::new(ask.model))),
        layout.config.layout.zero,
        layout.recompute(),
        match layout.config.layout.dispatch {
            DispatchConfig::Hierarchical if layout.hosts > 1 => " --set layout.dispatch=hierarchical",
            DispatchConfig::Flat if layout.hosts > 1 => " --set layout.dispatch=flat",
            _ => "",
        },
    )
}

/// The command that trains `config` on a layout's ranks.
fn start(ask: &Ask<'_>, layout: &LocalLayout, program: &str, config: &str) -> String {
    let LocalLayout { hosts, ranks, threads, .. } = layout;
    match ask.cluster {
        Some(cluster) if *hosts > 1 => format!(
            "mpirun -n {ranks} --map-by ppr:{}:node {program} train {config} --threads {threads} --cluster {}",
            layout.ranks_per_host(),
            quoted(cluster)
        ),
        _ => format!("{program} train {config} --ranks {ranks} --threads {threads}"),
    }
}
