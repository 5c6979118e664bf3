//! Hashes of every tensor of a run, whatever the layout: for `unisono diff` and the contract's tests.

use serde::{Deserialize, Serialize};
use unisono_comm::CommError;
use unisono_plan::{Layout, NORM_CHUNK};
use unisono_tensor::Backend;

use crate::checkpointing::{PARTS, tensors_of};
use crate::rank::RankState;

const HASH: usize = 32;

/// `hashes.jsonl`: a line a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepHashes {
    /// The step.
    pub step: u64,
    /// Name and BLAKE3 of each tensor: parameters, both moments, router biases.
    pub tensors: Vec<(String, String)>,
}

impl<B: Backend> RankState<'_, B> {
    /// Hashes of all tensors after the last step, the same on every rank and fold.
    ///
    /// A tensor's hash is BLAKE3 over the BLAKE3 hashes of its chunks (padding included), in order: chunks are hashed
    /// by their owner.
    ///
    /// # Errors
    /// If the exchange fails.
    pub fn hashes(&self) -> Result<StepHashes, CommError> {
        let shards = self.optimizer.shards();
        let mut own = Vec::new();
        for placed in self.optimizer.pieces() {
            let values = self.values_of(placed);
            for chunk in 0..placed.piece.range.len() / NORM_CHUNK {
                for part in &values {
                    let elements = &part[chunk * NORM_CHUNK..(chunk + 1) * NORM_CHUNK];
                    own.extend_from_slice(blake3::hash(bytemuck::cast_slice(elements)).as_bytes());
                }
            }
        }
        let all = self.comm.all_gather_values(&own)?;
        let mut by_chunk = vec![[0u8; 3 * HASH]; shards.chunks()];
        for (rank, bytes) in all.iter().enumerate() {
            let owned = shards.owned_chunks(rank).into_iter().flatten();
            for (chunk, hashes) in owned.zip(bytes.as_chunks::<{ 3 * HASH }>().0) {
                by_chunk[chunk] = *hashes;
            }
        }
        let mut tensors = Vec::new();
        for segment in &shards.segments {
            for tensor in tensors_of(self.model.layout(), segment.kind) {
                let first = segment.first_chunk + tensor.spec.offset / NORM_CHUNK;
                let chunks = &by_chunk[first..first + tensor.spec.padded / NORM_CHUNK];
                for (part, prefix) in PARTS.iter().enumerate() {
                    let mut hasher = blake3::Hasher::new();
                    for chunk in chunks {
                        hasher.update(&chunk[part * HASH..(part + 1) * HASH]);
                    }
                    tensors
                        .push((format!("{prefix}{}", tensor.name), hasher.finalize().to_hex().to_string()));
                }
            }
        }
        for layer in self.model.layout().moe_layers() {
            let bias = self.parameters.bias(Layout::layer_unit(layer));
            let hash = blake3::hash(bytemuck::cast_slice(bias)).to_hex().to_string();
            tensors.push((format!("layers.{layer}.router_bias"), hash));
        }
        Ok(StepHashes { step: self.progress.step, tensors })
    }
}
