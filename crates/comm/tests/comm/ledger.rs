//! The ledger counts exactly what moved.

use std::sync::Arc;

use crate::common::{self, gather_one, within_seconds};
use unisono_comm::{
    CommError, GatherPlan, GatherSegment, Ledger, Part, ReducePlan, Row, Segment, ThreadRanks, run_ranks,
};
use unisono_mesh::LinkClass;

fn row<'a>(ledger: &'a Ledger, kind: &str, group: &str, link: LinkClass) -> &'a Row {
    let found = ledger.rows.iter().find(|row| row.kind == kind && row.group == group && row.link == link);
    found.unwrap_or_else(|| panic!("no row {kind} {group} {link:?} in {ledger:?}"))
}

#[test]
fn bytes_and_calls_are_exact_by_kind_group_and_link_class() {
    let ledgers = within_seconds(20, || {
        run_ranks(4, |comm| {
            let pair = comm.subgroup("pair", &[comm.rank() / 2 * 2, comm.rank() / 2 * 2 + 1])?;
            for _ in 0..3 {
                gather_one(&comm, 1)?;
                comm.barrier()?;
            }
            gather_one(&pair, 1)?;
            // Rank 0 sends 10 elements, the others none.
            let lens = [10, 0, 0, 0];
            let places = common::consecutive(&lens);
            comm.all_gather_v(Arc::new(vec![1.0f64; lens[comm.rank()]]), vec![0.0; 10], &places)?;
            let buffer = comm.broadcast(3, vec![0u8; 100])?;
            let sent = comm.start_send((comm.rank() + 1) % 4, 0, Arc::new(buffer))?;
            comm.recv((comm.rank() + 3) % 4, 0, vec![0u8; 100], 0..100)?;
            sent.finish()?;
            Ok::<_, CommError>(comm.ledger())
        })
        .unwrap()
    });
    for (rank, ledger) in ledgers.iter().enumerate() {
        let own = u64::from(rank == 0) * 80;
        let near = row(ledger, "all_gather", "world", LinkClass::SameRank);
        assert_eq!((near.bytes_sent, near.bytes_received), (12 + own, 12 + own));
        let far = row(ledger, "all_gather", "world", LinkClass::SameNode);
        assert_eq!((far.calls, far.bytes_sent, far.bytes_received), (4, 36 + 3 * own, 36 + 80 - own));
        let pair = row(ledger, "all_gather", "pair", LinkClass::SameNode);
        assert_eq!((pair.calls, pair.bytes_sent, pair.bytes_received), (1, 4, 4));
        let barrier = row(ledger, "barrier", "world", LinkClass::SameNode);
        assert_eq!((barrier.calls, barrier.bytes_sent, barrier.bytes_received), (3, 0, 0));
        let broadcast = row(ledger, "broadcast", "world", LinkClass::SameNode);
        let (sent, received) = if rank == 3 { (300, 0) } else { (0, 100) };
        assert_eq!((broadcast.calls, broadcast.bytes_sent, broadcast.bytes_received), (1, sent, received));
        let message = row(ledger, "send_recv", "world", LinkClass::SameNode);
        assert_eq!((message.calls, message.bytes_sent, message.bytes_received), (2, 100, 100));
        assert_eq!(ledger.bytes_sent(), 36 + 3 * own + 4 + sent + 100);
        assert!(ledger.seconds() > 0.0);
    }
    let mut all = Ledger::default();
    ledgers.iter().rev().for_each(|ledger| all.merge(ledger));
    let busiest = all.busiest_rank().unwrap();
    assert_eq!((busiest.rank, busiest.bytes_sent, busiest.bytes_received), (3, 440, 220));
    assert_eq!(all.ranks.iter().map(|rank| rank.rank).collect::<Vec<_>>(), [0, 1, 2, 3]);
    let (sent, received): (u64, u64) =
        all.rows.iter().fold((0, 0), |sum, row| (sum.0 + row.bytes_sent, sum.1 + row.bytes_received));
    assert_eq!(sent, received, "what is sent is received");
    let text = serde_json::to_string(&all).unwrap();
    assert!(text.contains(r#""kind":"barrier","group":"world","link":"same_node","calls":12"#), "{text}");
    assert_eq!(serde_json::from_str::<Ledger>(&text).unwrap().ranks, all.ranks);
    assert_eq!(row(&all, "barrier", "world", LinkClass::SameNode).calls, 12);
}

#[test]
fn a_difference_of_snapshots_is_what_happened_between() {
    within_seconds(20, || {
        let run = run_ranks(2, |comm| {
            gather_one(&comm, 1)?;
            comm.barrier()?;
            let before = comm.ledger();
            gather_one(&comm, 1)?;
            gather_one(&comm, 1)?;
            let between = comm.ledger().since(&before);
            assert!(between.rows.iter().all(|row| row.kind == "all_gather" && row.calls == 2));
            assert_eq!((between.bytes_sent(), between.ranks[0].bytes_received), (8, 8));
            let mut whole = before;
            whole.merge(&between);
            assert_eq!(whole.bytes_sent(), comm.ledger().bytes_sent());
            Ok::<_, CommError>(())
        });
        run.unwrap();
    });
}

#[test]
fn pretended_nodes_divide_the_links() {
    let ledgers = within_seconds(20, || {
        let ranks = ThreadRanks::new(8).nodes(&[3, 5]);
        let run = ranks.run(|comm| {
            gather_one(&comm, 1)?;
            Ok::<_, CommError>(comm.ledger())
        });
        run.unwrap()
    });
    for (rank, ledger) in ledgers.iter().enumerate() {
        let near = row(ledger, "all_gather", "world", LinkClass::SameNode);
        let far = row(ledger, "all_gather", "world", LinkClass::OtherNode);
        let expected = if rank < 3 { (2 * 4, 5 * 4) } else { (4 * 4, 3 * 4) };
        assert_eq!((near.bytes_sent, far.bytes_sent), expected, "rank {rank}");
    }
}

/// Bytes each rank sends to reduce and gather one vector of `elements` over `items` leaves.
fn volumes(ranks: usize, items: usize, elements: usize, bucket_bytes: usize) -> Vec<(u64, u64)> {
    let cut = |total: usize, i: usize| i * total / ranks;
    let shards: Vec<_> = (0..ranks).map(|i| cut(elements, i)..cut(elements, i + 1)).collect();
    let held: Vec<_> = (0..ranks).map(|i| cut(items, i)..cut(items, i + 1)).collect();
    let run = ThreadRanks::new(ranks).bucket_bytes(bucket_bytes).run(|comm| {
        let segment = Segment { items, held: held.clone(), shards: shards.clone() };
        let reducer = ReducePlan { segments: vec![segment] }.compile(&comm)?;
        let roots = unisono_mesh::tree::roots(held[comm.rank()].clone(), items).len();
        let root = Part::whole(Arc::new(vec![1.0f32; elements]));
        let shard = reducer.reduce_scatter(&[vec![root; roots]], vec![0.0f32; reducer.shard_len()])?;
        let reduced = comm.ledger().bytes_sent();
        let segment = GatherSegment { shards: shards.clone(), wanted: vec![true; ranks], offset: 0 };
        let gatherer = GatherPlan { segments: vec![segment], in_place: false }.compile(&comm)?;
        let all = gatherer.all_gather(Arc::new(shard), vec![0.0f32; elements])?;
        assert!(all.iter().all(|&x| x == (roots * ranks) as f32 || !items.is_multiple_of(ranks)));
        Ok::<_, CommError>((reduced, comm.ledger().bytes_sent() - reduced))
    });
    run.unwrap()
}

#[test]
fn an_aligned_fold_moves_what_a_ring_moves() {
    within_seconds(20, || {
        let elements = 840;
        for (ranks, items) in [(2, 8), (4, 8), (8, 8), (2, 2), (4, 16)] {
            // A ring sends (n - 1) chunks of 1/n of the vector, in each of its two halves.
            let ring = ((ranks - 1) * elements / ranks * 4) as u64;
            for bucket in [usize::MAX, 100] {
                assert_eq!(volumes(ranks, items, elements, bucket), vec![(ring, ring); ranks]);
            }
        }
        // Three of six leaves are two subtrees: twice the ring, and the ledger says so.
        assert_eq!(volumes(2, 6, elements, usize::MAX), vec![(2 * 1680, 1680); 2]);
    });
}

/// Bytes that cross nodes of the given sizes when 8 ranks, one leaf each, reduce a vector of 840 elements.
fn between_nodes(sizes: &[usize], hierarchical: bool) -> u64 {
    let shards: Vec<_> = (0..8).map(|i| i * 105..(i + 1) * 105).collect();
    let plan =
        ReducePlan { segments: vec![Segment { items: 8, held: (0..8).map(|i| i..i + 1).collect(), shards }] };
    let run = ThreadRanks::new(8).nodes(sizes).run(|comm| {
        let reducer = if hierarchical { plan.compile_hierarchical(&comm)? } else { plan.compile(&comm)? };
        let root = Part::whole(Arc::new(vec![1.0f32; 840]));
        reducer.reduce_scatter(&[vec![root]], vec![0.0f32; 105])?;
        let far = |row: &&Row| row.link == LinkClass::OtherNode;
        Ok::<_, CommError>(comm.ledger().rows.iter().filter(far).map(|row| row.bytes_sent).sum::<u64>())
    });
    run.unwrap().into_iter().sum()
}

#[test]
fn a_node_sends_the_roots_of_what_its_ranks_hold_together() {
    within_seconds(20, || {
        let shard = 105 * 4;
        // Four leaves are one subtree: one root to each of 8 receivers, not four.
        assert_eq!((between_nodes(&[4, 4], true), between_nodes(&[4, 4], false)), (8 * shard, 32 * shard));
        // Of 3 + 5 the first hold leaves 0..2 and 2..3, the others 3..4 and 4..8: two roots each.
        assert_eq!((between_nodes(&[3, 5], true), between_nodes(&[3, 5], false)), (16 * shard, 30 * shard));
        assert_eq!((between_nodes(&[2, 2, 2, 2], true), between_nodes(&[8], true)), (24 * shard, 0));
    });
}

/// Bytes that cross nodes of the given sizes when 8 ranks gather a vector of 840 elements, and the most that one of them sends
/// across.
fn gathered_between_nodes(sizes: &[usize], hierarchical: bool) -> (u64, u64) {
    let shards: Vec<_> = (0..8).map(|i| i * 105..(i + 1) * 105).collect();
    let plan = GatherPlan {
        segments: vec![GatherSegment { shards, wanted: vec![true; 8], offset: 0 }],
        in_place: false,
    };
    let run = ThreadRanks::new(8).nodes(sizes).run(|comm| {
        let gatherer = if hierarchical { plan.compile_hierarchical(&comm)? } else { plan.compile(&comm)? };
        let all = gatherer.all_gather(Arc::new(vec![comm.rank() as f32; 105]), vec![-1.0f32; 840])?;
        assert!(all.chunks(105).enumerate().all(|(i, shard)| shard == [i as f32; 105]));
        let far = |row: &&Row| row.link == LinkClass::OtherNode;
        Ok::<_, CommError>(comm.ledger().rows.iter().filter(far).map(|row| row.bytes_sent).sum::<u64>())
    });
    let sent = run.unwrap();
    (sent.iter().sum(), sent.into_iter().max().unwrap())
}

#[test]
fn a_shard_crosses_to_each_node_once() {
    within_seconds(20, || {
        let shard = 105 * 4;
        assert_eq!(gathered_between_nodes(&[4, 4], true), (8 * shard, shard));
        assert_eq!(gathered_between_nodes(&[4, 4], false), (32 * shard, 4 * shard));
        assert_eq!(gathered_between_nodes(&[3, 5], true), (8 * shard, shard));
        assert_eq!(gathered_between_nodes(&[3, 5], false), (30 * shard, 5 * shard));
        assert_eq!(gathered_between_nodes(&[1, 1, 6], true), (16 * shard, 2 * shard));
    });
}
