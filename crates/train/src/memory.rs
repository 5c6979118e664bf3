//! Memory before the first step: estimated, and refused with a remedy where it cannot fit.

use unisono_comm::Place;
use unisono_mesh::Fold;
use unisono_mesh::{ExpertPlacement, tree};
use unisono_plan::{Layout, MemoryEstimate, ShardedSegment, Shards, StateShape, StepShape};

use crate::config::{LayoutConfig, RecomputeConfig, ReduceEvery, RunConfig};
use crate::engine_layout::{dispatch_shape, kept_activations};
use crate::error::TrainError;
use crate::system::{available_memory, readable};

/// What a process needs besides its ranks: the corpus and its tokenizer, code, stacks.
const PROCESS_BYTES: u64 = 96 << 20;

/// The estimate of the rank that needs most, by part.
pub fn estimate(config: &RunConfig, fold: &Fold) -> Vec<(&'static str, u64)> {
    let most = estimate_all(config, fold).into_iter().max_by_key(MemoryEstimate::total);
    most.unwrap_or_default().parts()
}

/// The estimate of every rank.
pub fn estimate_all(config: &RunConfig, fold: &Fold) -> Vec<MemoryEstimate> {
    let layout = Layout::new(&config.model);
    let shards = Shards::new(&layout, &ExpertPlacement::new(*fold, config.model.num_experts), fold);
    let step = StepShape {
        slot_rows: config.train.micro_batch * config.train.sequence_length,
        most_rows: (config.layout.dispatch_rows > 0).then_some(config.layout.dispatch_rows),
        staged: dispatch_shape(config).staged(),
        kept: kept_activations(config),
    };
    let LayoutConfig { zero, overlap, .. } = config.layout;
    let rank_estimate = |rank: usize| {
        let shared = |segment: &&ShardedSegment| zero < 3 && segment.is_shared();
        let states = StateShape {
            zero,
            turns: config.train.accumulate,
            every_turn: config.train.reduce_every == ReduceEvery::Microbatch,
            under_way: usize::from(overlap),
            ahead: overlap,
            owned: (0..shards.units()).map(|unit| shards.owned_of_unit(rank, unit)).collect(),
            sent: shards.segments.iter().filter(shared).map(|segment| segment.shards[rank].len()).sum(),
        };
        MemoryEstimate::new(&config.model, fold, rank, step, &states)
    };
    (0..fold.ranks()).map(rank_estimate).collect()
}

/// Refuses a run that cannot fit into the machine's free memory; `place` says how much of the run is here.
///
/// # Errors
/// [`TrainError::Memory`] with what would help.
pub fn check_fits(
    config: &RunConfig,
    fold: &Fold,
    parts: &[(&'static str, u64)],
    place: &Place,
) -> Result<(), TrainError> {
    // Which ranks are here matters little: the largest may be.
    let mut ranks: Vec<u64> = estimate_all(config, fold).iter().map(MemoryEstimate::total).collect();
    ranks.sort_unstable_by(|a, b| b.cmp(a));
    let ranks = ranks.iter().take(place.ranks_here(fold.ranks())).sum::<u64>();
    let needed = PROCESS_BYTES * place.processes_here() as u64 + ranks;
    let Some(available) = available_memory() else { return Ok(()) };
    if needed <= available {
        return Ok(());
    }
    let largest = parts.iter().max_by_key(|(_, bytes)| *bytes).map_or("", |(name, _)| name);
    let remedy = match largest {
        "activations" if config.train.recompute != RecomputeConfig::Full => "set train.recompute=full, or a smaller \
             train.micro_batch with more train.accumulate (another computation, the same batch)"
            .to_string(),
        "activations" => "lower train.micro_batch and raise train.accumulate, or train.sequence_length".to_string(),
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
