//! A training run in which one rank does not come to an all-to-all: it ends, the rank is named, every rank leaves its
//! flight record.

use unisono_comm::watch::{Verdict, diagnose, read_records};
use unisono_comm::{Activity, CallState, Cause, Reason};
use unisono_train::run_folder::FLIGHT;
use unisono_train::{Fault, RunConfig, RunOptions, TrainError};

use crate::common::{self, try_run};

fn config() -> RunConfig {
    let mut config = common::config();
    config.watchdog.min_timeout_s = 1.0;
    config
}

#[test]
fn which_rank_did_not_join_nccl_1260() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut options = RunOptions::new(folder.path(), 4, 1);
    options.fault = Some(Fault::Stall { step: 4, rank: 2, kind: "dispatch" });
    let error = try_run(&config(), &options).err().expect("rank 2 stalls");
    let TrainError::Ranks(error) = error else { panic!("{error}") };
    let failure = &error.failure;
    assert!(matches!(failure.cause, Cause::Stalled { .. }), "{failure}");
    assert_eq!((failure.rank, failure.step), (2, 4));
    let text = failure.to_string();
    assert!(text.contains("is late: training, it has not come to dispatch_weights (call "), "{text}");
    assert!(text.contains(" on group 'experts', step 4) for rank 2"), "{text}");

    let found = read_records(&folder.path().join(FLIGHT)).expect("a folder of records");
    assert_eq!(found.records.len(), 4);
    for record in &found.records {
        assert_eq!((record.step, record.activity, &record.reason), (4, Activity::Step, &Reason::Stalled));
        let waits = record.calls.last().is_some_and(|entry| entry.state == CallState::Waiting);
        assert_eq!(waits, record.rank != 2);
    }
    let diagnosis = diagnose(&found.records);
    assert_eq!(diagnosis.culprits.len(), 1);
    assert!(
        matches!(&diagnosis.culprits[0].verdict, Verdict::Late { missing: Some(call), .. } if call.kind == "dispatch_weights")
    );
}

#[test]
fn a_run_that_fails_otherwise_leaves_its_records_too_and_a_good_one_leaves_none() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (good, bad) = (folder.path().join("good"), folder.path().join("bad"));
    let ran = common::run(&config(), &good, 2);
    assert_eq!(ran.summary.epoch, 1);
    assert!(!good.join(FLIGHT).exists());

    let mut config = config();
    config.train.on_non_finite = unisono_train::config::OnNonFinite::Halt;
    let mut options = RunOptions::new(&bad, 2, 1);
    options.fault = Some(Fault::PoisonGradient { step: 3 });
    let error = try_run(&config, &options).err().expect("it halts");
    assert!(matches!(error, TrainError::NonFinite { step: 3, .. }), "{error}");
    let found = read_records(&bad.join(FLIGHT)).expect("a folder of records");
    assert_eq!(found.records.len(), 2);
    assert!(
        matches!(&found.records[1].reason, Reason::Failed { message, .. } if message.contains("halted at step 3"))
    );
}
