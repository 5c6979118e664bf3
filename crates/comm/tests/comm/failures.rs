//! Whatever one rank does wrong, every rank gets an error that names it; nothing hangs.

use std::error::Error;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use crate::common::{gather_one, within_seconds};
use unisono_comm::{CallState, Cause, CommError, Communicator, Part, RunError, ThreadRanks, run_ranks};

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

/// Runs `body` on 4 ranks, calm and with jitter; it must fail the same way.
fn fails(body: fn(&Communicator) -> Outcome) -> RunError {
    within_seconds(30, move || {
        let calm = ThreadRanks::new(4).run(|comm| body(&comm)).expect_err("the run must fail");
        for seed in 0..3 {
            let shaken = ThreadRanks::new(4).jitter(seed).run(|comm| body(&comm)).expect_err("must fail");
            assert_eq!(shaken.failure.rank, calm.failure.rank);
            assert_eq!(shaken.failure.cause, calm.failure.cause);
        }
        calm
    })
}

fn healthy_steps(comm: &Communicator) -> Result<(), CommError> {
    for step in 1..=3 {
        comm.set_step(step);
        comm.barrier()?;
        gather_one(comm, 1)?;
    }
    Ok(())
}

#[test]
fn a_panic_is_named_with_its_message_step_and_last_call() {
    let error = fails(|comm| {
        healthy_steps(comm)?;
        if comm.rank() == 2 {
            comm.barrier()?;
            panic!("expert {} is missing", 7);
        }
        comm.barrier()?;
        gather_one(comm, 1)?;
        Ok(())
    });
    let failure = &error.failure;
    assert_eq!((failure.rank, failure.step), (2, 3));
    assert_eq!(failure.cause, Cause::Panicked { message: "expert 7 is missing".into() });
    let call = failure.call.as_ref().unwrap();
    assert_eq!((&*call.kind, call.seq, call.step, &*call.group), ("barrier", 6, 3, "world"));
    assert!(error.source.is_none());
    let text = error.to_string();
    assert!(text.starts_with("rank 2 panicked: expert 7 is missing; rank 2 was in step 3"), "{text}");
}

#[derive(Debug, thiserror::Error)]
#[error("disk {0} is full")]
struct DiskFull(u32);

#[test]
fn an_error_comes_back_as_the_value_it_was() {
    let error = fails(|comm| {
        healthy_steps(comm)?;
        if comm.rank() == 1 {
            return Err(DiskFull(3).into());
        }
        gather_one(comm, 1)?;
        Ok(())
    });
    assert_eq!(error.failure.rank, 1);
    assert_eq!(error.failure.cause, Cause::Errored { message: "disk 3 is full".into() });
    let source = error.source.expect("the error value");
    assert_eq!(source.downcast_ref::<DiskFull>().unwrap().0, 3);
}

#[test]
fn a_rank_that_returns_early_is_named_with_those_who_wait() {
    let error = fails(|comm| {
        healthy_steps(comm)?;
        if comm.rank() == 3 {
            return Ok(());
        }
        comm.set_step(4);
        gather_one(comm, 1)?;
        Ok(())
    });
    let failure = &error.failure;
    assert_eq!((failure.rank, failure.step, &failure.cause), (3, 3, &Cause::ReturnedEarly));
    // Others may still be busy with the call before.
    let waiting = failure.waiting.iter().find(|waiting| waiting.for_ranks.contains(&3)).unwrap();
    assert_eq!((&*waiting.call.kind, waiting.call.seq, waiting.call.step), ("all_gather", 6, 4));
}

#[test]
fn the_odd_one_out_is_blamed_for_another_kind_of_call() {
    let error = fails(|comm| {
        healthy_steps(comm)?;
        match comm.rank() {
            2 => comm.barrier()?,
            _ => drop(gather_one(comm, 1)?),
        }
        Ok(())
    });
    assert_eq!(error.failure.rank, 2);
    let text = error.to_string();
    assert!(text.contains("rank 2 called barrier (call 6 on group 'world', step 3)"), "{text}");
    assert!(text.contains("rank 0 called all_gather (call 6 on group 'world', step 3)"), "{text}");
}

