//! A corpus ready to train on: two streams of tokens, cut into sequences.

use crate::corpus;
use crate::error::{DataError, Result};
use crate::manifest::{MANIFEST_FILE, Manifest, PartEntry, ShardEntry, hex};
use crate::packing::{self, Sequence};
use crate::pieces::{Split, pieces_of};
use crate::prepare::{Assembler, TokenSink};
use crate::shard::Shard;
use crate::tokenizer::Tokenizer;
use std::ops::Range;
use std::path::Path;

/// A part of a dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// What is trained on.
    Train,
    /// What is held back to measure.
    Validation,
}

impl Part {
    pub(crate) const ALL: [Self; 2] = [Self::Train, Self::Validation];

    /// `train` or `validation`: the name of its files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
        }
    }
}

/// When the checksums of a dataset's blocks are compared. Never not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// All when it is opened, which reads every byte once.
    AtOpen,
    /// Each when the first token of its block is used.
    OnFirstUse,
}

/// How the built-in corpus is divided: one chunk in twenty is held back, from all over the works.
const BUILT_IN_SPLIT: Split = Split::Chunks { share: 0.05 };

/// A dataset: a tokenizer, and a stream of tokens for training and one for validation. Read-only and
/// safe to share between threads.
#[derive(Debug)]
pub struct Dataset {
    tokenizer: Tokenizer,
    streams: [Stream; 2],
    fingerprint: [u8; 32],
}

#[derive(Debug)]
struct Stream {
    documents: u64,
    tokens: u64,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Memory(Vec<u32>),
    /// Shards in order, each with the place in the stream of its first token.
    Shards(Vec<(u64, Shard)>),
}

impl Dataset {
    /// The built-in corpus, encoded by `threads` threads. The result does not depend on their number.
    ///
    /// # Errors
    /// None for an unchanged build.
    pub fn builtin(threads: usize) -> Result<Self> {
        Self::builtin_parts(&Part::ALL, threads)
    }

    /// The validation part of [`Dataset::builtin`] and an empty training part, at a twentieth of the time: text is divided
    /// before it is encoded. The fingerprint is that of what is there.
    ///
    /// # Errors
    /// None for an unchanged build.
    pub fn builtin_validation(threads: usize) -> Result<Self> {
        Self::builtin_parts(&[Part::Validation], threads)
    }

    fn builtin_parts(parts: &'static [Part], threads: usize) -> Result<Self> {
        let works = corpus::works()?.into_iter().map(|work| work.text);
        Self::in_memory(Tokenizer::builtin()?, works, parts, threads)
    }

    /// Documents in memory, cut and divided as the built-in corpus is, and encoded by `threads` threads.
    ///
    /// # Errors
    /// [`DataError::Coding`] where the tokenizer has no token for a part of a text.
    pub fn of_texts(
        tokenizer: Tokenizer,
        texts: impl IntoIterator<Item = impl AsRef<str>>,
        threads: usize,
    ) -> Result<Self> {
        Self::in_memory(tokenizer, texts, &Part::ALL, threads)
    }

