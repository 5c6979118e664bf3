//! Interleaved 1F1B: a rank holds every p-th stage, and micro-batches go through its stages in groups of p.

use super::{Chunk, ChunkBytes, Op, Schedule};

/// Forwards that rank `rank` runs before its first backward, one less than it then holds.
pub(super) fn warmup(ranks: usize, virtual_stages: usize, rank: usize) -> usize {
    2 * (ranks - rank - 1) + (virtual_stages - 1) * ranks
}

/// The most that rank `rank` holds between a forward and the backward after it, where a micro-batch keeps `chunks[turn]` in the
/// rank's `turn`-th stage; less `elsewhere` where that backward is not one of the last stage.
///
/// What is held changes evenly while neither pass changes its stage, so that the ends of such stretches are enough, and after as
/// many passes as there are stages it repeats.
pub(super) fn peak(
    chunks: &[ChunkBytes],
    ranks: usize,
    micro_batches: usize,
    rank: usize,
    elsewhere: f64,
) -> f64 {
    let group = ranks * chunks.len();
    let total = micro_batches * chunks.len();
    let ahead = warmup(ranks, chunks.len(), rank).min(total - 1);
    let (mut forwards, mut backwards) = (ahead + 1, 0);
    let turns = chunks.iter().enumerate();
    let mut held: f64 = turns
        .map(|(turn, chunk)| {
            let begun = (forwards % group).saturating_sub(turn * ranks).min(ranks);
            (forwards / group * ranks + begun) as f64 * chunk.activations
        })
        .sum();
    let mut left = (total - ahead).min(group) - 1;
    let mut most = 0.0f64;
    loop {
        let back = chunks.len() - 1 - backwards % group / ranks;
        let less = if back + 1 < chunks.len() { elsewhere } else { 0.0 };
        most = most.max(held - less);
        if left == 0 {
            return most;
        }
        let steps = (ranks - backwards % ranks).min(ranks - forwards % ranks).min(left);
        let change = chunks[forwards % group / ranks].activations - chunks[back].activations;
        most = most.max(held + (steps - 1) as f64 * change - less);
        held += steps as f64 * change;
        (forwards, backwards, left) = (forwards + steps, backwards + steps, left - steps);
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_that_of_the_ops() {
        let kept = [3.0, 1.0, 7.0, 2.0];
        for (ranks, stages, micro_batches) in
            [(4, 2, 4), (4, 2, 8), (2, 4, 2), (2, 4, 8), (3, 3, 9), (1, 4, 5)]
        {
            let schedule = schedule(ranks, stages, micro_batches);
            for rank in 0..ranks {
                for elsewhere in [0.0, 2.5, 100.0] {
                    let turn = |chunk: &Chunk| usize::from(chunk.stage) / ranks;
                    let (mut held, mut most) = (0.0f64, 0.0f64);
                    for op in &schedule.ranks[rank] {
                        match op {
                            Op::Forward(chunk) => held += kept[turn(chunk)],
                            Op::Backward(chunk) => {
                                let less = if turn(chunk) + 1 < stages { elsewhere } else { 0.0 };
                                most = most.max(held - less);
                                held -= kept[turn(chunk)];
                            }
                            _ => {}
                        }
                    }
                    let chunks = kept.map(|bytes| ChunkBytes { activations: bytes, weight_operands: 9.0 });
                    let found = peak(&chunks[..stages], ranks, micro_batches, rank, elsewhere);
                    assert!(
                        (found - most).abs() < 1e-9,
                        "{ranks} {stages} {micro_batches} {rank}: {found} {most}"
                    );
                }
            }
        }
    }
}
