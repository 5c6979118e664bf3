//! A run as one value: what a TOML file says, and the checks that make it one that can be run.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use unisono_comm::Limits;
use unisono_mesh::Grid;
use unisono_plan::ModelConfig;

/// Everything that decides a run's numbers. The number of ranks and threads is not part of it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// The largest machine the run is described for.
    pub grid: Grid,
    /// The model.
    pub model: ModelConfig,
    /// What it reads.
    pub data: DataConfig,
    /// Steps, batches and numerics.
    pub train: TrainConfig,
    /// How the computation is laid out over ranks; changes no number.
    pub layout: LayoutConfig,
    /// The optimizer.
    pub optimizer: OptimizerConfig,
    /// The learning rate over time.
    pub schedule: ScheduleConfig,
    /// Validation.
    pub evaluation: EvaluationConfig,
    /// What is kept.
    pub checkpoint: CheckpointConfig,
    /// What is written down.
    pub log: LogConfig,
    /// When a rank that keeps others waiting ends the run.
    pub watchdog: WatchdogConfig,
    /// The sample of text at the end.
    pub sample: SampleConfig,
}

/// `[data]`
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// A folder that `unisono data prepare` wrote; the built-in corpus if absent.
    pub path: Option<PathBuf>,
}

/// What to do about a non-finite loss or gradient norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnNonFinite {
    /// No rank updates; the run goes on with the next batch.
    Skip,
    /// No rank updates; the run ends.
    Halt,
}

/// Which activations are computed again in the backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecomputeConfig {
    /// None: all are kept.
    None,
    /// Those that cost no product.
    Selective,
    /// All but each layer's input.
    Full,
}

/// When gradients are joined over slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReduceEvery {
    /// Once a step, after all accumulation steps.
    Step,
    /// After every accumulation step.
    Microbatch,
}

/// What rows are rounded to on their way to experts and back, also where they stay on their rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WireConfig {
    /// Nothing.
    F32,
    /// bfloat16.
    Bf16,
}

/// `[train]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Optimizer steps.
    pub steps: u64,
    /// Seed of initial parameters and of the order of samples.
    pub seed: u64,
    /// Tokens of a sequence.
    pub sequence_length: usize,
    /// Sequences of one slot in one accumulation step.
    pub micro_batch: usize,
    /// Accumulation steps of an optimizer step.
    pub accumulate: usize,
    /// Largest global norm of the gradient; 0 for no clipping.
    pub clip_norm: f64,
    /// What to do about a non-finite loss or gradient norm.
    pub on_non_finite: OnNonFinite,
    /// Which activations are computed again in the backward.
    pub recompute: RecomputeConfig,
    /// When gradients are joined over slots.
    pub reduce_every: ReduceEvery,
    /// Rows of one expert weight-gradient product.
    pub expert_row_block: usize,
    /// What rows are rounded to on their way to experts and back.
    pub dispatch_wire: WireConfig,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 400,
            seed: 42,
            sequence_length: 256,
            micro_batch: 2,
            accumulate: 1,
            clip_norm: 1.0,
            on_non_finite: OnNonFinite::Skip,
            recompute: RecomputeConfig::Selective,
            reduce_every: ReduceEvery::Step,
            expert_row_block: 256,
            dispatch_wire: WireConfig::F32,
        }
    }
}

/// `[layout]`: what never changes a bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LayoutConfig {
    /// What data-parallel ranks share out: 1 optimizer states, 2 gradients too, 3 parameters too (Rajbhandari et al.,
    /// 2020).
    pub zero: usize,
    /// Whether communication runs beside computation: the next unit's parameters are gathered, and a unit's gradient is
    /// reduced, while others compute; rows move to and from experts meanwhile.
    pub overlap: bool,
    /// Whether gradients are joined inside a node before they cross to others, where ranks are on several.
    pub hierarchical_reduce: bool,
    /// Whether parameters cross to a node once and go on to its other ranks inside, where ranks are on several.
    pub hierarchical_gather: bool,
    /// How rows travel to their experts.
    pub dispatch: DispatchConfig,
    /// Exchanges that a wave's tokens are cut into, so that they overlap with the experts' products.
    pub dispatch_chunks: usize,
    /// The most rows of others' tokens that a rank holds at once in a layer; 0 for no bound.
    pub dispatch_rows: usize,
}

impl Default for LayoutConfig {
    fn default() -> Self {
        Self {
            zero: 1,
            overlap: true,
            hierarchical_reduce: true,
            hierarchical_gather: true,
            dispatch: DispatchConfig::Flat,
            dispatch_chunks: 1,
            dispatch_rows: 0,
        }
    }
}

