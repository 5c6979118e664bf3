//! What can go wrong with data, and where.

use std::io;
use std::path::{Path, PathBuf};

/// The result of everything that reads or writes data.
pub type Result<T, E = DataError> = std::result::Result<T, E>;

/// An error of this crate. Each names the file or value, the place in it, and what would be right.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The operating system refused to read or write.
    #[error("cannot {action} {path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was attempted, as a verb ("read", "create").
        action: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// A `tokenizer.json` cannot be used.
    #[error("tokenizer {name} cannot be used: {problem}")]
    Tokenizer {
        /// The file, or "built-in".
        name: String,
        /// What is wrong with it and what would be right.
        problem: String,
    },
    /// A tokenizer cannot encode or decode something.
    #[error("tokenizer {name} cannot {action}: {problem}")]
    Coding {
        /// The file, or "built-in".
        name: String,
        /// "encode" or "decode".
        action: &'static str,
        /// Why.
        problem: String,
    },
    /// A text or JSON lines file is malformed.
    #[error("{path}:{line}: {problem}", path = path.display())]
    Input {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What is wrong there and what would be right.
        problem: String,
    },
    /// A token shard is damaged or is not one.
    #[error("token shard {path}: section {section}, byte {offset} of the file: {problem}", path = path.display())]
    Shard {
        /// The file.
        path: PathBuf,
        /// "header", "tokens", "documents" or "checksums".
        section: &'static str,
        /// Where in the file, in bytes from its start.
        offset: u64,
        /// What is wrong there.
        problem: String,
    },
    /// A `dataset.json` is damaged, or does not fit the files it names.
    #[error("dataset manifest {path}: {problem}", path = path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A part is left without a document.
    #[error("the {part} part would have no document: {remedy}")]
    EmptyPart {
        /// "train" or "validation".
        part: &'static str,
        /// What would help.
        remedy: &'static str,
    },
    /// The caller asks for something that does not exist or makes no sense.
    #[error("{0}")]
    Request(String),
}

impl DataError {
    /// Whether a file's contents are at fault (rather than the storage or the request).
    pub fn is_bad_input(&self) -> bool {
        !self.is_storage() && !matches!(self, Self::Request(_) | Self::EmptyPart { .. })
    }

    /// Whether the operating system refused to read or write.
    pub fn is_storage(&self) -> bool {
        matches!(self, Self::Io { .. })
    }

    /// A function that makes an [`DataError::Io`] for `path`, for `map_err`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, action, source }
    }
}
