//! The check of a layout before a long run.

use unisono_train::{Fault, RunOptions, verify_on};

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
    options.fault = Some(Fault::NudgeGradient { step: 2, element: 0 });
    let comparison = verify_on(&config(), 3, &options, dataset(), &Quiet).expect("both runs succeed");
    assert!(!comparison.is_equal());
    assert_eq!(comparison.first_step(), Some(2));
    let (hash, tensor) = (comparison.hash.as_ref(), comparison.tensor.as_ref());
    let name = hash.and_then(|found| found.text.strip_prefix("tensor ")).expect("a tensor is named");
    let parameter = name.trim_start_matches("optimizer.first.").trim_start_matches("optimizer.second.");
    assert!(parameter.starts_with("embed"), "element 0 is of the embedding: {name}");
    assert!(tensor.is_some_and(|found| found.step == 3 && found.text.contains(", element ")), "{tensor:?}");
    let text = comparison.render();
    assert!(text.starts_with("different from step 2 on\n") && text.contains(name), "{text}");
}
