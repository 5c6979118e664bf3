//! The memory estimated before the first step against what the steps then hold, on every rank: with balanced routing, and
//! with a new router's, which is uneven at first.

use unisono_data::Dataset;
use unisono_mesh::Grid;
use unisono_plan::ModelConfig;
use unisono_train::config::{DispatchConfig, EvaluationConfig, RecomputeConfig, ReduceEvery, TrainConfig};
use unisono_train::{MemoryRecord, RunConfig, RunOptions, train_on};

use crate::common::Quiet;

/// How far the estimate may be from what is measured.
const TOLERANCE: f64 = 0.15;

/// `estimated` next to `measured`, if they are farther apart than the tolerance.
fn too_far(what: &str, rank: usize, estimated: u64, measured: u64) -> Option<String> {
    let off = estimated as f64 / measured as f64 - 1.0;
    let said =
        || format!("{what}: rank {rank} estimated {estimated}, measured {measured}: {:+.0}%", 100.0 * off);
    (off.abs() > TOLERANCE).then(said)
}

/// The ranks of a run whose estimate is too far from what was measured.
fn ranks_too_far(what: &str, memory: &[MemoryRecord]) -> Vec<String> {
    let ranks = memory.iter().enumerate();
    ranks.filter_map(|(rank, record)| too_far(what, rank, record.estimated, record.measured)).collect()
}

fn config(replicas: usize, expert_group: usize, num_experts: usize, recompute: RecomputeConfig) -> RunConfig {
    let mut config = RunConfig {
        grid: Grid { replicas, expert_group, ..Grid::default() },
        model: ModelConfig {
            hidden_size: 96,
            num_hidden_layers: 4,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 24,
            intermediate_size: 256,
            moe_intermediate_size: 96,
            num_experts,
            force_balance: true,
            first_dense: if num_experts == 0 { 4 } else { 1 },
            ..ModelConfig::default()
        },
        train: TrainConfig {
            steps: 2,
            micro_batch: 1,
            sequence_length: 128,
            recompute,
            reduce_every: ReduceEvery::Microbatch,
            ..TrainConfig::default()
        },
        evaluation: EvaluationConfig { every: 0, ..EvaluationConfig::default() },
        ..RunConfig::default()
    };
    config.sample.tokens = 0;
    config.schedule.warmup_steps = 1;
    config
}

#[test]
fn the_estimate_of_every_rank_is_within_fifteen_percent_of_what_is_measured() {
    let dataset = Dataset::random(1, 1 << 16, 4096).expect("random tokens");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (none, selective, full) = (RecomputeConfig::None, RecomputeConfig::Selective, RecomputeConfig::Full);
    let cases: [(usize, usize, usize, RecomputeConfig, usize, &[&[usize]]); 8] = [
        (8, 8, 16, selective, 1, &[&[1], &[2], &[8], &[4, 4], &[1, 1]]),
        (8, 8, 16, selective, 3, &[&[4], &[2, 6]]),
        (8, 2, 16, none, 2, &[&[1], &[4], &[5, 3]]),
        (8, 2, 16, none, 3, &[&[8], &[1, 3]]),
        (8, 1, 16, selective, 1, &[&[3, 5]]),
        (6, 3, 12, full, 1, &[&[2]]),
        (6, 3, 12, full, 3, &[&[1], &[1, 2], &[4, 2]]),
        (4, 1, 0, selective, 3, &[&[1], &[4], &[1, 3]]),
    ];
    let mut far = Vec::new();
    for (replicas, expert_group, experts, recompute, zero, all_nodes) in cases {
        for &nodes in all_nodes {
            let mut config = config(replicas, expert_group, experts, recompute);
            config.layout.zero = zero;
            if nodes.len() > 1 {
                config.layout.dispatch = DispatchConfig::Hierarchical;
            }
            let ranks = nodes.iter().sum();
            let what = format!(
                "{replicas} replicas in groups of {expert_group} on nodes of {nodes:?}, {recompute:?}, ZeRO-{zero}"
            );
            let mut options = RunOptions::new(folder.path().join(&what), ranks, 1);
            options.nodes = nodes.to_vec();
            let summary = train_on(&config, &options, &dataset, &Quiet).expect("the run succeeds");
            assert_eq!(summary.memory.len(), ranks, "{what}");
            assert!(summary.memory.iter().all(|of| of.even == of.estimated), "{what}: rows are sent evenly");
            far.extend(ranks_too_far(&what, &summary.memory));
        }
    }
    assert!(far.is_empty(), "{}", far.join("\n"));
}

