//! From text files to token shards.

use crate::dataset::Part;
use crate::durable::{PARTIAL_SUFFIX, read_at_most, write_file};
use crate::error::{DataError, Result};
use crate::input::{self, Sink};
use crate::manifest::{MANIFEST_FILE, Manifest, PartEntry, ShardEntry, TOKENIZER_FILE, TokenizerEntry, hex};
use crate::pieces::{Dealer, Piece, Split};
use crate::shard::ShardWriter;
use crate::tokenizer::Tokenizer;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// How much text is encoded at a time, in bytes, over all threads.
const BATCH_BYTES: usize = 4 << 20;
/// The ending of shard names.
const SHARD_SUFFIX: &str = ".tokens";

/// What the input files hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InputFormat {
    /// JSON lines for names that end in `.jsonl`, `.ndjson` or `.json`, text otherwise (with the separator, if given).
    ByName {
        /// What stands between the documents of a text file.
        separator: Option<String>,
    },
    /// UTF-8 text: one document a file, or several with `separator` between them; line breaks next to
    /// a separator belong to it.
    Text {
        /// What stands between documents.
        separator: Option<String>,
    },
    /// One document a line, `{"text": "..."}`; other fields are passed over.
    JsonLines,
}

/// How [`prepare()`] goes about it.
#[derive(Clone, Debug, PartialEq)]
pub struct PrepareOptions {
    /// What the input files hold.
    pub format: InputFormat,
    /// How text is divided into training and validation parts.
    pub split: Split,
    /// A shard is full at this many tokens (at least 1); the last of a part may hold fewer.
    pub max_shard_tokens: u64,
    /// How many threads encode. The result does not depend on it.
    pub threads: usize,
}

impl Default for PrepareOptions {
    /// Format by name without separator, one chunk in twenty for validation, 100 million tokens a shard,
    /// one thread.
    fn default() -> Self {
        Self {
            format: InputFormat::ByName { separator: None },
            split: Split::Chunks { share: 0.05 },
            max_shard_tokens: 100_000_000,
            threads: 1,
        }
    }
}

/// How far [`prepare()`] is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes read from the inputs.
    pub bytes_read: u64,
    /// Bytes of all inputs.
    pub bytes_total: u64,
    /// Documents written, in both parts.
    pub documents: u64,
    /// Tokens written, in both parts.
    pub tokens: u64,
}

