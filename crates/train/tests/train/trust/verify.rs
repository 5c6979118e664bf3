//! The check of a layout before a long run.

use unisono_train::{Fault, RunOptions, verify_on};

use crate::common::{Quiet, config, dataset};

#[test]
fn a_layout_that_keeps_the_contract_is_found_identical() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let options = RunOptions::new(folder.path(), 4, 1);
    let comparison = verify_on(&config(), 2, &options, dataset(), &Quiet).expect("both runs succeed");
    let comparison = comparison.expect("rank 0 is here");
    assert!(comparison.is_equal(), "{}", comparison.render());
    assert_eq!((comparison.steps, comparison.hashed, &comparison.checkpoints[..]), (2, 2, &[2][..]));
}

#[test]
fn a_planted_fault_fails_the_check_and_the_tensor_is_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut options = RunOptions::new(folder.path(), 2, 1);
    // The first gradient that is not zero is one of the embedding.
    options.fault = Some(Fault::NudgeGradient { step: 1, element: 0 });
    let mut config = config();
    // A clip, or a second step, could round the nudge away.
    config.train.clip_norm = 0.0;
    let comparison = verify_on(&config, 1, &options, dataset(), &Quiet).expect("both runs succeed");
    let comparison = comparison.expect("rank 0 is here");
    assert!(!comparison.is_equal());
    assert_eq!(comparison.first_step(), Some(1));
    let text = comparison.render();
    assert!(text.starts_with("different from step 1 on\n"), "{text}");
    assert_eq!(text.matches("\n  first ").count(), 1, "{text}");
    assert!(text.contains("\n  then in the checkpoint of step 1: "), "{text}");
    let [hash, tensor] =
        [&comparison.hash, &comparison.tensor].map(|found| found.as_ref().expect("a tensor"));
    assert!(hash.text.starts_with("tensor ") && hash.text.ends_with("embed"), "{text}");
    assert!(tensor.text.contains("embed, element "), "{text}");
}
