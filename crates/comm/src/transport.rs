//! The seam between collectives and what moves their bytes.
//!
//! A transport knows calls, members and bytes; it knows no element types, no groups' hierarchy, no sums. A call names
//! for every member what is sent to it and what is expected from it, so one kind of call carries every collective.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{CallSite, CommError, Failure, Waiting};
use crate::flight::FlightRecorder;

pub use crate::part::Piece;

/// A group, as the transport numbers it. All members get the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u32);

/// Which calls of different ranks belong together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CallKey {
    /// The `seq`-th collective call of a group.
    Collective {
        /// The group.
        group: GroupId,
        /// The call's number.
        seq: u64,
    },
    /// The `seq`-th message from one member to another under a tag. The call's members are the sender and the receiver.
    Message {
        /// The group.
        group: GroupId,
        /// The sender's rank in the group.
        from: usize,
        /// The receiver's rank in the group.
        to: usize,
        /// The tag.
        tag: u32,
        /// The message's number.
        seq: u64,
    },
}

/// An owned buffer that receives bytes.
pub trait ByteBuffer: Any {
    /// Its bytes.
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// What adds up received pieces where they are.
pub trait Combine: Any {
    /// Called once for each bucket, in order, when all of it is there: `received[member][piece]`, cut as it was sent.
    /// Pieces are aligned as their elements need it. `workers` may help.
    fn combine(&mut self, bucket: usize, received: &[Vec<&[u8]>], workers: &Workers);
}

/// Called with `tasks` and `task`: runs `task(0)` to `task(tasks - 1)`, each once, in any order, on several threads.
pub type Workers = dyn Fn(usize, &(dyn Fn(usize) + Sync)) + Send + Sync;

/// [`Workers`] that are the calling thread.
pub fn alone(tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    (0..tasks).for_each(task);
}

/// Where received bytes go.
pub enum Landing {
    /// Into ranges (in bytes) of a buffer. What a member sends is one stream, cut by `ranges[member]` in order.
    Copy {
        /// The buffer.
        buffer: Box<dyn ByteBuffer + Send>,
        /// The ranges to fill, per member; disjoint and inside the buffer.
        ranges: Vec<Vec<Range<usize>>>,
    },
    /// Into a sum that reads the pieces where they are: in the sender's memory where it is shared.
    Combine {
        /// What adds up.
        sum: Box<dyn Combine + Send>,
        /// `[bucket][member]`: the lengths in bytes of the pieces that are expected. A member sends the pieces of one
        /// bucket after those of another; a transport that stages them needs room for a few buckets only.
        pieces: Vec<Vec<Vec<usize>>>,
    },
}

impl Landing {
    /// How many bytes are expected from each member.
    pub fn expected(&self) -> Vec<u64> {
        match self {
            Self::Copy { ranges, .. } => {
                ranges.iter().map(|list| list.iter().map(|range| range.len() as u64).sum()).collect()
            }
            Self::Combine { pieces, .. } => {
                let members = pieces.first().map_or(0, Vec::len);
                let of = |member: usize| pieces.iter().flat_map(move |bucket| &bucket[member]);
                (0..members).map(|member| of(member).map(|&len| len as u64).sum()).collect()
            }
        }
    }
}

/// One rank's side of a call.
pub struct Call {
    /// What to name it in errors.
    pub site: CallSite,
    /// The element type's name; all sides must agree.
    pub element: &'static str,
    /// Which calls of other ranks it belongs to.
    pub key: CallKey,
    /// The world ranks that take part. A rank may stand twice in a message to itself.
    pub members: Arc<[usize]>,
    /// Which of the members this side is.
    pub position: usize,
    /// What is sent to each member.
    pub sends: Vec<Vec<Piece>>,
    /// Where what is received goes.
    pub landing: Landing,
    /// Finish only when every member has started the call.
    pub synchronise: bool,
}

/// A finished call.
pub struct Done {
    /// The landing, filled.
    pub landing: Landing,
    /// How long the rank waited in it.
    pub wait: Duration,
    /// How long the rank copied and added for it, by [`LinkClass`](unisono_mesh::LinkClass).
    pub moving: [Duration; 3],
}

/// A started call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(pub u64);

/// Sums of a library, whose order is its own.
pub trait NativeSums {
    /// Sums `send` over the world; rank r receives `counts[r]` elements of it, one rank's after another's.
    ///
    /// # Errors
    /// If the library fails.
    fn reduce_scatter(&self, send: &[f32], counts: &[usize], out: &mut [f32]) -> Result<(), CommError>;
}

/// Moves bytes between ranks. One object per rank; one thread at a time speaks for a rank.
pub trait Transport: Send + Sync {
    /// This rank, in the world.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn size(&self) -> usize;

    /// The node a rank is on.
    fn node(&self, rank: usize) -> usize;

    /// At most how many bytes a sum should take from one rank at once, so that staging stays small. Equal on all ranks.
    fn bucket_bytes(&self) -> usize;

    /// Says which step the rank is in.
    fn set_step(&self, step: u64);

    /// Lends the rank's threads to what the transport copies and adds on the rank's own one, if it does any of that there.
    fn set_workers(&self, _workers: Arc<Workers>) {}

    /// This rank's flight recorder.
    fn recorder(&self) -> &FlightRecorder;

    /// The failure that has ended the run, as far as this rank knows.
    fn failure(&self) -> Option<Arc<Failure>>;

    /// Whether the run has ended, as far as can be told without waiting for anything.
    fn has_failed(&self) -> bool {
        self.failure().is_some()
    }

    /// Ends the run with `failure`, unless it has failed already: calls of the ranks of this process that wait, and all
    /// later ones, end with [`CommError::Failed`]. The watchdog calls it from a thread of its own.
    fn fail(&self, failure: Arc<Failure>);

    /// Tells the other ranks that this one gets on with work that it does alone. May be called often.
    fn beat(&self);

    /// How often ranks have said so, as far as this one has heard.
    fn beats(&self) -> u64;

    /// The call this rank waits in and for whom, where the transport itself knows.
    fn waiting(&self) -> Option<Waiting> {
        None
    }

    /// Opens a group of world ranks, or finds it if it is open. All members pass the same name and list.
    ///
    /// # Errors
    /// If another member passed another list, or the run has failed.
    fn open_group(&self, name: &str, members: &[usize]) -> Result<GroupId, CommError>;

    /// Starts a call. Never waits.
    ///
    /// # Errors
    /// If the run has failed.
    fn start(&self, call: Call) -> Result<Ticket, CommError>;

    /// Waits until everything expected has landed and everything sent was taken; afterwards the transport holds no
    /// clone of the sent pieces. While it waits it goes on with the other started calls of this rank, so the order of
    /// finishing does not matter.
    ///
    /// # Errors
    /// If the run has failed or fails meanwhile.
    fn finish(&self, ticket: Ticket) -> Result<Done, CommError>;

    /// For benchmarks: the library's own sums, if there are any and they are to be used.
    fn native_sums(&self) -> Option<&dyn NativeSums> {
        None
    }

    /// Gives up a started call: peers need not wait for this rank to take what they sent it.
    fn cancel(&self, ticket: Ticket);
}
