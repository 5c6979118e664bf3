//! The fixed tree that joins every sum which a layout may split.
//!
//! The tree over `n` items, in index order, splits at the largest power of two below `n`; both halves split the
//! same way. Its shape depends on `n` alone. A rank that holds a range of items sends the results of the range's
//! *maximal subtrees* and nothing else, so the sum has the same bits whoever held what.

use std::ops::Range;

/// Where the tree over `n >= 2` items splits: the largest power of two below `n`.
///
/// # Panics
/// If `n < 2`: a leaf has no split.
pub fn split(n: usize) -> usize {
    assert!(n >= 2, "a tree over {n} items has no split");
    1 << (usize::BITS - 1 - (n - 1).leading_zeros())
}

/// The maximal subtrees of the tree over `n` items that cover exactly `held`, in index order.
///
/// # Panics
/// If `held` does not lie in `0..n`.
pub fn roots(held: Range<usize>, n: usize) -> Vec<Range<usize>> {
    assert!(held.end <= n, "range {held:?} does not lie in a tree over {n} items");
    let mut found = Vec::new();
    if !held.is_empty() {
        collect_roots(0..n, &held, &mut found);
    }
    found
}

fn collect_roots(node: Range<usize>, held: &Range<usize>, found: &mut Vec<Range<usize>>) {
    if node.end <= held.start || held.end <= node.start {
        return;
    }
    if held.start <= node.start && node.end <= held.end {
        found.push(node);
        return;
    }
    let middle = node.start + split(node.len());
    collect_roots(node.start..middle, held, found);
    collect_roots(middle..node.end, held, found);
}

/// Joins partial results along the tree as they come, in index order, holding as few of them as the tree allows.
///
/// Push the nodes (single items or whole subtrees) of one contiguous range in index order; whenever both children of
/// a tree node are there, they are joined. What is left at the end are the maximal subtrees of the range.
#[derive(Debug)]
pub struct Joiner<T> {
    items: usize,
    pending: Vec<(Range<usize>, T)>,
}

impl<T> Joiner<T> {
    /// An empty joiner for the tree over `items` items.
    pub fn new(items: usize) -> Self {
        Self { items, pending: Vec::new() }
    }

    /// Adds the result of tree node `node`, then joins siblings with `add(left, right)`.
    ///
    /// # Panics
    /// If `node` is not a node of the tree or does not start where the last one ended.
    pub fn push(&mut self, node: Range<usize>, value: T, mut add: impl FnMut(T, T) -> T) {
        assert!(
            is_node(node.clone(), self.items),
            "{node:?} is no node of the tree over {} items",
            self.items
        );
        if let Some((last, _)) = self.pending.last() {
            assert_eq!(last.end, node.start, "tree nodes must come in index order");
        }
        self.pending.push((node, value));
        while self.pending.len() >= 2 {
            let right = self.pending[self.pending.len() - 1].0.clone();
            let left = self.pending[self.pending.len() - 2].0.clone();
            if !is_node(left.start..right.end, self.items) || !are_children(&left, &right) {
                break;
            }
            let (_, right_value) = self.pending.pop().expect("two nodes are pending");
            let (_, left_value) = self.pending.pop().expect("two nodes are pending");
            self.pending.push((left.start..right.end, add(left_value, right_value)));
        }
    }

    /// The maximal subtrees joined so far, in index order.
    pub fn into_roots(self) -> Vec<(Range<usize>, T)> {
        self.pending
    }

    /// How many subtrees are held now.
    pub fn held(&self) -> usize {
        self.pending.len()
    }
}

fn are_children(left: &Range<usize>, right: &Range<usize>) -> bool {
    left.len() == split(left.len() + right.len())
}

fn is_node(range: Range<usize>, items: usize) -> bool {
    let mut node = 0..items;
    loop {
        if node == range {
            return true;
        }
        if node.len() < 2 || range.start < node.start || range.end > node.end {
            return false;
        }
        let middle = node.start + split(node.len());
        node = if range.start < middle { node.start..middle } else { middle..node.end };
    }
}

/// Sums `values` along the tree over their indices. An empty slice sums to +0.0.
pub fn sum(values: &[f64]) -> f64 {
    match values {
        [] => 0.0,
        [value] => *value,
        _ => {
            let (left, right) = values.split_at(split(values.len()));
            sum(left) + sum(right)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn splits_at_the_largest_power_of_two_below() {
        let splits: Vec<_> = (2..=9).map(split).collect();
        assert_eq!(splits, [1, 2, 2, 4, 4, 4, 4, 8]);
    }

    #[test]
    fn aligned_folds_send_one_root_and_others_few() {
        assert_eq!(roots(4..8, 8), [4..8]);
        assert_eq!(roots(0..3, 6), [0..2, 2..3]);
        assert_eq!(roots(3..6, 6), [3..4, 4..6]);
        assert_eq!(roots(2..2, 6), []);
    }

    #[test]
    #[should_panic(expected = "1..3 is no node of the tree over 4 items")]
    fn what_is_no_node_is_not_joined() {
        Joiner::new(4).push(1..3, 0.0, |a, b| a + b);
    }

    fn parenthesised(held: Range<usize>, items: usize) -> Vec<(Range<usize>, String)> {
        let mut joiner = Joiner::new(items);
        for i in held {
            joiner.push(i..i + 1, i.to_string(), |a, b| format!("({a} {b})"));
        }
        joiner.into_roots()
    }

    proptest! {
        #[test]
        fn any_fold_gives_the_same_parentheses(items in 1usize..70, cuts in proptest::collection::vec(0usize..70, 0..6)) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c % (items + 1)).chain([0, items]).collect();
            cuts.sort_unstable();
            let whole = parenthesised(0..items, items);
            let mut joiner = Joiner::new(items);
            for pair in cuts.windows(2) {
                let part = parenthesised(pair[0]..pair[1], items);
                let expected = roots(pair[0]..pair[1], items);
                prop_assert_eq!(part.iter().map(|(r, _)| r.clone()).collect::<Vec<_>>(), expected);
                for (node, text) in part {
                    joiner.push(node, text, |a, b| format!("({a} {b})"));
                }
            }
            prop_assert_eq!(joiner.into_roots(), whole);
        }
    }
}
