//! What ops cost, as the simulator asks for it.

use crate::schedule::{ExchangeKind, Op};

/// What a segment occupies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lane {
    /// Kernels.
    Compute,
    /// Exchanges, waiting for others included.
    Communication,
}

/// A piece of an op on one lane.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Segment {
    /// The lane.
    pub lane: Lane,
    /// What it is, for traces.
    pub name: &'static str,
    /// Seconds when nothing disturbs it.
    pub seconds: f64,
    /// Of an exchange: how many consecutive replicas join in at the same pipeline rank; 1 for none.
    pub group: u32,
    /// Of an exchange: the class of links that it uses.
    pub link: Option<u8>,
}

impl Segment {
    /// Kernels of `seconds`.
    pub fn compute(name: &'static str, seconds: f64) -> Self {
        Self { lane: Lane::Compute, name, seconds, group: 1, link: None }
    }

    /// An exchange of `seconds` that joins no replicas and shares no link.
    pub fn exchange(name: &'static str, seconds: f64) -> Self {
        Self { lane: Lane::Communication, name, seconds, group: 1, link: None }
    }
}

/// A class of links: consecutive ranks share one of its links. Ranks are numbered pipeline rank by pipeline rank, replicas
/// within, so that the replicas of a stage are neighbours.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinkClass {
    /// Its name.
    pub name: &'static str,
    /// Ranks on one link.
    pub ranks: u32,
    /// Exchanges that one link carries at their full speed at a time.
    pub capacity: f64,
}

/// What a stage's output costs on its way to another rank.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Transfer {
    /// Seconds when nothing disturbs it.
    pub seconds: f64,
    /// The class of links that it uses, at both ends.
    pub link: Option<u8>,
}

/// The costs of one step.
pub trait Costs {
    /// What `op` does on pipeline rank `rank` of `replica`, one after the other. Never asked for an overlapped op, but for its
    /// halves; what [`Op::Start`] starts goes to the communication lane; what [`Op::Finish`] takes comes after its wait.
    fn segments(&self, replica: usize, rank: usize, op: &Op) -> &[Segment];

    /// The way of an output (or gradient) between the ranks of neighbouring stages.
    fn transfer(&self, replica: usize, from_stage: u16, to_stage: u16) -> Transfer;

    /// The classes of links that segments and transfers name.
    fn links(&self) -> &[LinkClass] {
        &[]
    }

    /// How much longer compute takes while the rank communicates, as a share: 0.1 for a tenth.
    fn slowdown(&self) -> f64 {
        0.0
    }
}

/// What one stage costs, on every replica.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StageCosts {
    /// Forward.
    pub forward: Vec<Segment>,
    /// Gradient of the input.
    pub input: Vec<Segment>,
    /// Gradients of the weights.
    pub weights: Vec<Segment>,
    /// Both gradients at once.
    pub backward: Vec<Segment>,
    /// Reduce-scatter of its gradients.
    pub reduce: Vec<Segment>,
}

impl StageCosts {
    /// A stage of kernels alone.
    pub fn kernels(forward_s: f64, input_s: f64, weights_s: f64) -> Self {
        Self {
            forward: vec![Segment::compute("forward", forward_s)],
            input: vec![Segment::compute("input gradient", input_s)],
            weights: vec![Segment::compute("weight gradients", weights_s)],
            backward: vec![Segment::compute("backward", input_s + weights_s)],
            reduce: Vec::new(),
        }
    }
}

/// Costs by stage, equal on all replicas.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct UniformCosts {
    /// `[stage]`
    pub stages: Vec<StageCosts>,
    /// Between any two neighbouring stages on different ranks.
    pub transfer: Transfer,
    /// `[pipeline rank]` the optimizer's update; missing ones cost nothing.
    pub update: Vec<Vec<Segment>>,
    /// `[pipeline rank]` the gathering of parameters; missing ones cost nothing.
    pub gather: Vec<Vec<Segment>>,
    /// Classes of links.
    pub links: Vec<LinkClass>,
    /// See [`Costs::slowdown`].
    pub slowdown: f64,
}

impl Costs for UniformCosts {
    fn segments(&self, _replica: usize, rank: usize, op: &Op) -> &[Segment] {
        let stage = |stage: u16| &self.stages[usize::from(stage)];
        match op {
            Op::Forward(chunk) => &stage(chunk.stage).forward,
            Op::Backward(chunk) => &stage(chunk.stage).backward,
            Op::BackwardInput(chunk) => &stage(chunk.stage).input,
            Op::BackwardWeight(chunk) => &stage(chunk.stage).weights,
            Op::Start(exchange) if exchange.kind == ExchangeKind::ReduceGradients => {
                &stage(exchange.site.layer).reduce
            }
            Op::Start(_) => self.gather.get(rank).map_or(&[], Vec::as_slice),
            Op::Kernel(_) => self.update.get(rank).map_or(&[], Vec::as_slice),
            Op::Overlapped { .. } | Op::Finish(_) => &[],
        }
    }

    fn transfer(&self, _replica: usize, _from_stage: u16, _to_stage: u16) -> Transfer {
        self.transfer
    }

    fn links(&self) -> &[LinkClass] {
        &self.links
    }

    fn slowdown(&self) -> f64 {
        self.slowdown
    }
}
