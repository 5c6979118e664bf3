//! From text files to sequences, and the same from memory.

use crate::common::{lines, options, small_dataset, write};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use unisono_data::{
    DataError, Dataset, IGNORE, InputFormat, Manifest, Part, PrepareOptions, Sequence, Split, Tokenizer,
    Verify, corpus, discard_unfinished, prepare,
};

fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|path| (path.file_name().unwrap().to_str().unwrap().into(), fs::read(&path).unwrap()))
        .collect()
}

fn run(inputs: &[PathBuf], out: &Path, options: &PrepareOptions) -> Result<Manifest, DataError> {
    prepare(inputs, &Tokenizer::builtin().unwrap(), out, options, &mut |_| {})
}

/// The built-in corpus from memory, and from shards whose borders lie inside documents and sequences.
#[test]
fn shards_hold_what_memory_holds() {
    let folder = tempfile::tempdir().unwrap();
    let works = corpus::works().unwrap();
    let inputs: Vec<PathBuf> =
        works.iter().map(|work| write(folder.path(), &format!("{}.txt", work.name), &work.text)).collect();
    let out = folder.path().join("data");
    let options = PrepareOptions { max_shard_tokens: 100_003, threads: 2, ..PrepareOptions::default() };
    let mut last = unisono_data::Progress::default();
    let tokenizer = Tokenizer::builtin().unwrap();
    let manifest = prepare(&inputs, &tokenizer, &out, &options, &mut |progress| {
        assert!(progress.bytes_read >= last.bytes_read && progress.tokens >= last.tokens);
        last = progress;
    })
    .unwrap();
    assert_eq!(manifest.text_bytes, 5_052_980);
    assert_eq!(last.bytes_read, last.bytes_total);
    assert_eq!(manifest.train.tokens + manifest.validation.tokens, last.tokens);

    let memory = Dataset::builtin(2).unwrap();
    let shards = Dataset::open(&out, Verify::AtOpen).unwrap();
    assert_eq!(manifest.train.shards.len() as u64, shards.tokens(Part::Train).div_ceil(100_003));
    for part in [Part::Train, Part::Validation] {
        assert_eq!(memory.tokens(part), shards.tokens(part));
        assert_eq!(memory.documents(part), shards.documents(part));
        assert_eq!(memory.sequences(part, 777), shards.sequences(part, 777));
        let (mut left, mut right) = (Sequence::default(), Sequence::default());
        for index in 0..memory.sequences(part, 777) {
            memory.sequence_into(part, 777, index, &mut left).unwrap();
            shards.sequence_into(part, 777, index, &mut right).unwrap();
            assert!(left == right, "{part:?} {index}");
        }
    }
}

/// The parts of the built-in corpus; one token in twenty is for validation, from most works.
#[test]
fn built_in_dataset_is_what_it_was() {
    let dataset = Dataset::builtin(1).unwrap();
    let (train, validation) = (dataset.tokens(Part::Train), dataset.tokens(Part::Validation));
    // 1,649,470 tokens of text, as the Python package counts them, and one for each end of a run.
    assert_eq!(
        train + validation - dataset.documents(Part::Train) - dataset.documents(Part::Validation),
        1_649_470
    );
    assert_eq!((train, validation), (1_563_944, 85_593));
    assert_eq!((dataset.documents(Part::Train), dataset.documents(Part::Validation)), (52, 15));
    assert_eq!(dataset.fingerprint(), Dataset::builtin(3).unwrap().fingerprint());
}

/// Encoded alone, the validation part is the same to the token, and no other token is there.
#[test]
fn the_built_in_validation_part_can_be_had_alone() {
    let (all, alone) = (Dataset::builtin(2).unwrap(), Dataset::builtin_validation(2).unwrap());
    assert_eq!((alone.tokens(Part::Train), alone.documents(Part::Train)), (0, 0));
    assert_eq!(alone.tokens(Part::Validation), all.tokens(Part::Validation));
    assert_eq!(alone.documents(Part::Validation), all.documents(Part::Validation));
    for index in 0..all.sequences(Part::Validation, 97) {
        let of = |dataset: &Dataset| dataset.sequence(Part::Validation, 97, index).unwrap();
        assert!(of(&alone) == of(&all), "sequence {index}");
    }
}

