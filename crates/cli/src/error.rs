//! Errors as exit codes.

use std::fmt;
use std::io::ErrorKind;
use std::path::Path;

use unisono_checkpoint::Error as CheckpointError;
use unisono_data::DataError;
use unisono_train::TrainError;

/// Everything went as asked.
pub const DONE: u8 = 0;
/// `unisono diff` or `unisono verify` found a difference, `unisono doctor` a run that has not ended well.
pub const DIFFERENT: u8 = 1;
/// The arguments or the config cannot be used.
pub const USAGE: u8 = 2;
/// An input file is missing or damaged.
pub const BAD_INPUT: u8 = 3;
/// A non-finite loss or gradient norm ended the run.
pub const HALTED: u8 = 17;
/// Stopped by SIGTERM after a checkpoint: start again with `--resume`.
pub const REQUEUE: u8 = 20;
/// The storage failed.
pub const STORAGE: u8 = 21;
/// A defect of this program.
pub const BUG: u8 = 70;

/// Why a command did not do what it was asked, and the exit code that says so.
#[derive(Debug)]
pub struct CliError {
    /// The exit code.
    pub code: u8,
    /// What is wrong, where, and what would help.
    pub message: String,
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl CliError {
    /// The arguments or the config cannot be used.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { code: USAGE, message: message.into() }
    }

    /// An input cannot be read.
    pub fn bad_input(message: impl Into<String>) -> Self {
        Self { code: BAD_INPUT, message: message.into() }
    }

    /// A folder that is not that of a run.
    pub fn no_run(folder: &Path) -> Self {
        Self::usage(format!(
            "{} is not the folder of a run: name one that `unisono train` wrote, by default in runs/",
            folder.display()
        ))
    }
}

/// Refuses what is no file before anything is done; `what` names it, `remedy` says what would be right.
///
/// # Errors
/// If there is none, or it is a folder.
pub fn check_file(what: &str, path: &Path, remedy: &str) -> Result<(), CliError> {
    let problem = match path.metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => "there is no such file",
        Ok(found) if found.is_dir() => "it is a folder",
        _ => return Ok(()),
    };
    Err(CliError::bad_input(format!("{what} {}: {problem}; {remedy}", path.display())))
}

/// What helps where the system refuses a path, to be put behind its answer.
pub fn remedy(error: &std::io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::NotFound => "; check the path",
        ErrorKind::IsADirectory => "; name a file, not a folder",
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => {
            "; a file stands where a folder should: name another one"
        }
        ErrorKind::PermissionDenied => "; change who may, or name another place",
        ErrorKind::ReadOnlyFilesystem => "; name a place that can be written",
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "; make room on the disk",
        ErrorKind::InvalidData => "; name a text file in UTF-8",
        _ => "",
    }
}

/// What is missing, or is not a file, is a bad input; otherwise the storage failed.
fn io_code(error: &std::io::Error) -> u8 {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::IsADirectory | ErrorKind::NotADirectory | ErrorKind::InvalidData => {
            BAD_INPUT
        }
        _ => STORAGE,
    }
}

impl From<TrainError> for CliError {
    fn from(error: TrainError) -> Self {
        let mut message = error.to_string();
        if let TrainError::Io { source, .. } = &error {
            message.push_str(remedy(source));
        }
        let code = match error {
            TrainError::Data(inner) => return inner.into(),
            TrainError::Checkpoint(inner) => return inner.into(),
            TrainError::Config(_)
            | TrainError::Mesh(_)
            | TrainError::Memory { .. }
            | TrainError::Nodes { .. }
            | TrainError::NotShared { .. }
            | TrainError::Refused(_) => USAGE,
            TrainError::Io { action: "read" | "open", source, .. } => io_code(&source),
            TrainError::Io { .. } => STORAGE,
            TrainError::Storage { .. } | TrainError::Peer { .. } => STORAGE,
            TrainError::NonFinite { .. } => HALTED,
            TrainError::Comm(_) | TrainError::Ranks(_) => BUG,
        };
        Self { code, message }
    }
}

impl From<DataError> for CliError {
    fn from(error: DataError) -> Self {
        let mut message = error.to_string();
        let code = match &error {
            DataError::Io { path, source, action } => {
                let is_absent = matches!(source.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory);
                message.push_str(match is_absent && path.ends_with(unisono_data::MANIFEST_FILE) {
                    true => "; `unisono data prepare INPUT --out DIR` makes a dataset",
                    false => remedy(source),
                });
                if matches!(*action, "read" | "open") { io_code(source) } else { STORAGE }
            }
            bad if bad.is_bad_input() => BAD_INPUT,
            _ => USAGE,
        };
        Self { code, message }
    }
}

impl From<CheckpointError> for CliError {
    fn from(error: CheckpointError) -> Self {
        let code = match &error {
            CheckpointError::NoSuchStep { dir, step } => {
                return Self::usage(format!(
                    "there is no checkpoint of step {step} in {}: `unisono checkpoint ls RUN` lists those there are",
                    dir.display()
                ));
            }
            CheckpointError::Refused { .. } => BUG,
            storage if storage.is_storage() || storage.is_stale() => STORAGE,
            _ => BAD_INPUT,
        };
        Self { code, message: error.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_the_documented_exit_codes() {
        let missing = || std::io::Error::from(ErrorKind::NotFound);
        let full = || std::io::Error::from(ErrorKind::StorageFull);
        let io = |action, source| TrainError::Io { action, path: "x".into(), source };
        let non_finite = TrainError::NonFinite { step: 3, loss: f64::NAN, norm: 1.0, seed: 42 };
        let data = DataError::Input { path: "x".into(), line: 1, problem: "bad".into() };
        let storage = CheckpointError::Storage { action: "write", path: "x".into(), source: full() };
        let cases: [(TrainError, u8); 8] = [
            (TrainError::Refused("no".into()), USAGE),
            (io("read", missing()), BAD_INPUT),
            (io("make", missing()), STORAGE),
            (io("write", full()), STORAGE),
            (non_finite, HALTED),
            (data.into(), BAD_INPUT),
            (DataError::Request("no".into()).into(), USAGE),
            (storage.into(), STORAGE),
        ];
        for (error, code) in cases {
            let shown = error.to_string();
            let error = CliError::from(error);
            assert!(error.code == code && error.message.starts_with(&shown), "{error}");
        }
    }
}
