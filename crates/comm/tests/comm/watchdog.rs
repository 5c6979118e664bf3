//! A rank that does not come to a call is named, by the process of all ranks or by processes that share only a folder.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use crate::common::{gather_one, within_seconds};
use proptest::prelude::*;
use unisono_comm::watch::{
    Culprit, Grace, GroupRecord, Identity, LARGEST_RECORD_BYTES, Verdict, diagnose, in_time, read_records,
};
use unisono_comm::{
    Activity, CallSite, CallState, Cause, CommError, Communicator, Failure, FlightDeck, FlightEntry,
    FlightRecord, Limits, Reason, RunError, Watchdog, run_ranks,
};

/// For work that is done in no time, on a machine that may be busy.
const PATIENT: Limits = Limits { min: Duration::from_secs(1), max: Duration::from_secs(600) };
const QUICK: Limits = Limits { min: Duration::from_millis(200), max: Duration::from_secs(600) };

fn grace() -> Grace {
    Grace { records: Duration::from_secs(10), ranks: Duration::from_secs(10) }
}

fn never(_: &Failure) {
    unreachable!("all ranks come back");
}

fn seat(deck: &FlightDeck, comm: &Communicator, folder: &Path) {
    deck.join(comm);
    deck.keep_in(folder, &identity());
}

fn identity() -> Identity {
    Identity { run_id: "a".into(), epoch: 3 }
}

/// Five fast steps; in the last one rank 2 does not come to the gather.
fn five_steps(comm: &Communicator) -> Result<(), CommError> {
    if comm.rank() == 2 {
        comm.plant_stall(5, "all_gather");
    }
    for step in 1..=5 {
        comm.set_step(step);
        comm.enter(Activity::Step);
        comm.barrier()?;
        gather_one(comm, 1)?;
        comm.enter(Activity::Between);
    }
    Ok(())
}

fn assert_rank_2_is_named(failure: &Failure, folder: &Path) {
    assert_eq!((failure.rank, failure.step), (2, 5));
    let Cause::Stalled { detail, .. } = &failure.cause else { panic!("{failure}") };
    assert_eq!(detail, "is late: training, it has not come to all_gather (call 9 on group 'world', step 5)");
    let waiting: Vec<usize> = failure.waiting.iter().map(|waiting| waiting.rank).collect();
    assert_eq!(waiting, [0, 1, 3]);
    assert!(
        failure.waiting.iter().all(|waiting| waiting.for_ranks == [2] && waiting.call.kind == "all_gather")
    );
    let text = failure.to_string();
    assert!(
        text.ends_with(
            "its last call was barrier (call 8 on group 'world', step 5); ranks 0, 1, 3 wait in \
        all_gather (call 9 on group 'world', step 5) for rank 2"
        ),
        "{text}"
    );

    let found = read_records(folder).expect("a folder of records");
    assert!(found.damaged.is_empty());
    assert_eq!(found.records.iter().map(|record| record.rank).collect::<Vec<_>>(), [0, 1, 2, 3]);
    for record in &found.records {
        assert_eq!((&record.run, record.step, record.activity), (&identity(), 5, Activity::Step));
        assert_eq!(record.reason, Reason::Stalled);
        let last = record.calls.last().expect("calls");
        let state = if record.rank == 2 { CallState::Finished } else { CallState::Waiting };
        assert_eq!(last.state, state);
        assert!(record.calls.windows(2).all(|pair| pair[0].started_us <= pair[1].started_us));
        assert_eq!(record.groups["world"].members, [0, 1, 2, 3]);
    }
    let again = diagnose(&found.records);
    assert_eq!(again.waiting, failure.waiting);
}

