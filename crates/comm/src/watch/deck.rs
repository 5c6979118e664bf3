//! The ranks of this process, for what speaks for them from outside: the watchdog, a signal, a failed run.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::pace::Activity;
use super::record::{FlightRecord, Identity, Reason, RecordError};
use super::watchdog::tell_of_death;
use crate::communicator::Communicator;
use crate::error::{Cause, Failure};

/// The ranks of this process and where their flight records go. Clones are handles on the same deck.
#[derive(Clone, Default)]
pub struct FlightDeck(Arc<Mutex<Option<Seats>>>);

#[derive(Default)]
struct Seats {
    place: Option<(PathBuf, Identity)>,
    ranks: Vec<Communicator>,
    /// The watchdog has written the records: what comes later may be a consequence.
    written: bool,
}

impl std::fmt::Debug for FlightDeck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FlightDeck({} ranks)", self.ranks().len())
    }
}

impl FlightDeck {
    fn lock(&self) -> MutexGuard<'_, Option<Seats>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A rank takes its seat: from now on it is watched.
    pub fn join(&self, comm: &Communicator) {
        self.lock().get_or_insert_default().ranks.push(comm.clone());
    }

    /// From now on flight records can be written, into `folder`.
    pub fn keep_in(&self, folder: &Path, run: &Identity) {
        self.lock().get_or_insert_default().place = Some((folder.to_path_buf(), run.clone()));
    }

    /// Whether no rank has come to its first step: there is nothing to save.
    pub fn is_starting(&self) -> bool {
        self.ranks().iter().all(|comm| comm.activity() == Activity::Starting)
    }

    /// The run has ended: all seats are left.
    pub fn clear(&self) {
        *self.lock() = None;
    }

    /// The ranks of this process that have joined.
    pub(super) fn ranks(&self) -> Vec<Communicator> {
        self.lock().as_ref().map(|seats| seats.ranks.clone()).unwrap_or_default()
    }

    /// Where records go and of which run they are, if that is known.
    pub(super) fn place(&self) -> Option<(PathBuf, Identity)> {
        self.lock().as_ref().and_then(|seats| seats.place.clone())
    }

    /// The flight records of this process's ranks as they are now.
    pub fn records(&self, reason: &Reason) -> Vec<FlightRecord> {
        let run = self.place().map(|(_, run)| run).unwrap_or_default();
        self.ranks().iter().map(|comm| comm.flight_record(&run, reason.clone())).collect()
    }

    /// Writes the flight record of every rank of this process, as it is now, unless the watchdog has. Any thread may call it
    /// at any time.
    ///
    /// # Errors
    /// The first record that could not be written; the others are written all the same.
    pub fn write(&self, reason: &Reason) -> Result<(), RecordError> {
        if self.watchdog_has_written() {
            return Ok(());
        }
        self.write_all(&self.records(reason))
    }

    fn watchdog_has_written(&self) -> bool {
        self.lock().as_ref().is_some_and(|seats| seats.written)
    }

    /// Writes what the watchdog has found.
    pub(super) fn write_last(&self, records: &[FlightRecord]) -> Result<(), RecordError> {
        if let Some(seats) = self.lock().as_mut() {
            seats.written = true;
        }
        self.write_all(records)
    }

    /// Writes the flight records after a failure: calls as they were when the run failed, where that is known. Where the
    /// watchdog has written records, only a rank that tells of itself writes another. That a rank has died is told to other
    /// processes, too.
    ///
    /// # Errors
    /// As [`FlightDeck::write`].
    pub fn write_failure(&self, failure: &Failure) -> Result<(), RecordError> {
        if let (Cause::Died, Some((folder, run))) = (&failure.cause, self.place()) {
            // Most hear it anyway.
            let _ = tell_of_death(&folder, &run, failure.rank);
        }
        let message = failure.cause.to_string();
        let (step, call) = (Some(failure.step), failure.call.clone());
        let mut records = self.records(&Reason::Failed { rank: failure.rank, message, step, call });
        if self.watchdog_has_written() {
            records.retain(|record| record.rank == failure.rank);
        }
        for record in &mut records {
            if let Some(calls) = failure.flights.get(record.rank).filter(|calls| !calls.is_empty()) {
                record.calls.clone_from(calls);
            }
        }
        self.write_all(&records)
    }

    fn write_all(&self, records: &[FlightRecord]) -> Result<(), RecordError> {
        let Some((folder, _)) = self.place() else { return Ok(()) };
        let outcomes: Vec<_> = records.iter().map(|record| record.write(&folder)).collect();
        outcomes.into_iter().collect()
    }

    /// Ends the run on all ranks of this process.
    pub(super) fn fail(&self, failure: &Arc<Failure>) {
        for comm in self.ranks() {
            comm.core().transport.fail(Arc::clone(failure));
        }
    }
}