#[test]
fn a_rank_that_skips_a_call_is_blamed() {
    let error = fails(|comm| {
        healthy_steps(comm)?;
        if comm.rank() != 1 {
            gather_one(comm, 1)?;
        }
        comm.barrier()?;
        Ok(())
    });
    assert_eq!(error.failure.rank, 1);
    assert!(matches!(error.failure.cause, Cause::Mismatch { .. }));
}

#[test]
fn other_element_types_of_the_same_size_do_not_match() {
    let error = fails(|comm| {
        let slots: Vec<Range<usize>> = (0..4).map(|i| i..i + 1).collect();
        if comm.rank() == 3 {
            comm.all_gather_v(Arc::new(vec![1.0f32]), vec![0.0f32; 4], &slots)?;
        } else {
            comm.all_gather_v(Arc::new(vec![1u32]), vec![0u32; 4], &slots)?;
        }
        Ok(())
    });
    assert_eq!(error.failure.rank, 3);
    assert!(error.to_string().contains("different element types"), "{error}");
}

#[test]
fn counts_that_disagree_are_named_with_both_sides() {
    let error = fails(|comm| {
        let len = if comm.rank() == 1 { 3 } else { 2 };
        let slots: Vec<Range<usize>> = (0..4).map(|i| i * 2..i * 2 + 2).collect();
        comm.all_gather_v(Arc::new(vec![1u32; len]), vec![0; 8], &slots)?;
        Ok(())
    });
    assert_eq!(error.failure.rank, 1);
    let text = error.to_string();
    assert!(text.contains("sends 12 bytes") && text.contains("expects 8"), "{text}");
}

#[test]
fn a_receiver_that_expects_something_from_one_who_sends_nothing_is_told() {
    let error = fails(|comm| {
        let empty = Arc::new(Vec::<u64>::new());
        let sends = vec![vec![Part::whole(empty)]; 4];
        let expects = usize::from(comm.rank() == 2);
        let ranges = (0..4).map(|from| vec![0..if from == 0 { expects } else { 0 }]).collect();
        comm.exchange("counts", sends, vec![0u64; 1], ranges)?;
        comm.barrier()?;
        Ok(())
    });
    let text = error.to_string();
    assert!(text.contains("sends 0 bytes") && text.contains("expects 8"), "{text}");
    assert!(text.contains("counts (call 0"), "{text}");
}

#[test]
fn plans_that_differ_are_found() {
    use unisono_comm::{ReducePlan, Segment};
    let error = fails(|comm| {
        // The same bytes, cut otherwise: rank 0 thinks of two segments of 2, the others of one of 4.
        let segment = |len: usize| Segment {
            items: 4,
            held: (0..4).map(|i| i..i + 1).collect(),
            shards: vec![0..0, 0..len, 0..0, 0..0],
        };
        let segments = if comm.rank() == 0 { vec![segment(2), segment(2)] } else { vec![segment(4)] };
        let roots = vec![vec![Part::whole(Arc::new(vec![1.0f32; 4]))]; segments.len()];
        ReducePlan { segments }.compile(comm)?.reduce_scatter(&roots, vec![0.0f32; 4])?;
        Ok(())
    });
    assert_eq!(error.failure.rank, 0);
    assert!(error.to_string().contains("plans differ"), "{error}");
}

#[test]
fn member_lists_that_overlap_but_differ_are_refused() {
    within_seconds(20, || {
        let error = run_ranks(4, |comm| {
            let members = if comm.rank() == 3 { vec![1, 2, 3] } else { vec![0, 1, 2, 3] };
            let group = comm.subgroup("expert_group", &members)?;
            group.barrier()
        })
        .unwrap_err();
        let text = error.to_string();
        assert!(text.contains("[1, 2, 3]") && text.contains("[0, 1, 2, 3]"), "{text}");
    });
}

#[test]
fn ranks_that_wait_for_each_other_in_two_groups_are_found() {
    let error = fails(|comm| {
        healthy_steps(comm)?;
        // Ranks 0, 1 and 3 enter the world call; rank 2 first waits for rank 3 in a pair.
        let pair = if comm.rank() >= 2 { Some(comm.subgroup("pair", &[2, 3])?) } else { None };
        if let (2, Some(pair)) = (comm.rank(), &pair) {
            pair.barrier()?;
        }
        gather_one(comm, 1)?;
        if let (3, Some(pair)) = (comm.rank(), &pair) {
            pair.barrier()?;
        }
        Ok(())
    });
    let failure = &error.failure;
    assert_eq!((failure.rank, &failure.cause), (2, &Cause::Deadlock));
    assert_eq!(failure.waiting.len(), 4);
    assert_eq!(failure.waiting[0].for_ranks, [2]);
    assert_eq!((&*failure.waiting[2].call.kind, &*failure.waiting[2].call.group), ("barrier", "pair"));
    assert_eq!(failure.waiting[2].for_ranks, [3]);
}

