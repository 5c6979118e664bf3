//! How fast collectives are, next to plain memory copies of the same volume and to a library's own collectives.

use std::hint::black_box;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::communicator::Communicator;
use crate::error::CommError;
use crate::exact::{ReducePlan, Reducer, Segment};
use crate::gather::{GatherPlan, GatherSegment, Gatherer};
use crate::part::Part;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Collective {
    /// Every rank gets every rank's part.
    AllGather,
    /// Every rank gets its part of the sum.
    ReduceScatter,
    /// Every rank gets the whole sum: a reduce-scatter and an all-gather.
    AllReduce,
    /// The two halves of an all-reduce as a training step runs them: each rank gets its part of the sum, and then every rank's
    /// part beside its own, which is where it belongs already.
    ReduceThenGather,
    /// Every rank sends every rank a part.
    AllToAll,
    /// Every rank gets rank 0's vector.
    Broadcast,
}

impl Collective {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::AllGather,
        Self::ReduceScatter,
        Self::AllReduce,
        Self::ReduceThenGather,
        Self::AllToAll,
        Self::Broadcast,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllGather => "all-gather",
            Self::ReduceScatter => "reduce-scatter",
            Self::AllReduce => "all-reduce",
            Self::ReduceThenGather => "reduce-then-gather",
            Self::AllToAll => "all-to-all",
            Self::Broadcast => "broadcast",
        }
    }

    /// Bytes that cross the busiest rank's link in one direction, of a vector of `bytes`: what makes the bandwidth of
    /// different collectives comparable (the "bus bandwidth" of nccl-tests).
    pub fn bus_bytes(self, bytes: usize, ranks: usize) -> f64 {
        let others = (ranks as f64 - 1.0) / ranks as f64;
        bytes as f64
            * match self {
                Self::AllReduce | Self::ReduceThenGather => 2.0 * others,
                Self::Broadcast => 1.0,
                _ => others,
            }
    }
}

/// Another implementation of the same collectives.
pub trait Native {
    /// Its name.
    fn name(&self) -> String;

    /// Runs a collective on this rank: `send` as this module sends it, the result in `receive`. For
    /// [`ReduceThenGather`](Collective::ReduceThenGather) that is an all-reduce, which leaves each rank the same in one place.
    ///
    /// # Errors
    /// If it fails.
    fn run(&self, collective: Collective, send: &[f32], receive: &mut [f32]) -> Result<(), CommError>;

    /// Exchanges values with every rank: those of `from`, as many for each rank as its counts say, in order of ranks; into
    /// `to` likewise.
    ///
    /// # Errors
    /// If it fails, or buffers are shorter than their counts say.
    fn exchange(&self, from: (&[f32], &[usize]), to: (&mut [f32], &[usize])) -> Result<(), CommError>;
}

/// Times of one collective, each the median over rounds of the slowest rank, in seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Timed {
    /// What was measured.
    pub collective: Collective,
    /// Ranks.
    pub ranks: usize,
    /// Bytes of the whole vector.
    pub bytes: usize,
    /// This crate.
    pub ours_s: f64,
    /// The other implementation, if there is one.
    pub native_s: Option<f64>,
    /// Every rank at once copies in memory what it would receive, and a barrier.
    pub copy_s: f64,
}

impl Timed {
    /// Bus bandwidth of a time, in bytes per second.
    pub fn bus_bytes_per_s(&self, seconds: f64) -> f64 {
        self.collective.bus_bytes(self.bytes, self.ranks) / seconds
    }
}

/// How often something is timed, and what the caches hold before each time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampling {
    /// Times that each is measured.
    pub rounds: usize,
    /// Of the vectors what fits; otherwise nothing, as when a step comes to a unit's gradients.
    pub cached: bool,
}

/// More than caches hold.
const BEYOND_CACHES: usize = 128 << 20;

