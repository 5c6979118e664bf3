//! What must hold of every schedule: complete, in order, free of deadlock; and how much it keeps in flight.

use std::ops::Add;

use super::{Chunk, Exchange, Op, Schedule};

/// A schedule that cannot be, or cannot run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// Sizes that the schedule's pattern does not allow.
    #[error(
        "{schedule} cannot run {micro_batches} micro-batches on {ranks} pipeline ranks with {virtual_stages} stages each: {rule}"
    )]
    Sizes {
        /// Its name.
        schedule: &'static str,
        /// Pipeline ranks.
        ranks: usize,
        /// Stages a rank.
        virtual_stages: usize,
        /// Micro-batches.
        micro_batches: usize,
        /// What would be right.
        rule: String,
    },
    /// A chunk that a rank should process once and does not, or does in the wrong place or order.
    #[error("pipeline rank {rank}: {what}{chunk} {fault}")]
    Op {
        /// The pipeline rank.
        rank: usize,
        /// `F`, `I` or `W`.
        what: char,
        /// The chunk.
        chunk: Chunk,
        /// What is wrong with it.
        fault: &'static str,
    },
    /// An exchange that is finished before it starts, started twice, or never finished.
    #[error("pipeline rank {rank}: {op} at op {index} has no partner")]
    Exchange {
        /// The pipeline rank.
        rank: usize,
        /// Where in its list.
        index: usize,
        /// The op, as text.
        op: String,
    },
    /// Ranks that wait for each other.
    #[error("deadlock: pipeline rank {rank} waits at op {index}, {op}, for what no rank can send")]
    Deadlock {
        /// The first rank that waits.
        rank: usize,
        /// Where in its list.
        index: usize,
        /// For what, as text.
        op: String,
    },
}

/// Micro-batches that a pipeline rank holds at its peak, counted in chunks (one stage of one micro-batch).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InFlight {
    /// Chunks with all activations: forward begun, input gradient not yet done.
    pub activations: usize,
    /// Chunks of which only the weight gradients' operands are left.
    pub weight_operands: usize,
}

/// Bytes of a chunk, or of several: before its input gradient is done, and from then until its weight gradients are.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ChunkBytes {
    /// All activations.
    pub activations: f64,
    /// The operands of weight gradients alone.
    pub weight_operands: f64,
}

impl ChunkBytes {
    /// Both.
    pub fn total(self) -> f64 {
        self.activations + self.weight_operands
    }

    /// What chunks of these bytes hold together, `held` of them.
    pub(crate) fn times(self, held: InFlight) -> Self {
        Self {
            activations: held.activations as f64 * self.activations,
            weight_operands: held.weight_operands as f64 * self.weight_operands,
        }
    }
}

impl Add for ChunkBytes {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            activations: self.activations + other.activations,
            weight_operands: self.weight_operands + other.weight_operands,
        }
    }
}

/// What has happened to a chunk.
#[derive(Clone, Copy, Default)]
struct Done {
    forward: bool,
    input: bool,
    weights: bool,
}

struct Progress<'a> {
    schedule: &'a Schedule,
    /// `[stage][micro-batch]`
    done: Vec<Vec<Done>>,
}

impl Progress<'_> {
    fn at(&self, chunk: Chunk) -> Option<&Done> {
        self.done.get(usize::from(chunk.stage))?.get(chunk.micro_batch as usize)
    }

    /// Whether all inputs of `op` exist.
    fn ready(&self, op: &Op) -> bool {
        let before = |chunk: Chunk| Chunk { stage: chunk.stage.wrapping_sub(1), ..chunk };
        let after = |chunk: Chunk| Chunk { stage: chunk.stage + 1, ..chunk };
        let forward =
            op.forward().is_none_or(|c| c.stage == 0 || self.at(before(c)).is_some_and(|d| d.forward));
        let backward = op.backward().is_none_or(|c| {
            usize::from(c.stage) + 1 == self.schedule.stages() || self.at(after(c)).is_some_and(|d| d.input)
        });
        forward && backward
    }

    fn run(&mut self, rank: usize, op: &Op) -> Result<(), ScheduleError> {
        if let Some(chunk) = op.forward() {
            self.step(rank, 'F', chunk, |done| !std::mem::replace(&mut done.forward, true))?;
        }
        if let Some(chunk) = op.backward() {
            self.step(rank, 'I', chunk, |done| done.forward && !std::mem::replace(&mut done.input, true))?;
        }
        if let Some(chunk) = op.weights() {
            self.step(rank, 'W', chunk, |done| done.input && !std::mem::replace(&mut done.weights, true))?;
        }
        Ok(())
    }

    fn step(
        &mut self,
        rank: usize,
        what: char,
        chunk: Chunk,
        advance: impl FnOnce(&mut Done) -> bool,
    ) -> Result<(), ScheduleError> {
        let wrong = |fault| ScheduleError::Op { rank, what, chunk, fault };
        let stage = usize::from(chunk.stage);
        if self.schedule.placement.get(stage).is_none_or(|at| usize::from(*at) != rank) {
            return Err(wrong("is not a stage of this rank"));
        }
        let done = self.done[stage].get_mut(chunk.micro_batch as usize);
        let done = done.ok_or_else(|| wrong("is not a micro-batch of the step"))?;
        if advance(done) { Ok(()) } else { Err(wrong("comes twice or too early")) }
    }
}

