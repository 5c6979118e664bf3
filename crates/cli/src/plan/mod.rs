//! `unisono plan`

pub mod answer;
mod compare;
mod emit;
mod engine;
mod explain;
mod json;
mod local;
mod question;
mod report;
mod show;
mod tensors;
pub mod trace;
mod validate;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use unisono_plan::engine::HostCluster;
use unisono_plan::{Architecture, Gpu, Parallelism};

use crate::error::{CliError, DONE, STORAGE};
use crate::screen::{complain, say};
use answer::{Answer, Wanted};
use question::TrainingArgs;

/// Bytes of a GiB.
const GIB: f64 = (1u64 << 30) as f64;

/// What asks about a model, which a list of them does not.
const NOT_WITH_LISTS: [&str; 8] =
    ["model", "layout", "explain", "emit", "trace", "schedule", "report", "machine"];

/// `unisono plan`
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Plan {
    /// What else to do
    #[command(subcommand)]
    command: Option<PlanCommand>,
    #[command(flatten)]
    ask: Ask,
}

/// A question about one model on one cluster.
#[derive(Debug, Args)]
struct Ask {
    /// A built-in name (see --models), a Hugging Face config.json or its folder, or a config of unisono (.toml)
    #[arg(required_unless_present_any = ["models", "gpus"])]
    model: Option<String>,
    /// GPU and count, such as h800x2048, a TOML file of GPUs or of hosts, or `local`: this machine as `unisono bench local` measured it
    #[arg(required_unless_present_any = ["models", "gpus"])]
    cluster: Option<String>,
    #[command(flatten)]
    training: TrainingArgs,
    /// Price this layout instead of searching: "pp16 ep64 dp128 dualpipev zero1"
    #[arg(long, value_name = "WORDS")]
    layout: Option<Parallelism>,
    /// Layouts in the table
    #[arg(long, value_name = "N", default_value_t = 10)]
    rows: usize,
    /// Show the formulas with numbers
    #[arg(long)]
    explain: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Write the config that `unisono train` runs; refused while the engine lacks a feature. On measured machines: of the fastest that fits
    #[arg(long, value_name = "FILE")]
    emit: Option<PathBuf>,
    /// Write a Chrome trace of the predicted step, which opens in Perfetto: of a step of more than a million events the two ends
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Write the order of passes on every pipeline rank: drawn if the file ends in .svg, else a line a rank
    #[arg(long, value_name = "FILE")]
    schedule: Option<PathBuf>,
    /// Write a page with timeline, memory, Pareto front and bytes
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// With `local`, and with hosts that are: file of `unisono bench local` [default: local.toml]
    #[arg(long, value_name = "FILE")]
    machine: Option<PathBuf>,
    /// List the built-in models
    #[arg(long, conflicts_with_all = NOT_WITH_LISTS, conflicts_with = "gpus")]
    models: bool,
    /// List the built-in GPUs
    #[arg(long, conflicts_with_all = NOT_WITH_LISTS)]
    gpus: bool,
}

/// The commands of the planner.
#[derive(Debug, Subcommand)]
enum PlanCommand {
    /// Hold the planner to published measurements
    Validate(validate::Validate),
    /// The same question for several models or clusters, side by side
    Compare(compare::Compare),
}

/// `unisono plan`
pub fn run(args: Plan) -> Result<u8, CliError> {
    match args.command {
        Some(PlanCommand::Validate(args)) => validate::run(args),
        Some(PlanCommand::Compare(args)) => compare::run(&args),
        None => ask(&args.ask),
    }
}

