//! Runs training: steps over ranks, the sharded optimizer, metrics, checkpoints, evaluation and generation.

pub mod config;
mod gradients;
mod norm;
mod optimizer;
mod schedule;
mod shards;

pub use config::{ConfigError, RunConfig};
