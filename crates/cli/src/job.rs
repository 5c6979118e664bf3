//! This process as one of a job's: who it is, and how they end together.

use std::cell::Cell;
use std::path::Path;
use std::time::Duration;
#[cfg(feature = "mpi")]
use std::time::Instant;

use unisono_comm::Place;
#[cfg(feature = "mpi")]
use unisono_comm::mpi::MpiRanks;
use unisono_comm::mpi::{Launched, launched};
use unisono_comm::watch::FlightDeck;
#[cfg(feature = "mpi")]
use unisono_comm::{Cause, Failure};
#[cfg(feature = "mpi")]
use unisono_train::system::host_name;

use crate::error::{CliError, USAGE};
use crate::layout::{ranks_and_threads, threads_each};
#[cfg(feature = "mpi")]
use crate::outlive::{Guard, outlive};
#[cfg(feature = "mpi")]
use crate::screen::complain;
use crate::signals::LAST_WORDS;
use crate::style::counted;
#[cfg(feature = "mpi")]
use crate::style::duration;

/// This process's part of a job.
pub struct Job {
    /// Where the ranks are.
    pub place: Place,
    /// How long ranks that have done their part wait for the others to leave; None for as long as it takes.
    patience: Cell<Option<Duration>>,
    /// What outlives this process.
    #[cfg(feature = "mpi")]
    guard: Cell<Option<Guard>>,
}

/// For what says nothing else.
const PATIENCE: Duration = Duration::from_secs(1800);

/// Refuses a command that would do the same in each process of a launcher.
///
/// # Errors
/// If there are several.
pub fn check_alone() -> Result<(), CliError> {
    let Some(Launched { size: Some(size @ 2..), by, rank }) = launched() else { return Ok(()) };
    if rank != 0 {
        // The first one says so; the launcher kills whoever is left when another one has ended.
        std::thread::sleep(LAST_WORDS);
        std::process::exit(i32::from(USAGE));
    }
    Err(CliError::usage(format!(
        "{by} has started {size} processes, and this command would run in each of them: start it without {by}"
    )))
}

impl Job {
    /// Joins the job that a launcher started this process for; without a launcher the process is a job of its own.
    ///
    /// # Errors
    /// If this binary cannot be one of several, or MPI cannot be used.
    pub fn join() -> Result<Self, CliError> {
        let place = match launched() {
            None => Place::Threads,
            Some(launched) => join(&launched)?,
        };
        let job = Self {
            place,
            patience: Cell::new(Some(PATIENCE)),
            #[cfg(feature = "mpi")]
            guard: Cell::new(None),
        };
        job.guard(None);
        Ok(job)
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
                "--ranks and --nodes are for ranks as threads: the launcher has started {}, and MPI says where; leave \
                 them out",
                counted(started as u64, "rank")
            )));
        }
        let (ranks, each) = ranks_and_threads(slots, self.ranks().or(ranks), threads);
        Ok((ranks, if threads.is_none() { threads_each(self.place.ranks_here(ranks)) } else { each }))
    }

    /// How long ranks that have done their part wait for the others; None for as long as it takes.
    pub fn wait_at_end(&self, patience: Option<Duration>) {
        self.patience.set(patience);
    }

    /// The run goes to `folder`, where others look for word of a death, and its ranks are on `deck`.
    pub fn runs_in(&self, folder: &Path, deck: &FlightDeck) {
        self.dismiss_guard();
        self.guard(Some((folder, deck.clone())));
    }

    /// A rank whose death nobody would notice, or could tell of, leaves a guard until the job ends.
    #[cfg_attr(not(feature = "mpi"), expect(unused_variables, reason = "ranks are threads"))]
    fn guard(&self, run: Option<(&Path, FlightDeck)>) {
        #[cfg(feature = "mpi")]
        if let Place::Mpi(ranks) = &self.place
            && ranks.size() > 1
        {
            self.guard.set(Guard::start(ranks.rank(), ranks.ranks_here() == 1, run));
        }
    }

    /// The run has ended, and what follows may be ended at any time.
    pub fn dismiss_guard(&self) {
        #[cfg(feature = "mpi")]
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
    }

    /// How many ranks the launcher has started; none if that is up to this process.
    pub fn ranks(&self) -> Option<usize> {
        match &self.place {
            Place::Threads => None,
            #[cfg(feature = "mpi")]
            Place::Mpi(ranks) => Some(ranks.size()),
        }
    }

    /// `[rank]` the host of every rank that the launcher has started; empty if there is no launcher.
    pub fn hosts(&self) -> Vec<usize> {
        match &self.place {
            Place::Threads => Vec::new(),
            #[cfg(feature = "mpi")]
            Place::Mpi(ranks) => {
                let world = ranks.world();
                (0..world.size()).map(|rank| world.node(rank)).collect()
            }
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
        self.dismiss_guard();
        match self.place {
            Place::Threads => outcome,
            #[cfg(feature = "mpi")]
            Place::Mpi(ranks) => end(&ranks, self.patience.get(), outcome),
        }
    }
}

