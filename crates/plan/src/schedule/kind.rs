//! The pipeline schedules by name, with what is known of each in closed form.

use std::fmt;

use super::{
    ChunkBytes, InFlight, Peak, Schedule, ScheduleError, dual_pipe_v, interleaved, one_forward_one_backward,
    zero_bubble,
};

/// A pipeline schedule. With one pipeline rank all but [`ScheduleKind::DualPipeV`] are plain gradient accumulation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ScheduleKind {
    /// One forward, one backward (PipeDream-Flush; Narayanan et al., 2021).
    OneForwardOneBackward,
    /// The same with several stages a rank (Megatron-LM; Narayanan et al., 2021).
    Interleaved,
    /// Zero bubble with the memory of 1F1B: ZB-H1, also called ZB1P (Qi et al., 2023).
    ZeroBubble,
    /// Two stages a rank along a V, forward and backward overlapped (DeepSeek-AI, 2025).
    DualPipeV,
}

impl ScheduleKind {
    /// All of them.
    pub const ALL: [Self; 4] =
        [Self::OneForwardOneBackward, Self::Interleaved, Self::ZeroBubble, Self::DualPipeV];

    /// `1f1b`, `interleaved`, `zb1p` or `dualpipev`.
    pub fn name(self) -> &'static str {
        match self {
            Self::OneForwardOneBackward => "1f1b",
            Self::Interleaved => "interleaved",
            Self::ZeroBubble => "zb1p",
            Self::DualPipeV => "dualpipev",
        }
    }

    /// Checks the sizes that the pattern allows: `virtual_stages` a rank on `ranks` pipeline ranks.
    ///
    /// # Errors
    /// Names the rule that is broken.
    pub fn check_sizes(
        self,
        ranks: usize,
        virtual_stages: usize,
        micro_batches: usize,
    ) -> Result<(), ScheduleError> {
        let rule = if ranks == 0 || virtual_stages == 0 || micro_batches == 0 {
            Some("all must be at least 1".to_string())
        } else if ranks * virtual_stages > usize::from(u16::MAX) {
            Some(format!("at most {} stages", u16::MAX))
        } else {
            match self {
                Self::OneForwardOneBackward | Self::ZeroBubble => {
                    (virtual_stages != 1).then(|| "it holds one stage a rank".into())
                }
                Self::Interleaved if virtual_stages < 2 => Some("it holds at least two stages a rank".into()),
                Self::Interleaved => (!micro_batches.is_multiple_of(ranks))
                    .then(|| format!("micro-batches must be a multiple of {ranks}")),
                Self::DualPipeV if virtual_stages != 2 => Some("it holds two stages a rank".into()),
                Self::DualPipeV => {
                    (micro_batches < 2 * ranks).then(|| format!("at least {} micro-batches", 2 * ranks))
                }
            }
        };
        let error =
            |rule| ScheduleError::Sizes { schedule: self.name(), ranks, virtual_stages, micro_batches, rule };
        rule.map_or(Ok(()), |rule| Err(error(rule)))
    }

    /// The schedule of `micro_batches` on `ranks` pipeline ranks with `virtual_stages` stages each.
    ///
    /// # Errors
    /// As [`ScheduleKind::check_sizes`].
    pub fn schedule(
        self,
        ranks: usize,
        virtual_stages: usize,
        micro_batches: usize,
    ) -> Result<Schedule, ScheduleError> {
        self.check_sizes(ranks, virtual_stages, micro_batches)?;
        Ok(match self {
            Self::OneForwardOneBackward => one_forward_one_backward::schedule(ranks, micro_batches),
            Self::Interleaved => interleaved::schedule(ranks, virtual_stages, micro_batches),
            Self::ZeroBubble => zero_bubble::schedule(ranks, micro_batches),
            Self::DualPipeV => dual_pipe_v::schedule(ranks, micro_batches),
        })
    }

    /// What pipeline rank `rank` holds at its peak, exactly what [`Schedule::in_flight`] counts; in closed form.
    pub fn in_flight(
        self,
        ranks: usize,
        virtual_stages: usize,
        micro_batches: usize,
        rank: usize,
    ) -> InFlight {
        let (p, m, r) = (ranks, micro_batches, rank);
        match self {
            Self::OneForwardOneBackward => InFlight { activations: (p - r).min(m), weight_operands: 1 },
            Self::Interleaved => InFlight {
                activations: (interleaved::warmup(p, virtual_stages, r) + 1).min(m * virtual_stages),
                weight_operands: 1,
            },
            Self::ZeroBubble => InFlight { activations: (p - r).min(m), weight_operands: (r + 1).min(m) },
            Self::DualPipeV => InFlight { activations: 2 * p + 1, weight_operands: r + 1 },
        }
    }

    /// When pipeline rank `rank` holds most bytes, where a micro-batch keeps `chunks[turn]` in the rank's `turn`-th stage: what it
    /// then holds is exactly what [`Schedule::peak_bytes`] counts, in closed form. Of an interleaved pipeline moments that are not
    /// between a forward and a backward of the last stage count as if they held `elsewhere` less.
    pub fn peak(
        self,
        ranks: usize,
        micro_batches: usize,
        rank: usize,
        chunks: &[ChunkBytes],
        elsewhere: f64,
    ) -> Peak {
        let turn = |turn: usize| chunks.get(turn).copied().unwrap_or_default();
        match self {
            Self::OneForwardOneBackward => {
                let held = InFlight { activations: (ranks - rank).min(micro_batches), weight_operands: 0 };
                Peak::of([held, InFlight::default()])
            }
            Self::Interleaved => interleaved::peak(chunks, ranks, micro_batches, rank, elsewhere),
            Self::ZeroBubble => zero_bubble::peak(turn(0), ranks, micro_batches, rank),
            Self::DualPipeV => dual_pipe_v::peak([turn(0), turn(1)], ranks, rank),
        }
    }

    /// Seconds that every rank idles in a step of equal stages and no communication. `forward`, `input` and `weights` are
    /// those of a whole rank (all its stages), `overlapped` those of an overlapped forward and backward.
    ///
    /// 1F1B (p-1)(F+B), interleaved that over the stages a rank, ZB1P (p-1)(F+I-W), DualPipeV (p-1)(F&B+I-2W) of a stage,
    /// with B = I + W. The zero-bubble formulas hold while W is no longer than F and I.
    pub fn bubble_s(
        self,
        ranks: usize,
        virtual_stages: usize,
        forward: f64,
        input: f64,
        weights: f64,
        overlapped: f64,
    ) -> f64 {
        let waits = (ranks - 1) as f64;
        match self {
            Self::OneForwardOneBackward => waits * (forward + input + weights),
            Self::Interleaved => waits * (forward + input + weights) / virtual_stages as f64,
            Self::ZeroBubble => waits * (forward + input - weights),
            Self::DualPipeV => waits * (overlapped + input - 2.0 * weights) / 2.0,
        }
    }
}

impl fmt::Display for ScheduleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
