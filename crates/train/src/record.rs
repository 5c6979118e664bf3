//! What a run writes down: one record a step, one a validation, and the events an observer sees.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use unisono_comm::Ledger;
use unisono_plan::MemoryEstimate;

use crate::agreement::{StepTimeRecord, TrafficRecord};
use crate::survey::WorldRecord;

/// Floats in JSON, which has no number for what is not finite: `"NaN"`, `"inf"`, `"-inf"`.
mod float {
    use serde::{Deserialize, Deserializer, Serializer};

    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Number(f64),
        Word(String),
        /// What older versions wrote for all that is not finite.
        Null(()),
    }

    impl Written {
        fn value<E: serde::de::Error>(self) -> Result<f64, E> {
            match self {
                Self::Number(value) => Ok(value),
                Self::Null(()) => Ok(f64::NAN),
                Self::Word(word) => {
                    let value = word.parse().ok().filter(|value: &f64| !value.is_finite());
                    let wrong =
                        || E::custom(format!("\"{word}\" is no number: NaN, inf or -inf may be quoted"));
                    value.ok_or_else(wrong)
                }
            }
        }
    }

    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() { serializer.serialize_f64(*value) } else { serializer.collect_str(value) }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Written::deserialize(deserializer)?.value()
    }

    /// A float or null for none.
    pub mod option {
        use super::{Deserialize, Deserializer, Serializer, Written};

        pub fn serialize<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
            match value {
                Some(value) => super::serialize(value, serializer),
                None => serializer.serialize_none(),
            }
        }

        pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
            Option::<Written>::deserialize(deserializer)?.map(Written::value).transpose()
        }
    }
}

/// One step, as `metrics.jsonl` has it. Numbers of the computation (all but times and bytes) do not depend on the layout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// The step; the first is 1.
    pub step: u64,
    /// Mean cross-entropy of the target tokens, in nats.
    #[serde(with = "float")]
    pub loss: f64,
    /// The largest of the slots' mean losses.
    #[serde(with = "float")]
    pub max_loss: f64,
    /// The loss in bits per byte of text.
    #[serde(with = "float")]
    pub bits_per_byte: f64,
    /// Balance loss, with its coefficient.
    #[serde(with = "float")]
    pub balance_loss: f64,
    /// Router z-loss, with its coefficient.
    #[serde(with = "float")]
    pub z_loss: f64,
    /// Global norm of the gradient before clipping.
    #[serde(with = "float")]
    pub grad_norm: f64,
    /// Learning rate of the step.
    #[serde(with = "float")]
    pub learning_rate: f64,
    /// Whether the update was skipped because a number was not finite.
    pub skipped: bool,
    /// Tokens since the run's start.
    pub tokens: u64,
    /// Largest over mean load of an expert, averaged over MoE layers; 0 for dense models.
    #[serde(with = "float")]
    pub expert_load_max_over_mean: f64,
    /// Mean entropy of the router's scores, in nats; 0 for dense models.
    #[serde(with = "float")]
    pub router_entropy: f64,
    /// `[MoE layer][expert]` routed rows of the step.
    pub expert_load: Vec<Vec<u64>>,
    /// Seconds of the step.
    #[serde(with = "float")]
    pub step_s: f64,
    /// Tokens a second.
    #[serde(with = "float")]
    pub tokens_per_s: f64,
    /// Floating-point operations of the model a second, all ranks, in 10^12.
    #[serde(with = "float")]
    pub tflops: f64,
    /// Share of the ranks' time in communication.
    #[serde(with = "float")]
    pub communication_share: f64,
    /// Bytes that ranks sent to other ranks.
    pub bytes_moved: u64,
    /// Seconds of the step spent on reading data.
    #[serde(with = "float")]
    pub data_s: f64,
}

impl StepRecord {
    /// What two runs of one config must agree on to the bit: the numbers without times and bytes.
    pub fn numbers(&self) -> Vec<(&'static str, String)> {
        let bits = |value: f64| format!("{value:?} ({:016x})", value.to_bits());
        vec![
            ("loss", bits(self.loss)),
            ("max_loss", bits(self.max_loss)),
            ("bits_per_byte", bits(self.bits_per_byte)),
            ("balance_loss", bits(self.balance_loss)),
            ("z_loss", bits(self.z_loss)),
            ("grad_norm", bits(self.grad_norm)),
            ("learning_rate", bits(self.learning_rate)),
            ("skipped", self.skipped.to_string()),
            ("expert_load", format!("{:?}", self.expert_load)),
            ("router_entropy", bits(self.router_entropy)),
        ]
    }
}

