//! A run's layout as the planner knows it.

use unisono_mesh::Fold;
use unisono_plan::KeptActivations;
use unisono_plan::dispatch::DispatchShape;
use unisono_plan::engine::EngineLayout;
use unisono_plan::schedule::EngineStep;

use crate::config::{DispatchConfig, RecomputeConfig, ReduceEvery, RunConfig, WireConfig};

/// Which activations a run keeps.
pub(crate) fn kept_activations(config: &RunConfig) -> KeptActivations {
    match config.train.recompute {
        RecomputeConfig::None => KeptActivations::All,
        RecomputeConfig::Selective => KeptActivations::Products,
        RecomputeConfig::Full => KeptActivations::LayerInputs,
    }
}

/// How rows travel in a run.
pub(crate) fn dispatch_shape(config: &RunConfig) -> DispatchShape {
    DispatchShape {
        hierarchical: config.layout.dispatch == DispatchConfig::Hierarchical,
        chunks: config.layout.dispatch_chunks,
        most_rows: config.layout.dispatch_rows,
        row_block: config.train.expert_row_block,
        half: config.train.dispatch_wire == WireConfig::Bf16,
    }
}

/// A config on the ranks of a fold, of which rank r is on node `node(r)`.
pub fn engine_layout(config: &RunConfig, fold: &Fold, node: impl Fn(usize) -> usize) -> EngineLayout {
    let mut names: Vec<usize> = Vec::new();
    let mut number = |name: usize| {
        names.iter().position(|known| *known == name).unwrap_or_else(|| {
            names.push(name);
            names.len() - 1
        })
    };
    let node_of: Vec<usize> = (0..fold.ranks()).map(|rank| number(node(rank))).collect();
    let hierarchical_reduce = config.layout.hierarchical_reduce;
    EngineLayout {
        model: config.model.clone(),
        fold: *fold,
        step: EngineStep {
            waves: fold.waves(0).len(),
            turns: config.train.accumulate,
            kept: kept_activations(config),
            zero: config.layout.zero,
            overlap: config.layout.overlap,
            every_turn: config.train.reduce_every == ReduceEvery::Microbatch,
            reduce_stages: if hierarchical_reduce && names.len() > 1 { 2 } else { 1 },
        },
        node_of,
        hierarchical_reduce,
        hierarchical_gather: config.layout.hierarchical_gather,
        dispatch: dispatch_shape(config),
    }
}
