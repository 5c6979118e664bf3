//! Text to token ids and back, by a Hugging Face `tokenizer.json`.

use crate::durable::read_at_most;
use crate::error::{DataError, Result};
use crate::tokenizer_check::{self as limits, Spelling};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

/// The name of the tokenizer that comes with the crate.
const BUILT_IN: &str = "built-in";

/// A tokenizer: text to token ids and back, and what each id stands for.
///
/// Encoding adds no special tokens and reads none from the text: `<|endoftext|>` written in a
/// document is text like any other, so a document cannot end itself. Truncation, padding and
/// post-processing of the file are ignored. Cheap to clone, safe to share between threads.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    library: tokenizers::Tokenizer,
    json: Vec<u8>,
    hash: [u8; 32],
    end_of_text: String,
    eot_id: u32,
    token_bytes: Vec<u32>,
}

impl Tokenizer {
    /// The tokenizer of the built-in corpus: byte-level BPE of 4,096 tokens.
    ///
    /// # Errors
    /// None for an unchanged build: the file is part of it.
    pub fn builtin() -> Result<Self> {
        Self::from_bytes(BUILT_IN, include_bytes!("../assets/tokenizer.json"), None)
    }

    /// Reads a `tokenizer.json`. `end_of_text` names the token that ends a document; without it the
    /// usual names are tried.
    ///
    /// # Errors
    /// [`DataError::Io`], and as [`Tokenizer::from_bytes`].
    pub fn from_file(path: &Path, end_of_text: Option<&str>) -> Result<Self> {
        let name = path.display().to_string();
        match read_at_most(path, limits::LARGEST_FILE)? {
            Some(bytes) => Self::from_bytes(&name, &bytes, end_of_text),
            None => Err(unusable(&name, format!("it has more than {} bytes", limits::LARGEST_FILE))),
        }
    }

    /// As [`Tokenizer::from_file`], from the file's contents; `name` stands for it in errors.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] when the file is too large, malformed, or has no such end-of-text token.
    pub fn from_bytes(name: &str, json: &[u8], end_of_text: Option<&str>) -> Result<Self> {
        if json.len() as u64 > limits::LARGEST_FILE {
            return Err(unusable(name, format!("it has more than {} bytes", limits::LARGEST_FILE)));
        }
        limits::check(json).map_err(|problem| unusable(name, problem))?;
        let library = load(json).map_err(|problem| unusable(name, problem))?;
        let (end_of_text, eot_id) = find_end_of_text(&library, end_of_text).map_err(|p| unusable(name, p))?;
        let token_bytes = token_bytes(&library, Spelling::of(json), eot_id).map_err(|p| unusable(name, p))?;
        let hash = *blake3::hash(json).as_bytes();
        let (name, json) = (name.to_string(), json.to_vec());
        Ok(Self { inner: Arc::new(Inner { name, library, json, hash, end_of_text, eot_id, token_bytes }) })
    }