/// Turns `inputs`, in their order, into a dataset in the folder `out_dir`: token shards, a copy of the tokenizer and
/// `dataset.json`, which comes last and makes the folder a dataset. The same inputs and options give the same bytes.
/// `progress` is told how far it is after every few megabytes of text. Memory: some ten megabytes and the
/// longest line of JSON lines, whatever the inputs' size.
///
/// The folder is made where it does not exist. What an earlier run that did not come to its end left there is
/// removed, and so is what this run wrote when it fails.
///
/// # Errors
/// [`DataError::Input`] names file and line of malformed input; [`DataError::Request`] for options that make no sense or
/// a folder that already holds a dataset; [`DataError::EmptyPart`]; [`DataError::Io`]; [`DataError::Coding`].
pub fn prepare(
    inputs: &[PathBuf],
    tokenizer: &Tokenizer,
    out_dir: &Path,
    options: &PrepareOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Manifest> {
    check_options(inputs, options)?;
    let mut bytes_total = 0_u64;
    for input in inputs {
        bytes_total += fs::metadata(input).map_err(DataError::io("read", input))?.len();
    }
    let is_new = !out_dir.exists();
    make_room(out_dir, tokenizer)?;
    let mut write = |piece_bytes: usize| {
        let job = Job { inputs, tokenizer, out_dir, options, piece_bytes, bytes_total };
        let result = job.write(progress);
        if result.is_err() {
            // The first error is the one to tell.
            let _ = remove_leftovers(out_dir);
        }
        result
    };
    let mut result = write(options.split.piece_bytes());
    if let (Err(DataError::EmptyPart { .. }), Some(smaller)) =
        (&result, options.split.smaller_piece_bytes(bytes_total))
    {
        result = write(smaller);
    }
    if result.is_err() && is_new {
        let _ = fs::remove_dir(out_dir);
    }
    result
}

/// Removes what a [`prepare()`] that was interrupted has left in `out_dir`, and the folder if nothing else is in it. A
/// whole dataset stays.
///
/// # Errors
/// [`DataError::Io`].
pub fn discard_unfinished(out_dir: &Path) -> Result<()> {
    if !out_dir.exists() || out_dir.join(MANIFEST_FILE).exists() {
        return Ok(());
    }
    remove_leftovers(out_dir)?;
    // It may hold files of others.
    let _ = fs::remove_dir(out_dir);
    Ok(())
}

fn check_options(inputs: &[PathBuf], options: &PrepareOptions) -> Result<()> {
    let refuse = |problem: &str| Err(DataError::Request(problem.into()));
    if inputs.is_empty() {
        return refuse("no input file is given");
    }
    if options.max_shard_tokens == 0 {
        return refuse("max_shard_tokens is 0: it must be at least 1");
    }
    match &options.format {
        InputFormat::ByName { separator: Some(s) } | InputFormat::Text { separator: Some(s) }
            if s.is_empty() =>
        {
            refuse("the separator is empty: leave it out for one document a file")
        }
        InputFormat::ByName { separator: Some(_) } if inputs.iter().all(|input| is_named_json(input)) => {
            refuse(
                "a separator is for text, and all inputs are JSON lines by their names: leave it out, or name the format",
            )
        }
        _ => options.split.check(),
    }
}

/// Makes the folder, or clears one that holds an unfinished dataset. Files of others stay.
fn make_room(out_dir: &Path, tokenizer: &Tokenizer) -> Result<()> {
    fs::create_dir_all(out_dir).map_err(DataError::io("create", out_dir))?;
    if out_dir.join(MANIFEST_FILE).exists() {
        let folder = out_dir.display();
        return Err(DataError::Request(format!(
            "{folder} already holds a dataset: remove it or name another folder"
        )));
    }
    let copy = out_dir.join(TOKENIZER_FILE);
    match read_at_most(&copy, tokenizer.json().len() as u64) {
        Ok(Some(bytes)) if bytes == tokenizer.json() => {}
        Ok(_) => {
            let path = copy.display();
            return Err(DataError::Request(format!("{path} is another tokenizer: name another folder")));
        }
        Err(DataError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    remove_leftovers(out_dir)
}

/// Removes shards, and files that were not finished, by their names.
fn remove_leftovers(out_dir: &Path) -> Result<()> {
    for entry in fs::read_dir(out_dir).map_err(DataError::io("read", out_dir))? {
        let entry = entry.map_err(DataError::io("read", out_dir))?;
        let name = entry.file_name();
        let name = name.to_str().unwrap_or_default();
        let whole = name.strip_suffix(PARTIAL_SUFFIX);
        let ours =
            is_shard_name(whole.unwrap_or(name)) || matches!(whole, Some(TOKENIZER_FILE | MANIFEST_FILE));
        if ours {
            fs::remove_file(entry.path()).map_err(DataError::io("remove", &entry.path()))?;
        }
    }
    Ok(())
}

fn shard_name(part: Part, number: usize) -> String {
    format!("{}-{number:05}{SHARD_SUFFIX}", part.name())
}

fn is_shard_name(name: &str) -> bool {
    Part::ALL.iter().any(|part| {
        let number = name.strip_prefix(part.name()).and_then(|rest| rest.strip_prefix('-'));
        let number = number.and_then(|rest| rest.strip_suffix(SHARD_SUFFIX));
        number.is_some_and(|digits| digits.len() >= 5 && digits.bytes().all(|b| b.is_ascii_digit()))
    })
}

/// One way to write a dataset.
struct Job<'a> {
    inputs: &'a [PathBuf],
    tokenizer: &'a Tokenizer,
    out_dir: &'a Path,
    options: &'a PrepareOptions,
    piece_bytes: usize,
    bytes_total: u64,
}

impl Job<'_> {
    fn write(&self, progress: &mut dyn FnMut(Progress)) -> Result<Manifest> {
        let Self { inputs, tokenizer, out_dir, options, piece_bytes, bytes_total } = *self;
        let parts = Part::ALL.map(|part| PartWriter {
            folder: out_dir,
            tokenizer,
            part,
            max_shard_tokens: options.max_shard_tokens,
            shard: None,
            documents: 0,
            entry: PartEntry::default(),
        });
        let mut preparation = Preparation {
            assembler: Assembler::new(tokenizer, options.split, options.threads, Parts { parts }),
            bytes: Progress { bytes_total, ..Progress::default() },
            progress,
        };
        for input in inputs {
            read_input(input, &options.format, piece_bytes, &mut preparation)?;
        }
        preparation.assembler.flush()?;
        preparation.tell();
        let text_bytes = preparation.assembler.text_bytes;
        let [mut train, mut validation] = preparation.assembler.finish()?.parts;
        train.end_shard()?;
        validation.end_shard()?;
        check_parts(&train.entry, &validation.entry, options.split)?;
        write_file(&out_dir.join(TOKENIZER_FILE), tokenizer.json())?;
        let entry = TokenizerEntry {
            file: TOKENIZER_FILE.into(),
            blake3: hex(&tokenizer.hash()),
            vocab_size: tokenizer.vocab_size(),
            end_of_text: tokenizer.end_of_text().into(),
            end_of_text_id: tokenizer.eot_id(),
        };
        let manifest = Manifest::new(entry, options.split, text_bytes, [train.entry, validation.entry]);
        write_file(&out_dir.join(MANIFEST_FILE), &manifest.to_json())?;
        Ok(manifest)
    }
}

fn is_named_json(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    ["jsonl", "ndjson", "json"].iter().any(|json| extension.eq_ignore_ascii_case(json))
}

fn read_input(path: &Path, format: &InputFormat, piece_bytes: usize, sink: &mut dyn Sink) -> Result<()> {
    match format {
        InputFormat::JsonLines => input::read_json_lines(path, piece_bytes, sink),
        InputFormat::ByName { .. } if is_named_json(path) => input::read_json_lines(path, piece_bytes, sink),
        InputFormat::ByName { separator } | InputFormat::Text { separator } => {
            input::read_text(path, separator.as_deref(), piece_bytes, sink)
        }
    }
}

fn check_parts(train: &PartEntry, validation: &PartEntry, split: Split) -> Result<()> {
    let remedy = match split {
        Split::None => "the inputs hold no text",
        Split::Documents { .. } => {
            "there are too few documents to divide by hash: divide by chunks (without --by-document), use more text, or hold \
             nothing back (--validation 0)"
        }
        Split::Chunks { .. } => {
            "there is too little text for this share: use more text, another share, or hold nothing back (--validation 0)"
        }
    };
    let empty = [(Part::Train, train), (Part::Validation, validation)].into_iter().find(|(part, entry)| {
        entry.shards.is_empty() && !(*part == Part::Validation && split == Split::None)
    });
    match empty {
        None => Ok(()),
        Some((part, _)) => Err(DataError::EmptyPart { part: part.name(), remedy }),
    }
}

/// Where the tokens of documents go.
pub(crate) trait TokenSink {
    /// Whether a part's tokens are to be made.
    fn wants(&self, _part: Part) -> bool {
        true
    }

    fn push(&mut self, part: Part, tokens: &[u32]) -> Result<()>;
    fn end_document(&mut self, part: Part) -> Result<()>;
}

/// Turns pieces of documents into tokens of parts: deals the pieces out, encodes them by batches, and ends a
/// document of a part where the text's document ends or goes on in the other part.
pub(crate) struct Assembler<'a, S> {
    tokenizer: &'a Tokenizer,
    threads: usize,
    dealer: Dealer,
    batch: Vec<(Part, Piece)>,
    batch_bytes: usize,
    /// The part whose document is under way.
    open: Option<Part>,
    text_bytes: u64,
    sink: S,
}