#[test]
fn of_few_tokens_whose_gradients_outweigh_what_is_computed() {
    let dataset = Dataset::random(1, 1 << 14, 4096).expect("random tokens");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut far = Vec::new();
    for (ranks, experts, layers) in [(2, 12, 4), (4, 12, 6), (4, 4, 8)] {
        let mut config = config(2 * ranks, 4, experts, RecomputeConfig::Selective);
        (config.model.hidden_size, config.model.num_hidden_layers) = (256, layers);
        (config.train.sequence_length, config.layout.zero) = (2, 2);
        let what = format!("{layers} layers of {experts} experts on {ranks} ranks");
        let options = RunOptions::new(folder.path().join(&what), ranks, 1);
        let memory = train_on(&config, &options, &dataset, &Quiet).expect("the run succeeds").memory;
        far.extend(ranks_too_far(&what, &memory));
    }
    assert!(far.is_empty(), "{far:#?}");
}

#[test]
fn uneven_routing_of_the_first_steps_is_allowed_for_and_explains_what_ranks_hold() {
    let dataset = Dataset::builtin(2).expect("the built-in corpus opens");
    let folder = tempfile::tempdir().expect("a temporary folder");
    for nodes in [&[2][..], &[4], &[3, 1]] {
        let mut config = config(4, 4, 16, RecomputeConfig::Selective);
        config.model.force_balance = false;
        (config.train.steps, config.train.sequence_length) = (40, 256);
        if nodes.len() > 1 {
            config.layout.dispatch = DispatchConfig::Hierarchical;
        }
        let what = format!("nodes of {nodes:?}");
        let mut options = RunOptions::new(folder.path().join(&what), nodes.iter().sum(), 1);
        options.nodes = nodes.to_vec();
        let memory = train_on(&config, &options, &dataset, &Quiet).expect("the run succeeds").memory;
        let far = memory.iter().enumerate();
        let far = far.filter_map(|(rank, record)| too_far(&what, rank, record.as_routed, record.measured));
        assert_eq!(far.collect::<Vec<_>>(), [""; 0]);
        let fullest = memory.iter().max_by_key(|record| record.measured).expect("a rank");
        assert_eq!(too_far(&what, 0, fullest.estimated, fullest.measured), None);
        assert!(memory.iter().all(|record| record.even < record.estimated), "{what}: {memory:?}");
    }
}

#[test]
fn of_the_smallest_example_whose_largest_tensors_are_a_seventh_of_all() {
    let dataset = Dataset::builtin(2).expect("the built-in corpus opens");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut far = Vec::new();
    for ranks in [1, 2, 4] {
        for layout in ["layout.zero=1", "layout.zero=2", "layout.zero=3", "train.recompute=full"] {
            let text = include_str!("../../../../examples/tiny.toml");
            let config = RunConfig::load(text, &[layout.to_string()]).expect("the example is a config");
            let what = format!("{layout} on {ranks} ranks");
            let options = RunOptions::new(folder.path().join(&what), ranks, 1);
            let memory = train_on(&config, &options, &dataset, &Quiet).expect("the run succeeds").memory;
            far.extend(ranks_too_far(&what, &memory));
        }
    }
    assert!(far.is_empty(), "{far:#?}");
}
