//! Who exchanges rows with whom: slots, experts, nodes, and how many rows lie between them.

use std::ops::Range;
use std::sync::Arc;

use unisono_comm::{CommError, Communicator, Part};
use unisono_mesh::{ExpertPlacement, Fold, Instance};
use unisono_tensor::{Routing, Wire};

use super::kind;
use crate::batch::Batch;

/// How rows move between tokens and experts. Nothing but `wire` ever changes a bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DispatchOptions {
    /// A row crosses to a node once, is forwarded inside it, and its results are summed there.
    pub hierarchical: bool,
    /// Into how many exchanges the tokens of a wave are cut, so that they overlap with the experts' products.
    pub chunks: usize,
    /// The most rows of other tokens that a rank holds at once in a layer; 0 for no bound.
    pub rows: usize,
    /// Whether exchanges are under way while others compute; otherwise each is waited for.
    pub overlap: bool,
    /// What a row is rounded to.
    pub wire: Wire,
}

impl Default for DispatchOptions {
    fn default() -> Self {
        Self { hierarchical: false, chunks: 1, rows: 0, overlap: true, wire: Wire::F32 }
    }
}

/// The ranks that exchange rows in a wave, and the nodes they are on.
pub(crate) struct DispatchGroup<'a> {
    pub comm: &'a Communicator,
    fold: Fold,
    placement: ExpertPlacement,
    /// The slots of this rank's wave.
    pub slots: Range<usize>,
    pub options: DispatchOptions,
    /// The instances of each peer, by (group, expert).
    pub instances: Vec<Vec<Instance>>,
    /// The node of each peer, numbered by first appearance; all are on one for flat dispatch.
    pub node_of: Vec<usize>,
    /// The peers on each node, ascending.
    pub nodes: Vec<Vec<usize>>,
}

impl<'a> DispatchGroup<'a> {
    pub fn new(
        comm: &'a Communicator,
        fold: Fold,
        placement: ExpertPlacement,
        slots: Range<usize>,
        options: DispatchOptions,
    ) -> Self {
        let mut nodes: Vec<(usize, Vec<usize>)> = Vec::new();
        let mut node_of = Vec::with_capacity(comm.size());
        for peer in 0..comm.size() {
            let name = if options.hierarchical { comm.node(peer) } else { 0 };
            let node = nodes.iter().position(|(known, _)| *known == name).unwrap_or_else(|| {
                nodes.push((name, Vec::new()));
                nodes.len() - 1
            });
            nodes[node].1.push(peer);
            node_of.push(node);
        }
        let nodes = nodes.into_iter().map(|(_, members)| members).collect();
        let mut group = Self { comm, fold, placement, slots, options, instances: Vec::new(), node_of, nodes };
        group.instances =
            (0..comm.size()).map(|peer| group.placement.instances(group.slots_of(peer))).collect();
        group
    }

    pub fn me(&self) -> usize {
        self.comm.rank()
    }

    pub fn peers(&self) -> Range<usize> {
        0..self.comm.size()
    }

    /// This rank's node.
    pub fn here(&self) -> usize {
        self.node_of[self.me()]
    }

    pub fn experts(&self) -> usize {
        self.placement.num_experts()
    }

    /// Experts of an expert node.
    pub fn node_size(&self) -> usize {
        self.experts() / self.fold.grid().expert_nodes
    }

    /// The slots that group member `peer` brings to the wave.
    pub fn slots_of(&self, peer: usize) -> Range<usize> {
        if self.comm.size() == 1 {
            self.slots.clone()
        } else {
            self.fold.slots_of(self.comm.world_rank(peer))
        }
    }

    /// The slots of `peer` that belong to `group`.
    pub fn slots_in(&self, peer: usize, group: usize) -> Range<usize> {
        let (slots, width) = (self.slots_of(peer), self.fold.grid().expert_group);
        let start = slots.start.max(group * width);
        start..slots.end.min((group + 1) * width).max(start)
    }

    /// The peer that runs `expert` for tokens of `slot`.
    pub fn owner(&self, slot: usize, expert: usize) -> usize {
        self.placement.rank_for(slot, expert) - self.comm.world_rank(0)
    }

    pub fn group_of(&self, slot: usize) -> usize {
        slot / self.fold.grid().expert_group
    }

    /// Who brings rows of `source` to the ranks of `node`: the source itself on its own node, elsewhere a rank there.
    /// Sources of one node are spread over the ranks of the other.
    pub fn carrier(&self, source: usize, node: usize) -> usize {
        if self.node_of[source] == node {
            return source;
        }
        let place = self.nodes[self.node_of[source]].iter().position(|peer| *peer == source).unwrap_or(0);
        self.nodes[node][place % self.nodes[node].len()]
    }

