//! The folder of a run: config, metrics, events, hashes, checkpoints.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use unisono_comm::watch::Identity;

use crate::config::RunConfig;
use crate::error::TrainError;
use crate::hashes::StepHashes;
use crate::record::{StepRecord, Summary, ValidationRecord};
use crate::tensorboard::EventWriter;

/// The resolved config.
pub const CONFIG_FILE: &str = "config.toml";
/// One line a step, one a validation.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// One line a hashed step.
pub const HASHES_FILE: &str = "hashes.jsonl";
/// The Chrome trace.
pub const TRACE_FILE: &str = "trace.json";
/// The run's name and how often it was started.
pub const RUN_FILE: &str = "run.json";
/// The folder of checkpoints.
pub const CHECKPOINTS: &str = "checkpoints";
/// The folder of flight records, written when a run does not end well.
pub const FLIGHT: &str = "flight";
/// The final summary.
pub const SUMMARY_FILE: &str = "summary.json";

/// `run.json`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunIdentity {
    /// Names the run; the same over restarts.
    pub run_id: String,
    /// Counts the starts, the first is 1.
    pub epoch: u64,
    /// The probe of the machine that started it last.
    pub probe: String,
}

/// Writes into a run folder; only rank 0 has one.
pub struct RunFolder {
    path: PathBuf,
    metrics: File,
    hashes: Option<File>,
    events: EventWriter,
}

/// A larger config, run file or metrics line is damaged.
const LARGEST_TEXT_BYTES: u64 = 1 << 20;

fn read_text(path: &Path) -> Result<String, TrainError> {
    let size = fs::metadata(path).map_err(TrainError::io("read", path))?.len();
    if size > LARGEST_TEXT_BYTES {
        return Err(TrainError::Refused(format!("{} has {size} bytes: not a file of a run", path.display())));
    }
    fs::read_to_string(path).map_err(TrainError::io("read", path))
}

/// Whether `path` holds a run.
pub fn holds_a_run(path: &Path) -> bool {
    [CONFIG_FILE, METRICS_FILE, CHECKPOINTS].iter().any(|name| path.join(name).exists())
}

/// The config of the run in `folder`.
///
/// # Errors
/// If there is none, or it cannot be used.
pub fn read_config(folder: &Path) -> Result<RunConfig, TrainError> {
    let path = folder.join(CONFIG_FILE);
    let damaged = |error| TrainError::Refused(format!("{} cannot be used: {error}", path.display()));
    RunConfig::load(&read_text(&path)?, &[]).map_err(damaged)
}

/// Which start of which run was the last in `folder`; None if it was never started.
///
/// # Errors
/// If the file cannot be read or is damaged.
pub fn read_identity(folder: &Path) -> Result<Option<RunIdentity>, TrainError> {
    read_json(&folder.join(RUN_FILE))
}

