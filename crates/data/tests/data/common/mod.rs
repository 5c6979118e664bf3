//! Shared by the integration tests: seeded damage, and small things to damage.

mod damage;
mod held;

pub use damage::Random;
pub use held::held;
use std::fs;
use std::path::{Path, PathBuf};
use unisono_data::{InputFormat, Manifest, PrepareOptions, Split, Tokenizer, prepare};

pub fn options() -> PrepareOptions {
    PrepareOptions {
        format: InputFormat::JsonLines,
        split: Split::Chunks { share: 0.25 },
        max_shard_tokens: 1_000,
        threads: 1,
    }
}

/// JSON lines of `documents` short texts.
pub fn lines(documents: usize) -> String {
    let line = |n: usize| {
        let text = format!("Document {n}. {}\\n", "The rest is silence. ".repeat(n % 7));
        format!("{{\"text\": \"{text}\"}}\n")
    };
    (0..documents).map(line).collect()
}

pub fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, text).unwrap();
    path
}

/// A small dataset in `folder`/data.
pub fn small_dataset(folder: &Path) -> (PathBuf, Manifest) {
    let input = write(folder, "input.jsonl", &lines(200));
    let out = folder.join("data");
    let tokenizer = Tokenizer::builtin().unwrap();
    let manifest = prepare(&[input], &tokenizer, &out, &options(), &mut |_| {}).unwrap();
    (out, manifest)
}