#[test]
fn threads_name_the_rank_that_does_not_join_and_write_every_flight_record() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().to_path_buf();
    let error = within_seconds(60, move || {
        let deck = FlightDeck::default();
        let watchdog = Watchdog::start(deck.clone(), PATIENT, grace(), never).expect("a thread");
        let outcome = run_ranks(4, |comm| {
            seat(&deck, &comm, &path);
            five_steps(&comm)
        });
        drop(watchdog);
        outcome.expect_err("rank 2 stalls")
    });
    assert_rank_2_is_named(&error.failure, folder.path());
}

/// As under MPI: every rank has a deck and a watchdog of its own, and they share nothing but a folder.
#[test]
fn processes_name_the_rank_that_does_not_join_from_each_others_records() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().to_path_buf();
    let seen = within_seconds(60, move || {
        let seen = Mutex::new(Vec::new());
        let outcome: Result<Vec<()>, RunError> = run_ranks(4, |comm| {
            let deck = FlightDeck::default();
            seat(&deck, &comm, &path);
            let watchdog = Watchdog::start(deck, PATIENT, grace(), never)?;
            let outcome = five_steps(&comm);
            drop(watchdog);
            if let Err(CommError::Failed(failure)) = &outcome {
                seen.lock().expect("no rank panics").push(failure.clone());
            }
            outcome.map_err(Box::<dyn std::error::Error + Send + Sync>::from)
        });
        outcome.expect_err("rank 2 stalls");
        seen.into_inner().expect("no rank panics")
    });
    assert_eq!(seen.len(), 4, "every rank was told");
    for failure in seen {
        assert_rank_2_is_named(&failure, folder.path());
    }
}

#[test]
fn a_rank_that_wakes_up_again_is_no_reason_and_neither_is_a_long_checkpoint() {
    within_seconds(60, || {
        let deck = FlightDeck::default();
        let watchdog = Watchdog::start(deck.clone(), QUICK, grace(), never).expect("a thread");
        let folder = tempfile::tempdir().expect("a temporary folder");
        run_ranks(3, |comm| {
            seat(&deck, &comm, folder.path());
            let busy = |seconds: f64| {
                if comm.rank() == 0 {
                    std::thread::sleep(Duration::from_secs_f64(seconds));
                }
            };
            // The first step and all that is no step may take long. Later steps may be ten times slower than before.
            let work = [
                (Activity::Step, 0.6),
                (Activity::Between, 0.6),
                (Activity::Step, 0.05),
                (Activity::Validation, 0.6),
                (Activity::Checkpoint, 0.8),
                (Activity::Step, 1.0),
            ];
            for (activity, seconds) in work {
                comm.enter(activity);
                busy(seconds);
                comm.barrier()?;
            }
            Ok::<_, CommError>(())
        })
        .expect("nobody stalls");
        drop(watchdog);
        assert!(!folder.path().join("rank-0.json").exists());
    });
}

/// A rank that works alone may take as long as it gets on; if it does not, it is found.
#[test]
fn a_rank_that_works_alone_and_says_that_it_gets_on_is_waited_for() {
    for (gets_on, expected) in [(true, true), (false, false)] {
        within_seconds(60, move || {
            let deck = FlightDeck::default();
            let limits = Limits { max: Duration::from_millis(500), ..QUICK };
            let watchdog = Watchdog::start(deck.clone(), limits, grace(), never).expect("a thread");
            let folder = tempfile::tempdir().expect("a temporary folder");
            let outcome = run_ranks(3, |comm| {
                seat(&deck, &comm, folder.path());
                for _ in 0..(if comm.rank() == 0 { 150 } else { 0 }) {
                    std::thread::sleep(Duration::from_millis(10));
                    if gets_on {
                        comm.beat();
                    }
                }
                comm.barrier()
            });
            drop(watchdog);
            assert_eq!(outcome.is_ok(), expected);
        });
    }
}

