//! The additions of a tree whose leaves are the roots that the ranks send, worked out once.

use std::collections::HashMap;
use std::ops::{Add, Range};

use bytemuck::Pod;
use unisono_mesh::tree;

/// Elements that go through the whole tree at once: the scratch of a deep tree stays in the L1 cache.
const BLOCK: usize = 1024;

/// The numbers that can be summed along the tree: f32 and f64.
pub trait Real: Pod + Send + Sync + Add<Output = Self> {}

impl Real for f32 {}
impl Real for f64 {}

/// One addition. Slot 0 is the output, the others are scratch; sources are numbered in the order of the leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// slot = left source + right source
    Pair { slot: usize, left: usize, right: usize },
    /// slot = slot + source
    Right { slot: usize, right: usize },
    /// slot = source + slot
    Left { slot: usize, left: usize },
    /// slot = slot + next slot
    Join { slot: usize },
}

/// What a node of the tree comes out as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value {
    Source(usize),
    Slot,
}

/// A sum along the tree.
#[derive(Debug)]
pub(crate) struct TreeSum {
    steps: Vec<Step>,
    /// Slots besides the output.
    scratch: usize,
}

impl TreeSum {
    /// The sum over `items` leaves of which `nodes` are given. They are nodes of the tree that cover it, in order.
    pub fn over(items: usize, nodes: &[Range<usize>]) -> Self {
        let given = nodes.iter().enumerate().map(|(i, node)| ((node.start, node.end), i)).collect();
        let mut sum = Self { steps: Vec::new(), scratch: 0 };
        sum.compile(0..items, 0, &given);
        sum
    }

    fn compile(&mut self, node: Range<usize>, slot: usize, given: &HashMap<(usize, usize), usize>) -> Value {
        if let Some(&source) = given.get(&(node.start, node.end)) {
            return Value::Source(source);
        }
        let middle = node.start + tree::split(node.len());
        let left = self.compile(node.start..middle, slot, given);
        let next = if left == Value::Slot { slot + 1 } else { slot };
        let right = self.compile(middle..node.end, next, given);
        if right == Value::Slot {
            self.scratch = self.scratch.max(next);
        }
        self.steps.push(match (left, right) {
            (Value::Source(left), Value::Source(right)) => Step::Pair { slot, left, right },
            (Value::Slot, Value::Source(right)) => Step::Right { slot, right },
            (Value::Source(left), Value::Slot) => Step::Left { slot, left },
            (Value::Slot, Value::Slot) => Step::Join { slot },
        });
        Value::Slot
    }

    /// Writes the sum of `sources`, all as long as `out`, to `out`. `scratch` is kept by the caller for reuse.
    pub fn run<T: Real>(&self, sources: &[&[T]], out: &mut [T], scratch: &mut Vec<T>) {
        if self.steps.is_empty() {
            out.copy_from_slice(sources[0]);
            return;
        }
        if scratch.len() < self.scratch * BLOCK {
            scratch.resize(self.scratch * BLOCK, T::zeroed());
        }
        let len = out.len();
        for start in (0..len).step_by(BLOCK) {
            let block = start..len.min(start + BLOCK);
            self.run_block(sources, &mut out[block.clone()], block, scratch);
        }
    }

    fn run_block<T: Real>(&self, sources: &[&[T]], out: &mut [T], block: Range<usize>, scratch: &mut [T]) {
        let len = out.len();
        for step in &self.steps {
            match *step {
                Step::Pair { slot, left, right } => {
                    let (left, right) = (&sources[left][block.clone()], &sources[right][block.clone()]);
                    for ((sum, &a), &b) in slot_mut(out, scratch, slot).iter_mut().zip(left).zip(right) {
                        *sum = a + b;
                    }
                }
                Step::Right { slot, right } => {
                    for (sum, &b) in
                        slot_mut(out, scratch, slot).iter_mut().zip(&sources[right][block.clone()])
                    {
                        *sum = *sum + b;
                    }
                }
                Step::Left { slot, left } => {
                    for (sum, &a) in
                        slot_mut(out, scratch, slot).iter_mut().zip(&sources[left][block.clone()])
                    {
                        *sum = a + *sum;
                    }
                }
                Step::Join { slot } => {
                    let (before, after) = scratch.split_at_mut(slot * BLOCK);
                    let sums = if slot == 0 { &mut *out } else { &mut before[(slot - 1) * BLOCK..][..len] };
                    for (sum, &b) in sums.iter_mut().zip(&after[..len]) {
                        *sum = *sum + b;
                    }
                }
            }
        }
    }
}

fn slot_mut<'a, T>(out: &'a mut [T], scratch: &'a mut [T], slot: usize) -> &'a mut [T] {
    let len = out.len();
    match slot {
        0 => out,
        _ => &mut scratch[(slot - 1) * BLOCK..][..len],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaves(items: usize) -> Vec<Range<usize>> {
        (0..items).map(|i| i..i + 1).collect()
    }

    #[test]
    fn sums_as_the_reference_does() {
        for items in 1..70 {
            let values: Vec<Vec<f64>> = (0..items)
                .map(|i| {
                    (0..BLOCK + 3)
                        .map(|e| ((i * 31 + e * 17) as f64).sin() * 10f64.powi(i as i32 % 9))
                        .collect()
                })
                .collect();
            let sources: Vec<&[f64]> = values.iter().map(Vec::as_slice).collect();
            let mut out = vec![0.0; BLOCK + 3];
            TreeSum::over(items, &leaves(items)).run(&sources, &mut out, &mut Vec::new());
            for (e, sum) in out.iter().enumerate() {
                let column: Vec<f64> = values.iter().map(|row| row[e]).collect();
                assert_eq!(sum.to_bits(), tree::sum(&column).to_bits(), "{items} items, element {e}");
            }
        }
    }

    #[test]
    fn two_roots_are_one_pass() {
        let sum = TreeSum::over(8, &[0..4, 4..8]);
        assert_eq!(sum.steps, [Step::Pair { slot: 0, left: 0, right: 1 }]);
        assert_eq!(sum.scratch, 0);
    }
}
