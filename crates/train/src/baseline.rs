//! One training step synchronised three ways: whole gradients to one reducer, tensor by tensor over parameter servers,
//! and the engine's own.
//!
//! The first two replicate every expert on every rank, as data parallelism in the MapReduce and parameter-server
//! tradition does; the third shards experts, dispatches tokens and shards the optimizer.

use std::ops::Range;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use unisono_comm::{CommError, Communicator, Ledger, Part, ThreadRanks};
use unisono_data::Dataset;
use unisono_mesh::{Fold, Grid};
use unisono_model::Profile;
use unisono_plan::{Layout, SegmentKind};
use unisono_tensor::{Backend, Buffer, Cpu};

use crate::config::RunConfig;
use crate::crew::lending;
use crate::error::TrainError;
use crate::optimizer::adamw_step;
use crate::rank::RankState;
use crate::run::root_cause;
use crate::ways::DISPATCH_CALLS;

/// How gradients and parameters are synchronised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Synchronisation {
    /// Every rank sends its whole gradient to rank 0, which sums, updates and broadcasts.
    MapReduce,
    /// Each tensor has a server among the ranks; every rank pushes its gradient and pulls the parameters.
    ParameterServer,
    /// Experts sharded with all-to-all dispatch; reduce-scatter, sharded update, all-gather.
    Unisono,
}

/// What one way took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BaselineMeasured {
    /// The way.
    pub synchronisation: Synchronisation,
    /// Ranks.
    pub ranks: usize,
    /// Bytes that the busiest rank sends and receives in a step.
    pub busiest_rank_bytes: u64,
    /// Bytes that all ranks send in a step.
    pub total_bytes: u64,
    /// Those of them that bring rows to experts and back, which only the third way has.
    pub dispatched_bytes: u64,
    /// Median seconds of a step.
    pub step_s: f64,
    /// Median seconds of it that rank 0 spent synchronising and, for the third way, dispatching.
    pub communication_s: f64,
}

/// Measures one way at `ranks` ranks, one replica a rank, over `steps` steps after one to warm up.
///
/// # Errors
/// If the config cannot be run with that many replicas.
pub fn bench_baseline(
    config: &RunConfig,
    dataset: &Dataset,
    synchronisation: Synchronisation,
    ranks: usize,
    steps: usize,
) -> Result<BaselineMeasured, TrainError> {
    let mut config = config.clone();
    let expert_group = if synchronisation == Synchronisation::Unisono { ranks } else { 1 };
    config.grid = Grid { replicas: ranks, expert_group, ..Grid::default() };
    config.validate()?;
    let fold = Fold::new(config.grid, ranks)?;
    let (threads, crew) = lending(ThreadRanks::new(ranks), ranks);
    let body = |comm: Communicator| {
        let backend = Cpu::in_crew(1, &crew, comm.rank());
        run_rank(&config, dataset, backend, synchronisation, fold, steps, comm)
    };
    let outcomes = threads.run(body).map_err(root_cause)?;
    let mut ledger = Ledger::default();
    outcomes.iter().for_each(|outcome| ledger.merge(&outcome.ledger));
    let per_step = |bytes: u64| bytes / steps as u64;
    let busiest = ledger.busiest_rank().map_or(0, |rank| rank.bytes_sent + rank.bytes_received);
    let total = ledger.ranks.iter().map(|rank| rank.bytes_sent).sum();
    Ok(BaselineMeasured {
        synchronisation,
        ranks,
        busiest_rank_bytes: per_step(busiest),
        total_bytes: per_step(total),
        dispatched_bytes: per_step(ledger.sent_in(&DISPATCH_CALLS)),
        step_s: median(&outcomes[0].steps),
        communication_s: median(&outcomes[0].communication),
    })
}