/// Times a collective of `bytes`, in turn with the other implementation and with copies.
///
/// # Errors
/// If the run fails.
pub fn time_collective(
    comm: &Communicator,
    native: Option<&dyn Native>,
    collective: Collective,
    bytes: usize,
    sampling: Sampling,
) -> Result<Timed, CommError> {
    let mut work = Workload::new(comm, collective, bytes)?;
    let other = vec![1_u64; if sampling.cached { 0 } else { BEYOND_CACHES / size_of::<u64>() }];
    // A copy before each, or what puts all of it out of the caches, so that all find them alike; when all have ended the one before, since
    // ranks may share a core.
    let prepare = |work: &mut Workload| {
        comm.barrier()?;
        if sampling.cached {
            work.copy()?;
        } else {
            black_box(black_box(&other).iter().sum::<u64>());
        }
        comm.barrier()
    };
    let mut times: [Vec<f64>; 3] = Default::default();
    // Two more rounds warm up.
    for round in 0..sampling.rounds + 2 {
        prepare(&mut work)?;
        let copy = work.copy()?;
        prepare(&mut work)?;
        let ours = work.ours()?;
        let mut theirs = Duration::ZERO;
        if let Some(native) = native {
            prepare(&mut work)?;
            theirs = work.native(native)?;
        }
        if round >= 2 {
            for (list, time) in times.iter_mut().zip([ours, theirs, copy]) {
                list.push(time.as_secs_f64());
            }
        }
    }
    let [ours_s, native_s, copy_s] = slowest_medians(comm, &times)?;
    let native_s = native.map(|_| native_s);
    Ok(Timed {
        collective,
        ranks: comm.size(),
        bytes: work.elements * size_of::<f32>(),
        ours_s,
        native_s,
        copy_s,
    })
}

/// The slowest rank of every round, then the median round, of three lists of as many times.
///
/// # Errors
/// If the run fails.
pub fn slowest_medians(comm: &Communicator, times: &[Vec<f64>; 3]) -> Result<[f64; 3], CommError> {
    let all = comm.all_gather_values(&times.concat())?;
    let rounds = times[0].len();
    let median = |which: usize| {
        let slowest = |round: usize| all.iter().map(|rank| rank[which * rounds + round]).fold(0.0, f64::max);
        let mut list: Vec<f64> = (0..rounds).map(slowest).collect();
        list.sort_unstable_by(f64::total_cmp);
        list[rounds / 2]
    };
    Ok([median(0), median(1), median(2)])
}

/// The buffers of one collective on one rank.
struct Workload {
    comm: Communicator,
    collective: Collective,
    elements: usize,
    /// The parts of the vector, by rank.
    parts: Vec<Range<usize>>,
    reducer: Reducer,
    gatherer: Gatherer,
    send: Arc<Vec<f32>>,
    receive: Vec<f32>,
    shard: Vec<f32>,
}

impl Workload {
    fn new(comm: &Communicator, collective: Collective, bytes: usize) -> Result<Self, CommError> {
        let size = comm.size();
        let part = bytes.div_ceil(size_of::<f32>()).div_ceil(size).max(1);
        let elements = part * size;
        let parts: Vec<_> = (0..size).map(|rank| rank * part..(rank + 1) * part).collect();
        let held = (0..size).map(|rank| rank..rank + 1).collect();
        let segment = Segment { items: size, held, shards: parts.clone() };
        let reducer = ReducePlan { segments: vec![segment] }.compile_hierarchical(comm)?;
        let segment = GatherSegment { shards: parts.clone(), wanted: vec![true; size], offset: 0 };
        let in_place = collective == Collective::ReduceThenGather;
        let gatherer = GatherPlan { segments: vec![segment], in_place }.compile_hierarchical(comm)?;
        let sent = if collective == Collective::AllGather { part } else { elements };
        Ok(Self {
            comm: comm.clone(),
            collective,
            elements,
            parts,
            reducer,
            gatherer,
            send: Arc::new(vec![1.0 + comm.rank() as f32; sent]),
            receive: vec![0.0; elements],
            shard: vec![0.0; part],
        })
    }

