//! The moment at which a pipeline rank holds most.

use super::{ChunkBytes, InFlight};

/// What a pipeline rank holds when it holds most.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Peak {
    held: Held,
    /// Whether the next backward is one of the rank's last stage, hence follows a loss where that stage ends in the head.
    pub before_last_stage: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Held {
    /// Of each of at most two stages.
    Chunks([InFlight; 2]),
    /// So many passes of an interleaved pipeline have begun, forward, and ended, backward.
    Passes { ranks: usize, stages: usize, forwards: usize, backwards: usize },
}

impl Peak {
    /// Of each of at most two stages.
    pub(super) fn of(chunks: [InFlight; 2]) -> Self {
        Self { held: Held::Chunks(chunks), before_last_stage: true }
    }

    /// After so many forwards and backwards of an interleaved pipeline of `ranks` ranks with `stages` stages each.
    pub(super) fn interleaved(ranks: usize, stages: usize, forwards: usize, backwards: usize) -> Self {
        let before_last_stage = backwards % (ranks * stages) < ranks;
        Self { held: Held::Passes { ranks, stages, forwards, backwards }, before_last_stage }
    }

    /// Micro-batches of the rank's `turn`-th stage.
    pub fn in_flight(&self, turn: usize) -> InFlight {
        match self.held {
            Held::Chunks(chunks) => chunks.get(turn).copied().unwrap_or_default(),
            Held::Passes { ranks, stages, forwards, backwards } => {
                // Groups of `ranks` micro-batches go through the first stage, then the second; backwards from the last.
                let (group, back) = (ranks * stages, stages - 1 - turn);
                let of = |passes: usize, turn: usize| {
                    passes / group * ranks + (passes % group).saturating_sub(turn * ranks).min(ranks)
                };
                InFlight { activations: of(forwards, turn) - of(backwards, back), weight_operands: 0 }
            }
        }
    }

    /// Bytes of it, where a micro-batch keeps `chunks[turn]` in the rank's `turn`-th stage.
    pub fn bytes(&self, chunks: &[ChunkBytes]) -> ChunkBytes {
        let turns = chunks.iter().enumerate();
        turns.fold(ChunkBytes::default(), |sum, (turn, chunk)| sum + chunk.times(self.in_flight(turn)))
    }
}
