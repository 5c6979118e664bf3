//! Damaged and hostile files: an error that names the place, or what was written. Never a panic, a hang, or
//! memory beyond the file's size.

use crate::common::{Random, held, lines, options, small_dataset, write};
use std::fs;
use std::path::Path;
use unisono_data::shard::{Shard, ShardWriter};
use unisono_data::{DataError, Dataset, Part, Tokenizer, Verify, prepare};

/// A shard of `tokens` tokens, a document every 50, as bytes.
fn shard_bytes(folder: &Path, tokens: u32) -> Vec<u8> {
    let path = folder.join("made.tokens");
    let mut writer = ShardWriter::create(&path, &Tokenizer::builtin().unwrap()).unwrap();
    for number in 1..=tokens {
        match number % 50 {
            0 => writer.end_document().unwrap(),
            _ => writer.push(&[1 + number % 4_095]).unwrap(),
        }
    }
    writer.finish().unwrap();
    fs::read(path).unwrap()
}

/// What a reading may hold besides a few times its file.
const ROOM: usize = 4 << 20;

/// Runs `read` of a file of `bytes`, which may hold only so much at once.
fn bounded<T>(bytes: usize, read: impl FnOnce() -> T) -> T {
    let (result, held) = held(read);
    assert!(held < ROOM + 8 * bytes, "{held} bytes for a file of {bytes}");
    result
}

fn open_and_verify(path: &Path, bytes: &[u8]) -> Result<Vec<u32>, DataError> {
    fs::write(path, bytes).unwrap();
    bounded(bytes.len(), || {
        let shard = Shard::open(path)?;
        shard.verify()?;
        let mut tokens = Vec::new();
        shard.read(0..u64::MAX, &mut tokens)?;
        Ok(tokens)
    })
}

fn assert_names_the_place(error: &DataError) {
    let DataError::Shard { section, offset, problem, .. } = error else { panic!("{error:?}") };
    assert!(error.to_string().contains(section) && error.to_string().contains(&offset.to_string()));
    assert!(!problem.is_empty());
}

#[test]
fn every_damage_to_a_shard_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.tokens");
    // A small one with many damages, and one of several blocks.
    for (tokens, cases) in [(500, 4_000), (300_000, 60)] {
        let bytes = shard_bytes(folder.path(), tokens);
        let right = open_and_verify(&path, &bytes).unwrap();
        assert_eq!(right.len(), tokens as usize);
        let mut random = Random(u64::from(tokens));
        for _ in 0..cases {
            let damaged = random.damage(&bytes);
            match open_and_verify(&path, &damaged) {
                Ok(_) => assert!(damaged == bytes, "damage that went unseen"),
                Err(error) => assert_names_the_place(&error),
            }
        }
    }
}

#[test]
fn every_single_byte_of_a_shard_is_guarded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.tokens");
    let bytes = shard_bytes(folder.path(), 120);
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        assert_names_the_place(&open_and_verify(&path, &damaged).unwrap_err());
    }
}

/// Makes all hashes right again, as somebody with intent would.
fn reseal(bytes: &mut [u8]) {
    let at = |bytes: &[u8], offset: usize| {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap()) as usize
    };
    let (documents, checksums) = (at(bytes, 88), at(bytes, 96));
    let (tokens_hash, documents_hash) =
        (blake3::hash(&bytes[256..documents]), blake3::hash(&bytes[documents..checksums]));
    bytes[checksums..checksums + 32].copy_from_slice(tokens_hash.as_bytes());
    bytes[checksums + 32..checksums + 64].copy_from_slice(documents_hash.as_bytes());
    let hash = blake3::hash(&bytes[checksums..]);
    bytes[112..144].copy_from_slice(hash.as_bytes());
    reseal_header(bytes);
}

fn reseal_header(bytes: &mut [u8]) {
    let hash = blake3::hash(&bytes[..224]);
    bytes[224..256].copy_from_slice(hash.as_bytes());
}

#[test]
fn headers_with_right_hashes_and_wrong_numbers_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("crafted.tokens");
    let bytes = shard_bytes(folder.path(), 500);
    let mut random = Random(3);
    let numbers =
        [0, 1, 2, 255, 256, 4_095, 4_097, 65_537, 1 << 22, u64::from(u32::MAX), 1 << 61, 1 << 63, u64::MAX];
    for _ in 0..3_000 {
        let mut crafted = bytes.clone();
        for _ in 0..=random.below(3) {
            // Counts, widths and offsets; the tokenizer's hash between them is anybody's guess.
            let at = [8, 12, 16, 20, 24, 32, 72, 76, 80, 88, 96, 104, 144, 200][random.below(14)];
            let width = if (24..40).contains(&at) || at >= 80 { 8 } else { 4 };
            let number = numbers[random.below(numbers.len())].to_le_bytes();
            crafted[at..at + width].copy_from_slice(&number[..width]);
        }
        reseal_header(&mut crafted);
        match open_and_verify(&path, &crafted) {
            Ok(tokens) => assert_eq!(tokens.len(), 500),
            Err(error) => assert_names_the_place(&error),
        }
    }
}