    fn in_memory(
        tokenizer: Tokenizer,
        texts: impl IntoIterator<Item = impl AsRef<str>>,
        parts: &'static [Part],
        threads: usize,
    ) -> Result<Self> {
        let memory = Memory::new(tokenizer.eot_id(), parts);
        let mut assembler = Assembler::new(&tokenizer, BUILT_IN_SPLIT, threads, memory);
        for text in texts {
            pieces_of(text.as_ref(), BUILT_IN_SPLIT.piece_bytes(), &mut |piece| assembler.push(piece))?;
        }
        let streams = assembler.finish()?.streams;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&tokenizer.hash());
        for stream in &streams {
            hasher.update(&stream.tokens.to_le_bytes());
            if let Source::Memory(tokens) = &stream.source {
                tokens.iter().for_each(|token| {
                    hasher.update(&token.to_le_bytes());
                });
            }
        }
        Ok(Self { tokenizer, streams, fingerprint: *hasher.finalize().as_bytes() })
    }

    /// Tokens without meaning, for benchmarks: `tokens` uniform ids below `vocab`, all in the training part, with
    /// the built-in tokenizer beside them.
    ///
    /// # Errors
    /// If `vocab` is larger than the built-in tokenizer's.
    pub fn random(seed: u64, tokens: usize, vocab: u32) -> Result<Self> {
        let tokenizer = Tokenizer::builtin()?;
        let largest = tokenizer.vocab_size();
        if vocab == 0 || vocab > largest {
            return Err(DataError::Request(format!(
                "random tokens need a vocabulary of 1 to {largest}, not {vocab}"
            )));
        }
        let mut reader = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
        let mut word = [0; 4];
        let mut draw = || {
            reader.fill(&mut word);
            u32::from_le_bytes(word) % vocab
        };
        let train: Vec<u32> = (0..tokens).map(|_| draw()).collect();
        let stream = |tokens: Vec<u32>| Stream {
            documents: 1,
            tokens: tokens.len() as u64,
            source: Source::Memory(tokens),
        };
        let mut hasher = blake3::Hasher::new();
        for number in [seed, tokens as u64, u64::from(vocab)] {
            hasher.update(&number.to_le_bytes());
        }
        Ok(Self {
            tokenizer,
            streams: [stream(train), stream(Vec::new())],
            fingerprint: *hasher.finalize().as_bytes(),
        })
    }

    /// Opens a folder made by [`prepare`](crate::prepare()). Manifest, tokenizer and the headers of all shards are
    /// checked against each other in any case.
    ///
    /// # Errors
    /// [`DataError::Io`], [`DataError::Manifest`], [`DataError::Tokenizer`], [`DataError::Shard`].
    pub fn open(folder: &Path, verify: Verify) -> Result<Self> {
        let manifest = Manifest::read(folder)?;
        let wrong = |problem| DataError::Manifest { path: folder.join(MANIFEST_FILE), problem };
        let entry = &manifest.tokenizer;
        let tokenizer = Tokenizer::from_file(&folder.join(&entry.file), Some(&entry.end_of_text))?;
        let found = (hex(&tokenizer.hash()), tokenizer.vocab_size(), tokenizer.eot_id());
        if found != (entry.blake3.clone(), entry.vocab_size, entry.end_of_text_id) {
            return Err(wrong(format!("file {:?} is not the tokenizer that made the shards", entry.file)));
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&tokenizer.hash());
        let mut open_part = |part: &PartEntry| -> Result<Stream> {
            let stream = open_stream(folder, part, &tokenizer, &wrong)?;
            hasher.update(&stream.tokens.to_le_bytes());
            if let Source::Shards(shards) = &stream.source {
                for (_, shard) in shards {
                    hasher.update(&shard.header_hash());
                }
            }
            Ok(stream)
        };
        let streams = [open_part(&manifest.train)?, open_part(&manifest.validation)?];
        let dataset = Self { tokenizer, streams, fingerprint: *hasher.finalize().as_bytes() };
        if verify == Verify::AtOpen {
            dataset.verify()?;
        }
        Ok(dataset)
    }

    /// Reads every byte and compares it with its checksum, and document ends with end-of-text tokens.
    ///
    /// # Errors
    /// [`DataError::Io`], [`DataError::Shard`].
    pub fn verify(&self) -> Result<()> {
        for stream in &self.streams {
            if let Source::Shards(shards) = &stream.source {
                shards.iter().try_for_each(|(_, shard)| shard.verify())?;
            }
        }
        Ok(())
    }

    /// The tokenizer that made the tokens.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The tokenizer alone.
    pub fn into_tokenizer(self) -> Tokenizer {
        self.tokenizer
    }

    /// A hash of tokenizer and tokens: two runs with equal fingerprints train on the same data.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// The tokens of a part, end-of-text tokens included.
    pub fn tokens(&self, part: Part) -> u64 {
        self.stream(part).tokens
    }

    /// The documents of a part. A document divided between the parts counts once for each run of it.
    pub fn documents(&self, part: Part) -> u64 {
        self.stream(part).documents
    }

    /// The number of sequences of `sequence_length` in a part; what is left over at the end is not used.
    pub fn sequences(&self, part: Part, sequence_length: usize) -> u64 {
        packing::count(self.tokens(part), sequence_length)
    }

    /// Sequence number `index` of a part: tokens `index * sequence_length` to `(index + 1) * sequence_length` of its
    /// stream, and as targets the tokens one further on.
    ///
    /// # Errors
    /// [`DataError::Request`] when there is no such sequence; [`DataError::Io`] and [`DataError::Shard`] from the files.
    pub fn sequence(&self, part: Part, sequence_length: usize, index: u64) -> Result<Sequence> {
        let mut sequence = Sequence::default();
        self.sequence_into(part, sequence_length, index, &mut sequence)?;
        Ok(sequence)
    }

    /// As [`Dataset::sequence`], into memory that is used again: from the second call on nothing is allocated.
    ///
    /// # Errors
    /// As [`Dataset::sequence`]; what the sequence then holds is unspecified.
    pub fn sequence_into(
        &self,
        part: Part,
        sequence_length: usize,
        index: u64,
        sequence: &mut Sequence,
    ) -> Result<()> {
        let sequences = self.sequences(part, sequence_length);
        if index >= sequences {
            return Err(DataError::Request(format!(
                "there is no sequence {index}: the {} part has {sequences} of length {sequence_length}",
                part.name()
            )));
        }
        // No overflow: the index is below the number of sequences, whose tokens exist.
        let first = index * sequence_length as u64;
        sequence.inputs.clear();
        self.stream(part).read(first..first + sequence_length as u64 + 1, &mut sequence.inputs)?;
        sequence.derive(self.tokenizer.eot_id(), self.tokenizer.token_bytes());
        Ok(())
    }

    fn stream(&self, part: Part) -> &Stream {
        &self.streams[part as usize]
    }
}