/// How rows travel to their experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DispatchConfig {
    /// Straight to the rank that holds the expert.
    Flat,
    /// Once to each node, forwarded inside it, results summed there.
    Hierarchical,
}

/// `[optimizer]`: AdamW.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Largest learning rate.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay; norms have none.
    pub weight_decay: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self { learning_rate: 3e-3, beta1: 0.9, beta2: 0.95, epsilon: 1e-8, weight_decay: 0.1 }
    }
}

/// Shape of the learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Half a cosine down to the least rate at the last step.
    Cosine,
    /// Warm-up, stable, decay: constant, then linear down over the last `decay_steps`.
    Wsd,
}

/// `[schedule]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleConfig {
    /// Shape after warm-up.
    pub kind: ScheduleKind,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Steps of decay at the end; `wsd` only.
    pub decay_steps: u64,
    /// Least rate, as a share of the largest.
    pub min_ratio: f64,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self { kind: ScheduleKind::Cosine, warmup_steps: 40, decay_steps: 0, min_ratio: 0.1 }
    }
}

/// `[evaluation]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluationConfig {
    /// Steps between validations, one after the last step included; 0 for none.
    pub every: u64,
    /// Sequences of a validation, rounded up so that every slot has the same number.
    pub sequences: usize,
}

impl Default for EvaluationConfig {
    fn default() -> Self {
        Self { every: 100, sequences: 64 }
    }
}

/// `[checkpoint]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Steps between checkpoints, one after the last step included; 0 for that one only.
    pub every: u64,
    /// How many of the newest are kept; 0 for all.
    pub keep_last: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every: 100, keep_last: 2 }
    }
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Steps between logged steps on the terminal; `metrics.jsonl` has every step.
    pub every: u64,
    /// Steps between hashes of every tensor in `hashes.jsonl`, for `unisono diff`; 0 for none.
    pub hashes_every: u64,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { every: 10, hashes_every: 0 }
    }
}

/// `[watchdog]`
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WatchdogConfig {
    /// Seconds that a rank may keep others waiting, however fast steps are.
    pub min_timeout_s: f64,
    /// Seconds that a rank may keep others waiting at most, whatever it does; 0 for no watchdog.
    pub max_timeout_s: f64,
}

impl Default for WatchdogConfig {
    fn default() -> Self {
        Self { min_timeout_s: 30.0, max_timeout_s: 1800.0 }
    }
}

impl WatchdogConfig {
    /// The time-outs; None for no watchdog.
    pub fn limits(&self) -> Option<Limits> {
        let [min, max] = [self.min_timeout_s, self.max_timeout_s].map(Duration::try_from_secs_f64);
        let (min, max) = (min.ok()?, max.ok()?);
        (!max.is_zero()).then_some(Limits { min, max })
    }
}

/// `[sample]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SampleConfig {
    /// How the text begins.
    pub prompt: String,
    /// Tokens to generate; 0 for no sample.
    pub tokens: usize,
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// The least set of likeliest tokens with this probability is sampled from.
    pub top_p: f32,
}

impl Default for SampleConfig {
    fn default() -> Self {
        Self { prompt: "\n".into(), tokens: 160, temperature: 0.8, top_p: 0.95 }
    }
}

