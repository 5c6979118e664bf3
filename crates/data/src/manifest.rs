//! `dataset.json`: what a prepared folder holds.

use crate::durable::read_at_most;
use crate::error::{DataError, Result};
use crate::pieces::Split;
use crate::tokenizer_check::LARGEST_VOCABULARY;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The name of the manifest in its folder.
pub const MANIFEST_FILE: &str = "dataset.json";
/// The name of the tokenizer in its folder.
pub(crate) const TOKENIZER_FILE: &str = "tokenizer.json";
const FORMAT: &str = "unisono-dataset";
const VERSION: u32 = 1;
/// The largest manifest that is read, in bytes: some 100,000 shards.
const LARGEST_FILE: u64 = 32 << 20;

/// What `dataset.json` says; see the [format](crate::shard).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    version: u32,
    /// The tokenizer of all shards.
    pub tokenizer: TokenizerEntry,
    /// How the text was divided.
    pub split: Split,
    /// The UTF-8 bytes of text in all documents, end-of-text tokens not counted.
    pub text_bytes: u64,
    /// The training part.
    pub train: PartEntry,
    /// The validation part.
    pub validation: PartEntry,
}

/// The tokenizer of a dataset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerEntry {
    /// The copy of the `tokenizer.json` in the folder.
    pub file: String,
    /// Its BLAKE3 hash in hexadecimal.
    pub blake3: String,
    /// One more than its largest token id.
    pub vocab_size: u32,
    /// The token that ends a document.
    pub end_of_text: String,
    /// Its id.
    pub end_of_text_id: u32,
}

/// A part of a dataset: training or validation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartEntry {
    /// The tokens of all shards, end-of-text tokens included.
    pub tokens: u64,
    /// The documents of all shards.
    pub documents: u64,
    /// The shards in stream order.
    pub shards: Vec<ShardEntry>,
}

/// A shard of a part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// Its name in the folder.
    pub file: String,
    /// Its tokens, end-of-text tokens included.
    pub tokens: u64,
    /// The documents that end in it.
    pub documents: u64,
    /// The hash of its header in hexadecimal, which vouches for the whole file.
    pub header_hash: String,
}

impl Manifest {
    pub(crate) fn new(
        tokenizer: TokenizerEntry,
        split: Split,
        text_bytes: u64,
        [train, validation]: [PartEntry; 2],
    ) -> Self {
        Self { format: FORMAT.into(), version: VERSION, tokenizer, split, text_bytes, train, validation }
    }

    /// Reads and checks the manifest of `folder`.
    ///
    /// # Errors
    /// [`DataError::Io`], [`DataError::Manifest`].
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST_FILE);
        let wrong = |problem| DataError::Manifest { path: path.clone(), problem };
        let bytes = read_at_most(&path, LARGEST_FILE)?;
        let bytes = bytes.ok_or_else(|| wrong(format!("it has more than {LARGEST_FILE} bytes")))?;
        let manifest: Self = serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
        manifest.check().map_err(wrong)?;
        Ok(manifest)
    }

    pub(crate) fn to_json(&self) -> Vec<u8> {
        // Strings, numbers and fixed keys: there is nothing that serialising them could refuse.
        let mut json = serde_json::to_vec_pretty(self).unwrap_or_default();
        json.push(b'\n');
        json
    }

    fn check(&self) -> Result<(), String> {
        if self.format != FORMAT || self.version != VERSION {
            let (format, version) = (&self.format, self.version);
            return Err(format!("it is {format:?} version {version}: expected {FORMAT:?} version {VERSION}"));
        }
        if self.tokenizer.vocab_size > LARGEST_VOCABULARY {
            return Err(format!(
                "\"vocab_size\" {} is above {LARGEST_VOCABULARY}",
                self.tokenizer.vocab_size
            ));
        }
        self.split.check().map_err(|error| format!("\"split\": {error}"))?;
        check_name(&self.tokenizer.file)?;
        for (name, part) in [("train", &self.train), ("validation", &self.validation)] {
            part.check().map_err(|problem| format!("part {name:?}: {problem}"))?;
        }
        Ok(())
    }
}

impl PartEntry {
    fn check(&self) -> Result<(), String> {
        let sum = |count: fn(&ShardEntry) -> u64| {
            self.shards.iter().try_fold(0_u64, |sum, shard| sum.checked_add(count(shard)))
        };
        self.shards.iter().try_for_each(|shard| check_name(&shard.file))?;
        if sum(|shard| shard.tokens) != Some(self.tokens)
            || sum(|shard| shard.documents) != Some(self.documents)
        {
            return Err("its totals are not the sums over its shards".into());
        }
        Ok(())
    }
}

/// Files of a dataset lie in its folder and nowhere else.
fn check_name(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
        return Err(format!("file {name:?}: expected a plain name of letters, digits, dots and dashes"));
    }
    Ok(())
}

/// `bytes` in lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8; 32]) -> String {
    blake3::Hash::from(*bytes).to_hex().to_string()
}
