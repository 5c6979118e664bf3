//! Corpora, tokenizers, token shards and the deterministic sampler.
//!
//! From text to training sequences in four steps, each usable alone:
//!
//! 1. [`Tokenizer`] turns text into token ids and back, from any Hugging Face `tokenizer.json`;
//! 2. [`prepare()`] turns text files or JSON lines into a folder of token shards ([`shard`] gives the
//!    format) with a training and a validation part;
//! 3. [`Dataset`] cuts a part (of such a folder, or of the built-in corpus) into [`Sequence`]s
//!    whose attention is confined to a document;
//! 4. [`Sampler`] says which sequence is used where, as a pure function of (seed, step).
//!
//! What is read from outside is checked before it is believed: sizes before they are allocated,
//! checksums before tokens are used. A damaged or hostile file gives a [`DataError`] that names
//! the place, never a panic.

#![forbid(unsafe_code)]

pub mod corpus;
mod dataset;
mod durable;
mod error;
mod input;
mod manifest;
mod packing;
mod pieces;
mod prepare;
mod sampler;
pub mod shard;
mod tokenizer;
mod tokenizer_check;

pub use dataset::{Dataset, Part, Verify};
pub use error::{DataError, Result};
pub use manifest::{MANIFEST_FILE, Manifest, PartEntry, ShardEntry, TokenizerEntry};
pub use packing::{IGNORE, Sequence};
pub use pieces::Split;
pub use prepare::{InputFormat, PrepareOptions, Progress, discard_unfinished, prepare};
pub use sampler::Sampler;
pub use tokenizer::{DecodeStream, Tokenizer};