struct Outcome {
    ledger: Ledger,
    steps: Vec<f64>,
    communication: Vec<f64>,
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn run_rank(
    config: &RunConfig,
    dataset: &Dataset,
    backend: Cpu,
    synchronisation: Synchronisation,
    fold: Fold,
    steps: usize,
    comm: Communicator,
) -> Result<Outcome, TrainError> {
    let profile = Profile::new(Instant::now());
    let mut state = RankState::new(config, dataset, backend, fold, comm.clone(), profile)?;
    let mut before = comm.ledger();
    let mut outcome = Outcome { ledger: Ledger::default(), steps: Vec::new(), communication: Vec::new() };
    for turn in 0..=steps {
        if turn == 1 {
            before = comm.ledger();
        }
        let begin = Instant::now();
        let communication = match synchronisation {
            Synchronisation::Unisono => {
                let record = state.step()?;
                record.communication_share * record.step_s
            }
            _ => central_step(&mut state, &comm, synchronisation)?,
        };
        if turn > 0 {
            outcome.steps.push(begin.elapsed().as_secs_f64());
            outcome.communication.push(communication);
        }
    }
    outcome.ledger = comm.ledger().since(&before);
    Ok(outcome)
}

/// A step whose gradients are summed at servers; seconds spent on that.
fn central_step(
    state: &mut RankState<'_, Cpu>,
    comm: &Communicator,
    synchronisation: Synchronisation,
) -> Result<f64, TrainError> {
    let step = state.progress().step + 1;
    let roots = state.accumulate_for_bench(step)?.into_roots();
    let begin = Instant::now();
    let tensors = split_tensors(state, roots);
    let servers: Vec<usize> = match synchronisation {
        Synchronisation::MapReduce => vec![0; tensors.len()],
        _ => (0..tensors.len()).map(|index| index % comm.size()).collect(),
    };
    let mut updated: Vec<(SegmentKind, Range<usize>, Vec<f32>)> = Vec::with_capacity(tensors.len());
    for (index, (tensor, server)) in tensors.iter().zip(&servers).enumerate() {
        let parameters = push_and_update(state, comm, tensor, *server, index)?;
        updated.push((tensor.segment, tensor.range.clone(), parameters));
    }
    state.parameters.fill(|segment, range| {
        let mut values = vec![0.0; range.len()];
        for (_, range, parameters) in updated.iter().filter(|(kind, ..)| *kind == segment) {
            values[range.clone()].copy_from_slice(parameters);
        }
        Ok::<_, CommError>(values)
    })?;
    Ok(begin.elapsed().as_secs_f64())
}

/// One message's worth of gradient, and which elements of which segment it is.
struct Tensor {
    gradient: Part<f32>,
    segment: SegmentKind,
    range: Range<usize>,
    unit: usize,
    /// Where its parameters start in the unit.
    place: usize,
}

fn split_tensors(state: &RankState<'_, Cpu>, roots: Vec<(SegmentKind, Vec<Part<f32>>)>) -> Vec<Tensor> {
    let mut tensors = Vec::new();
    let layout = state.model().layout();
    for (segment, roots) in roots {
        let Some(root) = roots.first() else { continue };
        let tensor = |unit: usize, start: usize, range: Range<usize>| Tensor {
            gradient: root.slice(range.clone()),
            segment,
            unit,
            place: start + range.start,
            range,
        };
        match segment {
            SegmentKind::Dense { unit } => {
                tensors
                    .extend(layout.unit_tensors(unit).into_iter().map(|spec| tensor(unit, 0, spec.range())));
            }
            // Every rank holds every expert.
            SegmentKind::Expert { moe_layer, expert } => {
                let unit = Layout::layer_unit(layout.moe_layers().start + moe_layer);
                let start = layout.unit_len(unit) + expert * layout.expert_len();
                tensors.push(tensor(unit, start, 0..layout.expert_len()));
            }
        }
    }
    tensors
}

/// Every rank's gradient goes to the server, which adds them in rank order, updates, and sends the parameters back.
fn push_and_update(
    state: &mut RankState<'_, Cpu>,
    comm: &Communicator,
    tensor: &Tensor,
    server: usize,
    tag: usize,
) -> Result<Vec<f32>, CommError> {
    let len = tensor.range.len();
    let tag = tag as u32;
    let mut parameters = state.parameters.read(tensor.unit, tensor.place..tensor.place + len);
    if comm.rank() != server {
        comm.send(server, tag, tensor.gradient.clone())?;
        return comm.broadcast(server, parameters);
    }
    let backend = state.model().backend().clone();
    let mut sum = comm_copy(comm, tensor, server, tag, len)?;
    for from in (0..comm.size()).filter(|rank| *rank != server) {
        let received = comm.recv(from, tag, vec![0.0f32; len], 0..len)?;
        backend.add(&mut sum, &received);
    }
    let scalars = adamw_step(&state.config().optimizer, 1e-4, 1, 1.0, 0.0);
    let (mut first, mut second) = (backend.zeros(len), backend.zeros(len));
    backend.adamw(scalars, &[(0..len, true)], &sum, &mut parameters, first.all_mut(), second.all_mut());
    comm.broadcast(server, parameters)
}

/// The server's own gradient, out of the shared buffer.
fn comm_copy(
    comm: &Communicator,
    tensor: &Tensor,
    server: usize,
    tag: u32,
    len: usize,
) -> Result<Vec<f32>, CommError> {
    comm.shift(server, tensor.gradient.clone(), server, vec![0.0f32; len], 0..len, tag | 1 << 31)
}