impl<'a, S: TokenSink> Assembler<'a, S> {
    pub(crate) fn new(tokenizer: &'a Tokenizer, split: Split, threads: usize, sink: S) -> Self {
        let (dealer, batch) = (Dealer::new(split), Vec::new());
        Self { tokenizer, threads, dealer, batch, batch_bytes: 0, open: None, text_bytes: 0, sink }
    }

    pub(crate) fn push(&mut self, piece: Piece) -> Result<()> {
        self.batch_bytes += piece.text.len();
        self.text_bytes += piece.text.len() as u64;
        self.batch.push((self.dealer.part(&piece), piece));
        if self.batch_bytes >= BATCH_BYTES { self.flush() } else { Ok(()) }
    }

    pub(crate) fn finish(mut self) -> Result<S> {
        self.flush()?;
        Ok(self.sink)
    }

    fn flush(&mut self) -> Result<()> {
        let batch = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        let wanted = batch.iter().filter(|(part, _)| self.sink.wants(*part));
        let texts: Vec<&str> = wanted.map(|(_, piece)| piece.text.as_str()).collect();
        let mut encoded = self.tokenizer.encode_batch(&texts, self.threads)?.into_iter();
        for (part, piece) in &batch {
            if let Some(open) = self.open.filter(|open| open != part) {
                self.end_document(open)?;
            }
            if self.sink.wants(*part) {
                self.sink.push(*part, &encoded.next().unwrap_or_default())?;
            }
            if piece.last {
                self.end_document(*part)?;
            }
            self.open = (!piece.last).then_some(*part);
        }
        Ok(())
    }