#[test]
fn contents_with_right_hashes_and_wrong_meaning_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("crafted.tokens");
    let bytes = shard_bytes(folder.path(), 500);
    let documents = 256 + 2 * 500;
    // (offset, bytes to put there, section and offset that must be named)
    let cases: [(usize, &[u8], &str, u64); 4] = [
        (256 + 2 * 7, &[0x00, 0x10], "tokens", 256 + 2 * 7),
        (256 + 2 * 7, &[0, 0], "documents", documents as u64),
        (256 + 2 * 499, &[9, 0], "documents", documents as u64 + 8 * 9),
        (documents + 8, &[101], "documents", documents as u64 + 8),
    ];
    for (at, replacement, section, offset) in cases {
        let mut crafted = bytes.clone();
        crafted[at..at + replacement.len()].copy_from_slice(replacement);
        reseal(&mut crafted);
        let error = open_and_verify(&path, &crafted).unwrap_err();
        let named =
            matches!(&error, DataError::Shard { section: s, offset: o, .. } if (*s, *o) == (section, offset));
        assert!(named, "{error}");
    }
}

/// Damage to a block that was not used yet is found when it is; a file cut short while open is an error.
#[test]
fn damage_is_found_on_first_use() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.tokens");
    let mut bytes = shard_bytes(folder.path(), 300_000);
    bytes[256 + (256 << 10) + 5] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let shard = Shard::open(&path).unwrap();
    let mut tokens = Vec::new();
    shard.read(0..1_000, &mut tokens).unwrap();
    let error = shard.read(131_072..131_073, &mut tokens).unwrap_err();
    assert!(error.to_string().contains("section tokens, byte 262400 "), "{error}");
    fs::File::options().write(true).open(&path).unwrap().set_len(300).unwrap();
    let error = shard.read(500..600, &mut tokens).unwrap_err();
    assert!(error.to_string().contains("shorter"), "{error}");
}

#[test]
fn a_damaged_manifest_is_refused_or_means_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let (out, _) = small_dataset(folder.path());
    let path = out.join("dataset.json");
    let bytes = fs::read(&path).unwrap();
    let right = Dataset::open(&out, Verify::AtOpen).unwrap().fingerprint();
    // It opens what it names, of which the tokenizer is the largest.
    let tokenizer_bytes = fs::metadata(out.join("tokenizer.json")).unwrap().len() as usize;
    let mut random = Random(5);
    let mut refused = 0;
    for _ in 0..400 {
        fs::write(&path, random.damage(&bytes)).unwrap();
        match bounded(tokenizer_bytes, || Dataset::open(&out, Verify::OnFirstUse)) {
            Ok(dataset) => assert_eq!(dataset.fingerprint(), right),
            Err(error) => {
                refused += 1;
                assert!(!matches!(error, DataError::Request(_)), "{error}");
            }
        }
    }
    assert!(refused > 300, "{refused}");
    let text = String::from_utf8(bytes).unwrap();
    for (from, to, part) in [
        ("train-00001", "../../00001", "plain name"),
        ("unisono-dataset", "other", "expected \"unisono-dataset\""),
        ("\"version\": 1", "\"version\": 2", "version 2"),
        ("\"split\"", "\"spilt\"", "unknown field"),
        ("train-00001", "train-00002", "not the one that was written"),
        ("\"tokens\": 1000,", "\"tokens\": 18446744073709551615,", "totals"),
        ("0.25", "7.0", "share of 7"),
    ] {
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        let error = Dataset::open(&out, Verify::OnFirstUse).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("dataset.json"), "{error}");
    }
}

/// A shard or tokenizer of another dataset does not slip in.
#[test]
fn files_of_other_datasets_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (out, manifest) = small_dataset(folder.path());
    let [first, second] = [0, 1].map(|shard| out.join(&manifest.train.shards[shard].file));
    let bytes = fs::read(&first).unwrap();
    fs::copy(&second, &first).unwrap();
    let error = Dataset::open(&out, Verify::OnFirstUse).unwrap_err();
    assert!(error.to_string().contains("train-00000.tokens") && error.is_bad_input(), "{error}");
    fs::write(&first, bytes).unwrap();
    let tokenizer = out.join("tokenizer.json");
    let json = fs::read_to_string(&tokenizer).unwrap();
    fs::write(&tokenizer, format!("{json} ")).unwrap();
    let error = Dataset::open(&out, Verify::OnFirstUse).unwrap_err();
    assert!(error.to_string().contains("not the tokenizer"), "{error}");
}

#[test]
fn damaged_json_lines_are_named_or_read() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = lines(40).into_bytes();
    let tokenizer = Tokenizer::builtin().unwrap();
    let mut random = Random(6);
    let mut named = 0;
    for case in 0..150 {
        let input = folder.path().join("damaged.jsonl");
        fs::write(&input, random.damage(&bytes)).unwrap();
        let out = folder.path().join(case.to_string());
        match bounded(bytes.len(), || prepare(&[input], &tokenizer, &out, &options(), &mut |_| {})) {
            Ok(manifest) => {
                let dataset = Dataset::open(&out, Verify::AtOpen).unwrap();
                assert_eq!(dataset.tokens(Part::Train), manifest.train.tokens);
            }
            Err(DataError::Input { line, .. }) => {
                named += 1;
                assert!((1..=45).contains(&line));
            }
            Err(DataError::EmptyPart { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
    }
    assert!(named > 50, "{named}");
}

#[test]
fn a_text_file_that_is_no_text_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let input = write(folder.path(), "good.txt", "good\n");
    let tokenizer = Tokenizer::builtin().unwrap();
    fs::write(folder.path().join("bad.txt"), b"good\nb\xffad").unwrap();
    let inputs = [input, folder.path().join("bad.txt")];
    let defaults = unisono_data::PrepareOptions::default();
    let error =
        prepare(&inputs, &tokenizer, &folder.path().join("data"), &defaults, &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("bad.txt:2: the text is not UTF-8"), "{error}");
}
