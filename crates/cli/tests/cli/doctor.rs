//! `unisono doctor`.

use std::fs;
use std::path::Path;

use serde_json::Value;
use unisono_data::{Dataset, Verify};
use unisono_train::{Event, Fault, Observer, RunConfig, RunOptions, train_on};

use crate::common::{TINY, dataset, run, train};

struct Quiet;

impl Observer for Quiet {
    fn event(&self, _: Event) {}
}

/// A run of the smallest example on 4 ranks, of which rank 2 does not come to an all-to-all of step 3.
fn stalled(folder: &Path) {
    let text = fs::read_to_string(TINY).unwrap();
    let config = RunConfig::load(&text, &["watchdog.min_timeout_s=1".into()]).unwrap();
    let data = Dataset::open(dataset(), Verify::OnFirstUse).unwrap();
    let mut options = RunOptions::new(folder, 4, 1);
    options.fault = Some(Fault::Stall { step: 4, rank: 2, kind: "combine" });
    train_on(&config, &options, &data, &Quiet).unwrap_err();
}

fn json(folder: &Path, code: i32) -> Value {
    serde_json::from_str(&run(folder, code, &["doctor", "a", "--json"]).out).unwrap()
}

#[test]
fn the_late_rank_is_named_also_from_what_is_left_of_the_records() {
    let folder = tempfile::tempdir().unwrap();
    let flight = folder.path().join("a/flight");
    stalled(&folder.path().join("a"));
    let said = run(folder.path(), 1, &["doctor", "a"]).out;
    for part in [
        "a: start 1, ended by the watchdog after step 3 of 20\n",
        "  rank 2 is late: training, it has not come to combine (call ",
        " on group 'experts', step 4); it was in step 4, its last call was dispatch_weights (call ",
        "  rank 3 waits in combine (call ",
        ") for rank 2\n",
        "  flight records: 4 of 4 ranks, the last of 20",
    ] {
        assert!(said.contains(part), "no {part:?} in\n{said}");
    }
    let report = json(folder.path(), 1);
    assert_eq!(report["outcome"], "stalled");
    let culprit = &report["culprits"][0];
    assert_eq!((&culprit["rank"], &culprit["step"]), (&Value::from(2), &Value::from(4)));
    assert_eq!((&culprit["verdict"], &culprit["missing"]["kind"]), (&"late".into(), &"combine".into()));
    assert!(
        report["waiting"].as_array().unwrap().iter().any(|wait| wait["for_ranks"] == Value::from(vec![2]))
    );

    // A damaged record is named and the others are used.
    let good = fs::read(flight.join("rank-0.json")).unwrap();
    fs::write(flight.join("rank-0.json"), &good[..good.len() / 2]).unwrap();
    let said = run(folder.path(), 1, &["doctor", "a"]).out;
    for part in
        ["rank 2 is late", "3 of 4 ranks", "none of 0\n", "not used: a/flight/rank-0.json is damaged: EOF"]
    {
        assert!(said.contains(part), "no {part:?} in\n{said}");
    }
    fs::write(flight.join("rank-0.json"), good).unwrap();

    // A rank that was killed leaves none.
    fs::remove_file(flight.join("rank-2.json")).unwrap();
    let said = run(folder.path(), 1, &["doctor", "a"]).out;
    for part in ["rank 2 left no flight record: it died or is stopped; others were in step 4", "none of 2\n"]
    {
        assert!(said.contains(part), "no {part:?} in\n{said}");
    }

    // Records of an earlier start say nothing about this one.
    let identity = fs::read_to_string(folder.path().join("a/run.json")).unwrap();
    fs::write(folder.path().join("a/run.json"), identity.replace("\"epoch\": 1", "\"epoch\": 2")).unwrap();
    let said = run(folder.path(), 1, &["doctor", "a"]).out;
    assert!(
        said.contains("no rank left a flight record") && said.contains("rank 3 is of start 1 of run"),
        "{said}"
    );
    // Nor does a hostile file do any harm.
    fs::write(folder.path().join("a/run.json"), "{").unwrap();
    fs::write(folder.path().join("a/metrics.jsonl"), vec![0xff; 1 << 16]).unwrap();
    fs::write(folder.path().join("a/summary.json"), "[1]").unwrap();
    let said = run(folder.path(), 1, &["doctor", "a"]).out;
    assert!(said.contains("run.json is damaged") && said.contains("summary.json is damaged"), "{said}");
    assert!(said.contains("rank 2 left no flight record"), "{said}");
}

#[test]
fn a_run_that_ended_well_is_well_and_what_is_no_run_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    train(folder.path(), "a", &["--steps", "4", "--set", "sample.tokens=0"]);
    let said = run(folder.path(), 0, &["doctor", "a"]).out;
    assert_eq!(said, "a: start 1, ended well after step 4 of 4\n");
    assert_eq!(json(folder.path(), 0)["outcome"], "ended");
    // Nor does a start with nothing to do change that.
    run(folder.path(), 0, &["train", "--run", "a", "--resume"]);
    assert_eq!(run(folder.path(), 0, &["doctor", "a"]).out, said);
    let refused = run(folder.path(), 2, &["doctor", "."]);
    assert!(refused.err.contains(". is not the folder of a run"), "{}", refused.err);
    // All of a process was killed: nothing could be written.
    fs::remove_file(folder.path().join("a/summary.json")).unwrap();
    let said = run(folder.path(), 1, &["doctor", "a"]).out;
    assert!(said.contains("all of it was killed at once"), "{said}");
}
