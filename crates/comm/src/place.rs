//! Where the ranks of a run live.

#[cfg(feature = "mpi")]
use std::sync::Arc;

use crate::communicator::Communicator;
use crate::error::RunError;
#[cfg(feature = "mpi")]
use crate::mpi::MpiRanks;
use crate::threads::ThreadRanks;

/// Where the ranks of a run live; no result depends on it.
#[derive(Debug, Clone, Default)]
pub enum Place {
    /// In this process, as threads.
    #[default]
    Threads,
    /// In the processes of an MPI job, one each.
    #[cfg(feature = "mpi")]
    Mpi(Arc<MpiRanks>),
}

impl Place {
    /// What carries messages, for people.
    pub fn transport(&self) -> String {
        match self {
            Self::Threads => "shared memory of one process".into(),
            #[cfg(feature = "mpi")]
            Self::Mpi(ranks) => ranks.library().to_owned(),
        }
    }

    /// Whether rank 0 is in this process.
    pub fn leads(&self) -> bool {
        match self {
            Self::Threads => true,
            #[cfg(feature = "mpi")]
            Self::Mpi(ranks) => ranks.rank() == 0,
        }
    }

    /// For benchmarks: whether sums are the MPI library's own from now on (see `MpiRanks::sum_natively`). Thread ranks have
    /// none: false if so.
    pub fn sum_natively(&self, on: bool) -> bool {
        match self {
            Self::Threads => !on,
            #[cfg(feature = "mpi")]
            Self::Mpi(ranks) => {
                ranks.sum_natively(on);
                true
            }
        }
    }

    /// How many of a run's `ranks` share this machine's memory.
    pub fn ranks_here(&self, ranks: usize) -> usize {
        match self {
            Self::Threads => ranks,
            #[cfg(feature = "mpi")]
            Self::Mpi(mpi) => mpi.ranks_here(),
        }
    }

    /// How many processes these are.
    pub fn processes_here(&self) -> usize {
        match self {
            Self::Threads => 1,
            #[cfg(feature = "mpi")]
            Self::Mpi(mpi) => mpi.ranks_here(),
        }
    }

    /// Runs `body` as every rank of this process, `threads` says how if they are threads, and returns what they return.
    ///
    /// # Errors
    /// As [`run_ranks`](crate::run_ranks).
    pub fn run<T, E, F>(&self, threads: &ThreadRanks, body: F) -> Result<Vec<T>, RunError>
    where
        T: Send,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
        F: Fn(Communicator) -> Result<T, E> + Sync,
    {
        match self {
            Self::Threads => threads.run(body),
            #[cfg(feature = "mpi")]
            Self::Mpi(ranks) => ranks.run(body).map(|value| vec![value]),
        }
    }
}
