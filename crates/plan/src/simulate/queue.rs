//! A queue of ends: the earliest first, each activity at most once, moved in place when its end changes.

/// Children of a node. Four keep the tree flat and a node's children within one or two cache lines.
const WIDTH: usize = 4;

/// Not in the queue.
const ABSENT: u32 = u32::MAX;

/// Ends by time, then by activity.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// `(time as ordered bits, activity)`, a heap.
    nodes: Vec<(u64, u32)>,
    /// `[activity]` its node.
    places: Vec<u32>,
}

impl Queue {
    /// Sets the end of `activity`; `at_s` is not negative.
    pub fn set(&mut self, activity: u32, at_s: f64) {
        if self.places.len() <= activity as usize {
            self.places.resize(activity as usize + 1, ABSENT);
        }
        // The bits of floats that are not negative are in their order; adding zero turns -0 into 0.
        let node = ((at_s + 0.0).to_bits(), activity);
        let place = self.places[activity as usize] as usize;
        if place == ABSENT as usize {
            self.nodes.push(node);
            self.rise(self.nodes.len() - 1, node);
        } else if node < self.nodes[place] {
            self.rise(place, node);
        } else {
            self.sink(place, node);
        }
    }

    /// Takes the earliest end.
    pub fn pop(&mut self) -> Option<(f64, u32)> {
        let (bits, activity) = *self.nodes.first()?;
        self.places[activity as usize] = ABSENT;
        let last = self.nodes.pop()?;
        if !self.nodes.is_empty() {
            self.sink(0, last);
        }
        Some((f64::from_bits(bits), activity))
    }

    fn put(&mut self, place: usize, node: (u64, u32)) {
        self.nodes[place] = node;
        self.places[node.1 as usize] = place as u32;
    }

    fn rise(&mut self, mut place: usize, node: (u64, u32)) {
        while place > 0 {
            let parent = (place - 1) / WIDTH;
            if self.nodes[parent] <= node {
                break;
            }
            self.put(place, self.nodes[parent]);
            place = parent;
        }
        self.put(place, node);
    }

    fn sink(&mut self, mut place: usize, node: (u64, u32)) {
        loop {
            let first = place * WIDTH + 1;
            let children = first..(first + WIDTH).min(self.nodes.len());
            let Some(child) = children.min_by_key(|child| self.nodes[*child]) else { break };
            if self.nodes[child] >= node {
                break;
            }
            self.put(place, self.nodes[child]);
            place = child;
        }
        self.put(place, node);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ends_come_in_order_whatever_is_moved(moves in prop::collection::vec((0u32..20, 0.0f64..9.0), 1..80)) {
            let mut queue = Queue::default();
            let mut expected = std::collections::BTreeMap::new();
            for (activity, at_s) in moves {
                queue.set(activity, at_s);
                expected.insert(activity, at_s);
            }
            let mut expected: Vec<(f64, u32)> = expected.into_iter().map(|(id, at_s)| (at_s, id)).collect();
            expected.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            let popped: Vec<(f64, u32)> = std::iter::from_fn(|| queue.pop()).collect();
            prop_assert_eq!(popped, expected);
        }
    }
}