    /// The token ids of `text`, without special tokens.
    ///
    /// # Errors
    /// [`DataError::Coding`] when the tokenizer has no token for a part of the text and no
    /// stand-in, or fails on it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.guarded("encode", || {
            self.inner.library.encode_fast(text, false).map(|encoding| encoding.get_ids().to_vec())
        })?;
        match ids.iter().find(|id| **id >= self.vocab_size()) {
            None => Ok(ids),
            Some(id) => Err(self.failed("encode", format!("it gave the unknown token id {id}"))),
        }
    }

    /// The token ids of each of `texts`, in their order, worked on by `threads` threads (at least one).
    /// The result does not depend on their number.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`], for one of the texts that cannot be encoded.
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T], threads: usize) -> Result<Vec<Vec<u32>>> {
        let threads = threads.clamp(1, texts.len().max(1));
        // Neighbours go to different threads: long texts tend to stand together.
        let share = |thread: usize| -> Result<Vec<Vec<u32>>> {
            texts.iter().skip(thread).step_by(threads).map(|text| self.encode(text.as_ref())).collect()
        };
        let shares = std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|thread| scope.spawn(move || share(thread))).collect();
            let mut shares = vec![share(0)];
            for other in others {
                shares.push(other.join().unwrap_or_else(|_| {
                    Err(self.failed("encode", "a thread of the tokenizer panicked".into()))
                }));
            }
            shares.into_iter().collect::<Result<Vec<_>>>()
        })?;
        let mut shares: Vec<_> = shares.into_iter().map(Vec::into_iter).collect();
        Ok((0..texts.len()).filter_map(|index| shares[index % threads].next()).collect())
    }

    /// The text of `ids`, special tokens included. Bytes that are not UTF-8 come out as U+FFFD.
    ///
    /// # Errors
    /// [`DataError::Coding`] for an id of `vocab_size` or more, or when the tokenizer fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        if let Some(id) = ids.iter().find(|id| **id >= self.vocab_size()) {
            let problem = format!("token id {id} is not below the vocabulary size {}", self.vocab_size());
            return Err(self.failed("decode", problem));
        }
        self.guarded("decode", || self.inner.library.decode(ids, false))
    }

    /// A decoder for tokens that come one at a time.
    pub fn decode_stream(&self) -> DecodeStream {
        DecodeStream { tokenizer: self.clone(), ids: Vec::new(), done: 0 }
    }

    /// One more than the largest token id: the number of rows an embedding needs.
    pub fn vocab_size(&self) -> u32 {
        // LARGEST_VOCABULARY bounds the table.
        self.inner.token_bytes.len() as u32
    }

    /// The id of the token that ends a document.
    pub fn eot_id(&self) -> u32 {
        self.inner.eot_id
    }

    /// The token that ends a document, as written in the file.
    pub fn end_of_text(&self) -> &str {
        &self.inner.end_of_text
    }

    /// The number of UTF-8 bytes of text that each token stands for, by id: 0 for special tokens
    /// and for ids without a token. With it a loss per token becomes bits per byte:
    /// sum of losses / ln 2 / sum of bytes. For byte-level tokenizers the sum over a text's tokens is
    /// exactly its length; a tokenizer that rewrites the text (lower case, inserted spaces) counts
    /// the bytes of what it makes of it.
    pub fn token_bytes(&self) -> &[u32] {
        &self.inner.token_bytes
    }

    /// The BLAKE3 hash of the file's contents.
    pub fn hash(&self) -> [u8; 32] {
        self.inner.hash
    }

    /// The file's contents.
    pub fn json(&self) -> &[u8] {
        &self.inner.json
    }

    /// Where the tokenizer came from, for messages.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    fn failed(&self, action: &'static str, problem: String) -> DataError {
        DataError::Coding { name: self.inner.name.clone(), action, problem }
    }

    fn guarded<T>(&self, action: &'static str, work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
        // The library's only state behind shared references is a cache that tolerates a
        // poisoned lock, so going on after a panic is sound.
        match catch_unwind(AssertUnwindSafe(work)) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.failed(action, error.to_string())),
            Err(panic) => Err(self.failed(action, panic_message(panic.as_ref()))),
        }
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Tokenizer({}, {} tokens)", self.inner.name, self.vocab_size())
    }
}

fn unusable(name: &str, problem: String) -> DataError {
    DataError::Tokenizer { name: name.to_string(), problem }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("the tokenizer library gave up on it: {}", text.unwrap_or("no reason given"))
}

/// The library's tokenizer without what a training text must not meet.
fn load(json: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    let loaded = catch_unwind(|| {
        let mut library = tokenizers::Tokenizer::from_bytes(json)?;
        library.with_truncation(None)?;
        library.with_padding(None);
        library.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
        library.set_encode_special_tokens(true);
        tokenizers::Result::Ok(library)
    });
    match loaded {
        Ok(Ok(library)) => Ok(library),
        Ok(Err(error)) => Err(error.to_string()),
        Err(panic) => Err(panic_message(panic.as_ref())),
    }
}

fn find_end_of_text(library: &tokenizers::Tokenizer, name: Option<&str>) -> Result<(String, u32), String> {
    if let Some(name) = name {
        let id = library.token_to_id(name);
        return id
            .map(|id| (name.to_string(), id))
            .ok_or(format!("it has no token {name:?} to end documents"));
    }
    let known = limits::KNOWN_END_OF_TEXT.iter();
    let mut found = known.filter_map(|name| library.token_to_id(name).map(|id| (name.to_string(), id)));
    found.next().ok_or_else(|| {
        let mut special: Vec<String> =
            library.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
        special.sort_unstable();
        special.truncate(20);
        format!(
            "none of the usual end-of-text tokens is in it: name one of its own (special tokens: {special:?})"
        )
    })
}

fn token_bytes(library: &tokenizers::Tokenizer, spelling: Spelling, eot_id: u32) -> Result<Vec<u32>, String> {
    let vocabulary = library.get_vocab(true);
    let largest = vocabulary.values().copied().max().unwrap_or(0);
    if largest >= limits::LARGEST_VOCABULARY {
        return Err(format!("token id {largest} is not below {}", limits::LARGEST_VOCABULARY));
    }
    let mut bytes = vec![0; largest as usize + 1];
    for (token, id) in &vocabulary {
        bytes[*id as usize] = spelling.text_bytes(token);
    }
    for (id, token) in library.get_added_tokens_decoder() {
        // Added tokens are written as they are, whatever the spelling of the others.
        if let Some(bytes) = bytes.get_mut(id as usize) {
            *bytes = if token.special { 0 } else { token.content.len() as u32 };
        }
    }
    bytes[eot_id as usize] = 0;
    Ok(bytes)
}