    fn end_document(&mut self, part: Part) -> Result<()> {
        if self.sink.wants(part) { self.sink.end_document(part) } else { Ok(()) }
    }
}

/// An [`Assembler`] onto shards that tells how far it is.
struct Preparation<'a, 'p> {
    assembler: Assembler<'a, Parts<'a>>,
    bytes: Progress,
    progress: &'p mut dyn FnMut(Progress),
}

impl Sink for Preparation<'_, '_> {
    fn piece(&mut self, piece: Piece) -> Result<()> {
        self.assembler.push(piece)?;
        if self.assembler.batch.is_empty() {
            self.tell();
        }
        Ok(())
    }

    fn read(&mut self, bytes: u64) {
        self.bytes.bytes_read += bytes;
    }
}

impl Preparation<'_, '_> {
    fn tell(&mut self) {
        let parts = &self.assembler.sink.parts;
        let documents = parts.iter().map(|part| part.documents).sum();
        let tokens = parts.iter().map(PartWriter::tokens).sum();
        (self.progress)(Progress { documents, tokens, ..self.bytes });
    }
}

struct Parts<'a> {
    parts: [PartWriter<'a>; 2],
}

impl TokenSink for Parts<'_> {
    fn push(&mut self, part: Part, tokens: &[u32]) -> Result<()> {
        self.parts[part as usize].push(tokens)
    }

    fn end_document(&mut self, part: Part) -> Result<()> {
        self.parts[part as usize].end_document()
    }
}

/// Writes the stream of a part as shards.
struct PartWriter<'a> {
    folder: &'a Path,
    tokenizer: &'a Tokenizer,
    part: Part,
    max_shard_tokens: u64,
    shard: Option<ShardWriter>,
    documents: u64,
    /// The finished shards.
    entry: PartEntry,
}

impl PartWriter<'_> {
    fn push(&mut self, mut tokens: &[u32]) -> Result<()> {
        while !tokens.is_empty() {
            let max = self.max_shard_tokens;
            let shard = self.shard()?;
            let room = max - shard.token_count();
            let (now, later) = tokens.split_at(tokens.len().min(usize::try_from(room).unwrap_or(usize::MAX)));
            shard.push(now)?;
            tokens = later;
        }
        Ok(())
    }

    fn end_document(&mut self) -> Result<()> {
        self.documents += 1;
        self.shard()?.end_document()
    }

    /// A shard with room for at least one token.
    fn shard(&mut self) -> Result<&mut ShardWriter> {
        if self.shard.as_ref().is_some_and(|shard| shard.token_count() >= self.max_shard_tokens) {
            self.end_shard()?;
        }
        let shard = match self.shard.take() {
            Some(shard) => shard,
            None => {
                let name = shard_name(self.part, self.entry.shards.len());
                ShardWriter::create(&self.folder.join(name), self.tokenizer)?
            }
        };
        Ok(self.shard.insert(shard))
    }

    fn end_shard(&mut self) -> Result<()> {
        let Some(shard) = self.shard.take() else { return Ok(()) };
        let file = shard_name(self.part, self.entry.shards.len());
        let (header, header_hash) = shard.finish()?;
        self.entry.tokens += header.token_count;
        self.entry.documents += header.document_count;
        self.entry.shards.push(ShardEntry {
            file,
            tokens: header.token_count,
            documents: header.document_count,
            header_hash: hex(&header_hash),
        });
        Ok(())
    }

    fn tokens(&self) -> u64 {
        self.entry.tokens + self.shard.as_ref().map_or(0, ShardWriter::token_count)
    }
}
