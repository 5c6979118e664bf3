//! A pipeline's time in closed form, to prune a search with. The tests hold it against the simulation.

use crate::schedule::ScheduleKind;

/// Seconds of one micro-batch on one pipeline rank, all its stages together.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PassTimes {
    /// Forward.
    pub forward_s: f64,
    /// Gradient of the input.
    pub input_s: f64,
    /// Gradients of the weights.
    pub weights_s: f64,
    /// Forward and backward overlapped.
    pub overlapped_s: f64,
}

impl PassTimes {
    /// Passes that nothing overlaps.
    pub fn new(forward_s: f64, input_s: f64, weights_s: f64) -> Self {
        Self { forward_s, input_s, weights_s, overlapped_s: forward_s + input_s + weights_s }
    }

    fn serial_s(&self) -> f64 {
        self.forward_s + self.input_s + self.weights_s
    }
}

/// A pipeline's step in closed form, without what follows the last micro-batch.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PipelineTime {
    /// The whole.
    pub total_s: f64,
    /// The part of it in which the busiest rank has nothing to do.
    pub bubble_s: f64,
}

/// The time of `micro_batches` through a pipeline whose ranks take `ranks`, with `virtual_stages` stages each and `transfer_s`
/// from a stage to the next.
///
/// The busiest rank works through all micro-batches; on top comes what the first and the last micro-batch spend on the
/// other ranks (the bubble of [`ScheduleKind::bubble_s`], rank by rank), and transfers as far as the micro-batches in flight
/// do not cover them.
pub fn pipeline_time(
    kind: ScheduleKind,
    virtual_stages: usize,
    micro_batches: usize,
    ranks: &[PassTimes],
    transfer_s: f64,
) -> PipelineTime {
    let (p, m, v) = (ranks.len() as f64, micro_batches as f64, virtual_stages as f64);
    let work_s = ranks.iter().map(|times| work(kind, times, p, m)).fold(0.0, f64::max);
    let (bubble_s, way_s) = match kind {
        ScheduleKind::OneForwardOneBackward => {
            let waits_s = (m - 1.0)
                * (turn(ranks, transfer_s, PassTimes::serial_s) - busiest(ranks, PassTimes::serial_s));
            (others(ranks, PassTimes::serial_s), 2.0 * (p - 1.0) * transfer_s + waits_s)
        }
        ScheduleKind::Interleaved => {
            (others(ranks, PassTimes::serial_s) / v, 2.0 * (p * v - 1.0) * transfer_s)
        }
        ScheduleKind::ZeroBubble => {
            let bubble: fn(&PassTimes) -> f64 = |t| (t.forward_s + t.input_s - t.weights_s).max(0.0);
            (others(ranks, bubble), 4.0 * (p - 1.0) * transfer_s)
        }
        ScheduleKind::DualPipeV => {
            let bubble: fn(&PassTimes) -> f64 = |t| (t.overlapped_s + t.input_s - 2.0 * t.weights_s).max(0.0);
            let waits_s =
                m * (turn(ranks, transfer_s, |t| t.overlapped_s) - busiest(ranks, |t| t.overlapped_s));
            (others(ranks, bubble) / 2.0, 2.0 * (p - 1.0) * transfer_s + waits_s)
        }
    };
    PipelineTime { total_s: work_s + bubble_s + way_s, bubble_s: bubble_s + way_s }
}

/// Seconds that a rank works; under DualPipeV as the last rank, which overlaps all but its first and last `p` turns.
fn work(kind: ScheduleKind, times: &PassTimes, p: f64, m: f64) -> f64 {
    match kind {
        ScheduleKind::DualPipeV => {
            let pairs = 2.0 * (m - p) - 1.0;
            (m - pairs / 2.0) * times.serial_s() + pairs / 2.0 * times.overlapped_s
        }
        _ => m * times.serial_s(),
    }
}

fn busiest(ranks: &[PassTimes], of: fn(&PassTimes) -> f64) -> f64 {
    ranks.iter().map(of).fold(0.0, f64::max)
}

/// The sum over all ranks but the busiest.
fn others(ranks: &[PassTimes], of: fn(&PassTimes) -> f64) -> f64 {
    ranks.iter().map(of).sum::<f64>() - busiest(ranks, of)
}

/// Seconds from one micro-batch to the next where a rank holds as many as ranks follow it: the busiest rank's work, or a
/// micro-batch's way to the last rank and back divided by those on the way.
fn turn(ranks: &[PassTimes], transfer_s: f64, of: fn(&PassTimes) -> f64) -> f64 {
    let (mut way_s, mut longest) = (0.0, 0.0f64);
    for (index, times) in ranks.iter().rev().enumerate() {
        way_s += of(times);
        longest = longest.max(of(times)).max((way_s + 2.0 * index as f64 * transfer_s) / (index + 1) as f64);
    }
    longest
}

/// Seconds in which a forward and a backward with `compute_s` and `communication_s` between them run overlapped, if nothing
/// is left over at their ends: communication goes on all the time, compute is `slowdown` slower meanwhile, and what of it is
/// then left runs alone.
pub fn overlapped_time(compute_s: f64, communication_s: f64, slowdown: f64) -> f64 {
    communication_s + (compute_s - communication_s / (1.0 + slowdown)).max(0.0)
}
