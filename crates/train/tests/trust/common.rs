//! A model of a few thousand parameters, and runs of it.

use std::path::Path;
use std::sync::OnceLock;

use unisono_data::Dataset;
use unisono_mesh::Grid;
use unisono_plan::ModelConfig;
use unisono_train::{
    Event, Observer, RunConfig, RunOptions, StepHashes, StepRecord, Summary, TrainError, run_folder, train_on,
};

pub fn dataset() -> &'static Dataset {
    static DATASET: OnceLock<Dataset> = OnceLock::new();
    DATASET.get_or_init(|| Dataset::builtin(2).expect("the built-in corpus opens"))
}

pub struct Quiet;

impl Observer for Quiet {
    fn event(&self, _: Event) {}
}

/// Four replicas that dispatch together; six steps.
pub fn config() -> RunConfig {
    let mut config = RunConfig {
        grid: Grid { replicas: 4, expert_group: 4, ..Grid::default() },
        model: ModelConfig {
            hidden_size: 16,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 8,
            intermediate_size: 16,
            moe_intermediate_size: 16,
            num_experts: 4,
            ..ModelConfig::default()
        },
        ..RunConfig::default()
    };
    config.train.steps = 6;
    config.train.sequence_length = 16;
    config.train.micro_batch = 1;
    config.schedule.warmup_steps = 2;
    config.evaluation.every = 0;
    config.log.hashes_every = 1;
    config
}

/// What a run wrote.
pub struct Ran {
    pub summary: Summary,
    pub steps: Vec<StepRecord>,
    pub hashes: Vec<StepHashes>,
}

impl Ran {
    /// What may not depend on the layout, of every step.
    pub fn numbers(&self) -> Vec<Vec<(&'static str, String)>> {
        self.steps.iter().map(StepRecord::numbers).collect()
    }
}

pub fn try_run(config: &RunConfig, options: &RunOptions) -> Result<Ran, TrainError> {
    let summary = train_on(config, options, dataset(), &Quiet)?;
    let folder = &options.folder;
    Ok(Ran { summary, steps: run_folder::read_steps(folder)?, hashes: run_folder::read_hashes(folder)? })
}

/// Runs `config` on `ranks` ranks in a folder of this name.
pub fn run(config: &RunConfig, folder: &Path, ranks: usize) -> Ran {
    try_run(config, &RunOptions::new(folder, ranks, 1)).expect("the run succeeds")
}
