//! From text to a run.

use std::fs;

use crate::common::{TINY, command, run, small_text};

#[test]
fn text_becomes_a_dataset_that_trains() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::write(folder.join("a.txt"), small_text()).unwrap();
    let line = serde_json::json!({"text": small_text(), "source": "made up"});
    fs::write(folder.join("b.jsonl"), format!("{line}\n{line}\n")).unwrap();
    let args = [
        "data",
        "prepare",
        "a.txt",
        "b.jsonl",
        "--out",
        "set",
        "--validation",
        "0.2",
        "--shard-tokens",
        "9000",
    ];
    let done = run(folder, 0, &args).out;
    for part in ["\n  train       ", "\n  validation  ", "[data]\npath = \"set\"", "vocab_size = 4096"] {
        assert!(done.contains(part), "no {part:?} in\n{done}");
    }
    let good = run(folder, 0, &["data", "verify", "set"]).out;
    assert!(good.starts_with("set: every byte is right: "), "{good}");
    let again = run(folder, 2, &args).err;
    assert!(again.contains("set already holds a dataset"), "{again}");

    let advice = done.lines().find(|line| line.contains(" train --set ")).unwrap();
    let advice: Vec<&str> = advice.split_once(" train ").unwrap().1.split_whitespace().collect();
    let train =
        [&["train", TINY, "--run", "r", "--steps", "4", "--set", "sample.tokens=4"][..], &advice].concat();
    let trained = run(folder, 0, &train).out;
    assert!(trained.contains("/set: ") && trained.contains("step 4/4  validation loss"), "{trained}");
    // The run remembers where its data are, wherever it is looked at from.
    let elsewhere = tempfile::tempdir().unwrap();
    let path = folder.join("r");
    run(elsewhere.path(), 0, &["eval", "--run", path.to_str().unwrap(), "--sequences", "4"]);
}

#[test]
fn a_dataset_without_validation_trains_and_says_what_it_lacks() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::write(folder.join("a.txt"), small_text()).unwrap();
    run(folder, 0, &["data", "prepare", "a.txt", "--out", "set", "--validation", "0"]);
    let args =
        ["train", TINY, "--run", "r", "--steps", "2", "--set", "data.path=set", "--set", "sample.tokens=0"];
    let trained = run(folder, 0, &args).out;
    assert!(!trained.contains("validation"), "{trained}");
    let lacking = run(folder, 2, &["eval", "--run", "r"]).err;
    assert!(lacking.contains("no validation sequence of 64 tokens"), "{lacking}");
}

#[test]
fn configs_are_printed_whole() {
    let folder = tempfile::tempdir().unwrap();
    let printed = run(folder.path(), 0, &["config", "--print", TINY, "--set", "train.seed=5"]).out;
    assert!(printed.contains("seed = 5\n") && printed.contains("rope_theta = 10000.0\n"), "{printed}");
    fs::write(folder.path().join("printed.toml"), &printed).unwrap();
    assert_eq!(run(folder.path(), 0, &["config", "--print", "printed.toml"]).out, printed);
    let reference = run(folder.path(), 0, &["config", "--reference"]).out;
    assert!(reference.contains("| `train.steps` | integer | `400` |"), "{reference}");
}

/// The commands of the fifth step of README.md.
#[test]
fn the_readme_trains_on_itself() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md"), folder.join("README.md")).unwrap();
    let done = run(folder, 0, &["data", "prepare", "README.md", "--out", "runs/data"]).out;
    assert!(!done.contains("validation  0 tokens"), "{done}");
    let data = ["--set", "data.path=runs/data", "--set", "grid.replicas=2", "--run", "runs/own"];
    let args = [&["train", TINY][..], &data, &["--steps", "2", "--set", "sample.tokens=2"]].concat();
    run(folder, 0, &args);
}

#[test]
fn a_text_too_small_to_share_out_is_refused_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.txt"), "a").unwrap();
    let refused = run(folder.path(), 2, &["data", "prepare", "a.txt", "--out", "set"]).err;
    assert!(refused.contains("--validation 0"), "{refused}");
    assert!(!folder.path().join("set").exists());
    run(folder.path(), 0, &["data", "prepare", "a.txt", "--out", "set", "--validation", "0"]);
    fs::write(folder.path().join("b.jsonl"), "{\"text\": \"a\"}\n").unwrap();
    let refused =
        run(folder.path(), 2, &["data", "prepare", "b.jsonl", "--out", "o", "--separator", "x"]).err;
    assert!(refused.contains("JSON lines by their names"), "{refused}");
}

/// What a disk that is full has not taken is no result.
#[test]
fn results_that_cannot_be_written_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let done = command(folder.path(), &["config", "--print"]).stdout(full).output().unwrap();
    assert_eq!(done.status.code(), Some(21));
    let said = String::from_utf8(done.stderr).unwrap();
    assert!(said.contains("cannot write to standard output: "), "{said}");
}
