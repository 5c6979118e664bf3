//! Every collective against its definition, on whatever ranks there are.

use std::sync::Arc;

use unisono_comm::{CommError, Communicator, Part};

use super::{consecutive, gather_one, parts};

/// One rank's part of a test.
pub type Case = fn(&Communicator) -> Result<(), CommError>;

/// All cases, with their names.
pub const ALL: &[(&str, Case)] = &[
    ("all_to_all_v_moves_every_message_to_its_place", all_to_all_v_moves_every_message_to_its_place),
    (
        "all_gather_v_gives_all_to_all_with_different_lengths",
        all_gather_v_gives_all_to_all_with_different_lengths,
    ),
    ("exchange_joins_parts_and_cuts_them_anew", exchange_joins_parts_and_cuts_them_anew),
    ("broadcast_copies_the_root_from_every_root", broadcast_copies_the_root_from_every_root),
    (
        "shift_turns_the_ring_and_a_rank_can_send_to_itself",
        shift_turns_the_ring_and_a_rank_can_send_to_itself,
    ),
    ("messages_match_by_tag_and_order", messages_match_by_tag_and_order),
    ("values_of_any_length_come_from_every_rank", values_of_any_length_come_from_every_rank),
    (
        "subgroups_of_odd_and_even_ranks_work_at_the_same_time_as_the_world",
        subgroups_of_odd_and_even_ranks_work_at_the_same_time_as_the_world,
    ),
    (
        "several_calls_are_under_way_and_finish_in_any_order",
        several_calls_are_under_way_and_finish_in_any_order,
    ),
];

/// What rank `from` sends to rank `to`: another length for each pair, some empty.
fn message(from: usize, to: usize) -> Vec<f32> {
    (0..(from * 5 + to * 3) % 11).map(|i| (from * 10_000 + to * 100 + i) as f32).collect()
}

pub fn all_to_all_v_moves_every_message_to_its_place(comm: &Communicator) -> Result<(), CommError> {
    let (me, size) = (comm.rank(), comm.size());
    let sent: Vec<Vec<f32>> = (0..size).map(|to| message(me, to)).collect();
    let ranges = consecutive(&sent.iter().map(Vec::len).collect::<Vec<_>>());
    let buffer = Arc::new(sent.concat());
    let expected: Vec<Vec<f32>> = (0..size).map(|from| message(from, me)).collect();
    let places = consecutive(&expected.iter().map(Vec::len).collect::<Vec<_>>());
    let recv = vec![-1.0f32; expected.concat().len()];
    let got = comm.all_to_all_v(parts(&buffer, &ranges), recv, &places)?;
    assert_eq!(got, expected.concat());
    Arc::try_unwrap(buffer).expect("a finished call holds no send buffer");
    Ok(())
}

pub fn all_gather_v_gives_all_to_all_with_different_lengths(comm: &Communicator) -> Result<(), CommError> {
    let (me, size) = (comm.rank(), comm.size());
    let of = |rank: usize| vec![rank as u64 + 7; (rank * 3) % 4];
    // The places are in another order than the ranks, with a gap in front.
    let mut places = consecutive(&(0..size).rev().map(|rank| of(rank).len()).collect::<Vec<_>>());
    places.reverse();
    let places: Vec<_> = places.into_iter().map(|range| range.start + 2..range.end + 2).collect();
    let total: usize = (0..size).map(|rank| of(rank).len()).sum();
    let got = comm.all_gather_v(Arc::new(of(me)), vec![99u64; total + 2], &places)?;
    let expected: Vec<u64> = [99, 99].into_iter().chain((0..size).rev().flat_map(of)).collect();
    assert_eq!(got, expected);
    Ok(())
}

pub fn exchange_joins_parts_and_cuts_them_anew(comm: &Communicator) -> Result<(), CommError> {
    let size = comm.size();
    let buffer = Arc::new((0..6).map(|i| (comm.rank() * 10 + i) as u32).collect::<Vec<_>>());
    let part = |range| Part::new(Arc::clone(&buffer), range);
    let sends = (0..size).map(|_| vec![part(4..6), part(0..0), part(0..3)]).collect();
    let places = (0..size).map(|p| vec![p * 5 + 1..p * 5 + 5, p * 5..p * 5, p * 5..p * 5 + 1]).collect();
    let got = comm.exchange("pieces", sends, vec![0u32; size * 5], places)?;
    let expected: Vec<u32> = (0..size as u32).flat_map(|p| [2, 4, 5, 0, 1].map(|i| p * 10 + i)).collect();
    assert_eq!(got, expected);
    Ok(())
}