    /// The sources whose rows `carrier` brings to the ranks of its node, ascending.
    pub fn carried_by(&self, carrier: usize) -> Vec<usize> {
        let node = self.node_of[carrier];
        self.peers().filter(|source| self.carrier(*source, node) == carrier).collect()
    }

    /// Calls `each` with every node that `token`'s choices `experts` go to besides this one's, ascending.
    pub fn far_nodes(&self, slot: usize, experts: &[u32], mut each: impl FnMut(usize)) {
        for node in (0..self.nodes.len()).filter(|node| *node != self.here()) {
            if experts.iter().any(|expert| self.node_of[self.owner(slot, *expert as usize)] == node) {
                each(node);
            }
        }
    }

    /// Calls `each` with the choices behind every row that comes back from `node` to a token of `slot` with the choices
    /// `experts`: all choices of an expert node if all of them are on `node`, so that the sum made there is the expert
    /// node's whole sum; otherwise one choice a row.
    pub fn addends(&self, slot: usize, experts: &[u32], node: usize, mut each: impl FnMut(Range<usize>)) {
        let mut start = 0;
        let is_there = |choice: usize| self.node_of[self.owner(slot, experts[choice] as usize)] == node;
        while start < experts.len() {
            let of = |choice: usize| experts[choice] as usize / self.node_size();
            let end = (start..experts.len()).find(|choice| of(*choice) != of(start)).unwrap_or(experts.len());
            if (start..end).all(is_there) {
                each(start..end);
            } else {
                (start..end).filter(|choice| is_there(*choice)).for_each(|choice| each(choice..choice + 1));
            }
            start = end;
        }
    }
}

/// How many rows every slot of the group has for whom, by part: a slot's tokens are cut into equal parts, one a chunk.
#[derive(Debug, Clone)]
pub(crate) struct Census {
    first_slot: usize,
    parts: usize,
    experts: usize,
    nodes: usize,
    /// `[slot][part][experts, then nodes]`
    counts: Vec<u32>,
}

/// The part that token `token` of a slot's `tokens` is in, of `parts`.
pub(crate) fn part_of(token: usize, tokens: usize, parts: usize) -> usize {
    ((token + 1) * parts - 1) / tokens
}

impl Census {
    /// Counts this rank's rows and gathers everybody's.
    ///
    /// # Errors
    /// If the exchange fails.
    pub fn take(
        group: &DispatchGroup<'_>,
        routing: &Routing,
        batch: &Batch,
        top_k: usize,
    ) -> Result<Self, CommError> {
        let (parts, experts) = (group.options.chunks, group.experts());
        let nodes = if group.nodes.len() > 1 { group.nodes.len() } else { 0 };
        let width = parts * (experts + nodes);
        let mut own = vec![0u32; group.slots.len() * width];
        for (row, chosen) in routing.experts.chunks_exact(top_k).enumerate() {
            let (index, token) = (row / batch.slot_rows(), row % batch.slot_rows());
            let at = index * width + part_of(token, batch.slot_rows(), parts) * (experts + nodes);
            chosen.iter().for_each(|expert| own[at + *expert as usize] += 1);
            group.far_nodes(group.slots.start + index, chosen, |node| own[at + experts + node] += 1);
        }
        let first_slot = group.slots_of(0).start;
        let range = |peer: usize| {
            let slots = group.slots_of(peer);
            (slots.start - first_slot) * width..(slots.end - first_slot) * width
        };
        let ranges: Vec<Vec<Range<usize>>> = group.peers().map(|peer| vec![range(peer)]).collect();
        let total = ranges.last().map_or(0, |list| list[0].end);
        let sends = vec![vec![Part::whole(Arc::new(own))]; group.comm.size()];
        let counts = group.comm.exchange(kind::COUNTS, sends, vec![0u32; total], ranges)?;
        Ok(Self { first_slot, parts, experts, nodes, counts })
    }

    fn at(&self, slot: usize, part: usize, column: usize) -> usize {
        let row = (slot - self.first_slot) * self.parts + part;
        self.counts[row * (self.experts + self.nodes) + column] as usize
    }

    /// Rows of `slot` for `expert` in one part.
    pub fn rows_in(&self, slot: usize, part: usize, expert: usize) -> usize {
        self.at(slot, part, expert)
    }

    /// Rows of `slot` for `expert`.
    pub fn rows(&self, slot: usize, expert: usize) -> usize {
        (0..self.parts).map(|part| self.at(slot, part, expert)).sum()
    }

    /// Tokens of `slot` in one part that cross to `node`.
    pub fn crossing(&self, slot: usize, part: usize, node: usize) -> usize {
        if self.nodes == 0 { 0 } else { self.at(slot, part, self.experts + node) }
    }
}
