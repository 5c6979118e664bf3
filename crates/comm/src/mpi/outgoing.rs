//! What one rank sends another in a call: pieces, as few and large blocks.

use std::ops::Range;

use super::wire::MOST_BLOCKS;
use crate::part::Piece;

/// Smaller pieces are copied together: a message costs about as much as a copy of this size.
const PACK_BYTES: usize = 16 << 10;

/// Between nodes, payloads that are larger in both directions wait for each other's headers, see [`Held`]. Smaller ones
/// leave at once: they save half a round trip.
pub(super) const BOTH_WAYS_BYTES: u64 = 128 << 10;

/// Payload that was announced and is not sent yet.
///
/// Over TCP all that goes to a rank shares one connection. A large message starts with a question, and the receiver's
/// answer would stand in line behind the payload that it is itself sending: two ranks that send each other much would do
/// so one after the other. So both must have asked before either answers. A rank sends only when the other's header says
/// that it takes part, and names the place for the other's payload, which answers, after it has sent its own question.
pub(super) struct Held {
    pub blocks: Vec<Block>,
    /// The tag of its first message.
    pub first_tag: u32,
}

/// Consecutive bytes of a stream.
pub(super) enum Block {
    /// Sent from where they are.
    Piece(Piece),
    /// Small pieces, copied together.
    Packed(Vec<u8>),
}

impl Block {
    pub fn len(&self) -> usize {
        match self {
            Self::Piece(piece) => piece.len(),
            Self::Packed(bytes) => bytes.len(),
        }
    }
}

/// The stream of `pieces` in blocks, at most [`MOST_BLOCKS`]; only small pieces are copied.
pub(super) fn blocks(pieces: Vec<Piece>) -> Vec<Block> {
    let mut limit = PACK_BYTES;
    while count(&pieces, limit) > MOST_BLOCKS {
        limit *= 4;
    }
    let mut blocks = Vec::new();
    for run in runs(&pieces, limit) {
        match &pieces[run] {
            [piece] => blocks.push(Block::Piece(piece.clone())),
            many => {
                let parts: Vec<&[u8]> = many.iter().map(Piece::bytes).collect();
                blocks.push(Block::Packed(parts.concat()));
            }
        }
    }
    blocks.retain(|block| block.len() > 0);
    blocks
}

fn count(pieces: &[Piece], limit: usize) -> usize {
    runs(pieces, limit).count()
}

/// Ranges of pieces that make a block each: large ones alone, small ones together.
fn runs(pieces: &[Piece], limit: usize) -> impl Iterator<Item = Range<usize>> {
    let mut next = 0;
    std::iter::from_fn(move || {
        let start = next;
        let mut bytes = 0;
        while next < pieces.len() && pieces[next].len() < limit && bytes < 16 * limit {
            bytes += pieces[next].len();
            next += 1;
        }
        if next == start && next < pieces.len() {
            next += 1;
        }
        (next > start).then_some(start..next)
    })
}

/// `0..len` in chunks of at most `chunk` bytes.
pub(super) fn chunks(len: usize, chunk: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(chunk).map(move |start| start..len.min(start + chunk))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::part::Part;

    #[test]
    fn blocks_are_the_stream_and_large_pieces_are_not_copied() {
        let bytes: Arc<Vec<u8>> = Arc::new((0..200_000u32).map(|i| (i % 251) as u8).collect());
        let cuts = [0, 10, 10, 40_000, 40_001, 40_002, 90_000, 90_010, 90_010, 200_000];
        let pieces: Vec<Piece> = cuts
            .windows(2)
            .map(|cut| Part::<u8>::new(Arc::clone(&bytes), cut[0]..cut[1]).into_piece())
            .collect();
        let blocks = blocks(pieces);
        let lens: Vec<usize> = blocks.iter().map(Block::len).collect();
        assert_eq!(lens, [10, 39_990, 2, 49_998, 10, 109_990]);
        let stream: Vec<u8> = blocks
            .iter()
            .flat_map(|block| match block {
                Block::Piece(piece) => piece.bytes().to_vec(),
                Block::Packed(bytes) => bytes.clone(),
            })
            .collect();
        assert!(stream == *bytes);
        assert!(matches!(&blocks[1], Block::Piece(piece) if piece.bytes().as_ptr() == bytes[10..].as_ptr()));
    }

    #[test]
    fn there_are_never_more_blocks_than_a_header_tells() {
        let bytes = Arc::new(vec![1u8; 40_000 * 300]);
        let piece = |i: usize| Part::<u8>::new(Arc::clone(&bytes), i * 40_000..(i + 1) * 40_000).into_piece();
        let blocks = blocks((0..300).map(piece).collect());
        assert!(blocks.len() <= MOST_BLOCKS);
        assert_eq!(blocks.iter().map(Block::len).sum::<usize>(), bytes.len());
    }

    #[test]
    fn chunks_cover_everything_once() {
        assert_eq!(chunks(10, 4).collect::<Vec<_>>(), [0..4, 4..8, 8..10]);
        assert_eq!(chunks(0, 4).count(), 0);
    }
}
