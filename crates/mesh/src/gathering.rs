//! By which ranks a shard reaches all that want it: it crosses to each node once, to one of the ranks that want it there,
//! which passes it on inside. The conjugate of [`reduction`](crate::reduction). A flat gather is the case of one node.

/// The ways of the shards of one vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gathering<'a> {
    node_of: &'a [usize],
    /// `[rank]` how many ranks of its node are before it.
    turns: Vec<usize>,
    /// `[node]` the ranks that want the vector, ascending.
    receivers: Vec<Vec<usize>>,
}

impl<'a> Gathering<'a> {
    /// The ways to the ranks that `wants` names; rank r is on node `node_of[r]`, and nodes are numbered from 0.
    pub fn new(node_of: &'a [usize], wants: impl Fn(usize) -> bool) -> Self {
        let nodes = node_of.iter().max().map_or(0, |last| last + 1);
        let (mut receivers, mut before) = (vec![Vec::new(); nodes], vec![0; nodes]);
        let mut turns = Vec::with_capacity(node_of.len());
        for (rank, &node) in node_of.iter().enumerate() {
            turns.push(before[node]);
            before[node] += 1;
            if wants(rank) {
                receivers[node].push(rank);
            }
        }
        Self { node_of, turns, receivers }
    }

    /// Whether a shard of one of `owners` crosses to a node where several want it.
    pub fn saves(&self, mut owners: impl Iterator<Item = usize>) -> bool {
        owners.any(|owner| self.others(owner).any(|node| self.receivers[node].len() > 1))
    }

    /// The ranks that want the vector on the owner's own node.
    pub fn near(&self, owner: usize) -> &[usize] {
        &self.receivers[self.node_of[owner]]
    }

    /// For each other node where the vector is wanted: the rank to which the owner's shard crosses, and all that want it
    /// there, that rank included. Owners of a node take turns, so that those that want the vector share the work.
    pub fn far(&self, owner: usize) -> impl Iterator<Item = (usize, &[usize])> {
        self.others(owner).map(move |node| {
            let receivers = self.receivers[node].as_slice();
            (receivers[self.turns[owner] % receivers.len()], receivers)
        })
    }

    fn others(&self, owner: usize) -> impl Iterator<Item = usize> {
        let wanted = |node: &usize| !self.receivers[*node].is_empty();
        let here = self.node_of[owner];
        (0..self.receivers.len()).filter(wanted).filter(move |node| *node != here)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_crosses_once_to_each_node_and_owners_take_turns() {
        let node_of = [0, 0, 0, 1, 1, 2, 1];
        let gathering = Gathering::new(&node_of, |rank| rank != 5);
        assert_eq!(gathering.near(1), [0, 1, 2]);
        let far = |owner| gathering.far(owner).collect::<Vec<_>>();
        assert_eq!(far(0), [(3, [3, 4, 6].as_slice())]);
        assert_eq!(far(1), [(4, [3, 4, 6].as_slice())]);
        assert_eq!(far(5), [(0, [0, 1, 2].as_slice()), (3, [3, 4, 6].as_slice())]);
        assert!(gathering.saves(0..7));
    }

    #[test]
    fn nothing_is_saved_on_one_node_or_with_one_rank_on_each() {
        assert!(!Gathering::new(&[0; 4], |_| true).saves(0..4));
        assert!(!Gathering::new(&[0, 1, 2], |_| true).saves(0..3));
        assert!(!Gathering::new(&[0, 0, 1], |_| true).saves(2..2));
        assert!(!Gathering::new(&[0, 0, 1], |_| true).saves(0..2));
        assert!(Gathering::new(&[0, 0, 1], |_| true).saves(2..3));
    }
}
