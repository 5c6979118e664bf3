//! What sharded states save, and that the estimate knows it.

use std::path::Path;

use unisono_data::Dataset;
use unisono_mesh::Grid;
use unisono_plan::ModelConfig;
use unisono_train::config::{ReduceEvery, TrainConfig};
use unisono_train::{MemoryRecord, RunConfig, RunOptions, train_on};

use crate::common::Quiet;

fn config(zero: usize) -> RunConfig {
    let mut config = RunConfig {
        grid: Grid { replicas: 4, expert_group: 2, ..Grid::default() },
        model: ModelConfig {
            hidden_size: 128,
            num_hidden_layers: 4,
            intermediate_size: 384,
            moe_intermediate_size: 128,
            num_experts: 8,
            force_balance: true,
            ..ModelConfig::default()
        },
        train: TrainConfig {
            steps: 2,
            sequence_length: 128,
            micro_batch: 1,
            reduce_every: ReduceEvery::Microbatch,
            ..TrainConfig::default()
        },
        ..RunConfig::default()
    };
    config.layout.zero = zero;
    (config.evaluation.every, config.schedule.warmup_steps) = (0, 1);
    config
}

fn measured(config: &RunConfig, ranks: usize, dataset: &Dataset, folder: &Path) -> Vec<MemoryRecord> {
    let name = format!("{}-{}-{ranks}", config.layout.zero, config.train.accumulate);
    let options = RunOptions::new(folder.join(name), ranks, 1);
    train_on(config, &options, dataset, &Quiet).expect("the run succeeds").memory
}

fn dataset() -> Dataset {
    Dataset::random(1, 1 << 16, 4096).expect("random tokens")
}

#[test]
fn zero_three_over_four_ranks_holds_a_quarter_of_the_states() {
    let (folder, dataset) = (tempfile::tempdir().expect("a temporary folder"), dataset());
    let alone = measured(&config(3), 1, &dataset, folder.path())[0].states;
    for (rank, record) in measured(&config(3), 4, &dataset, folder.path()).iter().enumerate() {
        let share = record.states as f64 / alone as f64;
        assert!(share <= 0.3, "rank {rank} of 4 holds {share:.3} of what one rank holds");
    }
    // Whole parameters are a quarter of the states: what ZeRO-2 cannot share out.
    let whole = measured(&config(2), 4, &dataset, folder.path())[0].states as f64 / alone as f64;
    assert!((0.3..0.5).contains(&whole), "ZeRO-2 holds {whole:.3}");
}

#[test]
fn the_estimate_is_within_fifteen_percent_of_what_is_measured() {
    let (folder, dataset) = (tempfile::tempdir().expect("a temporary folder"), dataset());
    for (zero, accumulate) in [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)] {
        let mut config = config(zero);
        config.train.accumulate = accumulate;
        for ranks in [1, 2, 4] {
            for (rank, record) in measured(&config, ranks, &dataset, folder.path()).iter().enumerate() {
                let off = record.estimated as f64 / record.measured as f64 - 1.0;
                assert!(
                    off.abs() <= 0.15,
                    "ZeRO-{zero} x {accumulate} on {ranks} ranks: rank {rank} {record:?}, {off:+.2}"
                );
            }
        }
    }
}