#[test]
fn a_ring_of_blocking_sends_is_found() {
    let error = fails(|comm| {
        let next = (comm.rank() + 1) % 4;
        comm.send(next, 0, Arc::new(vec![1u8]))?;
        comm.recv((comm.rank() + 3) % 4, 0, vec![0u8], 0..1)?;
        Ok(())
    });
    assert_eq!(error.failure.cause, Cause::Deadlock);
    assert!(error.to_string().contains("rank 1 waits in send_recv"), "{error}");
}

#[test]
fn every_rank_gets_the_same_failure_and_its_flight_recorder() {
    within_seconds(20, || {
        let seen = Mutex::new(Vec::new());
        let work = |comm: &Communicator| {
            for step in 0..200 {
                comm.set_step(step);
                comm.barrier()?;
                comm.all_gather_values(&[comm.rank() as u64])?;
            }
            if comm.rank() == 0 {
                Err(Box::<dyn Error + Send + Sync>::from("halt"))
            } else {
                Ok(comm.barrier()?)
            }
        };
        let error = run_ranks(4, |comm| {
            work(&comm).inspect_err(|error| {
                if let Some(CommError::Failed(failure)) = error.downcast_ref() {
                    seen.lock().unwrap().push(failure.to_string());
                }
            })
        })
        .unwrap_err();
        let seen = seen.into_inner().unwrap();
        assert_eq!(seen, vec![error.to_string(); 3]);
        for (rank, flight) in error.failure.flights.iter().enumerate() {
            assert_eq!(flight.len(), 256, "rank {rank}");
            let last = flight.last().unwrap();
            assert_eq!(last.call.step, 199);
            let finished = flight.iter().filter(|entry| entry.state == CallState::Finished).count();
            // Rank 0 may end the run while others are in their last call.
            assert!(finished >= 255, "rank {rank}: {finished}");
        }
        let gathers: Vec<_> =
            error.failure.flights[1].iter().filter(|e| e.call.kind == "all_gather_values").collect();
        assert!(gathers.iter().all(|entry| entry.bytes_sent == 24 && entry.bytes_received == 24));
    });
}

#[test]
fn bad_arguments_are_refused_before_anything_starts() {
    within_seconds(20, || {
        let refused = |body: fn(&Communicator) -> Result<(), CommError>| {
            let error = run_ranks(2, |comm| {
                let error = body(&comm).expect_err("must be refused");
                assert!(matches!(error, CommError::Argument { .. }));
                // Nothing was started, so the group goes on.
                comm.barrier()?;
                Err::<(), _>(error)
            });
            error.unwrap_err().to_string()
        };
        let text = refused(|comm| {
            let part = Part::new(Arc::new(vec![0u8; 4]), 2..5);
            comm.all_gather_v(part, vec![0u8; 8], &[0..3, 3..6]).map(drop)
        });
        assert!(text.contains("the part 2..5 for rank 0 does not lie in its buffer of 4 elements"), "{text}");
        let text =
            refused(|comm| comm.all_gather_v(Arc::new(vec![0u8; 4]), vec![0u8; 7], &[0..4, 4..8]).map(drop));
        assert!(text.contains("the receive range 4..8 does not lie in the buffer of 7 elements"), "{text}");
        let text =
            refused(|comm| comm.all_gather_v(Arc::new(vec![0u8; 4]), vec![0u8; 8], &[0..4, 3..7]).map(drop));
        assert!(text.contains("receive ranges 0..4 and 3..7 overlap"), "{text}");
        let text = refused(|comm| comm.all_gather_v(Arc::new(vec![0u8; 4]), vec![0u8; 8], &[0..4]).map(drop));
        assert!(text.contains("1 receive ranges, but the group has 2 ranks"), "{text}");
        let text = refused(|comm| comm.broadcast(2, vec![0u8]).map(drop));
        assert!(text.contains("the root 2 is not a rank of the group"), "{text}");
        let text = refused(|comm| comm.send(5, 0, Arc::new(vec![0u8])));
        assert!(text.contains("the receiver 5"), "{text}");
        let text = refused(|comm| comm.recv(0, 0, vec![0u8], 0..2).map(drop));
        assert!(text.contains("receive range 0..2"), "{text}");
        let text = refused(|comm| comm.subgroup("g", &[0, 1, 1]).map(drop));
        assert!(text.contains("rank 1 is named twice"), "{text}");
        let text = refused(|comm| comm.subgroup("g", &[1 - comm.rank()]).map(drop));
        assert!(text.contains("is not among them"), "{text}");
        let text = refused(|comm| comm.subgroup("g", &[0, 9]).map(drop));
        assert!(text.contains("rank 9 is not below the group's size 2"), "{text}");
    });
}