/// A config that cannot be run.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// Not TOML, or a key or type that does not exist.
    #[error("{0}")]
    Parse(String),
    /// An override that is not `key.path=value`.
    #[error("--set {text}: {reason}")]
    Override {
        /// The override.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A value out of range.
    #[error("{field} = {value}: {rule}")]
    Value {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What would be right.
        rule: String,
    },
    /// The model cannot be.
    #[error(transparent)]
    Model(#[from] unisono_plan::ModelError),
    /// The grid cannot be.
    #[error(transparent)]
    Mesh(#[from] unisono_mesh::MeshError),
}

/// A larger config is no config.
const LARGEST_CONFIG_BYTES: usize = 1 << 20;

impl RunConfig {
    /// Reads TOML, applies `a.b=c` overrides in order, and checks everything.
    ///
    /// # Errors
    /// Names the key or the field, its value and what would be right.
    pub fn load(text: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        if text.len() > LARGEST_CONFIG_BYTES {
            return Err(ConfigError::Parse(format!(
                "the config has {} bytes; at most {LARGEST_CONFIG_BYTES} are read",
                text.len()
            )));
        }
        let mut config: Self = toml::from_str(text).map_err(|error| parse_error(text, &error))?;
        if !overrides.is_empty() {
            let mut table: toml::Table = toml::from_str(text).map_err(|error| parse_error(text, &error))?;
            // The text alone was right, so what is wrong comes from an override: the first from which on nothing fits.
            let mut wrong = None;
            for text in overrides {
                apply_override(&mut table, text)?;
                match table.clone().try_into() {
                    Ok(read) => (config, wrong) = (read, None),
                    Err(error) => {
                        let reason = |error: toml::de::Error| plain(&error.to_string());
                        wrong.get_or_insert_with(|| (text.clone(), reason(error)));
                    }
                }
            }
            if let Some((text, reason)) = wrong {
                return Err(ConfigError::Override { text, reason });
            }
        }
        config.validate()?;
        Ok(config)
    }

    /// The config as TOML, every field written out.
    ///
    /// # Errors
    /// If a value has no TOML form (a seed above 2^63).
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        toml::to_string_pretty(self).map_err(|e| ConfigError::Parse(e.to_string()))
    }

    /// Checks every field.
    ///
    /// # Errors
    /// Names the field, its value and what would be right.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.model.validate()?;
        self.grid.validate(self.model.num_experts)?;
        self.validate_train()?;
        self.validate_layout()?;
        self.validate_optimizer()?;
        for (field, seconds) in [
            ("watchdog.min_timeout_s", self.watchdog.min_timeout_s),
            ("watchdog.max_timeout_s", self.watchdog.max_timeout_s),
        ] {
            check(
                (0.0..=1e9).contains(&seconds),
                field,
                seconds,
                "must be between 0 and 1000000000 seconds",
            )?;
        }
        let sample = &self.sample;
        let finite = sample.temperature.is_finite() && sample.temperature >= 0.0;
        check(finite, "sample.temperature", sample.temperature, "must be finite and at least 0")?;
        check(
            sample.top_p > 0.0 && sample.top_p <= 1.0,
            "sample.top_p",
            sample.top_p,
            "must be above 0, at most 1",
        )?;
        check(
            self.evaluation.sequences >= 1,
            "evaluation.sequences",
            self.evaluation.sequences,
            "must be at least 1",
        )?;
        check(self.log.every >= 1, "log.every", self.log.every, "must be at least 1")
    }

    fn validate_train(&self) -> Result<(), ConfigError> {
        let train = &self.train;
        let sizes = [
            ("train.sequence_length", train.sequence_length, 1 << 20),
            ("train.micro_batch", train.micro_batch, 1 << 20),
            ("train.accumulate", train.accumulate, 1 << 20),
            ("train.expert_row_block", train.expert_row_block, 1 << 30),
        ];
        for (field, value, most) in sizes {
            check((1..=most).contains(&value), field, value, &format!("must be between 1 and {most}"))?;
        }
        check(
            train.seed <= i64::MAX as u64,
            "train.seed",
            train.seed,
            "must fit a TOML integer (below 2^63)",
        )?;
        let clip = train.clip_norm.is_finite() && train.clip_norm >= 0.0;
        check(
            clip,
            "train.clip_norm",
            train.clip_norm,
            "must be finite and at least 0 (0 switches clipping off)",
        )
    }

    fn validate_layout(&self) -> Result<(), ConfigError> {
        let (zero, train) = (self.layout.zero, &self.train);
        check((1..=3).contains(&zero), "layout.zero", zero, "must be 1, 2 or 3")?;
        let joined = train.accumulate == 1 || train.reduce_every == ReduceEvery::Microbatch;
        let rule = format!(
            "sharded gradients cannot wait for train.accumulate = {} accumulation steps: set \
             train.reduce_every=microbatch (another order of sums, so from the first step of a run), \
             train.accumulate=1 or layout.zero=1",
            train.accumulate
        );
        check(zero == 1 || joined, "layout.zero", zero, &rule)?;
        let LayoutConfig { dispatch_chunks: chunks, dispatch_rows: rows, .. } = self.layout;
        let most = self.train.micro_batch * self.train.sequence_length;
        let rule = format!("must be between 1 and the {most} tokens of a slot in one accumulation step");
        check((1..=most).contains(&chunks), "layout.dispatch_chunks", chunks, &rule)?;
        let block = self.train.expert_row_block;
        let rule =
            format!("must be 0 (no bound) or at least train.expert_row_block = {block}, which travels whole");
        check(rows == 0 || rows >= block, "layout.dispatch_rows", rows, &rule)
    }

    fn validate_optimizer(&self) -> Result<(), ConfigError> {
        let optimizer = &self.optimizer;
        for (field, value) in [("optimizer.beta1", optimizer.beta1), ("optimizer.beta2", optimizer.beta2)] {
            check((0.0..1.0).contains(&value), field, value, "must be at least 0 and below 1")?;
        }
        let schedule = &self.schedule;
        let positive = [
            ("optimizer.learning_rate", optimizer.learning_rate),
            ("optimizer.weight_decay", optimizer.weight_decay),
            ("schedule.min_ratio", schedule.min_ratio),
        ];
        for (field, value) in positive {
            check(value.is_finite() && value >= 0.0, field, value, "must be finite and at least 0")?;
        }
        let epsilon = optimizer.epsilon;
        check(
            epsilon.is_finite() && epsilon > 0.0,
            "optimizer.epsilon",
            epsilon,
            "must be finite and above 0",
        )?;
        let busy = schedule.warmup_steps.saturating_add(schedule.decay_steps);
        let fits = schedule.kind == ScheduleKind::Cosine || busy <= self.train.steps;
        let rule = format!(
            "together with schedule.warmup_steps = {} it must be at most train.steps = {}",
            schedule.warmup_steps, self.train.steps
        );
        check(fits, "schedule.decay_steps", schedule.decay_steps, &rule)
    }

    /// Sequences of an optimizer step.
    pub fn global_batch(&self) -> usize {
        self.grid.slots() * self.train.micro_batch * self.train.accumulate
    }

    /// Tokens of an optimizer step.
    pub fn tokens_per_step(&self) -> usize {
        self.global_batch() * self.train.sequence_length
    }
}