#[test]
fn sequences_tile_the_stream_and_mask_what_follows_a_document() {
    let folder = tempfile::tempdir().unwrap();
    let (out, manifest) = small_dataset(folder.path());
    let dataset = Dataset::open(&out, Verify::OnFirstUse).unwrap();
    let eot = dataset.tokenizer().eot_id();
    let mut masked = 0;
    let mut next = None;
    for index in 0..dataset.sequences(Part::Train, 32) {
        let sequence = dataset.sequence(Part::Train, 32, index).unwrap();
        assert!(next.is_none_or(|next| next == sequence.inputs[0] || next == IGNORE));
        let mut bytes = 0;
        for position in 0..32 {
            let (input, target) = (sequence.inputs[position], sequence.targets[position]);
            assert_eq!(input == eot, target == IGNORE);
            masked += u64::from(target == IGNORE);
            if let (Some(following), true) = (sequence.inputs.get(position + 1), target != IGNORE) {
                assert_eq!(target, *following);
            }
            let start = sequence.document_start[position] as usize;
            assert!(start <= position && !sequence.inputs[start..position].contains(&eot));
            assert!(start == 0 || sequence.inputs[start - 1] == eot);
            bytes += if target == IGNORE {
                0
            } else {
                u64::from(dataset.tokenizer().token_bytes()[target as usize])
            };
        }
        assert_eq!(sequence.target_bytes, bytes);
        next = sequence.targets.last().copied();
    }
    assert!(masked > 100 && masked <= manifest.train.documents);
    let beyond = dataset.sequences(Part::Train, 32);
    let error = dataset.sequence(Part::Train, 32, beyond).unwrap_err();
    assert!(matches!(error, DataError::Request(_)) && error.to_string().contains("train part"));
    assert!(dataset.sequence(Part::Train, 0, 0).is_err());
}

#[test]
fn threads_change_no_byte() {
    let folder = tempfile::tempdir().unwrap();
    let input = write(folder.path(), "input.jsonl", &lines(3_000));
    let outputs = [1, 3].map(|threads| {
        let out = folder.path().join(threads.to_string());
        run(std::slice::from_ref(&input), &out, &PrepareOptions { threads, ..options() }).unwrap();
        contents(&out)
    });
    assert!(outputs[0].len() > 10 && outputs[0] == outputs[1]);
}

/// All text comes back, whatever the split; an end of text written in a document ends nothing.
#[test]
fn documents_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let documents = ["One.", "Two <|endoftext|> not two.\n", "Caf\u{e9} \u{1f600}", "Four"];
    let input = write(folder.path(), "input.txt", &documents.join("\n%%\n"));
    let out = folder.path().join("data");
    let format = InputFormat::ByName { separator: Some("%%".into()) };
    run(&[input], &out, &PrepareOptions { format, split: Split::None, max_shard_tokens: 7, threads: 1 })
        .unwrap();
    let dataset = Dataset::open(&out, Verify::AtOpen).unwrap();
    assert_eq!((dataset.documents(Part::Train), dataset.tokens(Part::Validation)), (4, 0));
    let length = dataset.tokens(Part::Train) as usize - 1;
    let sequence = dataset.sequence(Part::Train, length, 0).unwrap();
    let text = dataset.tokenizer().decode(&sequence.inputs).unwrap();
    let right = documents.map(|document| document.trim_end_matches('\n')).join("<|endoftext|>");
    assert_eq!(text, right);
}

