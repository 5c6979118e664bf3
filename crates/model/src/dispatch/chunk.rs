//! One exchange of rows: straight within a node, across nodes by way of a carrier.
//!
//! A chunk takes a part of every slot's tokens, and all choices of a token are in one chunk: a row crosses to a node once,
//! and what comes back is summed there whole. Flat dispatch is the case of one node, where nothing crosses.

use std::ops::Range;
use std::sync::Arc;

use unisono_comm::{CommError, Part};
use unisono_mesh::Instance;
use unisono_plan::dispatch::{Census, DispatchGroup, kind, part_of};
use unisono_tensor::{NO_ROW, Routing};

use super::group::Wave;
use crate::batch::Batch;

/// Which buffer rows are sent from within a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// This rank's own rows.
    Own,
    /// Rows that came across and are forwarded.
    Forwarded,
}

/// One exchange, from this rank's side. Ranges are of rows; lists of ranges are by peer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Chunk {
    /// Own rows sent across.
    pub across: Vec<Vec<Range<usize>>>,
    /// Rows that arrive from across.
    pub arrived: Vec<Vec<Range<usize>>>,
    /// How many arrive.
    pub arrived_rows: usize,
    /// `[forwarded rows]` the arrived row behind each: by (peer, instance, source, slot, token).
    pub forward: Vec<u32>,
    /// Rows sent within the node.
    pub inside: Vec<Vec<(Origin, Range<usize>)>>,
    /// Rows received for this rank's experts, by who brings them: by (instance, source, slot, token).
    pub received: Vec<Vec<Range<usize>>>,
    /// How many are received.
    pub rows: usize,
    /// Where received rows stand among all of the layer: `(instance, rows of the layer, first row of the chunk)`.
    pub runs: Vec<(usize, Range<usize>, usize)>,
    /// Own rows that stay in the node.
    pub own: Range<usize>,
    /// `[sums, top_k]` which results, own ones first, then forwarded ones, make up each row that goes back across.
    pub sums: Vec<u32>,
    /// Sums sent back across.
    pub sums_sent: Vec<Vec<Range<usize>>>,
    /// Returned rows, within the layer's, by who brings them; own ones first.
    pub returned: Vec<Vec<Range<usize>>>,
    /// The first returned row.
    pub first_returned: usize,
    /// Where nothing crosses, what this rank sends to itself, which no call moves: `[rows]` the token row behind each
    /// received row, `[own rows]` the result behind each returned row, [`NO_ROW`] for those of others.
    pub own_received: Vec<u32>,
    pub own_returned: Vec<u32>,
    /// How many these are.
    pub placed: usize,
}

impl Chunk {
    /// Results that this rank takes within its node: those of its own rows, then those of rows it forwards.
    pub fn gathered_rows(&self) -> usize {
        self.own.len() + self.forward.len()
    }

    /// Where results land that come from within the node, if own ones start at `own` and forwarded ones at `forwarded`.
    pub fn landing(&self, own: usize, forwarded: usize) -> Vec<Vec<Range<usize>>> {
        let place = |(origin, range): &(Origin, Range<usize>)| {
            let shift = |by: usize| range.start + by..range.end + by;
            match origin {
                Origin::Own => {
                    let start = own + range.start - self.own.start;
                    start..start + range.len()
                }
                Origin::Forwarded => shift(forwarded),
            }
        };
        self.inside.iter().map(|list| list.iter().map(place).collect()).collect()
    }
}

/// All chunks of a layer.
pub(crate) struct Plan {
    /// The token row behind each row sent; [`NO_ROW`] where the row is placed without being sent.
    pub tokens: Vec<u32>,
    pub places: Vec<u32>,
    pub chunks: Vec<Chunk>,
    pub returned_rows: usize,
}

/// What the building of a plan reads and writes.
struct Builder<'a> {
    group: &'a DispatchGroup,
    census: &'a Census,
    routing: &'a Routing,
    slot_rows: usize,
    top_k: usize,
    /// `[node][part]` token rows that cross, ascending.
    far: Vec<Vec<Vec<u32>>>,
    tokens: Vec<u32>,
    places: Vec<u32>,
    returned: usize,
}

