//! How many ranks and threads, where the arguments leave it open.

use std::num::NonZeroUsize;

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// Ranks, and compute threads of each: as many ranks as the cores serve, and the cores shared out among them. Neither
/// changes a number.
pub fn ranks_and_threads(slots: usize, ranks: Option<usize>, threads: Option<usize>) -> (usize, usize) {
    let ranks = ranks.unwrap_or_else(|| most_ranks(slots, cores()));
    (ranks, threads.unwrap_or_else(|| threads_each(ranks)))
}

/// Compute threads of each of `ranks` ranks that share this machine.
pub fn threads_each(ranks: usize) -> usize {
    (cores() / ranks).max(1)
}

/// The largest divisor of `slots` that is at most `cores`.
fn most_ranks(slots: usize, cores: usize) -> usize {
    (1..=cores.min(slots)).rev().find(|ranks| slots.is_multiple_of(*ranks)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_divide_the_slots_and_fit_the_cores() {
        let cases = [((8, 2), 2), ((8, 6), 4), ((6, 4), 3), ((7, 4), 1), ((1, 64), 1), ((8, 64), 8)];
        for ((slots, cores), ranks) in cases {
            assert_eq!(most_ranks(slots, cores), ranks, "{slots} slots, {cores} cores");
        }
    }
}
