//! Documents in pieces: where text is cut, and which part a piece belongs to.

use crate::dataset::Part;
use crate::error::{DataError, Result};

/// The size of the pieces that [`Split::Chunks`] deals out, in bytes of text (each ends at the next
/// good place, so most are a little longer).
pub(crate) const CHUNK_BYTES: usize = 16 << 10;
/// The size of pieces that only bound memory, in bytes of text.
pub(crate) const PIECE_BYTES: usize = 1 << 20;
/// How much of a document decides its part under [`Split::Documents`], in bytes.
const HASHED_BYTES: usize = 4 << 10;

/// How text is divided into training and validation parts. Deterministic, and the same for the same
/// inputs in the same order, whatever the number of threads.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "by", rename_all = "snake_case", deny_unknown_fields)]
pub enum Split {
    /// Everything is for training.
    None,
    /// Every document goes to validation with odds of `share`, by the BLAKE3 hash of its first 4,096 bytes:
    /// documents keep their part when others are added, and copies stay together.
    Documents {
        /// The expected share of validation documents, above 0 and below 1.
        share: f64,
    },
    /// Long documents are cut at line ends into chunks of about 16 KiB (a shorter document is one
    /// chunk), and evenly spaced chunks go to validation; where that leaves a part empty, into smaller
    /// ones. Works with any number of documents and represents all of them. A run of chunks in the same
    /// part counts as one document there.
    Chunks {
        /// The share of validation chunks, above 0 and below 1.
        share: f64,
    },
}

impl Split {
    /// Refuses shares that leave a part empty by construction.
    pub(crate) fn check(self) -> Result<()> {
        match self {
            Self::Documents { share } | Self::Chunks { share } if !(share > 0.0 && share < 1.0) => {
                Err(DataError::Request(format!(
                    "a validation share of {share} is not between 0 and 1, both excluded"
                )))
            }
            _ => Ok(()),
        }
    }

    /// The size of pieces that leaves no part of `bytes` of text empty where [`Self::piece_bytes`] does, in bytes.
    pub(crate) fn smaller_piece_bytes(self, bytes: u64) -> Option<usize> {
        let Self::Chunks { share } = self else { return None };
        // Pieces may come out at twice their size.
        let target = (bytes as f64 * share.min(1.0 - share) / 2.0) as usize;
        (target < CHUNK_BYTES).then_some(target.max(1))
    }

    /// The size of pieces a document is cut into, in bytes.
    pub(crate) fn piece_bytes(self) -> usize {
        match self {
            Self::Chunks { .. } => CHUNK_BYTES,
            Self::None | Self::Documents { .. } => PIECE_BYTES,
        }
    }
}

/// A part of a document, small enough to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) text: String,
    /// Whether the document ends here.
    pub(crate) last: bool,
}

/// Assigns the pieces of documents, in order, to parts.
#[derive(Clone, Debug)]
pub(crate) struct Dealer {
    split: Split,
    chunks: u64,
    /// The part of the document under way, from its first piece on.
    document: Option<Part>,
}

impl Dealer {
    pub(crate) fn new(split: Split) -> Self {
        Self { split, chunks: 0, document: None }
    }

    pub(crate) fn part(&mut self, piece: &Piece) -> Part {
        let part = match (self.split, self.document) {
            // What marks no more than the end of a document is no chunk of its own.
            (Split::Chunks { .. }, Some(part)) if piece.text.is_empty() => part,
            (Split::Chunks { share }, _) => self.next_chunk(share),
            (_, Some(part)) => part,
            (Split::Documents { share }, None) => by_hash(&piece.text, share),
            (Split::None, None) => Part::Train,
        };
        self.document = (!piece.last).then_some(part);
        part
    }

    /// Chunk i is for validation when the share's running total, started at a half, crosses a whole number.
    fn next_chunk(&mut self, share: f64) -> Part {
        let total = |chunks: u64| (chunks as f64 * share + 0.5).floor();
        let crossed = total(self.chunks + 1) > total(self.chunks);
        self.chunks += 1;
        if crossed { Part::Validation } else { Part::Train }
    }
}

fn by_hash(text: &str, share: f64) -> Part {
    let bytes = text.as_bytes();
    let hash = blake3::hash(&bytes[..bytes.len().min(HASHED_BYTES)]);
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    // 53 bits are exact in an f64.
    let fraction = (u64::from_le_bytes(first) >> 11) as f64 / (1_u64 << 53) as f64;
    if fraction < share { Part::Validation } else { Part::Train }
}

