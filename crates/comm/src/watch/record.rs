//! The flight record of one rank: a small JSON file, whole or absent.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::sync::atomic::Ordering::Relaxed;

use serde::{Deserialize, Serialize};

use super::pace::Activity;
use crate::communicator::Communicator;
use crate::error::CallSite;
use crate::flight::{FlightEntry, wall_clock_us};

/// The version of the file's format.
const FORMAT: u32 = 1;
/// A larger file is no flight record: 256 calls and a few groups take less, also with thousands of ranks.
pub const LARGEST_RECORD_BYTES: u64 = 4 << 20;
/// A run has fewer ranks.
pub const MOST_RANKS: usize = 1 << 20;
/// A folder with more records, whoever wrote them, is not read to its end.
const MOST_RECORDS: usize = 1 << 16;

/// Which start of which run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Names the run.
    pub run_id: String,
    /// Counts its starts.
    pub epoch: u64,
}

/// Why a rank wrote its record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Reason {
    /// A watchdog found that ranks wait for too long.
    Stalled,
    /// The process was told to stop.
    Terminated,
    /// The process ended without a word: another one has written what it knew a little before.
    Killed,
    /// The run failed.
    Failed {
        /// The rank that caused it.
        rank: usize,
        /// What happened.
        message: String,
        /// The step that rank was in, as far as is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        step: Option<u64>,
        /// The last call that rank started, as far as is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        call: Option<CallSite>,
    },
}

/// A group as one of its members knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupRecord {
    /// The world ranks.
    pub members: Vec<usize>,
    /// One more than the number of the last collective call that the rank has started on it.
    pub started: u64,
}

/// What one rank knows: where it is and what it called last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlightRecord {
    /// Version of this format.
    pub format: u32,
    /// The start of the run it belongs to.
    pub run: Identity,
    /// The world rank.
    pub rank: usize,
    /// How many ranks the run has.
    pub ranks: usize,
    /// The step the rank is in.
    pub step: u64,
    /// What it is doing.
    pub activity: Activity,
    /// Why it wrote this.
    pub reason: Reason,
    /// When, in microseconds since 1970.
    pub written_us: u64,
    /// The groups it is a member of, by name.
    pub groups: BTreeMap<String, GroupRecord>,
    /// Its last calls, oldest first.
    pub calls: Vec<FlightEntry>,
}

/// Why a file is no flight record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It cannot be read or written.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It does not hold what it should.
    #[error("{path} is damaged: {reason}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

impl RecordError {
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }
}

/// A file that could not be used, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Damaged {
    /// The rank by its name.
    pub rank: usize,
    /// What is wrong.
    pub problem: String,
}

/// What a folder of flight records holds.
#[derive(Debug, Default)]
pub struct Records {
    /// By rank.
    pub records: Vec<FlightRecord>,
    /// By rank.
    pub damaged: Vec<Damaged>,
}

impl Communicator {
    /// This rank's flight record as it is now, `calls` taken from its recorder.
    pub fn flight_record(&self, run: &Identity, reason: Reason) -> FlightRecord {
        let core = self.core();
        let record = |group: std::sync::Arc<crate::communicator::Group>| {
            let known = GroupRecord { members: group.members.to_vec(), started: group.started.load(Relaxed) };
            (group.name.to_string(), known)
        };
        // Calls first: a group then never seems to be behind its calls.
        let calls = core.transport.recorder().entries();
        FlightRecord {
            format: FORMAT,
            run: run.clone(),
            rank: core.transport.rank(),
            ranks: core.transport.size(),
            step: self.step(),
            activity: core.pace.lock().unwrap_or_else(PoisonError::into_inner).activity(),
            reason,
            written_us: wall_clock_us(),
            groups: core.groups().into_iter().map(record).collect(),
            calls,
        }
    }
}

