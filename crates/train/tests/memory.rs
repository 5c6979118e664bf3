//! The memory estimated before the first step against what the steps then hold. With balanced
//! routing on every rank; with a new router's, which is uneven at first, on the fullest.

use unisono_data::Dataset;
use unisono_mesh::Grid;
use unisono_plan::ModelConfig;
use unisono_train::config::{DispatchConfig, EvaluationConfig, RecomputeConfig, TrainConfig};
use unisono_train::{Event, Observer, RunConfig, RunOptions, train_on};

/// How far the estimate may be from what is measured.
const TOLERANCE: f64 = 0.15;

struct Quiet;

impl Observer for Quiet {
    fn event(&self, _: Event) {}
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
        train: TrainConfig { steps: 2, micro_batch: 1, recompute, ..TrainConfig::default() },
        evaluation: EvaluationConfig { every: 0, ..EvaluationConfig::default() },
        ..RunConfig::default()
    };
    config.sample.tokens = 0;
    config.schedule.warmup_steps = 1;
    config
}

#[test]
fn the_estimate_is_within_a_sixth_of_what_is_measured() {
    let dataset = Dataset::builtin(2).expect("the built-in corpus opens");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let cases: [(usize, usize, usize, RecomputeConfig, &[&[usize]]); 4] = [
        (8, 8, 16, RecomputeConfig::Selective, &[&[1], &[2], &[8], &[4, 4], &[2, 6], &[1, 1]]),
        (8, 2, 16, RecomputeConfig::None, &[&[1], &[2], &[4]]),
        (6, 3, 12, RecomputeConfig::Full, &[&[1], &[3], &[1, 2]]),
        (4, 1, 0, RecomputeConfig::Selective, &[&[1], &[4]]),
    ];
    let mut far = Vec::new();
    for (replicas, expert_group, experts, recompute, all_nodes) in cases {
        for &nodes in all_nodes {
            let mut config = config(replicas, expert_group, experts, recompute);
            if nodes.len() > 1 {
                config.layout.dispatch = DispatchConfig::Hierarchical;
            }
            let ranks = nodes.iter().sum();
            let what = format!(
                "{replicas} replicas in groups of {expert_group} on nodes of {nodes:?}, {recompute:?}"
            );
            let mut options = RunOptions::new(folder.path().join(&what), ranks, 1);
            options.nodes = nodes.to_vec();
            let summary = train_on(&config, &options, &dataset, &Quiet).expect("the run succeeds");
            assert_eq!(summary.memory.len(), ranks, "{what}");
            for (rank, record) in summary.memory.iter().enumerate() {
                let off = record.estimated as f64 / record.measured as f64 - 1.0;
                if off.abs() > TOLERANCE {
                    far.push(format!(
                        "{what}: rank {rank} estimated {}, measured {}: {:+.0}%",
                        record.estimated,
                        record.measured,
                        100.0 * off
                    ));
                }
            }
        }
    }
    assert!(far.is_empty(), "{}", far.join("\n"));
}

#[test]
fn the_estimate_allows_for_the_uneven_routing_of_the_first_steps() {
    let dataset = Dataset::builtin(2).expect("the built-in corpus opens");
    let folder = tempfile::tempdir().expect("a temporary folder");
    for ranks in [2, 4] {
        let mut config = config(4, 4, 16, RecomputeConfig::Selective);
        config.model.force_balance = false;
        config.train.steps = 40;
        let options = RunOptions::new(folder.path().join(ranks.to_string()), ranks, 1);
        let summary = train_on(&config, &options, &dataset, &Quiet).expect("the run succeeds");
        let fullest = summary.memory.iter().max_by_key(|record| record.measured).expect("a rank");
        let off = fullest.estimated as f64 / fullest.measured as f64 - 1.0;
        assert!(off.abs() <= TOLERANCE, "{ranks} ranks: {fullest:?}, {:+.0}%", 100.0 * off);
    }
}
