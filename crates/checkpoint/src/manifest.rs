//! The manifest: which tensors a checkpoint has, in which pieces, in which files, with which hashes.
//!
//! A manifest comes from outside and is believed only as far as it is checked here: its own hash, then
//! every size, name, offset and the exact cover of every tensor by pieces, before anything is allocated
//! by its numbers.

use std::cmp::Ordering;
use std::fmt;

use blake3::Hash;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

/// The manifest's file name inside a step's folder.
pub(crate) const MANIFEST_FILE: &str = "manifest.json";
/// What a shard file's name ends with.
pub(crate) const SHARD_SUFFIX: &str = ".safetensors";
/// A larger manifest is refused unread: about 200,000 pieces fit.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 32 << 20;
/// The caller's own state is meant to be small.
pub(crate) const MAX_EXTRA_BYTES: usize = 1 << 20;

const FORMAT: &str = "unisono-checkpoint";
const VERSION: u32 = 1;
const MAX_NAME_BYTES: usize = 256;
const MAX_DIMS: usize = 8;

/// The type of a tensor's elements, stored little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Dtype {
    /// 64-bit IEEE float.
    F64,
    /// 32-bit IEEE float.
    F32,
    /// 16-bit brain float.
    BF16,
    /// 64-bit signed integer.
    I64,
    /// 32-bit signed integer.
    I32,
    /// 64-bit unsigned integer.
    U64,
    /// 32-bit unsigned integer.
    U32,
    /// Byte.
    U8,
}

impl Dtype {
    /// Size of one element in bytes.
    pub fn size(self) -> u64 {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::BF16 => 2,
            Self::U8 => 1,
        }
    }

    /// The name in safetensors headers and manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::BF16 => "BF16",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::U64 => "U64",
            Self::U32 => "U32",
            Self::U8 => "U8",
        }
    }
}

/// A logical tensor, whole, whatever pieces it is cut into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorInfo {
    /// Name, unique in the checkpoint.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Sizes of its dims; none for a scalar.
    #[serde(deserialize_with = "bounded_shape")]
    pub shape: Vec<u64>,
}

impl TensorInfo {
    /// Number of elements.
    pub fn len(&self) -> u64 {
        // Checked when the tensor entered the manifest, so saturation never happens.
        self.shape.iter().fold(1, |product, &size| product.saturating_mul(size))
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Checks name and size. The product of the dims and the size in bytes must be representable.
    pub(crate) fn check(&self) -> Result<(), String> {
        check_tensor_name(&self.name)?;
        let Self { name, shape, .. } = self;
        if shape.len() > MAX_DIMS {
            return Err(format!("tensor {name} has {} dims, at most {MAX_DIMS} are supported", shape.len()));
        }
        let bytes = shape.iter().try_fold(self.dtype.size(), |product, &size| product.checked_mul(size));
        // A zero may hide an overflow of the other dims; refuse that, too.
        let nonzero = shape.iter().filter(|&&size| size > 0);
        let bound =
            nonzero.into_iter().try_fold(self.dtype.size(), |product, &size| product.checked_mul(size));
        match (bytes, bound) {
            (Some(_), Some(bound)) if bound <= i64::MAX as u64 => Ok(()),
            _ => Err(format!("tensor {name} of shape {shape:?} has more bytes than can be addressed")),
        }
    }
}

/// Elements `start..end` of a tensor and where they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PieceEntry {
    /// Index into [`Body::tensors`].
    pub tensor: u32,
    pub start: u64,
    pub end: u64,
    /// Offset in the file, in bytes.
    pub offset: u64,
    #[serde(with = "hex_hash")]
    pub blake3: Hash,
}

/// One shard file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileEntry {
    pub name: String,
    pub bytes: u64,
    #[serde(with = "hex_hash")]
    pub blake3: Hash,
    /// Ascending by offset, not overlapping.
    pub pieces: Vec<PieceEntry>,
}

/// What the manifest says, under its hash.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Body {
    pub format: String,
    pub version: u32,
    pub run_id: String,
    pub epoch: u64,
    pub step: u64,
    /// Ascending by name.
    pub tensors: Vec<TensorInfo>,
    /// Ascending by name.
    pub files: Vec<FileEntry>,
    /// The caller's own state, kept as text until its size is checked.
    pub extra: Box<RawValue>,
}

/// The two fields that every version of the format has.
#[derive(Deserialize)]
struct Kind {
    format: String,
    version: u32,
}

/// Where a piece is listed. The index has those that hold elements, ordered by (tensor, start): they do not
/// overlap, so that a lookup is one binary search.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PieceRef {
    pub tensor: u32,
    pub file: u32,
    pub piece: u32,
    pub start: u64,
}

/// A checked manifest.
#[derive(Debug)]
pub(crate) struct Manifest {
    pub body: Body,
    pub extra: serde_json::Value,
    pub index: Vec<PieceRef>,
}