impl Schedule {
    /// Checks that every rank runs F, I and W of every micro-batch and stage that it holds exactly once and in order, and
    /// that no ranks wait for each other.
    ///
    /// # Errors
    /// Names the first rank and chunk, or the op at which ranks wait for each other.
    pub fn check(&self) -> Result<(), ScheduleError> {
        let row = vec![Done::default(); self.micro_batches as usize];
        let mut progress = Progress { schedule: self, done: vec![row; self.stages()] };
        let mut next = vec![0; self.ranks.len()];
        loop {
            let mut moved = false;
            for (rank, ops) in self.ranks.iter().enumerate() {
                while let Some(op) = ops.get(next[rank]).filter(|op| progress.ready(op)) {
                    progress.run(rank, op)?;
                    next[rank] += 1;
                    moved = true;
                }
            }
            if !moved {
                break;
            }
        }
        for (rank, ops) in self.ranks.iter().enumerate() {
            if let Some(op) = ops.get(next[rank]) {
                return Err(ScheduleError::Deadlock { rank, index: next[rank], op: op.to_string() });
            }
        }
        self.check_exchanges()?;
        self.check_complete(&progress.done)
    }

    fn check_exchanges(&self) -> Result<(), ScheduleError> {
        for (rank, ops) in self.ranks.iter().enumerate() {
            let mut open: Vec<Exchange> = Vec::new();
            for (index, op) in ops.iter().enumerate() {
                let error = || ScheduleError::Exchange { rank, index, op: op.to_string() };
                match op {
                    Op::Start(exchange) if open.contains(exchange) => return Err(error()),
                    Op::Start(exchange) => open.push(*exchange),
                    Op::Finish(exchange) => {
                        let at = open.iter().position(|other| other == exchange).ok_or_else(error)?;
                        open.swap_remove(at);
                    }
                    _ => {}
                }
            }
            if let Some(exchange) = open.first() {
                let op = Op::Start(*exchange).to_string();
                return Err(ScheduleError::Exchange { rank, index: ops.len(), op });
            }
        }
        Ok(())
    }

    fn check_complete(&self, done: &[Vec<Done>]) -> Result<(), ScheduleError> {
        for (stage, row) in done.iter().enumerate() {
            for (micro_batch, done) in row.iter().enumerate() {
                let parts = [('F', done.forward), ('I', done.input), ('W', done.weights)];
                if let Some((what, _)) = parts.iter().find(|(_, happened)| !happened) {
                    let chunk = Chunk { stage: stage as u16, micro_batch: micro_batch as u32 };
                    let rank = usize::from(self.placement[stage]);
                    return Err(ScheduleError::Op { rank, what: *what, chunk, fault: "is missing" });
                }
            }
        }
        Ok(())
    }

    /// What pipeline rank `rank` holds at its peak; each count's own peak.
    pub fn in_flight(&self, rank: usize) -> InFlight {
        let (mut now, mut peak) = (InFlight::default(), InFlight::default());
        for op in &self.ranks[rank] {
            now.activations += usize::from(op.forward().is_some());
            peak.activations = peak.activations.max(now.activations);
            if op.backward().is_some() {
                now.activations -= 1;
                now.weight_operands += 1;
                peak.weight_operands = peak.weight_operands.max(now.weight_operands);
            }
            now.weight_operands -= usize::from(op.weights().is_some());
        }
        peak
    }

    /// Bytes that pipeline rank `rank` holds for its chunks at its peak, if a chunk of stage s keeps `activations(s)` bytes
    /// until its input gradient is done, and then `weight_operands(s)` until its weight gradients are done.
    pub fn peak_bytes(
        &self,
        rank: usize,
        activations: impl Fn(u16) -> u64,
        weight_operands: impl Fn(u16) -> u64,
    ) -> u64 {
        let (mut now, mut peak) = (0, 0);
        for op in &self.ranks[rank] {
            now += op.forward().map_or(0, |chunk| activations(chunk.stage));
            peak = peak.max(now);
            let (backward, weights) = (op.backward(), op.weights());
            now -= backward.map_or(0, |chunk| activations(chunk.stage));
            now += backward.map_or(0, |chunk| weight_operands(chunk.stage));
            now -= weights.map_or(0, |chunk| weight_operands(chunk.stage));
            peak = peak.max(now);
        }
        peak
    }
}
