//! Seeded damage, for the tests of every crate that reads files: they take this one by its path.

/// SplitMix64: the same damage in every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// One to four of: a bit flipped, a byte replaced, an end cut off, a stretch swapped, doubled or removed.
    pub fn damage(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut damaged = bytes.to_vec();
        for _ in 0..=self.below(4) {
            if damaged.len() < 2 {
                break;
            }
            let at = self.below(damaged.len());
            let other = self.below(damaged.len());
            let (from, to) = (at.min(other), at.max(other));
            match self.below(7) {
                0 | 1 => damaged[at] ^= 1 << self.below(8),
                2 => damaged[at] = self.next() as u8,
                3 => damaged.truncate(at),
                4 => damaged.swap(at, other),
                5 => drop(damaged.drain(from..to.min(from + 64))),
                _ => {
                    let stretch = damaged[from..to.min(from + 64)].to_vec();
                    damaged.splice(at..at, stretch);
                }
            }
        }
        damaged
    }
}
