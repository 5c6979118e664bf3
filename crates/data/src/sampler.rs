//! Which sequence is used where: a pure function of (seed, step).

use crate::error::{DataError, Result};

/// Rounds of the Feistel network; four make a good permutation, eight leave a margin for tiny domains.
const ROUNDS: usize = 8;

/// The order of samples of a run, without state: any step's samples are known in O(1) time and memory.
///
/// Sample number `step * global_batch + index_in_batch` lies in epoch `number / sequences` at position
/// `number % sequences`; each epoch visits every sequence once, in an order of its own. A batch may
/// straddle two epochs. Nothing is kept between calls, so a resumed run needs no loader state and
/// every layout sees the same batches.
///
/// The permutation of an epoch is a Feistel network (Luby and Rackoff, 1988) over the smallest
/// square power-of-two domain that holds all sequences, walked along its cycle until it lands on a
/// sequence (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): four applications
/// in the mean at most. Its round keys are BLAKE3 of (seed, epoch, sequences).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampler {
    seed: u64,
    sequences: u64,
    global_batch: u64,
}

impl Sampler {
    /// A sampler over `sequences` sequences in batches of `global_batch`.
    ///
    /// # Errors
    /// [`DataError::Request`] when either is zero.
    pub fn new(seed: u64, sequences: u64, global_batch: u64) -> Result<Self> {
        if sequences == 0 {
            return Err(DataError::Request(
                "there is not one whole sequence to sample from: use more text or a smaller sequence_length"
                    .into(),
            ));
        }
        if global_batch == 0 {
            return Err(DataError::Request("the global batch has no sequence: it must be at least 1".into()));
        }
        Ok(Self { seed, sequences, global_batch })
    }

    /// The number of sequences an epoch visits.
    pub fn sequences(&self) -> u64 {
        self.sequences
    }

    /// The number of sequences of one step over all ranks.
    pub fn global_batch(&self) -> u64 {
        self.global_batch
    }

    /// The index, in `0..sequences`, of the sequence at `index_in_batch` (in `0..global_batch`) of `step`.
    pub fn sample_index(&self, step: u64, index_in_batch: u64) -> u64 {
        debug_assert!(index_in_batch < self.global_batch);
        let number = u128::from(step) * u128::from(self.global_batch) + u128::from(index_in_batch);
        let sequences = u128::from(self.sequences);
        // The remainder is below `sequences`, so it fits; an epoch above 2^64 would wrap, which
        // takes 2^64 steps over a single sequence.
        self.permuted((number / sequences) as u64, (number % sequences) as u64)
    }

    /// Where `position` (in `0..sequences`) of the pass number `epoch` lands.
    fn permuted(&self, epoch: u64, position: u64) -> u64 {
        // Half the bits of the largest position, rounded up: at most four times as many values as sequences.
        let bits = u64::BITS - (self.sequences - 1).leading_zeros();
        let half_bits = bits.div_ceil(2).max(1);
        let keys = self.round_keys(epoch);
        let mut value = u128::from(position);
        loop {
            value = feistel(value, half_bits, &keys);
            if value < u128::from(self.sequences) {
                return value as u64;
            }
        }
    }

    fn round_keys(&self, epoch: u64) -> [u64; ROUNDS] {
        let mut hasher = blake3::Hasher::new_derive_key("unisono 2026 sample order of an epoch");
        for number in [self.seed, epoch, self.sequences] {
            hasher.update(&number.to_le_bytes());
        }
        let mut output = hasher.finalize_xof();
        std::array::from_fn(|_| {
            let mut key = [0; 8];
            output.fill(&mut key);
            u64::from_le_bytes(key)
        })
    }
}