const PREFIX: &[u8] = b"{\"blake3\":\"";
const MIDDLE: &[u8] = b"\",\"body\":";
const SUFFIX: &[u8] = b"}\n";
const HEX: usize = 64;

impl Manifest {
    /// Puts a manifest together from sorted parts and checks it as a reader would.
    pub fn new(
        run_id: String,
        epoch: u64,
        step: u64,
        tensors: Vec<TensorInfo>,
        files: Vec<FileEntry>,
        extra: serde_json::Value,
    ) -> Result<Self, String> {
        let text = serde_json::to_string(&extra).map_err(|error| format!("extra state: {error}"))?;
        let raw = RawValue::from_string(text).map_err(|error| format!("extra state: {error}"))?;
        let format = FORMAT.to_string();
        let body = Body { format, version: VERSION, run_id, epoch, step, tensors, files, extra: raw };
        Self::checked(body)
    }

    /// The manifest as it is stored: one JSON object whose `blake3` covers the exact bytes of `body`.
    pub fn encode(&self) -> Result<Vec<u8>, String> {
        let body = serde_json::to_vec(&self.body).map_err(|error| error.to_string())?;
        let hash = blake3::hash(&body).to_hex();
        let bytes = [PREFIX, hash.as_bytes(), MIDDLE, &body, SUFFIX].concat();
        if bytes.len() as u64 > MAX_MANIFEST_BYTES {
            let found = bytes.len();
            return Err(format!(
                "the manifest has {found} bytes, at most {MAX_MANIFEST_BYTES} are supported"
            ));
        }
        Ok(bytes)
    }

    /// Reads what [`Manifest::encode`] wrote. The hash is checked before the body is parsed.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let body = Self::verified_body(bytes)?;
        let kind: Kind = serde_json::from_slice(body).map_err(|error| error.to_string())?;
        if kind.format != FORMAT {
            return Err("it is not a checkpoint manifest".to_string());
        }
        if kind.version != VERSION {
            return Err(format!("it has format version {}, this program reads {VERSION}", kind.version));
        }
        Self::checked(serde_json::from_slice(body).map_err(|error| error.to_string())?)
    }

    fn verified_body(bytes: &[u8]) -> Result<&[u8], String> {
        let frame = || "it is cut short or not framed as a manifest".to_string();
        let rest = bytes.strip_prefix(PREFIX).ok_or_else(frame)?;
        let (hex, rest) = rest.split_at_checked(HEX).ok_or_else(frame)?;
        let rest = rest.strip_prefix(MIDDLE).ok_or_else(frame)?;
        let body = rest.strip_suffix(SUFFIX).ok_or_else(frame)?;
        let found = blake3::hash(body).to_hex();
        if found.as_bytes() != hex {
            return Err(format!("its body has BLAKE3 {found}, not the recorded one"));
        }
        Ok(body)
    }

    fn checked(body: Body) -> Result<Self, String> {
        if body.extra.get().len() > MAX_EXTRA_BYTES {
            let found = body.extra.get().len();
            return Err(format!(
                "the extra state has {found} bytes, at most {MAX_EXTRA_BYTES} are supported"
            ));
        }
        let extra =
            serde_json::from_str(body.extra.get()).map_err(|error| format!("extra state: {error}"))?;
        if body.run_id.is_empty() || body.run_id.len() > MAX_NAME_BYTES {
            return Err(format!("the run id must have 1 to {MAX_NAME_BYTES} bytes"));
        }
        for tensor in &body.tensors {
            tensor.check()?;
        }
        if let Some(pair) = body.tensors.windows(2).find(|pair| pair[0].name >= pair[1].name) {
            return Err(format!("tensor {} is listed twice or out of order", pair[1].name));
        }
        for file in &body.files {
            check_file(file, &body.tensors)?;
        }
        if let Some(pair) = body.files.windows(2).find(|pair| pair[0].name >= pair[1].name) {
            return Err(format!("file {} is listed twice or out of order", pair[1].name));
        }
        let index = index(&body);
        check_cover(&body, &index)?;
        Ok(Self { body, extra, index })
    }

    /// Position of a tensor in the body's list.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.body.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()
    }

    /// The piece that an index entry stands for, with its file's position.
    pub fn piece(&self, entry: PieceRef) -> (usize, &PieceEntry) {
        let file = entry.file as usize;
        (file, &self.body.files[file].pieces[entry.piece as usize])
    }
}

/// Checks a shard's name (without suffix): one plain path component, the same on every file system.
pub(crate) fn check_shard_name(name: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    if name.is_empty() || name.len() > 128 || name.starts_with('.') || !name.bytes().all(plain) {
        return Err(format!(
            "shard name {name:?} must be 1 to 128 of A-Z a-z 0-9 . _ - and not begin with a dot"
        ));
    }
    Ok(())
}

