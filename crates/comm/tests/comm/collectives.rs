//! Every collective against its definition, at many rank counts, calm and with shuffled arrival.

use std::sync::Arc;

use crate::common::{cases, within_seconds};
use unisono_comm::{CommError, Communicator, ThreadRanks};

const RANKS: [usize; 5] = [1, 2, 3, 4, 8];

/// Runs `body` at every rank count, calm and with two seeds of jitter.
fn everywhere(body: fn(&Communicator) -> Result<(), CommError>) {
    within_seconds(60, move || {
        for ranks in RANKS {
            let calm = ThreadRanks::new(ranks);
            for world in [calm.clone(), calm.clone().jitter(1), calm.jitter(2)] {
                world.run(|comm| body(&comm)).unwrap();
            }
        }
    });
}

#[test]
fn all_to_all_v_moves_every_message_to_its_place() {
    everywhere(cases::all_to_all_v_moves_every_message_to_its_place);
}

#[test]
fn all_gather_v_gives_all_to_all_with_different_lengths() {
    everywhere(cases::all_gather_v_gives_all_to_all_with_different_lengths);
}

#[test]
fn exchange_joins_parts_and_cuts_them_anew() {
    everywhere(cases::exchange_joins_parts_and_cuts_them_anew);
}

#[test]
fn broadcast_copies_the_root_from_every_root() {
    everywhere(cases::broadcast_copies_the_root_from_every_root);
}

#[test]
fn shift_turns_the_ring_and_a_rank_can_send_to_itself() {
    everywhere(cases::shift_turns_the_ring_and_a_rank_can_send_to_itself);
}

#[test]
fn messages_match_by_tag_and_order() {
    everywhere(cases::messages_match_by_tag_and_order);
}

#[test]
fn values_of_any_length_come_from_every_rank() {
    everywhere(cases::values_of_any_length_come_from_every_rank);
}

#[test]
fn nobody_passes_a_barrier_before_all_have_come() {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
    within_seconds(20, || {
        for ranks in RANKS {
            let arrived = AtomicUsize::new(0);
            let run = ThreadRanks::new(ranks).jitter(ranks as u64).run(|comm| {
                for round in 1..=10 {
                    arrived.fetch_add(1, SeqCst);
                    comm.barrier()?;
                    assert!(arrived.load(SeqCst) >= round * ranks);
                    comm.barrier()?;
                }
                Ok::<_, CommError>(())
            });
            run.unwrap();
        }
    });
}

#[test]
fn subgroups_of_odd_and_even_ranks_work_at_the_same_time_as_the_world() {
    everywhere(cases::subgroups_of_odd_and_even_ranks_work_at_the_same_time_as_the_world);
}

#[test]
fn several_calls_are_under_way_and_finish_in_any_order() {
    everywhere(cases::several_calls_are_under_way_and_finish_in_any_order);
}

#[test]
fn a_call_that_is_given_up_does_not_keep_the_others_waiting() {
    within_seconds(20, || {
        let sums = ThreadRanks::new(3).run(|comm| {
            let slots: Vec<_> = (0..3).map(|i| i..i + 1).collect();
            let call = comm.start_all_gather_v(Arc::new(vec![1u32 << comm.rank()]), vec![0u32; 3], &slots)?;
            if comm.rank() == 1 {
                drop(call);
                return Ok::<u32, CommError>(0);
            }
            Ok(call.finish()?.into_iter().sum())
        });
        assert_eq!(sums.unwrap(), [7, 0, 7]);
    });
}

#[test]
fn ranks_have_named_threads_and_the_stack_that_was_asked_for() {
    fn deep(levels: usize) -> usize {
        let block = std::hint::black_box([levels; 1024]);
        if levels == 0 { 0 } else { 1 + deep(levels - 1) + (block[1023] - levels) }
    }
    let run = ThreadRanks::new(2).stack_bytes(64 << 20).run(|_| {
        assert_eq!(deep(2_000), 2_000);
        Ok::<_, CommError>(std::thread::current().name().map(str::to_owned))
    });
    assert_eq!(run.unwrap(), [Some("rank 0".to_owned()), Some("rank 1".to_owned())]);
}
