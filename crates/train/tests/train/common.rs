//! What the tests share: grids, data, and a model of a few thousand parameters with runs of it.

use std::path::Path;
use std::sync::OnceLock;

use serde_json::Value;
use unisono_data::{Dataset, Tokenizer, corpus};
use unisono_mesh::Grid;
use unisono_plan::ModelConfig;
use unisono_train::{
    Event, Observer, RunConfig, RunOptions, StepHashes, StepRecord, Summary, TrainError, run_folder, train_on,
};

/// A test of every grid that the numerics contract names: `$check` gets replicas, slots of an expert group and experts.
macro_rules! every_grid {
    ($check:ident) => {
        #[test]
        fn eight_replicas_in_groups_of_one() {
            $check(8, 1, 8);
        }

        #[test]
        fn eight_replicas_in_groups_of_two() {
            $check(8, 2, 8);
        }

        #[test]
        fn eight_replicas_in_groups_of_four() {
            $check(8, 4, 8);
        }

        #[test]
        fn eight_replicas_in_one_group() {
            $check(8, 8, 8);
        }

        #[test]
        fn six_replicas_in_groups_of_three() {
            $check(6, 3, 12);
        }

        #[test]
        fn six_replicas_in_one_group() {
            $check(6, 6, 12);
        }
    };
}
pub(crate) use every_grid;

pub fn dataset() -> &'static Dataset {
    static DATASET: OnceLock<Dataset> = OnceLock::new();
    DATASET.get_or_init(|| Dataset::builtin(2).expect("the built-in corpus opens"))
}

/// A play in single bytes, which leaves most of a step to the layers: with the built-in tokenizer nearly all of it is the
/// embedding and the head of a model as small as these.
pub fn bytes() -> &'static Dataset {
    static DATASET: OnceLock<Dataset> = OnceLock::new();
    DATASET.get_or_init(|| {
        let mut json: Value =
            serde_json::from_slice(Tokenizer::builtin().expect("it opens").json()).expect("JSON");
        json["model"]["merges"] = Value::Array(Vec::new());
        let tokens = json["model"]["vocab"].as_object_mut().expect("a map");
        tokens.retain(|_, id| id.as_u64() < Some(BYTES as u64));
        let tokenizer =
            Tokenizer::from_bytes("bytes", json.to_string().as_bytes(), None).expect("a tokenizer");
        let play = corpus::works().expect("the corpus").swap_remove(0);
        Dataset::of_texts(tokenizer, [play.text], 2).expect("a dataset")
    })
}

/// Tokens of [`bytes`], the end of a text among them.
pub const BYTES: usize = 257;

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
    (config.evaluation.every, config.sample.tokens) = (0, 0);
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
