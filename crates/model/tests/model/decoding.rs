//! Decoding with a cache of keys and values against the logits of the PyTorch reference in `fixtures/`.

use std::ops::Range;

use crate::common::{Case, compare, every_fixture, run};
use unisono_comm::CommError;
use unisono_model::{Batch, Decoder, Recompute};

/// The rows of every document of a batch.
fn documents(batch: &Batch) -> Vec<Range<usize>> {
    let first = |row: usize| row - row % batch.sequence_length + batch.document_start[row] as usize;
    let mut firsts: Vec<usize> = (0..batch.inputs.len()).map(first).collect();
    firsts.dedup();
    let ends = firsts[1..].iter().copied().chain([batch.inputs.len()]);
    firsts.iter().copied().zip(ends).map(|(first, end)| first..end).collect()
}

/// Logits after each piece of `tokens`, decoded in pieces of at most `piece`.
fn decode(case: &Case, tokens: &[u32], piece: usize) -> Result<Vec<Vec<f32>>, CommError> {
    let decoder = Decoder::new(&case.model, &case.parameters);
    let mut cache = decoder.cache(tokens.len());
    tokens.chunks(piece).map(|tokens| decoder.advance(&mut cache, tokens)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Decodes every document of a case by itself. It stands elsewhere in its sequence in the reference: only distances
/// between its tokens count.
fn check(case: &str) {
    run(case, Recompute::Selective, |case| {
        let vocab = case.reference.model.vocab_size;
        let theirs = &case.reference.floats["act.logits"];
        for rows in documents(&case.batch) {
            let tokens = &case.batch.inputs[rows.clone()];
            let one_by_one = decode(&case, tokens, 1)?;
            for (row, logits) in rows.clone().zip(&one_by_one) {
                compare(&format!("logits of row {row}"), logits, &theirs[row * vocab..(row + 1) * vocab]);
            }
            for piece in [3, tokens.len()] {
                let last = (0..tokens.len()).filter(|at| (at + 1) % piece == 0 || at + 1 == tokens.len());
                let logits = decode(&case, tokens, piece)?;
                assert_eq!(logits.len(), tokens.len().div_ceil(piece));
                for (at, logits) in last.zip(&logits) {
                    let row = rows.start + at;
                    assert_eq!(bits(logits), bits(&one_by_one[at]), "row {row} in pieces of {piece}");
                }
            }
        }
        Ok(())
    });
}

every_fixture!(check);
