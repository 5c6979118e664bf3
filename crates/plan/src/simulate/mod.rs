//! Discrete-event simulation of a schedule: when every op of every rank runs.
//!
//! A rank has a compute lane and a communication lane. What an op does is a chain of segments, each on one lane; the two
//! chains of an overlapped op share the lanes, first come, first served. Compute is slower while the rank communicates.
//! An exchange among replicas begins when the last of them joins and ends for all at once. Outputs travel to the next
//! stage without holding a lane. Whatever moves over a link shares it evenly with what else does at that time.
//!
//! The same inputs give the same result to the bit: events at equal times run in the order of their lanes.

mod closed;
mod costs;
mod flows;
mod parts;
mod queue;
mod run;
mod trace;

pub use closed::{PassTimes, PipelineTime, overlapped_time, pipeline_time};
pub use costs::{Costs, Lane, LinkClass, Segment, StageCosts, Transfer, UniformCosts};
pub use parts::{StepParts, step_parts};
pub use trace::{Cut, TraceEvent, svg, trace_events};

use crate::schedule::Schedule;

/// How many copies of the pipeline there are, and how many of them are simulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replicas {
    count: usize,
    symmetric: bool,
}

impl Replicas {
    /// All `count` replicas, each on its own.
    pub fn all(count: usize) -> Self {
        Self { count: count.max(1), symmetric: false }
    }

    /// One replica that stands for all `count`, whose costs are equal. It uses links as all would together.
    pub fn symmetric(count: usize) -> Self {
        Self { count: count.max(1), symmetric: true }
    }

    /// Replicas that the simulation steps through.
    pub fn simulated(&self) -> usize {
        if self.symmetric { 1 } else { self.count }
    }
}

/// What one rank does with its time, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RankTimes {
    /// Its compute lane is busy.
    pub compute_s: f64,
    /// Its communication lane is busy, waiting for others included.
    pub communication_s: f64,
    /// Its communication lane is busy and its compute lane is not.
    pub exposed_s: f64,
    /// It ends its list.
    pub end_s: f64,
}

impl RankTimes {
    /// Seconds of a step of `step_s` in which neither lane is busy.
    pub fn idle_s(&self, step_s: f64) -> f64 {
        step_s - self.compute_s - self.exposed_s
    }
}

/// One segment, once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    /// The simulated rank: replica times pipeline ranks plus pipeline rank.
    pub rank: u32,
    /// The op that it belongs to: its index in the rank's list.
    pub op: u32,
    /// The half of an overlapped op: 0 forward, 1 backward.
    pub half: u8,
    /// Its lane.
    pub lane: Lane,
    /// Its name.
    pub name: &'static str,
    /// When it begins.
    pub start_s: f64,
    /// How long it takes.
    pub seconds: f64,
}

/// A simulated step.
#[derive(Debug, Clone, PartialEq)]
pub struct Simulated {
    /// From the start to the end of the last rank.
    pub seconds: f64,
    /// `[replica * pipeline ranks + pipeline rank]` of the simulated replicas.
    pub ranks: Vec<RankTimes>,
    /// Events that it took.
    pub events: u64,
    /// Every segment in order of its end, if asked for.
    pub spans: Vec<Span>,
}

/// A simulation that came to a standstill.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the schedule stands still: replica {replica}, pipeline rank {rank} waits at op {index}, {op}; `Schedule::check` names the contradiction"
)]
pub struct Standstill {
    /// The replica.
    pub replica: usize,
    /// The pipeline rank.
    pub rank: usize,
    /// Where in its list.
    pub index: usize,
    /// The op, as text.
    pub op: String,
}

/// Simulates one step of `schedule`.
///
/// # Errors
/// If ranks wait for each other: no schedule that passes [`Schedule::check`] does with costs whose exchanges are in the same
/// order on all replicas.
pub fn simulate(
    schedule: &Schedule,
    costs: &impl Costs,
    replicas: Replicas,
    keep_spans: bool,
) -> Result<Simulated, Standstill> {
    run::Run::new(schedule, costs, replicas, keep_spans).finish()
}
