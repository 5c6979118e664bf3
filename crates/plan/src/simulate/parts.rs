//! Where a rank's time goes in a simulated step, by what its ops do.

use super::Simulated;
use crate::schedule::{Op, Schedule};

/// Seconds of one rank; together they are the step's.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepParts {
    /// Forward passes on their own: filling a pipeline.
    pub forward_s: f64,
    /// Backward passes on their own, with weight gradients or without.
    pub backward_s: f64,
    /// Weight gradients that were put off.
    pub weights_s: f64,
    /// A forward and a backward pass at once.
    pub overlapped_s: f64,
    /// Kernels and exchanges outside of passes, as far as no pass runs beside them: the end of a step.
    pub other_s: f64,
    /// Nothing: waiting for other ranks.
    pub waiting_s: f64,
}

impl StepParts {
    /// Names of the parts, in the order of [`Self::seconds`].
    pub const NAMES: [&'static str; 6] =
        ["forward", "backward", "weights", "both at once", "end of step", "waiting"];

    /// Each part.
    pub fn seconds(&self) -> [f64; Self::NAMES.len()] {
        let Self { forward_s, backward_s, weights_s, overlapped_s, other_s, waiting_s } = *self;
        [forward_s, backward_s, weights_s, overlapped_s, other_s, waiting_s]
    }

    /// Where the time of a pass counts; nothing for other ops.
    fn of_pass(&mut self, op: &Op) -> Option<&mut f64> {
        match op {
            Op::Forward(_) => Some(&mut self.forward_s),
            Op::Backward(_) | Op::BackwardInput(_) => Some(&mut self.backward_s),
            Op::BackwardWeight(_) => Some(&mut self.weights_s),
            Op::Overlapped { .. } => Some(&mut self.overlapped_s),
            Op::Kernel(_) | Op::Start(_) | Op::Finish(_) => None,
        }
    }
}

/// The parts of every rank of the first replica, from a step simulated with its spans.
///
/// A pass lasts from its first segment to its last, waiting for exchanges in between included; passes of a rank follow one
/// another.
pub fn step_parts(schedule: &Schedule, simulated: &Simulated) -> Vec<StepParts> {
    let mut extents: Vec<Vec<Option<(f64, f64)>>> =
        schedule.ranks.iter().map(|ops| vec![None; ops.len()]).collect();
    for span in &simulated.spans {
        if let Some(rank) = extents.get_mut(span.rank as usize) {
            let end_s = span.start_s + span.seconds;
            let (first_s, last_s) = rank[span.op as usize].get_or_insert((span.start_s, end_s));
            (*first_s, *last_s) = (first_s.min(span.start_s), last_s.max(end_s));
        }
    }
    let ranks = schedule.ranks.iter().zip(extents);
    ranks.map(|(ops, extents)| of_rank(ops, extents, simulated.seconds)).collect()
}

fn of_rank(ops: &[Op], extents: Vec<Option<(f64, f64)>>, step_s: f64) -> StepParts {
    let mut parts = StepParts::default();
    let (mut passes_s, mut intervals) = (0.0, Vec::with_capacity(ops.len()));
    for (op, extent) in ops.iter().zip(extents) {
        let Some((start_s, end_s)) = extent else { continue };
        intervals.push((start_s, end_s));
        if let Some(part_s) = parts.of_pass(op) {
            *part_s += end_s - start_s;
            passes_s += end_s - start_s;
        }
    }
    intervals.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut busy_s, mut reached_s) = (0.0, 0.0f64);
    for (start_s, end_s) in intervals {
        busy_s += (end_s - start_s.max(reached_s)).max(0.0);
        reached_s = reached_s.max(end_s);
    }
    parts.other_s = (busy_s - passes_s).max(0.0);
    parts.waiting_s = step_s - busy_s;
    parts
}
