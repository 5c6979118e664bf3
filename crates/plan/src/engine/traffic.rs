//! The traffic of a run, call by call, as the engine's ledger counts it: from the layout and the run's routing counts.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use unisono_mesh::LinkClass;

use super::EngineLayout;
use super::calls::FixedCalls;
use crate::dispatch::{Census, DispatchGroup, LayerCalls, Volume, fits, received_rows};
use crate::layout::Layout;
use crate::schedule::{Exchange, ExchangeKind, Op};

/// What one kind of call on one group moves over one class of links.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallTraffic {
    /// The kind of call.
    pub kind: String,
    /// The group's name.
    pub group: String,
    /// The class of links.
    pub link: LinkClass,
    /// Calls that move bytes over this class. A call always counts in the farthest class of its group.
    pub calls: u64,
    /// Bytes sent.
    pub bytes_sent: u64,
    /// Bytes received.
    pub bytes_received: u64,
}

/// Traffic by kind of call, group and class of links.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Traffic(BTreeMap<(&'static str, &'static str, LinkClass), Tally>);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Tally {
    calls: u64,
    sent: u64,
    received: u64,
}

impl Traffic {
    /// By kind, group and link class, in that order.
    pub fn rows(&self) -> Vec<CallTraffic> {
        let row =
            |((kind, group, link), tally): (&(&'static str, &'static str, LinkClass), &Tally)| CallTraffic {
                kind: (*kind).into(),
                group: (*group).into(),
                link: *link,
                calls: tally.calls,
                bytes_sent: tally.sent,
                bytes_received: tally.received,
            };
        self.0.iter().map(row).collect()
    }

    fn add(&mut self, kind: &'static str, group: &Links, volume: &Volume) {
        for class in LinkClass::ALL {
            let bytes = |bytes: &[u64]| {
                let over = group.links.iter().zip(bytes).filter(|(link, _)| **link == class);
                over.map(|(_, bytes)| bytes).sum::<u64>()
            };
            let (sent, received) = (bytes(&volume.sent), bytes(&volume.received));
            if class != group.farthest && sent == 0 && received == 0 {
                continue;
            }
            let tally = self.0.entry((kind, group.name, class)).or_default();
            tally.calls += 1;
            tally.sent += sent;
            tally.received += received;
        }
    }

    fn add_all(&mut self, group: &Links, calls: &[(&'static str, Volume)]) {
        calls.iter().for_each(|(kind, volume)| self.add(kind, group, volume));
    }
}

/// What lies between a rank and the members of a group.
#[derive(Debug, Clone)]
struct Links {
    name: &'static str,
    links: Vec<LinkClass>,
    farthest: LinkClass,
}

impl Links {
    fn new(name: &'static str, rank: usize, members: Range<usize>, node_of: &[usize]) -> Self {
        let links: Vec<LinkClass> = members.map(|member| LinkClass::between(rank, member, node_of)).collect();
        let farthest = links.iter().copied().max().unwrap_or(LinkClass::SameRank);
        Self { name, links, farthest }
    }
}

/// One rank's traffic, a step at a time.
#[derive(Debug, Clone)]
pub struct TrafficPlan {
    layout: EngineLayout,
    exchanges: Vec<Exchange>,
    first_moe_layer: usize,
    groups: Vec<DispatchGroup>,
    experts: Links,
    /// What every step moves, and what it moves only if it updates parameters.
    every_step: Traffic,
    every_update: Traffic,
}

impl TrafficPlan {
    /// The traffic of `rank`.
    pub fn new(layout: EngineLayout, rank: usize) -> Self {
        let (fold, node_of) = (&layout.fold, &layout.node_of);
        let world = Links::new("world", rank, 0..fold.ranks(), node_of);
        let experts = Links::new("experts", rank, fold.dispatch_ranks(rank), node_of);
        let schedule = layout.step.schedule(&layout.model);
        let started = schedule.ranks.iter().flatten().filter_map(|op| match op {
            Op::Start(exchange) => Some(*exchange),
            _ => None,
        });
        let (exchanges, fixed): (Vec<_>, Vec<_>) = started.partition(|exchange| is_of_layer(exchange.kind));
        let calls = FixedCalls::new(&layout, rank);
        let (mut every_step, mut every_update) = (Traffic::default(), Traffic::default());
        for Exchange { kind, site } in fixed {
            let gathers_whole = kind == ExchangeKind::GatherParameters && layout.step.zero < 3;
            let traffic = if gathers_whole { &mut every_update } else { &mut every_step };
            traffic.add_all(&world, &calls.of(kind, usize::from(site.layer)));
        }
        let first_moe_layer = Layout::new(&layout.model).moe_layers().start;
        let groups = layout.dispatch_groups(rank);
        Self { exchanges, first_moe_layer, groups, experts, every_step, every_update, layout }
    }

    /// Adds a step to `traffic`: `routing[pass][MoE layer]` counts its rows, passes in the order of the schedule; `updates`
    /// unless its update was skipped.
    ///
    /// # Panics
    /// If there are not counts for every pass and MoE layer.
    pub fn step(&self, routing: &[Vec<Census>], updates: bool, traffic: &mut Traffic) {
        merge(traffic, &self.every_step);
        if updates {
            merge(traffic, &self.every_update);
        }
        let step = &self.layout.step;
        let layers = |(pass, layers)| self.layer_calls(step.wave_of(pass), layers);
        let calls: Vec<_> = routing.iter().map(Vec::as_slice).enumerate().map(layers).collect();
        for Exchange { kind, site } in &self.exchanges {
            let of_layer = &calls[step.pass_at(*site)][usize::from(site.layer) - self.first_moe_layer];
            traffic.add_all(&self.experts, &of_layer.of(*kind));
        }
    }

    /// Rows that this rank's experts receive in pass `pass`, by MoE layer, of which `layers` counts the rows; none where they
    /// come in rounds.
    pub fn received(&self, pass: usize, layers: &[Census]) -> Vec<Option<usize>> {
        let (group, shape) = (&self.groups[self.layout.step.wave_of(pass)], &self.layout.dispatch);
        let rows =
            |census: &Census| fits(group, census, shape).then(|| received_rows(group, census, group.me()));
        layers.iter().map(rows).collect()
    }

    /// The calls of every MoE layer in one pass of `wave`.
    fn layer_calls<'a>(&'a self, wave: usize, layers: &'a [Census]) -> Vec<LayerCalls<'a>> {
        let EngineLayout { model, dispatch, .. } = &self.layout;
        let calls =
            |census| LayerCalls::new(&self.groups[wave], census, dispatch, model.hidden_size, model.top_k);
        layers.iter().map(calls).collect()
    }
}

fn merge(traffic: &mut Traffic, more: &Traffic) {
    for (key, tally) in &more.0 {
        let sum = traffic.0.entry(*key).or_default();
        sum.calls += tally.calls;
        sum.sent += tally.sent;
        sum.received += tally.received;
    }
}

/// Whether routing decides what an exchange moves.
fn is_of_layer(kind: ExchangeKind) -> bool {
    matches!(
        kind,
        ExchangeKind::DispatchCounts
            | ExchangeKind::Dispatch
            | ExchangeKind::DispatchWeights
            | ExchangeKind::Combine
            | ExchangeKind::CombineWeights
    )
}
