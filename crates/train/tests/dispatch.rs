//! Dispatch in every way that a layout may choose, against the one-rank run: the same bits.

use std::path::Path;
use std::sync::OnceLock;

use unisono_data::Dataset;
use unisono_mesh::Grid;
use unisono_plan::ModelConfig;
use unisono_train::config::{DispatchConfig, LayoutConfig, RecomputeConfig, TrainConfig, WireConfig};
use unisono_train::{
    Event, Fault, Observer, RunConfig, RunOptions, StepHashes, Summary, run_folder, train_on,
};

const STEPS: u64 = 3;

fn dataset() -> &'static Dataset {
    static DATASET: OnceLock<Dataset> = OnceLock::new();
    DATASET.get_or_init(|| Dataset::builtin(2).expect("the built-in corpus opens"))
}

struct Quiet;

impl Observer for Quiet {
    fn event(&self, _: Event) {}
}

fn config(replicas: usize, expert_group: usize, num_experts: usize, expert_nodes: usize) -> RunConfig {
    let mut config = RunConfig {
        grid: Grid { replicas, expert_group, expert_nodes, ..Grid::default() },
        model: ModelConfig {
            hidden_size: 17 * 2,
            num_hidden_layers: 3,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 8,
            intermediate_size: 48,
            moe_intermediate_size: 24,
            num_experts,
            top_k: 4,
            num_groups: 4,
            top_groups: 3,
            z_loss_coef: 1e-3,
            balance_loss_coef: 1e-2,
            ..ModelConfig::default()
        },
        train: TrainConfig {
            steps: STEPS,
            sequence_length: 24,
            micro_batch: 1,
            accumulate: 2,
            expert_row_block: 8,
            ..TrainConfig::default()
        },
        ..RunConfig::default()
    };
    config.schedule.warmup_steps = 1;
    config.evaluation.every = STEPS;
    config.evaluation.sequences = 8;
    config.checkpoint.every = 0;
    config.log.hashes_every = STEPS;
    config.sample.tokens = 0;
    config
}

/// What runs must agree on: every step's numbers, the hashes of all tensors after the last, the validation loss.
#[derive(Debug, PartialEq)]
struct Outcome {
    steps: Vec<Vec<(&'static str, String)>>,
    hashes: Vec<StepHashes>,
    validation: u64,
}

fn run(config: &RunConfig, options: &RunOptions) -> (Outcome, Summary) {
    let summary = train_on(config, options, dataset(), &Quiet).expect("the run succeeds");
    let steps = run_folder::read_steps(&options.folder).expect("the run wrote its metrics");
    let outcome = Outcome {
        steps: steps.iter().map(|step| step.numbers()).collect(),
        hashes: run_folder::read_hashes(&options.folder).expect("the run wrote its hashes"),
        validation: summary.validation.as_ref().map_or(0, |record| record.loss.to_bits()),
    };
    (outcome, summary)
}

/// One layout: ranks, the nodes they are on, and how rows travel.
struct Case {
    nodes: &'static [usize],
    layout: LayoutConfig,
}

fn flat(nodes: &'static [usize], dispatch_chunks: usize, dispatch_rows: usize) -> Case {
    Case { nodes, layout: LayoutConfig { dispatch_chunks, dispatch_rows, ..LayoutConfig::default() } }
}

fn hierarchical(nodes: &'static [usize], dispatch_chunks: usize, dispatch_rows: usize) -> Case {
    let dispatch = DispatchConfig::Hierarchical;
    Case {
        nodes,
        layout: LayoutConfig { dispatch, dispatch_chunks, dispatch_rows, ..LayoutConfig::default() },
    }
}

/// Runs every case and holds it against one rank that exchanges at once; messages come in shuffled order.
fn check(config: &RunConfig, cases: &[Case]) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for wire in [WireConfig::F32, WireConfig::Bf16] {
        let mut config = config.clone();
        config.train.dispatch_wire = wire;
        let reference = run(&config, &RunOptions::new(folder.path().join(format!("{wire:?}")), 1, 1)).0;
        assert_eq!(reference.steps.len() as u64, STEPS);
        for (index, Case { nodes, layout }) in cases.iter().enumerate() {
            config.layout = *layout;
            config.train.recompute =
                [RecomputeConfig::None, RecomputeConfig::Selective, RecomputeConfig::Full][index % 3];
            let what = format!("{wire:?} on nodes of {nodes:?}, {layout:?}");
            let ranks = nodes.iter().sum();
            let mut options = RunOptions::new(folder.path().join(&what), ranks, 1 + index % 2);
            (options.nodes, options.jitter) = (nodes.to_vec(), Some(index as u64));
            assert_same(&what, &run(&config, &options).0, &reference);
        }
    }
}