#[test]
fn a_rank_that_is_stuck_outside_of_all_calls_is_left_to_the_owner_of_the_process() {
    within_seconds(60, || {
        let given_up = Arc::new(AtomicBool::new(false));
        let abandon = {
            let given_up = Arc::clone(&given_up);
            move |failure: &Failure| {
                assert_eq!(failure.rank, 1);
                given_up.store(true, Ordering::SeqCst);
            }
        };
        let deck = FlightDeck::default();
        let limits = Limits { max: Duration::from_millis(300), ..QUICK };
        let short = Grace { ranks: Duration::from_millis(100), ..grace() };
        let watchdog = Watchdog::start(deck.clone(), limits, short, abandon).expect("a thread");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let error = run_ranks(2, |comm| {
            seat(&deck, &comm, folder.path());
            // Only the owner, here the test, can free it.
            while comm.rank() == 1 && !given_up.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(5));
            }
            comm.barrier()
        });
        drop(watchdog);
        assert!(matches!(error.expect_err("rank 1 was late").failure.cause, Cause::Stalled { .. }));
    });
}

#[test]
fn a_panic_leaves_the_records_of_the_moment() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let deck = FlightDeck::default();
    let error = run_ranks(3, |comm| {
        seat(&deck, &comm, folder.path());
        comm.set_step(7);
        comm.barrier()?;
        assert!(comm.rank() != 1, "expert 4 is missing");
        gather_one(&comm, 1).map(drop)
    })
    .expect_err("rank 1 panics");
    deck.write_failure(&error.failure).expect("written");
    let found = read_records(folder.path()).expect("a folder of records");
    let diagnosis = diagnose(&found.records);
    let [Culprit { rank: 1, step: 7, verdict: Verdict::Failed { message }, .. }] = &diagnosis.culprits[..]
    else {
        panic!("{diagnosis:?}");
    };
    assert_eq!(message, "panicked: expert 4 is missing");
}

/// What survivors say when a process is gone: told to stop, they write what they know.
#[test]
fn a_rank_that_died_is_named_by_those_that_waited_for_it() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let error = run_ranks(4, |comm| {
        let deck = FlightDeck::default();
        seat(&deck, &comm, folder.path());
        std::thread::scope(|scope| {
            comm.set_step(12);
            comm.barrier()?;
            if comm.rank() == 3 {
                while !(0..3).all(|rank| folder.path().join(format!("rank-{rank}.json")).exists()) {
                    std::thread::sleep(Duration::from_millis(5));
                }
                return Ok(());
            }
            let writer = scope.spawn(|| {
                let waits = |record: &FlightRecord| {
                    record.calls.last().is_some_and(|entry| entry.state == CallState::Waiting)
                };
                while !deck.records(&Reason::Terminated).iter().all(waits) {
                    std::thread::sleep(Duration::from_millis(5));
                }
                deck.write(&Reason::Terminated).expect("written");
            });
            let outcome = gather_one(&comm, 1).map(drop);
            writer.join().expect("no panic");
            outcome
        })
    })
    .expect_err("rank 3 leaves");
    assert_eq!(error.failure.rank, 3);
    let found = read_records(folder.path()).expect("a folder of records");
    let diagnosis = diagnose(&found.records);
    let silent = Culprit { rank: 3, step: 12, last_call: None, verdict: Verdict::Silent };
    assert_eq!(diagnosis.culprits, [silent]);
    assert_eq!(
        diagnosis.waiting_lines(),
        ["ranks 0, 1, 2 wait in all_gather (call 1 on group 'world', step 12) for rank 3"]
    );
}

/// A record of a rank of three that waits in the second call of the world.
fn waits(rank: usize, reason: Reason, written_us: u64) -> FlightRecord {
    let call = CallSite { step: 20, seq: 1, kind: "all_gather".into(), group: "world".into() };
    let state = CallState::Waiting;
    let (bytes_sent, bytes_received, started_us, ended_us) = (0, 0, 0, None);
    let entry = FlightEntry { call, message: None, bytes_sent, bytes_received, state, started_us, ended_us };
    let world = GroupRecord { members: vec![0, 1, 2], started: 2 };
    FlightRecord {
        format: 1,
        run: identity(),
        rank,
        ranks: 3,
        step: 20,
        activity: Activity::Step,
        reason,
        written_us,
        groups: [("world".to_owned(), world)].into(),
        calls: vec![entry],
    }
}

