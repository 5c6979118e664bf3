//! Interleaved 1F1B: a rank holds every p-th stage, and micro-batches go through its stages in groups of p.

use super::{Chunk, ChunkBytes, Op, Peak, Schedule};

/// Forwards that rank `rank` runs before its first backward, one less than it then holds.
pub(super) fn warmup(ranks: usize, virtual_stages: usize, rank: usize) -> usize {
    2 * (ranks - rank - 1) + (virtual_stages - 1) * ranks
}

/// When rank `rank` holds most between a forward and the backward after it, where a micro-batch keeps `chunks[turn]` in the rank's
/// `turn`-th stage; as if it held `elsewhere` less where that backward is not one of the last stage.
///
/// What is held changes evenly while neither pass changes its stage, so that the ends of such stretches are enough, and after as
/// many passes as there are stages it repeats.
pub(super) fn peak(
    chunks: &[ChunkBytes],
    ranks: usize,
    micro_batches: usize,
    rank: usize,
    elsewhere: f64,
) -> Peak {
    let stages = chunks.len();
    let (group, total) = (ranks * stages, micro_batches * stages);
    let ahead = warmup(ranks, stages, rank).min(total - 1);
    let (mut forwards, mut backwards) = (ahead + 1, 0);
    let mut held = Peak::interleaved(ranks, stages, forwards, backwards).bytes(chunks).activations;
    let mut left = (total - ahead).min(group) - 1;
    let mut most = (f64::NEG_INFINITY, [forwards, backwards]);
    loop {
        let back = stages - 1 - backwards % group / ranks;
        let less = if back + 1 < stages { elsewhere } else { 0.0 };
        let steps = (ranks - backwards % ranks).min(ranks - forwards % ranks).min(left);
        let change = chunks[forwards % group / ranks].activations - chunks[back].activations;
        for later in [0, steps.saturating_sub(1)] {
            let bytes = held + later as f64 * change - less;
            if bytes > most.0 {
                most = (bytes, [forwards + later, backwards + later]);
            }
        }
        if left == 0 {
            let (_, [forwards, backwards]) = most;
            return Peak::interleaved(ranks, stages, forwards, backwards);
        }
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
                    let peak = peak(&chunks[..stages], ranks, micro_batches, rank, elsewhere);
                    let less = if peak.before_last_stage { 0.0 } else { elsewhere };
                    let found = peak.bytes(&chunks[..stages]).activations - less;
                    assert!(
                        (found - most).abs() < 1e-9,
                        "{ranks} {stages} {micro_batches} {rank}: {found} {most}"
                    );
                }
            }
        }
    }
}
