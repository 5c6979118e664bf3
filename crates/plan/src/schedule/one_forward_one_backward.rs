//! 1F1B: a rank runs as many forwards ahead as ranks follow it, then alternates.

use super::{Chunk, Op, Schedule};

pub(super) fn schedule(ranks: usize, micro_batches: usize) -> Schedule {
    let of_rank = |rank: usize| {
        let chunk = |micro_batch: usize| Chunk { stage: rank as u16, micro_batch: micro_batch as u32 };
        let ahead = (ranks - rank - 1).min(micro_batches);
        let mut ops: Vec<Op> = (0..ahead).map(|m| Op::Forward(chunk(m))).collect();
        for m in ahead..micro_batches {
            ops.extend([Op::Forward(chunk(m)), Op::Backward(chunk(m - ahead))]);
        }
        ops.extend((micro_batches - ahead..micro_batches).map(|m| Op::Backward(chunk(m))));
        ops
    };
    Schedule {
        micro_batches: micro_batches as u32,
        placement: (0..ranks as u16).collect(),
        ranks: (0..ranks).map(of_rank).collect(),
    }
}