/// A permutation of `0..2^(2 * half_bits)`; `half_bits` is at most 32.
fn feistel(value: u128, half_bits: u32, keys: &[u64; ROUNDS]) -> u128 {
    let mask = u64::MAX >> (u64::BITS - half_bits);
    let mut left = (value >> half_bits) as u64 & mask;
    let mut right = value as u64 & mask;
    for key in keys {
        (left, right) = (right, left ^ (mix(right ^ key) & mask));
    }
    (u128::from(left) << half_bits) | u128::from(right)
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): each input bit reaches each output bit.
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn epoch(sampler: &Sampler, epoch: u64) -> Vec<u64> {
        (0..sampler.sequences).map(|position| sampler.permuted(epoch, position)).collect()
    }

    proptest! {
        #[test]
        fn every_epoch_is_a_permutation(seed: u64, sequences in 1_u64..700, number in 0_u64..1 << 40) {
            let sampler = Sampler::new(seed, sequences, 1).unwrap();
            let mut order = epoch(&sampler, number);
            order.sort_unstable();
            prop_assert!(order.into_iter().eq(0..sequences));
        }

        #[test]
        fn batches_tile_the_epochs(seed: u64, sequences in 1_u64..60, global_batch in 1_u64..90) {
            let sampler = Sampler::new(seed, sequences, global_batch).unwrap();
            let steps = 3 * sequences;
            let flat: Vec<u64> = (0..steps)
                .flat_map(|step| (0..global_batch).map(move |index| sampler.sample_index(step, index)))
                .collect();
            for (number, order) in flat.chunks_exact(sequences as usize).enumerate() {
                prop_assert_eq!(order, &epoch(&sampler, number as u64)[..]);
            }
        }

        #[test]
        fn huge_numbers_stay_in_range(seed: u64, sequences in 1_u64.., step: u64, index: u64, batch in 1_u64..) {
            let sampler = Sampler::new(seed, sequences, batch).unwrap();
            prop_assert!(sampler.sample_index(step, index % batch) < sequences);
        }
    }

    #[test]
    fn epochs_seeds_and_sizes_have_orders_of_their_own() {
        let sampler = Sampler::new(7, 1_000, 8).unwrap();
        let first = epoch(&sampler, 0);
        let same_places = |other: &[u64]| first.iter().zip(other).filter(|(a, b)| a == b).count();
        // Two random orders of 1,000 agree in one place in the mean; 12 has odds below 1e-8.
        assert!(same_places(&epoch(&sampler, 1)) < 12);
        assert!(same_places(&epoch(&Sampler::new(8, 1_000, 8).unwrap(), 0)) < 12);
        assert!(same_places(&epoch(&Sampler::new(7, 1_001, 8).unwrap(), 0)) < 12);
        assert!(same_places(&(0..1_000).collect::<Vec<_>>()) < 12);
    }

    #[test]
    fn small_domains_reach_all_their_orders() {
        let mut seen = std::collections::BTreeMap::<Vec<u64>, u32>::new();
        let sampler = Sampler::new(1, 4, 1).unwrap();
        for number in 0..24_000 {
            *seen.entry(epoch(&sampler, number)).or_default() += 1;
        }
        assert_eq!(seen.len(), 24);
        // 1,000 expected, standard deviation 31: six of them leave 1 in 10^7 for 24 draws.
        assert!(seen.values().all(|count| (810..1_190).contains(count)), "{seen:?}");
    }

    /// A released sample order never changes: old runs must resume.
    #[test]
    fn golden_order() {
        let sampler = Sampler::new(42, 10, 4).unwrap();
        let order: Vec<u64> = (0..20).map(|number| sampler.sample_index(number / 4, number % 4)).collect();
        assert_eq!(order, [2, 5, 4, 0, 6, 8, 9, 3, 1, 7, 1, 7, 4, 0, 2, 3, 8, 6, 9, 5]);
    }

    #[test]
    fn nothing_to_sample_is_refused() {
        assert!(Sampler::new(0, 0, 1).unwrap_err().to_string().contains("sequence_length"));
        assert!(Sampler::new(0, 1, 0).unwrap_err().to_string().contains("at least 1"));
    }
}
