//! Reductions have the bits of the one-rank sum, whatever holds what, however it is cut and whenever it arrives.

use std::ops::Range;
use std::sync::Arc;

use crate::common::within_seconds;
use proptest::prelude::*;
use unisono_comm::{
    CommError, Communicator, GatherPlan, GatherSegment, Part, ReducePlan, Segment, ThreadRanks, run_ranks,
};
use unisono_mesh::{LinkClass, tree};

/// Leaf `item` of a segment: values of many magnitudes, so that another order of additions shows.
fn leaf(segment: usize, item: usize, len: usize) -> Vec<f32> {
    let value = |e: usize| {
        let mut x = (segment * 7919 + item * 104_729 + e * 1_299_709 + 12_345) as u64;
        x = (x ^ (x >> 16)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mantissa = ((x >> 40) as f32 / 8_388_608.0) - 1.0;
        mantissa * 10f32.powi((x >> 20) as i32 % 7 - 3)
    };
    (0..len).map(value).collect()
}

/// The sum of leaves `range`, along the tree below the node `range`.
fn subtree(segment: usize, range: Range<usize>, len: usize) -> Vec<f32> {
    if range.len() == 1 {
        return leaf(segment, range.start, len);
    }
    let middle = range.start + tree::split(range.len());
    let left = subtree(segment, range.start..middle, len);
    let right = subtree(segment, middle..range.end, len);
    left.iter().zip(&right).map(|(a, b)| a + b).collect()
}

/// Segments of the given lengths under a plan.
#[derive(Debug, Clone)]
struct Case {
    lens: Vec<usize>,
    plan: ReducePlan,
    hierarchical: bool,
}

impl Case {
    /// Every rank's shards, after checking that they come from the whole sums.
    fn run(&self, world: &ThreadRanks, ranks: usize) {
        let outs = world.run(|comm| self.reduce(&comm)).unwrap();
        for (rank, out) in outs.iter().enumerate() {
            let expected: Vec<u32> = self.expected(rank).iter().map(|x| x.to_bits()).collect();
            let got: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
            assert_eq!(got, expected, "rank {rank} of {ranks}");
        }
    }

    fn reduce(&self, comm: &Communicator) -> Result<Vec<f32>, CommError> {
        let reducer = match self.hierarchical {
            true => self.plan.compile_hierarchical(comm)?,
            false => self.plan.compile(comm)?,
        };
        let roots: Vec<Vec<Part<f32>>> =
            (0..self.lens.len()).map(|segment| self.roots(segment, comm.rank())).collect();
        let out = reducer.reduce_scatter(&roots, vec![f32::NAN; reducer.shard_len()])?;
        // A second step with the same reducer.
        reducer.reduce_scatter(&roots, out)
    }

    /// This rank's roots of a segment, all in one buffer with a gap in front.
    fn roots(&self, segment: usize, rank: usize) -> Vec<Part<f32>> {
        let len = self.lens[segment];
        let Segment { items, held, .. } = &self.plan.segments[segment];
        let roots = tree::roots(held[rank].clone(), *items);
        let mut buffer = vec![f32::NAN; 3];
        for root in &roots {
            buffer.extend(subtree(segment, root.clone(), len));
        }
        let buffer = Arc::new(buffer);
        (0..roots.len()).map(|i| Part::new(Arc::clone(&buffer), 3 + i * len..3 + (i + 1) * len)).collect()
    }

    fn expected(&self, rank: usize) -> Vec<f32> {
        let sum = |(i, segment): (usize, &Segment)| {
            subtree(i, 0..segment.items, self.lens[i])[segment.shards[rank].clone()].to_vec()
        };
        self.plan.segments.iter().enumerate().flat_map(sum).collect()
    }
}

/// `count` ranges that cover `0..len`, some perhaps empty, given to the ranks in a rotated order.
fn cover(len: usize, cuts: &[u64], count: usize, turn: usize) -> Vec<Range<usize>> {
    let mut ends: Vec<usize> = (1..count).map(|i| cuts[i % cuts.len()] as usize % (len + 1)).collect();
    ends.extend([0, len]);
    ends.sort_unstable();
    let mut ranges: Vec<Range<usize>> = ends.windows(2).map(|pair| pair[0]..pair[1]).collect();
    ranges.rotate_left(turn % count);
    ranges
}

type Draw = (usize, usize, Vec<u64>, Vec<u64>, usize);

fn draws() -> impl Strategy<Value = Vec<Draw>> {
    let cuts = || proptest::collection::vec(any::<u64>(), 8);
    proptest::collection::vec((1usize..20, 0usize..400, cuts(), cuts(), 0usize..8), 1..5)
}

fn case(draws: &[Draw], ranks: usize) -> Case {
    let segment = |(items, len, held, shards, turn): &Draw| Segment {
        items: *items,
        held: cover(*items, held, ranks, *turn),
        shards: cover(*len, shards, ranks, turn * 3),
    };
    Case {
        lens: draws.iter().map(|draw| draw.1).collect(),
        plan: ReducePlan { segments: draws.iter().map(segment).collect() },
        hierarchical: false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn reduce_scatter_has_the_bits_of_one_rank(draws in draws(), bucket in 1usize..600, seed: u64) {
        for ranks in 1..=8 {
            let case = case(&draws, ranks);
            case.run(&ThreadRanks::new(ranks), ranks);
            case.run(&ThreadRanks::new(ranks).bucket_bytes(bucket * 4), ranks);
            if ranks < 4 {
                case.run(&ThreadRanks::new(ranks).jitter(seed), ranks);
            }
        }
    }

    #[test]
    fn sums_inside_nodes_first_change_no_bit(
        draws in draws(), sizes in proptest::collection::vec(1usize..6, 1..5), bucket in 1usize..600, seed: u64,
        places in proptest::collection::vec(0usize..3, 8),
    ) {
        for ranks in 2..=8 {
            let case = Case { hierarchical: true, ..case(&draws, ranks) };
            case.run(&ThreadRanks::new(ranks).nodes(&sizes), ranks);
            case.run(&ThreadRanks::new(ranks).nodes(&sizes).bucket_bytes(bucket * 4), ranks);
            case.run(&ThreadRanks::new(ranks).placed(&places), ranks);
            if ranks < 4 {
                case.run(&ThreadRanks::new(ranks).nodes(&sizes).jitter(seed), ranks);
            }
        }
    }

    #[test]
    fn all_reduce_tree_has_the_bits_of_one_rank(items in 1usize..40, cuts in proptest::collection::vec(any::<u64>(), 8)) {
        let leaf = |i: usize| [leaf(0, i, 2)[0].into(), f64::from(leaf(1, i, 1)[0]) * 1e9, 1.0];
        let node = |range: Range<usize>| -> Vec<f64> {
            (0..3).map(|e| tree::sum(&range.clone().map(|i| leaf(i)[e]).collect::<Vec<_>>())).collect()
        };
        let expected: Vec<u64> = node(0..items).iter().map(|x| x.to_bits()).collect();
        for ranks in 1..=8 {
            let held = cover(items, &cuts, ranks, items);
            let all = run_ranks(ranks, |comm| {
                let mine = tree::roots(held[comm.rank()].clone(), items);
                let roots: Vec<f64> = mine.into_iter().flat_map(node).collect();
                comm.all_reduce_tree(items, &held, 3, &roots)
            }).unwrap();
            for sum in all {
                prop_assert_eq!(sum.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), expected.clone());
            }
        }
    }
}

#[test]
fn the_sum_depends_on_its_order_so_the_tests_can_fail() {
    let items = 8;
    let tree_sum = subtree(0, 0..items, 200);
    let mut ascending = leaf(0, 0, 200);
    for item in 1..items {
        for (sum, x) in ascending.iter_mut().zip(leaf(0, item, 200)) {
            *sum += x;
        }
    }
    assert_ne!(tree_sum, ascending);
}

#[test]
fn many_small_segments_of_which_most_ranks_hold_none() {
    within_seconds(60, || {
        for ranks in [1, 2, 4, 8] {
            // 300 experts of 2 groups: two ranks hold an expert's leaves, and share its sum.
            let segment = |expert: usize| {
                let (a, b) = (expert % ranks, (expert + ranks / 2) % ranks);
                let one = |rank: usize, of: usize, range: Range<usize>| if rank == of { range } else { 0..0 };
                let held = (0..ranks)
                    .map(|rank| {
                        if a == b {
                            one(rank, a, 0..2)
                        } else if rank == a {
                            0..1
                        } else {
                            one(rank, b, 1..2)
                        }
                    })
                    .collect();
                let shards = (0..ranks)
                    .map(|rank| {
                        if a == b {
                            one(rank, a, 0..10)
                        } else if rank == a {
                            4..10
                        } else {
                            one(rank, b, 0..4)
                        }
                    })
                    .collect();
                Segment { items: 2, held, shards }
            };
            let plan = ReducePlan { segments: (0..300).map(segment).collect() };
            let mut case = Case { lens: vec![10; 300], plan, hierarchical: false };
            case.run(&ThreadRanks::new(ranks), ranks);
            case.hierarchical = true;
            case.run(&ThreadRanks::new(ranks).nodes(&[ranks / 3, ranks - ranks / 3]), ranks);
        }
    });
}

#[test]
fn several_reductions_are_under_way_and_finish_in_any_order() {
    within_seconds(60, || {
        let draw = vec![(6, 900, vec![1, 2, 3, 4, 5, 6, 7, 800], vec![100, 300, 600, 50, 60, 70, 80, 90], 0)];
        for bucket in [usize::MAX, 256] {
            let case = case(&draw, 4);
            let world = ThreadRanks::new(4).bucket_bytes(bucket).jitter(5);
            let outs = world.run(|comm| {
                let reducer = case.plan.compile(&comm)?;
                let roots = vec![case.roots(0, comm.rank())];
                let new = || vec![0.0f32; reducer.shard_len()];
                let first = reducer.start_reduce_scatter(&roots, new())?;
                let second = reducer.start_reduce_scatter(&roots, new())?;
                let meet = comm.start_barrier()?;
                let (first, second) = if comm.rank() % 2 == 0 || bucket != usize::MAX {
                    let first = first.finish()?;
                    (first, second.finish()?)
                } else {
                    let second = second.finish()?;
                    (first.finish()?, second)
                };
                meet.finish()?;
                assert_eq!(first, second);
                Ok::<_, CommError>(first)
            });
            for (rank, out) in outs.unwrap().into_iter().enumerate() {
                assert_eq!(out, case.expected(rank));
            }
        }
    });
}

#[test]
fn shards_come_back_whole_to_those_who_want_them() {
    within_seconds(60, || {
        let ways = (0..6).map(|way| (way % 2 == 1, way / 2));
        for (ranks, (in_place, nodes)) in (1..=8).flat_map(|ranks| ways.clone().map(move |way| (ranks, way)))
        {
            // One node, two, three.
            let sizes = match nodes {
                1 if ranks > 2 => vec![ranks / 3, ranks - ranks / 3],
                2 if ranks > 4 => vec![2, ranks - 3, 1],
                _ => vec![ranks],
            };
            let lens = [13usize, 0, 40, 7];
            let turn = |segment: usize| cover(lens[segment], &[5, 3, 11, 2, 30, 7, 1, 13], ranks, segment);
            let wants = |segment: usize, rank: usize| segment != 2 || rank.is_multiple_of(2);
            let value = |segment: usize, e: usize| (segment * 1000 + e) as f64;
            let run = ThreadRanks::new(ranks).nodes(&sizes).jitter(9).run(|comm| {
                let me = comm.rank();
                // Segments lie in another order in the receive buffer, at other places on each rank.
                let offsets = [me + 60, 0, me + 20, me + 73];
                let segments = (0..4).map(|i| GatherSegment {
                    shards: turn(i),
                    wanted: (0..ranks).map(|rank| wants(i, rank)).collect(),
                    offset: offsets[i],
                });
                let gatherer =
                    GatherPlan { segments: segments.collect(), in_place }.compile_hierarchical(&comm)?;
                let own: Vec<f64> =
                    (0..4).flat_map(|i| turn(i)[me].clone().map(move |e| value(i, e))).collect();
                assert_eq!(gatherer.shard_len(), own.len());
                let mut expected = vec![-1.0; 100];
                for i in (0..4).filter(|&i| wants(i, me)) {
                    (0..lens[i]).for_each(|e| expected[offsets[i] + e] = value(i, e));
                }
                let own = Arc::new(own);
                for _ in 0..2 {
                    let mut recv = vec![-1.0; 100];
                    if in_place {
                        for i in (0..4).filter(|&i| wants(i, me)) {
                            turn(i)[me].clone().for_each(|e| recv[offsets[i] + e] = value(i, e));
                        }
                    }
                    assert_eq!(gatherer.all_gather(Arc::clone(&own), recv)?, expected);
                }
                let mut rows = comm.ledger().rows.into_iter();
                let copied = rows.any(|row| row.link == LinkClass::SameRank && row.bytes_sent > 0);
                assert!(!in_place || sizes.len() > 1 || !copied, "nothing is copied on the rank");
                Ok::<_, CommError>(())
            });
            run.unwrap();
        }
    });
}

#[test]
fn integers_add_up_exactly_and_overflow_is_refused() {
    within_seconds(20, || {
        let sums = run_ranks(5, |comm| comm.all_reduce_u64(&[1 << comm.rank(), u64::MAX / 8, 0])).unwrap();
        assert_eq!(sums, vec![vec![31, u64::MAX / 8 * 5, 0]; 5]);
        assert_eq!(run_ranks(3, |comm| comm.all_reduce_u64(&[])).unwrap(), vec![Vec::<u64>::new(); 3]);
        let error = run_ranks(2, |comm| comm.all_reduce_u64(&[u64::MAX])).unwrap_err();
        assert!(error.to_string().contains("does not fit"), "{error}");
    });
}

#[test]
fn impossible_plans_are_refused_with_the_segment_and_the_reason() {
    let good = Segment { items: 4, held: vec![0..2, 2..4], shards: vec![0..5, 5..9] };
    let cases = [
        (Segment { held: vec![0..2, 3..4], ..good.clone() }, "items 2..3 of 4 are held by nobody"),
        (Segment { held: vec![0..2, 1..4], ..good.clone() }, "held twice"),
        (Segment { held: vec![0..2, 2..5], ..good.clone() }, "rank 1 holds 2..5 of 4 items"),
        (Segment { held: vec![0..4], ..good.clone() }, "1 held ranges"),
        (Segment { items: 0, held: vec![0..0, 0..0], ..good.clone() }, "at least one item"),
        (Segment { shards: vec![0..5, 4..9], ..good.clone() }, "overlap"),
    ];
    for (bad, reason) in cases {
        let plan = ReducePlan { segments: vec![good.clone(), bad] };
        let error = run_ranks(2, |comm| plan.compile(&comm).map(|_| ())).unwrap_err().to_string();
        assert!(error.contains("segment 1") && error.contains(reason), "{error}");
    }
    let plan = ReducePlan { segments: vec![good] };
    let part = |len: usize| Part::whole(Arc::new(vec![0.0f32; len]));
    for (roots, out, reason) in [
        (vec![vec![part(9)]], 3, "the output has 3 elements"),
        (vec![vec![part(8)]], 9, "is shorter than the segment, 9"),
        (vec![vec![part(9), part(9)]], 9, "2 roots, this rank holds 1"),
        (vec![], 9, "roots of 0 segments"),
    ] {
        let run = run_ranks(2, |comm| plan.compile(&comm)?.reduce_scatter(&roots, vec![0.0f32; out]));
        let error = run.unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
}
