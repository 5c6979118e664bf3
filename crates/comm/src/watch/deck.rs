//! The ranks of this process, for what speaks for them from outside: the watchdog, a signal, a failed run.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::record::{FlightRecord, Identity, Reason, RecordError};
use crate::communicator::Communicator;
use crate::error::Failure;

/// The ranks of this process and where their flight records go. Clones are handles on the same deck.
#[derive(Clone, Default)]
pub struct FlightDeck(Arc<Mutex<Option<Seats>>>);

struct Seats {
    folder: PathBuf,
    run: Identity,
    ranks: Vec<Communicator>,
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

    /// A rank takes its seat: from now on its flight record can be written, into `folder`, and it is watched.
    pub fn join(&self, comm: &Communicator, folder: &Path, run: &Identity) {
        let mut seats = self.lock();
        let seats = seats.get_or_insert_with(|| Seats {
            folder: folder.to_path_buf(),
            run: run.clone(),
            ranks: Vec::new(),
        });
        seats.ranks.push(comm.clone());
    }

    /// The run has ended: all seats are left.
    pub fn clear(&self) {
        *self.lock() = None;
    }

    /// The ranks of this process that have joined.
    pub(super) fn ranks(&self) -> Vec<Communicator> {
        self.lock().as_ref().map(|seats| seats.ranks.clone()).unwrap_or_default()
    }

    /// Where records go and of which run they are, if a rank has joined.
    pub(super) fn place(&self) -> Option<(PathBuf, Identity)> {
        self.lock().as_ref().map(|seats| (seats.folder.clone(), seats.run.clone()))
    }

    /// The flight records of this process's ranks as they are now.
    pub fn records(&self, reason: &Reason) -> Vec<FlightRecord> {
        let Some((_, run)) = self.place() else { return Vec::new() };
        self.ranks().iter().map(|comm| comm.flight_record(&run, reason.clone())).collect()
    }

    /// Writes the flight record of every rank of this process, as it is now. Any thread may call it at any time.
    ///
    /// # Errors
    /// The first record that could not be written; the others are written all the same.
    pub fn write(&self, reason: &Reason) -> Result<(), RecordError> {
        self.write_all(&self.records(reason))
    }

    /// Writes the flight records after a failure: calls as they were when the run failed, where that is known.
    ///
    /// # Errors
    /// As [`FlightDeck::write`].
    pub fn write_failure(&self, failure: &Failure) -> Result<(), RecordError> {
        let message = failure.cause.to_string();
        let mut records = self.records(&Reason::Failed { rank: failure.rank, message });
        for record in &mut records {
            if let Some(calls) = failure.flights.get(record.rank).filter(|calls| !calls.is_empty()) {
                record.calls.clone_from(calls);
            }
        }
        self.write_all(&records)
    }

    pub(super) fn write_all(&self, records: &[FlightRecord]) -> Result<(), RecordError> {
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