/// Where to cut `text` after at least `target` and at most about `2 * target` bytes: at the start of a line, by preference
/// one between two lines that are not blank, else between two characters. `None` when all of `text` is to stay
/// together.
///
/// At the preferred places byte-level tokenizers give the same tokens for the pieces as for the whole: none
/// joins a single line break with what follows it. (GPT-2's treats the last of several line breaks
/// apart when text follows, so a cut behind a blank line may change one token.)
pub(crate) fn cut(text: &str, target: usize) -> Option<usize> {
    let farthest = 2 * target;
    // A whole character must stand behind the window, so that the answer depends on nothing later.
    if text.len() <= farthest + 8 {
        return None;
    }
    let (begin, end) = (char_boundary(text, target), char_boundary(text, farthest));
    let solid = |c: Option<char>| c.is_some_and(|c| !c.is_whitespace());
    let line_starts = || {
        let breaks = text[begin..end].match_indices('\n').map(|(at, _)| begin + at);
        breaks.filter(|at| solid(text[at + 1..].chars().next()))
    };
    let best =
        line_starts().find(|at| solid(text[..*at].chars().next_back())).or_else(|| line_starts().next());
    Some(best.map_or(end, |at| at + 1))
}

/// The first character boundary at or after byte `at`.
pub(crate) fn char_boundary(text: &str, at: usize) -> usize {
    (at..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len())
}

/// Gives `text` to `sink` in pieces, the last one marked.
pub(crate) fn pieces_of(text: &str, target: usize, sink: &mut dyn FnMut(Piece) -> Result<()>) -> Result<()> {
    let mut rest = text;
    while let Some(at) = cut(rest, target) {
        sink(Piece { text: rest[..at].to_string(), last: false })?;
        rest = &rest[at..];
    }
    sink(Piece { text: rest.to_string(), last: true })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(text: &str, target: usize) -> Vec<Piece> {
        let mut pieces = Vec::new();
        pieces_of(text, target, &mut |piece| {
            pieces.push(piece);
            Ok(())
        })
        .unwrap();
        pieces
    }

    proptest! {
        #[test]
        fn pieces_make_up_the_text(text in "[a-b \n\u{e9}\u{4e2d}]{0,400}", target in 4_usize..60) {
            let pieces = all(&text, target);
            prop_assert_eq!(pieces.iter().map(|piece| piece.text.as_str()).collect::<String>(), text);
            prop_assert!(pieces.iter().all(|piece| piece.text.len() <= 2 * target + 8));
            let lasts: Vec<bool> = pieces.iter().rev().map(|piece| piece.last).collect();
            prop_assert!(lasts[0] && !lasts[1..].contains(&true));
        }

        #[test]
        fn chunks_hold_their_share(share in 0.01_f64..0.99, chunks in 1_u64..2_000) {
            let mut dealer = Dealer::new(Split::Chunks { share });
            let piece = Piece { text: "x".into(), last: false };
            let validation = (0..chunks).filter(|_| dealer.part(&piece) == Part::Validation).count();
            prop_assert!((validation as f64 - share * chunks as f64).abs() <= 1.0);
        }
    }

    #[test]
    fn cuts_prefer_line_starts() {
        assert_eq!(cut("0123456789\n\nab\ncdefghijklmnopqrst", 10), Some(15));
        assert_eq!(cut("0123456789\n\n ab\n\ncdefghijklmnopqrst", 10), Some(17));
        assert_eq!(cut("0123456789abcdef\n \nghijklmnopqrs", 10), Some(19));
        assert_eq!(cut("0123456789abcdefghijklmnopqrstu", 10), Some(20));
        assert_eq!(cut("0123456789\nabcdefghijklmnopq", 10), None);
    }

    #[test]
    fn documents_keep_their_part_over_pieces_and_copies() {
        let mut dealer = Dealer::new(Split::Documents { share: 0.5 });
        let mut validation = 0;
        for number in 0..1_000 {
            let first = dealer.part(&Piece { text: format!("document {number}"), last: false });
            assert_eq!(dealer.part(&Piece { text: "more".into(), last: true }), first);
            assert_eq!(dealer.part(&Piece { text: format!("document {number}"), last: true }), first);
            validation += u32::from(first == Part::Validation);
        }
        // 500 expected, standard deviation 16.
        assert!((420..580).contains(&validation), "{validation}");
    }

    #[test]
    fn shares_outside_the_open_interval_are_refused() {
        for share in [0.0, 1.0, -0.1, f64::NAN, f64::INFINITY] {
            assert!(Split::Chunks { share }.check().is_err() && Split::Documents { share }.check().is_err());
        }
        assert!(Split::None.check().is_ok() && Split::Chunks { share: 0.04 }.check().is_ok());
    }
}
