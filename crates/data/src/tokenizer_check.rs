//! Limits around `tokenizer.json`, checked before the library that runs it sees the file.
//!
//! The library panics on several kinds of malformed files; what is found here gets an error that
//! names the field instead.

use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// The largest `tokenizer.json` that is read, in bytes (the largest in wide use have 33 MB).
pub(crate) const LARGEST_FILE: u64 = 64 << 20;
/// Token ids stay below this, which bounds every table indexed by them.
pub(crate) const LARGEST_VOCABULARY: u32 = 1 << 22;

/// The end-of-text tokens of widespread tokenizers, tried in this order when none is named.
pub(crate) const KNOWN_END_OF_TEXT: [&str; 8] = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "<|eot|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "[SEP]",
];

/// Refuses what the library would panic on or what could not be trained with, naming the field.
pub(crate) fn check(json: &[u8]) -> Result<(), String> {
    let value: Value = serde_json::from_slice(json).map_err(|error| format!("it is not JSON: {error}"))?;
    let Value::Object(fields) = &value else {
        return Err("it is not a JSON object: expected a Hugging Face tokenizer.json".into());
    };
    let model = fields.get("model").and_then(Value::as_object).ok_or("it has no object \"model\"")?;
    let vocabulary = model.get("vocab").ok_or("it has no field \"model.vocab\"")?;
    check_vocabulary(vocabulary)?;
    if let (Some(vocabulary), Some(Value::Array(merges))) = (vocabulary.as_object(), model.get("merges")) {
        let prefix = model.get("continuing_subword_prefix").and_then(Value::as_str).unwrap_or_default();
        check_merges(merges, vocabulary, prefix)?;
    }
    if model.get("dropout").and_then(Value::as_f64).is_some_and(|dropout| dropout != 0.0) {
        return Err("\"model.dropout\" makes its output random: set it to null".into());
    }
    match fields.get("added_tokens") {
        None | Some(Value::Null) => {}
        Some(Value::Array(tokens)) => check_added_tokens(tokens)?,
        Some(_) => return Err("\"added_tokens\" is not an array".into()),
    }
    fields.get("pre_tokenizer").map_or(Ok(()), check_fixed_length)?;
    fields.get("normalizer").map_or(Ok(()), check_charsmap)
}

fn check_vocabulary(vocabulary: &Value) -> Result<(), String> {
    match vocabulary {
        Value::Object(entries) if !entries.is_empty() => {
            let mut ids = BTreeSet::new();
            for (token, id) in entries {
                let id =
                    check_id(id).map_err(|problem| format!("\"model.vocab\", token {token:?}: {problem}"))?;
                if !ids.insert(id) {
                    return Err(format!("\"model.vocab\", token {token:?}: id {id} is given twice"));
                }
            }
            Ok(())
        }
        Value::Array(entries) if !entries.is_empty() => {
            if entries.len() > LARGEST_VOCABULARY as usize {
                return Err(format!("\"model.vocab\" has more than {LARGEST_VOCABULARY} tokens"));
            }
            Ok(())
        }
        Value::Object(_) | Value::Array(_) => Err("\"model.vocab\" is empty".into()),
        _ => Err("\"model.vocab\" is neither an object nor an array".into()),
    }
}

/// Both halves of a merge and what they join to must be tokens. The library copies the joined bytes into a buffer
/// as long as the longest token, unseen, and cuts the prefix off the second half unseen.
fn check_merges(merges: &[Value], vocabulary: &Map<String, Value>, prefix: &str) -> Result<(), String> {
    let mut joined = String::new();
    for (index, merge) in merges.iter().enumerate() {
        let wrong = |problem: &str| format!("\"model.merges\", entry {index}: {problem}");
        let halves = match merge {
            Value::String(pair) => pair.split_once(' '),
            Value::Array(pair) if pair.len() == 2 => pair[0].as_str().zip(pair[1].as_str()),
            _ => None,
        };
        let Some((left, right)) = halves else {
            return Err(wrong("it is not a pair of tokens"));
        };
        let Some(rest) = right.strip_prefix(prefix) else {
            return Err(wrong(&format!(
                "{right:?} does not begin with continuing_subword_prefix {prefix:?}"
            )));
        };
        joined.clear();
        joined.extend([left, rest]);
        for token in [left, right, &joined] {
            if !vocabulary.contains_key(token) {
                return Err(wrong(&format!("{token:?} is not in \"model.vocab\"")));
            }
        }
    }
    Ok(())
}

