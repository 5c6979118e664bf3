//! The flight recorder: the last calls of a rank, readable when a run fails.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use crate::error::CallSite;

/// How many calls a recorder keeps.
const KEPT: usize = 256;

/// How far a recorded call came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CallState {
    /// Started, not finished.
    Started,
    /// Finished.
    Finished,
    /// Ended with an error.
    Failed,
    /// Dropped before it was finished.
    Dropped,
}

/// One call of a rank.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FlightEntry {
    /// What was called, and at which step.
    pub call: CallSite,
    /// Bytes this rank sent to other ranks in it.
    pub bytes_sent: u64,
    /// Bytes this rank expected from other ranks in it.
    pub bytes_received: u64,
    /// How far it came.
    pub state: CallState,
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
        }
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
            call: CallSite { step: 0, seq, kind: "barrier", group: "world".into() },
            bytes_sent: 0,
            bytes_received: 0,
            state: CallState::Started,
        };
        let numbers: Vec<u64> = (0..300).map(|seq| recorder.push(entry(seq))).collect();
        recorder.set(numbers[10], CallState::Finished);
        recorder.set(numbers[299], CallState::Finished);
        let kept = recorder.entries();
        assert_eq!((kept.len(), kept[0].call.seq), (KEPT, 44));
        let finished: Vec<u64> =
            kept.iter().filter(|e| e.state == CallState::Finished).map(|e| e.call.seq).collect();
        assert_eq!(finished, [299]);
    }
}