/// Tokens that wait for the rest of a character; more than these cannot belong to one.
const LONGEST_WAIT: usize = 8;

/// Decodes tokens one at a time into text that never ends inside a character.
#[derive(Clone, Debug)]
pub struct DecodeStream {
    tokenizer: Tokenizer,
    /// The tokens whose text was given last, then those that still wait.
    ids: Vec<u32>,
    /// How many of `ids` have been given.
    done: usize,
}

impl DecodeStream {
    /// The text that `id` completes; empty while a character still misses bytes.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.pending()?;
        let wait = text.ends_with('\u{fffd}') && self.ids.len() - self.done < LONGEST_WAIT;
        if text.is_empty() || wait {
            return Ok(String::new());
        }
        self.ids.drain(..self.done);
        self.done = self.ids.len();
        Ok(text)
    }

    /// What is left at the end; the bytes of an incomplete character come out as U+FFFD.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String> {
        self.pending()
    }

    /// The text of the waiting tokens. Decoders look at a token's neighbours (spaces before words),
    /// so it is what they add to the text of the tokens before.
    fn pending(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.done])?;
        let all = self.tokenizer.decode(&self.ids)?;
        Ok(all.get(before.len()..).unwrap_or_default().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_ids() {
        let tokenizer = Tokenizer::builtin().unwrap();
        assert_eq!((tokenizer.vocab_size(), tokenizer.eot_id()), (4_096, 0));
        let text = "HAMLET.\nTo be, or not to be: that is the question.\n";
        let ids = tokenizer.encode(text).unwrap();
        // As the Python package `tokenizers` 0.23.3 gives them.
        let right =
            [1968, 635, 52, 14, 199, 410, 305, 12, 526, 324, 290, 305, 26, 329, 325, 268, 2243, 14, 199];
        assert_eq!(ids, right);
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        let bytes: u32 = ids.iter().map(|id| tokenizer.token_bytes()[*id as usize]).sum();
        assert_eq!(bytes as usize, text.len());
    }

    #[test]
    fn any_text_comes_back() {
        let tokenizer = Tokenizer::builtin().unwrap();
        for text in [
            "",
            " ",
            "\n\n\n a\t\r\n",
            "caf\u{e9} \u{4e2d}\u{6587} \u{1f600}!",
            "a<|endoftext|>b",
            "\u{0}\u{7f}",
        ] {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
            assert!(!ids.contains(&tokenizer.eot_id()), "text must not end its document: {text:?}");
            let mut stream = tokenizer.decode_stream();
            let mut streamed = String::new();
            for id in ids {
                let part = stream.push(id).unwrap();
                assert!(!part.contains('\u{fffd}'));
                streamed.push_str(&part);
            }
            streamed.push_str(&stream.finish().unwrap());
            assert_eq!(streamed, text);
        }
    }

    #[test]
    fn a_stream_gives_up_on_bytes_that_never_become_a_character() {
        let tokenizer = Tokenizer::builtin().unwrap();
        let first_byte = tokenizer.encode("\u{e9}").unwrap()[0];
        let mut stream = tokenizer.decode_stream();
        let given: String = (0..LONGEST_WAIT).map(|_| stream.push(first_byte).unwrap()).collect();
        assert_eq!(given, "\u{fffd}".repeat(LONGEST_WAIT));
        stream.push(first_byte).unwrap();
        assert_eq!(stream.finish().unwrap(), "\u{fffd}");
    }

    #[test]
    fn batches_do_not_depend_on_threads() {
        let tokenizer = Tokenizer::builtin().unwrap();
        let texts: Vec<String> = (0..23).map(|n| "Exeunt omnes. ".repeat(n)).collect();
        let one = tokenizer.encode_batch(&texts, 1).unwrap();
        assert_eq!(one[2], tokenizer.encode(&texts[2]).unwrap());
        for threads in [0, 2, 5, 99] {
            assert_eq!(tokenizer.encode_batch(&texts, threads).unwrap(), one);
        }
        assert!(tokenizer.encode_batch::<&str>(&[], 4).unwrap().is_empty());
    }

    #[test]
    fn unknown_ids_and_tokens_are_named() {
        let tokenizer = Tokenizer::builtin().unwrap();
        let message = tokenizer.decode(&[1, 4_096]).unwrap_err().to_string();
        assert!(message.contains("token id 4096") && message.contains("4096"), "{message}");
        let json = tokenizer.json();
        let message = Tokenizer::from_bytes("x.json", json, Some("</end>")).unwrap_err().to_string();
        assert!(message.contains("x.json") && message.contains("</end>"), "{message}");
    }
}
