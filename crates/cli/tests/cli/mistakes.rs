//! What is said, and with which exit code, when something is wrong.

use std::fs;
use std::path::Path;

use crate::common::{TINY, dataset, run, train, train_args};

/// Expects an exit code, nothing on stdout, and on stderr one or two lines with all of `parts`.
fn refused(folder: &Path, code: i32, args: &[&str], parts: &[&str]) {
    let done = run(folder, code, args);
    let lines = done.err.lines().count();
    assert!((1..=2).contains(&lines) && done.err.starts_with("error: "), "{args:?}: {}", done.err);
    assert_eq!(done.out, "", "{args:?}");
    for part in parts {
        assert!(done.err.contains(part), "{args:?}: no {part:?} in {}", done.err);
    }
}

#[test]
fn configs() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    refused(folder, 2, &["train", "none.toml"], &["none.toml", "`unisono config --print > FILE`"]);
    fs::write(folder.join("key.toml"), "# a comment\n[train]\nstep = 3\n").unwrap();
    refused(folder, 2, &["train", "key.toml"], &["key.toml: line 3: unknown field `step`", "`steps`"]);
    fs::write(folder.join("syntax.toml"), "[train\n").unwrap();
    refused(folder, 2, &["train", "syntax.toml"], &["syntax.toml: line 1: "]);
    fs::write(folder.join("value.toml"), "[train]\nmicro_batch = 0\n").unwrap();
    refused(folder, 2, &["train", "value.toml"], &["value.toml: train.micro_batch = 0: must be between 1"]);
    refused(folder, 2, &["train", "--set", "train.stepz=3"], &["--set train.stepz=3: unknown field `stepz`"]);
    let words = "expected a whole number of at least 0 in `train.steps`";
    refused(folder, 2, &["train", "--set", "train.steps=-1"], &[words]);
    refused(folder, 2, &["train", "--set", "watchdog.max_timeout_s=30s"], &["\"30s\", expected a number in"]);
    refused(folder, 2, &["train", "--set", "steps"], &["--set steps: must be key.path=value"]);
    refused(folder, 2, &["train", "--set", "model.top_k=99"], &["model.top_k = 99: must be between 1"]);
    let wsd = ["train", "--set", "schedule.kind=wsd", "--steps", "10"];
    refused(folder, 2, &wsd, &["schedule.decay_steps", "train.steps = 10"]);
    assert!(!folder.join("runs").exists(), "what is refused leaves nothing behind");
}

