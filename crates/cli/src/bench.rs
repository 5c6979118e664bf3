//! `unisono bench`: measurements of this machine.

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use unisono_data::Dataset;
use unisono_mesh::{Fold, Grid};
use unisono_plan::ModelConfig;
use unisono_train::RunConfig;
use unisono_train::baseline::{BaselineMeasured, Synchronisation, bench_baseline};
use unisono_train::bench::{ProductBench, StepBench, StepMeasured, bench_step};
use unisono_train::config::{EvaluationConfig, TrainConfig};

use crate::args::{count, within};
use crate::bench_collectives::{self, Collectives};
use crate::bench_exchange::{self, Exchange};
use crate::bench_local::{self, Layouts, Local};
use crate::bench_ways::{self, Dispatch, Exactness, Overlap};
use crate::error::{CliError, DONE};
use crate::layout::cores;
use crate::screen::say;
use crate::style::{counted, grouped, table};

/// `unisono bench`
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// A whole training step: tokens a second, memory, share of the rate of its products
    Step(Step),
    /// The products of a step, each alone
    Gemm(Products),
    /// What folding 8 replicas onto 1 and 2 ranks costs
    Fold(Products),
    /// One step synchronised by a single reducer, by parameter servers, and our way
    Baseline(Baseline),
    /// Each collective over sizes next to memory copies; under mpirun also next to the MPI library's own
    Collectives(Collectives),
    /// How much of the gathers of ZeRO-3, or of dispatch, hides behind computation
    Overlap(Overlap),
    /// Dispatch and combine in the ways a layout may choose: times, and what crosses between nodes
    Dispatch(Dispatch),
    /// Rows to experts and back alone, each way over sizes next to memory copies; under mpirun also next to MPI_Alltoallv
    Exchange(Exchange),
    /// What exact sums cost: steps with them next to steps with the MPI library's own; under mpirun
    Exactness(Exactness),
    /// This machine for the planner: `unisono plan CONFIG local` and `unisono train` predict steps from what it finds
    Local(Local),
    /// Steps of a config on every layout, predicted next to measured
    Layouts(Layouts),
}

impl Bench {
    /// Whether ranks can be processes that a launcher has started.
    pub fn can_be_one_of_several(&self) -> bool {
        matches!(
            self,
            Self::Collectives(_)
                | Self::Overlap(_)
                | Self::Dispatch(_)
                | Self::Exchange(_)
                | Self::Exactness(_)
        )
    }
}

/// Sizes of the step, named as in `scripts/torch_moe.py`.
#[derive(Debug, Clone, Args)]
pub struct Sizes {
    /// Tokens of the vocabulary, at most 4,096
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = within(1..=4096))]
    pub vocab: usize,
    /// Width of the model
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = count())]
    pub d_model: usize,
    /// Layers, each with experts
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = count())]
    pub layers: usize,
    /// Query heads
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = count())]
    pub heads: usize,
    /// Key and value heads
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = count())]
    pub kv_heads: usize,
    /// Routed experts
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = count())]
    pub experts: usize,
    /// Experts a token visits
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = count())]
    pub top_k: usize,
    /// Shared experts
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = within(0..=65_536))]
    pub shared: usize,
    /// Hidden width of an expert
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = count())]
    pub expert_ff: usize,
    /// Tokens of a sequence
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = count())]
    pub seq: usize,
    /// Sequences of a step
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = count())]
    pub batch: usize,
    /// Sequences of a replica in one accumulation step
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = count())]
    pub micro: usize,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `unisono bench step`
#[derive(Debug, Args)]
pub struct Step {
    #[command(flatten)]
    sizes: Sizes,
    /// Ranks
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count())]
    ranks: usize,
    /// Compute threads of each rank [default: cores / ranks]
    #[arg(long, value_name = "N", value_parser = count())]
    threads: Option<usize>,
    /// Replicas of the grid [default: as many as ranks, at least 2]
    #[arg(long, value_name = "N", value_parser = count())]
    replicas: Option<usize>,
    /// Slots that dispatch tokens together [default: 2, or 1 where that does not divide the replicas]
    #[arg(long, value_name = "N", value_parser = count())]
    expert_group: Option<usize>,
    /// Steps measured
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = count())]
    steps: usize,
    /// Steps before the measured ones
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = within(0..=65_536))]
    warmup: usize,
}

