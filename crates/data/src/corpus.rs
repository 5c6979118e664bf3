//! The built-in corpus: the works of Shakespeare, in the public domain.
//!
//! `scripts/make-corpus` makes it and its tokenizer; `assets/PROVENANCE.md` says from what.

use crate::error::{DataError, Result};
use flate2::read::GzDecoder;
use std::io::Read;

/// The corpus as JSON lines, compressed by gzip.
const COMPRESSED: &[u8] = include_bytes!("../assets/corpus.jsonl.gz");
/// More than the corpus holds; what decompresses to more is not it.
const LARGEST: u64 = 16 << 20;

/// A work of the built-in corpus: one document.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Work {
    /// A short name, such as `hamlet`.
    pub name: String,
    /// The whole text with its line breaks.
    pub text: String,
}

/// The 42 works, by name.
///
/// # Errors
/// None for an unchanged build: the corpus is part of it.
pub fn works() -> Result<Vec<Work>> {
    let damaged = |problem: String| DataError::Request(format!("the built-in corpus is damaged: {problem}"));
    let mut lines = String::new();
    let mut reader = GzDecoder::new(COMPRESSED).take(LARGEST);
    reader.read_to_string(&mut lines).map_err(|error| damaged(error.to_string()))?;
    let work = |line| serde_json::from_str(line).map_err(|error| damaged(error.to_string()));
    lines.lines().map(work).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tokenizer;

    #[test]
    fn golden_corpus() {
        let works = works().unwrap();
        assert_eq!(works.len(), 42);
        assert!(works.is_sorted_by(|a, b| a.name < b.name));
        let bytes: usize = works.iter().map(|work| work.text.len()).sum();
        assert_eq!(bytes, 5_052_980);
        let mut hasher = blake3::Hasher::new();
        for work in &works {
            hasher.update(work.text.as_bytes());
        }
        let right = "56a40aded3cb7f7d7b3c037f31216391952f56b215cad6abb1fe1c41bd7a5044";
        assert_eq!(hasher.finalize().to_hex().as_str(), right);
        assert!(COMPRESSED.len() <= 3_000_000);
    }

    #[test]
    fn text_is_clean() {
        for work in works().unwrap() {
            assert!(work.text.is_ascii() && work.text.ends_with('\n') && !work.text.starts_with('\n'));
            assert!(work.text.lines().all(|line| line.trim_end() == line), "{}", work.name);
            assert!(!work.text.contains("\n\n\n\n") && !work.text.contains("Gutenberg"), "{}", work.name);
        }
    }

    /// Pieces cut where text is cut have the tokens of the whole.
    #[test]
    fn cutting_does_not_change_tokens() {
        let tokenizer = Tokenizer::builtin().unwrap();
        for work in works().unwrap().iter().take(12) {
            let mut tokens = Vec::new();
            crate::pieces::pieces_of(&work.text, crate::pieces::CHUNK_BYTES, &mut |piece| {
                tokens.extend(tokenizer.encode(&piece.text)?);
                Ok(())
            })
            .unwrap();
            assert!(tokens == tokenizer.encode(&work.text).unwrap(), "{}", work.name);
        }
    }

    /// Every work comes back to the byte, and `token_bytes` adds up to its length.
    #[test]
    fn the_whole_corpus_survives_its_tokenizer() {
        let tokenizer = Tokenizer::builtin().unwrap();
        let works = works().unwrap();
        let texts: Vec<&str> = works.iter().map(|work| work.text.as_str()).collect();
        for (work, ids) in works.iter().zip(tokenizer.encode_batch(&texts, 2).unwrap()) {
            assert!(tokenizer.decode(&ids).unwrap() == work.text, "{}", work.name);
            let bytes: usize = ids.iter().map(|id| tokenizer.token_bytes()[*id as usize] as usize).sum();
            assert_eq!(bytes, work.text.len(), "{}", work.name);
        }
    }
}
