//! Writing a shard as its tokens come.

use super::header::{BLOCK_BYTES, HASH_BYTES, HEADER_BYTES, Header, token_width};
use crate::durable::{commit, partial_path};
use crate::error::{DataError, Result};
use crate::tokenizer::Tokenizer;
use std::fs::{self, File};
use std::io::{BufWriter, Seek, Write};
use std::path::{Path, PathBuf};

/// Writes one shard; see the [format](super). The file appears under its name, whole and on disk, when
/// [`ShardWriter::finish`] returns, and never otherwise. Memory: a block, 32 bytes a block written and
/// 8 bytes a document.
#[derive(Debug)]
pub struct ShardWriter {
    path: PathBuf,
    partial: PathBuf,
    /// Taken by `finish`; what is dropped with it still in place is removed.
    file: Option<BufWriter<File>>,
    block: Vec<u8>,
    checksums: Vec<u8>,
    ends: Vec<u64>,
    token_count: u64,
    vocab_size: u32,
    eot_id: u32,
    tokenizer_hash: [u8; 32],
}

impl ShardWriter {
    /// Begins a shard at `path` for tokens of `tokenizer`.
    ///
    /// # Errors
    /// [`DataError::Io`].
    pub fn create(path: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let partial = partial_path(path);
        let mut file = BufWriter::new(File::create(&partial).map_err(DataError::io("create", &partial))?);
        file.write_all(&[0; HEADER_BYTES]).map_err(DataError::io("write", &partial))?;
        Ok(Self {
            path: path.to_path_buf(),
            partial,
            file: Some(file),
            block: Vec::with_capacity(BLOCK_BYTES as usize),
            checksums: Vec::new(),
            ends: Vec::new(),
            token_count: 0,
            vocab_size: tokenizer.vocab_size(),
            eot_id: tokenizer.eot_id(),
            tokenizer_hash: tokenizer.hash(),
        })
    }

    /// Appends tokens of the document under way.
    ///
    /// # Errors
    /// [`DataError::Io`]; [`DataError::Request`] for the end-of-text token or an id that the tokenizer does not have.
    pub fn push(&mut self, tokens: &[u32]) -> Result<()> {
        let allowed = |token: u32| token < self.vocab_size && token != self.eot_id;
        if let Some(token) = tokens.iter().find(|token| !allowed(**token)) {
            let vocab_size = self.vocab_size;
            return Err(DataError::Request(format!(
                "token {token} inside a document: it must be below {vocab_size} and not the end-of-text token"
            )));
        }
        tokens.iter().try_for_each(|token| self.push_any(*token))
    }

    /// Ends the document under way with the end-of-text token.
    ///
    /// # Errors
    /// [`DataError::Io`].
    pub fn end_document(&mut self) -> Result<()> {
        self.push_any(self.eot_id)?;
        self.ends.push(self.token_count);
        Ok(())
    }

    /// The number of tokens so far, end-of-text tokens included.
    pub fn token_count(&self) -> u64 {
        self.token_count
    }

    /// Completes the shard: the file is on disk under its name. Gives its header and the header's hash.
    ///
    /// # Errors
    /// [`DataError::Io`]; [`DataError::Request`] when no token was pushed.
    pub fn finish(mut self) -> Result<(Header, [u8; 32])> {
        self.end_block()?;
        let ends = std::mem::take(&mut self.ends);
        for end in &ends {
            self.block.extend_from_slice(&end.to_le_bytes());
            self.end_full_block()?;
        }
        self.end_block()?;
        let header = Header {
            vocab_size: self.vocab_size,
            eot_id: self.eot_id,
            token_count: self.token_count,
            document_count: ends.len() as u64,
            tokenizer_hash: self.tokenizer_hash,
            block_bytes: BLOCK_BYTES,
            checksums_hash: *blake3::hash(&self.checksums).as_bytes(),
        };
        let bytes = header.to_bytes().filter(|_| self.token_count > 0);
        let bytes =
            bytes.ok_or_else(|| DataError::Request("a token shard needs at least one token".into()))?;
        if let Some(mut writer) = self.file.take() {
            let write = || -> std::io::Result<File> {
                writer.write_all(&self.checksums)?;
                writer.rewind()?;
                writer.write_all(&bytes)?;
                writer.into_inner().map_err(std::io::IntoInnerError::into_error)
            };
            let file = write().map_err(DataError::io("write", &self.partial))?;
            commit(file, &self.partial, &self.path)?;
        }
        let hash = std::array::from_fn(|byte| bytes[HEADER_BYTES - HASH_BYTES as usize + byte]);
        Ok((header, hash))
    }

    fn push_any(&mut self, token: u32) -> Result<()> {
        let width = token_width(self.vocab_size) as usize;
        self.block.extend_from_slice(&token.to_le_bytes()[..width]);
        self.token_count += 1;
        self.end_full_block()
    }

    fn end_full_block(&mut self) -> Result<()> {
        if self.block.len() == BLOCK_BYTES as usize { self.end_block() } else { Ok(()) }
    }

    fn end_block(&mut self) -> Result<()> {
        if let (false, Some(file)) = (self.block.is_empty(), &mut self.file) {
            self.checksums.extend_from_slice(blake3::hash(&self.block).as_bytes());
            file.write_all(&self.block).map_err(DataError::io("write", &self.partial))?;
            self.block.clear();
        }
        Ok(())
    }
}

impl Drop for ShardWriter {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            // Best effort: what cannot be removed does no harm under its partial name.
            let _ = fs::remove_file(&self.partial);
        }
    }
}
