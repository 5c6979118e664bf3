//! Exchanges alone, on routing that is drawn: every row reaches its expert, every sum is the canonical one, and what
//! crosses between nodes is counted from the routing.

use unisono_comm::watch::{Identity, Reason};
use unisono_comm::{CommError, Communicator, ThreadRanks};
use unisono_mesh::{ExpertPlacement, Fold, Grid, LinkClass};
use unisono_plan::dispatch::{DispatchGroup, DispatchShape, kind};
use unisono_tensor::{Backend, Buffer, Cpu, Routing, Wire};

use super::*;

const EXPERTS: usize = 16;
const TOP_K: usize = 4;
const D: usize = 6;
const TOKENS: usize = 24;

/// Draws choices from a seed: SplitMix64 (Steele, Lea and Flood, 2014).
fn draw(state: &mut u64) -> usize {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    ((z ^ (z >> 27)) >> 33) as usize
}

/// Choices of a slot's tokens among the first `most` of a random order of groups of four experts.
fn choices(slot: usize, most: usize) -> Vec<u32> {
    let mut state = slot as u64 + 1;
    let mut all = Vec::new();
    for _ in 0..TOKENS {
        let first = draw(&mut state) % (EXPERTS / 4);
        let groups: Vec<usize> = (0..most).map(|g| (first + g) % (EXPERTS / 4)).collect();
        let mut experts: Vec<u32> =
            groups.iter().flat_map(|g| (g * 4..g * 4 + 4).map(|e| e as u32)).collect();
        while experts.len() > TOP_K {
            experts.remove(draw(&mut state) % experts.len());
        }
        experts.sort_unstable();
        all.extend(experts);
    }
    all
}

/// What a token's row holds: its slot and number in every column.
fn value(slot: usize, token: usize, column: usize) -> f32 {
    1.0 + (slot * TOKENS + token) as f32 * 0.37 + column as f32 * 0.011
}

/// What an expert makes of a value.
fn expert(expert: usize, value: f32) -> f32 {
    value * (1.0 + expert as f32 * 0.1)
}

struct Case {
    nodes: &'static [usize],
    shape: DispatchShape,
    /// Groups of four experts that a token may choose from.
    most_groups: usize,
    expert_nodes: usize,
}

/// Calls of dispatch that have been started.
fn dispatches(comm: &Communicator) -> usize {
    let run = Identity { run_id: String::new(), epoch: 1 };
    let record = comm.flight_record(&run, Reason::Terminated);
    record.calls.iter().filter(|entry| entry.call.kind == kind::DISPATCH).count()
}

/// Rows out and back on one rank: bytes sent across nodes, by dispatch and by combine.
fn exchange(case: &Case, comm: Communicator) -> Result<[u64; 2], CommError> {
    let slots = 8;
    let grid =
        Grid { replicas: slots, expert_group: slots, expert_nodes: case.expert_nodes, ..Grid::default() };
    let fold = Fold::new(grid, comm.size()).expect("the case's ranks divide the slots");
    let placement = ExpertPlacement::new(fold, EXPERTS);
    let own = fold.slots_of(comm.rank());
    let batch = Batch { slots: own.clone(), sequences: 1, sequence_length: TOKENS, ..Batch::default() };
    let routing = Routing {
        experts: own.clone().flat_map(|slot| choices(slot, case.most_groups)).collect(),
        ..Routing::default()
    };
    let backend = Cpu::new(1);
    let values: Vec<f32> =
        (0..batch.rows() * D).map(|at| value(own.start + at / D / TOKENS, at / D % TOKENS, at % D)).collect();
    let mut x = backend.alloc(values.len());
    backend.upload(&values, x.all_mut());
    let node_of = |rank: usize| if case.shape.hierarchical { comm.node(rank) } else { 0 };
    let group = DispatchGroup::new(fold, placement, comm.rank(), own.clone(), node_of);
    let wave = Wave { comm: &comm, group, shape: case.shape };
    let route = Route::new(&wave, &routing, &batch, TOP_K)?;
    let wiring = || Wiring { comm: &comm, backend: &backend, d: D, wire: wire(&case.shape), overlap: true };
    let mut moving = Dispatching::start(wiring(), &route, &x)?;
    let mut back = Combining::new(wiring(), &route);
    let mut received = None;
    assert_eq!(dispatches(&comm), 1);
    for (index, chunk) in route.chunks.iter().enumerate() {
        moving.arrive(chunk, &mut received)?;
        // One chunk is under way: that they do not share the link is what lets the first arrive early.
        assert_eq!(dispatches(&comm), (index + 2).min(route.chunks.len()));
        let received = received.as_ref().expect("a chunk arrived");
        let mut results = backend.alloc(chunk.rows * D);
        for (index, rows, first) in &chunk.runs {
            let of = wave.group.instances[comm.rank()][*index].expert;
            for (row, out) in rows.clone().zip(*first..) {
                for column in 0..D {
                    results[out * D + column] = expert(of, received[row * D + column]);
                }
            }
        }
        back.send_back(chunk, results)?;
    }
    let back = back.finish()?;
    let mut y = backend.alloc(x.len());
    let (experts, places) = (&routing.experts, &route.places);
    let node_size = EXPERTS / case.expert_nodes;
    backend.combine_rows(
        back.all(),
        D,
        experts,
        places,
        TOP_K,
        node_size,
        wire(&case.shape),
        None,
        None,
        y.all_mut(),
    );
    for (at, got) in y.iter().enumerate().filter(|_| !case.shape.half) {
        let chosen = &routing.experts[at / D * TOP_K..(at / D + 1) * TOP_K];
        assert_eq!(got.to_bits(), combined(chosen, values[at], node_size).to_bits(), "element {at}");
    }
    let ledger = comm.ledger();
    let sent = |kind: &str| {
        let rows = ledger.rows.iter().filter(|row| row.kind == kind && row.link == LinkClass::OtherNode);
        rows.map(|row| row.bytes_sent).sum()
    };
    Ok([sent(kind::DISPATCH), sent(kind::COMBINE)])
}

