//! AdamW with its states in shards (ZeRO-1): a rank updates the parameters whose gradients it has reduced. One rank
//! takes the same path.

use std::ops::Range;
use std::rc::Rc;

use unisono_comm::{CommError, Communicator};
use unisono_model::Profile;
use unisono_plan::{Layout, Piece, SegmentKind, Shards};
use unisono_tensor::{AdamW, Backend, Buffer};

use crate::config::OptimizerConfig;
use crate::norm::sum_over_chunks;
use crate::parameters::ShardedParameters;

/// One rank's share of the optimizer.
pub struct ShardedAdamW<B: Backend> {
    backend: B,
    shards: Rc<Shards>,
    pieces: Vec<PlacedPiece>,
    first: B::Buf,
    second: B::Buf,
    comm: Communicator,
}

/// A piece of the shard, where its values lie, and which of its elements decay.
#[derive(Debug, Clone)]
pub struct PlacedPiece {
    /// The piece.
    pub piece: Piece,
    /// Its first element in what the rank keeps of the unit's parameters.
    pub place: usize,
    /// Its first element in the moments.
    pub moment: usize,
    runs: Vec<(Range<usize>, bool)>,
}

impl<B: Backend> ShardedAdamW<B> {
    /// Zeroed states for the rank that `comm` (the world) speaks for.
    pub fn new(
        backend: B,
        layout: &Layout,
        shards: Rc<Shards>,
        parameters: &ShardedParameters<B>,
        comm: Communicator,
    ) -> Self {
        let mut moment = 0;
        let mut pieces = Vec::new();
        for piece in shards.pieces(comm.rank()) {
            let len = piece.range.len();
            let (place, runs) = (parameters.place(&piece), decay_runs(layout, &piece));
            pieces.push(PlacedPiece { piece, place, moment, runs });
            moment += len;
        }
        Self { first: backend.zeros(moment), second: backend.zeros(moment), backend, shards, pieces, comm }
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

    /// The global norm of the reduced gradient, in f64; `gradients` are this rank's shards, by unit.
    ///
    /// # Errors
    /// If the exchange fails.
    pub fn norm(&self, gradients: &[B::Buf], profile: &Profile) -> Result<f64, CommError> {
        let mut squares = Vec::new();
        profile.compute("gradient norm", || {
            gradients.iter().for_each(|shard| self.backend.chunk_squares(shard.all(), &mut squares));
        });
        let sum =
            profile.communicate("gradient norm", || sum_over_chunks(&self.comm, &self.shards, &squares))?;
        Ok(libm::sqrt(sum))
    }

    /// Updates the shard, and the parameters of all ranks that hold it whole.
    ///
    /// # Errors
    /// If an exchange fails.
    pub fn update(
        &mut self,
        gradients: &[B::Buf],
        step: AdamW,
        parameters: &mut ShardedParameters<B>,
        profile: &Profile,
    ) -> Result<(), CommError> {
        let Self { backend, pieces, first, second, .. } = self;
        parameters.update(|unit, values| {
            profile.compute("optimizer", || {
                let of_unit = pieces.iter().filter(|placed| placed.piece.unit == unit);
                for PlacedPiece { piece, place, moment, runs } in of_unit {
                    let len = piece.range.len();
                    backend.adamw(
                        step,
                        runs,
                        gradients[unit].slice(piece.offset..piece.offset + len),
                        values.slice_mut(*place..*place + len),
                        first.slice_mut(*moment..*moment + len),
                        second.slice_mut(*moment..*moment + len),
                    );
                }
            });
        })
    }
}

/// Runs of a piece with and without weight decay, relative to its start. Padding is zero and stays zero.
fn decay_runs(layout: &Layout, piece: &Piece) -> Vec<(Range<usize>, bool)> {
    let SegmentKind::Dense { unit } = piece.kind else {
        return vec![(0..piece.range.len(), true)];
    };
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    for tensor in layout.unit_tensors(unit) {
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