/// `unisono bench gemm` and `unisono bench fold`
#[derive(Debug, Args)]
pub struct Products {
    #[command(flatten)]
    sizes: Sizes,
    /// Compute threads [default: the cores]
    #[arg(long, value_name = "N", value_parser = count())]
    threads: Option<usize>,
}

/// `unisono bench baseline`
#[derive(Debug, Args)]
pub struct Baseline {
    #[command(flatten)]
    sizes: Sizes,
    /// Steps measured at each number of ranks
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = count())]
    steps: usize,
}

/// `unisono bench`
pub fn run(args: Bench) -> Result<u8, CliError> {
    match args {
        Bench::Step(args) => step(&args),
        Bench::Gemm(args) => gemm(&args),
        Bench::Fold(args) => fold(&args),
        Bench::Baseline(args) => baseline(&args),
        Bench::Collectives(args) => bench_collectives::run(&args),
        Bench::Overlap(args) => bench_ways::overlap(&args),
        Bench::Dispatch(args) => bench_ways::dispatch(&args),
        Bench::Exchange(args) => bench_exchange::run(&args),
        Bench::Exactness(args) => bench_ways::exactness(&args),
        Bench::Local(args) => bench_local::local(&args),
        Bench::Layouts(args) => bench_local::layouts(&args),
    }
}

/// The computation: `micro` sequences at a time on one rank, all slots of a wave together.
pub fn config(sizes: &Sizes, replicas: usize, expert_group: usize) -> Result<RunConfig, CliError> {
    let share = |what: &str, whole: usize, over: &str, parts: usize| match whole.is_multiple_of(parts)
        && whole >= parts
    {
        true => Ok(whole / parts),
        false => Err(CliError::usage(format!(
            "{what} = {whole} cannot be shared out evenly over {over} = {parts}: choose a multiple"
        ))),
    };
    let batch = share("--batch", sizes.batch, "replicas", replicas)?;
    let micro = sizes.micro.min(batch);
    let config = RunConfig {
        grid: Grid { replicas, expert_group, ..Grid::default() },
        model: ModelConfig {
            vocab_size: sizes.vocab,
            hidden_size: sizes.d_model,
            num_hidden_layers: sizes.layers,
            num_attention_heads: sizes.heads,
            num_key_value_heads: sizes.kv_heads,
            head_dim: share("--d-model", sizes.d_model, "--heads", sizes.heads)?,
            moe_intermediate_size: sizes.expert_ff,
            num_experts: sizes.experts,
            top_k: sizes.top_k,
            num_shared_experts: sizes.shared,
            first_dense: 0,
            balance_loss_coef: 0.0,
            qk_norm: false,
            ..ModelConfig::default()
        },
        train: TrainConfig {
            sequence_length: sizes.seq,
            micro_batch: micro,
            accumulate: share("the sequences of a replica", batch, "--micro", micro)?,
            ..TrainConfig::default()
        },
        evaluation: EvaluationConfig { every: 0, ..EvaluationConfig::default() },
        ..RunConfig::default()
    };
    check(&config)?;
    Ok(config)
}

/// Keys of a config and the flags that set them here.
const FLAGS: [(&str, &str); 9] = [
    ("model.hidden_size", "--d-model"),
    ("model.num_attention_heads", "--heads"),
    ("model.num_key_value_heads", "--kv-heads"),
    ("model.moe_intermediate_size", "--expert-ff"),
    ("model.num_experts", "--experts"),
    ("model.top_k", "--top-k"),
    ("model.num_groups", "--groups"),
    ("model.top_groups", "--top-groups"),
    ("train.sequence_length", "--seq"),
];