impl Plan {
    /// Plans all chunks; `runs` are the layer's runs of received rows.
    ///
    /// # Errors
    /// If the exchange of choices fails.
    pub fn new(
        wave: &Wave<'_>,
        census: &mut Census,
        routing: &Routing,
        batch: &Batch,
        top_k: usize,
        runs: &[Range<usize>],
    ) -> Result<Self, CommError> {
        let group = &wave.group;
        let far = far_rows(group, routing, batch, top_k, wave.shape.chunks);
        let arrived = exchange_choices(wave, census, &far, routing, top_k)?;
        let census = &*census;
        let mut builder = Builder {
            group,
            census,
            routing,
            slot_rows: batch.slot_rows(),
            top_k,
            far,
            tokens: Vec::with_capacity(routing.experts.len()),
            places: vec![NO_ROW; routing.experts.len()],
            returned: 0,
        };
        let parts = wave.shape.chunks;
        let mut chunks: Vec<Chunk> = Vec::with_capacity(parts);
        // Rows of a slot that earlier parts hold, `[own instance][slot]`, as first rows of the layer.
        let mut filled = first_rows(group, census, runs);
        for part in 0..parts {
            let mut chunk = builder.own_side(part);
            builder.carrier_side(part, &arrived, &mut chunk);
            builder.expert_side(part, &mut filled, &mut chunk);
            chunks.push(chunk);
        }
        builder.place_own(&chunks);
        if !group.crosses() {
            chunks.iter_mut().for_each(|chunk| builder.keep_own(chunk));
        }
        let Builder { tokens, places, returned, .. } = builder;
        Ok(Self { tokens, places, chunks, returned_rows: returned })
    }
}

/// `[node][part]` token rows that cross, ascending.
fn far_rows(
    group: &DispatchGroup,
    routing: &Routing,
    batch: &Batch,
    top_k: usize,
    parts: usize,
) -> Vec<Vec<Vec<u32>>> {
    let mut far = vec![vec![Vec::new(); parts]; group.nodes.len()];
    if group.crosses() {
        for (row, chosen) in routing.experts.chunks_exact(top_k).enumerate() {
            let (index, token) = (row / batch.slot_rows(), row % batch.slot_rows());
            let part = part_of(token, batch.slot_rows(), parts);
            group.far_nodes(group.slots.start + index, chosen, |node| far[node][part].push(row as u32));
        }
    }
    far
}

/// Tells every carrier the choices of the tokens that cross to it: `[source]`, by (part, slot, token). Counts the sums that
/// will come back.
///
/// # Errors
/// If the exchange fails.
fn exchange_choices(
    wave: &Wave<'_>,
    census: &mut Census,
    far: &[Vec<Vec<u32>>],
    routing: &Routing,
    k: usize,
) -> Result<Vec<Vec<u32>>, CommError> {
    let group = &wave.group;
    if !group.crosses() {
        return Ok(vec![Vec::new(); group.size()]);
    }
    let mut sends = vec![Vec::new(); group.size()];
    for node in group.others() {
        let rows = far[node].iter().flatten().map(|row| *row as usize);
        let choices: Vec<u32> =
            rows.flat_map(|row| routing.experts[row * k..(row + 1) * k].iter().copied()).collect();
        census.count_sums(group, group.me(), node, &choices, k);
        sends[group.carrier(group.me(), node)].push(Part::whole(Arc::new(choices)));
    }
    let mut next = 0;
    let mut ranges = vec![Vec::new(); group.size()];
    let carried = group.carried_by(group.me()).into_iter().filter(|source| *source != group.me());
    for source in carried.clone() {
        let rows: usize = (0..census.parts()).map(|part| crossing(group, census, source, part)).sum();
        ranges[source].push(next..next + rows * k);
        next += rows * k;
    }
    let all = wave.comm.exchange(kind::CHOICES, sends, vec![0u32; next], ranges.clone())?;
    let mut arrived = vec![Vec::new(); group.size()];
    for source in carried {
        arrived[source] =
            ranges[source].iter().flat_map(|range| all[range.clone()].iter().copied()).collect();
        census.count_sums(group, source, group.here(), &arrived[source], k);
    }
    Ok(arrived)
}

/// Tokens of `source` that cross to this rank's node in one part.
fn crossing(group: &DispatchGroup, census: &Census, source: usize, part: usize) -> usize {
    group.slots_of(source).map(|slot| census.crossing(slot, part, group.here())).sum()
}

