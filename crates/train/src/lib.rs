//! Runs training: steps over ranks, the sharded optimizer, metrics, checkpoints, evaluation and generation.

pub mod baseline;
pub mod bench;
mod checkpointing;
pub mod config;
mod error;
mod feed;
mod generate;
mod gradients;
mod hashes;
mod memory;
mod norm;
mod optimizer;
pub mod overlap;
mod parameters;
mod probe;
mod rank;
mod record;
mod reduction;
mod run;
pub mod run_folder;
mod schedule;
mod shards;
pub mod system;
mod tensorboard;
mod trace;

pub use checkpointing::Extra;
pub use config::{ConfigError, RunConfig};
pub use error::TrainError;
pub use generate::{GenerateOptions, checkpoint_config, evaluate, generate};
pub use hashes::StepHashes;
pub use memory::{check_fits, dense_roots, estimate, estimate_all};
pub use probe::probe;
pub use rank::{Fault, Progress, RankState, max_over_mean};
pub use record::{Event, MemoryRecord, Observer, Started, StepRecord, Summary, ValidationRecord};
pub use run::{RunOptions, fingerprint, open_dataset, read_extra, train, train_on};
