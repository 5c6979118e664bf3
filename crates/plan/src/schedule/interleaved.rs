//! Interleaved 1F1B: a rank holds every p-th stage, and micro-batches go through its stages in groups of p.

use super::{Chunk, Op, Schedule};

/// Forwards that rank `rank` runs before its first backward, one less than it then holds.
pub(super) fn warmup(ranks: usize, virtual_stages: usize, rank: usize) -> usize {
    2 * (ranks - rank - 1) + (virtual_stages - 1) * ranks
}

pub(super) fn schedule(ranks: usize, virtual_stages: usize, micro_batches: usize) -> Schedule {
    let total = micro_batches * virtual_stages;
    let group = ranks * virtual_stages;
    let of_rank = |rank: usize| {
        // The k-th forward: p micro-batches through the rank's first stage, the same p through its second, and so on.
        let forward = |k: usize| Chunk {
            stage: (k % group / ranks * ranks + rank) as u16,
            micro_batch: (k / group * ranks + k % ranks) as u32,
        };
        let backward = |k: usize| {
            let depth = virtual_stages - 1 - k % group / ranks;
            Chunk { stage: (depth * ranks + rank) as u16, ..forward(k) }
        };
        let ahead = warmup(ranks, virtual_stages, rank).min(total);
        let mut ops: Vec<Op> = (0..ahead).map(|k| Op::Forward(forward(k))).collect();
        for k in ahead..total {
            ops.extend([Op::Forward(forward(k)), Op::Backward(backward(k - ahead))]);
        }
        ops.extend((total - ahead..total).map(|k| Op::Backward(backward(k))));
        ops
    };
    Schedule {
        micro_batches: micro_batches as u32,
        placement: (0..group).map(|stage| (stage % ranks) as u16).collect(),
        ranks: (0..ranks).map(of_rank).collect(),
    }
}
