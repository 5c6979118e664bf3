//! Running the binary in a folder of its own.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use tempfile::TempDir;

/// The smallest example.
pub const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/tiny.toml");

/// A command that ended.
pub struct Done {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
    }
}

/// The binary, in `folder`.
pub fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_unisono"));
    command.args(args).current_dir(folder).stdin(Stdio::null());
    command
}

/// Runs it and expects exit code `code`.
pub fn run(folder: &Path, code: i32, args: &[&str]) -> Done {
    let done = Done::from(command(folder, args).output().unwrap());
    assert_eq!(done.code, code, "{args:?}\n{}\n{}", done.out, done.err);
    done
}

/// `unisono train` with the smallest example on the small dataset, in a run folder.
pub fn train(folder: &Path, run_folder: &str, more: &[&str]) -> Done {
    run(folder, 0, &train_args(run_folder, more))
}

/// The arguments of [`train`].
pub fn train_args<'a>(run_folder: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    static PATH: OnceLock<String> = OnceLock::new();
    let path = PATH.get_or_init(|| format!("data.path={}", dataset().display()));
    let mut args = vec!["train", TINY, "--run", run_folder, "--set", path];
    args.extend(more);
    args
}

/// A small text with words that repeat.
pub fn small_text() -> String {
    let words = ["the", "king", "and", "queen", "of", "england", "went", "to", "see", "a", "ship"];
    let mut state = 1u64;
    let mut word = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        words[(state >> 33) as usize % words.len()]
    };
    (0..4_000).map(|_| format!("{} {} {} {} {}.\n", word(), word(), word(), word(), word())).collect()
}

/// A dataset that all tests share: the built-in text takes seconds to encode.
pub fn dataset() -> &'static Path {
    static DATASET: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = DATASET.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("small.txt"), small_text()).unwrap();
        run(folder.path(), 0, &["data", "prepare", "small.txt", "--out", "small", "--validation", "0.25"]);
        let path = folder.path().join("small");
        (folder, path)
    });
    path
}

/// A small Qwen3 with experts, in `folder/name/config.json`, with these fields instead or besides.
pub fn write_qwen(folder: &Path, name: &str, fields: &str) {
    std::fs::create_dir_all(folder.join(name)).unwrap();
    let config = format!(
        r#"{{"model_type":"qwen3_moe","num_hidden_layers":2,"hidden_size":64,"vocab_size":512,"num_attention_heads":4,
        "num_key_value_heads":2,"head_dim":16,"intermediate_size":128,"moe_intermediate_size":32,"num_experts":8,
        "num_experts_per_tok":2,"rope_theta":1000000.0,"rms_norm_eps":1e-06,"norm_topk_prob":false{fields}}}"#
    );
    std::fs::write(folder.join(name).join("config.json"), config).unwrap();
}