#[test]
fn calls_that_do_not_match_are_found_even_if_nobody_finishes_them() {
    within_seconds(20, || {
        let error = run_ranks(2, |comm| {
            let slots = [0..1, 1..2];
            if comm.rank() == 0 {
                drop(comm.start_barrier()?);
            } else {
                drop(comm.start_all_gather_v(Arc::new(vec![1u8]), vec![0u8; 2], &slots)?);
            }
            Ok::<_, CommError>(())
        })
        .unwrap_err();
        assert!(matches!(error.failure.cause, Cause::Mismatch { .. }), "{error}");
    });
}

#[test]
fn broadcasts_from_other_roots_or_of_other_lengths_do_not_match() {
    let roots = fails(|comm| {
        let root = usize::from(comm.rank() == 2);
        comm.broadcast(root, vec![1u64; 3])?;
        comm.barrier()?;
        Ok(())
    });
    assert!(matches!(roots.failure.cause, Cause::Mismatch { .. }), "{roots}");
    assert!(roots.to_string().contains("broadcast (call 0 on group 'world', step 0)"), "{roots}");
    let lengths = fails(|comm| {
        comm.broadcast(1, vec![1u64; 3 + usize::from(comm.rank() == 3)])?;
        Ok(())
    });
    assert_eq!(lengths.failure.rank, 3);
    let text = lengths.to_string();
    assert!(text.contains("24 bytes") && text.contains("expects 32"), "{text}");
}

#[test]
fn a_given_up_call_that_does_not_match_leaves_the_reason_as_it_is() {
    let error = fails(|comm| {
        let pending = comm.start_broadcast(usize::from(comm.rank() == 2), vec![1u64; 3])?;
        if comm.rank() != 2 {
            pending.finish()?;
        }
        Ok(())
    });
    assert!(matches!(error.failure.cause, Cause::Mismatch { .. }), "{error}");
}

#[test]
fn a_message_of_another_length_type_or_tag_is_named() {
    let lengths = fails(|comm| {
        match comm.rank() {
            0 => comm.send(1, 7, Arc::new(vec![1u32; 5]))?,
            1 => drop(comm.recv(0, 7, vec![0u32; 4], 0..4)?),
            _ => {}
        }
        Ok(())
    });
    let text = lengths.to_string();
    assert!(text.contains("20 bytes") && text.contains("expects 16"), "{text}");
    let types = fails(|comm| {
        match comm.rank() {
            0 => comm.send(1, 7, Arc::new(vec![1u32; 4]))?,
            1 => drop(comm.recv(0, 7, vec![0f32; 4], 0..4)?),
            _ => {}
        }
        Ok(())
    });
    assert!(types.to_string().contains("different element types"), "{types}");
    let tags = fails(|comm| {
        match comm.rank() {
            0 => comm.send(1, 7, Arc::new(vec![1u32; 4]))?,
            1 => drop(comm.recv(0, 8, vec![0u32; 4], 0..4)?),
            _ => {}
        }
        Ok(())
    });
    assert_eq!(tags.failure.cause, Cause::Deadlock);
    let text = tags.to_string();
    for (rank, other) in [(0, 1), (1, 0)] {
        assert!(text.contains(&format!("rank {rank} waits in send_recv (call 0 on")), "{text}");
        assert!(text.contains(&format!(" for rank {other}")), "{text}");
    }
}
