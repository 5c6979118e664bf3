//! The planner's traffic against the ledger: every call and byte of training steps, on every rank of every layout, given the
//! run's routing counts.

use std::time::Instant;

use unisono_comm::{Ledger, ThreadRanks};
use unisono_data::Dataset;
use unisono_mesh::{Fold, Grid};
use unisono_model::Profile;
use unisono_plan::ModelConfig;
use unisono_plan::engine::CallTraffic;
use unisono_tensor::Cpu;
use unisono_train::config::{
    DispatchConfig, LayoutConfig, RecomputeConfig, ReduceEvery, TrainConfig, WireConfig,
};
use unisono_train::{Fault, RankState, RunConfig, RunOptions, TrainError, train_on};

use crate::common::{Quiet, every_grid};

const STEPS: usize = 2;

fn config(replicas: usize, expert_group: usize, num_experts: usize) -> RunConfig {
    let mut config = RunConfig {
        grid: Grid { replicas, expert_group, expert_nodes: 2, ..Grid::default() },
        model: ModelConfig {
            vocab_size: 64,
            hidden_size: 18,
            num_hidden_layers: 3,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 4,
            intermediate_size: 24,
            moe_intermediate_size: 12,
            num_experts,
            top_k: if num_experts == 0 { 2 } else { 4 },
            num_groups: if num_experts == 0 { 1 } else { 4 },
            top_groups: if num_experts == 0 { 1 } else { 3 },
            ..ModelConfig::default()
        },
        train: TrainConfig {
            sequence_length: 16,
            micro_batch: 1,
            accumulate: 2,
            expert_row_block: 8,
            ..TrainConfig::default()
        },
        ..RunConfig::default()
    };
    config.schedule.warmup_steps = 1;
    config
}

/// Kind, group, link class, calls, bytes sent and received.
type Counted = (String, String, unisono_mesh::LinkClass, u64, u64, u64);

fn predicted(rows: Vec<CallTraffic>) -> Vec<Counted> {
    let all = rows.into_iter();
    all.map(|r| (r.kind, r.group, r.link, r.calls, r.bytes_sent, r.bytes_received)).collect()
}

fn measured(ledger: &Ledger) -> Vec<Counted> {
    let rows = ledger.rows.iter().cloned();
    rows.map(|r| (r.kind, r.group, r.link, r.calls, r.bytes_sent, r.bytes_received)).collect()
}

/// `[rank]` what its steps move, as predicted and as counted.
fn run(config: &RunConfig, nodes: &[usize], fault: Option<Fault>) -> Vec<[Vec<Counted>; 2]> {
    config.validate().expect("the test's configs are valid");
    let dataset = Dataset::random(1, 4096, 64).expect("random tokens");
    let ranks = nodes.iter().sum();
    let fold = Fold::new(config.grid, ranks).expect("the test's folds divide");
    let body = |comm| {
        let profile = Profile::new(Instant::now());
        let mut state = RankState::new(config, &dataset, Cpu::new(1), fold, comm, profile)?;
        if let Some(fault) = fault {
            state.plant(fault);
        }
        for _ in 0..STEPS {
            state.step()?;
        }
        let (planned, moved) = state.traffic();
        Ok::<_, TrainError>([predicted(planned.rows()), measured(moved)])
    };
    ThreadRanks::new(ranks).nodes(nodes).run(body).expect("the steps succeed")
}

fn check(what: &str, config: &RunConfig, nodes: &[usize], fault: Option<Fault>) {
    for (rank, [predicted, measured]) in run(config, nodes, fault).into_iter().enumerate() {
        assert!(!measured.is_empty());
        for (ours, theirs) in predicted.iter().zip(&measured) {
            assert_eq!(ours, theirs, "{what} on nodes of {nodes:?}: rank {rank} of {:?}", config.layout);
        }
        assert_eq!(predicted.len(), measured.len(), "{what} on nodes of {nodes:?}: rank {rank}");
    }
}

/// Where `ranks` ranks are cut into nodes: all on one, evenly, and unevenly.
fn cuts(ranks: usize) -> Vec<Vec<usize>> {
    match ranks {
        1 => vec![vec![1]],
        2 | 3 => vec![vec![ranks], vec![1, ranks - 1]],
        8 => vec![vec![8], vec![2, 2, 2, 2], vec![3, 5], vec![1, 6, 1]],
        ranks => vec![vec![ranks], vec![ranks / 2; 2], vec![1, ranks - 1]],
    }
}

