//! Seconds that exchanges of the engine spend between hosts.

use std::collections::HashMap;

use super::EngineLayout;
use super::calls::FixedCalls;
use super::hosts::HostCluster;
use crate::dispatch::{Census, LayerCalls, Volume};
use crate::hardware::Level;
use crate::schedule::ExchangeKind;

/// What travels with a call's header.
const INLINE_BYTES: u64 = 1536;

/// What a call of all ranks puts on the links of hosts.
struct Load {
    /// `[host][level]` bytes that leave a host through a level, and that arrive.
    bytes: Vec<Vec<[u64; 2]>>,
    /// The farthest level between two ranks that call each other.
    farthest: Option<usize>,
    /// The most bytes that one rank sends another one on another host.
    largest: u64,
}

impl Load {
    fn none(cluster: &HostCluster, hosts: usize) -> Self {
        Self { bytes: vec![vec![[0, 0]; cluster.levels.len()]; hosts], farthest: None, largest: 0 }
    }

    /// Adds what `rank` does; `first` is the first rank of its group.
    fn add(&mut self, cluster: &HostCluster, node_of: &[usize], rank: usize, first: usize, volume: &Volume) {
        let here = node_of[rank];
        for (peer, (sent, received)) in volume.sent.iter().zip(&volume.received).enumerate() {
            let there = node_of[first + peer];
            if there == here {
                continue;
            }
            let level = cluster.level_between(here, there);
            self.farthest = self.farthest.max(Some(level));
            self.largest = self.largest.max(*sent);
            for [out, into] in &mut self.bytes[here][..=level] {
                *out += sent;
                *into += received;
            }
        }
    }

    /// The busiest link decides; the first byte comes after the latency, and what does not travel with the header once more.
    fn seconds(&self, levels: &[Level]) -> f64 {
        let Some(farthest) = self.farthest else { return 0.0 };
        let times = self.bytes.iter().flat_map(|host| {
            host.iter()
                .zip(levels)
                .map(|([out, into], level)| *out.max(into) as f64 / level.shared_bytes_per_s())
        });
        let messages = if self.largest > INLINE_BYTES { 2.0 } else { 1.0 };
        messages * levels[farthest].latency_s + times.fold(0.0, f64::max)
    }
}

/// A layout on hosts: what its exchanges take between them, with balanced routing. A host's ranks share its links; so do the
/// dispatch groups, which exchange at the same time.
pub(super) struct Network<'a> {
    cluster: &'a HostCluster,
    layout: &'a EngineLayout,
    fixed: FixedCalls<'a>,
    hosts: usize,
    /// Dispatch and what belongs to it, by kind: every layer's are alike.
    of_layer: Vec<(ExchangeKind, f64)>,
    /// Others, by kind and unit, as far as they were asked for.
    of_unit: HashMap<(ExchangeKind, usize), f64>,
}

impl<'a> Network<'a> {
    /// `slot_rows` are the tokens of a slot in one turn.
    pub fn new(cluster: &'a HostCluster, layout: &'a EngineLayout, slot_rows: usize) -> Self {
        let hosts = layout.node_of.iter().max().map_or(0, |last| last + 1);
        let fixed = FixedCalls::new(layout, 0);
        let mut network =
            Self { cluster, layout, fixed, hosts, of_layer: Vec::new(), of_unit: HashMap::new() };
        network.of_layer = network.layer_seconds(slot_rows);
        network
    }

    /// Seconds of an exchange; `unit` is that of parameters or gradients.
    pub fn seconds(&mut self, exchange: ExchangeKind, unit: usize) -> f64 {
        if let Some((_, seconds)) = self.of_layer.iter().find(|(kind, _)| *kind == exchange) {
            return *seconds;
        }
        if let Some(seconds) = self.of_unit.get(&(exchange, unit)) {
            return *seconds;
        }
        let mut calls: Vec<Load> = Vec::new();
        for rank in 0..self.layout.fold.ranks() {
            self.fixed.turn_to(rank);
            for (index, (_, volume)) in self.fixed.of(exchange, unit).iter().enumerate() {
                self.add(&mut calls, index, rank, 0, volume);
            }
        }
        let seconds = self.sum(&calls);
        self.of_unit.insert((exchange, unit), seconds);
        seconds
    }

    fn add(&self, calls: &mut Vec<Load>, index: usize, rank: usize, first: usize, volume: &Volume) {
        while calls.len() <= index {
            calls.push(Load::none(self.cluster, self.hosts));
        }
        calls[index].add(self.cluster, &self.layout.node_of, rank, first, volume);
    }

    fn sum(&self, calls: &[Load]) -> f64 {
        calls.iter().map(|call| call.seconds(&self.cluster.levels)).sum()
    }

    fn layer_seconds(&self, slot_rows: usize) -> Vec<(ExchangeKind, f64)> {
        const KINDS: [ExchangeKind; 5] = [
            ExchangeKind::DispatchCounts,
            ExchangeKind::Dispatch,
            ExchangeKind::DispatchWeights,
            ExchangeKind::Combine,
            ExchangeKind::CombineWeights,
        ];
        let EngineLayout { model, fold, dispatch, .. } = self.layout;
        let mut calls: [Vec<Load>; KINDS.len()] = Default::default();
        let mut counted: Option<(usize, Census)> = None;
        for rank in 0..if model.num_experts > 0 { fold.ranks() } else { 0 } {
            let ranks = fold.dispatch_ranks(rank);
            let first = ranks.start;
            if ranks.into_iter().all(|peer| self.layout.node_of[peer] == self.layout.node_of[rank]) {
                continue;
            }
            let group = self.layout.dispatch_groups(rank).swap_remove(0);
            // The ranks of a group count the same.
            if counted.as_ref().is_none_or(|(of, _)| *of != first) {
                counted = Some((first, Census::balanced(&group, dispatch.chunks, slot_rows, model.top_k)));
            }
            let Some((_, census)) = &counted else { continue };
            let layer = LayerCalls::new(&group, census, dispatch, model.hidden_size, model.top_k);
            for (kind, calls) in KINDS.iter().zip(&mut calls) {
                for (index, (_, volume)) in layer.of(*kind).iter().enumerate() {
                    self.add(calls, index, rank, first, volume);
                }
            }
        }
        KINDS.into_iter().zip(&calls).map(|(kind, calls)| (kind, self.sum(calls))).collect()
    }
}
