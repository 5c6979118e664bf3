//! What a run writes into its folder, and what is read from it, when not all went well.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Mutex;

use unisono_data::Dataset;
use unisono_train::config::OnNonFinite;
use unisono_train::run_folder::{
    CHECKPOINTS, CONFIG_FILE, HASHES_FILE, METRICS_FILE, read_config, read_steps, read_summary,
};
use unisono_train::{
    Comparison, Event, Fault, GenerateOptions, Observer, Opened, RunConfig, RunOptions, TrainError, evaluate,
    generate, train_on,
};

use crate::common::{Quiet, config, dataset, run, try_run};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// A run with a gradient that is not a number at step 2.
fn poisoned(folder: &Path) -> Vec<f64> {
    let mut config = config();
    config.train.on_non_finite = OnNonFinite::Skip;
    let mut options = RunOptions::new(folder, 2, 1);
    options.fault = Some(Fault::PoisonGradient { step: 2 });
    let ran = try_run(&config, &options).expect("it skips the step");
    assert_eq!(ran.summary.skipped_steps, 1);
    ran.steps.iter().map(|step| step.grad_norm).collect()
}

fn replace(path: &Path, change: impl FnOnce(String) -> Vec<u8>) {
    let text = fs::read_to_string(path).expect("text");
    fs::write(path, change(text)).expect("written");
}

/// Every file below a folder.
fn files(folder: &Path) -> BTreeMap<std::path::PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => drop(found.insert(path.clone(), fs::read(path).expect("a file"))),
        }
    }
    found
}

/// Keeps what a run says.
#[derive(Default)]
struct Heard(Mutex<Vec<String>>);

impl Observer for Heard {
    fn event(&self, event: Event) {
        let said = match event {
            Event::Warning(text) => text,
            Event::Checkpoint { step, .. } => format!("checkpoint of step {step}"),
            _ => return,
        };
        self.0.lock().expect("no panic").push(said);
    }
}

impl Heard {
    fn all(&self) -> Vec<String> {
        self.0.lock().expect("no panic").clone()
    }
}

#[test]
fn steps_with_numbers_that_are_not_finite_are_compared_like_others() {
    let folder = folder();
    let [skipped, healthy] = ["skipped", "healthy"].map(|name| folder.path().join(name));
    let norms = poisoned(&skipped);
    assert!(norms.len() == 6 && norms[1].is_nan() && norms[0].is_finite(), "{norms:?}");
    let itself = Comparison::new(&skipped, &skipped).expect("it compares");
    assert!(itself.is_equal() && itself.steps == 6, "{}", itself.render());
    run(&config(), &healthy, 1);
    let other = Comparison::new(&skipped, &healthy).expect("it compares");
    let found = other.quantity.as_ref().expect("they differ");
    assert!(found.step == 2 && found.text.starts_with("grad_norm: NaN"), "{found:?}");
    // As written by versions that had no word for them.
    let nulled = |text: String| text.replace("\"NaN\"", "null").into_bytes();
    replace(&skipped.join(METRICS_FILE), nulled);
    assert!(read_steps(&skipped).expect("it reads")[1].grad_norm.is_nan());
}

#[test]
fn a_run_whose_metrics_are_gone_is_another_one() {
    let folder = folder();
    let [one, other] = ["one", "other"].map(|name| folder.path().join(name));
    run(&config(), &one, 1);
    run(&config(), &other, 1);
    let metrics = other.join(METRICS_FILE);
    let whole = fs::read_to_string(&metrics).expect("text");
    let nulled: String = whole
        .lines()
        .map(|line| {
            let (before, rest) = line.split_once("\"loss\":").expect("a loss");
            format!("{before}\"loss\":null{}\n", &rest[rest.find(',').expect("more")..])
        })
        .collect();
    fs::write(&metrics, nulled).expect("written");
    let compared = Comparison::new(&one, &other).expect("it compares");
    assert_eq!((compared.first_step(), compared.steps), (Some(1), 6), "{}", compared.render());

    let without_third: String =
        whole.lines().filter(|line| !line.contains("\"step\":3,")).map(|line| format!("{line}\n")).collect();
    fs::write(&metrics, without_third).expect("written");
    let compared = Comparison::new(&one, &other).expect("it compares");
    let found = compared.quantity.expect("a step is missing");
    assert_eq!((found.step, found.text.as_str()), (3, "the second run has no record of it"));
}

#[test]
fn only_a_torn_last_line_is_passed_over() {
    let folder = folder();
    let path = folder.path().join("run");
    let mut short = config();
    short.train.steps = 3;
    run(&short, &path, 1);
    let metrics = path.join(METRICS_FILE);
    let whole = fs::read(&metrics).expect("bytes");
    fs::write(&metrics, [&whole[..], b"{\"step\":4,\"loss\":\xff\xfe"].concat()).expect("written");
    assert_eq!(read_steps(&path).expect("a torn line").len(), 3);
    let mut damaged = whole.clone();
    damaged[10] = 0xff;
    fs::write(&metrics, damaged).expect("written");
    let refused = read_steps(&path).expect_err("a damaged line").to_string();
    assert!(refused.contains("metrics.jsonl:1: the line is damaged"), "{refused}");
    // A resume drops what cannot be read.
    let mut longer = config();
    longer.train.steps = 4;
    let mut options = RunOptions::new(&path, 1, 1);
    options.resume = true;
    let steps: Vec<u64> =
        try_run(&longer, &options).expect("it goes on").steps.iter().map(|s| s.step).collect();
    assert_eq!(steps, [2, 3, 4]);
}

