//! Why a run ended early.

use std::path::PathBuf;

/// What ends a run early.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The config cannot be run.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// The layout cannot be.
    #[error(transparent)]
    Mesh(#[from] unisono_mesh::MeshError),
    /// The data cannot be used.
    #[error(transparent)]
    Data(#[from] unisono_data::DataError),
    /// A collective failed.
    #[error(transparent)]
    Comm(#[from] unisono_comm::CommError),
    /// A rank failed.
    #[error(transparent)]
    Ranks(#[from] unisono_comm::RunError),
    /// A checkpoint cannot be used or written.
    #[error(transparent)]
    Checkpoint(#[from] unisono_checkpoint::Error),
    /// A file of the run folder.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The estimate says that the run does not fit.
    #[error("the run needs {needed} of memory, {available} are free: {remedy}")]
    Memory {
        /// Estimated, readable.
        needed: String,
        /// Free, readable.
        available: String,
        /// What would help.
        remedy: String,
    },
    /// The run folder of a rank is another one than rank 0's.
    #[error(
        "rank {rank} ({host}) does not see the run folder {folder}: put it on storage that all hosts share"
    )]
    NotShared {
        /// The rank.
        rank: usize,
        /// Its host.
        host: String,
        /// The folder.
        folder: PathBuf,
    },
    /// Pretended nodes that do not hold the ranks.
    #[error(
        "nodes of {nodes:?} ranks do not make {ranks} ranks: the sizes must be at least 1 and add up to the ranks"
    )]
    Nodes {
        /// Ranks of each node.
        nodes: Vec<usize>,
        /// Ranks of the run.
        ranks: usize,
    },
    /// A non-finite loss or gradient norm under `on_non_finite = "halt"`.
    #[error(
        "halted at step {step}: loss {loss}, gradient norm {norm}; no rank updated its parameters. The batch is that of \
         step {step} and seed {seed}; resume with train.on_non_finite=skip to pass over it, or with a lower learning rate"
    )]
    NonFinite {
        /// The step.
        step: u64,
        /// Its loss.
        loss: f64,
        /// Its gradient norm.
        norm: f64,
        /// The run's seed.
        seed: u64,
    },
    /// A checkpoint failed on another rank.
    #[error("rank {rank}: {said}")]
    Peer {
        /// The rank.
        rank: usize,
        /// Its error.
        said: String,
    },
    /// Checkpoints failed too often.
    #[error("{failures} checkpoints in a row could not be written; the last said: {last}")]
    Storage {
        /// How many.
        failures: u32,
        /// The last failure.
        last: String,
    },
    /// What was asked for does not go with the run's folder, data or ranks; the text says why and what would.
    #[error("{0}")]
    Refused(String),
}

impl TrainError {
    /// Maps an I/O error.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}
