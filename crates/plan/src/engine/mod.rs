//! What the engine does with a layout: every call of a step and the bytes it moves; what a step takes on a machine that was
//! measured.

mod calls;
mod hosts;
mod machine;
mod memory;
mod network;
mod on_hosts;
mod traffic;
mod work;

pub use hosts::HostCluster;
pub use machine::{
    LocalMachine, LocalPrice, MachineError, Mode, PhaseRates, ProductRates, Samples, within_80,
};
pub use memory::{KeptActivations, MemoryEstimate, StepMemory};
pub use traffic::{CallTraffic, Traffic, TrafficPlan};
pub use work::{OTHER, Phase, ProductKind, Products, StepRows, Work, step_work};

use unisono_mesh::{ExpertPlacement, Fold};

use crate::dispatch::{DispatchGroup, DispatchShape};
use crate::model::ModelConfig;
use crate::schedule::EngineStep;

/// A model on ranks, as the engine runs it.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineLayout {
    /// The model.
    pub model: ModelConfig,
    /// The grid on ranks.
    pub fold: Fold,
    /// `[rank]` the node it is on, numbered by first appearance.
    pub node_of: Vec<usize>,
    /// How a step is laid out.
    pub step: EngineStep,
    /// Whether gradients are joined inside nodes before they cross to others.
    pub hierarchical_reduce: bool,
    /// Whether parameters cross to a node once and go on inside.
    pub hierarchical_gather: bool,
    /// How rows travel between tokens and experts.
    pub dispatch: DispatchShape,
}

impl EngineLayout {
    /// Ranks of the host that has most.
    pub fn ranks_per_host(&self) -> usize {
        let on = |host: usize| self.node_of.iter().filter(|node| **node == host).count();
        (0..self.node_of.len()).map(on).max().unwrap_or(1)
    }

    /// The dispatch groups of `rank`, one a wave.
    pub fn dispatch_groups(&self, rank: usize) -> Vec<DispatchGroup> {
        let placement = ExpertPlacement::new(self.fold, self.model.num_experts);
        let node_of = |rank: usize| if self.dispatch.hierarchical { self.node_of[rank] } else { 0 };
        let waves = self.fold.waves(rank).into_iter();
        waves.map(|wave| DispatchGroup::new(self.fold, placement, rank, wave, node_of)).collect()
    }
}
