//! `unisono verify`.

use crate::common::{TINY, dataset, run};

#[test]
fn a_layout_is_checked_before_a_long_run() {
    let folder = tempfile::tempdir().unwrap();
    let data = format!("data.path={}", dataset().display());
    let args = ["verify", TINY, "--ranks", "4", "--steps", "2", "--set", &data];
    let done = run(folder.path(), 0, &args);
    for part in [
        "2 steps with 1 rank of 4 threads\n  step 1  loss ",
        "2 steps with 4 ranks of 1 thread\n  step 1  loss ",
        "identical\n  compared: steps with metrics: 2, with hashes: 2; checkpoints: 1, the last of step 2\n",
        "of each step: losses, gradient norm, routing counts, parameters, optimizer moments, balance bias",
    ] {
        assert!(done.out.contains(part), "no {part:?} in\n{}", done.out);
    }
    assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none(), "nothing is left here");

    let kept = run(folder.path(), 0, &[&args[..], &["--run", "both", "--threads", "1"]].concat()).out;
    assert!(
        kept.contains("both runs are kept: ") && kept.contains(" diff both/reference both/verified\n"),
        "{kept}"
    );
    run(folder.path(), 0, &["diff", "both/reference", "both/verified"]);
    let taken = run(folder.path(), 2, &[&args[..], &["--run", "both"]].concat());
    assert!(taken.err.contains("both is there already"), "{}", taken.err);
    let refused = run(folder.path(), 2, &["verify", TINY, "--ranks", "3"]);
    assert!(refused.err.contains("ranks = 3 does not divide the grid's slots"), "{}", refused.err);
    let refused = run(folder.path(), 2, &["verify", TINY, "--ranks", "2", "--nodes", "3"]);
    assert!(
        refused.err.contains("nodes of [3] ranks do not make 2 ranks") && refused.out.is_empty(),
        "{}",
        refused.err
    );
}
