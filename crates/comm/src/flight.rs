//! The flight recorder: the last calls of a rank, readable when a run fails.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::error::CallSite;

/// How many calls a recorder keeps.
const KEPT: usize = 256;

/// How far a recorded call came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallState {
    /// Started; the rank does something else meanwhile.
    Started,
    /// Started, and the rank waits for it.
    Waiting,
    /// Finished.
    Finished,
    /// Ended with an error.
    Failed,
    /// Dropped before it was finished.
    Dropped,
}

/// Which message a call sends or receives. Its call's `seq` counts the messages of this kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// The world rank that sends.
    pub from: usize,
    /// The world rank that receives.
    pub to: usize,
    /// The tag.
    pub tag: u32,
}

/// One call of a rank.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FlightEntry {
    /// What was called, and at which step.
    pub call: CallSite,
    /// Which message it is; absent for a collective.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<Message>,
    /// Bytes this rank sent to other ranks in it.
    pub bytes_sent: u64,
    /// Bytes this rank expected from other ranks in it.
    pub bytes_received: u64,
    /// How far it came.
    pub state: CallState,
    /// When it was started, in microseconds since 1970.
    pub started_us: u64,
    /// When it ended, if it did, in microseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_us: Option<u64>,
}

/// The wall clock, in microseconds since 1970. Only for people who compare records of several machines.
pub(crate) fn wall_clock_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

/// A ring of the last 256 calls of one rank.
#[derive(Debug, Default)]
pub struct FlightRecorder(Mutex<Ring>);

#[derive(Debug, Default)]
struct Ring {
    first: u64,
    entries: VecDeque<FlightEntry>,
}

impl FlightRecorder {
    /// Records a call and returns its number, for [`FlightRecorder::set`].
    pub fn push(&self, entry: FlightEntry) -> u64 {
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if ring.entries.len() == KEPT {
            ring.entries.pop_front();
            ring.first += 1;
        }
        ring.entries.push_back(entry);
        ring.first + ring.entries.len() as u64 - 1
    }

    /// Notes how far call `number` came, if it is still kept.
    pub fn set(&self, number: u64, state: CallState) {
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let index = number.checked_sub(ring.first);
        if let Some(entry) = index.and_then(|i| ring.entries.get_mut(usize::try_from(i).ok()?)) {
            entry.state = state;
            if !matches!(state, CallState::Started | CallState::Waiting) {
                entry.ended_us = Some(wall_clock_us());
            }
        }
    }

    /// Number and entry of the call in which the rank waits, if it does.
    pub fn waiting(&self) -> Option<(u64, FlightEntry)> {
        let ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let index = ring.entries.iter().rposition(|entry| entry.state == CallState::Waiting)?;
        Some((ring.first + index as u64, ring.entries[index].clone()))
    }

    /// The kept calls, oldest first.
    pub fn entries(&self) -> Vec<FlightEntry> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).entries.iter().cloned().collect()
    }

    /// The last call.
    pub fn last(&self) -> Option<CallSite> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).entries.back().map(|e| e.call.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_last_calls_and_forgets_the_oldest() {
        let recorder = FlightRecorder::default();
        let entry = |seq| FlightEntry {
            call: CallSite { step: 0, seq, kind: "barrier".into(), group: "world".into() },
            message: None,
            bytes_sent: 0,
            bytes_received: 0,
            state: CallState::Started,
            started_us: wall_clock_us(),
            ended_us: None,
        };
        let numbers: Vec<u64> = (0..300).map(|seq| recorder.push(entry(seq))).collect();
        recorder.set(numbers[10], CallState::Finished);
        recorder.set(numbers[299], CallState::Finished);
        let kept = recorder.entries();
        assert_eq!((kept.len(), kept[0].call.seq), (KEPT, 44));
        let finished: Vec<u64> =
            kept.iter().filter(|e| e.state == CallState::Finished).map(|e| e.call.seq).collect();
        assert_eq!(finished, [299]);
        assert_eq!(recorder.waiting(), None);
        recorder.set(numbers[290], CallState::Waiting);
        let (number, waiting) = recorder.waiting().expect("one waits");
        assert_eq!((number, waiting.call.seq, waiting.ended_us), (numbers[290], 290, None));
        assert!(kept.last().is_some_and(|entry| entry.ended_us >= Some(entry.started_us)));
    }
}