#[test]
fn a_run_that_made_no_step_has_a_summary() {
    let folder = folder();
    let path = folder.path().join("run");
    let mut options = RunOptions::new(&path, 1, 1);
    options.stop_after = Some(0);
    try_run(&config(), &options).expect("it stops");
    let summary = read_summary(&path).expect("it reads").expect("there is one");
    assert_eq!((summary.step, summary.last_loss, summary.stopped), (0, None, true));
}

#[test]
fn resume_with_nothing_to_train_changes_nothing() {
    let folder = folder();
    let path = folder.path().join("run");
    run(&config(), &path, 2);
    let before = files(&path);
    let mut options = RunOptions::new(&path, 1, 1);
    (options.resume, options.trace) = (true, true);
    let mut fewer = config();
    fewer.train.steps = 4;
    for config in [config(), fewer] {
        let summary = train_on(&config, &options, dataset(), &Quiet).expect("nothing to do");
        assert_eq!((summary.step, summary.epoch), (6, 1));
        assert!(files(&path) == before, "a file has changed");
    }
}

/// A run that ended at step 3, before its first checkpoint.
fn unsaved(path: &Path) -> RunConfig {
    let mut config = config();
    config.train.on_non_finite = OnNonFinite::Halt;
    config.checkpoint.every = 4;
    let mut options = RunOptions::new(path, 1, 1);
    options.fault = Some(Fault::PoisonGradient { step: 3 });
    try_run(&config, &options).err().expect("it halts");
    config
}

#[test]
fn a_run_that_was_never_saved_begins_again() {
    let folder = folder();
    let path = folder.path().join("run");
    let config = unsaved(&path);
    assert_eq!(read_steps(&path).expect("metrics").len(), 3);
    let refused = try_run(&config, &RunOptions::new(&path, 1, 1)).err().expect("a run is there").to_string();
    assert!(refused.contains("add --resume"), "{refused}");

    let mut options = RunOptions::new(&path, 4, 1);
    options.resume = true;
    let mut other = config.clone();
    other.train.seed += 1;
    let refused = try_run(&other, &options).err().expect("another computation").to_string();
    assert!(refused.contains("another computation"), "{refused}");
    let heard = Heard::default();
    train_on(&config, &options, dataset(), &heard).expect("it begins again");
    assert!(
        heard.all()[0].contains("no checkpoint yet: the run begins again at step 0"),
        "{:?}",
        heard.all()
    );
    let whole = folder.path().join("whole");
    run(&config, &whole, 1);
    let compared = Comparison::new(&path, &whole).expect("it compares");
    assert!(compared.is_equal() && compared.steps == 6 && compared.hashed == 6, "{}", compared.render());
    let lines = fs::read_to_string(path.join(METRICS_FILE)).expect("metrics").lines().count();
    assert_eq!(lines, 6);
    let events = files(&path).into_keys().filter(|path| path.to_string_lossy().contains("tfevents"));
    assert_eq!(events.count(), 1);
}

#[test]
fn a_run_whose_checkpoints_are_all_damaged_does_not_begin_again() {
    let folder = folder();
    let path = folder.path().join("run");
    let config = unsaved(&path);
    fs::create_dir_all(path.join(CHECKPOINTS).join("step-000002")).expect("made");
    let mut options = RunOptions::new(&path, 1, 1);
    options.resume = true;
    let refused = try_run(&config, &options).err().expect("a damaged checkpoint").to_string();
    assert!(refused.contains("has no checkpoint that verifies (step 2: "), "{refused}");
}

#[test]
fn a_damaged_config_is_named() {
    let folder = folder();
    fs::write(folder.path().join(CONFIG_FILE), "train = [").expect("written");
    let refused = read_config(folder.path()).expect_err("damaged").to_string();
    assert!(refused.contains(&folder.path().join(CONFIG_FILE).display().to_string()), "{refused}");
}

#[test]
fn records_that_cannot_be_written_are_a_warning_and_a_checkpoint() {
    let folder = folder();
    let path = folder.path().join("run");
    fs::create_dir(&path).expect("made");
    // A disk that is full.
    std::os::unix::fs::symlink("/dev/full", path.join(HASHES_FILE)).expect("linked");
    let mut config = config();
    config.checkpoint.every = 0;
    let heard = Heard::default();
    let summary = train_on(&config, &RunOptions::new(&path, 2, 1), dataset(), &heard).expect("it goes on");
    assert_eq!(summary.step, 6);
    let all = heard.all();
    assert_eq!(all.len(), 3, "{all:?}");
    assert!(all[0].contains("hashes.jsonl") && all[0].contains("training goes on"), "{all:?}");
    assert_eq!(all[1..], ["checkpoint of step 1", "checkpoint of step 6"]);
}

