//! What a wave of slots computes on, and what it reports.

use std::ops::{AddAssign, Range};

/// The sequences of one accumulation step for consecutive slots, by (slot, sequence, position).
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// The slots, in order.
    pub slots: Range<usize>,
    /// Sequences of each slot.
    pub sequences: usize,
    /// Positions of a sequence.
    pub sequence_length: usize,
    /// `[rows]` token ids.
    pub inputs: Vec<u32>,
    /// `[rows]` the token to predict, or `IGNORE`.
    pub targets: Vec<u32>,
    /// `[rows]` position in the sequence of the first token of the row's document.
    pub document_start: Vec<u32>,
    /// `[rows]` position in the sequence.
    pub positions: Vec<u32>,
}

impl Batch {
    /// Rows of one slot.
    pub fn slot_rows(&self) -> usize {
        self.sequences * self.sequence_length
    }

    /// Rows of all slots.
    pub fn rows(&self) -> usize {
        self.slots.len() * self.slot_rows()
    }

    /// The rows of the wave's `index`-th slot.
    pub fn rows_of(&self, index: usize) -> Range<usize> {
        index * self.slot_rows()..(index + 1) * self.slot_rows()
    }

    /// Sequences of all slots.
    pub fn all_sequences(&self) -> usize {
        self.slots.len() * self.sequences
    }
}

/// Factors of the loss terms, from what the whole step computes on; known before its first forward.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossScale {
    /// Target tokens of the step, over all slots and accumulation steps: the one divisor of the cross-entropy.
    pub targets: u64,
    /// Sequences of the step.
    pub sequences: u64,
    /// Positions of a sequence.
    pub sequence_length: usize,
}

impl LossScale {
    /// Factor of a token's cross-entropy.
    pub fn token(&self) -> f32 {
        (1.0 / self.targets.max(1) as f64) as f32
    }

    /// Factor of a sequence's balance loss.
    pub fn balance(&self, coefficient: f32) -> f32 {
        (f64::from(coefficient) / self.sequences as f64) as f32
    }

    /// Factor of a token's z-loss.
    pub fn z(&self, coefficient: f32) -> f32 {
        (f64::from(coefficient) / (self.sequences as f64 * self.sequence_length as f64)) as f32
    }
}

/// Sums over the rows of one slot, in f64: tokens ascending within a layer, then layers ascending, then accumulation
/// steps in order. Slots are joined by the tree.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SlotLosses {
    /// Cross-entropy in nats, summed over target tokens.
    pub cross_entropy: f64,
    /// Balance loss, summed over sequences and MoE layers.
    pub balance: f64,
    /// z-loss, summed over tokens and MoE layers.
    pub z: f64,
    /// Entropy of the router's normalised scores in nats, summed over tokens and MoE layers.
    pub entropy: f64,
}

impl AddAssign for SlotLosses {
    fn add_assign(&mut self, other: Self) {
        self.cross_entropy += other.cross_entropy;
        self.balance += other.balance;
        self.z += other.z;
        self.entropy += other.entropy;
    }
}