pub fn broadcast_copies_the_root_from_every_root(comm: &Communicator) -> Result<(), CommError> {
    for root in 0..comm.size() {
        let fill = if comm.rank() == root { 5 } else { 0 };
        let got = comm.broadcast(root, vec![fill + root as u8; 300])?;
        assert_eq!(got, vec![5 + root as u8; 300]);
    }
    Ok(())
}

pub fn shift_turns_the_ring_and_a_rank_can_send_to_itself(comm: &Communicator) -> Result<(), CommError> {
    let (me, size) = (comm.rank(), comm.size());
    let (right, left) = ((me + 1) % size, (me + size - 1) % size);
    let mut here = vec![me as f64; 3];
    for turn in 1..=size {
        here = comm.shift(right, Arc::new(here), left, vec![0.0; 3], 0..3, 4)?;
        assert_eq!(here, [((me + size - turn) % size) as f64; 3]);
    }
    let sent = comm.start_send(me, 9, Arc::new(vec![1u8, 2]))?;
    assert_eq!(comm.recv(me, 9, vec![0u8; 2], 0..2)?, [1, 2]);
    sent.finish()
}

pub fn messages_match_by_tag_and_order(comm: &Communicator) -> Result<(), CommError> {
    if comm.size() < 2 || comm.rank() > 1 {
        return Ok(());
    }
    if comm.rank() == 0 {
        let sends: Vec<_> = [(1, 10u32), (2, 20), (1, 11), (2, 21)]
            .into_iter()
            .map(|(tag, value)| comm.start_send(1, tag, Arc::new(vec![value])))
            .collect::<Result<_, _>>()?;
        return sends.into_iter().try_for_each(|sent| sent.finish());
    }
    let got: Vec<u32> = [2, 1, 1, 2]
        .into_iter()
        .map(|tag| Ok(comm.recv(0, tag, vec![0u32], 0..1)?[0]))
        .collect::<Result<_, CommError>>()?;
    assert_eq!(got, [20, 10, 11, 21]);
    Ok(())
}

pub fn values_of_any_length_come_from_every_rank(comm: &Communicator) -> Result<(), CommError> {
    let got = comm.all_gather_values(&vec![comm.rank() as f32; comm.rank()])?;
    let expected: Vec<Vec<f32>> = (0..comm.size()).map(|rank| vec![rank as f32; rank]).collect();
    assert_eq!(got, expected);
    let none: Vec<Vec<u8>> = comm.all_gather_values(&[])?;
    assert!(none.iter().all(Vec::is_empty) && none.len() == comm.size());
    Ok(())
}

pub fn subgroups_of_odd_and_even_ranks_work_at_the_same_time_as_the_world(
    comm: &Communicator,
) -> Result<(), CommError> {
    let members: Vec<usize> = (0..comm.size()).filter(|rank| rank % 2 == comm.rank() % 2).collect();
    let half = comm.subgroup("half", &members)?;
    assert_eq!((half.name(), half.size()), ("half", members.len()));
    assert_eq!(half.world_rank(half.rank()), comm.rank());
    let slots: Vec<_> = (0..comm.size()).map(|i| i..i + 1).collect();
    let world = comm.start_all_gather_v(Arc::new(vec![comm.rank() as u32]), vec![0; comm.size()], &slots)?;
    let inner: Vec<u32> = gather_one(&half, comm.rank() as u32 + 50)?;
    assert_eq!(inner, members.iter().map(|&m| m as u32 + 50).collect::<Vec<_>>());
    assert_eq!(world.finish()?, (0..comm.size() as u32).collect::<Vec<_>>());
    // A group inside a group, and a second handle on the same group.
    let alone = half.subgroup("alone", &[half.rank()])?;
    assert_eq!(gather_one(&alone, 3)?, [3]);
    assert_eq!(gather_one(&comm.subgroup("half", &members)?, 1)?, vec![1; members.len()]);
    Ok(())
}

pub fn several_calls_are_under_way_and_finish_in_any_order(comm: &Communicator) -> Result<(), CommError> {
    let (me, size) = (comm.rank(), comm.size());
    let slots: Vec<_> = (0..size).map(|i| i..i + 1).collect();
    let mut calls = Vec::new();
    for i in 0..6u32 {
        let send = Arc::new(vec![i * 100 + me as u32]);
        calls.push((i, comm.start_all_gather_v(send, vec![0; size], &slots)?));
    }
    // Each rank finishes in an order of its own, with work between.
    calls.rotate_left(me % 6);
    if me % 2 == 1 {
        calls.reverse();
    }
    let mut work = 0u64;
    for (i, call) in calls {
        work = (0..10_000).fold(work, |sum, x| sum.wrapping_add(x));
        let expected: Vec<u32> = (0..size as u32).map(|rank| i * 100 + rank).collect();
        assert_eq!(call.finish()?, expected);
    }
    assert!(work > 0);
    Ok(())
}