/// The summary of the last start in `folder` that ended; None if none did.
///
/// # Errors
/// If the file cannot be read or is damaged.
pub fn read_summary(folder: &Path) -> Result<Option<Summary>, TrainError> {
    read_json(&folder.join(SUMMARY_FILE))
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, TrainError> {
    if !path.exists() {
        return Ok(None);
    }
    let damaged = |error| TrainError::Refused(format!("{} is damaged: {error}", path.display()));
    serde_json::from_str(&read_text(path)?).map(Some).map_err(damaged)
}

/// The last step in the metrics of the run in `folder`, from the end of the file; None if it has none.
///
/// # Errors
/// If the file is there and cannot be read.
pub fn read_last_step(folder: &Path) -> Result<Option<u64>, TrainError> {
    let path = folder.join(METRICS_FILE);
    if !path.exists() {
        return Ok(None);
    }
    let end = || {
        let mut file = File::open(&path)?;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(LARGEST_TEXT_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(LARGEST_TEXT_BYTES).read_to_end(&mut bytes).map(|_| bytes)
    };
    let bytes = end().map_err(TrainError::io("read", &path))?;
    let steps = bytes.rsplit(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
    Ok(steps.map(|record: AnyRecord| record.step).next())
}

/// The step records of the run in `folder`, in order. A last line cut short by a crash is passed over.
///
/// # Errors
/// If the file cannot be read, or another line of it is damaged.
pub fn read_steps(folder: &Path) -> Result<Vec<StepRecord>, TrainError> {
    let lines = read_lines(&folder.join(METRICS_FILE), |line| match serde_json::from_slice(line) {
        Ok(step) => Ok(Some(step)),
        Err(_) if serde_json::from_slice::<ValidationRecord>(line).is_ok() => Ok(None),
        Err(error) => Err(error),
    })?;
    Ok(lines.into_iter().flatten().collect())
}

/// The hashes of the run in `folder`, in order; none if it wrote none. A last line cut short by a crash is passed over.
///
/// # Errors
/// If the file cannot be read, or another line of it is damaged.
pub fn read_hashes(folder: &Path) -> Result<Vec<StepHashes>, TrainError> {
    let path = folder.join(HASHES_FILE);
    if path.exists() { read_lines(&path, |line| serde_json::from_slice(line)) } else { Ok(Vec::new()) }
}

/// Whether a line has anything in it.
fn filled(line: &[u8]) -> bool {
    !line.trim_ascii().is_empty()
}

/// All lines of a file; the last one only if it can be read.
fn read_lines<T>(path: &Path, parse: impl Fn(&[u8]) -> serde_json::Result<T>) -> Result<Vec<T>, TrainError> {
    let bytes = fs::read(path).map_err(TrainError::io("read", path))?;
    let mut lines =
        bytes.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| filled(line)).peekable();
    let mut records = Vec::new();
    while let Some((index, line)) = lines.next() {
        match parse(line) {
            Ok(record) => records.push(record),
            Err(_) if lines.peek().is_none() => {}
            Err(error) => {
                return Err(TrainError::Refused(format!(
                    "{}:{}: the line is damaged: {error}; resume the run from an earlier checkpoint, or remove the line",
                    path.display(),
                    index + 1
                )));
            }
        }
    }
    Ok(records)
}

impl RunFolder {
    /// Makes or reopens the folder. With `keep_until`, what was written after that step is dropped.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn open(path: &Path, config: &RunConfig, keep_until: Option<u64>) -> Result<Self, TrainError> {
        fs::create_dir_all(path).map_err(TrainError::io("make", path))?;
        write_durably(&path.join(CONFIG_FILE), config.to_toml()?.as_bytes())?;
        let metrics = path.join(METRICS_FILE);
        let hashes = path.join(HASHES_FILE);
        if let Some(step) = keep_until {
            keep_lines(&metrics, step)?;
            keep_lines(&hashes, step)?;
        }
        if keep_until == Some(0) {
            EventWriter::remove_all(path).map_err(TrainError::io("remove events in", path))?;
        }
        let append = |path: &Path| {
            OpenOptions::new().create(true).append(true).open(path).map_err(TrainError::io("open", path))
        };
        let mut events = EventWriter::create(path).map_err(TrainError::io("write events in", path))?;
        let text = format!("```toml\n{}\n```", config.to_toml()?);
        let file = events.path().to_path_buf();
        events.text(keep_until.unwrap_or(0), "config", &text).map_err(TrainError::io("write", file))?;
        Ok(Self {
            metrics: append(&metrics)?,
            hashes: (config.log.hashes_every > 0).then(|| append(&hashes)).transpose()?,
            events,
            path: path.to_path_buf(),
        })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a step's record and its TensorBoard scalars; `mfu` is the model's operations in percent of the machine's most.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn step(
        &mut self,
        record: &StepRecord,
        peak_memory: u64,
        effective: f64,
        mfu: Option<f64>,
    ) -> Result<(), TrainError> {
        self.line(record)?;
        let gib = peak_memory as f64 / (1u64 << 30) as f64;
        let scalars: [(&str, f64); 15] = [
            ("loss_metrics/global_avg_loss", record.loss),
            ("loss_metrics/global_max_loss", record.max_loss),
            ("loss_metrics/bits_per_byte", record.bits_per_byte),
            ("optimizer/grad_norm", record.grad_norm),
            ("optimizer/learning_rate", record.learning_rate),
            ("throughput(tps)", record.tokens_per_s),
            ("tflops", record.tflops),
            ("time_metrics/end_to_end(s)", record.step_s),
            ("time_metrics/data_loading(s)", record.data_s),
            ("time_metrics/communication_share", record.communication_share),
            ("memory/max_active(GiB)", gib),
            ("moe/load_max_over_mean", record.expert_load_max_over_mean),
            ("moe/router_entropy", record.router_entropy),
            ("moe/dropped(%)", 0.0),
            ("goodput/effective_ratio", effective),
        ];
        let mfu = mfu.map(|mfu| ("mfu(%)", mfu));
        let scalars: Vec<(&str, f32)> =
            scalars.into_iter().chain(mfu).map(|(tag, value)| (tag, value as f32)).collect();
        let write = self.events.scalars(record.step, &scalars);
        write.and_then(|()| self.events.flush()).map_err(TrainError::io("write events in", &self.path))
    }

    /// Writes a validation's record.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn validation(&mut self, record: &ValidationRecord) -> Result<(), TrainError> {
        self.line(record)?;
        let tag = "validation_metrics/global_avg_loss";
        let write = self.events.scalars(record.validation_step, &[(tag, record.loss as f32)]);
        write.map_err(TrainError::io("write events in", &self.path))
    }

    /// Writes the hashes of a step.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn hashes(&mut self, hashes: &StepHashes) -> Result<(), TrainError> {
        let Some(file) = &mut self.hashes else { return Ok(()) };
        append_line(file, &self.path.join(HASHES_FILE), hashes)
    }

    fn line(&mut self, record: &impl Serialize) -> Result<(), TrainError> {
        append_line(&mut self.metrics, &self.path.join(METRICS_FILE), record)
    }
}

