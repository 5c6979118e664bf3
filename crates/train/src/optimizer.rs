//! AdamW with its states sharded over ranks (ZeRO-1): reduce-scatter gradients, update the shard, all-gather
//! parameters. One rank takes the same path.

use std::ops::Range;
use std::sync::Arc;

use unisono_comm::{CommError, Communicator, Gatherer, Part, Reducer};
use unisono_model::{Parameters, Profile};
use unisono_plan::Layout;
use unisono_tensor::{AdamW, Backend, Buffer};

use crate::config::OptimizerConfig;
use crate::gradients::GradientFold;
use crate::norm::sum_over_chunks;
use crate::shards::{Piece, SegmentKind, Shards};

/// One rank's share of the optimizer.
pub struct ShardedAdamW<B: Backend> {
    backend: B,
    shards: Shards,
    pieces: Vec<PlacedPiece>,
    first: B::Buf,
    second: B::Buf,
    reducer: Reducer,
    dense: Gather,
    experts: Gather,
    comm: Communicator,
}

/// A piece of the shard, where its parameters lie, and which of its elements decay.
#[derive(Debug, Clone)]
pub struct PlacedPiece {
    /// The piece.
    pub piece: Piece,
    /// First element in the dense or the expert buffer.
    pub place: usize,
    runs: Vec<(Range<usize>, bool)>,
}

struct Gather {
    gatherer: Gatherer,
    /// Which pieces it sends.
    pieces: Vec<usize>,
}

/// A reduced gradient and its norm.
pub struct Reduced<H> {
    gradient: H,
    /// The global norm, in f64.
    pub norm: f64,
}

impl<B: Backend> ShardedAdamW<B> {
    /// Zeroed states for the rank that `comm` (the world) speaks for; `held` are the experts whose parameters it holds.
    ///
    /// # Errors
    /// If the plan of the exchange does not fit the communicator.
    pub fn new(
        backend: B,
        layout: &Layout,
        shards: Shards,
        held: &[usize],
        comm: Communicator,
    ) -> Result<Self, CommError> {
        let place = |kind: SegmentKind| match kind {
            SegmentKind::Dense => 0,
            SegmentKind::Expert { moe_layer, expert } => {
                let index = held.binary_search(&expert).unwrap_or(0);
                (moe_layer * held.len() + index) * layout.expert_len()
            }
        };
        let pieces: Vec<PlacedPiece> = shards
            .pieces(comm.rank())
            .into_iter()
            .map(|piece| PlacedPiece {
                place: place(piece.kind) + piece.range.start,
                runs: decay_runs(layout, &piece),
                piece,
            })
            .collect();
        let gather = |dense: bool| {
            let (plan, segments) = shards.gather_plan(dense, place);
            let sent = pieces.iter().enumerate().filter(|(_, p)| segments.contains(&p.piece.segment));
            Ok::<_, CommError>(Gather {
                gatherer: plan.compile(&comm)?,
                pieces: sent.map(|(index, _)| index).collect(),
            })
        };
        let (dense, experts) = (gather(true)?, gather(false)?);
        let len = shards.owned_len(comm.rank());
        Ok(Self {
            first: backend.zeros(len),
            second: backend.zeros(len),
            reducer: shards.reduce_plan().compile(&comm)?,
            backend,
            shards,
            pieces,
            dense,
            experts,
            comm,
        })
    }

    /// The cut over ranks.
    pub fn shards(&self) -> &Shards {
        &self.shards
    }

    /// The pieces this rank owns.
    pub fn pieces(&self) -> &[PlacedPiece] {
        &self.pieces
    }

    /// First and second moments of the shard.
    pub fn moments(&self) -> (&B::Buf, &B::Buf) {
        (&self.first, &self.second)
    }

    /// The same, for a restart.
    pub fn moments_mut(&mut self) -> (&mut B::Buf, &mut B::Buf) {
        (&mut self.first, &mut self.second)
    }

    /// Reduces all gradients to this rank's shard and finds the global norm. `fault`, for tests, changes one
    /// element of rank 0's shard.
    ///
    /// # Errors
    /// If an exchange fails.
    pub fn reduce(
        &self,
        gradients: GradientFold<B>,
        fault: Option<(usize, fn(f32) -> f32)>,
        profile: &Profile,
    ) -> Result<Reduced<B::Host>, CommError> {
        let roots = gradients.into_roots(&self.shards);
        let out = self.backend.alloc_host(self.shards.owned_len(self.comm.rank()));
        let reduced = profile.communicate("reduce gradients", || self.reducer.reduce_scatter(&roots, out));
        let mut reduced = reduced?;
        drop(roots);
        if let (Some((element, change)), 0) = (fault, self.comm.rank()) {
            reduced.as_mut()[element] = change(reduced.as_ref()[element]);
        }
        let gradient = self.backend.take_from_host(reduced);
        let mut squares = Vec::with_capacity(gradient.len() / unisono_plan::NORM_CHUNK);
        profile.compute("gradient norm", || self.backend.chunk_squares(gradient.all(), &mut squares));
        let squares =
            profile.communicate("gradient norm", || sum_over_chunks(&self.comm, &self.shards, &squares))?;
        let norm = libm::sqrt(squares);
        Ok(Reduced { gradient: self.backend.hand_to_host(gradient), norm })
    }

