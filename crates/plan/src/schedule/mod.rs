//! Schedules as data: the ops of one training step, one list a rank.
//!
//! An executor, the simulator and the drawing all read these lists; nothing else says what a step does. A rank runs its
//! list in order. An op starts when its inputs are there: the output of the stage before for a forward, the gradient from
//! the stage after for a backward. Results leave as soon as they exist, without an op of their own, so a schedule cannot
//! hang unless its order contradicts itself; [`Schedule::check`] says whether it does.

mod check;
mod dual_pipe_v;
mod engine;
mod interleaved;
mod kind;
mod one_forward_one_backward;
mod op;
mod peak;
mod zero_bubble;

pub use check::{ChunkBytes, InFlight, ScheduleError};
pub use engine::EngineStep;
pub use kind::ScheduleKind;
pub use op::{Chunk, Exchange, ExchangeKind, Kernel, KernelKind, Op, Pass, Site};
pub use peak::Peak;

use std::fmt;

/// The ops of one step of a pipeline (or of one rank without a pipeline).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// Micro-batches that run through every stage.
    pub micro_batches: u32,
    /// `[stage]` the pipeline rank that holds it.
    pub placement: Vec<u16>,
    /// `[pipeline rank]` its ops, in order.
    pub ranks: Vec<Vec<Op>>,
}

impl Schedule {
    /// Stages of the whole pipeline.
    pub fn stages(&self) -> usize {
        self.placement.len()
    }

    /// The stages that pipeline rank `rank` holds, ascending.
    pub fn stages_of(&self, rank: usize) -> Vec<u16> {
        let held = self.placement.iter().enumerate().filter(|(_, at)| usize::from(**at) == rank);
        held.map(|(stage, _)| stage as u16).collect()
    }

    /// Adds the end of a data-parallel step with sharded optimizer states: a stage's gradients are on their way to their
    /// owners as soon as its last weight gradient is done, then the shard is updated and parameters are gathered.
    pub fn then_update(mut self) -> Self {
        for ops in &mut self.ranks {
            let mut last: Vec<(u16, usize)> = Vec::new();
            for (index, op) in ops.iter().enumerate() {
                if let Some(chunk) = op.weights() {
                    last.retain(|(stage, _)| *stage != chunk.stage);
                    last.push((chunk.stage, index));
                }
            }
            let reduce = |stage| Exchange {
                kind: ExchangeKind::ReduceGradients,
                site: Site { layer: stage, ..Site::default() },
            };
            for (stage, index) in last.iter().rev() {
                ops.insert(index + 1, Op::Start(reduce(*stage)));
            }
            ops.extend(last.iter().map(|(stage, _)| Op::Finish(reduce(*stage))));
            ops.push(Op::Kernel(Kernel {
                kind: KernelKind::Optimizer,
                pass: Pass::Update,
                site: Site::default(),
            }));
            let gather = Exchange { kind: ExchangeKind::GatherParameters, site: Site::default() };
            ops.extend([Op::Start(gather), Op::Finish(gather)]);
        }
        self
    }

    /// What [`Self::then_update`] made, for parameters in shards that no rank keeps: they are gathered before each pass that uses
    /// them, and not after the update.
    pub fn gathering_each_pass(mut self) -> Self {
        let gathers =
            |op: &Op| matches!(op, Op::Start(e) | Op::Finish(e) if e.kind == ExchangeKind::GatherParameters);
        for ops in &mut self.ranks {
            for op in std::mem::take(ops).into_iter().filter(|op| !gathers(op)) {
                if let Some(chunk) = op.forward().or(op.backward()) {
                    let site = Site { layer: chunk.stage, turn: chunk.micro_batch, ..Site::default() };
                    let gather = Exchange { kind: ExchangeKind::GatherParameters, site };
                    ops.extend([Op::Start(gather), Op::Finish(gather)]);
                }
                ops.push(op);
            }
        }
        self
    }
}

/// One line a rank: `rank 0 stages 0 3: F0@0 F1@0 B0@0`.
impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (rank, ops) in self.ranks.iter().enumerate() {
            write!(f, "rank {rank} stages")?;
            self.stages_of(rank).iter().try_for_each(|stage| write!(f, " {stage}"))?;
            f.write_str(":")?;
            ops.iter().try_for_each(|op| write!(f, " {op}"))?;
            writeln!(f)?;
        }
        Ok(())
    }
}