impl FlightRecord {
    /// Writes the record into `folder` as `rank-N.json`, in place of a former one, so that after a crash the old or the
    /// new one is there.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), RecordError> {
        let path = folder.join(format!("rank-{}.json", self.rank));
        // The process may write its ranks' records from several threads.
        let partial = folder.join(format!("rank-{}.{:?}.partial", self.rank, std::thread::current().id()));
        let text = serde_json::to_vec(self)
            .map_err(|error| RecordError::Damaged { path: path.clone(), reason: error.to_string() })?;
        let write = || {
            fs::create_dir_all(folder)?;
            let mut file = File::create(&partial)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&partial, &path)?;
            File::open(folder)?.sync_all()
        };
        write().map_err(|error| {
            // What is there of it is no record; if it cannot be removed either, nobody reads it.
            let _ = fs::remove_file(&partial);
            RecordError::io("write", &path)(error)
        })
    }

    /// The same as if it were written now.
    #[must_use]
    pub fn written_now(mut self) -> Self {
        self.written_us = wall_clock_us();
        self
    }

    /// Reads the record of `rank` from `path`.
    ///
    /// # Errors
    /// If the file cannot be read, is too large, or is not the flight record of this rank.
    pub fn read(path: &Path, rank: usize) -> Result<Self, RecordError> {
        let damaged = |reason: String| RecordError::Damaged { path: path.to_path_buf(), reason };
        let mut text = Vec::new();
        let file = File::open(path).map_err(RecordError::io("read", path))?;
        let limit = LARGEST_RECORD_BYTES;
        file.take(limit + 1).read_to_end(&mut text).map_err(RecordError::io("read", path))?;
        if text.len() as u64 > limit {
            return Err(damaged(format!("it has more than {limit} bytes")));
        }
        let record: Self = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        record.check(rank).map_err(damaged)?;
        Ok(record)
    }

    fn check(&self, rank: usize) -> Result<(), String> {
        if self.format != FORMAT {
            return Err(format!("it has format {}, this version reads {FORMAT}", self.format));
        }
        if self.rank != rank {
            return Err(format!("it is the record of rank {}", self.rank));
        }
        if self.ranks > MOST_RANKS || rank >= self.ranks {
            return Err(format!("rank {rank} of {} ranks cannot be", self.ranks));
        }
        for (name, group) in &self.groups {
            if let Some(member) = group.members.iter().find(|member| **member >= self.ranks) {
                return Err(format!("group '{name}' has rank {member} of {} ranks", self.ranks));
            }
        }
        for entry in &self.calls {
            let call = &entry.call;
            let known = self.groups.contains_key(&*call.group);
            let ends = entry.message.is_none_or(|message| message.from.max(message.to) < self.ranks);
            if !known || !ends {
                return Err(format!("{call} is on no group or between no ranks of the run"));
            }
        }
        Ok(())
    }
}

/// The rank whose record a file of this name is.
fn rank_of(name: &str) -> Option<usize> {
    name.strip_prefix("rank-")?.strip_suffix(".json")?.parse().ok()
}

/// Reads all flight records in `folder`. None is no error, and a damaged one does not keep others from being read.
///
/// # Errors
/// If the folder cannot be read.
pub fn read_records(folder: &Path) -> Result<Records, RecordError> {
    let mut found = Records::default();
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(found),
        entries => entries.map_err(RecordError::io("read", folder))?,
    };
    let mut files = BTreeMap::new();
    for entry in entries.take(2 * MOST_RECORDS) {
        let entry = entry.map_err(RecordError::io("read", folder))?;
        if let Some(rank) = entry.file_name().to_str().and_then(rank_of) {
            files.insert(rank, entry.path());
        }
    }
    for (rank, path) in files.into_iter().take(MOST_RECORDS) {
        match FlightRecord::read(&path, rank) {
            Ok(record) => found.records.push(record),
            Err(error) => found.damaged.push(Damaged { rank, problem: error.to_string() }),
        }
    }
    Ok(found)
}