#[test]
fn layouts_and_folders() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let nodes = ["bench", "dispatch", "--ranks", "4", "--nodes", "1,2"];
    refused(folder, 2, &nodes, &["1, 2", "4 ranks"]);
    let of_clusters: [&[&str]; 10] = [
        &["--skew", "1"],
        &["--batch", "8"],
        &["--precision", "bf16"],
        &["--sequence", "64"],
        &["--tokens", "1T"],
        &["--optimizer", "adam"],
        &["--no-overlap"],
        &["--wire", "bf16"],
        &["--no-deduplication"],
        &["--layout", "dp2"],
    ];
    for option in of_clusters {
        let expected = format!("{} is for clusters", option[0]);
        refused(folder, 2, &[&["plan", TINY, "local"], option].concat(), &[&expected]);
    }
    refused(
        folder,
        2,
        &["train", TINY, "--ranks", "3"],
        &["ranks = 3 does not divide the grid's slots = 4; values that do: 1, 2, 4"],
    );
    let many = run(folder, 2, &["train", "--ranks", "0"]);
    assert!(many.err.contains("0 is not in 1..=65536"), "{}", many.err);
    refused(folder, 2, &["train", "--resume"], &["there is no run in runs/", "--run DIR"]);
    refused(folder, 2, &["train", "--resume", "--run", "none"], &["none holds no run to resume"]);
    train(folder, "a", &["--steps", "1", "--set", "sample.tokens=0"]);
    refused(folder, 2, &train_args("a", &[]), &["a already holds a run", "--resume", "--run"]);
    refused(
        folder,
        2,
        &["train", "--run", "a", "--resume", "--steps", "2", "--set", "train.seed=1"],
        &["resume asks for seed = 1, the run was started with seed = 42"],
    );
    refused(folder, 2, &["eval", "--run", "a", "--ranks", "3"], &["values that do: 1, 2, 4"]);
    refused(folder, 2, &["eval", "--run", "a", "--step", "9"], &["no checkpoint of step 9", "checkpoint ls"]);
    refused(folder, 2, &["generate", "--run", "a", "--temperature", "nan"], &["--temperature NaN: must be"]);
    refused(folder, 2, &["generate", "--run", "a", "--top-p", "0"], &["--top-p 0: must be above 0"]);
    refused(folder, 2, &["generate", "--run", "none"], &["none has no checkpoint that verifies"]);
    refused(folder, 2, &["checkpoint", "ls", "none"], &["none has no checkpoints"]);
    refused(folder, 2, &["diff", "a", "none"], &["none is not the folder of a run", "name one that"]);
    refused(folder, 2, &["doctor", "none"], &["none is not the folder of a run", "name one that"]);
    fs::write(folder.join("file"), "in the way").unwrap();
    refused(folder, 2, &train_args("file", &[]), &["file is a file: name a folder for the run with --run"]);
    for command in ["eval", "generate"] {
        refused(
            folder,
            2,
            &[command, "--run", "file"],
            &["file has no checkpoint that verifies: it is a file; name the folder"],
        );
    }
    refused(folder, 2, &["checkpoint", "ls", "file"], &["file has no checkpoints: name the folder of a run"]);
    let negative = ["generate", "--run", "a", "--temperature", "-1"];
    refused(folder, 2, &negative, &["--temperature -1: must be finite and at least 0"]);
}

