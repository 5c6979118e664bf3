//! Ranks as processes of an MPI job.
//!
//! - [`launched`]: whether a launcher started this process as one of several. Needs no MPI.
//! - `MpiRanks` (feature `mpi`): this process's rank, and its world communicator.
//!
//! MPI moves bytes between two ranks, nothing more: every collective is the same exchange as between threads, and sums
//! are this crate's. A call sends each peer a small header, then its payload in few large messages straight from the
//! caller's buffers; the receiver matches the header with its own call, compares both, and then names the place where
//! the payload lands. Two threads take turns at this: the rank's own while it waits in a call, otherwise one that does
//! nothing else, so started calls go on while the rank computes.

mod launcher;

#[cfg(feature = "mpi")]
mod calls;
#[cfg(feature = "mpi")]
mod cores;
#[cfg(feature = "mpi")]
mod engine;
#[cfg(feature = "mpi")]
mod groups;
#[cfg(feature = "mpi")]
mod incoming;
#[cfg(feature = "mpi")]
mod native;
#[cfg(feature = "mpi")]
mod neighbour;
#[cfg(feature = "mpi")]
mod outgoing;
#[cfg(feature = "mpi")]
mod ranks;
#[cfg(feature = "mpi")]
mod raw;
#[cfg(feature = "mpi")]
mod telling;
#[cfg(feature = "mpi")]
mod verdict;
#[cfg(feature = "mpi")]
mod wire;

#[cfg(feature = "mpi")]
pub use launcher::Daemon;
pub use launcher::{Launched, launched};
#[cfg(feature = "mpi")]
pub use ranks::{MpiOptions, MpiRanks};