/// A launcher wakes a stopped rank to kill it, which then sees the others die.
#[test]
fn a_stopped_rank_is_silent_whatever_it_says_when_it_is_woken() {
    const SECOND: u64 = 1_000_000;
    let died = |rank| Reason::Failed { rank, message: "died".into(), step: Some(20), call: None };
    let others = [waits(1, Reason::Stalled, SECOND), waits(2, Reason::Stalled, SECOND + 1)];
    let silent = Culprit { rank: 0, step: 20, last_call: None, verdict: Verdict::Silent };
    for reason in [died(1), Reason::Terminated, Reason::Stalled] {
        let [one, two] = others.clone();
        let records = [waits(0, reason, 9 * SECOND), one, two];
        assert_eq!(diagnose(&records).culprits, std::slice::from_ref(&silent));
        assert_eq!(records.each_ref().map(in_time(&records)), [false, true, true]);
    }
    // Nor does it count what a rank says of another one after the watchdog.
    let [one, _] = others.clone();
    assert_eq!(diagnose(&[one.clone(), waits(2, died(1), 2 * SECOND)]).culprits, [silent]);
    // A rank that tells of itself does, and what it told of its step and call.
    let own = Reason::Failed { rank: 2, message: "no".into(), step: Some(21), call: None };
    let found = diagnose(&[one, waits(2, own, 2 * SECOND)]).culprits;
    let [Culprit { rank: 2, step: 21, verdict: Verdict::Failed { .. }, .. }] = &found[..] else {
        panic!("{found:?}");
    };
    // Without a watchdog the first who speaks is right, however late.
    let told = diagnose(&[waits(0, died(1), 9 * SECOND), waits(2, Reason::Terminated, SECOND)]).culprits;
    assert_eq!((told[0].rank, told[0].step), (1, 20));
}

/// What guards write of ranks that a launcher has killed one after the other.
#[test]
fn the_first_that_was_killed_has_died_unless_the_run_had_ended_before() {
    let killed = [waits(0, Reason::Killed, 12), waits(1, Reason::Killed, 10), waits(2, Reason::Killed, 11)];
    let found = diagnose(&killed);
    let [Culprit { rank: 1, step: 20, last_call: Some(_), verdict: Verdict::Failed { message } }] =
        &found.culprits[..]
    else {
        panic!("{found:?}");
    };
    assert!(message.starts_with("died"), "{message}");
    assert_eq!(found.waiting, [], "their records are of different moments");
    let failed = Reason::Failed { rank: 2, message: "no".into(), step: Some(20), call: None };
    for (earlier, culprit) in [(failed, Some(2)), (Reason::Terminated, None), (Reason::Stalled, None)] {
        let [zero, one, _] = killed.clone();
        let found = diagnose(&[zero, one, waits(2, earlier.clone(), 9)]).culprits;
        let failed = found.iter().find(|culprit| matches!(culprit.verdict, Verdict::Failed { .. }));
        assert_eq!(failed.map(|failed| failed.rank), culprit, "after {earlier:?}: {found:?}");
    }
}

/// A record with a group, a message and calls of several states.
fn some_record() -> FlightRecord {
    run_ranks(2, |comm| {
        let deck = FlightDeck::default();
        seat(&deck, &comm, Path::new("nowhere"));
        comm.subgroup("pair", &[0, 1])?.barrier()?;
        comm.shift(1 - comm.rank(), Arc::new(vec![1u8]), 1 - comm.rank(), vec![0u8], 0..1, 3)?;
        let pending = comm.start_barrier()?;
        let called = CallSite { step: 0, seq: 1, kind: "barrier".into(), group: "world".into() };
        let record = deck
            .records(&Reason::Failed { rank: 1, message: "no".into(), step: Some(0), call: Some(called) })
            .remove(0);
        pending.finish()?;
        Ok::<_, CommError>(record)
    })
    .expect("nobody fails")
    .remove(0)
}