/// Tensor names go into safetensors headers unescaped, with `[start..end]` behind them.
fn check_tensor_name(name: &str) -> Result<(), String> {
    let allowed = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\' | b'[' | b']');
    let fits = !name.is_empty() && name.len() <= MAX_NAME_BYTES && name != "__metadata__";
    if fits && name.bytes().all(allowed) {
        return Ok(());
    }
    let shown: String = name.chars().take(64).collect();
    Err(format!(
        "tensor name {shown:?} must be 1 to {MAX_NAME_BYTES} printable ASCII characters without \" \\ [ ]"
    ))
}

fn check_file(file: &FileEntry, tensors: &[TensorInfo]) -> Result<(), String> {
    let name = &file.name;
    let stem =
        name.strip_suffix(SHARD_SUFFIX).ok_or_else(|| format!("file {name:?} is not {SHARD_SUFFIX}"))?;
    check_shard_name(stem)?;
    let mut free = 0;
    for piece in &file.pieces {
        let Some(tensor) = tensors.get(piece.tensor as usize) else {
            return Err(format!(
                "file {name} has a piece of tensor number {}, which is not listed",
                piece.tensor
            ));
        };
        let (start, end, len) = (piece.start, piece.end, tensor.len());
        if start > end || end > len {
            return Err(format!("file {name}: {}[{start}..{end}] is outside of 0..{len}", tensor.name));
        }
        // No overflow: end <= len, and the tensor's size in bytes is representable.
        let size = (end - start) * tensor.dtype.size();
        let after = piece.offset.checked_add(size).filter(|&after| after <= file.bytes);
        let Some(after) = after.filter(|_| piece.offset >= free) else {
            let (offset, bytes) = (piece.offset, file.bytes);
            let place = format!("{size} bytes at {offset} of {bytes}");
            return Err(format!(
                "file {name}: {}[{start}..{end}], {place}, leaves the file or overlaps",
                tensor.name
            ));
        };
        free = after;
    }
    Ok(())
}

fn index(body: &Body) -> Vec<PieceRef> {
    let mut index = Vec::with_capacity(body.files.iter().map(|file| file.pieces.len()).sum());
    for (file, entry) in body.files.iter().enumerate() {
        for (piece, at) in entry.pieces.iter().enumerate() {
            if at.start == at.end {
                continue;
            }
            // Fewer than 2^32 of each fit into the largest manifest.
            index.push(PieceRef {
                tensor: at.tensor,
                file: file as u32,
                piece: piece as u32,
                start: at.start,
            });
        }
    }
    index.sort_unstable_by_key(|entry| (entry.tensor, entry.start, entry.file, entry.piece));
    index
}

/// Every element of every tensor must be in exactly one piece.
fn check_cover(body: &Body, index: &[PieceRef]) -> Result<(), String> {
    let mut entries = index.iter().peekable();
    for (number, tensor) in body.tensors.iter().enumerate() {
        let mut covered = 0;
        while let Some(entry) = entries.next_if(|entry| entry.tensor as usize == number) {
            let file = &body.files[entry.file as usize];
            let piece = &file.pieces[entry.piece as usize];
            match piece.start.cmp(&covered) {
                Ordering::Equal => covered = piece.end,
                Ordering::Less => {
                    let (name, start) = (&tensor.name, piece.start);
                    return Err(format!(
                        "element {start} of tensor {name} is in two pieces, one in {}",
                        file.name
                    ));
                }
                Ordering::Greater => return Err(gap(tensor, covered, piece.start)),
            }
        }
        if covered != tensor.len() {
            return Err(gap(tensor, covered, tensor.len()));
        }
    }
    Ok(())
}

fn gap(tensor: &TensorInfo, from: u64, to: u64) -> String {
    format!(
        "elements {from}..{to} of tensor {} are in no piece; did every rank report its shards?",
        tensor.name
    )
}

/// A crafted shape of millions of dims is refused while it is read, before it takes memory.
fn bounded_shape<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
    struct Dims;

    impl<'de> Visitor<'de> for Dims {
        type Value = Vec<u64>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {MAX_DIMS} dims")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Vec<u64>, A::Error> {
            let (mut dims, mut len) = ([0; MAX_DIMS], 0);
            while let Some(dim) = sequence.next_element()? {
                *dims.get_mut(len).ok_or_else(|| A::Error::invalid_length(len + 1, &self))? = dim;
                len += 1;
            }
            Ok(dims[..len].to_vec())
        }
    }

    deserializer.deserialize_seq(Dims)
}

/// Hashes as 64 hexadecimal digits.
pub(crate) mod hex_hash {
    use blake3::Hash;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(hash: &Hash, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hash.to_hex())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Hash, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        Hash::from_hex(text.as_bytes()).map_err(serde::de::Error::custom)
    }
}
