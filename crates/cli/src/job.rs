//! This process as one of a job's: who it is, and how they end together.

use unisono_comm::Place;
use unisono_comm::mpi::launched;

use crate::error::CliError;
use crate::layout::{ranks_and_threads, threads_each};

/// This process's part of a job.
pub struct Job {
    /// Where the ranks are.
    pub place: Place,
}

impl Job {
    /// Joins the job that a launcher started this process for; without a launcher the process is a job of its own.
    ///
    /// # Errors
    /// If this binary cannot be one of several, or MPI cannot be used.
    pub fn join() -> Result<Self, CliError> {
        let Some(launched) = launched() else { return Ok(Self { place: Place::Threads }) };
        join(launched.by, launched.size)
    }

    /// Whether this process speaks for the job.
    pub fn leads(&self) -> bool {
        self.place.leads()
    }

    /// Ranks and compute threads of each, where the launcher and the arguments leave them open; neither changes a number.
    ///
    /// # Errors
    /// If the arguments ask for other ranks than the launcher has started.
    pub fn ranks_and_threads(
        &self,
        slots: usize,
        ranks: Option<usize>,
        threads: Option<usize>,
        nodes: &[usize],
    ) -> Result<(usize, usize), CliError> {
        if let Some(started) = self.ranks()
            && (!nodes.is_empty() || ranks.is_some_and(|asked| asked != started))
        {
            return Err(CliError::usage(format!(
                "--ranks and --nodes are for ranks as threads: here the launcher has started {started} ranks, and MPI \
                 says where"
            )));
        }
        let (ranks, each) = ranks_and_threads(slots, self.ranks().or(ranks), threads);
        Ok((ranks, if threads.is_none() { threads_each(self.place.ranks_here(ranks)) } else { each }))
    }

    /// How many ranks the launcher has started; none if that is up to this process.
    pub fn ranks(&self) -> Option<usize> {
        match &self.place {
            Place::Threads => None,
            #[cfg(feature = "mpi")]
            Place::Mpi(ranks) => Some(ranks.size()),
        }
    }

    /// What rank 0 says, on all ranks.
    ///
    /// # Errors
    /// If the job has failed.
    pub fn told_by_first(&self, text: String) -> Result<String, CliError> {
        match &self.place {
            Place::Threads => Ok(text),
            #[cfg(feature = "mpi")]
            Place::Mpi(ranks) => {
                let all = ranks.world().all_gather_values(text.as_bytes());
                let all = all.map_err(unisono_train::TrainError::from)?;
                Ok(String::from_utf8_lossy(&all[0]).into_owned())
            }
        }
    }

    /// Ends this process's part. If the job has failed, the rank at fault says why and ends the job; the others are
    /// silent, unless it cannot.
    ///
    /// # Errors
    /// What it was given, in a job of one process.
    pub fn end(self, outcome: Result<u8, CliError>) -> Result<u8, CliError> {
        match self.place {
            Place::Threads => outcome,
            #[cfg(feature = "mpi")]
            Place::Mpi(ranks) => end(&ranks, outcome),
        }
    }
}

#[cfg(not(feature = "mpi"))]
fn join(by: &str, size: Option<usize>) -> Result<Job, CliError> {
    if size == Some(1) {
        return Ok(Job { place: Place::Threads });
    }
    let size = size.map_or_else(|| "several".into(), |size| size.to_string());
    Err(CliError::usage(format!(
        "{by} has started {size} processes, but this binary knows ranks as threads only: build it with `cargo build \
         --release --features mpi`, or start it without {by}"
    )))
}

#[cfg(feature = "mpi")]
fn join(by: &str, size: Option<usize>) -> Result<Job, CliError> {
    use unisono_comm::mpi::{MpiOptions, MpiRanks};
    let ranks = MpiRanks::join(MpiOptions::default()).map_err(|error| CliError::usage(error.to_string()))?;
    if let Some(size) = size.filter(|size| *size != ranks.size()) {
        return Err(CliError::usage(format!(
            "{by} has started {size} processes, but {} knows of {}: use the launcher of the MPI library that this \
             binary was built with",
            ranks.library(),
            ranks.size()
        )));
    }
    Ok(Job { place: Place::Mpi(std::sync::Arc::new(ranks)) })
}

#[cfg(feature = "mpi")]
fn end(ranks: &unisono_comm::mpi::MpiRanks, outcome: Result<u8, CliError>) -> Result<u8, CliError> {
    use std::time::Duration;
    let error = match outcome {
        Ok(code) => match ranks.leave() {
            Ok(()) => return Ok(code),
            Err(error) => unisono_train::TrainError::from(error).into(),
        },
        Err(error) => error,
    };
    let failure = ranks.fail(error.message.clone());
    if failure.cause == unisono_comm::Cause::Died {
        if ranks.is_witness() {
            crate::screen::complain("error", &error.message);
        }
        // The launcher is ending the job already, host by host, and waits for processes that still run. It answers nothing
        // meanwhile: not what MPI asks at a usual exit.
        std::thread::sleep(crate::signals::LAST_WORDS);
        signal_hook::low_level::exit(i32::from(error.code));
    }
    // The rank at fault speaks at once; should it be stuck or dead, the first of the others does. By then the others have
    // written their flight records: the launcher kills whoever is left when a rank has ended.
    let turn = match ranks.rank() {
        rank if rank == failure.rank => 0,
        rank => 1 + rank as u64 - u64::from(rank > failure.rank),
    };
    let wait_ms = match turn {
        0 => 0,
        1 => 500,
        later => 1400 + 50 * later,
    };
    std::thread::sleep(Duration::from_millis(wait_ms));
    crate::screen::complain("error", &error.message);
    ranks.abort(i32::from(error.code));
    std::process::exit(i32::from(error.code))
}
