//! Dispatch in every way that a layout may choose, against the one-rank run: the same bits.

use std::path::PathBuf;

use unisono_mesh::Grid;
use unisono_plan::ModelConfig;
use unisono_train::config::{
    DispatchConfig, LayoutConfig, RecomputeConfig, ReduceEvery, TrainConfig, WireConfig,
};
use unisono_train::{Fault, RunConfig, RunOptions, StepHashes, Summary, run_folder, train_on};

use crate::common::{Quiet, dataset};

const STEPS: u64 = 3;

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
            reduce_every: ReduceEvery::Microbatch,
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
#[derive(Clone, Copy)]
struct Case {
    nodes: &'static [usize],
    /// Instead of `nodes`: the node of each rank.
    placed: &'static [usize],
    layout: LayoutConfig,
}

fn flat(nodes: &'static [usize], dispatch_chunks: usize, dispatch_rows: usize) -> Case {
    let layout = LayoutConfig { dispatch_chunks, dispatch_rows, ..LayoutConfig::default() };
    Case { nodes, placed: &[], layout }
}

fn hierarchical(nodes: &'static [usize], dispatch_chunks: usize, dispatch_rows: usize) -> Case {
    let mut case = flat(nodes, dispatch_chunks, dispatch_rows);
    case.layout.dispatch = DispatchConfig::Hierarchical;
    case
}

/// Ranks of a node that are not neighbours.
fn placed(nodes: &'static [usize], dispatch_chunks: usize) -> Case {
    Case { placed: nodes, ..hierarchical(&[], dispatch_chunks, 0) }
}

impl Case {
    fn ranks(&self) -> usize {
        self.nodes.iter().sum::<usize>() + self.placed.len()
    }

    fn options(&self, folder: PathBuf, threads: usize) -> RunOptions {
        let mut options = RunOptions::new(folder, self.ranks(), threads);
        (options.nodes, options.placed) = (self.nodes.to_vec(), self.placed.to_vec());
        options
    }
}

/// Holds every case against one rank that exchanges at once; messages come in shuffled order. What is sharded, overlaps and
/// is kept for the backward goes round, so that each meets each. With rows as float32 a case trains all steps, with bfloat16 it
/// stops before the last, and the next case goes on.
fn check(config: &RunConfig, cases: &[Case]) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (turn, wire) in [WireConfig::F32, WireConfig::Bf16].into_iter().enumerate() {
        let mut config = config.clone();
        config.train.dispatch_wire = wire;
        let reference = run(&config, &RunOptions::new(folder.path().join(format!("{wire:?}")), 1, 1)).0;
        assert_eq!(reference.steps.len() as u64, STEPS);
        let laid_out = |index: usize| {
            let (case, mut config) = (cases[index % cases.len()], config.clone());
            config.layout = case.layout;
            config.layout.overlap = (index + turn).is_multiple_of(2);
            if config.train.reduce_every == ReduceEvery::Microbatch {
                config.layout.zero = [3, 2, 1][(index / 2 + turn) % 3];
            }
            config.train.recompute =
                [RecomputeConfig::None, RecomputeConfig::Selective, RecomputeConfig::Full][index % 3];
            let mut options = case.options(folder.path().join(format!("{wire:?} {index}")), 1 + index % 2);
            options.jitter = Some(index as u64);
            let what = format!("{wire:?} on nodes of {:?}{:?}, {:?}", case.nodes, case.placed, config.layout);
            (config, options, what)
        };
        for index in 0..cases.len() {
            let (config, mut options, what) = laid_out(index);
            if turn == 0 {
                assert_same(&what, &run(&config, &options).0, &reference);
                continue;
            }
            options.stop_after = Some(STEPS - 1);
            train_on(&config, &options, dataset(), &Quiet).expect("the first part succeeds");
            let (config, next, after) = laid_out(index + 1);
            let options = RunOptions { folder: options.folder, resume: true, ..next };
            assert_same(&format!("{what}, then {after}"), &run(&config, &options).0, &reference);
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
    // The other moment of joining gradients, which ZeRO-1 alone knows.
    let mut config = config(8, 2, 8, 1);
    config.train.reduce_every = ReduceEvery::Step;
    check(&config, &[hierarchical(&[3, 5], 1, 0), flat(&[8], 2, 0), flat(&[4], 1, 8)]);
}

#[test]
fn ranks_of_a_node_that_are_not_neighbours() {
    check(
        &config(8, 4, 8, 4),
        &[placed(&[0, 1, 0, 1], 2), placed(&[0, 1, 1, 0, 2, 0, 1, 2], 1), placed(&[0, 1, 1, 0], 3)],
    );
}

#[test]
fn five_and_seven_ranks() {
    check(
        &config(10, 10, 20, 4),
        &[hierarchical(&[2, 3], 2, 0), flat(&[5], 1, 16), placed(&[0, 1, 0, 1, 0], 1), flat(&[5], 3, 0)],
    );
    check(
        &config(14, 7, 28, 4),
        &[flat(&[7], 2, 0), hierarchical(&[3, 4], 1, 0), hierarchical(&[1, 1, 5], 3, 0), flat(&[7], 1, 16)],
    );
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

/// One expert gets every token of a larger batch.
fn crowded(config: &RunConfig, folder: PathBuf, case: Case) -> (Outcome, Summary) {
    let mut config = config.clone();
    let zero = config.layout.zero;
    config.layout = LayoutConfig { zero, ..case.layout };
    let mut options = case.options(folder, 1);
    options.fault = Some(Fault::CrowdExpert { expert: 5 });
    run(&config, &options)
}

/// With the rows of `within` and without a bound.
fn check_crowd(what: &str, change: impl Fn(&mut RunConfig), within: Case) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut config = config(4, 4, 8, 2);
    (config.model.top_k, config.model.num_groups, config.model.top_groups) = (1, 1, 1);
    (config.train.sequence_length, config.train.micro_batch, config.train.accumulate) = (128, 4, 1);
    config.model.moe_intermediate_size = 256;
    change(&mut config);
    let mut without = within;
    without.layout.dispatch_rows = 0;
    let (reference, _) = crowded(&config, folder.path().join("alone"), flat(&[1], 1, 0));
    let (unbounded, free) = crowded(&config, folder.path().join("free"), without);
    let (bounded, held) = crowded(&config, folder.path().join("held"), within);
    assert_same(what, &unbounded, &reference);
    assert_same(&format!("{what} within a bound"), &bounded, &reference);
    let most = |summary: &Summary| summary.memory.iter().map(|rank| rank.measured).max().unwrap_or(0);
    let estimated = held.memory.iter().map(|rank| rank.estimated).max().unwrap_or(0);
    let (free, held) = (most(&free), most(&held));
    assert!(free > estimated, "{what}: without a bound the crowd needs more: {free} of {estimated}");
    assert!(held <= estimated, "{what}: the bound holds what is estimated: {held} of {estimated}");
}

#[test]
fn every_token_on_one_expert_trains_within_the_bound_megablocks_154_megatron_716() {
    check_crowd("4 ranks", |_| (), flat(&[4], 1, 256));
    check_crowd("on two nodes", |_| (), hierarchical(&[1, 3], 1, 256));
    let all = |config: &mut RunConfig| {
        (config.train.accumulate, config.train.dispatch_wire) = (2, WireConfig::Bf16);
        config.layout.zero = 3;
    };
    check_crowd("ZeRO-3, bfloat16, two micro-batches", all, flat(&[4], 1, 256));
    check_crowd("ZeRO-3, bfloat16, two micro-batches, on two nodes", all, hierarchical(&[2, 2], 2, 256));
}