impl Stream {
    /// Appends the tokens of `range`, which lies inside the stream.
    fn read(&self, range: Range<u64>, tokens: &mut Vec<u32>) -> Result<()> {
        match &self.source {
            Source::Memory(all) => tokens.extend_from_slice(&all[range.start as usize..range.end as usize]),
            Source::Shards(shards) => {
                let first = shards.partition_point(|(start, _)| *start <= range.start).saturating_sub(1);
                for (start, shard) in shards[first..].iter().take_while(|(start, _)| *start < range.end) {
                    shard.read(range.start.saturating_sub(*start)..range.end - start, tokens)?;
                }
            }
        }
        Ok(())
    }
}

fn open_stream(
    folder: &Path,
    part: &PartEntry,
    tokenizer: &Tokenizer,
    wrong: &impl Fn(String) -> DataError,
) -> Result<Stream> {
    let mut shards = Vec::new();
    let mut start = 0;
    for entry in &part.shards {
        let shard = Shard::open(&folder.join(&entry.file))?;
        check_shard(&shard, entry, tokenizer).map_err(wrong)?;
        // The manifest's check has added the same numbers up without overflow.
        let next = start + entry.tokens;
        shards.push((start, shard));
        start = next;
    }
    Ok(Stream { documents: part.documents, tokens: part.tokens, source: Source::Shards(shards) })
}

fn check_shard(shard: &Shard, entry: &ShardEntry, tokenizer: &Tokenizer) -> Result<(), String> {
    let header = shard.header();
    let file = &entry.file;
    if hex(&shard.header_hash()) != entry.header_hash
        || (header.token_count, header.document_count) != (entry.tokens, entry.documents)
    {
        return Err(format!("shard {file:?} is not the one that was written: its header differs"));
    }
    if header.tokenizer_hash != tokenizer.hash()
        || (header.vocab_size, header.eot_id) != (tokenizer.vocab_size(), tokenizer.eot_id())
    {
        return Err(format!("shard {file:?} was made by another tokenizer"));
    }
    Ok(())
}

/// Collects a dataset in memory.
struct Memory {
    eot_id: u32,
    /// Those that are collected.
    parts: &'static [Part],
    streams: [Stream; 2],
}

impl Memory {
    fn new(eot_id: u32, parts: &'static [Part]) -> Self {
        let streams =
            Part::ALL.map(|_| Stream { documents: 0, tokens: 0, source: Source::Memory(Vec::new()) });
        Self { eot_id, parts, streams }
    }
}

impl TokenSink for Memory {
    fn wants(&self, part: Part) -> bool {
        self.parts.contains(&part)
    }

    fn push(&mut self, part: Part, tokens: &[u32]) -> Result<()> {
        let stream = &mut self.streams[part as usize];
        stream.tokens += tokens.len() as u64;
        if let Source::Memory(all) = &mut stream.source {
            all.extend_from_slice(tokens);
        }
        Ok(())
    }

    fn end_document(&mut self, part: Part) -> Result<()> {
        self.streams[part as usize].documents += 1;
        self.push(part, &[self.eot_id])
    }
}
