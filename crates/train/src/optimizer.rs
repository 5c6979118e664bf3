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

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;
    use unisono_mesh::tree;
    use unisono_tensor::{Cpu, NORM_CHUNK};

    /// Largest difference, relative to the largest value of the tensor.
    const TOLERANCE: f32 = 3e-6;
    /// Where a tensor lies: whole chunks of the norm, the first longer than one.
    const PLACES: [(&str, usize); 2] = [("matrix", 0), ("norm", 2 * NORM_CHUNK)];

    /// Three steps on a matrix that decays and a norm that does not, as PyTorch's AdamW and its clipping make them; see
    /// `crates/model/tests/fixtures/README.md`.
    #[test]
    fn three_steps_are_those_of_pytorch() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../model/tests/fixtures/kernels.safetensors");
        let bytes = std::fs::read(path).expect("the fixture is there");
        let file = SafeTensors::deserialize(&bytes).expect("safetensors");
        let read = |name: &str| -> Vec<f32> {
            let view = file.tensor(&format!("adamw.{name}")).expect("the tensor is there");
            view.data().as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect()
        };
        let backend = Cpu::new(2);
        let load = |what: &str| {
            let mut buffer = backend.zeros(3 * NORM_CHUNK);
            for (name, place) in PLACES {
                let values = read(&format!("{what}.{name}"));
                backend.upload(&values, buffer.slice_mut(place..place + values.len()));
            }
            buffer
        };
        let close = |what: &str, ours: &[f32], theirs: &[f32]| {
            let largest = theirs.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
            for (index, (a, b)) in ours.iter().zip(theirs).enumerate() {
                assert!((a - b).abs() <= TOLERANCE * largest, "{what}[{index}]: {a} and {b} of {largest}");
            }
        };

        let config = OptimizerConfig {
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            ..Default::default()
        };
        let runs = [(0..2 * NORM_CHUNK, true), (2 * NORM_CHUNK..3 * NORM_CHUNK, false)];
        let mut parameters = load("before");
        let (mut first, mut second) = (backend.zeros(3 * NORM_CHUNK), backend.zeros(3 * NORM_CHUNK));
        let norms = read("norms");
        assert!(norms[0] > 1.0 && norms[1] < 1.0 && norms[2] > 1.0, "clipped, not clipped, clipped");
        for (step, rate) in (1..).zip([0.01, 0.02, 0.015]) {
            let gradient = load(&format!("gradient.{step}"));
            let mut squares = Vec::new();
            backend.chunk_squares(gradient.all(), &mut squares);
            let norm = libm::sqrt(tree::sum(&squares));
            close("norm", &[norm as f32], &norms[step as usize - 1..step as usize]);
            let scalars = adamw_step(&config, rate, step, norm, 1.0);
            let (p, m, v) = (parameters.all_mut(), first.all_mut(), second.all_mut());
            backend.adamw(scalars, &runs, gradient.all(), p, m, v);
        }
        for (what, ours) in [("after", &parameters), ("first", &first), ("second", &second)] {
            for (name, place) in PLACES {
                let theirs = read(&format!("{what}.{name}"));
                close(&format!("{what}.{name}"), &ours[place..place + theirs.len()], &theirs);
            }
        }
    }
}
