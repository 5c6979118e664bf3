//! Interleaved 1F1B: a rank holds every p-th stage, and micro-batches go through its stages in groups of p.

use super::{Chunk, Op, Schedule};

/// Forwards that rank `rank` runs before its first backward, one less than it then holds.
pub(super) fn warmup(ranks: usize, virtual_stages: usize, rank: usize) -> usize {
    2 * (ranks - rank - 1) + (virtual_stages - 1) * ranks
}

/// How far a rank has come.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    ranks: usize,
    virtual_stages: usize,
    forwards: usize,
    backwards: usize,
}

impl Moment {
    /// Micro-batches that its `turn`-th stage holds.
    pub fn held(self, turn: usize) -> usize {
        self.passed(self.forwards, turn) - self.passed(self.backwards, self.virtual_stages - 1 - turn)
    }

    /// The stage whose backward comes next.
    pub fn next(self) -> usize {
        self.virtual_stages - 1 - self.backwards % (self.ranks * self.virtual_stages) / self.ranks
    }

    fn passed(self, passes: usize, turn: usize) -> usize {
        let group = self.ranks * self.virtual_stages;
        let rest = (passes % group).saturating_sub(turn * self.ranks).min(self.ranks);
        passes / group * self.ranks + rest
    }
}

/// The moments after a forward, before the backward that follows, at one of which rank `rank` holds most whatever its stages hold: where
/// the stage of either pass changes, in a period of the steady state.
pub(crate) fn moments(
    ranks: usize,
    virtual_stages: usize,
    micro_batches: usize,
    rank: usize,
) -> impl Iterator<Item = Moment> {
    let total = micro_batches * virtual_stages;
    let ahead = warmup(ranks, virtual_stages, rank).min(total - 1);
    let steps = (total - ahead).min(ranks * virtual_stages);
    let changes = move |forward: usize, backward: usize| {
        let at = [forward % ranks, (forward + 1) % ranks, backward % ranks, (backward + 1) % ranks];
        at.contains(&0)
    };
    (0..steps).filter(move |step| changes(ahead + step, *step)).map(move |step| Moment {
        ranks,
        virtual_stages,
        forwards: ahead + step + 1,
        backwards: step,
    })
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
