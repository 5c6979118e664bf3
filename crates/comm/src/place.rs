//! Where the ranks of a run live.

use std::sync::Arc;

use crate::communicator::Communicator;
use crate::error::{Failure, RunError};
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

    /// The process was told to end, and so are others of its job: from now on none of them is called dead.
    pub fn expect_end(&self) {
        match self {
            Self::Threads => {}
            #[cfg(feature = "mpi")]
            Self::Mpi(ranks) => ranks.expect_end(),
        }
    }

    /// As [`Communicator::beat`], to the other processes.
    pub fn beat(&self) {
        match self {
            Self::Threads => {}
            #[cfg(feature = "mpi")]
            Self::Mpi(ranks) => ranks.world().beat(),
        }
    }

    /// The failure, if this process is the one that found out that another one of its job has died.
    pub fn found_dead(&self) -> Option<Arc<Failure>> {
        match self {
            Self::Threads => None,
            #[cfg(feature = "mpi")]
            Self::Mpi(ranks) => ranks.found_dead(),
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

    /// The node of every rank; `threads` says so if they are threads.
    pub fn node_of(&self, threads: &ThreadRanks) -> Vec<usize> {
        match self {
            Self::Threads => threads.node_of(),
            #[cfg(feature = "mpi")]
            Self::Mpi(mpi) => mpi.node_of(),
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