/// Checks a config that flags have made.
///
/// # Errors
/// What is wrong with it, by the names of the flags.
pub fn check(config: &RunConfig) -> Result<(), CliError> {
    config.validate().map_err(|error| {
        let by_key = error.to_string();
        CliError::usage(FLAGS.iter().fold(by_key, |text, (key, flag)| {
            let (_, name) = key.split_once('.').unwrap_or(("", key));
            text.replace(key, flag).replace(&format!(" {name} "), &format!(" {flag} "))
        }))
    })
}

/// Rows that a rank works on at a time.
fn rows_at_a_time(config: &RunConfig, slots: usize) -> usize {
    slots * config.train.micro_batch * config.train.sequence_length
}

pub fn print(json: bool, value: &Value, lines: Vec<String>) -> Result<u8, CliError> {
    if json {
        say(&format!("{value}\n"));
    } else {
        say(&(lines.join("\n") + "\n"));
    }
    Ok(DONE)
}

fn measure(
    config: RunConfig,
    ranks: usize,
    threads: usize,
    args: (usize, usize),
) -> Result<StepMeasured, CliError> {
    let (warmup, steps) = args;
    Ok(bench_step(&StepBench { config, ranks, threads, warmup, steps })?)
}

fn step(args: &Step) -> Result<u8, CliError> {
    let replicas = args.replicas.unwrap_or(args.ranks.max(2));
    let expert_group = args.expert_group.unwrap_or(if replicas.is_multiple_of(2) { 2 } else { 1 });
    let config = config(&args.sizes, replicas, expert_group)?;
    Fold::new(config.grid, args.ranks).map_err(unisono_train::TrainError::from)?;
    let threads = args.threads.unwrap_or((cores() / args.ranks).max(1));
    let rows = rows_at_a_time(&config, (replicas / args.ranks).min(expert_group));
    let mut products = ProductBench::start(&config.model, rows, args.ranks * threads)?;
    let measured = measure(config, args.ranks, threads, (args.warmup, args.steps))?;
    products.measure()?;
    let products = products.result();
    let share = measured.gflops / products.gflops;
    let share_at_best =
        measured.gflops * measured.step_s.median / measured.step_s.min / products.gflops_at_best;
    let mut value = json!(measured);
    value["gemm_rate_share"] = json!(share);
    value["gemm_rate_share_at_best"] = json!(share_at_best);
    let mut rows = vec![vec!["phase".into(), "lane".into(), "ms a step".into()]];
    let mut phases = measured.phases.clone();
    phases.sort_by(|a, b| b.2.total_cmp(&a.2));
    rows.extend(phases.into_iter().map(|(lane, name, ms)| vec![name, lane, format!("{ms:.1}")]));
    let mut lines = vec![
        format!(
            "{} tokens/s, {:.3} s a step",
            grouped(measured.tokens_per_s.round() as u64),
            measured.step_s.median
        ),
        format!(
            "peak resident memory {:.0} MiB, {:.0} MiB of buffers a rank",
            measured.peak_rss_mib, measured.rank_mib
        ),
        format!(
            "{:.1} GFLOP/s: {:.0}% of the {:.1} GFLOP/s that the step's products reach alone (medians; {:.0}% the fastest)",
            measured.gflops,
            share * 100.0,
            products.gflops,
            share_at_best * 100.0
        ),
    ];
    lines.extend(table(&rows, 2));
    print(args.sizes.json, &value, lines)
}

fn gemm(args: &Products) -> Result<u8, CliError> {
    let config = config(&args.sizes, 2, 2)?;
    let threads = args.threads.unwrap_or_else(cores);
    let measured = ProductBench::start(&config.model, rows_at_a_time(&config, 2), threads)?.result();
    let mut rows = vec![vec!["product, m x n x k".into(), "of operations".into(), "GFLOP/s".into()]];
    for (shape, share, rate) in &measured.shapes {
        rows.push(vec![shape.clone(), format!("{:.1}%", share * 100.0), format!("{rate:.1}")]);
    }
    let mut lines = table(&rows, 1);
    lines.push(format!(
        "weighted by operations, at the median time of each: {:.1} GFLOP/s on {threads} threads (at the least: {:.1})",
        measured.gflops, measured.gflops_at_best
    ));
    let product = |(shape, share, gflops): &(String, f64, f64)| json!({"shape": shape, "share_of_operations": share, "gflops": gflops});
    let products: Vec<Value> = measured.shapes.iter().map(product).collect();
    let value = json!({
        "gflops": measured.gflops, "gflops_at_best": measured.gflops_at_best, "threads": threads, "products": products,
    });
    print(args.sizes.json, &value, lines)
}