#[test]
fn damaged_and_hostile_records_are_refused_with_a_reason_and_the_others_are_read() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let record = some_record();
    record.write(folder.path()).expect("written");
    // What cannot be written leaves nothing.
    fs::create_dir_all(folder.path().join("full/rank-0.json/x")).expect("created");
    record.write(&folder.path().join("full")).expect_err("a folder is in the way");
    assert_eq!(fs::read_dir(folder.path().join("full")).expect("there").count(), 1);
    let path = folder.path().join("rank-1.json");
    let own = folder.path().join("rank-0.json");
    let text = fs::read_to_string(&own).expect("written");
    assert_eq!(FlightRecord::read(&own, 0).expect("it was just written"), record);
    let swap = |from: &str, to: &str| {
        assert!(text.contains(from), "{from} is not in {text}");
        text.replacen("\"rank\":0", "\"rank\":1", 1).replacen(from, to, 1)
    };
    let cases: [(String, &str); 9] = [
        (String::new(), "EOF"),
        (text.clone(), "it is the record of rank 0"),
        (swap("\"format\":1", "\"format\":2"), "it has format 2"),
        (swap("\"ranks\":2", "\"ranks\":1"), "rank 1 of 1 ranks"),
        (swap("\"ranks\":2", "\"ranks\":99999999999999"), "rank 1 of 99999999999999 ranks"),
        (swap("\"members\":[0,1]", "\"members\":[0,7]"), "has rank 7 of 2 ranks"),
        (swap("\"group\":\"pair\"", "\"group\":\"none\""), "is on no group"),
        (swap("\"to\":1", "\"to\":9"), "between no ranks"),
        (format!("{}{}", "[".repeat(100_000), text), "invalid type"),
    ];
    for (damaged, reason) in cases {
        fs::write(&path, damaged).expect("written");
        let found = read_records(folder.path()).expect("the folder is good");
        assert_eq!((found.records.len(), found.damaged.len(), found.damaged[0].rank), (1, 1, 1));
        let problem = &found.damaged[0].problem;
        assert!(problem.contains("rank-1.json is damaged") && problem.contains(reason), "{problem}");
    }
    let file = fs::File::create(&path).expect("created");
    file.set_len(LARGEST_RECORD_BYTES + 1).expect("a hole");
    let found = read_records(folder.path()).expect("the folder is good");
    assert!(found.damaged[0].problem.contains("more than"), "{:?}", found.damaged);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    /// Whatever becomes of a record's bytes, reading it gives a reason or a record that a diagnosis can be made of.
    #[test]
    fn mutated_records_are_refused_or_diagnosed(edits in prop::collection::vec((0usize..4096, any::<u8>()), 1..4), cut in 0usize..64) {
        static RECORD: OnceLock<Vec<u8>> = OnceLock::new();
        let mut bytes = RECORD.get_or_init(|| serde_json::to_vec(&some_record()).expect("plain data")).clone();
        for (at, byte) in edits {
            let len = bytes.len();
            // Half of the edits put digits in, so that more of them can still be parsed.
            bytes[at % len] = if byte < 128 { b'0' + byte % 10 } else { byte };
        }
        bytes.truncate(bytes.len() - cut.saturating_sub(32));
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("rank-0.json");
        fs::write(&path, &bytes).expect("written");
        if let Ok(record) = FlightRecord::read(&path, 0) {
            let mut other = record.clone();
            other.rank = 1;
            let diagnosis = diagnose(&[record, other]);
            prop_assert!(diagnosis.culprits.len() <= 64);
            prop_assert!(diagnosis.waiting_lines().len() <= 2);
        }
    }
}
