//! Reading a shard in place.

use super::header::{END_BYTES, HASH_BYTES, HEADER_BYTES, Header};
use crate::error::{DataError, Result};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// What is read at a time, in bytes: on the stack, so that reading allocates nothing but the tokens.
const BUFFER_BYTES: usize = 16 << 10;

/// An open shard; see the [format](super). Only checksums (32 bytes for each 256 KiB) are held in memory.
/// Safe to read from many threads at once.
///
/// Reads go by position in the file rather than through a memory map: a file that shrinks or a disk
/// that fails while training is then an error, not a signal that ends the process.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    file: File,
    header: Header,
    header_hash: [u8; 32],
    checksums: Vec<u8>,
    /// A bit for each block that has been checked.
    checked: Vec<AtomicU64>,
}

impl Shard {
    /// Opens a shard; header and checksums section are checked, the rest when it is first used.
    ///
    /// # Errors
    /// [`DataError::Io`], [`DataError::Shard`].
    pub fn open(path: &Path) -> Result<Self> {
        let wrong = |section, (offset, problem): (u64, String)| DataError::Shard {
            path: path.to_path_buf(),
            section,
            offset,
            problem,
        };
        let file = File::open(path).map_err(DataError::io("open", path))?;
        let file_bytes = file.metadata().map_err(DataError::io("read", path))?.len();
        if file_bytes < HEADER_BYTES as u64 {
            return Err(wrong("header", (file_bytes, "the file ends inside its header".into())));
        }
        let mut bytes = [0; HEADER_BYTES];
        read_exact_at(&file, &mut bytes, 0).map_err(DataError::io("read", path))?;
        let header = Header::from_bytes(&bytes, file_bytes).map_err(|problem| wrong("header", problem))?;
        let contradiction = || wrong("header", (24, "the counts overflow".into()));
        let [_, _, start, end] = header.offsets().ok_or_else(contradiction)?;
        // At most the file's own length, as the header's check has made sure.
        let mut checksums = vec![0; (end - start) as usize];
        read_exact_at(&file, &mut checksums, start).map_err(DataError::io("read", path))?;
        if blake3::hash(&checksums) != header.checksums_hash {
            let problem = "the checksums do not match the header: the file is damaged".to_string();
            return Err(wrong("checksums", (start, problem)));
        }
        let blocks = checksums.len() as u64 / HASH_BYTES;
        let checked = (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let header_hash = std::array::from_fn(|byte| bytes[HEADER_BYTES - HASH_BYTES as usize + byte]);
        Ok(Self { path: path.to_path_buf(), file, header, header_hash, checksums, checked })
    }

    /// What the header says.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The hash of the header, which vouches for the whole file.
    pub fn header_hash(&self) -> [u8; 32] {
        self.header_hash
    }

    /// Appends the tokens of `range` (clipped to the shard) to `tokens`. Blocks not used before are checked first.
    ///
    /// # Errors
    /// [`DataError::Io`]; [`DataError::Shard`] when a block is damaged or holds a token that is not below `vocab_size`.
    pub fn read(&self, range: Range<u64>, tokens: &mut Vec<u32>) -> Result<()> {
        let range = range.start.min(self.header.token_count)..range.end.min(self.header.token_count);
        if range.is_empty() {
            return Ok(());
        }
        let width = u64::from(self.header.token_width());
        let bytes = range.start * width..range.end * width;
        let block_bytes = u64::from(self.header.block_bytes);
        for block in bytes.start / block_bytes..bytes.end.div_ceil(block_bytes) {
            self.check_block(block)?;
        }
        let mut buffer = [0; BUFFER_BYTES];
        let mut at = bytes.start;
        while at < bytes.end {
            let piece = &mut buffer[..(bytes.end - at).min(BUFFER_BYTES as u64) as usize];
            self.read_at("tokens", piece, HEADER_BYTES as u64 + at)?;
            decode_tokens(piece, width as usize, tokens);
            let first = tokens.len() - piece.len() / width as usize;
            if let Some(index) = tokens[first..].iter().position(|token| *token >= self.header.vocab_size) {
                let problem =
                    format!("token {} is not below {}", tokens[first + index], self.header.vocab_size);
                return Err(self.wrong("tokens", HEADER_BYTES as u64 + at + index as u64 * width, problem));
            }
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Checks every block, and that documents end where the documents section says and nowhere else.
    ///
    /// # Errors
    /// [`DataError::Io`], [`DataError::Shard`].
    pub fn verify(&self) -> Result<()> {
        let mut ends = Ends { shard: self, next: 0 };
        let mut tokens = Vec::new();
        let step = u64::from(self.header.block_bytes / self.header.token_width());
        for start in (0..self.header.token_count).step_by(step as usize) {
            tokens.clear();
            self.read(start..start + step, &mut tokens)?;
            for (index, _) in tokens.iter().enumerate().filter(|(_, token)| **token == self.header.eot_id) {
                ends.expect(start + index as u64 + 1)?;
            }
        }
        match ends.next == self.header.document_count {
            true => Ok(()),
            false => Err(self.wrong("documents", ends.offset(), "no end-of-text token stands there".into())),
        }
    }

    /// The bytes of the file that block `block` covers, with the name of their section.
    fn block(&self, block: u64) -> Option<(&'static str, Range<u64>)> {
        let [tokens, documents, checksums, _] = self.header.offsets()?;
        let (token_blocks, _) = self.header.blocks()?;
        let (section, bytes, index) = match block.checked_sub(token_blocks) {
            None => ("tokens", tokens..documents, block),
            Some(index) => ("documents", documents..checksums, index),
        };
        let start = bytes.start + index * u64::from(self.header.block_bytes);
        Some((section, start..bytes.end.min(start + u64::from(self.header.block_bytes))))
    }

    /// Compares a block with its checksum, once.
    fn check_block(&self, block: u64) -> Result<()> {
        let (word, bit) = (&self.checked[(block / 64) as usize], 1 << (block % 64));
        // Relaxed: the bit is all there is to see, and checking twice does no harm.
        if word.load(Ordering::Relaxed) & bit != 0 {
            return Ok(());
        }
        let Some((section, range)) = self.block(block) else {
            return Err(self.wrong("header", 24, "the counts overflow".into()));
        };
        let mut hasher = blake3::Hasher::new();
        let mut buffer = [0; BUFFER_BYTES];
        for at in range.clone().step_by(BUFFER_BYTES) {
            let piece = &mut buffer[..(range.end - at).min(BUFFER_BYTES as u64) as usize];
            self.read_at(section, piece, at)?;
            hasher.update(piece);
        }
        let right = &self.checksums[(block * HASH_BYTES) as usize..][..HASH_BYTES as usize];
        if hasher.finalize().as_bytes() != right {
            let length = range.end - range.start;
            let problem = format!("the block of {length} bytes from here does not match its checksum");
            return Err(self.wrong(section, range.start, problem));
        }
        word.fetch_or(bit, Ordering::Relaxed);
        Ok(())
    }

    fn read_at(&self, section: &'static str, bytes: &mut [u8], offset: u64) -> Result<()> {
        match read_exact_at(&self.file, bytes, offset) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(self.wrong(section, offset, "the file has become shorter since it was opened".into()))
            }
            result => result.map_err(DataError::io("read", &self.path)),
        }
    }

    fn wrong(&self, section: &'static str, offset: u64, problem: String) -> DataError {
        DataError::Shard { path: self.path.clone(), section, offset, problem }
    }
}

/// Walks the documents section beside the tokens.
struct Ends<'a> {
    shard: &'a Shard,
    next: u64,
}