fn fold(args: &Products) -> Result<u8, CliError> {
    let threads = args.threads.unwrap_or_else(cores);
    let mut rows =
        vec![["grid", "ranks x threads", "tokens/s", "time", "MiB", "memory"].map(String::from).to_vec()];
    let mut list = Vec::new();
    let mut base: Option<StepMeasured> = None;
    let layouts = [(1, 1, 1, threads), (8, 8, 1, threads), (8, 8, 2, (threads / 2).max(1))];
    for (replicas, expert_group, ranks, threads) in layouts {
        let sizes = Sizes { micro: args.sizes.micro.max(expert_group), ..args.sizes.clone() };
        let config = config(&sizes, replicas, expert_group)?;
        let measured = measure(config, ranks, threads, (1, 4))?;
        let mib = measured.rank_mib * ranks as f64;
        let first = base.get_or_insert_with(|| measured.clone());
        let (time, memory) = (first.tokens_per_s / measured.tokens_per_s, mib / first.rank_mib);
        let grid = format!("{} in groups of {expert_group}", counted(replicas as u64, "replica"));
        let layout = format!("{ranks} x {threads}");
        let numbers = [measured.tokens_per_s.round(), time, mib.round(), memory];
        let [rate, time_text, mib_text, memory_text] =
            [grouped(numbers[0] as u64), format!("{time:.2}x"), format!("{mib:.0}"), format!("{memory:.2}x")];
        rows.push(vec![grid.clone(), layout.clone(), rate, time_text, mib_text, memory_text]);
        list.push(json!({
            "grid": grid, "layout": layout, "tokens_per_s": numbers[0], "time": time, "mib": numbers[2], "memory": memory,
        }));
    }
    print(args.sizes.json, &json!({"layouts": list}), table(&rows, 2))
}

fn baseline(args: &Baseline) -> Result<u8, CliError> {
    let config = config(&args.sizes, 1, 1)?;
    let mut rows = vec![
        [
            "ranks",
            "synchronised by",
            "busiest rank MiB",
            "all ranks MiB",
            "of it dispatch",
            "in exchange s",
            "step s",
        ]
        .map(String::from)
        .to_vec(),
    ];
    let mut list: Vec<BaselineMeasured> = Vec::new();
    for ranks in [2, 4, 8] {
        let mut config = config.clone();
        let batch = args.sizes.batch / ranks;
        (config.train.micro_batch, config.train.accumulate) = (batch.max(1), 1);
        let dataset = Dataset::random(
            1,
            config.train.sequence_length * args.sizes.batch * 4 + 1,
            args.sizes.vocab as u32,
        )?;
        for way in [Synchronisation::MapReduce, Synchronisation::ParameterServer, Synchronisation::Unisono] {
            let measured = bench_baseline(&config, &dataset, way, ranks, args.steps)?;
            let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
            let name = match way {
                Synchronisation::MapReduce => "one reducer",
                Synchronisation::ParameterServer => "parameter servers",
                Synchronisation::Unisono => "unisono",
            };
            rows.push(vec![
                ranks.to_string(),
                name.into(),
                mib(measured.busiest_rank_bytes),
                mib(measured.total_bytes),
                mib(measured.dispatched_bytes),
                format!("{:.3}", measured.communication_s),
                format!("{:.3}", measured.step_s),
            ]);
            list.push(measured);
        }
    }
    let mut lines = table(&rows, 2);
    lines.push(String::new());
    lines.push(
        "All make the same update. In exchange: calls of rank 0 that move data, waits and sums in them."
            .into(),
    );
    print(args.sizes.json, &json!({"ways": list}), lines)
}