fn assert_same(what: &str, outcome: &Outcome, reference: &Outcome) {
    for (index, (ours, theirs)) in outcome.steps.iter().zip(&reference.steps).enumerate() {
        assert_eq!(ours, theirs, "{what}: step {}", index + 1);
    }
    assert_eq!(outcome, reference, "{what}");
}

#[test]
fn one_group_of_eight_on_nodes_that_cut_expert_nodes_anywhere() {
    check(
        &config(8, 8, 8, 2),
        &[
            flat(&[1], 4, 0),
            flat(&[8], 2, 0),
            flat(&[8], 1, 24),
            hierarchical(&[4, 4], 1, 0),
            hierarchical(&[4, 4], 4, 0),
            hierarchical(&[3, 5], 1, 0),
            hierarchical(&[3, 5], 2, 0),
            hierarchical(&[1, 6, 1], 3, 0),
            hierarchical(&[3, 5], 2, 16),
            hierarchical(&[1, 3], 2, 0),
            hierarchical(&[1, 1], 1, 0),
            flat(&[2], 1, 64),
        ],
    );
}

#[test]
fn groups_of_two_and_four_with_expert_nodes_of_two() {
    check(
        &config(8, 4, 8, 4),
        &[
            hierarchical(&[2, 2, 2, 2], 2, 0),
            hierarchical(&[3, 5], 4, 0),
            flat(&[4], 4, 8),
            hierarchical(&[1, 3], 1, 0),
        ],
    );
    check(&config(8, 2, 8, 1), &[hierarchical(&[3, 5], 1, 0), flat(&[8], 2, 0), flat(&[4], 1, 8)]);
}

#[test]
fn a_fold_that_cuts_groups() {
    check(
        &config(6, 3, 12, 3),
        &[
            hierarchical(&[1, 2], 2, 0),
            flat(&[3], 1, 16),
            hierarchical(&[2, 1], 1, 0),
            hierarchical(&[3, 3], 2, 0),
        ],
    );
}

#[test]
fn groups_of_one_slot() {
    check(&config(4, 1, 8, 2), &[flat(&[2], 2, 0), hierarchical(&[1, 3], 1, 0), flat(&[4], 1, 8)]);
}

fn crowded(config: &RunConfig, folder: &Path, ranks: usize, rows: usize) -> (Outcome, Summary) {
    let mut config = config.clone();
    config.layout.dispatch_rows = rows;
    let mut options = RunOptions::new(folder.join(format!("{ranks} ranks, {rows} rows")), ranks, 1);
    options.fault = Some(Fault::CrowdExpert { expert: 5 });
    run(&config, &options)
}

#[test]
fn every_token_on_one_expert_trains_within_the_bound() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut config = config(4, 4, 8, 2);
    (config.model.top_k, config.model.num_groups, config.model.top_groups) = (1, 1, 1);
    (config.train.sequence_length, config.train.micro_batch, config.train.accumulate) = (128, 4, 1);
    config.model.moe_intermediate_size = 256;
    let (reference, _) = crowded(&config, folder.path(), 1, 0);
    let (unbounded, free) = crowded(&config, folder.path(), 4, 0);
    let (bounded, held) = crowded(&config, folder.path(), 4, 256);
    assert_same("4 ranks", &unbounded, &reference);
    assert_same("4 ranks within a bound", &bounded, &reference);
    let most = |summary: &Summary| summary.memory.iter().map(|rank| rank.measured).max().unwrap_or(0);
    let estimated = held.memory.iter().map(|rank| rank.estimated).max().unwrap_or(0);
    assert!(most(&free) > estimated, "without a bound the crowd needs more: {} of {estimated}", most(&free));
    assert!(most(&held) <= estimated, "the bound holds what is estimated: {} of {estimated}", most(&held));
}
