//! A rank that never comes to a call, for tests of what others make of it.

use std::sync::Arc;
use std::time::Duration;

use crate::communicator::Communicator;
use crate::error::CommError;

/// How often the rank looks whether the run has ended.
const LOOK: Duration = Duration::from_millis(5);

impl Communicator {
    /// For tests: this rank does not start the first call of `kind` in `step`, and does nothing else until the run has
    /// failed. Holds for all handles of the rank; the first one planted counts.
    pub fn plant_stall(&self, step: u64, kind: &'static str) {
        let _ = self.core().stall.set((step, kind));
    }

    /// Stalls until the run has failed.
    pub(crate) fn stall(&self) -> CommError {
        loop {
            if let Some(failure) = self.core().transport.failure() {
                return CommError::Failed(Arc::clone(&failure));
            }
            std::thread::sleep(LOOK);
        }
    }
}
