//! Shard files: one dense shard or expert block each, as valid safetensors, written durably.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use blake3::{Hash, Hasher};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::manifest::{Dtype, MAX_MANIFEST_BYTES, SHARD_SUFFIX, TensorInfo, check_shard_name, hex_hash};
use crate::storage::Storage;

/// Bytes hashed and written at a time: both hashes of a chunk are taken while it is in the cache.
const CHUNK: usize = 256 << 10;
/// Small pieces are gathered up to this size before they are written.
const BUFFER: usize = 1 << 20;

/// Elements `range` of a logical tensor, to be written.
#[derive(Clone, Debug)]
pub struct Piece<'a> {
    /// Name of the whole tensor, the same on every rank and layout.
    pub tensor: &'a str,
    /// Type of the elements.
    pub dtype: Dtype,
    /// Shape of the whole tensor.
    pub shape: &'a [u64],
    /// The elements that this piece holds, counted in row-major order over the whole tensor.
    pub range: Range<u64>,
    /// Their bytes, little-endian: `(end - start) * dtype.size()` of them.
    pub bytes: &'a [u8],
}

impl Piece<'_> {
    fn info(&self) -> TensorInfo {
        TensorInfo { name: self.tensor.to_string(), dtype: self.dtype, shape: self.shape.to_vec() }
    }

    fn check(&self, info: &TensorInfo) -> std::result::Result<(), String> {
        info.check()?;
        let (Range { start, end }, len) = (&self.range, info.len());
        if start > end || *end > len {
            return Err(format!("piece {}[{start}..{end}] is outside of 0..{len}", self.tensor));
        }
        let (found, expected) = (self.bytes.len() as u64, (end - start) * self.dtype.size());
        if found != expected {
            return Err(format!("piece {}[{start}..{end}] has {found} bytes, not {expected}", self.tensor));
        }
        Ok(())
    }
}

/// What a rank tells rank 0 about a shard file it has written and synced; send it as bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardReport {
    pub(crate) file: String,
    pub(crate) bytes: u64,
    #[serde(with = "hex_hash")]
    pub(crate) blake3: Hash,
    pub(crate) pieces: Vec<ReportedPiece>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ReportedPiece {
    pub tensor: TensorInfo,
    pub start: u64,
    pub end: u64,
    pub offset: u64,
    #[serde(with = "hex_hash")]
    pub blake3: Hash,
}

impl ShardReport {
    /// The report as bytes, to be sent to rank 0.
    ///
    /// # Errors
    /// [`Error::Refused`] if it cannot be expressed, which does not happen for reports of this crate.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self).map_err(|error| Error::refused(format!("report of {}: {error}", self.file)))
    }

    /// Reads what [`ShardReport::to_bytes`] made.
    ///
    /// # Errors
    /// [`Error::Refused`] if the bytes are no report; what it claims is checked at commit.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        if bytes.len() as u64 > MAX_MANIFEST_BYTES {
            return Err(Error::refused(format!("a shard report of {} bytes is too large", bytes.len())));
        }
        serde_json::from_slice(bytes)
            .map_err(|error| Error::refused(format!("a shard report is damaged: {error}")))
    }

    /// Size of the shard file in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Writes the shard file `name` into the folder `temp` and syncs it. A file that could not be finished is
/// removed again.
pub(crate) fn write_shard(
    storage: &dyn Storage,
    temp: &Path,
    name: &str,
    step: u64,
    pieces: &[Piece<'_>],
) -> Result<ShardReport> {
    check_shard_name(name).map_err(Error::refused)?;
    let mut ordered = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let info = piece.info();
        piece.check(&info).map_err(Error::refused)?;
        ordered.push((piece, info));
    }
    // Wide elements first, so that every piece is aligned to its element size, as readers that map the
    // file expect.
    ordered.sort_by_key(|(piece, _)| std::cmp::Reverse(piece.dtype.size()));

    let file_name = format!("{name}{SHARD_SUFFIX}");
    let path = temp.join(&file_name);
    let header = header(step, &ordered)?;
    let file = storage.create_file(&path)?;
    write_contents(storage, &path, file, &header, ordered, file_name).inspect_err(|_| {
        // The first error is the one to tell; the folder is removed as a whole later if this fails, too.
        let _ = storage.remove_file(&path);
    })
}

fn write_contents(
    storage: &dyn Storage,
    path: &Path,
    file: File,
    header: &[u8],
    ordered: Vec<(&Piece<'_>, TensorInfo)>,
    file_name: String,
) -> Result<ShardReport> {
    let mut sink =
        Sink { storage, path, file, hasher: Hasher::new(), buffer: Vec::with_capacity(BUFFER), written: 0 };
    sink.put(header, None)?;
    let mut reported = Vec::with_capacity(ordered.len());
    for (piece, tensor) in ordered {
        let offset = sink.written;
        let mut hasher = Hasher::new();
        sink.put(piece.bytes, Some(&mut hasher))?;
        let Range { start, end } = piece.range;
        reported.push(ReportedPiece { tensor, start, end, offset, blake3: hasher.finalize() });
    }
    sink.flush()?;
    storage.sync_file(&sink.file, path)?;
    Ok(ShardReport { file: file_name, bytes: sink.written, blake3: sink.hasher.finalize(), pieces: reported })
}

/// The safetensors header with its length in front. Names and shapes have been checked, so that they need
/// no escapes.
fn header(step: u64, ordered: &[(&Piece<'_>, TensorInfo)]) -> Result<Vec<u8>> {
    let mut names = BTreeSet::new();
    let mut json = format!("{{\"__metadata__\":{{\"format\":\"unisono\",\"step\":\"{step}\"}}");
    let mut offset = 0;
    for (piece, info) in ordered {
        let Range { start, end } = piece.range;
        let whole = start == 0 && end == info.len();
        let name = if whole { info.name.clone() } else { format!("{}[{start}..{end}]", info.name) };
        let shape = if whole { info.shape.clone() } else { vec![end - start] };
        let after = offset + piece.bytes.len() as u64;
        let dtype = piece.dtype.name();
        write!(
            json,
            ",\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{offset},{after}]}}"
        )
        .map_err(|error| Error::refused(error.to_string()))?;
        if !names.insert(name) {
            return Err(Error::refused(format!("piece {}[{start}..{end}] is twice in one shard", info.name)));
        }
        offset = after;
    }
    json.push('}');
    let padded = json.len().next_multiple_of(8);
    let mut header = Vec::with_capacity(8 + padded);
    header.extend_from_slice(&(padded as u64).to_le_bytes());
    header.extend_from_slice(json.as_bytes());
    header.resize(8 + padded, b' ');
    Ok(header)
}

/// Hashes what it writes.
struct Sink<'a> {
    storage: &'a dyn Storage,
    path: &'a Path,
    file: File,
    hasher: Hasher,
    buffer: Vec<u8>,
    written: u64,
}

impl Sink<'_> {
    fn put(&mut self, bytes: &[u8], mut piece: Option<&mut Hasher>) -> Result<()> {
        for chunk in bytes.chunks(CHUNK) {
            self.hasher.update(chunk);
            if let Some(piece) = &mut piece {
                piece.update(chunk);
            }
            if self.buffer.len() + chunk.len() > BUFFER {
                self.flush()?;
            }
            self.buffer.extend_from_slice(chunk);
            self.written += chunk.len() as u64;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        if !self.buffer.is_empty() {
            self.storage.write(&mut self.file, self.path, &self.buffer)?;
            self.buffer.clear();
        }
        Ok(())
    }
}
