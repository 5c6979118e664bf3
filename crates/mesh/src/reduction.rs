//! Which partial sums of a sum over leaves ranks bring, and which of them a receiver adds.
//!
//! A receiver adds the roots of the ranks on its own node, and what other nodes send: the roots of the maximal subtrees of
//! what their ranks hold *together*. Those that no rank holds alone are joined inside the node first, by one of the ranks
//! that hold a part. Both follow the one tree, so nodes may be cut anywhere. A flat reduction is the case of one node.

use std::ops::Range;

use crate::tree;

/// The roots of one sum: whose they are and who adds what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reduction {
    /// `[rank]` how many roots it contributes.
    pub roots_of: Vec<usize>,
    /// `[node]` the roots of what its ranks hold together.
    pub nodes: Vec<Vec<NodeRoot>>,
    /// `[node]` what a receiver on it adds.
    pub views: Vec<View>,
}

/// A root of what a node's ranks hold together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRoot {
    /// Its leaves.
    pub range: Range<usize>,
    /// The ranks' roots it is made of, (rank, root), in the order of the leaves.
    pub sources: Vec<(usize, usize)>,
    /// The leaves of each, counted from the first of the root.
    pub parts: Vec<Range<usize>>,
}

impl NodeRoot {
    /// The rank that joins it for a receiver on another node: receivers of a node take turns, so that the ranks that could
    /// do it share the work.
    pub fn relay(&self, receiver: usize, node_of: &[usize]) -> usize {
        let turn = node_of[..receiver].iter().filter(|node| **node == node_of[receiver]).count();
        self.sources[turn % self.sources.len()].0
    }
}

/// What the receivers on one node add, in the order of the leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// The addends.
    pub sources: Vec<Source>,
    /// The leaves of each.
    pub ranges: Vec<Range<usize>>,
}

/// What a receiver adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A rank's root.
    Root {
        /// The rank.
        rank: usize,
        /// Which of its roots.
        root: usize,
    },
    /// A root of a node that is joined inside it.
    Joined {
        /// The node.
        node: usize,
        /// Which of its roots.
        index: usize,
    },
}

impl Reduction {
    /// The roots of a sum over `items` leaves of which rank r, on node `node_of[r]`, holds `held[r]`.
    ///
    /// # Errors
    /// If not every leaf is held once: says which.
    pub fn new(items: usize, held: &[Range<usize>], node_of: &[usize]) -> Result<Self, String> {
        let all = checked_roots(items, held)?;
        let mut roots_of = vec![0; held.len()];
        for (_, rank, _) in &all {
            roots_of[*rank] += 1;
        }
        let count = node_of.iter().max().map_or(1, |last| last + 1);
        let nodes: Vec<Vec<NodeRoot>> = (0..count)
            .map(|node| {
                let of_node = all.iter().filter(|(_, rank, _)| node_of[*rank] == node).cloned();
                node_roots(items, &of_node.collect::<Vec<_>>())
            })
            .collect();
        let views = (0..count).map(|node| View::new(&all, &nodes, node_of, node)).collect();
        Ok(Self { roots_of, nodes, views })
    }

    /// Whether anything is joined inside a node for others.
    pub fn joins(&self) -> bool {
        let joined = |view: &View| view.sources.iter().any(|source| matches!(source, Source::Joined { .. }));
        self.views.iter().any(joined)
    }
}

impl View {
    fn new(
        all: &[(Range<usize>, usize, usize)],
        nodes: &[Vec<NodeRoot>],
        node_of: &[usize],
        own: usize,
    ) -> Self {
        let near = all.iter().filter(|(_, rank, _)| node_of[*rank] == own);
        let mut list: Vec<(Range<usize>, Source)> = near
            .map(|(range, rank, root)| (range.clone(), Source::Root { rank: *rank, root: *root }))
            .collect();
        for (node, roots) in nodes.iter().enumerate().filter(|(node, _)| *node != own) {
            list.extend(roots.iter().enumerate().map(|(index, joined)| {
                let source = match joined.sources[..] {
                    [(rank, root)] => Source::Root { rank, root },
                    _ => Source::Joined { node, index },
                };
                (joined.range.clone(), source)
            }));
        }
        list.sort_unstable_by_key(|(range, _)| range.start);
        let (ranges, sources) = list.into_iter().unzip();
        Self { sources, ranges }
    }
}

/// All roots, (leaves, rank, root), in the order of the leaves.
fn checked_roots(items: usize, held: &[Range<usize>]) -> Result<Vec<(Range<usize>, usize, usize)>, String> {
    let mut all = Vec::new();
    for (rank, range) in held.iter().enumerate() {
        if range.end > items {
            return Err(format!("rank {rank} holds {range:?} of {items} items"));
        }
        let roots = tree::roots(range.clone(), items);
        all.extend(roots.into_iter().enumerate().map(|(root, node)| (node, rank, root)));
    }
    all.sort_unstable_by_key(|(node, ..)| node.start);
    let mut end = 0;
    for (node, rank, _) in &all {
        if node.start != end {
            let what = if node.start > end { "held by nobody" } else { "held twice" };
            let (from, to) = (end.min(node.start), end.max(node.start));
            return Err(format!("items {from}..{to} of {items} are {what} (at rank {rank})"));
        }
        end = node.end;
    }
    if end != items || items == 0 {
        return Err(format!("items {end}..{items} are held by nobody; a sum needs at least one item"));
    }
    Ok(all)
}

/// The maximal subtrees of what a node's ranks hold together; `roots` are theirs, in the order of the leaves.
fn node_roots(items: usize, roots: &[(Range<usize>, usize, usize)]) -> Vec<NodeRoot> {
    let mut found = Vec::new();
    for run in roots.chunk_by(|left, right| left.0.end == right.0.start) {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
        for range in tree::roots(first.0.start..last.0.end, items) {
            let inside = run.iter().filter(|(node, ..)| range.start <= node.start && node.end <= range.end);
            let parts = inside.clone().map(|(n, ..)| n.start - range.start..n.end - range.start).collect();
            let sources = inside.map(|(_, rank, root)| (*rank, *root)).collect();
            found.push(NodeRoot { range, sources, parts });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_node_holds_together_is_joined_inside_it() {
        let held: Vec<Range<usize>> = (0..4).map(|rank| rank..rank + 1).collect();
        let reduction = Reduction::new(4, &held, &[0, 0, 1, 1]).unwrap();
        assert!(reduction.joins());
        let near = [Source::Root { rank: 0, root: 0 }, Source::Root { rank: 1, root: 0 }];
        assert_eq!(reduction.views[0].sources, [&near[..], &[Source::Joined { node: 1, index: 0 }]].concat());
        let joined = &reduction.nodes[1][0];
        assert_eq!((joined.range.clone(), &joined.parts[..]), (2..4, &[0..1, 1..2][..]));
        assert_eq!([0, 1].map(|receiver| joined.relay(receiver, &[0, 0, 1, 1])), [2, 3]);
    }

    #[test]
    fn one_node_joins_nothing_and_leaves_are_held_once() {
        assert!(!Reduction::new(6, &[0..3, 3..6], &[0, 0]).unwrap().joins());
        let said = Reduction::new(6, &[0..3, 2..6], &[0, 0]).unwrap_err();
        assert!(said.contains("2..3 of 6 are held twice"), "{said}");
    }
}