    /// Updates the shard and hands the new parameters to all ranks that hold them.
    ///
    /// # Errors
    /// If an exchange fails.
    pub fn update(
        &mut self,
        reduced: Reduced<B::Host>,
        step: AdamW,
        parameters: &mut Parameters<B>,
        profile: &Profile,
    ) -> Result<(), CommError> {
        let gradient = self.backend.take_from_host(reduced.gradient);
        profile.compute("optimizer", || self.update_shard(&gradient, step, parameters));
        drop(gradient);
        profile.communicate("gather parameters", || {
            let dense = replace(&self.backend, &mut parameters.dense);
            parameters.dense = self.gather(&self.dense, dense)?;
            let experts = replace(&self.backend, &mut parameters.experts);
            parameters.experts = self.gather(&self.experts, experts)?;
            Ok(())
        })
    }

    fn update_shard(&mut self, gradient: &B::Buf, step: AdamW, parameters: &mut Parameters<B>) {
        for PlacedPiece { piece, place, runs } in &self.pieces {
            let shard = piece.offset..piece.offset + piece.range.len();
            let target = match piece.kind {
                SegmentKind::Dense => &mut parameters.dense,
                SegmentKind::Expert { .. } => &mut parameters.experts,
            };
            self.backend.adamw(
                step,
                runs,
                gradient.slice(shard.clone()),
                target.slice_mut(*place..*place + piece.range.len()),
                self.first.slice_mut(shard.clone()),
                self.second.slice_mut(shard),
            );
        }
    }

    fn gather(&self, gather: &Gather, whole: B::Buf) -> Result<B::Buf, CommError> {
        let mut send = self.backend.alloc(gather.gatherer.shard_len());
        let mut next = 0;
        for PlacedPiece { piece, place, .. } in gather.pieces.iter().map(|index| &self.pieces[*index]) {
            let len = piece.range.len();
            self.backend.copy(whole.slice(*place..*place + len), send.slice_mut(next..next + len));
            next += len;
        }
        let send = Part::whole(Arc::new(self.backend.hand_to_host(send)));
        let whole = gather.gatherer.all_gather(send, self.backend.hand_to_host(whole))?;
        Ok(self.backend.take_from_host(whole))
    }
}

/// Moves a buffer out for a call that hands it back.
fn replace<B: Backend>(backend: &B, buffer: &mut B::Buf) -> B::Buf {
    std::mem::replace(buffer, backend.alloc(0))
}

/// Runs of a piece with and without weight decay, relative to its start. Padding is zero and stays zero.
fn decay_runs(layout: &Layout, piece: &Piece) -> Vec<(Range<usize>, bool)> {
    if piece.kind != SegmentKind::Dense {
        return vec![(0..piece.range.len(), true)];
    }
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    for tensor in layout.dense_tensors() {
        let shared =
            unisono_mesh::shard::overlap(&(tensor.offset..tensor.offset + tensor.padded), &piece.range);
        if shared.is_empty() {
            continue;
        }
        let run = shared.start - piece.range.start..shared.end - piece.range.start;
        match runs.last_mut() {
            Some((last, decay)) if *decay == tensor.decay => last.end = run.end,
            _ => runs.push((run, tensor.decay)),
        }
    }
    runs
}

/// The scalars of one AdamW step, computed in f64 and rounded once. `step` counts updates, the first is 1.
pub fn adamw_step(
    optimizer: &OptimizerConfig,
    learning_rate: f64,
    step: u64,
    norm: f64,
    clip_norm: f64,
) -> AdamW {
    let correction = |beta: f64| 1.0 / (1.0 - libm::pow(beta, step as f64));
    let clip = if clip_norm > 0.0 && norm > clip_norm { clip_norm / norm } else { 1.0 };
    AdamW {
        learning_rate: learning_rate as f32,
        beta1: optimizer.beta1 as f32,
        beta2: optimizer.beta2 as f32,
        epsilon: optimizer.epsilon as f32,
        weight_decay: optimizer.weight_decay as f32,
        correction1: correction(optimizer.beta1) as f32,
        correction2: correction(optimizer.beta2) as f32,
        gradient_scale: clip as f32,
    }
}