/// Puts a file where the checkpoints would be.
struct InTheWay<'a>(&'a Path);

impl Observer for InTheWay<'_> {
    fn event(&self, event: Event) {
        if matches!(event, Event::Started(_)) {
            fs::write(self.0.join(CHECKPOINTS), "").expect("written");
        }
    }
}

#[test]
fn three_failed_checkpoints_are_told_once() {
    let folder = folder();
    let path = folder.path().join("run");
    let mut config = config();
    config.checkpoint.every = 1;
    let error =
        train_on(&config, &RunOptions::new(&path, 2, 1), dataset(), &InTheWay(&path)).expect_err("no way");
    assert!(matches!(error, TrainError::Storage { failures: 3, .. }), "{error}");
    let said = error.to_string();
    assert!(said.starts_with("3 checkpoints in a row could not be written; the last said: "), "{said}");
    assert!(said.matches("in a row").count() == 1, "{said}");
    assert_eq!(read_steps(&path).expect("metrics").len(), 3);
}

/// It reads the validation part alone, the run both.
#[test]
fn a_checkpoint_is_evaluated_as_the_run_was() {
    let folder = folder();
    let path = folder.path().join("run");
    let mut config = config();
    (config.train.steps, config.evaluation.every) = (2, 2);
    let ran = run(&config, &path, 2);
    assert!(ran.summary.validation.is_some());
    let opened = Opened::new(&path, None).expect("a checkpoint");
    let again = evaluate(&opened, 1, 1, config.evaluation.sequences).expect("an evaluation");
    assert_eq!(again, ran.summary.validation);
}

#[test]
fn too_little_text_is_told_before_anything_is_written() {
    let folder = folder();
    let path = folder.path().join("run");
    let data = Dataset::random(1, 16, 64).expect("random tokens");
    let error = train_on(&config(), &RunOptions::new(&path, 1, 1), &data, &Quiet).expect_err("16 tokens");
    assert!(error.to_string().contains("too few for one sequence"), "{error}");
    assert!(!path.exists());
}

#[test]
fn a_model_of_one_token_sequences_writes_text() {
    let folder = folder();
    let path = folder.path().join("run");
    let mut config = config();
    (config.train.sequence_length, config.train.steps) = (1, 1);
    run(&config, &path, 1);
    let opened = Opened::new(&path, None).expect("a checkpoint");
    let mut options = GenerateOptions { sample: config.sample, seed: 1, threads: 1 };
    (options.sample.prompt, options.sample.tokens) = ("To be or not".into(), 5);
    let said = Mutex::new(String::new());
    let say = |text: &str| said.lock().expect("no panic").push_str(text);
    let text = generate(&opened, &options, &say).expect("text");
    assert_eq!(said.into_inner().expect("no panic"), format!("To be or not{text}"));
}

#[test]
fn tensorboard_has_the_utilization_where_the_machine_was_measured() {
    let folder = folder();
    let mut config = config();
    config.train.steps = 1;
    for (peak, written) in [(None, false), (Some(1e9), true)] {
        let mut options = RunOptions::new(folder.path().join(format!("{written}")), 1, 1);
        options.peak_flops = peak;
        try_run(&config, &options).expect("the run succeeds");
        let all = files(&options.folder);
        let events = all.iter().find(|(path, _)| path.to_string_lossy().contains("tfevents"));
        let (_, events) = events.expect("events");
        assert_eq!(events.windows(6).any(|window| window == b"mfu(%)"), written);
    }
}

/// Every value of a TensorBoard tag that a run's files hold, in the order of the files.
fn scalars(folder: &Path, tag: &str) -> Vec<f32> {
    let is_events = |path: &Path| path.to_string_lossy().contains("tfevents");
    let events: Vec<u8> =
        files(folder).into_iter().filter(|(path, _)| is_events(path)).flat_map(|(_, bytes)| bytes).collect();
    // The name of a summary's value, then field 2: four bytes.
    let named = [tag.as_bytes(), &[0x15]].concat();
    let after = |at: usize| events[at + named.len()..].first_chunk().copied().expect("a whole event");
    let places = (0..events.len()).filter(|at| events[*at..].starts_with(&named));
    places.map(|at| f32::from_le_bytes(after(at))).collect()
}

#[test]
fn the_share_of_effective_steps_counts_those_before_a_resume() {
    let folder = folder();
    let mut config = config();
    (config.train.on_non_finite, config.checkpoint.every) = (OnNonFinite::Skip, 4);
    let mut options = RunOptions::new(folder.path(), 2, 1);
    (options.fault, options.stop_after) = (Some(Fault::PoisonGradient { step: 2 }), Some(4));
    try_run(&config, &options).expect("it skips the step");
    (options.fault, options.stop_after, options.resume) = (None, None, true);
    try_run(&config, &options).expect("it goes on");
    let share = |step: u16| f32::from(step - u16::from(step > 1)) / f32::from(step);
    assert_eq!(scalars(folder.path(), "goodput/effective_ratio"), [1, 2, 3, 4, 5, 6].map(share));
}
