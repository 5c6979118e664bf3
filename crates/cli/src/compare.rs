//! `unisono compare`: a dense and a sparse model of equal active compute, on the same data.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use unisono_comm::kind;
use unisono_plan::Layout;
use unisono_train::ways::DISPATCH_CALLS;
use unisono_train::{Event, Observer, RunConfig, RunOptions, Summary, ValidationRecord, train};

use crate::args::count;
use crate::config::load;
use crate::error::{CliError, DONE};
use crate::layout::ranks_and_threads;
use crate::screen::{Screen, say};
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

/// The bar, over the steps of both models.
pub const BAR: &str = "[{bar:30}] step {pos}/{len}  {elapsed} gone, {eta} left  {msg}";

/// One model's share of the bar, which begins at `before` of `steps` twice.
struct Progress<'a> {
    screen: &'a Screen,
    name: &'static str,
    before: u64,
    steps: u64,
}

impl Observer for Progress<'_> {
    fn event(&self, event: Event) {
        match event {
            Event::Started(_) if self.before == 0 => self.screen.start(0, 2 * self.steps),
            Event::Step(record) => {
                let message = format!("{}: loss {:.4}", self.name, record.loss);
                self.screen.advance(self.before + record.step, 2 * self.steps, message);
            }
            Event::Validation(record) => self.screen.complain(
                self.name,
                &format!("step {}, validation loss {:.4}", record.validation_step, record.loss),
            ),
            Event::Warning(text) => self.screen.complain("warning", &format!("{}: {text}", self.name)),
            Event::Started(_) | Event::Checkpoint { .. } => {}
        }
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
    let (screen, steps) = (Screen::new(BAR), sparse.train.steps);
    screen.wait("reading the data");
    let side = |name: &'static str, config: RunConfig, before: u64| -> Result<Side, CliError> {
        let folder = fresh_folder(&args.run, name);
        let progress = Progress { screen: &screen, name, before, steps };
        let summary = train(&config, &RunOptions::new(folder, ranks, threads), &progress)?;
        Ok(Side { config, summary })
    };
    let sides = side("dense", dense, 0).and_then(|dense| Ok([dense, side("sparse", sparse, steps)?]));
    screen.finish();
    let [dense, sparse] = sides?;
    let sides = [&dense, &sparse];
    if args.json {
        let [dense, sparse] = sides.map(|side| {
            let entry = |figure: &Figure| (figure.key.to_string(), json!((figure.of)(side)));
            FIGURES.iter().map(entry).collect::<serde_json::Map<_, _>>()
        });
        say(&format!("{}\n", json!({"dense": dense, "sparse": sparse})));
    } else {
        let mut lines = vec![vec![String::new(), "dense".into(), "sparse".into()]];
        lines.extend(FIGURES.iter().map(|figure| {
            let [dense, sparse] = sides.map(|side| (figure.of)(side).map_or("none".into(), figure.show));
            vec![figure.label.into(), dense, sparse]
        }));
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

/// A line of the table.
struct Figure {
    label: &'static str,
    /// Its name in JSON, where it is a plain number.
    key: &'static str,
    of: fn(&Side) -> Option<f64>,
    show: fn(f64) -> String,
}

/// What brings gradients to their owners and parameters back.
const SYNCHRONISING: [&str; 4] =
    [kind::REDUCE_SCATTER, kind::REDUCE_IN_NODE, kind::ALL_GATHER, kind::GATHER_IN_NODE];

const FIGURES: [Figure; 12] = {
    const fn figure(
        label: &'static str,
        key: &'static str,
        of: fn(&Side) -> Option<f64>,
        show: fn(f64) -> String,
    ) -> Figure {
        Figure { label, key, of, show }
    }
    [
        figure("validation loss, nats", "validation_loss", |s| validation(s).map(|v| v.loss), four_digits),
        figure(
            "validation bits/byte",
            "validation_bits_per_byte",
            |s| validation(s).map(|v| v.bits_per_byte),
            four_digits,
        ),
        figure("training loss, last step", "training_loss", |s| s.summary.last_loss, four_digits),
        figure("parameters", "parameters", |s| Some(parameters(s).0 as f64), |n| short(n as u64)),
        figure(
            "parameters active a token",
            "active_parameters",
            |s| Some(parameters(s).1 as f64),
            |n| short(n as u64),
        ),
        figure(
            "MFLOP a token, forward + backward",
            "flop_per_token",
            |s| Some(flops(s)),
            |n| format!("{:.2}", n / 1e6),
        ),
        figure(
            "TFLOP in all",
            "flop",
            |s| Some(flops(s) * s.summary.tokens as f64),
            |n| if n < 1e12 { crate::style::figure(n / 1e12) } else { format!("{:.2}", n / 1e12) },
        ),
        figure("tokens", "tokens", |s| Some(s.summary.tokens as f64), |n| grouped(n as u64)),
        figure(
            "MiB synchronised a step",
            "synchronised_bytes_per_step",
            |s| a_step(s, &SYNCHRONISING),
            mebibytes,
        ),
        figure(
            "MiB dispatched a step",
            "dispatched_bytes_per_step",
            |s| a_step(s, &DISPATCH_CALLS),
            mebibytes,
        ),
        figure("time", "seconds", |s| Some(s.summary.seconds), duration),
        figure(
            "tokens/s",
            "tokens_per_s",
            |s| Some(s.summary.tokens as f64 / s.summary.seconds),
            |n| grouped(n.round() as u64),
        ),
    ]
};

fn four_digits(number: f64) -> String {
    format!("{number:.4}")
}

fn mebibytes(bytes: f64) -> String {
    format!("{:.2}", bytes / f64::from(1 << 20))
}

fn validation(side: &Side) -> Option<&ValidationRecord> {
    side.summary.validation.as_ref()
}

fn parameters(side: &Side) -> (usize, usize) {
    Layout::new(&side.config.model).parameters(side.config.model.top_k)
}

fn flops(side: &Side) -> f64 {
    side.config.model.train_flops(side.config.train.sequence_length)
}

/// Bytes that ranks sent to others in such calls, a step.
fn a_step(side: &Side, kinds: &[&str]) -> Option<f64> {
    Some(side.summary.ledger.sent_in(kinds) as f64 / side.summary.step.max(1) as f64)
}
