//! Durable sharded checkpoints by logical coordinate.
//!
//! A checkpoint of a step is a set of named *pieces*: a piece holds the elements `start..end` of one
//! logical tensor. Which rank writes which piece depends on the layout; a reader on any other layout asks
//! for `(tensor, element range)` and gets the bytes gathered from whichever pieces cover it. This crate
//! handles bytes and never a tensor: parameters, optimizer moments and router biases are all alike.
//!
//! # On disk
//!
//! ```text
//! checkpoints/
//!   step-000120/
//!     dense-00-of-04.safetensors       one file a dense shard or expert block; the caller groups
//!     layer003-expert007.safetensors
//!     manifest.json                    {"blake3": "<of the body's bytes>", "body": {...}}
//! ```
//!
//! Shard files are valid safetensors, so that any tool can open them; a piece that is not the whole tensor
//! is called `name[start..end]` there and has one dimension. Reading goes by the manifest alone (sizes,
//! offsets and BLAKE3 hashes of files and pieces) and never parses a safetensors header. All numbers are
//! little-endian.
//!
//! # What a crash leaves
//!
//! Ranks write and fsync their files in a hidden temporary folder. The manifest is written and fsynced
//! last, then one rename makes the folder visible under its name and an fsync of the parent makes that
//! durable. So a folder named `step-NNNNNN` is always whole, and [`latest`] needs no pointer file: it is the
//! newest step whose manifest and files verify. Left-over temporary folders are removed at the next
//! [`Writer::begin`] or [`clean`].
//!
//! A run has an epoch number, one higher after each restart. It is part of every manifest and every
//! temporary folder's name, and a writer of an older epoch cannot commit once a newer one has begun.
//!
//! # Example
//!
//! ```
//! use unisono_checkpoint::{Dtype, Piece, Reader, SaveId, Writer, latest};
//! # let folder = tempfile::tempdir()?;
//! # let dir = folder.path().join("checkpoints");
//! let writer = Writer::begin(&dir, SaveId { run_id: "demo".into(), epoch: 1, step: 120 })?;
//! // Each rank has a `ShardWriter` of its own (`ShardWriter::join`) and sends its reports to rank 0.
//! let bytes = [1.0f32, 2.0, 3.0, 4.0].map(f32::to_le_bytes).concat();
//! let mut reports = Vec::new();
//! for (rank, half) in bytes.chunks(8).enumerate() {
//!     let start = 2 * rank as u64;
//!     let piece = Piece { tensor: "norm.weight", dtype: Dtype::F32, shape: &[4], range: start..start + 2, bytes: half };
//!     reports.push(writer.shards().write_shard(&format!("dense-{rank:02}-of-02"), &[piece])?);
//! }
//! writer.commit(reports, serde_json::json!({"tokens": 4096}))?;
//!
//! let step = latest(&dir, &|| ())?.step.expect("just committed");
//! let reader = Reader::open(&dir, step)?;
//! assert_eq!(reader.read("norm.weight", 1..3)?, bytes[4..12]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod compare;
mod error;
mod folder;
mod manifest;
mod reader;
mod retention;
mod shard;
mod storage;
mod writer;

#[cfg(test)]
mod crash_tests;

pub use blake3::Hash;
pub use compare::{Difference, ElementValue, compare, tensor_hash};
pub use error::{Error, Result};
pub use folder::{Latest, Listed, Summary, Verified, latest, list, verify};
pub use manifest::{Dtype, TensorInfo};
pub use reader::Reader;
pub use retention::{Kept, clean, keep_last};
pub use shard::{Piece, ShardReport};
pub use writer::{Committed, SaveId, ShardWriter, Writer};