fn append_line(file: &mut File, path: &Path, record: &impl Serialize) -> Result<(), TrainError> {
    let mut line = serde_json::to_string(record).map_err(|e| TrainError::Refused(e.to_string()))?;
    line.push('\n');
    let before = file.metadata().map(|metadata| metadata.len());
    file.write_all(line.as_bytes()).map_err(|error| {
        // Half a line would spoil the next one. The first error is the one to tell.
        let _ = before.and_then(|before| file.set_len(before));
        TrainError::io("write", path)(error)
    })
}

/// Any line of the metrics.
#[derive(Deserialize)]
struct AnyRecord {
    #[serde(alias = "validation_step")]
    step: u64,
}

/// Keeps the lines of a file that can be read and whose step is at most `step`.
fn keep_lines(path: &Path, step: u64) -> Result<(), TrainError> {
    if !path.exists() {
        return Ok(());
    }
    let bytes = fs::read(path).map_err(TrainError::io("read", path))?;
    let mut kept = Vec::new();
    for line in bytes.split(|byte| *byte == b'\n') {
        if serde_json::from_slice::<AnyRecord>(line).is_ok_and(|record| record.step <= step) {
            kept.extend_from_slice(line);
            kept.push(b'\n');
        }
    }
    write_durably(path, &kept)
}

/// Writes a whole file so that after a crash either the old or the new one is there.
pub fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
    let temp = path.with_extension("tmp");
    let write = || {
        let mut file = File::create(&temp)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temp, path)?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    };
    write().map_err(TrainError::io("write", path))
}

/// Whether the run that `folder` holds is at this start, as rank 0 has written. Storage that hosts share may show it late.
pub(crate) fn sees_start(folder: &Path, start: &Identity) -> bool {
    const LOOKS: u32 = 100;
    const LOOK: Duration = Duration::from_millis(100);
    let sees = || {
        let found = read_identity(folder).ok().flatten();
        found.is_some_and(|found| (&found.run_id, found.epoch) == (&start.run_id, start.epoch))
    };
    (0..LOOKS).any(|_| {
        sees() || {
            std::thread::sleep(LOOK);
            false
        }
    })
}

/// The identity of the run in `folder` for this start: a new one, or the former with its epoch counted on.
///
/// # Errors
/// If the file cannot be read or written.
pub fn next_identity(folder: &Path, probe: &str, seed: u64) -> Result<RunIdentity, TrainError> {
    let path = folder.join(RUN_FILE);
    let former: Option<RunIdentity> = match path.exists() {
        true => serde_json::from_str(&read_text(&path)?).ok(),
        false => None,
    };
    let identity = match former {
        Some(former) => RunIdentity { run_id: former.run_id, epoch: former.epoch + 1, probe: probe.into() },
        None => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            RunIdentity { run_id: format!("{:x}-{seed}", now.as_millis()), epoch: 1, probe: probe.into() }
        }
    };
    let text = serde_json::to_string_pretty(&identity).map_err(|e| TrainError::Refused(e.to_string()))?;
    fs::create_dir_all(folder).map_err(TrainError::io("make", folder))?;
    write_durably(&path, text.as_bytes())?;
    Ok(identity)
}