fn check(holds: bool, field: &'static str, value: impl ToString, rule: &str) -> Result<(), ConfigError> {
    if holds {
        Ok(())
    } else {
        Err(ConfigError::Value { field, value: value.to_string(), rule: rule.into() })
    }
}

/// What a parser says, in one line.
fn parse_error(text: &str, error: &toml::de::Error) -> ConfigError {
    let before = error.span().map_or(0, |span| span.start.min(text.len()));
    let line = 1 + text.as_bytes()[..before].iter().filter(|byte| **byte == b'\n').count();
    ConfigError::Parse(format!("line {line}: {}", plain(error.message())))
}

/// A message of serde in one line and without names of types.
fn plain(message: &str) -> String {
    const NUMBERS: [(&str, &str); 5] = [
        ("expected u64", "expected a whole number of at least 0"),
        ("expected u32", "expected a whole number of at least 0"),
        ("expected usize", "expected a whole number of at least 0"),
        ("expected f64", "expected a number"),
        ("expected f32", "expected a number"),
    ];
    let message = message.trim_end().replace('\n', " ");
    let message = NUMBERS.iter().fold(message, |message, (name, words)| message.replace(name, words));
    let Some((before, rest)) = message.split_once("expected struct ") else { return message };
    let rest = rest.trim_start_matches(|c: char| c.is_alphanumeric());
    format!("{before}expected a section of keys{rest}")
}

/// Whether `text` is a number that TOML has no room for.
fn is_too_large(text: &str) -> bool {
    let text = text.trim();
    text.parse::<i128>().is_ok_and(|number| i64::try_from(number).is_err())
        || text.parse::<f64>().is_ok_and(f64::is_infinite)
}

