//! Who exchanges rows with whom: slots, experts and nodes of a dispatch group.

use std::ops::Range;

use unisono_mesh::{ExpertPlacement, Fold, Instance};

/// The ranks that exchange rows in a wave, and the nodes they are on. Peers are ranks of the group.
#[derive(Debug, Clone)]
pub struct DispatchGroup {
    fold: Fold,
    placement: ExpertPlacement,
    first_rank: usize,
    me: usize,
    /// The slots of this rank's wave.
    pub slots: Range<usize>,
    /// The instances of each peer, by (group, expert).
    pub instances: Vec<Vec<Instance>>,
    /// The node of each peer, numbered by first appearance; all are on one for flat dispatch.
    pub node_of: Vec<usize>,
    /// The peers on each node, ascending.
    pub nodes: Vec<Vec<usize>>,
}

impl DispatchGroup {
    /// The group of world rank `rank` while it runs the wave `slots`; `node_of` names the node of a world rank, one for all
    /// if dispatch is flat.
    pub fn new(
        fold: Fold,
        placement: ExpertPlacement,
        rank: usize,
        slots: Range<usize>,
        node_of: impl Fn(usize) -> usize,
    ) -> Self {
        let ranks = fold.dispatch_ranks(rank);
        let mut nodes: Vec<(usize, Vec<usize>)> = Vec::new();
        let mut numbers = Vec::with_capacity(ranks.len());
        for (peer, name) in ranks.clone().map(node_of).enumerate() {
            let node = nodes.iter().position(|(known, _)| *known == name).unwrap_or_else(|| {
                nodes.push((name, Vec::new()));
                nodes.len() - 1
            });
            nodes[node].1.push(peer);
            numbers.push(node);
        }
        let nodes = nodes.into_iter().map(|(_, members)| members).collect();
        let (first_rank, me) = (ranks.start, rank - ranks.start);
        let mut group =
            Self { fold, placement, first_rank, me, slots, instances: Vec::new(), node_of: numbers, nodes };
        group.instances = group.peers().map(|peer| group.placement.instances(group.slots_of(peer))).collect();
        group
    }

    /// This rank.
    pub fn me(&self) -> usize {
        self.me
    }

    /// How many ranks the group has.
    pub fn size(&self) -> usize {
        self.node_of.len()
    }

    /// All ranks of the group.
    pub fn peers(&self) -> Range<usize> {
        0..self.size()
    }

    /// This rank's node.
    pub fn here(&self) -> usize {
        self.node_of[self.me]
    }

    /// Whether rows cross between nodes on a way of their own.
    pub fn crosses(&self) -> bool {
        self.nodes.len() > 1
    }

    /// Routed experts.
    pub fn experts(&self) -> usize {
        self.placement.num_experts()
    }

    /// Experts of an expert node.
    fn node_size(&self) -> usize {
        self.experts() / self.fold.grid().expert_nodes
    }

    /// The slots that `peer` brings to the wave.
    pub fn slots_of(&self, peer: usize) -> Range<usize> {
        if self.size() == 1 { self.slots.clone() } else { self.fold.slots_of(self.first_rank + peer) }
    }

    /// The slots of `peer` that belong to `group`.
    pub fn slots_in(&self, peer: usize, group: usize) -> Range<usize> {
        let (slots, width) = (self.slots_of(peer), self.fold.grid().expert_group);
        let start = slots.start.max(group * width);
        start..slots.end.min((group + 1) * width).max(start)
    }

    /// The peer that runs `expert` for tokens of `slot`.
    pub fn owner(&self, slot: usize, expert: usize) -> usize {
        self.placement.rank_for(slot, expert) - self.first_rank
    }

    /// The expert group of `slot`.
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

    /// The nodes besides this rank's.
    pub fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let here = self.here();
        (0..self.nodes.len()).filter(move |node| *node != here)
    }

    /// Calls `each` with every node that a token of `slot` with the choices `experts` goes to besides this rank's,
    /// ascending.
    pub fn far_nodes(&self, slot: usize, experts: &[u32], each: impl FnMut(usize)) {
        let goes_to = |node: &usize| {
            experts.iter().any(|expert| self.node_of[self.owner(slot, *expert as usize)] == *node)
        };
        self.others().filter(goes_to).for_each(each);
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
