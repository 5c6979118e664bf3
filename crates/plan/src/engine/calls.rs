//! The calls whose bytes the layout alone decides.

use unisono_mesh::gathering::Gathering;
use unisono_mesh::reduction::{Reduction, Source};
use unisono_mesh::{ExpertPlacement, tree};

use super::EngineLayout;
use crate::dispatch::Volume;
use crate::layout::Layout;
use crate::schedule::ExchangeKind;
use crate::shards::{ShardedSegment, Shards};

/// Names that `comm` gives its calls.
mod kind {
    pub const ALL_GATHER: &str = "all_gather";
    pub const ALL_REDUCE: &str = "all_reduce";
    pub const GATHER_IN_NODE: &str = "gather_in_node";
    pub const REDUCE_IN_NODE: &str = "reduce_in_node";
    pub const REDUCE_SCATTER: &str = "reduce_scatter";
    pub const VALUES: &str = "all_gather_values";
}

/// Bytes of a parameter or gradient element.
const ELEMENT: u64 = 4;
/// Bytes of a count or a sum.
const NUMBER: u64 = 8;
/// Sums that a slot's losses are made of.
const SLOT_SUMS: u64 = 6;
/// What a rank tells of a step's time: its share in communication, and bytes.
const TIME_VALUES: u64 = 2;

/// The calls of one rank on all ranks' group, the same in every step.
pub(super) struct FixedCalls<'a> {
    layout: &'a EngineLayout,
    shards: Shards,
    rank: usize,
}

/// A part of the way of a unit's parameters or gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hop {
    InsideNodes,
    /// Where nodes make no difference, all the way of gradients.
    BetweenNodes,
    /// Partial sums that a rank, sender and receiver in one, joins for other nodes.
    Joined,
}

impl<'a> FixedCalls<'a> {
    pub fn new(layout: &'a EngineLayout, rank: usize) -> Self {
        let placement = ExpertPlacement::new(layout.fold, layout.model.num_experts);
        let shards = Shards::new(&Layout::new(&layout.model), &placement, &layout.fold);
        Self { layout, shards, rank }
    }

    /// Asks for another rank's from now on.
    pub fn turn_to(&mut self, rank: usize) {
        self.rank = rank;
    }

    /// The calls of an exchange; `unit` is that of parameters or gradients.
    pub fn of(&self, exchange: ExchangeKind, unit: usize) -> Vec<(&'static str, Volume)> {
        let fold = &self.layout.fold;
        match exchange {
            ExchangeKind::Targets => vec![self.all_reduce(1)],
            ExchangeKind::Losses => {
                let slots = fold.slots_per_rank() as u64;
                let model = &self.layout.model;
                let mut calls = self.values(|_| SLOT_SUMS * slots);
                calls.push(self.all_reduce((model.moe_layers() * model.num_experts) as u64));
                calls
            }
            ExchangeKind::GradientNorm => self.values(|rank| self.norm_roots(rank)),
            ExchangeKind::Times => self.values(|_| TIME_VALUES),
            ExchangeKind::GatherParameters => self.gather(unit),
            ExchangeKind::ReduceGradients => self.reduce(unit),
            _ => Vec::new(),
        }
    }

    /// The cut of the model over the ranks.
    pub fn shards(&self) -> &Shards {
        &self.shards
    }

    /// Elements that each rank passes on inside its node while a unit is gathered.
    pub fn gather_staging(&self, unit: usize) -> Vec<usize> {
        let mut staged = vec![0; self.ranks()];
        self.each_gathered(unit, |hop, _, to, bytes| {
            if hop == Hop::BetweenNodes {
                staged[to] += (bytes / ELEMENT) as usize;
            }
        });
        staged
    }

    /// Elements that each rank joins for other nodes while a unit's gradients are reduced.
    pub fn reduce_staging(&self, unit: usize) -> Vec<usize> {
        let mut staged = vec![0; self.ranks()];
        self.each_reduced(unit, |hop, _, to, bytes| {
            if hop == Hop::Joined {
                staged[to] += (bytes / ELEMENT) as usize;
            }
        });
        staged
    }

    fn ranks(&self) -> usize {
        self.layout.fold.ranks()
    }

    /// `count` numbers from every rank to every rank.
    fn all_reduce(&self, count: u64) -> (&'static str, Volume) {
        let each = vec![count * NUMBER; self.ranks()];
        (kind::ALL_REDUCE, Volume { sent: each.clone(), received: each })
    }

    /// `count(rank)` numbers from every rank to every rank, after how many there are.
    fn values(&self, count: impl Fn(usize) -> u64) -> Vec<(&'static str, Volume)> {
        let of = |count: &dyn Fn(usize) -> u64| Volume {
            sent: vec![count(self.rank) * NUMBER; self.ranks()],
            received: (0..self.ranks()).map(|rank| count(rank) * NUMBER).collect(),
        };
        vec![(kind::VALUES, of(&|_| 1)), (kind::VALUES, of(&count))]
    }