/// `[own instance][slot of the group]` the first row of the layer that a slot's rows take.
fn first_rows(group: &DispatchGroup, census: &Census, runs: &[Range<usize>]) -> Vec<Vec<usize>> {
    let of = |(instance, run): (&Instance, &Range<usize>)| {
        let mut next = run.start;
        let slots = group.peers().flat_map(|peer| group.slots_in(peer, instance.group));
        let first = |slot: usize| {
            let start = next;
            next += census.rows(slot, instance.expert);
            start
        };
        slots.map(first).collect()
    };
    group.instances[group.me()].iter().zip(runs).map(of).collect()
}

impl Builder<'_> {
    /// Own rows that cross, then those that stay in the node, whose tokens [`Builder::place_own`] fills in; and what comes
    /// back, in the other order.
    fn own_side(&mut self, part: usize) -> Chunk {
        let group = self.group;
        let none = vec![Vec::new(); group.size()];
        let mut chunk = Chunk { across: none.clone(), returned: none, ..Chunk::default() };
        for node in group.others() {
            let start = self.tokens.len();
            self.tokens.extend_from_slice(&self.far[node][part]);
            chunk.across[group.carrier(group.me(), node)].push(start..self.tokens.len());
        }
        let start = self.tokens.len();
        let mine = group.nodes[group.here()].iter().flat_map(|peer| &group.instances[*peer]);
        let rows: usize = mine.map(|instance| self.census.rows_for(group, group.me(), part, instance)).sum();
        self.tokens.resize(start + rows, 0);
        chunk.own = start..start + rows;
        chunk.first_returned = self.returned;
        self.returned += rows;
        chunk.returned[group.me()].push(chunk.first_returned..self.returned);
        for node in group.others() {
            let start = self.returned;
            self.place_far(node, part);
            chunk.returned[group.carrier(group.me(), node)].push(start..self.returned);
        }
        chunk
    }

    /// Gives the rows that come back from `node` their places.
    fn place_far(&mut self, node: usize, part: usize) {
        let Self { group, routing, slot_rows, top_k: k, far, places, returned, .. } = self;
        for row in far[node][part].iter().map(|row| *row as usize) {
            let slot = group.slots.start + row / *slot_rows;
            group.addends(slot, &routing.experts[row * *k..(row + 1) * *k], node, |addend| {
                places[row * *k + addend.start] = *returned as u32;
                *returned += 1;
            });
        }
    }

    /// What this rank sends within its node: its own rows and those it carries; and the sums that go back.
    fn carrier_side(&self, part: usize, arrived: &[Vec<u32>], chunk: &mut Chunk) {
        let (group, me) = (self.group, self.group.me());
        let carried = group.carried_by(me);
        let none = vec![Vec::new(); group.size()];
        (chunk.arrived, chunk.sums_sent) = (none.clone(), none);
        chunk.inside = vec![Vec::new(); group.size()];
        let mut cursors = Cursors::new(group, group.size());
        let (mut own, mut forwarded) = (chunk.own.start, 0);
        for &peer in &group.nodes[group.here()] {
            for instance in &group.instances[peer] {
                for &source in &carried {
                    let rows = self.census.rows_for(group, source, part, instance);
                    let (origin, next) = if source == me {
                        (Origin::Own, &mut own)
                    } else {
                        (Origin::Forwarded, &mut forwarded)
                    };
                    chunk.inside[peer].push((origin, *next..*next + rows));
                    *cursors.at(source, instance) = *next as u32;
                    *next += rows;
                }
            }
        }
        chunk.forward = vec![0; forwarded];
        for source in carried.into_iter().filter(|source| *source != me) {
            self.forward_from(source, part, &arrived[source], &mut cursors, chunk);
        }
    }

    fn forward_from(
        &self,
        source: usize,
        part: usize,
        choices: &[u32],
        cursors: &mut Cursors,
        chunk: &mut Chunk,
    ) {
        let (group, k) = (self.group, self.top_k);
        let before: usize = (0..part).map(|part| crossing(group, self.census, source, part)).sum();
        let mut tokens = choices[before * k..].chunks_exact(k);
        let (first, first_sum) = (chunk.arrived_rows, chunk.sums.len() / k);
        for slot in group.slots_of(source) {
            for experts in tokens.by_ref().take(self.census.crossing(slot, part, group.here())) {
                let results: Vec<u32> = experts
                    .iter()
                    .map(|expert| {
                        if group.node_of[group.owner(slot, *expert as usize)] != group.here() {
                            return NO_ROW;
                        }
                        let instance = Instance { group: group.group_of(slot), expert: *expert as usize };
                        let place = cursors.at(source, &instance);
                        chunk.forward[*place as usize] = chunk.arrived_rows as u32;
                        *place += 1;
                        chunk.own.len() as u32 + *place - 1
                    })
                    .collect();
                group.addends(slot, experts, group.here(), |addend| {
                    let end = chunk.sums.len() + k;
                    chunk.sums.extend_from_slice(&results[addend]);
                    chunk.sums.resize(end, NO_ROW);
                });
                chunk.arrived_rows += 1;
            }
        }
        chunk.arrived[source].push(first..chunk.arrived_rows);
        chunk.sums_sent[source].push(first_sum..chunk.sums.len() / k);
    }

    /// What this rank's experts receive.
    fn expert_side(&self, part: usize, filled: &mut [Vec<usize>], chunk: &mut Chunk) {
        let group = self.group;
        chunk.received = vec![Vec::new(); group.size()];
        let mut next = 0;
        for (index, instance) in group.instances[group.me()].iter().enumerate() {
            let mut filled = filled[index].iter_mut();
            for source in group.peers() {
                let start = next;
                for (slot, first) in group.slots_in(source, instance.group).zip(filled.by_ref()) {
                    let rows = self.census.rows_in(slot, part, instance.expert);
                    match chunk.runs.last_mut() {
                        Some((last, run, _)) if *last == index && run.end == *first => run.end += rows,
                        _ => chunk.runs.push((index, *first..*first + rows, next)),
                    }
                    *first += rows;
                    next += rows;
                }
                chunk.received[group.carrier(source, group.here())].push(start..next);
            }
        }
        chunk.rows = next;
    }

    /// Fills in the tokens of rows that stay in the node, and the places of their results.
    fn place_own(&mut self, chunks: &[Chunk]) {
        let (group, parts) = (self.group, chunks.len());
        let mut cursors = Cursors::new(group, group.slots.len() * parts);
        for (part, chunk) in chunks.iter().enumerate() {
            let mut next = chunk.own.start as u32;
            for instance in group.nodes[group.here()].iter().flat_map(|peer| &group.instances[*peer]) {
                for slot in group.slots_in(group.me(), instance.group) {
                    *cursors.at((slot - group.slots.start) * parts + part, instance) = next;
                    next += self.census.rows_in(slot, part, instance.expert) as u32;
                }
            }
        }
        for (choice, expert) in self.routing.experts.iter().enumerate() {
            let row = choice / self.top_k;
            let (index, token) = (row / self.slot_rows, row % self.slot_rows);
            let slot = group.slots.start + index;
            let expert = *expert as usize;
            if group.node_of[group.owner(slot, expert)] != group.here() {
                continue;
            }
            let part = part_of(token, self.slot_rows, parts);
            let place = cursors.at(index * parts + part, &Instance { group: group.group_of(slot), expert });
            self.tokens[*place as usize] = row as u32;
            let chunk = &chunks[part];
            self.places[choice] = (chunk.first_returned + *place as usize - chunk.own.start) as u32;
            *place += 1;
        }
    }

    /// Takes what this rank sends to itself out of a chunk's exchange.
    fn keep_own(&mut self, chunk: &mut Chunk) {
        let me = self.group.me();
        (chunk.own_received, chunk.own_returned) = (vec![NO_ROW; chunk.rows], vec![NO_ROW; chunk.own.len()]);
        let sent = std::mem::take(&mut chunk.inside[me]);
        let received = std::mem::take(&mut chunk.received[me]);
        let rows = sent.into_iter().flat_map(|(_, range)| range);
        for (sent, received) in rows.zip(received.into_iter().flatten()) {
            chunk.own_received[received] = std::mem::replace(&mut self.tokens[sent], NO_ROW);
            chunk.own_returned[sent - chunk.own.start] = received as u32;
            chunk.placed += 1;
        }
    }
}

/// Where the next row goes, by instance and a key beside it.
struct Cursors {
    first_group: usize,
    experts: usize,
    keys: usize,
    next: Vec<u32>,
}

impl Cursors {
    fn new(group: &DispatchGroup, keys: usize) -> Self {
        let first_group = group.group_of(group.slots_of(0).start);
        let last_group = group.group_of(group.slots_of(group.size() - 1).end - 1);
        let experts = group.experts();
        Self { first_group, experts, keys, next: vec![0; (last_group + 1 - first_group) * experts * keys] }
    }

    fn at(&mut self, key: usize, instance: &Instance) -> &mut u32 {
        let index = (instance.group - self.first_group) * self.experts + instance.expert;
        &mut self.next[index * self.keys + key]
    }
}
