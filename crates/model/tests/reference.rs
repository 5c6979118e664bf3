//! Every tensor of forward and backward against the PyTorch reference in `fixtures/`.

mod common;

use common::pass::{Tensors, every_tensor};
use common::{Reference, compare, run};
use unisono_model::Recompute;

fn check(case: &str, recompute: Recompute) {
    run(case, recompute, |case| {
        let ours = every_tensor(&case)?;
        compare_all(&case.reference, ours);
        Ok(())
    });
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

#[test]
fn everything_on() {
    for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
        check("full", recompute);
    }
}

#[test]
fn softmax_scores_and_tied_embeddings() {
    check("softmax_tied", Recompute::Selective);
}

#[test]
fn dense_layers_only() {
    check("dense", Recompute::Selective);
}

#[test]
fn one_expert_a_token_beside_two_shared_ones() {
    check("top1_shared2", Recompute::Selective);
}

#[test]
fn group_limited_softmax() {
    check("softmax_groups", Recompute::None);
}
