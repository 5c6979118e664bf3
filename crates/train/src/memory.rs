//! Memory before the first step: estimated, and refused with a remedy where it cannot fit.

use unisono_comm::Place;
use unisono_mesh::{Fold, tree};
use unisono_plan::{MemoryEstimate, StepMemory};

use crate::config::{RecomputeConfig, RunConfig};
use crate::engine_layout::engine_layout;
use crate::error::TrainError;
use crate::system::{available_memory, readable};

/// What a process needs besides its ranks: the corpus and its tokenizer, code, stacks.
const PROCESS_BYTES: u64 = 96 << 20;

/// Tokens whose logits a rank's head computes at once, in memory that is no buffer's.
const HEAD_TOKENS: usize = 256;

/// The estimate of every rank; rank r is on node `node_of[r]`.
pub fn estimate_all(config: &RunConfig, fold: &Fold, node_of: &[usize]) -> Vec<MemoryEstimate> {
    let layout = engine_layout(config, fold, |rank| node_of[rank]);
    let ranks = StepMemory::of_ranks(&layout, slot_rows(config), 0..fold.ranks());
    ranks.iter().map(StepMemory::estimate).collect()
}

/// Rows of one slot in one accumulation step.
pub(crate) fn slot_rows(config: &RunConfig) -> usize {
    config.train.micro_batch * config.train.sequence_length
}

/// Refuses a run that cannot fit into the machine's free memory; `place` says how much of the run is here.
///
/// # Errors
/// [`TrainError::Memory`] with what would help.
pub fn check_fits(
    config: &RunConfig,
    fold: &Fold,
    estimates: &[MemoryEstimate],
    place: &Place,
) -> Result<(), TrainError> {
    // Which ranks are here matters little: the largest may be.
    let mut ranks: Vec<u64> = estimates.iter().map(MemoryEstimate::total).collect();
    ranks.sort_unstable_by(|a, b| b.cmp(a));
    let here = place.ranks_here(fold.ranks());
    let logits = HEAD_TOKENS.min(slot_rows(config)) * config.model.vocab_size * size_of::<f32>();
    let ranks = ranks.iter().take(here).sum::<u64>() + (here * logits) as u64;
    let needed = PROCESS_BYTES * place.processes_here() as u64 + ranks;
    let Some(available) = available_memory() else { return Ok(()) };
    if needed <= available {
        return Ok(());
    }
    let parts =
        estimates.iter().max_by_key(|estimate| estimate.total()).map_or_else(Vec::new, MemoryEstimate::parts);
    let largest = parts.iter().max_by_key(|(_, bytes)| *bytes).map_or("", |(name, _)| name);
    let remedy = match largest {
        "activations" if config.train.recompute != RecomputeConfig::Full => "set train.recompute=full, or a smaller \
             train.micro_batch with more train.accumulate (another computation, the same batch)"
            .to_string(),
        "activations" => "lower train.micro_batch and raise train.accumulate, or train.sequence_length".to_string(),
        "imbalance" if config.layout.dispatch_rows > 0 => "lower layout.dispatch_rows".to_string(),
        "imbalance" => "set layout.dispatch_rows, which bounds the rows that a rank's experts receive at once".to_string(),
        "gradients" => format!(
            "folding {} slots onto a rank keeps their accumulators: set layout.zero=2, lower grid.expert_group, or spread \
             the run over more machines",
            fold.slots_per_rank()
        ),
        _ => "the model itself is too large for this machine: lower model.num_experts or model.hidden_size, or spread \
             the run over more machines"
            .to_string(),
    };
    Err(TrainError::Memory { needed: readable(needed), available: readable(available), remedy })
}

/// Partial sums that a rank of a fold sends for its dense gradients: 1 for aligned folds.
pub fn dense_roots(fold: &Fold, rank: usize) -> usize {
    tree::roots(fold.slots_of(rank), fold.grid().slots()).len()
}
