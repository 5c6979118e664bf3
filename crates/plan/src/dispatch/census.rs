//! How many rows there are for whom: the routing counts of one MoE layer in one pass.

use unisono_mesh::Instance;

use super::group::DispatchGroup;

/// How many rows every slot of a group has for whom, by part: a slot's tokens are cut into equal parts, one a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Census {
    first_slot: usize,
    parts: usize,
    experts: usize,
    /// 0 where nothing crosses.
    nodes: usize,
    /// `[slot][part][experts, then nodes]`
    counts: Vec<u32>,
    /// `[slot][part][node]`
    sums: Vec<u32>,
}

/// The part that token `token` of a slot's `tokens` is in, of `parts`.
pub fn part_of(token: usize, tokens: usize, parts: usize) -> usize {
    ((token + 1) * parts - 1) / tokens
}

impl Census {
    /// A census of the group's slots, all of them counted as [`Census::count`] does, one after the other.
    pub fn new(group: &DispatchGroup, parts: usize, counts: Vec<u32>) -> Self {
        let nodes = counted_nodes(group);
        let sums = vec![0; counts.len() / Self::width(group, parts).max(1) * parts * nodes];
        let first_slot = group.slots_of(0).start;
        Self { first_slot, parts, experts: group.experts(), nodes, counts, sums }
    }

    /// What round-robin routing gives: token t of a slot chooses experts `top_k * t ..`.
    pub fn balanced(group: &DispatchGroup, parts: usize, slot_rows: usize, top_k: usize) -> Self {
        let (experts, nodes) = (group.experts(), counted_nodes(group));
        let slots = group.peers().map(|peer| group.slots_of(peer).len()).sum::<usize>();
        let mut census = Self::new(group, parts, vec![0; slots * Self::width(group, parts)]);
        let mut chosen: Vec<u32> = Vec::with_capacity(top_k);
        for (peer, slot) in group.peers().flat_map(|peer| group.slots_of(peer).map(move |slot| (peer, slot)))
        {
            for token in 0..if experts == 0 { 0 } else { slot_rows } {
                let row = (slot - census.first_slot) * parts + part_of(token, slot_rows, parts);
                chosen.clear();
                chosen.extend((token * top_k..(token + 1) * top_k).map(|choice| (choice % experts) as u32));
                chosen.sort_unstable();
                let at = row * (experts + nodes);
                chosen.iter().for_each(|expert| census.counts[at + *expert as usize] += 1);
                for node in (0..nodes).filter(|node| *node != group.node_of[peer]) {
                    let mut sums = 0;
                    group.addends(slot, &chosen, node, |_| sums += 1);
                    census.counts[at + experts + node] += u32::from(sums > 0);
                    census.sums[row * nodes + node] += sums;
                }
            }
        }
        census
    }

    /// Counts that a slot has.
    pub fn width(group: &DispatchGroup, parts: usize) -> usize {
        parts * (group.experts() + counted_nodes(group))
    }

    /// Counts of this rank's slots: `[slot][part]` rows for each expert and, where rows cross, tokens that cross to each
    /// node. `choices` are `[slots * slot_rows, top_k]`.
    pub fn count(
        group: &DispatchGroup,
        parts: usize,
        choices: &[u32],
        slot_rows: usize,
        top_k: usize,
    ) -> Vec<u32> {
        let (experts, nodes) = (group.experts(), counted_nodes(group));
        let width = Self::width(group, parts);
        let mut own = vec![0u32; group.slots.len() * width];
        for (row, chosen) in choices.chunks_exact(top_k).enumerate() {
            let (index, token) = (row / slot_rows, row % slot_rows);
            let at = index * width + part_of(token, slot_rows, parts) * (experts + nodes);
            chosen.iter().for_each(|expert| own[at + *expert as usize] += 1);
            group.far_nodes(group.slots.start + index, chosen, |node| own[at + experts + node] += 1);
        }
        own
    }

    /// Counts the sums that come back from `node` to tokens of `source` that cross to it; `choices` are those of these
    /// tokens, by (part, slot, token).
    pub fn count_sums(
        &mut self,
        group: &DispatchGroup,
        source: usize,
        node: usize,
        choices: &[u32],
        top_k: usize,
    ) {
        let mut tokens = choices.chunks_exact(top_k);
        for part in 0..self.parts {
            for slot in group.slots_of(source) {
                let at = ((slot - self.first_slot) * self.parts + part) * self.nodes + node;
                for chosen in tokens.by_ref().take(self.crossing(slot, part, node)) {
                    group.addends(slot, chosen, node, |_| self.sums[at] += 1);
                }
            }
        }
    }

    /// Parts that a slot's tokens are cut into.
    pub fn parts(&self) -> usize {
        self.parts
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

    /// Rows of `source` for an instance in one part.
    pub fn rows_for(&self, group: &DispatchGroup, source: usize, part: usize, instance: &Instance) -> usize {
        let slots = group.slots_in(source, instance.group);
        slots.map(|slot| self.rows_in(slot, part, instance.expert)).sum()
    }

    /// Rows that `source` sends to an instance.
    pub fn rows_from(&self, group: &DispatchGroup, source: usize, instance: &Instance) -> usize {
        group.slots_in(source, instance.group).map(|slot| self.rows(slot, instance.expert)).sum()
    }

    /// Tokens of `slot` in one part that cross to `node`.
    pub fn crossing(&self, slot: usize, part: usize, node: usize) -> usize {
        if self.nodes == 0 { 0 } else { self.at(slot, part, self.experts + node) }
    }

    /// Sums that come back from `node` to `slot` in one part, as far as they were counted.
    pub fn sums(&self, slot: usize, part: usize, node: usize) -> usize {
        self.sums[((slot - self.first_slot) * self.parts + part) * self.nodes + node] as usize
    }
}

fn counted_nodes(group: &DispatchGroup) -> usize {
    if group.crosses() { group.nodes.len() } else { 0 }
}