impl Ends<'_> {
    fn offset(&self) -> u64 {
        let [_, documents, ..] = self.shard.header.offsets().unwrap_or_default();
        documents + self.next * END_BYTES
    }

    /// The next entry must be `end`.
    fn expect(&mut self, end: u64) -> Result<()> {
        let shard = self.shard;
        let wrong = |problem| Err(shard.wrong("documents", self.offset(), problem));
        if self.next == shard.header.document_count {
            return wrong(format!("the document that ends at token {end} is not listed"));
        }
        let (token_blocks, _) = shard.header.blocks().unwrap_or_default();
        shard.check_block(token_blocks + self.next * END_BYTES / u64::from(shard.header.block_bytes))?;
        let mut bytes = [0; END_BYTES as usize];
        shard.read_at("documents", &mut bytes, self.offset())?;
        let listed = u64::from_le_bytes(bytes);
        if listed != end {
            return wrong(format!("a document is said to end at token {listed}, but ends at {end}"));
        }
        self.next += 1;
        Ok(())
    }
}

fn decode_tokens(bytes: &[u8], width: usize, tokens: &mut Vec<u32>) {
    match width {
        2 => tokens.extend(bytes.chunks_exact(2).map(|two| u32::from(u16::from_le_bytes([two[0], two[1]])))),
        _ => tokens
            .extend(bytes.chunks_exact(4).map(|four| u32::from_le_bytes(std::array::from_fn(|i| four[i])))),
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !bytes.is_empty() {
        match file.seek_read(bytes, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => {
                bytes = &mut bytes[read..];
                offset += read as u64;
            }
        }
    }
    Ok(())
}
