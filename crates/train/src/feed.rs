//! Which sequences a wave computes on: a pure function of (seed, step), whatever the layout.

use std::ops::Range;

use unisono_data::{DataError, Dataset, Part, Sampler, Sequence};
use unisono_model::Batch;

use crate::config::RunConfig;

/// Batches of a run.
pub struct Feed<'a> {
    dataset: &'a Dataset,
    seed: u64,
    slots: usize,
    sequences: usize,
    sequence_length: usize,
    accumulate: usize,
}

/// A batch and the bytes of text that its targets stand for, a slot.
pub struct Fed {
    /// The batch.
    pub batch: Batch,
    /// Bytes of text of each slot's targets.
    pub target_bytes: Vec<u64>,
    /// Target tokens of each slot.
    pub targets: Vec<u64>,
}

impl<'a> Feed<'a> {
    /// The batches of a run.
    pub fn new(dataset: &'a Dataset, config: &RunConfig) -> Self {
        Self {
            dataset,
            seed: config.train.seed,
            slots: config.grid.slots(),
            sequences: config.train.micro_batch,
            sequence_length: config.train.sequence_length,
            accumulate: config.train.accumulate,
        }
    }

    /// The order in which the training part is read.
    ///
    /// # Errors
    /// If it has not one whole sequence.
    pub fn sampler(&self) -> Result<Sampler, DataError> {
        let sequences = self.dataset.sequences(Part::Train, self.sequence_length);
        Sampler::new(self.seed, sequences, (self.slots * self.sequences * self.accumulate) as u64)
    }

    /// Accumulation step `turn` of step `step` for consecutive `slots`.
    ///
    /// # Errors
    /// If the dataset cannot be read, or has not one whole sequence.
    pub fn train(&self, step: u64, turn: usize, slots: Range<usize>) -> Result<Fed, DataError> {
        let sampler = self.sampler()?;
        self.fill(slots, self.sequences, Part::Train, |slot, index| {
            let in_batch = (turn * self.slots + slot) * self.sequences + index;
            sampler.sample_index(step, in_batch as u64)
        })
    }

    /// Turns of a validation over `wanted` sequences: as few as give every slot the same number.
    pub fn validation_turns(&self, wanted: usize) -> usize {
        let available = self.dataset.sequences(Part::Validation, self.sequence_length) as usize;
        let width = self.slots * self.sequences;
        let turns = wanted.div_ceil(width);
        turns.min(available.div_ceil(width))
    }

    /// Turn `turn` of a validation of `turns` turns: sequences spread evenly over the validation part.
    ///
    /// # Errors
    /// If the dataset cannot be read.
    pub fn validation(&self, turn: usize, turns: usize, slots: Range<usize>) -> Result<Fed, DataError> {
        let available = self.dataset.sequences(Part::Validation, self.sequence_length);
        let total = (turns * self.slots * self.sequences) as u64;
        self.fill(slots, self.sequences, Part::Validation, |slot, index| {
            let number = ((turn * self.slots + slot) * self.sequences + index) as u64;
            if total <= available { number * (available / total) } else { number % available }
        })
    }

    /// Accumulation steps of an optimizer step.
    pub fn turns(&self) -> usize {
        self.accumulate
    }

    fn fill(
        &self,
        slots: Range<usize>,
        sequences: usize,
        part: Part,
        index_of: impl Fn(usize, usize) -> u64,
    ) -> Result<Fed, DataError> {
        let length = self.sequence_length;
        let mut batch =
            Batch { slots: slots.clone(), sequences, sequence_length: length, ..Batch::default() };
        let mut sequence = Sequence::default();
        let (mut target_bytes, mut targets) = (Vec::new(), Vec::new());
        for slot in slots {
            let (mut bytes, mut count) = (0, 0);
            for index in 0..sequences {
                self.dataset.sequence_into(part, length, index_of(slot, index), &mut sequence)?;
                batch.inputs.extend_from_slice(&sequence.inputs);
                batch.targets.extend_from_slice(&sequence.targets);
                batch.document_start.extend_from_slice(&sequence.document_start);
                batch.positions.extend(0..length as u32);
                bytes += sequence.target_bytes;
                count += sequence.targets.iter().filter(|t| **t != unisono_data::IGNORE).count() as u64;
            }
            target_bytes.push(bytes);
            targets.push(count);
        }
        Ok(Fed { batch, target_bytes, targets })
    }
}
