//! `unisono compare`: a dense and a sparse model of equal active compute, on the same data.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use unisono_comm::Ledger;
use unisono_plan::Layout;
use unisono_train::{Event, Observer, RunConfig, RunOptions, Summary, train};

use crate::args::count;
use crate::config::load;
use crate::error::{CliError, DONE};
use crate::layout::ranks_and_threads;
use crate::screen::say;
use crate::style::{duration, grouped, short, table};

/// `unisono compare`
#[derive(Debug, Args)]
pub struct Compare {
    /// TOML file of the sparse model: with model.first_dense = 0, or with dense layers (model.intermediate_size) as wide as
    /// the experts that a token visits [default: the built-in config]
    config: Option<PathBuf>,
    /// Ranks in this process
    #[arg(long, value_name = "N", value_parser = count())]
    ranks: Option<usize>,
    /// Compute threads of each rank
    #[arg(long, value_name = "N", value_parser = count())]
    threads: Option<usize>,
    /// Steps of each model
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Folder for both runs
    #[arg(long, value_name = "DIR", default_value = "runs/compare")]
    run: PathBuf,
    /// Override one key of the config; may be given again
    #[arg(long, value_name = "a.b=c")]
    set: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

struct Progress(&'static str);

impl Observer for Progress {
    fn event(&self, event: Event) {
        let record = match event {
            Event::Validation(record) => record,
            Event::Warning(text) => return eprintln!("{}: {text}", self.0),
            _ => return,
        };
        eprintln!("{}: step {}, validation loss {:.4}", self.0, record.validation_step, record.loss);
    }
}

/// The dense model with the same active compute a token: each MoE layer becomes one dense layer as wide as the experts that
/// a token visits. The router's products are all that it saves.
pub fn dense_twin(sparse: &RunConfig) -> Result<RunConfig, CliError> {
    let model = &sparse.model;
    let active = (model.top_k + model.num_shared_experts) * model.moe_intermediate_size;
    if model.num_experts == 0 {
        return Err(CliError::usage("compare needs a model with experts: set model.num_experts above 0"));
    }
    if model.first_dense > 0 && model.intermediate_size != active {
        return Err(CliError::usage(format!(
            "compare needs dense layers as wide as the {active} that a token visits in a sparse one: set \
             model.intermediate_size={active} or model.first_dense=0"
        )));
    }
    let mut dense = sparse.clone();
    dense.model.num_experts = 0;
    dense.model.first_dense = model.num_hidden_layers;
    dense.model.intermediate_size = active;
    dense.grid.expert_group = 1;
    dense.grid.expert_nodes = 1;
    Ok(dense)
}

struct Side {
    config: RunConfig,
    summary: Summary,
}

/// `unisono compare`
pub fn run(args: Compare) -> Result<u8, CliError> {
    let mut overrides = args.set.clone();
    overrides.extend(args.steps.map(|steps| format!("train.steps={steps}")));
    let sparse = load(args.config.as_deref(), &overrides)?;
    let dense = dense_twin(&sparse)?;
    let (ranks, threads) = ranks_and_threads(sparse.grid.slots(), args.ranks, args.threads);
    let side = |name: &'static str, config: RunConfig| -> Result<Side, CliError> {
        let folder = fresh_folder(&args.run, name);
        let summary = train(&config, &RunOptions::new(folder, ranks, threads), &Progress(name))?;
        Ok(Side { config, summary })
    };
    let dense = side("dense", dense)?;
    let sparse = side("sparse", sparse)?;
    let rows = rows(&dense, &sparse);
    if args.json {
        let side = |column: usize| {
            rows.iter().map(|row| (row[0].clone(), json!(row[column]))).collect::<serde_json::Map<_, _>>()
        };
        say(&format!("{}\n", json!({"dense": side(1), "sparse": side(2)})));
    } else {
        let mut lines = vec![vec![String::new(), "dense".into(), "sparse".into()]];
        lines.extend(rows);
        say(&(table(&lines, 1).join("\n") + "\n"));
    }
    Ok(DONE)
}

/// `base/name`, or with a number behind it if that holds a run already.
fn fresh_folder(base: &Path, name: &str) -> PathBuf {
    let candidates = (1..).map(|number| match number {
        1 => base.join(name),
        _ => base.join(format!("{name}-{number}")),
    });
    candidates.into_iter().find(|path| !path.exists()).unwrap_or_else(|| base.join(name))
}

/// Bytes that ranks sent to other ranks, in calls of the given kinds.
fn sent(ledger: &Ledger, kinds: &[&str]) -> u64 {
    let rows = ledger.rows.iter().filter(|row| row.link != unisono_mesh::LinkClass::SameRank);
    rows.filter(|row| kinds.contains(&row.kind.as_str())).map(|row| row.bytes_sent).sum()
}

fn rows(dense: &Side, sparse: &Side) -> Vec<Vec<String>> {
    type Figure = (&'static str, fn(&Side) -> String);
    let figures: [Figure; 12] = [
        ("validation loss, nats", |s| loss(s, |v| v.loss)),
        ("validation bits/byte", |s| loss(s, |v| v.bits_per_byte)),
        ("training loss, last step", |s| format!("{:.4}", s.summary.last_loss.unwrap_or(f64::NAN))),
        ("parameters", |s| short(parameters(s).0 as u64)),
        ("parameters active a token", |s| short(parameters(s).1 as u64)),
        ("MFLOP a token, forward + backward", |s| format!("{:.2}", flops(s) / 1e6)),
        ("TFLOP in all", |s| format!("{:.2}", flops(s) * s.summary.tokens as f64 / 1e12)),
        ("tokens", |s| grouped(s.summary.tokens)),
        ("MiB synchronised a step", |s| mib(s, &["reduce_scatter", "all_gather"])),
        ("MiB dispatched a step", |s| mib(s, &["dispatch", "combine", "dispatch_counts"])),
        ("time", |s| duration(s.summary.seconds)),
        ("tokens/s", |s| format!("{:.0}", s.summary.tokens as f64 / s.summary.seconds)),
    ];
    figures.iter().map(|(name, figure)| vec![name.to_string(), figure(dense), figure(sparse)]).collect()
}

fn loss(side: &Side, pick: fn(&unisono_train::ValidationRecord) -> f64) -> String {
    side.summary.validation.as_ref().map_or_else(|| "none".into(), |record| format!("{:.4}", pick(record)))
}

fn parameters(side: &Side) -> (usize, usize) {
    Layout::new(&side.config.model).parameters(side.config.model.top_k)
}

fn flops(side: &Side) -> f64 {
    side.config.model.train_flops(side.config.train.sequence_length)
}

fn mib(side: &Side, kinds: &[&str]) -> String {
    let steps = side.summary.step.max(1);
    format!("{:.2}", sent(&side.summary.ledger, kinds) as f64 / steps as f64 / f64::from(1 << 20))
}