/// Sets `a.b.c=value` in a table. The value is TOML; a bare word is a string.
fn apply_override(table: &mut toml::Table, text: &str) -> Result<(), ConfigError> {
    let refuse = |reason: &str| ConfigError::Override { text: text.into(), reason: reason.into() };
    let (path, value) = text.split_once('=').ok_or_else(|| refuse("must be key.path=value"))?;
    let value = match toml::from_str::<toml::Table>(&format!("value = {value}")) {
        Ok(mut parsed) if parsed.len() == 1 => {
            parsed.remove("value").ok_or_else(|| refuse("has no value"))?
        }
        _ if is_too_large(value) => {
            return Err(refuse("is too large: integers go to 9223372036854775807, floats to 1.8e308"));
        }
        _ => toml::Value::String(value.into()),
    };
    let keys: Vec<&str> = path.trim().split('.').collect();
    let (last, parents) = keys.split_last().ok_or_else(|| refuse("has no key"))?;
    if keys.iter().any(|key| key.is_empty()) {
        return Err(refuse("has an empty key"));
    }
    let mut here = table;
    for key in parents {
        let entry = here.entry(*key).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        here = entry.as_table_mut().ok_or_else(|| refuse("goes through a value that is no table"))?;
    }
    here.insert((*last).into(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn said(text: &str, overrides: &[&str]) -> String {
        let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
        RunConfig::load(text, &overrides).map_or_else(|e| e.to_string(), |_| "ok".into())
    }

    #[test]
    fn an_empty_config_is_the_default_and_survives_being_written() {
        let config = RunConfig::load("", &[]).expect("defaults are valid");
        assert_eq!(config, RunConfig::default());
        let text = config.to_toml().expect("defaults have a TOML form");
        assert_eq!(RunConfig::load(&text, &[]).expect("written configs are valid"), config);
    }

    #[test]
    fn errors_name_key_value_and_rule() {
        assert!(said("[train]\nstep = 3", &[]).contains("unknown field `step`"));
        assert_eq!(
            said("", &["train.micro_batch=0"]),
            "train.micro_batch = 0: must be between 1 and 1048576"
        );
        assert!(said("", &["train.stepz=1"]).contains("stepz"));
        assert_eq!(said("", &["train.steps"]), "--set train.steps: must be key.path=value");
        let two = said("", &["train.steps=5", "train.steps=x", "train.sequence_length=64"]);
        assert!(two.starts_with("--set train.steps=x: ") && !two.contains("steps=5"), "{two}");
        assert_eq!(said("", &["train..steps=1"]), "--set train..steps=1: has an empty key");
        assert_eq!(
            said("", &["grid.replicas=8", "grid.expert_group=4", "model.score_function=softmax"]),
            "ok"
        );
        assert!(said("", &["train.steps=x"]).contains("invalid type"));
        for too_large in ["optimizer.learning_rate=1e400", "train.seed=9223372036854775808"] {
            assert!(said("", &[too_large]).contains("is too large: integers go to"), "{too_large}");
        }
        assert!(said("", &["train=3"]).contains("integer `3`, expected a section of keys in `train`"));
        assert!(said("train = 3", &[]).ends_with("integer `3`, expected a section of keys"));
        assert_eq!(said("", &["layout.zero=4"]), "layout.zero = 4: must be 1, 2 or 3");
    }

    #[test]
    fn sharded_gradients_with_accumulation_name_their_remedy() {
        let said_of = |zero, accumulate, every| {
            said("", &[&format!("layout.zero={zero}"), &format!("train.accumulate={accumulate}"), every])
        };
        for zero in [2, 3] {
            let refused = said_of(zero, 4, "train.reduce_every=step");
            assert!(refused.contains("set train.reduce_every=microbatch"), "{refused}");
            assert_eq!(said_of(zero, 4, "train.reduce_every=microbatch"), "ok");
            assert_eq!(said_of(zero, 1, "train.reduce_every=step"), "ok");
        }
        assert_eq!(said_of(1, 4, "train.reduce_every=step"), "ok");
    }

    /// Every key of the default config as `--set` takes it.
    fn default_overrides() -> Vec<String> {
        let text = RunConfig::default().to_toml().expect("defaults have a TOML form");
        let mut section = "";
        let mut all = Vec::new();
        for line in text.lines() {
            match line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
                Some(name) => section = name,
                None => {
                    all.extend(line.split_once(" = ").map(|(key, value)| format!("{section}.{key}={value}")))
                }
            }
        }
        // A text that begins on one line and ends on another.
        all.retain(|key| !key.ends_with("=\"\"\""));
        all
    }

    #[test]
    fn every_key_can_be_set() {
        let all = default_overrides();
        assert!(all.len() > 50, "{all:?}");
        assert_eq!(RunConfig::load("", &all).expect("defaults are valid"), RunConfig::default());
    }

    proptest! {
        #[test]
        fn mutated_configs_give_an_error_or_a_config(at in 0usize..2000, byte in 0u8..128, cut in 0usize..2000) {
            let mut text = RunConfig::default().to_toml().expect("defaults have a TOML form").into_bytes();
            let len = text.len();
            text[at % len] = byte;
            text.truncate(len - cut % 200);
            let text = String::from_utf8_lossy(&text).into_owned();
            let _ = RunConfig::load(&text, &[]);
        }

        #[test]
        fn mutated_overrides_give_an_error_or_a_config(which in 0usize..200, at in 0usize..200, byte in 0u8..128) {
            let all = default_overrides();
            let mut text = all[which % all.len()].clone().into_bytes();
            let len = text.len();
            text[at % len] = byte;
            let _ = RunConfig::load("", &[String::from_utf8_lossy(&text).into_owned()]);
        }
    }
}