/// One validation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ValidationRecord {
    /// After this step.
    pub validation_step: u64,
    /// Mean cross-entropy of the target tokens, in nats.
    #[serde(with = "float")]
    pub loss: f64,
    /// The loss in bits per byte of text.
    #[serde(with = "float")]
    pub bits_per_byte: f64,
    /// Target tokens.
    pub tokens: u64,
}

/// Memory of a rank, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRecord {
    /// Estimated before the first step: with even routing, and what a new router may need beyond that.
    pub estimated: u64,
    /// With even routing alone.
    #[serde(default)]
    pub even: u64,
    /// The same estimate for the rows that the rank's experts did receive.
    #[serde(default)]
    pub as_routed: u64,
    /// Taken from the system for buffers, in use or waiting for reuse; nothing is given back before the end.
    pub measured: u64,
    /// In use before the last update, when nothing but states is there: parameters, moments, the reduced gradient and
    /// the rotary table.
    #[serde(default)]
    pub states: u64,
}

/// What was found before the first step.
#[derive(Debug, Clone, PartialEq)]
pub struct Started {
    /// The run folder.
    pub folder: PathBuf,
    /// The step that the run goes on from; 0 for a new run.
    pub from_step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Ranks and compute threads a rank.
    pub ranks: usize,
    /// Compute threads a rank.
    pub threads: usize,
    /// Parameters, and those active for a token.
    pub parameters: (usize, usize),
    /// Tokens of a step.
    pub tokens_per_step: usize,
    /// Training tokens of the dataset.
    pub train_tokens: u64,
    /// Seconds that a step is predicted to take, where the machine has been measured.
    pub predicted_step_s: Option<f64>,
    /// The 80% interval of that, where the machine's file tells how well it predicts.
    pub predicted_interval_s: Option<[f64; 2]>,
    /// `[rank]` estimated memory.
    pub memory: Vec<MemoryEstimate>,
    /// Hash of the kernels' results on fixed inputs.
    pub probe: String,
    /// Nodes, processors and links.
    pub world: WorldRecord,
    /// Checkpoints that were passed over on resume, and why.
    pub rejected: Vec<String>,
}

/// What a finished (or stopped) run has to show.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Which start of the run this is; the first is 1.
    #[serde(default)]
    pub epoch: u64,
    /// The last step.
    pub step: u64,
    /// Compute threads a rank; 0 in a record that does not say.
    #[serde(default)]
    pub threads: usize,
    /// Whether it was stopped before its last step.
    pub stopped: bool,
    /// Seconds of all steps of this start.
    pub seconds: f64,
    /// Tokens of this start.
    pub tokens: u64,
    /// The last step's loss; none where this start made no step.
    #[serde(with = "float::option")]
    pub last_loss: Option<f64>,
    /// The last validation.
    pub validation: Option<ValidationRecord>,
    /// What moved, all ranks.
    pub ledger: Ledger,
    /// Seconds of a step, as predicted and measured.
    #[serde(default)]
    pub step_time: StepTimeRecord,
    /// What training steps moved, as predicted and counted.
    #[serde(default)]
    pub step_traffic: Vec<TrafficRecord>,
    /// `(lane, phase, seconds)` of the mean rank.
    pub phases: Vec<(String, String, f64)>,
    /// `[MoE layer][expert]` routed rows of this start.
    pub expert_load: Vec<Vec<u64>>,
    /// A rank each.
    pub memory: Vec<MemoryRecord>,
    /// Peak resident memory of the largest process in bytes, where the system tells.
    pub peak_rss: Option<u64>,
    /// Updates skipped for non-finite numbers.
    pub skipped_steps: u64,
    /// A sample of text.
    pub sample: Option<String>,
}

/// What an observer is told, by rank 0.
#[derive(Debug, Clone)]
pub enum Event {
    /// The run begins.
    Started(Box<Started>),
    /// A step is done.
    Step(Box<StepRecord>),
    /// A validation is done.
    Validation(ValidationRecord),
    /// A checkpoint is committed.
    Checkpoint {
        /// Its step.
        step: u64,
        /// Its size.
        bytes: u64,
        /// Seconds it took.
        seconds: f64,
    },
    /// Something that does not stop the run.
    Warning(String),
}

/// Watches a run. Called on ranks' threads: it must be quick.
pub trait Observer: Sync {
    /// Something happened; rank 0 tells.
    fn event(&self, event: Event);
    /// Every rank asks before every step: true for any of them ends the run after a checkpoint.
    fn stop(&self) -> bool {
        false
    }
}
