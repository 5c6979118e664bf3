//! How chunks are cut into shards.

use std::ops::Range;

/// Part `part` of `items` items cut into `parts` consecutive parts whose sizes differ by at most one.
pub fn part(items: usize, parts: usize, part: usize) -> Range<usize> {
    items * part / parts..items * (part + 1) / parts
}

/// Like [`part`], for a tensor of `elements` elements cut in whole chunks of `chunk` (`elements` is a multiple of it).
pub fn part_in_chunks(elements: usize, chunk: usize, parts: usize, index: usize) -> Range<usize> {
    debug_assert!(elements.is_multiple_of(chunk), "{elements} elements are not whole chunks of {chunk}");
    let chunks = part(elements / chunk, parts, index);
    chunks.start * chunk..chunks.end * chunk
}

/// The overlap of two ranges; empty (at the larger start) if there is none.
pub fn overlap(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_are_even_whole_chunks_and_cover_all(chunks in 0usize..1000, parts in 1usize..40) {
            let mut next = 0;
            for index in 0..parts {
                let range = part_in_chunks(chunks * 8, 8, parts, index);
                prop_assert_eq!(range.start, next);
                prop_assert!(range.len() / 8 <= chunks / parts + 1 && range.len().is_multiple_of(8));
                next = range.end;
            }
            prop_assert_eq!(next, chunks * 8);
        }

        #[test]
        fn overlap_is_what_both_contain(a in 0usize..20, b in 0usize..20, c in 0usize..20, d in 0usize..20) {
            let shared = overlap(&(a..b), &(c..d));
            for i in 0..20 {
                prop_assert_eq!(shared.contains(&i), (a..b).contains(&i) && (c..d).contains(&i));
            }
        }
    }
}
