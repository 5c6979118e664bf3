//! All-gather of the shards of many segments in one call: the way back of a reduce-scatter.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;
use unisono_mesh::gathering::Gathering;

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
    ways: Arc<Ways>,
}

/// Who sends what to whom.
struct Ways {
    shard_len: usize,
    /// What crosses to nodes where several ranks want it, if anything does.
    across: Option<Across>,
    /// Per rank: what this rank sends it.
    sends: Vec<Vec<(Origin, Range<usize>)>>,
    /// Per rank: ranges of the receive buffer to fill.
    receives: Vec<Vec<Range<usize>>>,
}

/// What goes between nodes, before what goes inside them.
struct Across {
    /// Per rank: ranges of this rank's shards to send.
    sends: Vec<Vec<Range<usize>>>,
    /// Per rank: ranges of the staging to fill.
    receives: Vec<Vec<Range<usize>>>,
    /// Elements that this rank passes on.
    staged: usize,
}

/// Where a rank has what it sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// Among its shards.
    Shards,
    /// In the staging.
    Staged,
}

impl GatherPlan {
    /// Checks the plan and works out who sends what to whom: every rank its shards to all that want them.
    ///
    /// # Errors
    /// If lists do not have one entry per rank.
    pub fn compile(&self, comm: &Communicator) -> Result<Gatherer, CommError> {
        self.compile_over(comm, &vec![0; comm.size()])
    }

    /// The same for ranks on several nodes: a shard crosses to each node once, and goes on to others inside.
    ///
    /// # Errors
    /// As [`compile`](Self::compile).
    pub fn compile_hierarchical(&self, comm: &Communicator) -> Result<Gatherer, CommError> {
        self.compile_over(comm, &comm.node_numbers())
    }

    fn compile_over(&self, comm: &Communicator, node_of: &[usize]) -> Result<Gatherer, CommError> {
        let (size, me) = (comm.size(), comm.rank());
        for (index, segment) in self.segments.iter().enumerate() {
            let (shards, wanted) = (segment.shards.len(), segment.wanted.len());
            if shards != size || wanted != size {
                let reason = format!(
                    "segment {index} of the plan has {shards} shards and {wanted} wishes, but the group has {size} ranks"
                );
                return Err(comm.refuse(kind::ALL_GATHER, reason));
            }
        }
        let owners = |segment: &GatherSegment| {
            let shards = segment.shards.clone();
            (0..size).filter(move |&owner| !shards[owner].is_empty())
        };
        let saves = |segment: &GatherSegment| {
            Gathering::new(node_of, |rank| segment.wanted[rank]).saves(owners(segment))
        };
        // All ranks come to the same answer.
        let crosses = self.segments.iter().any(saves);
        let one_node = vec![0; size];
        let node_of = if crosses { node_of } else { &one_node };

        let lists = || vec![Vec::new(); size];
        let mut across = Across { sends: lists(), receives: lists(), staged: 0 };
        let (mut sends, mut receives) = (vec![Vec::new(); size], lists());
        let mut shard_len = 0;
        for segment in &self.segments {
            let ways = Gathering::new(node_of, |rank| segment.wanted[rank]);
            let mine = shard_len..shard_len + segment.shards[me].len();
            shard_len = mine.end;
            for owner in owners(segment) {
                let shard = &segment.shards[owner];
                let place = segment.offset + shard.start..segment.offset + shard.end;
                for &receiver in ways.near(owner) {
                    if self.in_place && receiver == owner {
                        continue;
                    }
                    if owner == me {
                        extend_from(&mut sends[receiver], Origin::Shards, mine.clone());
                    }
                    if receiver == me {
                        extend(&mut receives[owner], place.clone());
                    }
                }
                for (relay, receivers) in ways.far(owner) {
                    if owner == me {
                        extend(&mut across.sends[relay], mine.clone());
                    }
                    let staged = across.staged..across.staged + shard.len();
                    if relay == me {
                        across.staged = staged.end;
                        extend(&mut across.receives[owner], staged.clone());
                        for &receiver in receivers {
                            extend_from(&mut sends[receiver], Origin::Staged, staged.clone());
                        }
                    }
                    if receivers.contains(&me) {
                        extend(&mut receives[relay], place.clone());
                    }
                }
            }
        }
        let across = crosses.then_some(across);
        let ways = Ways { shard_len, across, sends, receives };
        Ok(Gatherer { comm: comm.clone(), ways: Arc::new(ways) })
    }
}

/// Adds a range to a list; neighbours become one.
fn extend(list: &mut Vec<Range<usize>>, range: Range<usize>) {
    match list.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => list.push(range),
    }
}

/// The same where ranges are of two buffers.
fn extend_from(list: &mut Vec<(Origin, Range<usize>)>, origin: Origin, range: Range<usize>) {
    match list.last_mut() {
        Some((of, last)) if *of == origin && last.end == range.start => last.end = range.end,
        _ => list.push((origin, range)),
    }
}