/// Every rank count x nodes x ZeRO x the moment of joining; how rows travel, what is kept and what overlaps go round, so
/// that each meets each.
fn check_grid(replicas: usize, expert_group: usize, num_experts: usize) {
    let mut turn = expert_group;
    for ranks in (1..=replicas).filter(|ranks| replicas.is_multiple_of(*ranks)) {
        for nodes in cuts(ranks) {
            for (zero, reduce_every) in [
                (1, ReduceEvery::Step),
                (1, ReduceEvery::Microbatch),
                (2, ReduceEvery::Microbatch),
                (3, ReduceEvery::Microbatch),
            ] {
                let mut config = config(replicas, expert_group, num_experts);
                let round = |every: usize, of: usize| turn / every % of;
                config.layout = LayoutConfig {
                    zero,
                    overlap: round(3, 2) == 0,
                    hierarchical_reduce: round(5, 3) > 0,
                    hierarchical_gather: round(3, 3) > 0,
                    dispatch: [DispatchConfig::Hierarchical, DispatchConfig::Flat][round(1, 2)],
                    dispatch_chunks: [1, 3, 1, 2, 1][round(1, 5)],
                    dispatch_rows: [0, 0, 24][round(1, 3)],
                };
                config.train.reduce_every = reduce_every;
                config.train.dispatch_wire = [WireConfig::F32, WireConfig::Bf16][round(2, 2)];
                config.train.recompute =
                    [RecomputeConfig::None, RecomputeConfig::Selective, RecomputeConfig::Full][round(1, 3)];
                config.model.tie_embeddings = round(7, 2) == 1;
                let what = format!("{replicas} replicas in groups of {expert_group}");
                check(&what, &config, &nodes, None);
                turn += 1;
            }
        }
    }
}

every_grid!(check_grid);

#[test]
fn the_summary_of_a_run_keeps_validations_and_checkpoints_apart() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut config = config(8, 4, 8);
    config.train.steps = 4;
    (config.evaluation.every, config.checkpoint.every, config.sample.tokens) = (2, 2, 0);
    config.log.hashes_every = 2;
    config.model.vocab_size = 4096;
    let dataset = Dataset::builtin(2).expect("the built-in corpus opens");
    let mut options = RunOptions::new(folder.path().join("run"), 4, 1);
    (options.nodes, options.predicted_step_s) = (vec![1, 3], Some(0.25));
    let summary = train_on(&config, &options, &dataset, &Quiet).expect("the run succeeds");
    assert!(summary.validation.is_some());
    assert_eq!(summary.step_time.predicted_s, Some(0.25));
    assert!(summary.step_time.measured_s > 0.0);
    for record in &summary.step_traffic {
        assert_eq!(record.predicted, record.measured, "{} of {:?}", record.kind, record.link);
    }
    let sent: u64 = summary.step_traffic.iter().map(|record| record.measured.bytes_sent).sum();
    let all: u64 = summary.ledger.rows.iter().map(|row| row.bytes_sent).sum();
    assert!(sent < all && sent * 2 > all, "steps send {sent} of {all} bytes");
}

#[test]
fn every_way_of_dispatch_over_nodes() {
    let mut config = config(8, 8, 8);
    for dispatch in [DispatchConfig::Flat, DispatchConfig::Hierarchical] {
        for dispatch_chunks in [1, 2, 16] {
            for dispatch_rows in [0, 8, 40, 400] {
                for dispatch_wire in [WireConfig::F32, WireConfig::Bf16] {
                    config.layout =
                        LayoutConfig { dispatch, dispatch_chunks, dispatch_rows, ..LayoutConfig::default() };
                    config.train.dispatch_wire = dispatch_wire;
                    for nodes in [&[3, 5][..], &[1, 3], &[4, 4]] {
                        check("every way of dispatch", &config, nodes, None);
                    }
                }
            }
        }
    }
}

#[test]
fn models_without_experts() {
    let mut config = config(4, 1, 0);
    for zero in 1..=3 {
        config.layout.zero = zero;
        config.train.reduce_every = ReduceEvery::Microbatch;
        check("dense", &config, &[1, 3], None);
    }
}

#[test]
fn a_skipped_update_gathers_no_parameters() {
    let mut config = config(4, 2, 8);
    for zero in [1, 3] {
        config.layout.zero = zero;
        config.train.reduce_every = ReduceEvery::Microbatch;
        check("skipped", &config, &[4], Some(Fault::PoisonGradient { step: 1 }));
    }
}
