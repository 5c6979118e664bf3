//! Cutting a stream of tokens into training sequences.

/// The target of a position that has none: the loss passes over it.
pub const IGNORE: u32 = u32::MAX;

/// One training sequence: `sequence_length` consecutive tokens of the concatenated documents, each
/// followed by the tokenizer's end-of-text token.
///
/// Attention is confined to a document: position `p` may look at `document_start[p]..=p`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sequence {
    /// Token ids, `[sequence_length]`.
    pub inputs: Vec<u32>,
    /// The token that follows each input, `[sequence_length]`; [`IGNORE`] after an end-of-text token, since
    /// the next document cannot be foreseen from within this one.
    pub targets: Vec<u32>,
    /// For each position the index, in this sequence, of the first token of its document, `[sequence_length]`.
    /// 0 for a document that began before the sequence.
    pub document_start: Vec<u32>,
    /// The UTF-8 bytes of text of all targets that are not ignored: what a loss in bits per byte divides by.
    pub target_bytes: u64,
}

/// The number of sequences in a stream of `tokens`: each needs one token more than its inputs, which
/// is the first of the next.
pub(crate) fn count(tokens: u64, sequence_length: usize) -> u64 {
    match sequence_length as u64 {
        0 => 0,
        length => tokens.saturating_sub(1) / length,
    }
}

impl Sequence {
    /// Derives everything from `inputs`, which holds `[sequence_length + 1]` tokens and gives up the last one.
    /// All ids must be below `token_bytes.len()`.
    pub(crate) fn derive(&mut self, eot_id: u32, token_bytes: &[u32]) {
        self.targets.clear();
        self.document_start.clear();
        self.target_bytes = 0;
        let mut start = 0;
        for (position, pair) in self.inputs.windows(2).enumerate() {
            let ends_document = pair[0] == eot_id;
            self.targets.push(if ends_document { IGNORE } else { pair[1] });
            self.document_start.push(start);
            if ends_document {
                start = position as u32 + 1;
            } else {
                self.target_bytes += u64::from(token_bytes[pair[1] as usize]);
            }
        }
        self.inputs.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_kept_apart() {
        let mut sequence = Sequence { inputs: vec![5, 0, 7, 8, 0, 0, 9], ..Sequence::default() };
        // Token 0 ends documents; token t stands for t bytes.
        sequence.derive(0, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(sequence.inputs, [5, 0, 7, 8, 0, 0]);
        assert_eq!(sequence.targets, [0, IGNORE, 8, 0, IGNORE, IGNORE]);
        assert_eq!(sequence.document_start, [0, 0, 2, 2, 2, 5]);
        assert_eq!(sequence.target_bytes, 8);
    }

    #[test]
    fn sequences_need_a_last_target() {
        assert_eq!([0, 1, 4, 5, 8, 9].map(|tokens| count(tokens, 4)), [0, 0, 0, 1, 1, 2]);
        assert_eq!(count(10, 0), 0);
    }
}