/// One element of the canonical combine.
fn combined(chosen: &[u32], value: f32, node_size: usize) -> f32 {
    let mut sums: Vec<(usize, f32)> = Vec::new();
    for of in chosen {
        let (node, result) = (*of as usize / node_size, expert(*of as usize, value));
        match sums.last_mut() {
            Some((last, sum)) if *last == node => *sum += result,
            _ => sums.push((node, result)),
        }
    }
    sums[1..].iter().fold(sums[0].1, |total, (_, sum)| total + sum)
}

fn run(case: &Case) -> [u64; 2] {
    let ranks = ThreadRanks::new(case.nodes.iter().sum()).nodes(case.nodes);
    let sent = ranks.run(|comm| exchange(case, comm)).expect("the exchange succeeds");
    sent.into_iter().fold([0; 2], |sum, rank| [sum[0] + rank[0], sum[1] + rank[1]])
}

/// `(token, node)` pairs where a token of the routing visits a node that it is not on, on equal nodes.
fn visits(nodes: usize, most_groups: usize) -> usize {
    let node_of = |slot: usize| slot / (8 / nodes);
    let far = |slot: usize, chosen: &[u32]| {
        let mut seen: Vec<usize> = chosen.iter().map(|e| *e as usize / (EXPERTS / nodes)).collect();
        seen.dedup();
        seen.into_iter().filter(|node| *node != node_of(slot)).count()
    };
    (0..8).map(|slot| choices(slot, most_groups).chunks(TOP_K).map(|c| far(slot, c)).sum::<usize>()).sum()
}

fn hierarchical(chunks: usize) -> DispatchShape {
    DispatchShape { hierarchical: true, chunks, row_block: 4, ..DispatchShape::default() }
}

#[test]
fn a_row_crosses_to_a_node_once_and_its_results_come_back_as_one() {
    const CASES: [(&[usize], usize); 4] = [(&[4, 4], 1), (&[4, 4], 3), (&[2, 2, 2, 2], 2), (&[1, 1], 1)];
    for (nodes, chunks) in CASES {
        for most_groups in [1, 2, 4] {
            let count = nodes.len();
            let case = Case { nodes, shape: hierarchical(chunks), most_groups, expert_nodes: count };
            let expected = (visits(count, most_groups) * D * 4) as u64;
            assert_eq!(run(&case), [expected; 2], "{nodes:?}, {chunks} chunks, {most_groups} groups");
        }
    }
}

#[test]
fn group_limited_routing_caps_the_nodes_that_a_token_visits() {
    let tokens = 8 * TOKENS;
    for most_groups in [1, 2] {
        let case = Case { nodes: &[2, 2, 2, 2], shape: hierarchical(1), most_groups, expert_nodes: 4 };
        let [dispatch, combine] = run(&case);
        let most = (tokens * most_groups * D * 4) as u64;
        assert!(dispatch <= most && combine <= most, "{dispatch} and {combine} of at most {most}");
    }
}

#[test]
fn nodes_that_cut_expert_nodes_give_the_same_sums() {
    const NODES: [&[usize]; 5] = [&[3, 5], &[1, 6, 1], &[8], &[1, 3], &[7, 1]];
    for nodes in NODES {
        for (chunks, expert_nodes) in [(1, 2), (4, 4), (2, 1), (5, 16)] {
            run(&Case { nodes, shape: hierarchical(chunks), most_groups: 4, expert_nodes });
        }
    }
}

#[test]
fn flat_dispatch_sends_a_row_for_every_choice() {
    let shape = DispatchShape { chunks: 2, ..DispatchShape::default() };
    let flat = run(&Case { nodes: &[4, 4], shape, most_groups: 2, expert_nodes: 2 });
    let far: usize = (0..8)
        .map(|slot| choices(slot, 2).iter().filter(|expert| **expert as usize / 8 != slot / 4).count())
        .sum();
    assert_eq!(flat, [(far * D * 4) as u64; 2]);
}

#[test]
fn a_wire_of_half_the_bytes_sends_half_the_bytes() {
    let case = |half| Case {
        nodes: &[4, 4],
        shape: DispatchShape { half, ..hierarchical(1) },
        most_groups: 2,
        expert_nodes: 2,
    };
    let [full, _] = run(&case(false));
    let rows = visits(2, 2) as u64;
    assert_eq!(full, rows * D as u64 * 4);
    assert_eq!(full / 2, rows * (Wire::Bf16.width(D) * 4) as u64);
}
