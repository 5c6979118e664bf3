//! The first 256 bytes of a shard.

use crate::tokenizer_check::LARGEST_VOCABULARY;

/// The bytes of a header.
pub(crate) const HEADER_BYTES: usize = 256;
/// The bytes of a header before its own hash.
const HASHED_BYTES: usize = 224;
const MAGIC: [u8; 8] = *b"UNISOTOK";
const VERSION: u32 = 1;
/// The bytes of a checksum.
pub(crate) const HASH_BYTES: u64 = 32;
/// The bytes of a document's end.
pub(crate) const END_BYTES: u64 = 8;
/// The block size that is written: small enough to check on the way, and 0.01% of overhead.
pub(crate) const BLOCK_BYTES: u32 = 256 << 10;

/// What a shard's header says; see the [format](super).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Every token id is below it.
    pub vocab_size: u32,
    /// The token that ends a document.
    pub eot_id: u32,
    /// The number of tokens.
    pub token_count: u64,
    /// The number of documents that end in the shard.
    pub document_count: u64,
    /// BLAKE3 of the `tokenizer.json` that made the tokens.
    pub tokenizer_hash: [u8; 32],
    /// The bytes covered by a checksum.
    pub block_bytes: u32,
    /// BLAKE3 of the checksums section.
    pub checksums_hash: [u8; 32],
}

/// Where in a header something is wrong, and what.
pub(crate) type Wrong = (u64, String);

/// The bytes a token takes: 2 or 4.
pub(crate) fn token_width(vocab_size: u32) -> u32 {
    if vocab_size <= 1 << 16 { 2 } else { 4 }
}

impl Header {
    /// The bytes a token takes: 2 or 4.
    pub fn token_width(&self) -> u32 {
        token_width(self.vocab_size)
    }

    pub(crate) fn tokens_bytes(&self) -> Option<u64> {
        self.token_count.checked_mul(u64::from(self.token_width()))
    }

    pub(crate) fn documents_bytes(&self) -> Option<u64> {
        self.document_count.checked_mul(END_BYTES)
    }

    /// The blocks of the tokens section and of the documents section.
    pub(crate) fn blocks(&self) -> Option<(u64, u64)> {
        let blocks = |bytes: u64| bytes.div_ceil(u64::from(self.block_bytes));
        Some((blocks(self.tokens_bytes()?), blocks(self.documents_bytes()?)))
    }

    /// The offsets of tokens, documents, checksums and of the end of the file.
    pub(crate) fn offsets(&self) -> Option<[u64; 4]> {
        let (token_blocks, document_blocks) = self.blocks()?;
        let tokens = HEADER_BYTES as u64;
        let documents = tokens.checked_add(self.tokens_bytes()?)?;
        let checksums = documents.checked_add(self.documents_bytes()?)?;
        let bytes = token_blocks.checked_add(document_blocks)?.checked_mul(HASH_BYTES)?;
        Some([tokens, documents, checksums, checksums.checked_add(bytes)?])
    }

    /// The header as it stands in the file. `None` when the counts overflow a file.
    pub(crate) fn to_bytes(&self) -> Option<[u8; HEADER_BYTES]> {
        let mut bytes = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&MAGIC);
        for field in [VERSION, self.token_width(), self.vocab_size, self.eot_id] {
            put(&field.to_le_bytes());
        }
        put(&self.token_count.to_le_bytes());
        put(&self.document_count.to_le_bytes());
        put(&self.tokenizer_hash);
        put(&self.block_bytes.to_le_bytes());
        put(&[0; 4]);
        for offset in self.offsets()? {
            put(&offset.to_le_bytes());
        }
        put(&self.checksums_hash);
        let hash = blake3::hash(&bytes[..HASHED_BYTES]);
        bytes[HASHED_BYTES..].copy_from_slice(hash.as_bytes());
        Some(bytes)
    }

    /// Reads and checks a header against the length of its file.
    pub(crate) fn from_bytes(bytes: &[u8; HEADER_BYTES], file_bytes: u64) -> Result<Self, Wrong> {
        if bytes[..8] != MAGIC {
            return Err((0, "it does not begin with UNISOTOK: not a token shard".into()));
        }
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
        let hash_at = |at: usize| std::array::from_fn(|byte| bytes[at + byte]);
        if u32_at(8) != VERSION {
            return Err((
                8,
                format!("version {} is unknown: this program reads version {VERSION}", u32_at(8)),
            ));
        }
        if blake3::hash(&bytes[..HASHED_BYTES]) != hash_at(HASHED_BYTES) {
            return Err((
                HASHED_BYTES as u64,
                "the header does not match its checksum: the file is damaged".into(),
            ));
        }
        let header = Self {
            vocab_size: u32_at(16),
            eot_id: u32_at(20),
            token_count: u64_at(24),
            document_count: u64_at(32),
            tokenizer_hash: hash_at(40),
            block_bytes: u32_at(72),
            checksums_hash: hash_at(112),
        };
        header.check(file_bytes)?;
        // All other bytes follow from the fields, so one comparison covers them.
        let canonical = header.to_bytes().ok_or_else(|| (24, "the counts overflow".to_string()))?;
        match bytes.iter().zip(&canonical).position(|(found, right)| found != right) {
            None => Ok(header),
            Some(at) => Err((at as u64, "the value contradicts the counts of the header".into())),
        }
    }

    fn check(&self, file_bytes: u64) -> Result<(), Wrong> {
        if !(1..=LARGEST_VOCABULARY).contains(&self.vocab_size) {
            return Err((16, format!("vocab_size {} is not in 1..={LARGEST_VOCABULARY}", self.vocab_size)));
        }
        if self.eot_id >= self.vocab_size {
            return Err((20, format!("eot_id {} is not below vocab_size {}", self.eot_id, self.vocab_size)));
        }
        if self.token_count == 0 {
            return Err((24, "token_count is 0".into()));
        }
        if self.document_count > self.token_count {
            return Err((32, format!("{} documents in {} tokens", self.document_count, self.token_count)));
        }
        if !self.block_bytes.is_power_of_two() || !(1 << 12..=1 << 24).contains(&self.block_bytes) {
            return Err((
                72,
                format!("block_bytes {} is not a power of two in 4096..=16777216", self.block_bytes),
            ));
        }
        match self.offsets() {
            Some([.., end]) if end == file_bytes => Ok(()),
            Some([.., end]) => {
                Err((104, format!("the file has {file_bytes} bytes, the header tells of {end}")))
            }
            None => Err((24, "the counts overflow".into())),
        }
    }
}