fn check_added_tokens(tokens: &[Value]) -> Result<(), String> {
    for (index, token) in tokens.iter().enumerate() {
        let place = |problem: &str| format!("\"added_tokens\", entry {index}: {problem}");
        let id = token.get("id").ok_or_else(|| place("it has no \"id\""))?;
        check_id(id).map_err(|problem| place(&problem))?;
        match token.get("content").and_then(Value::as_str) {
            None => return Err(place("it has no string \"content\"")),
            Some("") => return Err(place("its \"content\" is empty")),
            Some(_) => {}
        }
    }
    Ok(())
}

fn check_id(id: &Value) -> Result<u32, String> {
    id.as_u64()
        .and_then(|id| u32::try_from(id).ok())
        .filter(|id| *id < LARGEST_VOCABULARY)
        .ok_or_else(|| format!("id {id} is not a whole number below {LARGEST_VOCABULARY}"))
}

/// A pre-tokenizer that cuts every 0 characters would never advance. They nest, so the whole subtree is seen.
fn check_fixed_length(value: &Value) -> Result<(), String> {
    match value {
        Value::Object(fields) => {
            if fields.get("type").is_some_and(|kind| kind == "FixedLength")
                && fields.get("length").is_some_and(|length| *length == 0)
            {
                return Err(
                    "\"pre_tokenizer\" of type FixedLength has length 0: it must be at least 1".into()
                );
            }
            fields.values().try_for_each(check_fixed_length)
        }
        Value::Array(items) => items.iter().try_for_each(check_fixed_length),
        _ => Ok(()),
    }
}

/// A character map of SentencePiece begins with the length of its trie, for which the library makes room before it looks whether
/// so much is there. Normalizers nest.
fn check_charsmap(value: &Value) -> Result<(), String> {
    match value {
        Value::Object(fields) => {
            if let Some(Value::String(map)) = fields.get("precompiled_charsmap")
                && trie_bytes(map).is_some_and(|bytes| bytes as usize > map.len() / 4 * 3)
            {
                return Err(
                    "\"precompiled_charsmap\" of \"normalizer\" is shorter than its first number says".into(),
                );
            }
            fields.values().try_for_each(check_charsmap)
        }
        Value::Array(items) => items.iter().try_for_each(check_charsmap),
        _ => Ok(()),
    }
}

/// The first four bytes of what base64 spells, the least first; none if that is no base64.
fn trie_bytes(base64: &str) -> Option<u32> {
    let digit = |character: &u8| {
        Some(u64::from(match character {
            b'A'..=b'Z' => character - b'A',
            b'a'..=b'z' => character - b'a' + 26,
            b'0'..=b'9' => character - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        }))
    };
    let digits = base64.as_bytes().get(..6)?.iter().map(digit);
    let bits = digits.into_iter().try_fold(0, |bits, digit| Some(bits << 6 | digit?))?;
    Some(((bits >> 4) as u32).swap_bytes())
}

/// How a tokenizer spells bytes in its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// One character of the GPT-2 alphabet a byte.
    ByteLevel,
    /// As SentencePiece: U+2581 for a space, `<0x41>` for a single byte.
    Pieces,
    /// As WordPiece: `##` before what continues a word.
    WordPieces,
}

impl Spelling {
    /// Reads the spelling off a checked `tokenizer.json`: a byte-level decoder, then `##`, else pieces.
    pub(crate) fn of(json: &[u8]) -> Self {
        let value: Value = serde_json::from_slice(json).unwrap_or_default();
        let decoder = value.get("decoder").map(Value::to_string).unwrap_or_default();
        if decoder.contains("\"ByteLevel\"") {
            Self::ByteLevel
        } else if decoder.contains("\"WordPiece\"") {
            Self::WordPieces
        } else {
            Self::Pieces
        }
    }

