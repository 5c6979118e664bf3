//! Every tensor of forward and backward against the PyTorch reference in `fixtures/`.

use crate::common::pass::{Tensors, every_tensor};
use crate::common::{Reference, compare, every_fixture, run};
use unisono_model::Recompute;

fn check(case: &str) {
    for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
        run(case, recompute, |case| {
            let ours = every_tensor(&case)?;
            compare_all(&case.reference, ours);
            Ok(())
        });
    }
}

/// What is not a parameter or another input.
fn is_result(name: &str) -> bool {
    name.starts_with("grad.") || name.starts_with("loss.") || name.contains("act.")
}

/// Every result of the reference with ours; neither side may have one that the other lacks.
fn compare_all(reference: &Reference, mut ours: Tensors) {
    let words = reference.words.iter().map(|(name, words)| (name, words.iter().map(|w| *w as f32).collect()));
    let floats = reference.floats.iter().map(|(name, values)| (name, values.clone()));
    let results = floats.chain(words).filter(|(name, _): &(&String, Vec<f32>)| is_result(name));
    for (name, theirs) in results {
        match ours.remove(name) {
            Some(ours) => compare(name, &ours, &theirs),
            None => panic!("a pass does not give {name}"),
        }
    }
    assert!(ours.is_empty(), "the reference lacks {:?}", ours.keys());
}

every_fixture!(check);
