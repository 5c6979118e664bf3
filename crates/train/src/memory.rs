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

/// Refuses a run that cannot fit into the machine's free memory. Rank r is on node `node_of[r]`; `place` says how much of the run
/// is here.
///
/// # Errors
/// [`TrainError::Memory`] with what would help.
pub fn check_fits(
    config: &RunConfig,
    fold: &Fold,
    node_of: &[usize],
    place: &Place,
) -> Result<(), TrainError> {
    let estimates = estimate_all(config, fold, node_of);
    let needed = needed(config, fold, &estimates, place);
    let Some(available) = available_memory() else { return Ok(()) };
    if needed <= available {
        return Ok(());
    }
    let parts =
        estimates.iter().max_by_key(|estimate| estimate.total()).map_or_else(Vec::new, MemoryEstimate::parts);
    let largest = parts.iter().max_by_key(|(_, bytes)| *bytes).map_or("", |(name, _)| name);
    let fits = |other: &RunConfig| {
        self::needed(other, fold, &estimate_all(other, fold, node_of), place) <= available
    };
    let remedy = match largest {
        "activations" => fewer_activations(config, fits),
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

/// Bytes of what runs here.
fn needed(config: &RunConfig, fold: &Fold, estimates: &[MemoryEstimate], place: &Place) -> u64 {
    // Which ranks are here matters little: the largest may be.
    let mut ranks: Vec<u64> = estimates.iter().map(MemoryEstimate::total).collect();
    ranks.sort_unstable_by(|a, b| b.cmp(a));
    let here = place.ranks_here(fold.ranks());
    let logits = HEAD_TOKENS.min(slot_rows(config)) * config.model.vocab_size * size_of::<f32>();
    let ranks = ranks.iter().take(here).sum::<u64>() + (here * logits) as u64;
    PROCESS_BYTES * place.processes_here() as u64 + ranks
}

/// The least change to what a step keeps that makes it fit.
fn fewer_activations(config: &RunConfig, fits: impl Fn(&RunConfig) -> bool) -> String {
    let mut other = config.clone();
    let recompute = if other.train.recompute == RecomputeConfig::Full { "" } else { "train.recompute=full " };
    other.train.recompute = RecomputeConfig::Full;
    if !recompute.is_empty() && fits(&other) {
        return format!("set {}", recompute.trim_end());
    }
    let whole = config.train.micro_batch;
    for micro_batch in (1..whole).rev().filter(|smaller| whole.is_multiple_of(*smaller)) {
        let accumulate = config.train.accumulate * (whole / micro_batch);
        (other.train.micro_batch, other.train.accumulate) = (micro_batch, accumulate);
        if fits(&other) {
            return format!(
                "set {recompute}train.micro_batch={micro_batch} train.accumulate={accumulate} (another computation, the same batch)"
            );
        }
    }
    "no recomputation and no smaller train.micro_batch makes it fit: lower train.sequence_length, \
     model.num_hidden_layers or model.hidden_size, or spread the run over more machines"
        .into()
}

/// Partial sums that a rank of a fold sends for its dense gradients: 1 for aligned folds.
pub fn dense_roots(fold: &Fold, rank: usize) -> usize {
    tree::roots(fold.slots_of(rank), fold.grid().slots()).len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_remedy_is_the_least_change_that_fits() {
        let mut config = RunConfig::default();
        (config.train.micro_batch, config.train.accumulate) = (12, 3);
        let most = |recompute: RecomputeConfig, micro_batch: usize| {
            fewer_activations(&config, move |other| {
                other.train.recompute == recompute && other.train.micro_batch <= micro_batch
            })
        };
        assert_eq!(most(RecomputeConfig::Full, 12), "set train.recompute=full");
        let said = most(RecomputeConfig::Full, 5);
        assert!(
            said.starts_with("set train.recompute=full train.micro_batch=4 train.accumulate=9 ("),
            "{said}"
        );
        assert!(most(RecomputeConfig::Full, 0).contains("lower train.sequence_length"));
        config.train.recompute = RecomputeConfig::Full;
        let said = fewer_activations(&config, |other| other.train.micro_batch == 1);
        assert!(said.starts_with("set train.micro_batch=1 train.accumulate=36 ("), "{said}");
    }
}
