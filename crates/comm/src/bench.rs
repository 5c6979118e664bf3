//! How fast collectives between thread ranks are, next to plain memory copies of the same volume.

use std::hint::black_box;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::communicator::Communicator;
use crate::error::{CommError, RunError};
use crate::exact::{ReducePlan, Segment};
use crate::gather::{GatherPlan, GatherSegment};
use crate::part::Part;
use crate::threads::run_ranks;

/// What [`reduce_gather`] measured. Times are of the fastest repeat.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Ranks.
    pub ranks: usize,
    /// Bytes of the vector that every rank contributes.
    pub vector_bytes: usize,
    /// Bytes that a rank receives from others in a reduce-scatter and an all-gather of the vector.
    pub volume_bytes: usize,
    /// Seconds of the reduce-scatter and the all-gather, until all ranks are done.
    pub collective_seconds: f64,
    /// Seconds in which every rank at once copies `volume_bytes` between the same buffers, until all ranks are done.
    pub copy_seconds: f64,
}

impl Measured {
    /// The collectives' speed as a share of that of plain copies.
    pub fn ratio(&self) -> f64 {
        self.copy_seconds / self.collective_seconds
    }

    /// Bytes a rank receives per second.
    pub fn bytes_per_s(&self) -> f64 {
        self.volume_bytes as f64 / self.collective_seconds
    }
}

/// Measures reduce-scatter + all-gather of a vector of `vector_bytes` between `ranks` thread ranks, `repeats` times,
/// in turn with plain copies, of the same volume and between the same buffers. Both are timed from a barrier to the next.
///
/// # Errors
/// If a rank's thread cannot be started.
pub fn reduce_gather(ranks: usize, vector_bytes: usize, repeats: usize) -> Result<Measured, RunError> {
    let elements = vector_bytes / size_of::<f32>();
    let volume = 2 * (elements - elements / ranks.max(1)) * size_of::<f32>();
    let times = run_ranks(ranks, |comm| measure_rank(&comm, elements, repeats))?;
    let slowest = |pick: fn(&(Duration, Duration)) -> Duration| {
        let repeat = |i: usize| times.iter().map(|rank| pick(&rank[i])).max().unwrap_or_default();
        (0..repeats).map(repeat).min().unwrap_or_default().as_secs_f64()
    };
    Ok(Measured {
        ranks,
        vector_bytes,
        volume_bytes: volume,
        collective_seconds: slowest(|times| times.0),
        copy_seconds: slowest(|times| times.1),
    })
}

/// The times of the collectives and of the copies, per repeat.
fn measure_rank(
    comm: &Communicator,
    elements: usize,
    repeats: usize,
) -> Result<Vec<(Duration, Duration)>, CommError> {
    let size = comm.size();
    let cut = |rank: usize| rank * elements / size;
    let shards: Vec<_> = (0..size).map(|rank| cut(rank)..cut(rank + 1)).collect();
    let held = (0..size).map(|rank| rank..rank + 1).collect();
    let segment = Segment { items: size, held, shards: shards.clone() };
    let reducer = ReducePlan { segments: vec![segment] }.compile(comm)?;
    let segment = GatherSegment { shards, wanted: vec![true; size], offset: 0 };
    let gatherer = GatherPlan { segments: vec![segment] }.compile(comm)?;

    let gradient = Arc::new(vec![1.0f32 + comm.rank() as f32; elements]);
    let mut shard = vec![0.0f32; reducer.shard_len()];
    let mut parameters = vec![0.0f32; elements];
    let from_others = elements - elements / size;
    let mut times = Vec::with_capacity(repeats);
    // One more round warms up.
    for round in 0..=repeats {
        comm.barrier()?;
        let begin = Instant::now();
        let roots = vec![vec![Part::whole(Arc::clone(&gradient))]];
        let sent = Arc::new(reducer.reduce_scatter(&roots, shard)?);
        parameters = gatherer.all_gather(Arc::clone(&sent), parameters)?;
        comm.barrier()?;
        let collective = begin.elapsed();
        shard =
            Arc::try_unwrap(sent).map_err(|_| CommError::Transport("a send buffer is still held".into()))?;
        comm.barrier()?;
        let begin = Instant::now();
        for _ in ["reduce-scatter", "all-gather"] {
            parameters[..from_others].copy_from_slice(black_box(&gradient[..from_others]));
            black_box(&mut parameters);
        }
        comm.barrier()?;
        if round > 0 {
            times.push((collective, begin.elapsed()));
        }
    }
    Ok(times)
}

/// How many ranks can run at once here.
pub fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}