    /// Partial sums of the gradient norm that a rank brings.
    fn norm_roots(&self, rank: usize) -> u64 {
        let chunks = self.shards.chunks();
        let ranges = self.shards.owned_chunks(rank).into_iter();
        ranges.map(|range| tree::roots(range, chunks).len() as u64).sum()
    }

    /// A unit's parameters from their owners to those that compute with them, to each node once where that saves copies.
    fn gather(&self, unit: usize) -> Vec<(&'static str, Volume)> {
        let (mut across, mut inside) = (Volume::none(self.ranks()), Volume::none(self.ranks()));
        let crosses = self.each_gathered(unit, |hop, from, to, bytes| match hop {
            Hop::BetweenNodes => self.add(&mut across, from, to, bytes),
            _ => self.add(&mut inside, from, to, bytes),
        });
        match crosses {
            true => vec![(kind::ALL_GATHER, across), (kind::GATHER_IN_NODE, inside)],
            false => vec![(kind::ALL_GATHER, inside)],
        }
    }

    /// Calls `with` with every `(hop, from, to, bytes)` of a unit's parameters; whether they cross to each node once.
    fn each_gathered(&self, unit: usize, mut with: impl FnMut(Hop, usize, usize, u64)) -> bool {
        let flat = vec![0; self.ranks()];
        let in_shards = self.layout.step.zero >= 3;
        let moves = |segment: &&ShardedSegment| in_shards || segment.is_shared();
        let segments: Vec<&ShardedSegment> = self.shards.of_unit(unit).iter().filter(moves).collect();
        let owners = |segment: &ShardedSegment| {
            let shards = segment.shards.clone();
            (0..self.ranks()).filter(move |&owner| !shards[owner].is_empty())
        };
        let node_of = &self.layout.node_of;
        let saves = |segment: &&ShardedSegment| {
            Gathering::new(node_of, |rank| segment.is_held(rank)).saves(owners(segment))
        };
        let crosses = self.layout.hierarchical_gather && segments.iter().any(saves);
        let node_of = if crosses { node_of } else { &flat };
        for segment in segments {
            let ways = Gathering::new(node_of, |rank| segment.is_held(rank));
            for owner in owners(segment) {
                let bytes = segment.shards[owner].len() as u64 * ELEMENT;
                // Whole units keep a rank's own shards where they are.
                for &receiver in ways.near(owner).iter().filter(|&&receiver| in_shards || receiver != owner) {
                    with(Hop::InsideNodes, owner, receiver, bytes);
                }
                for (relay, receivers) in ways.far(owner) {
                    with(Hop::BetweenNodes, owner, relay, bytes);
                    receivers.iter().for_each(|&receiver| with(Hop::InsideNodes, relay, receiver, bytes));
                }
            }
        }
        crosses
    }

    /// A unit's gradients to the owners of their shards, inside nodes first where that saves roots.
    fn reduce(&self, unit: usize) -> Vec<(&'static str, Volume)> {
        let (mut inner, mut outer) = (Volume::none(self.ranks()), Volume::none(self.ranks()));
        let joins = self.each_reduced(unit, |hop, from, to, bytes| match hop {
            Hop::InsideNodes => self.add(&mut inner, from, to, bytes),
            Hop::BetweenNodes => self.add(&mut outer, from, to, bytes),
            Hop::Joined => {}
        });
        let inner = joins.then_some((kind::REDUCE_IN_NODE, inner));
        inner.into_iter().chain([(kind::REDUCE_SCATTER, outer)]).collect()
    }

    /// Calls `with` with every `(hop, from, to, bytes)` of a unit's gradients; whether some are joined inside nodes.
    fn each_reduced(&self, unit: usize, mut with: impl FnMut(Hop, usize, usize, u64)) -> bool {
        let flat = vec![0; self.ranks()];
        let node_of = if self.layout.hierarchical_reduce { &self.layout.node_of } else { &flat };
        let mut joins = false;
        for segment in self.shards.of_unit(unit) {
            let reduction = Reduction::new(segment.items, &segment.held, node_of);
            let reduction = reduction.expect("a fold's ranks hold every slot and every group once");
            joins |= reduction.joins();
            for (to, shard) in segment.shards.iter().enumerate().filter(|(_, shard)| !shard.is_empty()) {
                let bytes = shard.len() as u64 * ELEMENT;
                for source in &reduction.views[node_of[to]].sources {
                    let from = match *source {
                        Source::Root { rank, .. } => rank,
                        Source::Joined { node, index } => {
                            let root = &reduction.nodes[node][index];
                            let relay = root.relay(to, node_of);
                            with(Hop::Joined, relay, relay, bytes);
                            root.sources
                                .iter()
                                .for_each(|(rank, _)| with(Hop::InsideNodes, *rank, relay, bytes));
                            relay
                        }
                    };
                    with(Hop::BetweenNodes, from, to, bytes);
                }
            }
        }
        joins
    }

    fn add(&self, volume: &mut Volume, from: usize, to: usize, bytes: u64) {
        if from == self.rank {
            volume.sent[to] += bytes;
        }
        if to == self.rank {
            volume.received[from] += bytes;
        }
    }
}