#[test]
fn input_files() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    refused(folder, 3, &["train", "--set", "data.path=none"], &["none/dataset.json", "unisono data prepare"]);
    refused(folder, 3, &["data", "verify", "none"], &["none/dataset.json"]);
    refused(
        folder,
        3,
        &["data", "prepare", "none.txt", "--out", "o"],
        &["INPUT none.txt: there is no", ".jsonl"],
    );
    refused(folder, 3, &["data", "prepare", ".", "--out", "o"], &["INPUT .: it is a folder", "texts/*.txt"]);
    let args = ["data", "prepare", TINY, "--out", "o", "--tokenizer", "none.json"];
    refused(folder, 3, &args, &["--tokenizer none.json: there is no such file", "or leave it out"]);
    assert!(!folder.join("o").exists());
    fs::write(folder.join("file"), "in the way").unwrap();
    refused(
        folder,
        21,
        &["data", "prepare", TINY, "--out", "file"],
        &["cannot create file", "name another one"],
    );
    refused(
        folder,
        21,
        &["data", "prepare", TINY, "--out", "file/o"],
        &["cannot create file/o", "name another"],
    );
    refused(folder, 3, &["data", "verify", "file"], &["file/dataset.json", "unisono data prepare"]);
    refused(
        folder,
        3,
        &["plan", "validate", "none.csv"],
        &["CASES.csv none.csv: there is no such file", "docs/"],
    );
    refused(folder, 3, &["plan", "validate", "."], &["CASES.csv .: it is a folder", "docs/validation.md"]);
    refused(folder, 3, &["plan", "validate", "file"], &["file: lacks the columns "]);
    let args = ["plan", "validate", "file", "--models", "none.csv"];
    refused(folder, 3, &args, &["--models none.csv: there is no such file", "leave it out"]);
    refused(folder, 3, &["plan", ".", "h100x8"], &["./config.json: ", "name a Hugging Face config.json"]);
    refused(folder, 3, &["plan", "DeepSeek-V3", "none.toml"], &["none.toml: ", "docs/plan.md"]);
    refused(folder, 2, &["plan", "DeepSeek-V3", "z100x8"], &["nearest: A100", "unisono plan --gpus"]);
    refused(folder, 2, &["train", "."], &["cannot read the config .: ", "name a file, not a folder"]);
    refused(folder, 3, &["train", "--machine", "."], &[".: ", "name a file, not a folder"]);
    refused(folder, 2, &["bench", "local", "--out", "."], &["--out .: it is a folder"]);
    refused(
        folder,
        2,
        &["bench", "local", "--out", "none/m.toml"],
        &["there is no such folder; make it first"],
    );
    fs::write(folder.join("bad.jsonl"), "{\"text\": \"fine\"}\n{\"text\": 3}\n").unwrap();
    refused(folder, 3, &["data", "prepare", "bad.jsonl", "--out", "o"], &["bad.jsonl:2: "]);
    fs::write(folder.join("tokenizer.json"), "{}").unwrap();
    let args = ["data", "prepare", "bad.jsonl", "--out", "o", "--tokenizer", "tokenizer.json"];
    refused(folder, 3, &args, &["tokenizer.json cannot be used"]);
    let args = ["data", "prepare", "bad.jsonl", "--out", "o", "--validation", "1.5"];
    refused(folder, 2, &args, &["--validation 1.5: must be at least 0 and below 1"]);

    // Nothing is left of a run that cannot begin, so that it can be started again.
    fs::write(folder.join("short.txt"), "a few words").unwrap();
    run(folder, 0, &["data", "prepare", "short.txt", "--out", "short", "--validation", "0"]);
    let args = ["train", TINY, "--set", "data.path=short", "--run", "short-run"];
    refused(
        folder,
        2,
        &args,
        &["train.sequence_length = 64: the dataset has ", "set train.sequence_length to at most "],
    );
    assert!(!folder.join("short-run").exists());

    let copy = folder.join("copy");
    fs::create_dir(&copy).unwrap();
    for entry in fs::read_dir(dataset()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
    }
    let shard = copy.join("train-00000.tokens");
    let mut bytes = fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&shard, bytes).unwrap();
    refused(folder, 3, &["data", "verify", "copy"], &["train-00000.tokens: section tokens, byte "]);
    let damaged =
        run(folder, 3, &["train", TINY, "--set", "data.path=copy", "--run", "r", "--set", "sample.tokens=0"]);
    assert!(damaged.err.contains("train-00000.tokens: section tokens, byte "), "{}", damaged.err);
}

#[test]
fn a_folder_that_cannot_be_written() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "in the way").unwrap();
    refused(folder.path(), 21, &train_args("file/run", &[]), &["cannot make file/run: ", "name another one"]);
}

/// A learning rate that no model survives.
#[test]
fn numbers_that_are_not_finite() {
    let folder = tempfile::tempdir().unwrap();
    let args = [
        "--set",
        "optimizer.learning_rate=1e30",
        "--set",
        "schedule.warmup_steps=0",
        "--set",
        "train.on_non_finite=halt",
        "--set",
        "sample.tokens=0",
    ];
    let done = run(folder.path(), 17, &train_args("a", &args));
    for part in ["error: halted at step ", "no rank updated", "seed 42"] {
        assert!(done.err.contains(part), "no {part:?} in {}", done.err);
    }
}

