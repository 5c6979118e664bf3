//! All-gather of the shards of many segments in one call: the way back of a reduce-scatter.

use std::ops::Range;

use bytemuck::Pod;

use crate::communicator::{Communicator, kind};
use crate::error::CommError;
use crate::part::Part;
use crate::pending::Pending;

/// One vector that ranks own in shards and want whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatherSegment {
    /// Per rank of the group: which elements of the segment it owns. May be empty; disjoint.
    pub shards: Vec<Range<usize>>,
    /// Per rank of the group: whether it wants the segment.
    pub wanted: Vec<bool>,
    /// Where the segment starts in this rank's receive buffer, if it wants it. May differ between ranks.
    pub offset: usize,
}

/// Which segments are gathered, from whom and for whom. Equal on all ranks of the group but for the offsets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GatherPlan {
    /// The segments, in order.
    pub segments: Vec<GatherSegment>,
    /// Each rank's own shards stand in its receive buffer before the call, and are not copied there.
    pub in_place: bool,
}

/// A compiled [`GatherPlan`], reused every step.
#[derive(Clone)]
pub struct Gatherer {
    comm: Communicator,
    /// Per rank: ranges of this rank's shards to send.
    sends: Vec<Vec<Range<usize>>>,
    /// Per rank: ranges of the receive buffer to fill.
    receives: Vec<Vec<Range<usize>>>,
    shard_len: usize,
}

impl GatherPlan {
    /// Checks the plan and works out who sends what to whom.
    ///
    /// # Errors
    /// If lists do not have one entry per rank.
    pub fn compile(&self, comm: &Communicator) -> Result<Gatherer, CommError> {
        let (size, me) = (comm.size(), comm.rank());
        let mut sends = vec![Vec::new(); size];
        let mut receives = vec![Vec::new(); size];
        let mut shard_len = 0;
        for (index, segment) in self.segments.iter().enumerate() {
            let (shards, wanted) = (segment.shards.len(), segment.wanted.len());
            if shards != size || wanted != size {
                let reason = format!(
                    "segment {index} of the plan has {shards} shards and {wanted} wishes, but the group has {size} ranks"
                );
                return Err(comm.refuse(kind::ALL_GATHER, reason));
            }
            let mine = shard_len..shard_len + segment.shards[me].len();
            shard_len = mine.end;
            for peer in (0..size).filter(|&peer| peer != me || !self.in_place) {
                let theirs = &segment.shards[peer];
                if segment.wanted[peer] {
                    extend(&mut sends[peer], mine.clone());
                }
                if segment.wanted[me] {
                    extend(&mut receives[peer], segment.offset + theirs.start..segment.offset + theirs.end);
                }
            }
        }
        Ok(Gatherer { comm: comm.clone(), sends, receives, shard_len })
    }
}

/// Adds a range to a list; neighbours become one.
fn extend(list: &mut Vec<Range<usize>>, range: Range<usize>) {
    match list.last_mut() {
        _ if range.is_empty() => {}
        Some(last) if last.end == range.start => last.end = range.end,
        _ => list.push(range),
    }
}

impl Gatherer {
    /// How many elements this rank owns: its shards of all segments.
    pub fn shard_len(&self) -> usize {
        self.shard_len
    }

    /// Sends this rank's shards (concatenated in the order of the segments, as a reduce-scatter writes them) to all
    /// that want them, and fills the segments this rank wants in `recv`: with its own shards, too, unless the plan is
    /// [in place](GatherPlan::in_place).
    ///
    /// # Errors
    /// If a buffer is too short, segments overlap in `recv`, or the run fails.
    pub fn all_gather<T, R>(&self, shards: impl Into<Part<T>>, recv: R) -> Result<R, CommError>
    where
        T: Pod,
        R: AsMut<[T]> + Send + 'static,
    {
        self.start_all_gather(shards, recv)?.finish()
    }

    /// Starts an [`all_gather`](Self::all_gather).
    ///
    /// # Errors
    /// As the finished call.
    pub fn start_all_gather<T, R>(&self, shards: impl Into<Part<T>>, recv: R) -> Result<Pending<R>, CommError>
    where
        T: Pod,
        R: AsMut<[T]> + Send + 'static,
    {
        let shards = shards.into();
        if shards.len() < self.shard_len {
            let (have, need) = (shards.len(), self.shard_len);
            let reason = format!("the send buffer has {have} elements, this rank's shards have {need}");
            return Err(self.comm.refuse(kind::ALL_GATHER, reason));
        }
        let parts =
            |ranges: &Vec<Range<usize>>| ranges.iter().map(|range| shards.slice(range.clone())).collect();
        let sends = self.sends.iter().map(parts).collect();
        self.comm.start_exchange(kind::ALL_GATHER, sends, recv, self.receives.clone())
    }
}
