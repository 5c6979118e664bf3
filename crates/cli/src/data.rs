//! `unisono data`

use std::path::Path;
use std::time::Instant;

use unisono_data::{
    Dataset, InputFormat, Manifest, Part, PrepareOptions, Split, Tokenizer, Verify, discard_unfinished,
    prepare,
};
use unisono_train::system::readable;

use crate::args::{Data, Format, Prepare};
use crate::error::{CliError, DONE, check_file};
use crate::layout::cores;
use crate::screen::{Screen, say};
use crate::signals::clean_up_at_signal;
use crate::style::{counted, duration, grouped, program, quoted};

/// The progress bar.
pub const BAR: &str = "[{bar:30}] {bytes}/{total_bytes}  {eta} left  {msg}";

/// `unisono data`
pub fn run(args: Data) -> Result<u8, CliError> {
    match args {
        Data::Prepare(args) => run_prepare(args),
        Data::Verify { folder } => run_verify(&folder),
    }
}

fn run_prepare(args: Prepare) -> Result<u8, CliError> {
    for input in &args.inputs {
        check_file("INPUT", input, "name files of text or of JSON lines (.jsonl), such as texts/*.txt")?;
    }
    let tokenizer = match &args.tokenizer {
        None => Tokenizer::builtin()?,
        Some(path) => {
            let remedy = "name a Hugging Face tokenizer.json, or leave it out for the built-in one";
            check_file("--tokenizer", path, remedy)?;
            Tokenizer::from_file(path, args.end_of_text.as_deref())?
        }
    };
    let options = options(&args)?;
    let out = args.out.clone();
    clean_up_at_signal(move || drop(discard_unfinished(&out)))?;
    let screen = Screen::new(BAR);
    screen.start(0, 0);
    let begin = Instant::now();
    let mut tell = |progress: unisono_data::Progress| {
        let message = format!("{} tokens", grouped(progress.tokens));
        screen.advance(progress.bytes_read, progress.bytes_total, message);
    };
    let outcome = prepare(&args.inputs, &tokenizer, &args.out, &options, &mut tell);
    screen.finish();
    let manifest = outcome?;
    let seconds = begin.elapsed().as_secs_f64();
    let rate = manifest.text_bytes as f64 / seconds.max(1e-9);
    say(&format!(
        "{} of text in {} ({}/s)\n",
        readable(manifest.text_bytes),
        duration(seconds),
        readable(rate as u64)
    ));
    say(&parts(&manifest));
    say(&advice(&args.out, &manifest));
    Ok(DONE)
}

fn options(args: &Prepare) -> Result<PrepareOptions, CliError> {
    let share = args.validation;
    if !(0.0..1.0).contains(&share) {
        return Err(CliError::usage(format!("--validation {share}: must be at least 0 and below 1")));
    }
    let split = match (share, args.by_document) {
        (0.0, _) => Split::None,
        (share, true) => Split::Documents { share },
        (share, false) => Split::Chunks { share },
    };
    let separator = args.separator.clone();
    let format = match args.format {
        None => InputFormat::ByName { separator },
        Some(Format::Text) => InputFormat::Text { separator },
        Some(Format::Jsonl) if separator.is_some() => {
            return Err(CliError::usage("--separator is for text: JSON lines have one document a line"));
        }
        Some(Format::Jsonl) => InputFormat::JsonLines,
    };
    let threads = args.threads.unwrap_or_else(cores);
    Ok(PrepareOptions { format, split, max_shard_tokens: args.shard_tokens, threads })
}

fn parts(manifest: &Manifest) -> String {
    let parts = [(Part::Train, &manifest.train), (Part::Validation, &manifest.validation)];
    let line = |(part, entry): (Part, &unisono_data::PartEntry)| {
        format!(
            "  {:<10}  {}, {}, {}\n",
            part.name(),
            counted(entry.tokens, "token"),
            counted(entry.documents, "document"),
            counted(entry.shards.len() as u64, "shard")
        )
    };
    parts.map(line).concat()
}

/// What to put into the config.
fn advice(folder: &Path, manifest: &Manifest) -> String {
    let path = toml::Value::String(folder.display().to_string());
    let vocabulary = manifest.tokenizer.vocab_size;
    format!(
        "\nIn the config:\n\n[data]\npath = {path}\n\n[model]\nvocab_size = {vocabulary}   # or more\n\nor at once:\n\n  \
         {} train --set {} --set model.vocab_size={vocabulary}\n",
        program(),
        quoted(Path::new(&format!("data.path={}", folder.display()))),
    )
}

fn run_verify(folder: &Path) -> Result<u8, CliError> {
    let begin = Instant::now();
    let dataset = Dataset::open(folder, Verify::OnFirstUse)?;
    dataset.verify()?;
    say(&format!(
        "{}: every byte is right: {} training and {} validation tokens, tokenizer of {} tokens, in {}\n",
        folder.display(),
        grouped(dataset.tokens(Part::Train)),
        grouped(dataset.tokens(Part::Validation)),
        grouped(u64::from(dataset.tokenizer().vocab_size())),
        duration(begin.elapsed().as_secs_f64())
    ));
    Ok(DONE)
}