#[cfg(not(feature = "mpi"))]
fn join(launched: &Launched) -> Result<Place, CliError> {
    let Launched { by, size, .. } = *launched;
    if size == Some(1) {
        return Ok(Place::Threads);
    }
    let size = size.map_or_else(|| "several".into(), |size| size.to_string());
    Err(CliError::usage(format!(
        "{by} has started {size} processes, but this binary knows ranks as threads only: build it with `cargo build \
         --release --features mpi`, or start it without {by}"
    )))
}

#[cfg(feature = "mpi")]
fn join(launched: &Launched) -> Result<Place, CliError> {
    use unisono_comm::mpi::MpiOptions;
    let Launched { by, size, rank } = *launched;
    let tell = move |waited: Duration| complain("warning", &long_start(rank, size, waited));
    let ranks = MpiRanks::join(MpiOptions::default(), tell);
    let ranks = ranks.map_err(|error| CliError::usage(error.to_string()))?;
    if let Some(size) = size.filter(|size| *size != ranks.size()) {
        return Err(CliError::usage(format!(
            "{by} has started {size} processes, but {} knows of {}: use the launcher of the MPI library that this \
             binary was built with",
            ranks.library(),
            ranks.size()
        )));
    }
    Ok(Place::Mpi(std::sync::Arc::new(ranks)))
}

/// What a rank says that waits in MPI's own start, where it knows nothing of others.
#[cfg(feature = "mpi")]
fn long_start(rank: usize, size: Option<usize>, waited: Duration) -> String {
    let of = size.map(|size| format!(" of {size}")).unwrap_or_default();
    format!(
        "rank {rank}{of} on {} has waited for {} in MPI's start, which waits for all ranks. Look at the ranks that do not say \
         this: one may be stopped (`ps` shows state T), still on its way, or no unisono. If all say it, their hosts do not reach \
         each other: look for a firewall, or name the network (Open MPI: `mpirun --mca btl_tcp_if_include NET`). Ctrl-C ends \
         the job",
        host_name(),
        duration(waited.as_secs_f64()),
    )
}

/// Says that a rank waits in MPI's own end, when all have done their part.
#[cfg(feature = "mpi")]
fn long_end(ranks: &MpiRanks) -> impl Fn(Duration) + Send + 'static {
    let (rank, size) = (ranks.rank(), ranks.size());
    move |waited| {
        let text = format!(
            "rank {rank} of {size} on {} has waited for {} in MPI's end, which waits for all ranks. The job is done and all of it \
             is written; look at the ranks that do not say this: one may be stopped (`ps` shows state T). Ctrl-C ends the job",
            host_name(),
            duration(waited.as_secs_f64()),
        );
        complain("warning", &text);
    }
}

#[cfg(feature = "mpi")]
fn end(ranks: &MpiRanks, patience: Option<Duration>, outcome: Result<u8, CliError>) -> Result<u8, CliError> {
    let error = match outcome {
        Ok(code) => match ranks.leave(patience, long_end(ranks)) {
            Ok(()) => return Ok(code),
            Err(error) => unisono_train::TrainError::from(error).into(),
        },
        Err(error) => error,
    };
    let failure = ranks.fail(error.message.clone());
    if failure.cause == Cause::Died {
        if ranks.found_dead().is_some() {
            complain("error", &error.message);
        }
        outlive(ranks.is_first_here_without(failure.rank), error.code);
    }
    if was_said_meanwhile(ranks, &failure) {
        quit(error.code);
    }
    // First: others would be done waiting for their turn before a slow terminal has shown it.
    ranks.says();
    complain("error", &error.message);
    ranks.abort(i32::from(error.code));
    std::process::exit(i32::from(error.code))
}

/// The launcher is ending the job already, host by host, and waits for processes that still run. It answers nothing
/// meanwhile: not what MPI asks at a usual exit.
#[cfg(feature = "mpi")]
fn quit(code: u8) -> ! {
    std::thread::sleep(LAST_WORDS);
    signal_hook::low_level::exit(i32::from(code));
}

/// Waits for this rank's turn to say why the job has failed, and tells whether another one has said it. The rank at fault
/// speaks at once; should it be stuck or dead, the first of the others does. By then the others have written their flight
/// records: the launcher kills whoever is left when a rank has ended.
#[cfg(feature = "mpi")]
fn was_said_meanwhile(ranks: &MpiRanks, failure: &Failure) -> bool {
    const LOOK: Duration = Duration::from_millis(10);
    let turn_ms = match ranks.rank() {
        rank if rank == failure.rank => 0,
        0 => 500,
        1 if failure.rank == 0 => 500,
        rank => 1400 + 50 * rank as u64,
    };
    let end = Instant::now() + Duration::from_millis(turn_ms);
    loop {
        // A rank that was stopped is woken to be killed: the others have spoken.
        let woken = failure.rank == ranks.rank() && matches!(failure.cause, Cause::Stalled { .. });
        if ranks.was_said() || (woken && ranks.expects_end()) {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(LOOK);
    }
}
