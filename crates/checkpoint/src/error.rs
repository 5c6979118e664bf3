//! What can go wrong with a checkpoint, and whose fault it is.

use std::io;
use std::path::{Path, PathBuf};

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a checkpoint could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file system refused: disk full, read-only, input/output error, missing permission.
    #[error("cannot {action} {}: {source}; free space or repair the storage, then save again", path.display())]
    Storage {
        /// What was being done, as a verb: "write", "sync", "rename".
        action: &'static str,
        /// The file or folder it was done to.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The manifest is missing, damaged, or describes something impossible.
    #[error("manifest {} is not usable: {reason}; use an earlier step", path.display())]
    Manifest {
        /// The manifest's path.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A shard file differs from what its manifest says. No byte of it was handed out.
    #[error("shard {} is corrupt at byte {offset}, in {part}: {reason}; use an earlier step", file.display())]
    Corrupt {
        /// The shard file's path.
        file: PathBuf,
        /// The tensor and element range that is hit, or the file's header.
        part: String,
        /// Offset in the file, in bytes, of the part that does not match.
        offset: u64,
        /// What was expected and what was found.
        reason: String,
    },
    /// There is no committed checkpoint of that step.
    #[error("no checkpoint of step {step} in {}; `list` names the steps there are", dir.display())]
    NoSuchStep {
        /// The folder that was searched.
        dir: PathBuf,
        /// The step that was asked for.
        step: u64,
    },
    /// The caller asked for a tensor or an element range that the checkpoint does not have.
    #[error("cannot read tensor {tensor} of {}: {reason}", path.display())]
    Request {
        /// The checkpoint's folder.
        path: PathBuf,
        /// The tensor that was asked for.
        tensor: String,
        /// What is wrong with the request.
        reason: String,
    },
    /// What the caller wants to save is not a consistent checkpoint; nothing was committed.
    #[error("checkpoint refused: {reason}")]
    Refused {
        /// What is inconsistent, and what would be right.
        reason: String,
    },
    /// A newer epoch of the run owns the folder: this process is a left-over and must stop.
    #[error("epoch {ours} may not write to {}: epoch {found} has been there; stop this process", dir.display())]
    StaleEpoch {
        /// The checkpoints' folder.
        dir: PathBuf,
        /// The epoch of the writer that was refused.
        ours: u64,
        /// The newest epoch found.
        found: u64,
    },
}

impl Error {
    /// The storage failed (disk full, read-only, input/output error): training may go on and try again
    /// later; committed checkpoints are intact.
    pub fn is_storage(&self) -> bool {
        matches!(self, Self::Storage { .. })
    }

    /// What is on disk is damaged: an earlier step may still be good.
    pub fn is_corrupt(&self) -> bool {
        matches!(self, Self::Manifest { .. } | Self::Corrupt { .. })
    }

    /// This process was superseded by a newer epoch of its run.
    pub fn is_stale(&self) -> bool {
        matches!(self, Self::StaleEpoch { .. })
    }

    /// Names an action and a path for an error of the operating system.
    pub(crate) fn storage(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Storage { action, path: path.to_path_buf(), source }
    }

    pub(crate) fn refused(reason: impl Into<String>) -> Self {
        Self::Refused { reason: reason.into() }
    }
}
