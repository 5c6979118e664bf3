//! The calls of one MoE layer in one pass, and the bytes of each.

use std::ops::Range;

use super::census::Census;
use super::group::DispatchGroup;
use super::rounds::{Round, cut, fits};
use super::{RowRanges, kind};
use crate::schedule::ExchangeKind;

/// Bytes of a choice, a count, a weight.
const WORD: u64 = 4;

/// How rows travel between tokens and experts. Nothing but `half` ever changes a bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DispatchShape {
    /// Whether a row crosses to a node once, is forwarded inside it, and its results are summed there.
    pub hierarchical: bool,
    /// Exchanges that a wave's tokens are cut into.
    pub chunks: usize,
    /// The most rows of other tokens that a rank holds at once in a layer; 0 for no bound.
    pub most_rows: usize,
    /// Rows of one expert weight-gradient product, which rounds do not cut.
    pub row_block: usize,
    /// Whether values travel as bfloat16, two to a word.
    pub half: bool,
}

impl Default for DispatchShape {
    fn default() -> Self {
        Self { hierarchical: false, chunks: 1, most_rows: 0, row_block: 256, half: false }
    }
}

impl DispatchShape {
    /// Whether received rows wait in a buffer of arrival before they stand where experts read them.
    pub fn staged(&self) -> bool {
        self.chunks > 1 || self.half
    }

    /// Bytes that a row of `d` values takes on the wire.
    fn row_bytes(&self, d: usize) -> u64 {
        WORD * if self.half { d.div_ceil(2) } else { d } as u64
    }
}

/// Bytes of one call of a rank, by rank of the group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Volume {
    /// Sent to each.
    pub sent: Vec<u64>,
    /// Received from each.
    pub received: Vec<u64>,
}

impl Volume {
    /// Nothing, in a group of `size`.
    pub fn none(size: usize) -> Self {
        Self { sent: vec![0; size], received: vec![0; size] }
    }

    /// The same way back.
    fn back(self) -> Self {
        Self { sent: self.received, received: self.sent }
    }

    fn times(mut self, bytes: u64) -> Self {
        self.sent.iter_mut().chain(&mut self.received).for_each(|count| *count *= bytes);
        self
    }
}

/// What one rank's calls of one MoE layer move in one pass.
pub struct LayerCalls<'a> {
    group: &'a DispatchGroup,
    census: &'a Census,
    rows: RowRanges,
    /// Rounds in which rows travel that would not fit the bound together.
    rounds: Option<Vec<Round>>,
    row_bytes: u64,
    top_k: u64,
}

impl<'a> LayerCalls<'a> {
    /// The calls for what `census` counts, with rows of `d` values and `top_k` choices a token.
    pub fn new(
        group: &'a DispatchGroup,
        census: &'a Census,
        shape: &DispatchShape,
        d: usize,
        top_k: usize,
    ) -> Self {
        let rows = RowRanges::new(group, census);
        let rounds = (!fits(group, census, shape)).then(|| cut(group, census, &rows, shape));
        Self { group, census, rows, rounds, row_bytes: shape.row_bytes(d), top_k: top_k as u64 }
    }

    /// The calls of an exchange of the schedule: their kinds, and the bytes of each.
    pub fn of(&self, exchange: ExchangeKind) -> Vec<(&'static str, Volume)> {
        match exchange {
            ExchangeKind::DispatchCounts => self.counts(),
            ExchangeKind::Dispatch => self.dispatch(),
            ExchangeKind::DispatchWeights => self.weights(false),
            ExchangeKind::Combine => self.combine(),
            ExchangeKind::CombineWeights => self.weights_back(),
            _ => Vec::new(),
        }
    }

    fn counts(&self) -> Vec<(&'static str, Volume)> {
        let group = self.group;
        let width = WORD * Census::width(group, self.census.parts()) as u64;
        let of = |peer: usize| group.slots_of(peer).len() as u64 * width;
        let counts =
            Volume { sent: vec![of(group.me()); group.size()], received: group.peers().map(of).collect() };
        let mut calls = vec![(kind::COUNTS, counts)];
        if group.crosses() && self.rounds.is_none() {
            let mut choices = Volume::none(group.size());
            for part in 0..self.census.parts() {
                let of_part = self.across(part);
                add(&mut choices.sent, &of_part.sent);
                add(&mut choices.received, &of_part.received);
            }
            calls.push((kind::CHOICES, choices.times(WORD * self.top_k)));
        }
        calls
    }

    fn dispatch(&self) -> Vec<(&'static str, Volume)> {
        if let Some(rounds) = &self.rounds {
            return rounds
                .iter()
                .map(|r| (kind::DISPATCH, straight(&r.sent, &r.received).times(self.row_bytes)))
                .collect();
        }
        let rows = |volume: Volume| volume.times(self.row_bytes);
        let part = |part: usize| match self.group.crosses() {
            true => vec![
                (kind::DISPATCH, rows(self.across(part))),
                (kind::DISPATCH_INSIDE, rows(self.inside(part))),
            ],
            false => vec![(kind::DISPATCH, rows(self.inside(part)))],
        };
        (0..self.census.parts()).flat_map(part).collect()
    }

