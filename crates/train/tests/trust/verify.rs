//! The check of a layout before a long run.

use unisono_train::{Fault, RunOptions, reference_folder, run_folder, verify_on};

use crate::common::{Quiet, config, dataset};

#[test]
fn a_layout_that_keeps_the_contract_is_found_identical() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let options = RunOptions::new(folder.path(), 4, 1);
    let comparison = verify_on(&config(), 2, &options, dataset(), &Quiet).expect("both runs succeed");
    assert!(comparison.is_equal(), "{}", comparison.render());
    assert_eq!((comparison.steps, comparison.hashed, &comparison.checkpoints[..]), (2, 2, &[2][..]));
}

#[test]
fn a_planted_fault_fails_the_check_and_the_tensor_is_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut options = RunOptions::new(folder.path(), 2, 1);
    // Behind the embedding, whose rows mostly have no gradient.
    options.fault = Some(Fault::NudgeGradient { step: 1, element: 20 * 4096 + 1 });
    let comparison = verify_on(&config(), 2, &options, dataset(), &Quiet).expect("both runs succeed");
    assert!(!comparison.is_equal());
    assert_eq!(comparison.first_step(), Some(1));
    let found = comparison.hash.as_ref().map(|found| (found.step, found.text.strip_prefix("tensor ")));
    let Some((1, Some(name))) = found else { panic!("no tensor is named: {}", comparison.render()) };
    let hashes = run_folder::read_hashes(&reference_folder(folder.path())).expect("the reference's hashes");
    assert!(hashes[0].tensors.iter().any(|(tensor, _)| tensor == name), "{name}");
    let tensor = comparison.tensor.as_ref().expect("the last checkpoint differs, too");
    assert!(tensor.step == 2 && tensor.text.contains(", element "), "{}", tensor.text);
    let text = comparison.render();
    assert!(text.starts_with("different from step 1 on\n") && text.contains(name), "{text}");
}