    fn ours(&mut self) -> Result<Duration, CommError> {
        let (receive, shard) = (std::mem::take(&mut self.receive), std::mem::take(&mut self.shard));
        let roots = vec![vec![Part::whole(Arc::clone(&self.send))]];
        let sends =
            || self.parts.iter().map(|part| Part::new(Arc::clone(&self.send), part.clone())).collect();
        let begin = Instant::now();
        (self.receive, self.shard) = match self.collective {
            Collective::AllGather => (self.gatherer.all_gather(Arc::clone(&self.send), receive)?, shard),
            Collective::ReduceScatter => (receive, self.reducer.reduce_scatter(&roots, shard)?),
            Collective::AllReduce | Collective::ReduceThenGather => {
                let sum = Arc::new(self.reducer.reduce_scatter(&roots, shard)?);
                let receive = self.gatherer.all_gather(Arc::clone(&sum), receive)?;
                let held = || CommError::Transport("a send buffer is still held".into());
                (receive, Arc::try_unwrap(sum).map_err(|_| held())?)
            }
            Collective::AllToAll => (self.comm.all_to_all_v(sends(), receive, &self.parts)?, shard),
            Collective::Broadcast => (self.comm.broadcast::<f32, _>(0, receive)?, shard),
        };
        Ok(begin.elapsed())
    }

    fn native(&mut self, native: &dyn Native) -> Result<Duration, CommError> {
        let begin = Instant::now();
        let receive =
            if self.collective == Collective::ReduceScatter { &mut self.shard } else { &mut self.receive };
        native.run(self.collective, &self.send, receive)?;
        Ok(begin.elapsed())
    }

    /// Copies as many bytes as the rank would receive from others, until every rank has: as a collective ends, so that ranks
    /// that share a core count what each waits for it.
    fn copy(&mut self) -> Result<Duration, CommError> {
        let ranks = self.comm.size();
        let mut left = (self.collective.bus_bytes(self.elements, ranks)) as usize;
        let begin = Instant::now();
        while left > 0 {
            let len = left.min(self.send.len()).min(self.receive.len());
            self.receive[..len].copy_from_slice(black_box(&self.send[..len]));
            black_box(&mut self.receive);
            left -= len;
        }
        self.comm.barrier()?;
        Ok(begin.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads::run_ranks;

    #[test]
    fn every_collective_is_timed_and_does_what_it_is_named() {
        for collective in Collective::ALL {
            let timed = run_ranks(3, |comm| {
                let mut work = Workload::new(&comm, collective, 1000)?;
                work.ours()?;
                let (sum, me) = (6.0, comm.rank());
                match collective {
                    Collective::ReduceScatter => assert!(work.shard.iter().all(|x| *x == sum)),
                    Collective::AllReduce => assert!(work.receive.iter().all(|x| *x == sum)),
                    Collective::ReduceThenGather => {
                        assert!(work.shard.iter().all(|x| *x == sum));
                        let others = |(i, part): (usize, &[f32])| i == me || part.iter().all(|x| *x == sum);
                        assert!(work.receive.chunks(84).enumerate().all(others));
                    }
                    Collective::AllGather | Collective::AllToAll => {
                        assert!(
                            work.receive
                                .chunks(84)
                                .enumerate()
                                .all(|(i, part)| part == vec![1.0 + i as f32; 84])
                        );
                    }
                    Collective::Broadcast => assert_eq!(work.receive.len(), 252, "rank {me}"),
                }
                let sampling = Sampling { rounds: 3, cached: collective != Collective::AllReduce };
                time_collective(&comm, None, collective, 1000, sampling)
            });
            for timed in timed.unwrap() {
                assert_eq!((timed.bytes, timed.native_s), (1008, None));
                assert!(timed.ours_s > 0.0 && timed.bus_bytes_per_s(timed.ours_s) > 0.0);
            }
        }
    }

    #[test]
    fn bus_bytes_are_those_of_a_ring() {
        assert_eq!(Collective::AllReduce.bus_bytes(1000, 4), 1500.0);
        assert_eq!(Collective::AllToAll.bus_bytes(1000, 4), 750.0);
        assert_eq!(Collective::Broadcast.bus_bytes(1000, 4), 1000.0);
    }
}
