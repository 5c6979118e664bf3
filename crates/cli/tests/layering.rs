//! The invariants of ARCHITECTURE.md, held against the tree: who may use whom, and what is absent where.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Each crate with the crates it may use.
const MAY_USE: [(&str, &[&str]); 9] = [
    ("mesh", &[]),
    ("plan", &["mesh"]),
    ("comm", &["mesh"]),
    ("tensor", &[]),
    ("model", &["mesh", "plan", "comm", "tensor"]),
    ("data", &[]),
    ("checkpoint", &["mesh"]),
    ("train", &["mesh", "plan", "comm", "tensor", "model", "data", "checkpoint"]),
    ("cli", &["mesh", "plan", "comm", "tensor", "model", "data", "checkpoint", "train"]),
];

fn crates() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("crates/cli has a parent").to_path_buf()
}

fn sources(krate: &str) -> Vec<(PathBuf, String)> {
    fn walk(folder: &Path, found: &mut Vec<(PathBuf, String)>) {
        for entry in fs::read_dir(folder).expect("a source folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).expect("a source file");
                // Unit tests stand at the end of a file and may do what they like.
                let text = text.split("\n#[cfg(test)]\nmod").next().unwrap_or_default().to_string();
                found.push((path, text));
            }
        }
    }
    let mut found = Vec::new();
    walk(&crates().join(krate).join("src"), &mut found);
    assert!(!found.is_empty(), "{krate} has no sources");
    found
}

/// No code line (comments aside) of these crates contains any of these words.
fn assert_absent(krates: &[&str], words: &[&str], except: &[&str]) {
    for krate in krates {
        for (path, text) in sources(krate) {
            if except.iter().any(|name| path.ends_with(name)) {
                continue;
            }
            for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
                for word in words {
                    assert!(!line.contains(word), "{}: `{word}` in `{}`", path.display(), line.trim());
                }
            }
        }
    }
}

#[test]
fn crates_use_only_crates_above_them() {
    let allowed: BTreeMap<_, _> = MAY_USE.into_iter().collect();
    for entry in fs::read_dir(crates()).expect("the workspace").flatten() {
        let krate = entry.file_name().to_string_lossy().into_owned();
        let may_use =
            allowed.get(krate.as_str()).unwrap_or_else(|| panic!("ARCHITECTURE.md does not place {krate}"));
        let manifest = fs::read_to_string(entry.path().join("Cargo.toml")).expect("a manifest");
        let dependencies = manifest.split("\n[dependencies]").nth(1).unwrap_or_default();
        let dependencies = dependencies.split("\n[").next().unwrap_or_default();
        for line in dependencies.lines().filter_map(|line| line.strip_prefix("unisono-")) {
            let used = line.split(['.', ' ', '=']).next().unwrap_or_default();
            assert!(may_use.contains(&used), "{krate} uses {used}, which is not above it");
        }
    }
}

#[test]
fn pure_crates_open_no_file_read_no_clock_and_start_no_thread() {
    assert_absent(&["mesh", "plan"], &["std::fs", "std::time", "std::thread", "std::env", "std::net"], &[]);
}

#[test]
fn only_the_command_line_knows_arguments_terminals_and_exit_codes() {
    let libraries = ["mesh", "plan", "comm", "tensor", "model", "data", "checkpoint", "train"];
    let words = ["clap", "indicatif", "println!", "eprintln!", "process::exit", "IsTerminal"];
    assert_absent(&libraries, &words, &[]);
    // What a launcher says, it says there.
    assert_absent(&libraries, &["std::env::"], &["src/mpi/launcher.rs"]);
}

#[test]
fn unsafe_is_only_in_kernels_and_in_calls_to_mpi() {
    let libraries = ["mesh", "plan", "comm", "model", "data", "checkpoint", "train", "cli"];
    assert_absent(
        &libraries,
        &["unsafe {", "unsafe fn", "unsafe impl"],
        &["src/mpi/raw.rs", "src/mpi/native.rs"],
    );
}

#[test]
fn layers_name_no_device() {
    assert_absent(&["model"], &["Cpu", "cpu::", "gemm::"], &["src/dispatch/tests.rs"]);
}

#[test]
fn checkpoints_handle_bytes_and_no_tensor() {
    assert_absent(&["checkpoint"], &["unisono_tensor", "unisono_model"], &[]);
}

#[test]
fn files_stay_readable() {
    for (krate, _) in MAY_USE {
        for (path, text) in sources(krate) {
            let lines = text.lines().count();
            assert!(lines <= 800, "{} has {lines} lines: it is probably two rooms", path.display());
        }
    }
}
