//! ZB1P: 1F1B whose weight gradients wait, the longer the later the rank, and fill the drain of the pipeline.

use super::{Chunk, ChunkBytes, InFlight, Op, Peak, Schedule};

pub(super) fn schedule(ranks: usize, micro_batches: usize) -> Schedule {
    let of_rank = |rank: usize| {
        let chunk = |micro_batch: usize| Chunk { stage: rank as u16, micro_batch: micro_batch as u32 };
        let ahead = (ranks - rank - 1).min(micro_batches);
        let mut ops: Vec<Op> = (0..ahead).map(|m| Op::Forward(chunk(m))).collect();
        // Weight gradients lag `rank` behind, so that all ranks end together.
        let mut weights = 0;
        for m in 0..micro_batches {
            if m + ahead < micro_batches {
                ops.push(Op::Forward(chunk(m + ahead)));
            }
            ops.push(Op::BackwardInput(chunk(m)));
            if m >= rank {
                ops.push(Op::BackwardWeight(chunk(weights)));
                weights += 1;
            }
        }
        ops.extend((weights..micro_batches).map(|m| Op::BackwardWeight(chunk(m))));
        ops
    };
    Schedule {
        micro_batches: micro_batches as u32,
        placement: (0..ranks as u16).collect(),
        ranks: (0..ranks).map(of_rank).collect(),
    }
}

/// When rank `rank` holds most, where a micro-batch keeps `chunk`.
///
/// With a forward what weight gradients wait for has grown to the rank's lag or to the last forward; after an input gradient
/// it may weigh more than the activations that are gone. In between both change evenly.
pub(super) fn peak(chunk: ChunkBytes, ranks: usize, micro_batches: usize, rank: usize) -> Peak {
    let ahead = (ranks - rank - 1).min(micro_batches);
    let turns = micro_batches - ahead;
    let begun = InFlight {
        activations: (ahead + 1).min(micro_batches),
        weight_operands: rank.min(turns.saturating_sub(1)),
    };
    let after = |micro_batch: usize| InFlight {
        activations: ahead.min(micro_batches - micro_batch - 1),
        weight_operands: micro_batch.min(rank) + 1,
    };
    let mut most = begun;
    for held in [after(turns.saturating_sub(1)), after(rank.min(micro_batches - 1))] {
        if chunk.times(held).total() > chunk.times(most).total() {
            most = held;
        }
    }
    Peak::of([most, InFlight::default()])
}
