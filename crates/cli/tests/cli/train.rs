//! Runs from beginning to end, and what can be done with them.

use std::fs;

use serde_json::Value;

use crate::common::{TINY, command, dataset, run, train};

#[test]
fn a_run_trains_shows_and_leaves_what_it_should() {
    let folder = tempfile::tempdir().unwrap();
    let done = train(folder.path(), "a", &["--ranks", "2", "--threads", "1"]);
    for part in [
        "4 replicas in expert groups of 2, folded onto 2 ranks of 1 thread",
        "\nstep  1/20  loss 8.",
        "\nstep 20/20  loss ",
        "step 20/20  validation loss ",
        "step 20/20  checkpoint of ",
        " a sample of text ",
        "What moved",
        "reduce scatter",
        "same node",
        "Time by phase",
        "Expert load",
        "even routing  at most  as routed  measured",
        "fullest: parameters ",
        "generate --run a",
        "train --run a --resume",
    ] {
        assert!(done.out.contains(part), "no {part:?} in\n{}", done.out);
    }
    assert!(
        !done.out.contains('\x1b') && done.err.is_empty(),
        "no control codes, no complaints: {}",
        done.err
    );
    let lines = done.out.lines().filter(|line| line.contains(" tok/s"));
    let steps: Vec<&str> = lines.map(|line| line.split("  loss").next().unwrap()).collect();
    assert_eq!(steps, ["step  1/20", "step  5/20", "step 10/20", "step 15/20", "step 20/20"]);
    let (before, rest) = done.out.split_once("── a sample of text ").unwrap();
    let (_, summary) = rest.split_once("\nSummary\n").unwrap();
    // Paths are as long as they are.
    for line in
        before.lines().chain(summary.lines()).filter(|line| !line.contains('/') || line.contains(" tok/s"))
    {
        assert!(line.chars().count() <= 100, "more than 100 columns: {line}");
    }

    let metrics = fs::read_to_string(folder.path().join("a/metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count(), 20 + 2);
    let summary: Value =
        serde_json::from_slice(&fs::read(folder.path().join("a/summary.json")).unwrap()).unwrap();
    assert!(summary["sample"].as_str().unwrap().len() > 1);

    let mut files = fs::read_dir(folder.path().join("a")).unwrap().map(|entry| entry.unwrap().path());
    let events = files.find(|path| path.to_string_lossy().contains("tfevents")).unwrap();
    let events = fs::read(events).unwrap();
    for tag in [
        "loss_metrics/global_avg_loss",
        "loss_metrics/global_max_loss",
        "throughput(tps)",
        "tflops",
        "mfu(%)",
        "time_metrics/end_to_end(s)",
        "time_metrics/data_loading(s)",
        "memory/max_active(GiB)",
        "moe/load_max_over_mean",
        "moe/router_entropy",
        "moe/dropped(%)",
        "goodput/effective_ratio",
    ] {
        assert!(events.windows(tag.len()).any(|window| window == tag.as_bytes()), "{tag}");
    }

    let text =
        run(folder.path(), 0, &["generate", "--run", "a", "--prompt", "The king", "--tokens", "8"]).out;
    assert!(text.starts_with("The king") && text.len() > 12, "{text:?}");
    let again =
        run(folder.path(), 0, &["generate", "--run", "a", "--prompt", "The king", "--tokens", "8"]).out;
    assert_eq!(text, again);

    let loss = |ranks: &str| -> Value {
        let done = run(folder.path(), 0, &["eval", "--run", "a", "--ranks", ranks, "--json"]);
        serde_json::from_str(&done.out).unwrap()
    };
    assert_eq!(loss("1"), loss("4"));
    assert_eq!(loss("1")["step"], 20);
    assert_eq!(loss("1")["loss"], summary["validation"]["loss"]);
    let shown = run(folder.path(), 0, &["eval", "--run", "a", "--step", "10"]).out;
    assert!(shown.starts_with("step 10: validation loss "), "{shown}");
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one_on_any_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let quiet = ["--set", "sample.tokens=0", "--set", "evaluation.every=0"];
    let with = |more: &[&'static str]| [&quiet[..], more].concat();
    train(folder.path(), "whole", &with(&["--ranks", "1"]));
    // Cut short by fewer steps: with a cosine the shorter run would be another one.
    let stable = ["--set", "schedule.kind=wsd"];
    train(folder.path(), "long", &with(&[&["--ranks", "1"][..], &stable].concat()));
    train(folder.path(), "cut", &with(&[&["--ranks", "4", "--steps", "10"][..], &stable].concat()));
    let resumed =
        run(folder.path(), 0, &["train", "--run", "cut", "--resume", "--ranks", "2", "--steps", "20"]);
    assert!(resumed.out.contains("resume  from the checkpoint of step 10"), "{}", resumed.out);
    let same = run(folder.path(), 0, &["diff", "long", "cut"]).out;
    assert!(same.starts_with("identical\n  compared: steps with metrics: 20, with hashes: 20"), "{same}");

    let nothing = run(folder.path(), 0, &["train", "--run", "cut", "--resume"]).out;
    assert!(nothing.contains("The run is at step 20 of 20 already"), "{nothing}");

    let other = run(folder.path(), 1, &["diff", "whole", "long"]).out;
    assert!(other.starts_with("different from step 5 on\n  first in step 5: learning_rate: "), "{other}");
    assert!(other.contains("config: schedule.kind = \"cosine\" and \"wsd\""), "{other}");
}

#[test]
fn diff_finds_other_seeds_and_missing_steps() {
    let folder = tempfile::tempdir().unwrap();
    let quiet = ["--steps", "6", "--set", "sample.tokens=0", "--set", "schedule.warmup_steps=2"];
    train(folder.path(), "one", &[&["--ranks", "1"][..], &quiet].concat());
    train(folder.path(), "two", &[&["--ranks", "2", "--threads", "2"][..], &quiet].concat());
    train(folder.path(), "seed", &[&["--set", "train.seed=7"][..], &quiet].concat());
    let same = run(folder.path(), 0, &["diff", "one", "two"]).out;
    assert!(same.starts_with("identical\n"), "{same}");
    let other = run(folder.path(), 1, &["diff", "one", "seed"]).out;
    for part in [
        "different from step 1 on\n",
        "\n  first in step 1: loss: ",
        "\n  then after step 1: tensor ",
        "\n  then in the checkpoint of step 6: tensor ",
        ", element 0: ",
        "config: train.seed = 42 and 7",
    ] {
        assert!(other.contains(part), "no {part:?} in\n{other}");
    }
    // A key that only the second has.
    let file = folder.path().join("one/config.toml");
    let text = fs::read_to_string(&file).unwrap();
    let without: Vec<&str> = text.lines().filter(|line| !line.starts_with("path = ")).collect();
    fs::write(&file, without.join("\n")).unwrap();
    let other = run(folder.path(), 1, &["diff", "one", "seed"]).out;
    assert!(other.contains("config: data.path = nothing and \""), "{other}");
    fs::write(&file, text).unwrap();
    // A run that has gone on since: what both have is the same, and it is said which is longer.
    run(
        folder.path(),
        0,
        &["train", "--run", "two", "--resume", "--steps", "8", "--set", "optimizer.learning_rate=0.001"],
    );
    let longer = run(folder.path(), 0, &["diff", "one", "two"]).out;
    assert!(longer.starts_with("identical as far as both go, to step 6\n"), "{longer}");
    assert!(longer.contains("the first ends at step 6, the second at 8"), "{longer}");
}

#[test]
fn checkpoints_are_listed_and_checked() {
    let folder = tempfile::tempdir().unwrap();
    train(folder.path(), "a", &["--steps", "6", "--set", "checkpoint.every=3", "--set", "sample.tokens=0"]);
    let listed = run(folder.path(), 0, &["checkpoint", "ls", "a"]).out;
    let steps: Vec<&str> = listed.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(steps, ["step", "3", "6"]);
    let good = run(folder.path(), 0, &["checkpoint", "verify", "a"]).out;
    assert_eq!(good.matches("every hash is right").count(), 2, "{good}");

    let shards = fs::read_dir(folder.path().join("a/checkpoints/step-000006")).unwrap();
    let mut shards: Vec<_> = shards.map(|entry| entry.unwrap().path()).collect();
    shards.sort();
    let shard =
        shards.into_iter().find(|path| path.ends_with("unit000-dense-000-of-002.safetensors")).unwrap();
    let mut bytes = fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let bad = run(folder.path(), 3, &["checkpoint", "verify", "a"]);
    for part in
        ["unit000-dense-000-of-002.safetensors is corrupt at byte ", "optimizer.", "use an earlier step"]
    {
        assert!(bad.err.contains(part), "no {part:?} in {}", bad.err);
    }
    assert!(bad.out.starts_with("step 3:"), "{}", bad.out);
    run(folder.path(), 0, &["checkpoint", "verify", "a", "--step", "3"]);

    // What reads a checkpoint passes over the damaged one and says so.
    for command in ["eval", "generate"] {
        let said = run(folder.path(), 0, &[command, "--run", "a"]).err;
        assert!(said.starts_with("warning: passed over a checkpoint: step 6: "), "{said}");
    }
    let resumed = run(folder.path(), 0, &["train", "--run", "a", "--resume"]);
    assert!(resumed.out.contains("resume  from the checkpoint of step 3"), "{}", resumed.out);
    assert!(resumed.err.starts_with("warning: passed over a checkpoint: step 6: "), "{}", resumed.err);
}

#[test]
fn a_trace_has_a_process_a_rank_and_two_lanes() {
    let folder = tempfile::tempdir().unwrap();
    train(folder.path(), "a", &["--ranks", "2", "--steps", "2", "--trace", "--set", "sample.tokens=0"]);
    let trace: Value =
        serde_json::from_slice(&fs::read(folder.path().join("a/trace.json")).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    for rank in 0..2 {
        for lane in 0..2 {
            let spans = events.iter().filter(|e| e["ph"] == "X" && e["pid"] == rank && e["tid"] == lane);
            assert!(spans.count() > 10, "rank {rank}, lane {lane}");
        }
    }
}

#[test]
fn runs_have_a_folder_by_date_and_the_newest_is_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let args = crate::common::train_args("x", &["--steps", "2", "--set", "sample.tokens=0"]);
    let args: Vec<&str> = args.into_iter().filter(|arg| !["--run", "x"].contains(arg)).collect();
    run(folder.path(), 0, &args);
    let runs: Vec<_> = fs::read_dir(folder.path().join("runs")).unwrap().collect();
    let name = runs[0].as_ref().unwrap().file_name().into_string().unwrap();
    assert!(name.len() == 15 && name.as_bytes()[8] == b'-', "{name}");
    let resumed = run(folder.path(), 0, &["train", "--resume", "--steps", "3"]).out;
    assert!(resumed.contains(&format!("run     runs/{name}\n")), "{resumed}");
}

/// Nobody reads what it prints: no reason to stop.
#[test]
fn a_closed_pipe_does_not_end_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let args = crate::common::train_args("a", &["--steps", "3", "--set", "log.every=1"]);
    let mut child = command(folder.path(), &args)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn a_run_without_steps_names_the_command_that_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let said = train(folder.path(), "a", &["--steps", "0"]).out;
    assert!(!said.contains("generate") && said.contains("train --run a --resume --steps 1"), "{said}");
    let again = run(folder.path(), 0, &["train", "--run", "a", "--resume", "--steps", "1"]);
    assert!(again.err.contains("a has no checkpoint yet: the run begins again at step 0"), "{}", again.err);
}

#[test]
fn a_comparison_in_json_is_of_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let data = format!("data.path={}", dataset().display());
    let ask = ["compare", TINY, "--steps", "2", "--set", "model.first_dense=0", "--set", &data, "--json"];
    let more = ["--set", "schedule.warmup_steps=1", "--set", "sample.tokens=0"];
    let both: Value = serde_json::from_str(&run(folder.path(), 0, &[&ask[..], &more].concat()).out).unwrap();
    for key in ["validation_loss", "training_loss", "parameters", "flop_per_token", "tokens", "seconds"] {
        assert!(both["dense"][key].as_f64() > Some(0.0), "{key}: {both}");
    }
    let of = |side: &str, key: &str| both[side][key].as_f64().unwrap();
    assert!(of("sparse", "parameters") > of("dense", "parameters"));
    assert_eq!(of("dense", "dispatched_bytes_per_step"), 0.0);
}