    /// The number of UTF-8 bytes of text that `token` stands for.
    pub(crate) fn text_bytes(self, token: &str) -> u32 {
        let bytes = match self {
            Self::ByteLevel if token.chars().all(is_byte_character) => token.chars().count(),
            Self::ByteLevel => token.len(),
            Self::Pieces if is_byte_piece(token) => 1,
            // U+2581 takes three bytes where the space it stands for takes one.
            Self::Pieces => token.len() - 2 * token.matches('\u{2581}').count(),
            Self::WordPieces => token.strip_prefix("##").unwrap_or(token).len(),
        };
        // A token is a part of a file of at most LARGEST_FILE bytes.
        bytes as u32
    }
}

/// Whether a character stands for a byte in GPT-2's alphabet: printable Latin-1 for itself, and
/// U+0100 to U+0143 for the other 68 bytes in order.
fn is_byte_character(character: char) -> bool {
    matches!(character, '!'..='~' | '\u{a1}'..='\u{ac}' | '\u{ae}'..='\u{ff}' | '\u{100}'..='\u{143}')
}

fn is_byte_piece(token: &str) -> bool {
    token
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'))
        .is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused(json: &str, part: &str) {
        let problem = check(json.as_bytes()).unwrap_err();
        assert!(problem.contains(part), "{problem}");
    }

    #[test]
    fn malformed_files_are_refused_by_field() {
        refused("{", "not JSON");
        refused("[]", "not a JSON object");
        refused("{}", "\"model\"");
        refused(r#"{"model":{}}"#, "model.vocab");
        refused(r#"{"model":{"vocab":{}}}"#, "empty");
        refused(r#"{"model":{"vocab":3}}"#, "neither");
        refused(r#"{"model":{"vocab":{"a":-1}}}"#, "token \"a\": id -1");
        refused(r#"{"model":{"vocab":{"a":4294967295}}}"#, "id 4294967295");
        refused(r#"{"model":{"vocab":{"a":0,"b":0}}}"#, "given twice");
        refused(r#"{"model":{"vocab":{"a":0},"dropout":0.1}}"#, "random");
        refused(r#"{"model":{"vocab":{"a":0},"merges":["a"]}}"#, "entry 0: it is not a pair");
        refused(r#"{"model":{"vocab":{"a":0},"merges":[["a","b"]]}}"#, "\"b\" is not in");
        refused(r#"{"model":{"vocab":{"a":0},"merges":["a a"]}}"#, "\"aa\" is not in");
        let prefixed =
            r###"{"model":{"vocab":{"a":0,"aa":1},"merges":["a a"],"continuing_subword_prefix":"##"}}"###;
        refused(prefixed, "begin with");
        refused(r#"{"model":{"vocab":{"a":0}},"added_tokens":7}"#, "not an array");
        refused(
            r#"{"model":{"vocab":{"a":0}},"added_tokens":[{"content":"x"}]}"#,
            "entry 0: it has no \"id\"",
        );
        refused(r#"{"model":{"vocab":{"a":0}},"added_tokens":[{"id":1,"content":""}]}"#, "empty");
        refused(
            r#"{"model":{"vocab":{"a":0}},"pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"FixedLength","length":0}]}}"#,
            "length 0",
        );
        refused(
            r#"{"model":{"vocab":{"a":0}},"normalizer":{"type":"Sequence","normalizers":[{"type":"Precompiled","precompiled_charsmap":"AAAA/////w=="}]}}"#,
            "shorter than",
        );
    }

    #[test]
    fn the_length_of_a_trie_is_read() {
        assert_eq!(trie_bytes("ALQCAACE"), Some(0x0002_b400));
        assert_eq!(trie_bytes("AAAA/////w=="), Some(0xff00_0000));
        assert_eq!(trie_bytes("AAAA"), None);
        assert_eq!(trie_bytes("AA?A/////w=="), None);
    }

    #[test]
    fn bytes_of_tokens_by_spelling() {
        assert_eq!(Spelling::ByteLevel.text_bytes("\u{120}the"), 4);
        assert_eq!(Spelling::ByteLevel.text_bytes("\u{c3}\u{a9}"), 2);
        assert_eq!(Spelling::ByteLevel.text_bytes("\u{4e2d}"), 3);
        assert_eq!(Spelling::Pieces.text_bytes("\u{2581}the"), 4);
        assert_eq!(Spelling::Pieces.text_bytes("<0x0A>"), 1);
        assert_eq!(Spelling::Pieces.text_bytes("<0xZZ>"), 6);
        assert_eq!(Spelling::WordPieces.text_bytes("##ing"), 3);
    }
}