fn ask(args: &Ask) -> Result<u8, CliError> {
    if args.models || args.gpus {
        list(args.models, args.json);
        return Ok(DONE);
    }
    if let Some(hosts) = measured_hosts(args)? {
        return ask_local(args, hosts.as_deref());
    }
    if args.machine.is_some() {
        return Err(CliError::usage(
            "--machine is for `local` and files with host = \"local\"; a cluster of GPUs is described by its own TOML file",
        ));
    }
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let model = question::model(&text(&args.model))?;
    let cluster = question::cluster(&text(&args.cluster))?;
    args.training.check_experts(std::iter::once(&model))?;
    let training = args.training.training(&model, &cluster)?;
    let wanted = Wanted { layout: args.layout, recompute: args.training.recompute };
    if wanted.layout.is_some() && wanted.recompute.is_some() {
        return Err(CliError::usage(
            "--recompute is for a search; a --layout says it itself: \"... recompute=full\"",
        ));
    }
    let answer = Answer::to(model.architecture, cluster, training, wanted)?;
    if let Some(path) = &args.emit {
        let emitted = emit::config(&answer, &model.origin)?;
        write(path, &emitted.text)?;
        if let Some(lacking) = emitted.data {
            complain("warning", &lacking);
        }
    }
    if let Some(path) = &args.trace {
        trace::write(&answer.simulate()?, path)?;
    }
    if let Some(path) = &args.schedule {
        trace::write_schedule(&answer.simulate()?, path)?;
    }
    if let Some(path) = &args.report {
        write(path, &report::page(&answer)?)?;
    }
    if args.json {
        let mut object = json::object(&answer);
        if args.explain {
            object["explain"] = explain::object(&answer);
        }
        say(&format!("{object}\n"));
        return Ok(DONE);
    }
    show::print(&answer, args.rows);
    if args.explain {
        explain::print(&answer);
    }
    Ok(DONE)
}

/// Whether measured machines are meant: nothing beside it for this one, the text of the file that describes several.
fn measured_hosts(args: &Ask) -> Result<Option<Option<String>>, CliError> {
    let cluster = args.cluster.as_deref().unwrap_or_default();
    if cluster == local::LOCAL {
        return Ok(Some(None));
    }
    Ok(question::cluster_text(cluster)?.filter(|text| HostCluster::is_meant(text)).map(Some))
}

/// The same of a model that the engine trains on this machine, or on hosts that `hosts` describes; they have neither clusters' layouts
/// nor a training of their own.
fn ask_local(args: &Ask, hosts: Option<&str>) -> Result<u8, CliError> {
    let of_clusters = [
        ("--layout", args.layout.is_some()),
        ("--explain", args.explain),
        ("--report", args.report.is_some()),
    ];
    let given = of_clusters.into_iter().filter(|(_, given)| *given).map(|(name, _)| name);
    if let Some(option) = given.chain(args.training.given()).next() {
        return Err(CliError::usage(format!(
            "{option} is for clusters of GPUs; on measured machines `plan` prices every layout of a config as it is, routing as even: change the config itself (--emit writes that of a model)"
        )));
    }
    let ask = local::Ask {
        model: args.model.as_deref().unwrap_or_default(),
        cluster: hosts.and(args.cluster.as_deref()).map(Path::new),
        machine: args.machine.as_deref(),
        emit: args.emit.as_deref(),
        trace: args.trace.as_deref(),
        schedule: args.schedule.as_deref(),
        rows: args.rows,
        json: args.json,
    };
    local::run(&ask, hosts)
}

/// The built-in models or GPUs, one a line or as one JSON array.
fn list(models: bool, as_json: bool) {
    let names: Vec<String> = match models {
        true => Architecture::all_built_in().iter().map(|model| model.name.to_string()).collect(),
        false => Gpu::all().iter().map(|gpu| gpu.name.to_string()).collect(),
    };
    let text = if as_json { serde_json::json!(names).to_string() } else { names.join("\n") };
    say(&format!("{text}\n"));
}

/// Writes a whole file.
fn write(path: &Path, text: &str) -> Result<(), CliError> {
    std::fs::write(path, text)
        .map_err(|error| CliError { code: STORAGE, message: format!("write {}: {error}", path.display()) })
}
