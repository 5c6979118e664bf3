//! Copies between buffers.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::transport::Workers;

/// Bytes that one thread takes at a time; not more are copied at once by the caller.
const COPIED_AT_ONCE: usize = 256 << 10;
/// Up to so many bytes are taken to lie in another core's cache.
const CACHED: usize = 1 << 20;

/// Copies the stream of `pieces` into the stream of `ranges` of `target`, which are disjoint; both have the same total length.
pub(crate) fn copy_stream<'a>(
    pieces: impl Iterator<Item = &'a [u8]>,
    target: &mut [u8],
    ranges: &[Range<usize>],
    workers: &Workers,
) {
    let len = ranges.iter().map(Range::len).sum::<usize>();
    let copy = if len <= CACHED { copy_pages } else { copy };
    if len <= COPIED_AT_ONCE {
        return cut_stream(pieces, ranges, |range, piece| copy(piece, &mut target[range]));
    }
    let mut parts: Vec<(Range<usize>, &[u8])> = Vec::new();
    cut_stream(pieces, ranges, |range, piece| {
        let cut = range.clone().step_by(COPIED_AT_ONCE).zip(piece.chunks(COPIED_AT_ONCE));
        parts.extend(cut.map(|(start, piece)| (start..start + piece.len(), piece)));
    });
    parts.sort_unstable_by_key(|(range, _)| range.start);
    let (mut rest, mut before) = (target, 0);
    let mut copies = Vec::with_capacity(parts.len());
    for (range, piece) in parts {
        let (target, later) = rest[range.start - before..].split_at_mut(piece.len());
        (rest, before) = (later, range.end);
        copies.push(Mutex::new((target, piece)));
    }
    workers(copies.len(), &|index| {
        let (target, piece) = &mut *copies[index].lock().unwrap_or_else(PoisonError::into_inner);
        copy(piece, target);
    });
}

/// Calls `with` with each range to fill and what goes there.
fn cut_stream<'a>(
    pieces: impl Iterator<Item = &'a [u8]>,
    ranges: &[Range<usize>],
    mut with: impl FnMut(Range<usize>, &'a [u8]),
) {
    let mut ranges = ranges.iter().cloned();
    let mut free = 0..0;
    for mut piece in pieces {
        while !piece.is_empty() {
            while free.is_empty() {
                match ranges.next() {
                    Some(range) => free = range,
                    None => return,
                }
            }
            let (now, later) = piece.split_at(piece.len().min(free.len()));
            with(free.start..free.start + now.len(), now);
            free.start += now.len();
            piece = later;
        }
    }
}

/// A page of memory, in bytes.
const PAGE: usize = 4096;

/// A copy; in runs of 512 bytes where the target lies up to a cache line behind the source within their pages.
///
/// There one `memcpy` of 4 KiB to 1 MiB, which takes the C library's `rep movsb` path, is up to 10 times slower on some CPUs
/// (measured on Zen 3). Short runs never take it. Elsewhere they are slower, the more so the less of it is cached.
pub(crate) fn copy(source: &[u8], target: &mut [u8]) {
    const RUN: usize = 512;
    let behind = target.as_ptr().addr().wrapping_sub(source.as_ptr().addr()) % PAGE;
    if !(1..64).contains(&behind) {
        return target.copy_from_slice(source);
    }
    for (from, to) in source.chunks(RUN).zip(target.chunks_mut(RUN)) {
        to.copy_from_slice(from);
    }
}

/// A copy of eight pages in turn, for what another core may have just written: a CPU fetches ahead in all the pages that are
/// read side by side, but not past the end of one.
fn copy_pages(source: &[u8], target: &mut [u8]) {
    const PAGES: usize = 8;
    const RUN: usize = 256;
    let (sources, mut targets) = (source.chunks_exact(PAGES * PAGE), target.chunks_exact_mut(PAGES * PAGE));
    let rest = sources.remainder();
    for (from, to) in sources.zip(&mut targets) {
        for start in (0..PAGE).step_by(RUN) {
            for page in 0..PAGES {
                // At another place in each, so that no load seems to be of what was stored just before.
                let place = page * PAGE + (start + page * PAGE / PAGES) % PAGE;
                to[place..place + RUN].copy_from_slice(&from[place..place + RUN]);
            }
        }
    }
    copy(rest, targets.into_remainder());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::alone;

    #[test]
    fn large_streams_are_copied_in_parts_wherever_their_ranges_lie() {
        let bytes: Vec<u8> = (0..3 * COPIED_AT_ONCE + 5).map(|i| (i % 251) as u8).collect();
        let pieces = [&bytes[..7], &bytes[7..2 * COPIED_AT_ONCE], &bytes[2 * COPIED_AT_ONCE..]];
        let cut = COPIED_AT_ONCE + 3;
        let ranges = [bytes.len() - cut + 10..bytes.len() + 10, 4..bytes.len() - cut + 4];
        let mut target = vec![255; bytes.len() + 20];
        copy_stream(pieces.into_iter(), &mut target, &ranges, &|tasks, task| {
            assert!(tasks > 3);
            (0..tasks).rev().for_each(task);
        });
        let mut want = vec![255; bytes.len() + 20];
        want[ranges[0].clone()].copy_from_slice(&bytes[..cut]);
        want[ranges[1].clone()].copy_from_slice(&bytes[cut..]);
        assert!(target == want);
    }

    #[test]
    fn copies_are_whole_wherever_source_and_target_lie() {
        let bytes: Vec<u8> = (0..20 * PAGE).map(|i| (i % 251) as u8).collect();
        for (len, shift) in [(0, 0), (700, 1), (8 * PAGE, 63), (9 * PAGE + 5, 64), (17 * PAGE + 300, 130)] {
            for how in [copy, copy_pages] {
                let mut target = vec![255; 20 * PAGE];
                // So that the target lies `shift` behind the source within their pages.
                let gap =
                    bytes.as_ptr().addr().wrapping_sub(target.as_ptr().addr()).wrapping_add(shift) % PAGE;
                how(&bytes[..len], &mut target[gap..gap + len]);
                assert!(target[gap..gap + len] == bytes[..len], "{len} bytes, {shift} behind");
                assert!(target[..gap].iter().chain(&target[gap + len..]).all(|&byte| byte == 255));
            }
        }
    }

    #[test]
    fn streams_are_cut_anew_across_empty_pieces_and_ranges() {
        let bytes: Vec<u8> = (0..100).collect();
        let pieces = [&bytes[0..0], &bytes[0..7], &bytes[7..7], &bytes[7..10]];
        let mut target = [255u8; 12];
        copy_stream(pieces.into_iter(), &mut target, &[4..4, 8..12, 0..5, 5..6], &alone);
        assert_eq!(target, [4, 5, 6, 7, 8, 9, 255, 255, 0, 1, 2, 3]);
    }
}