#[test]
fn benchmarks() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |line: &str, part: &str| {
        let args: Vec<&str> = line.split(' ').collect();
        let done = run(folder.path(), 2, &args);
        assert!(done.err.contains(part), "{line}: {}", done.err);
    };
    let few = "--d-model 32 --vocab 64 --layers 1 --seq 1 --micro 1 --batch 2";
    for line in [format!("bench step --steps 1 --warmup 0 {few}"), format!("bench gemm {few}")] {
        run(folder.path(), 0, &line.split(' ').collect::<Vec<_>>());
    }
    for (line, part) in [
        ("bench baseline --vocab 5000", "5000 is not in 1..=4096"),
        ("bench baseline --steps 0", "0 is not in 1..="),
        ("bench step --ranks 0", "0 is not in 1..="),
        (
            "bench step --heads 3",
            "--d-model = 256 cannot be shared out evenly over --heads = 3: choose a multiple",
        ),
        ("bench step --kv-heads 3", "--kv-heads = 3 does not divide --heads = 4; values that do"),
        ("bench step --ranks 3", "--batch = 32 cannot be shared out evenly over replicas = 3"),
        ("bench step --ranks 4 --replicas 2", "ranks = 4 does not divide the grid's slots = 2"),
        (
            "bench step --ranks 4 --expert-group 3",
            "grid.expert_group = 3 does not divide the grid's slots = 4",
        ),
        ("bench dispatch --experts 6 --ranks 4", "does not divide --experts = 6"),
        ("bench dispatch --groups 3", "--groups = 3 does not divide --experts = 16"),
        ("bench dispatch --top-k 99", "--top-k = 99: must be between 1 and --experts = 16"),
        ("bench overlap --link-mb-per-s 0", "must be a number above 0"),
        ("bench overlap --link-mb-per-s -5", "must be a number above 0"),
        ("bench overlap --link-mb-per-s nan", "must be a number above 0"),
        ("bench collectives --kib 99999999999", "is not in 1..=1048576"),
        ("bench collectives --kib 0", "0 is not in 1..="),
        ("bench collectives --rounds 0", "0 is not in 1..="),
        ("bench collectives --only all", "[possible values: all-gather, reduce-scatter, all-reduce,"),
        (
            "bench exchange --ranks 3",
            "3 ranks cannot share 16 experts evenly; set --experts to a multiple of 3",
        ),
        ("bench exchange --top-k 17", "a token cannot visit 17 of 16 experts; lower --top-k"),
        ("bench exchange --ranks 1", "one rank sends nothing; give it at least 2"),
        ("bench dispatch --experts 0", "0 is not in 1..="),
        ("bench dispatch --rounds 0", "0 is not in 1..="),
    ] {
        refused(line, part);
    }
    let sizes = "--d-model 32 --layers 1 --heads 2 --kv-heads 1 --experts 8 --expert-ff 32 --seq 8 --batch 8 --micro 1";
    let small = format!("bench baseline --vocab 64 --steps 1 {sizes}");
    run(folder.path(), 0, &small.split(' ').collect::<Vec<_>>());
    // What would cross between nodes is said where there are any.
    for (nodes, said) in [("2", false), ("1,1", true)] {
        let line = format!("bench dispatch --vocab 64 --rounds 1 --steps 1 --nodes {nodes} {sizes}");
        let out = run(folder.path(), 0, &line.split(' ').collect::<Vec<_>>()).out;
        assert_eq!(out.contains("Uniform routing to 2 nodes"), said, "{out}");
    }
    // Ways through nodes are there where there are some; every way of a size has the same volume.
    for (nodes, ways) in [("4", 4), ("2,2", 7)] {
        let sizes = "--ranks 4 --tokens 8,16 --d-model 8 --rounds 1 --json --plot ways.svg";
        let line = format!("bench exchange {sizes} --nodes {nodes}");
        let out = run(folder.path(), 0, &line.split(' ').collect::<Vec<_>>()).out;
        let json: serde_json::Value = serde_json::from_str(&out).unwrap();
        let rows = json["exchanges"].as_array().unwrap();
        assert_eq!(rows.len(), 2 * ways, "{out}");
        for row in rows {
            let same = rows.iter().filter(|other| other["tokens"] == row["tokens"]);
            assert!(same.clone().count() == ways && same.clone().all(|other| other["bytes"] == row["bytes"]));
            assert!(row["gb_per_s"].as_f64() > Some(0.0) && row["native_gb_per_s"].is_null());
        }
        let plot = std::fs::read_to_string(folder.path().join("ways.svg")).unwrap();
        assert_eq!(plot.matches("<polyline").count(), 2 * ways, "{plot}");
    }
}
