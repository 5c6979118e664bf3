//! A number that is not finite changes nothing that a run keeps, whatever the layout and the policy.

use unisono_train::config::{OnNonFinite, ReduceEvery};
use unisono_train::{Fault, RunConfig, RunOptions, StepHashes, TrainError, run_folder};

use crate::common::{Ran, config, try_run};

const POISONED: u64 = 3;
/// Ranks and what is sharded.
const LAYOUTS: [(usize, usize); 7] = [(1, 1), (2, 1), (4, 1), (4, 2), (1, 3), (2, 3), (4, 3)];

fn poisoned(config: &RunConfig, ranks: usize, fault: Fault) -> (tempfile::TempDir, Result<Ran, TrainError>) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut options = RunOptions::new(folder.path(), ranks, 1);
    options.fault = Some(fault);
    let ran = try_run(config, &options);
    (folder, ran)
}

/// Parameters, both moments and router biases after the step are those from before it, and not those of other steps.
fn assert_unmoved(what: &str, hashes: &[StepHashes]) {
    let at = POISONED as usize - 1;
    assert_eq!(hashes[at].step, POISONED);
    assert_eq!(hashes[at].tensors, hashes[at - 1].tensors, "{what}: the poisoned step moved a tensor");
    assert!(hashes[at].tensors.iter().any(|(name, _)| name.ends_with("router_bias")));
    assert_ne!(hashes[at - 1].tensors, hashes[at - 2].tensors, "{what}: no step moves anything");
}

/// Skips the poisoned step on every layout: ranks that hold copies compute on them in later steps, which must agree too.
fn check_skip(fault: Fault, is_poisoned: impl Fn(f64, f64) -> bool) {
    let mut config = config();
    (config.train.on_non_finite, config.train.reduce_every) = (OnNonFinite::Skip, ReduceEvery::Microbatch);
    let mut all = Vec::new();
    for (ranks, zero) in LAYOUTS {
        let what = format!("{fault:?}, {ranks} ranks, ZeRO-{zero}");
        config.layout.zero = zero;
        let (_folder, ran) = poisoned(&config, ranks, fault);
        let ran = ran.expect("it skips the step");
        let step = &ran.steps[POISONED as usize - 1];
        assert!(step.skipped && is_poisoned(step.loss, step.grad_norm), "{what}: {step:?}");
        assert_eq!((ran.summary.skipped_steps, ran.steps.len()), (1, 6), "{what}");
        assert_unmoved(&what, &ran.hashes);
        assert_ne!(
            ran.hashes[POISONED as usize].tensors,
            ran.hashes[POISONED as usize - 1].tensors,
            "{what}"
        );
        all.push((what, ran.hashes));
    }
    for (what, hashes) in &all[1..] {
        assert_eq!(hashes, &all[0].1, "{what}");
    }
}

#[test]
fn a_skipped_gradient_moves_no_tensor_of_any_rank() {
    check_skip(Fault::PoisonGradient { step: POISONED }, |loss, norm| loss.is_finite() && norm.is_nan());
}

#[test]
fn a_loss_alone_is_enough_and_moves_no_tensor_of_any_rank() {
    check_skip(Fault::PoisonLoss { step: POISONED }, |loss, norm| loss == f64::INFINITY && norm.is_finite());
}

#[test]
fn a_run_that_halts_leaves_every_tensor_as_it_was() {
    let mut config = config();
    config.train.on_non_finite = OnNonFinite::Halt;
    for fault in [Fault::PoisonGradient { step: POISONED }, Fault::PoisonLoss { step: POISONED }] {
        for (ranks, zero) in [(1, 1), (2, 1), (4, 1), (4, 3)] {
            config.layout.zero = zero;
            let what = format!("{fault:?}, {ranks} ranks, ZeRO-{zero}");
            let (folder, ran) = poisoned(&config, ranks, fault);
            let error = ran.err().expect("it halts");
            assert!(matches!(error, TrainError::NonFinite { step: POISONED, .. }), "{what}: {error}");
            let hashes = run_folder::read_hashes(folder.path()).expect("the run wrote its hashes");
            assert_eq!(hashes.len() as u64, POISONED, "{what}");
            assert_unmoved(&what, &hashes);
        }
    }
}