impl Gatherer {
    /// How many elements this rank owns: its shards of all segments.
    pub fn shard_len(&self) -> usize {
        self.ways.shard_len
    }

    /// Sends this rank's shards (concatenated in the order of the segments, as a reduce-scatter writes them) to all
    /// that want them, and fills the segments this rank wants in `recv`: with its own shards, too, unless the plan is
    /// [in place](GatherPlan::in_place).
    ///
    /// # Errors
    /// If a buffer is too short, segments overlap in `recv`, or the run fails.
    pub fn all_gather<T, R>(&self, shards: impl Into<Part<T>>, recv: R) -> Result<R, CommError>
    where
        T: Pod + Send + Sync,
        R: AsMut<[T]> + Send + 'static,
    {
        self.start_all_gather(shards, recv)?.finish()
    }

    /// Starts an [`all_gather`](Self::all_gather). All ranks finish hierarchical ones in the same order.
    ///
    /// # Errors
    /// As the finished call.
    pub fn start_all_gather<T, R>(
        &self,
        shards: impl Into<Part<T>>,
        recv: R,
    ) -> Result<PendingGather<T, R, Vec<T>>, CommError>
    where
        T: Pod + Send + Sync,
        R: AsMut<[T]> + Send + 'static,
    {
        self.start_all_gather_by(shards, recv, |len| vec![T::zeroed(); len])
    }

    /// The same with a buffer of `staging(len)` elements for what this rank passes on inside its node, if it does; it is let
    /// go when the call is finished.
    ///
    /// # Errors
    /// As the finished call.
    pub fn start_all_gather_by<T, R, S>(
        &self,
        shards: impl Into<Part<T>>,
        recv: R,
        staging: impl FnOnce(usize) -> S,
    ) -> Result<PendingGather<T, R, S>, CommError>
    where
        T: Pod,
        R: AsMut<[T]> + Send + 'static,
        S: AsRef<[T]> + AsMut<[T]> + Send + Sync + 'static,
    {
        let shards = shards.into();
        if shards.len() < self.ways.shard_len {
            let (have, need) = (shards.len(), self.ways.shard_len);
            let reason = format!("the send buffer has {have} elements, this rank's shards have {need}");
            return Err(self.comm.refuse(kind::ALL_GATHER, reason));
        }
        let stage = match &self.ways.across {
            None => Stage::Last(self.start_last(kind::ALL_GATHER, &shards, None::<&Arc<S>>, recv)?),
            Some(across) => {
                let parts = |ranges: &Vec<Range<usize>>| {
                    ranges.iter().map(|range| shards.slice(range.clone())).collect()
                };
                let sends = across.sends.iter().map(parts).collect();
                let staging = staging(across.staged);
                let receives = across.receives.clone();
                let pending = self.comm.start_exchange(kind::ALL_GATHER, sends, staging, receives)?;
                Stage::Across { pending, shards, recv }
            }
        };
        Ok(PendingGather { gatherer: self.clone(), stage })
    }

    /// Starts what goes to ranks of this rank's node, or to all if nothing has crossed before.
    fn start_last<T, R, S>(
        &self,
        kind: &'static str,
        shards: &Part<T>,
        staged: Option<&Arc<S>>,
        recv: R,
    ) -> Result<Pending<R>, CommError>
    where
        T: Pod,
        R: AsMut<[T]> + Send + 'static,
        S: AsRef<[T]> + Send + Sync + 'static,
    {
        let part = |(origin, range): &(Origin, Range<usize>)| match (origin, staged) {
            (Origin::Staged, Some(staged)) => Part::new(Arc::clone(staged), range.clone()),
            _ => shards.slice(range.clone()),
        };
        let sends = self.ways.sends.iter().map(|list| list.iter().map(part).collect()).collect();
        self.comm.start_exchange(kind, sends, recv, self.ways.receives.clone())
    }
}

/// A started [`Gatherer::all_gather`].
#[must_use = "a started call must be finished"]
pub struct PendingGather<T, R, S> {
    gatherer: Gatherer,
    stage: Stage<T, R, S>,
}

enum Stage<T, R, S> {
    /// Between nodes.
    Across { pending: Pending<S>, shards: Part<T>, recv: R },
    /// Everything at once.
    Last(Pending<R>),
}

impl<T, R, S> PendingGather<T, R, S>
where
    T: Pod,
    R: AsMut<[T]> + Send + 'static,
    S: AsRef<[T]> + Send + Sync + 'static,
{
    /// Waits for the shards, passes on inside the node what has crossed, and hands the receive buffer back; no clone of the
    /// send buffer is left.
    ///
    /// # Errors
    /// [`CommError::Failed`] if the run fails.
    pub fn finish(self) -> Result<R, CommError> {
        let Self { gatherer, stage } = self;
        match stage {
            Stage::Last(pending) => pending.finish(),
            Stage::Across { pending, shards, recv } => {
                let staged = Arc::new(pending.finish()?);
                gatherer.start_last(kind::GATHER_IN_NODE, &shards, Some(&staged), recv)?.finish()
            }
        }
    }
}