#[test]
fn nothing_is_overwritten_and_nothing_half_done_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let (out, _) = small_dataset(folder.path());
    let input = folder.path().join("input.jsonl");
    let before = contents(&out);
    let error = run(std::slice::from_ref(&input), &out, &options()).unwrap_err();
    assert!(error.to_string().contains("already holds a dataset"), "{error}");
    assert!(contents(&out) == before);

    // Without its manifest it is what a crash leaves: made anew, and other files stay.
    fs::remove_file(out.join("dataset.json")).unwrap();
    fs::write(out.join("train-00099.tokens"), "left over").unwrap();
    fs::write(out.join("train-00003.tokens.partial"), "left over").unwrap();
    fs::write(out.join("train-notes.tokens"), "mine").unwrap();
    run(&[input], &out, &options()).unwrap();
    let mut after = contents(&out);
    assert_eq!(after.remove("train-notes.tokens").unwrap(), b"mine");
    assert!(after == before);

    // A malformed line is named, and the shards before it are gone.
    let bad = write(folder.path(), "bad.jsonl", &format!("{}oops\n", lines(150)));
    let out = folder.path().join("other");
    let error = run(&[bad], &out, &options()).unwrap_err();
    assert!(error.is_bad_input() && error.to_string().contains("bad.jsonl:151: "), "{error}");
    assert!(!out.exists());

    // Somebody's tokenizer is not replaced.
    fs::create_dir(&out).unwrap();
    fs::write(out.join("tokenizer.json"), "{}").unwrap();
    let error = run(&[folder.path().join("input.jsonl")], &out, &options()).unwrap_err();
    assert!(error.to_string().contains("another tokenizer"), "{error}");
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let input = [write(folder.path(), "input.jsonl", &lines(3))];
    let empty = [write(folder.path(), "empty.txt", "")];
    let out = folder.path().join("data");
    let separator = Some(String::new());
    let cases: [(&[PathBuf], PrepareOptions, &str); 8] = [
        (&[], options(), "no input"),
        (&input, PrepareOptions { max_shard_tokens: 0, ..options() }, "max_shard_tokens"),
        (&input, PrepareOptions { split: Split::Chunks { share: 1.5 }, ..options() }, "1.5"),
        (
            &input,
            PrepareOptions { format: InputFormat::Text { separator }, ..options() },
            "separator is empty",
        ),
        (&input, PrepareOptions { split: Split::Documents { share: 1e-9 }, ..options() }, "divide by chunks"),
        (
            &input,
            PrepareOptions { format: InputFormat::ByName { separator: Some("--".into()) }, ..options() },
            "all inputs are JSON lines by their names",
        ),
        (&empty, PrepareOptions::default(), "--validation 0"),
        (&empty, PrepareOptions { split: Split::None, ..PrepareOptions::default() }, "no text"),
    ];
    for (inputs, options, part) in cases {
        let error = run(inputs, &out, &options).unwrap_err();
        assert!(!error.is_bad_input() && !error.is_storage() && error.to_string().contains(part), "{error}");
        assert!(!out.exists());
    }
    let error = run(&[folder.path().join("absent")], &out, &options()).unwrap_err();
    assert!(error.is_storage() && error.to_string().contains("absent"), "{error}");
}

/// Chunks of the usual size would leave nothing for validation.
#[test]
fn small_texts_hold_back_their_share_too() {
    let folder = tempfile::tempdir().unwrap();
    for (lines, bytes) in [(30, 1_500), (2_000, 100_000)] {
        let text: String =
            (0..lines).map(|line| format!("line {line} of a text that is rather short, ok\n")).collect();
        assert!(text.len() < 2 * bytes);
        let input = write(folder.path(), "input.txt", &text);
        let out = folder.path().join(lines.to_string());
        let manifest = run(&[input], &out, &PrepareOptions::default()).unwrap();
        let [train, validation] = [&manifest.train, &manifest.validation].map(|part| part.tokens as f64);
        let share = validation / (train + validation);
        assert!((0.01..0.15).contains(&share), "{lines} lines: {share}");
        Dataset::open(&out, Verify::AtOpen).unwrap();
    }
}

#[test]
fn what_an_interrupted_preparation_left_is_discarded() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, _) = small_dataset(folder.path());
    let before = contents(&whole);
    discard_unfinished(&whole).unwrap();
    assert!(contents(&whole) == before);
    let cut = folder.path().join("cut");
    fs::create_dir(&cut).unwrap();
    fs::write(cut.join("train-00000.tokens.partial"), "half").unwrap();
    discard_unfinished(&cut).unwrap();
    assert!(!cut.exists());
    discard_unfinished(&cut).unwrap();
}
