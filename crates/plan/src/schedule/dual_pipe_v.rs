//! DualPipeV: rank r holds stages r and 2p-1-r, so that micro-batches run down one leg of a V and up the other, and in the
//! steady state each forward overlaps a backward of the other leg. Eight loops, as in DeepSeek's description.

use std::collections::VecDeque;

use super::{Chunk, ChunkBytes, InFlight, Op, Peak, Schedule};

/// The list of one rank under construction: the next micro-batch of each leg, forward and backward.
struct List {
    stages: [u16; 2],
    forward: [u32; 2],
    backward: [u32; 2],
    waiting: VecDeque<Chunk>,
    ops: Vec<Op>,
}

impl List {
    fn next(counts: &mut [u32; 2], stages: &[u16; 2], leg: usize) -> Chunk {
        counts[leg] += 1;
        Chunk { stage: stages[leg], micro_batch: counts[leg] - 1 }
    }

    fn forward(&mut self, leg: usize) {
        let chunk = Self::next(&mut self.forward, &self.stages, leg);
        self.ops.push(Op::Forward(chunk));
    }

    fn backward(&mut self, leg: usize) {
        let chunk = Self::next(&mut self.backward, &self.stages, leg);
        self.ops.push(Op::Backward(chunk));
    }

    /// The input gradient now, the weight gradients later.
    fn input(&mut self, leg: usize) {
        let chunk = Self::next(&mut self.backward, &self.stages, leg);
        self.waiting.push_back(chunk);
        self.ops.push(Op::BackwardInput(chunk));
    }

    fn weights(&mut self) {
        self.ops.extend(self.waiting.pop_front().map(Op::BackwardWeight));
    }

    fn overlapped(&mut self, forward: usize, backward: usize) {
        let forward = Self::next(&mut self.forward, &self.stages, forward);
        let backward = Self::next(&mut self.backward, &self.stages, backward);
        self.ops.push(Op::Overlapped { forward, backward });
    }
}

fn list(ranks: usize, micro_batches: usize, rank: usize) -> Vec<Op> {
    let (down, up) = (0, 1);
    let after = ranks - rank - 1;
    let mut list = List {
        stages: [rank as u16, (2 * ranks - 1 - rank) as u16],
        forward: [0; 2],
        backward: [0; 2],
        waiting: VecDeque::new(),
        ops: Vec::with_capacity(4 * micro_batches),
    };
    // Fill the leg down, then both legs.
    (0..2 * after).for_each(|_| list.forward(down));
    for _ in 0..rank + 1 {
        list.forward(down);
        list.forward(up);
    }
    // The first backwards: weight gradients fill the wait for the next one.
    for _ in 0..after {
        list.input(up);
        list.weights();
        list.forward(up);
    }
    // Steady state. The last rank's first pair has nothing of its other leg in flight that could overlap.
    for turn in 0..micro_batches - 2 * ranks + rank + 1 {
        if turn == 0 && after == 0 {
            list.forward(down);
            list.backward(up);
        } else {
            list.overlapped(down, up);
        }
        list.overlapped(up, down);
    }
    for _ in 0..after {
        list.backward(up);
        list.overlapped(up, down);
    }
    // Drain: the later half of these leaves its weight gradients for the end.
    let both = 2 * (rank + 1);
    for index in 0..both {
        let leg = if index % 2 == 0 { up } else { down };
        if index < rank + 1 { list.backward(leg) } else { list.input(leg) }
    }
    for _ in 0..after {
        list.weights();
        list.input(down);
    }
    (0..rank + 1).for_each(|_| list.weights());
    list.ops
}

pub(super) fn schedule(ranks: usize, micro_batches: usize) -> Schedule {
    let stages = 0..2 * ranks;
    Schedule {
        micro_batches: micro_batches as u32,
        placement: stages.map(|stage| stage.min(2 * ranks - 1 - stage) as u16).collect(),
        ranks: (0..ranks).map(|rank| list(ranks, micro_batches, rank)).collect(),
    }
}

/// When rank `rank` holds most, where a micro-batch keeps `down` in its first stage and `up` in its second.
///
/// It is in an overlapped pair; or, where operands weigh more than activations, after an input gradient: of the first
/// backwards, or of the drain. There legs alternate, so that every second turn changes what is held by the same bytes.
pub(super) fn peak([down, up]: [ChunkBytes; 2], ranks: usize, rank: usize) -> Peak {
    let (p, r, after) = (ranks, rank, ranks - rank - 1);
    let held = |activations: [usize; 2], waits: [usize; 2]| {
        [0, 1].map(|leg| InFlight { activations: activations[leg], weight_operands: waits[leg] })
    };
    let bytes = |[in_down, in_up]: [InFlight; 2]| (down.times(in_down) + up.times(in_up)).total();
    let first = held([2 * p - r, r + 1], [0, 0]);
    let mut most = (bytes(first), first);
    let mut consider = |held: [InFlight; 2]| {
        let bytes = bytes(held);
        if bytes > most.0 {
            most = (bytes, held);
        }
    };
    if after > 0 {
        consider(held([2 * p - r - 1, r], [0, 1]));
    }
    // The drain: r + 1 whole backwards, as many input gradients, then one and one on the way down. Legs begin with `up`.
    let legs = |count: usize| [count / 2, count.div_ceil(2)];
    let waiting = |inputs: usize, done: usize| {
        let (all, gone) = (legs(r + 1 + inputs), legs(r + 1 + done));
        [all[0] - gone[0], all[1] - gone[1]]
    };
    for inputs in [1, r, r + 1] {
        let begun = legs(r + 1 + inputs);
        consider(held([p - begun[0], r + 1 - begun[1]], waiting(inputs, 0)));
    }
    let turns = after.min(r + 1);
    for turn in [1, turns.saturating_sub(1), turns] {
        if (1..=turns).contains(&turn) {
            let [down_waits, up_waits] = waiting(r + 1, turn);
            consider(held([after - turn, 0], [down_waits + turn, up_waits]));
        }
    }
    Peak::of(most.1)
}
