//! Damaged and hostile `tokenizer.json` files: an error that names the file, or a tokenizer that works or says
//! why not.

use crate::common::{Random, held};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use unisono_data::{DataError, Tokenizer};

/// A byte-level tokenizer small enough to damage thousands of times.
fn small() -> Value {
    let mut json: Value = serde_json::from_slice(Tokenizer::builtin().unwrap().json()).unwrap();
    let model = json["model"].as_object_mut().unwrap();
    model["vocab"].as_object_mut().unwrap().retain(|_, id| id.as_u64() < Some(270));
    let known = model["vocab"].clone();
    let joined = |merge: &Value| {
        let (left, right) = match merge {
            Value::String(pair) => pair.split_once(' ').unwrap(),
            pair => (pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
        };
        format!("{left}{right}")
    };
    model["merges"].as_array_mut().unwrap().retain(|merge| known.get(joined(merge)).is_some());
    json
}

/// Uses whatever loads; every error must name the file.
fn exercise(json: &[u8]) -> bool {
    let begin = Instant::now();
    let (loaded, held) = held(|| match Tokenizer::from_bytes("hostile.json", json, None) {
        Ok(tokenizer) => {
            for text in ["", "To be, or not  to be\n\nthe \u{e9} \u{1f600}<|endoftext|>", "\u{2581}\u{0}##a"]
            {
                let used = tokenizer.encode(text).and_then(|ids| {
                    assert!(ids.iter().all(|id| *id < tokenizer.vocab_size()));
                    let mut stream = tokenizer.decode_stream();
                    ids.iter().try_for_each(|id| stream.push(*id).map(drop))?;
                    stream.finish()?;
                    tokenizer.decode(&ids)
                });
                if let Err(error) = used {
                    assert!(
                        matches!(error, DataError::Coding { .. })
                            && error.to_string().contains("hostile.json")
                    );
                }
            }
            true
        }
        Err(error) => {
            assert!(
                matches!(error, DataError::Tokenizer { .. }) && error.to_string().contains("hostile.json")
            );
            false
        }
    });
    // A panic in the library, which is caught, prints its backtrace: that reads debug information, tens of MiB.
    assert!(held < 256 << 20, "{held} bytes for {}", String::from_utf8_lossy(json));
    assert!(begin.elapsed() < Duration::from_secs(5), "{}", String::from_utf8_lossy(json));
    loaded
}

#[test]
fn damaged_bytes() {
    let json = small().to_string().into_bytes();
    assert!(exercise(&json));
    let mut random = Random(1);
    let loaded = (0..2_500).filter(|_| exercise(&random.damage(&json))).count();
    assert!((50..2_450).contains(&loaded), "{loaded}");
}

/// The places of all values, as JSON pointers.
fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_string());
    let escape = |key: &str| key.replace('~', "~0").replace('/', "~1");
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(key, value)| pointers(value, &format!("{at}/{}", escape(key)), found));
        }
        Value::Array(items) => {
            items
                .iter()
                .enumerate()
                .for_each(|(index, value)| pointers(value, &format!("{at}/{index}"), found));
        }
        _ => {}
    }
}

#[test]
fn misplaced_values() {
    let json = small();
    let mut places = Vec::new();
    pointers(&json, "", &mut places);
    // The outline matters more than the hundreds of entries of the vocabulary.
    let (inside, outline): (Vec<_>, Vec<_>) = places
        .into_iter()
        .partition(|place| place.starts_with("/model/vocab/") || place.starts_with("/model/merges/"));
    let replacements = [
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(1.5),
        json!(u32::MAX),
        json!(u64::MAX),
        json!(1e300),
        json!(""),
        json!("a"),
        json!("<|endoftext|>"),
        json!([]),
        json!({}),
        json!([[]]),
        json!({"a": 0}),
        json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": ""}]}),
        json!({"type": "Sequence", "pretokenizers": [{"type": "FixedLength", "length": 0}]}),
        json!({"type": "Split", "pattern": {"Regex": "(a*)*b|(?=.)"}, "behavior": "Isolated", "invert": true}),
        json!({"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": false}),
        json!({"type": "Replace", "pattern": {"String": ""}, "content": "aaaa"}),
        json!({"type": "Precompiled", "precompiled_charsmap": "AAAA/////w=="}),
        json!({"type": "Strip", "content": "e", "start": 9, "stop": 9}),
        json!({"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": true}),
        json!({"type": "Unigram", "unk_id": 7, "vocab": [["a", -1.0]]}),
        json!({"type": "Unigram", "unk_id": null, "vocab": [["", 0.0], ["<|endoftext|>", -1e308]]}),
        json!({"type": "WordPiece", "unk_token": "?", "continuing_subword_prefix": "##", "max_input_chars_per_word": 0, "vocab": {"<|endoftext|>": 0}}),
        json!({"type": "WordLevel", "unk_token": "?", "vocab": {"<|endoftext|>": 3}}),
        json!({"direction": "Left", "max_length": 0, "strategy": "LongestFirst", "stride": 9}),
        json!({"strategy": {"Fixed": 1_u64 << 40}, "direction": "Left", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0, "pad_token": ""}),
        json!("aVeryLongPrefixThatNoTokenHas"),
    ];
    let mut random = Random(2);
    let inside = (0..60).map(|_| inside[random.below(inside.len())].clone()).collect::<Vec<_>>();
    for place in outline.iter().chain(&inside) {
        for replacement in &replacements {
            let mut changed = json.clone();
            *changed.pointer_mut(place).unwrap() = replacement.clone();
            exercise(changed.to_string().as_bytes());
        }
    }
}

#[test]
fn crafted_files_get_reasons() {
    #[track_caller]
    fn refused(change: impl Fn(&mut Value), part: &str) {
        let mut json = small();
        change(&mut json);
        let error = Tokenizer::from_bytes("hostile.json", json.to_string().as_bytes(), None).unwrap_err();
        assert!(error.to_string().contains("hostile.json") && error.to_string().contains(part), "{error}");
    }
    refused(|json| json["model"]["vocab"]["a"] = json!(u32::MAX), "id 4294967295");
    refused(|json| json["model"]["vocab"]["a"] = json!(5), "given twice");
    refused(|json| json["model"]["vocab"] = json!({}), "empty");
    refused(|json| json["model"]["dropout"] = json!(0.5), "random");
    refused(|json| json["model"]["merges"] = json!([["no", "such"]]), "no");
    refused(|json| json["added_tokens"][0]["content"] = json!(""), "entry 0");
    refused(|json| json["added_tokens"][0]["id"] = json!(1_u64 << 40), "entry 0");
    refused(
        |json| {
            json["model"]["vocab"].as_object_mut().unwrap().remove("<|endoftext|>");
            json["added_tokens"] = json!([]);
        },
        "end-of-text",
    );
    let deep = "[".repeat(100_000);
    assert!(Tokenizer::from_bytes("hostile.json", deep.as_bytes(), None).is_err());
    let large = vec![b' '; (64 << 20) + 1];
    let error = Tokenizer::from_bytes("hostile.json", &large, None).unwrap_err();
    assert!(error.to_string().contains("more than 67108864 bytes"), "{error}");
}
