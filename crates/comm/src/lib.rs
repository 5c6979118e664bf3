//! Collectives between ranks, exact reductions, the traffic ledger and the flight recorder.
//!
//! - [`Communicator`]: one rank's handle on a group of ranks. Everything it does is a pattern of one *exchange*: for
//!   each peer a list of [`Part`]s to send, for each peer a list of ranges of the receive buffer to fill.
//! - [`ReducePlan`], [`GatherPlan`]: reduce-scatter and all-gather of many segments in one call, where ranks are on
//!   several nodes inside each node first. Sums run strictly along the fixed tree of [`unisono_mesh::tree`], so their
//!   bits depend on no layout and no arrival order.
//! - [`run_ranks`], [`ThreadRanks`]: ranks as threads of one process.
//! - [`Transport`]: what moves the bytes: threads that share memory, or with feature `mpi` an MPI library ([`mpi`]).
//! - [`Ledger`]: what moved, by kind, group and link class.
//! - [`watch`]: flight records on disk, what they say together, and the watchdog.
//!
//! Buffers are owned: what is sent is shared (`Arc`), what is filled is moved in at the start and handed back at the
//! end. A receiver copies straight out of the sender's buffer, so every byte is copied at most once.
//!
//! A run never hangs: a rank that panics, fails or leaves early, calls that do not match, and ranks that wait for each
//! other in a circle end the run with a [`Failure`] which names the culprit, its step and its call.

pub mod bench;
mod communicator;
mod copying;
mod error;
mod exact;
mod flight;
mod gather;
mod ledger;
pub mod mpi;
mod part;
mod pending;
mod place;
mod reduce_route;
pub mod threads;
pub mod transport;
mod tree_sum;
pub mod watch;

pub use communicator::{Communicator, kind};
pub use error::{CallSite, Cause, CommError, Failure, RunError, Waiting};
pub use exact::{PendingReduce, ReducePlan, Reducer, Segment};
pub use flight::{CallState, FlightEntry, FlightRecorder, Message};
pub use gather::{GatherPlan, GatherSegment, Gatherer, PendingGather};
pub use ledger::{Ledger, RankTraffic, Row};
pub use part::Part;
pub use pending::Pending;
pub use place::Place;
pub use threads::{PretendedLink, ThreadRanks, run_ranks};
pub use transport::Transport;
pub use tree_sum::Real;
pub use watch::{Activity, Diagnosis, FlightDeck, FlightRecord, Limits, Reason, Watchdog};
