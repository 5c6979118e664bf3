//! What can go wrong, and who did it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::flight::FlightEntry;

/// Which call: the `seq`-th of this kind of numbering on a group, at a step.
///
/// Collective calls of a group are numbered from 0 in the order in which a rank starts them; sends and receives are
/// numbered per (sender, receiver, tag).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CallSite {
    /// The step the rank was in, as it said with `set_step`.
    pub step: u64,
    /// The call's number on its group.
    pub seq: u64,
    /// What was called, for example `all_gather`.
    pub kind: Cow<'static, str>,
    /// The group's name.
    #[serde(serialize_with = "as_text", deserialize_with = "from_text")]
    pub group: Arc<str>,
}

fn as_text<S: Serializer>(text: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(text)
}

fn from_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<str>, D::Error> {
    String::deserialize(deserializer).map(Into::into)
}

impl fmt::Display for CallSite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (call {} on group '{}', step {})", self.kind, self.seq, self.group, self.step)
    }
}

/// A rank that was waiting when the run failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Waiting {
    /// The world rank that waits.
    pub rank: usize,
    /// The call it waits in.
    pub call: CallSite,
    /// The world ranks it waits for.
    pub for_ranks: Vec<usize>,
}

/// Why a run failed.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The rank panicked.
    Panicked {
        /// The panic's message.
        message: String,
    },
    /// The rank's function returned an error.
    Errored {
        /// The error, as it displays itself.
        message: String,
    },
    /// The rank's function returned while other ranks wait for it.
    ReturnedEarly,
    /// The rank's call does not match what other ranks called.
    Mismatch {
        /// Who called what.
        detail: String,
    },
    /// Every rank waits, and nothing can go on.
    Deadlock,
    /// Others have waited for the rank longer than the watchdog allows.
    Stalled {
        /// How long a rank of this process has waited, in seconds, if it was the one that noticed.
        waited_s: Option<f64>,
        /// What the rank does instead.
        detail: String,
    },
    /// The rank's process has ended without a word.
    Died,
    /// The rank's thread could not be started.
    NotStarted {
        /// What the system said.
        message: String,
    },
}

/// The first failure of a run: which rank caused it, where, and who waited for what.
#[derive(Debug, Clone, Serialize)]
pub struct Failure {
    /// The world rank that caused it.
    pub rank: usize,
    /// The step that rank was in.
    pub step: u64,
    /// The last call that rank started.
    pub call: Option<CallSite>,
    /// What happened.
    pub cause: Cause,
    /// Who was waiting, in rank order.
    pub waiting: Vec<Waiting>,
    /// The last calls of each rank, oldest first.
    pub flights: Vec<Vec<FlightEntry>>,
}

impl Cause {
    /// Whether others say it of a rank that may be unable to say anything.
    fn leaves_no_word(&self) -> bool {
        matches!(self, Self::Stalled { .. } | Self::Died)
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Panicked { message } => write!(f, "panicked: {message}"),
            Self::Errored { message } => write!(f, "failed: {message}"),
            Self::ReturnedEarly => write!(f, "returned while other ranks wait for it"),
            Self::Mismatch { detail } => write!(f, "made a call that does not match: {detail}"),
            Self::Deadlock => write!(f, "and others wait for each other, nothing can go on"),
            Self::Stalled { waited_s: Some(waited_s), detail } => {
                write!(f, "kept others waiting for {waited_s:.1} s: {detail}")
            }
            Self::Stalled { waited_s: None, detail } => write!(f, "kept others waiting: {detail}"),
            Self::Died => write!(f, "died: its process has ended without a word"),
            Self::NotStarted { message } => write!(f, "could not be started: {message}"),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} {}; rank {} was in step {}", self.rank, self.cause, self.rank, self.step)?;
        match &self.call {
            Some(call) => write!(f, ", its last call was {call}")?,
            None if self.cause.leaves_no_word() => write!(f, ", its last call is not known")?,
            None => write!(f, ", it had made no call")?,
        }
        waiting_lines(&self.waiting).iter().try_for_each(|line| write!(f, "; {line}"))
    }
}

/// Who waits, those in the same call for the same ranks in one line.
pub(crate) fn waiting_lines(waiting: &[Waiting]) -> Vec<String> {
    let mut alike: BTreeMap<(u64, String, &[usize]), Vec<usize>> = BTreeMap::new();
    for Waiting { rank, call, for_ranks } in waiting {
        alike.entry((call.step, call.to_string(), for_ranks)).or_default().push(*rank);
    }
    let line = |((_, call, for_ranks), ranks): ((u64, String, &[usize]), Vec<usize>)| {
        let verb = if ranks.len() == 1 { "waits" } else { "wait" };
        match for_ranks.is_empty() {
            false => format!("{} {verb} in {call} for {}", Ranks(&ranks), Ranks(for_ranks)),
            true => format!("{} {verb} in {call}, to which all have come", Ranks(&ranks)),
        }
    };
    alike.into_iter().map(line).collect()
}

/// Texts name so many ranks of a list.
pub(crate) const SHOWN: usize = 16;

/// Numbers of ranks in words, a long list cut short.
struct Ranks<'a>(&'a [usize]);

impl fmt::Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.0.len() == 1 { "rank" } else { "ranks" };
        let list: Vec<String> = self.0.iter().take(SHOWN).map(usize::to_string).collect();
        write!(f, "{word} {}", list.join(", "))?;
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// A list of ranks, cut short where only its first ones are at hand.
pub(crate) struct FirstOf<'a>(pub &'a [usize], pub usize);

impl<'a> FirstOf<'a> {
    /// Of a whole list.
    pub fn new(list: &'a [usize]) -> Self {
        Self(&list[..list.len().min(SHOWN)], list.len())
    }
}

impl fmt::Display for FirstOf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(first, size) = *self;
        let mut list: Vec<String> = first.iter().map(usize::to_string).collect();
        if first.len() < size {
            list.push(format!("… ({size} ranks)"));
        }
        write!(f, "[{}]", list.join(", "))
    }
}

/// An error of one call on one rank.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CommError {
    /// The arguments cannot be right, whatever the other ranks pass. Nothing was started.
    #[error("rank {rank}, step {step}: {kind} on group '{group}': {reason}")]
    Argument {
        /// The world rank that called.
        rank: usize,
        /// The step it was in.
        step: u64,
        /// What it called.
        kind: &'static str,
        /// On which group.
        group: Arc<str>,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The run has failed; every rank gets the same failure.
    #[error("the run has failed: {0}")]
    Failed(Arc<Failure>),
    /// The transport broke a promise or lost its connection.
    #[error("transport: {0}")]
    Transport(String),
}

/// Why [`run_ranks`](crate::run_ranks) failed: the root cause, never a consequence of it.
#[derive(Debug, thiserror::Error)]
#[error("{failure}")]
pub struct RunError {
    /// The first failure.
    pub failure: Arc<Failure>,
    /// The error value, if a rank's function returned one and that was the root cause.
    #[source]
    pub source: Option<Box<dyn Error + Send + Sync>>,
}
