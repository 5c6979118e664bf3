//! Ctrl-C and SIGTERM.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

use crate::common::{TINY, command, dataset, run, train_args};

/// Starts a long run, waits for its first step, sends a signal, and gives exit code, stdout and stderr.
fn signalled(folder: &std::path::Path, signal: &str) -> (Option<i32>, String, String) {
    let args =
        train_args("a", &["--steps", "1000000", "--set", "checkpoint.every=0", "--set", "log.every=1000000"]);
    let mut child: Child =
        command(folder, &args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut text = String::new();
    while !text.contains("tok/s") {
        assert!(out.read_line(&mut text).unwrap() > 0, "ended before its first step: {text}");
    }
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    out.read_to_string(&mut text).unwrap();
    let done = child.wait_with_output().unwrap();
    (done.status.code(), text, String::from_utf8(done.stderr).unwrap())
}

#[test]
fn ctrl_c_saves_and_the_run_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (code, out, err) = signalled(folder.path(), "-INT");
    assert_eq!(code, Some(0), "{out}\n{err}");
    assert!(err.contains("after this step and a checkpoint"), "{err}");
    assert!(out.contains("checkpoint of ") && !out.contains("a sample of text"), "{out}");
    let stopped = out.lines().find_map(|line| line.strip_prefix("Stopped after step ")).unwrap();
    let step: u64 = stopped.split(' ').next().unwrap().parse().unwrap();
    assert!(out.contains("train --run a --resume"), "{out}");
    let steps = (step + 2).to_string();
    let resumed = run(folder.path(), 0, &["train", "--run", "a", "--resume", "--steps", &steps]).out;
    assert!(resumed.contains(&format!("resume  from the checkpoint of step {step}\n")), "{resumed}");
    assert!(resumed.contains(&format!("step {steps}/{steps}  loss ")), "{resumed}");
}

#[test]
fn sigterm_saves_and_asks_to_be_started_again() {
    let folder = tempfile::tempdir().unwrap();
    let (code, out, err) = signalled(folder.path(), "-TERM");
    assert_eq!(code, Some(20), "{out}\n{err}");
    run(folder.path(), 0, &["checkpoint", "verify", "a"]);
}

/// What is temporary does not stay.
#[test]
fn verify_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let data = format!("data.path={}", dataset().display());
    let args = ["verify", TINY, "--ranks", "2", "--steps", "100000", "--set", &data];
    for (signal, code) in [("-TERM", 143), ("-INT", 130)] {
        let mut command = command(folder.path(), &args);
        let mut child = command.env("TMPDIR", folder.path()).stdout(Stdio::piped()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut text = String::new();
        while !text.contains("step 1  loss") {
            assert!(out.read_line(&mut text).unwrap() > 0, "ended before its first step: {text}");
        }
        assert!(folder.path().read_dir().unwrap().next().is_some());
        Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        out.read_to_string(&mut text).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code));
        assert!(folder.path().read_dir().unwrap().next().is_none(), "{signal}");
    }
}