    fn combine(&self) -> Vec<(&'static str, Volume)> {
        if let Some(rounds) = &self.rounds {
            let back = |r: &Round| straight(&r.sent, &r.received).back().times(self.row_bytes);
            return rounds.iter().map(|round| (kind::COMBINE, back(round))).collect();
        }
        let rows = |volume: Volume| volume.times(self.row_bytes);
        let part = |part: usize| match self.group.crosses() {
            true => vec![
                (kind::COMBINE_INSIDE, rows(self.inside(part).back())),
                (kind::COMBINE, rows(self.sums(part))),
            ],
            false => vec![(kind::COMBINE, rows(self.inside(part).back()))],
        };
        (0..self.census.parts()).flat_map(part).collect()
    }

    /// The weights of rows on their way, or their gradients on the way back.
    fn weights(&self, back: bool) -> Vec<(&'static str, Volume)> {
        let call = |sent: &[Vec<Range<usize>>], received: &[Vec<Range<usize>>]| {
            let volume = straight(sent, received).times(WORD);
            (kind::WEIGHTS, if back { volume.back() } else { volume })
        };
        match &self.rounds {
            Some(rounds) => rounds.iter().map(|round| call(&round.sent, &round.received)).collect(),
            None => vec![call(&self.rows.sent, &self.rows.received)],
        }
    }

    /// Gradients of weights. Rounds keep nothing, so that inputs and weights come again before them.
    fn weights_back(&self) -> Vec<(&'static str, Volume)> {
        let mut calls = self.weights(true);
        if self.rounds.is_some() {
            calls.extend(self.dispatch());
            calls.extend(self.weights(false));
        }
        calls
    }

    /// Tokens of a part that cross to carriers on other nodes.
    fn across(&self, part: usize) -> Volume {
        let (group, census) = (self.group, self.census);
        let crossing = |peer: usize, node: usize| {
            group.slots_of(peer).map(|slot| census.crossing(slot, part, node) as u64).sum::<u64>()
        };
        let mut rows = Volume::none(group.size());
        for node in group.others() {
            rows.sent[group.carrier(group.me(), node)] += crossing(group.me(), node);
        }
        for source in self.carried() {
            rows.received[source] += crossing(source, group.here());
        }
        rows
    }

    /// Rows of a part inside the node: own ones, and those that a carrier forwards.
    fn inside(&self, part: usize) -> Volume {
        let (group, census) = (self.group, self.census);
        let carried = group.carried_by(group.me());
        let mut rows = Volume::none(group.size());
        for &peer in &group.nodes[group.here()] {
            for instance in &group.instances[peer] {
                let from = |source: &usize| census.rows_for(group, *source, part, instance) as u64;
                rows.sent[peer] += carried.iter().map(from).sum::<u64>();
            }
        }
        for instance in &group.instances[group.me()] {
            for source in group.peers() {
                let brings = group.carrier(source, group.here());
                rows.received[brings] += census.rows_for(group, source, part, instance) as u64;
            }
        }
        rows
    }

    /// Sums of a part on their way back across nodes; results of rows that stayed in the node go from the rank to itself.
    fn sums(&self, part: usize) -> Volume {
        let (group, census) = (self.group, self.census);
        let of = |peer: usize, node: usize| {
            group.slots_of(peer).map(|slot| census.sums(slot, part, node) as u64).sum::<u64>()
        };
        let near = group.nodes[group.here()].iter().flat_map(|peer| &group.instances[*peer]);
        let own: usize = near.map(|instance| census.rows_for(group, group.me(), part, instance)).sum();
        let mut rows = Volume::none(group.size());
        (rows.sent[group.me()], rows.received[group.me()]) = (own as u64, own as u64);
        for source in self.carried() {
            rows.sent[source] += of(source, group.here());
        }
        for node in group.others() {
            rows.received[group.carrier(group.me(), node)] += of(group.me(), node);
        }
        rows
    }

    /// The ranks of other nodes whose rows this rank brings to its own.
    fn carried(&self) -> impl Iterator<Item = usize> {
        let me = self.group.me();
        self.group.carried_by(me).into_iter().filter(move |source| *source != me)
    }
}

fn add(sums: &mut [u64], more: &[u64]) {
    sums.iter_mut().zip(more).for_each(|(sum, value)| *sum += value);
}

/// Rows that travel straight.
fn straight(sent: &[Vec<Range<usize>>], received: &[Vec<Range<usize>>]) -> Volume {
    let rows = |lists: &[Vec<Range<usize>>]| {
        lists.iter().map(|list| list.iter().map(|range| range.len() as u64).sum()).collect()
    };
    Volume { sent: rows(sent), received: rows(received) }
}
