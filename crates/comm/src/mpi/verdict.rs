//! One reason why a job has failed, the same on all ranks.
//!
//! Several ranks may find something wrong at once. Each reports to rank 0, which decides: an error or a panic counts at
//! once; where calls do not match, or MPI itself fails in a rank's hands, it waits a moment for the report of the rank that saw
//! most of it. All ranks then get the verdict. A rank that hears none in time stands by its own report.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{CommError, Failure};

/// How long rank 0 waits for surer reports.
const HEARING: Duration = Duration::from_millis(400);
/// How long a rank waits for the verdict.
const PATIENCE: Duration = Duration::from_secs(2);

/// The weight of a report that needs no other.
pub(super) const CERTAIN: u32 = u32::MAX;
/// The weight of a report that any other counts for more than, if it comes in time.
pub(super) const DOUBTFUL: u32 = 0;

/// What a rank knows about the job's failure.
#[derive(Default)]
pub(super) struct Verdict {
    failure: Option<Arc<Failure>>,
    /// The surest report so far.
    report: Option<(Failure, u32)>,
    due: Option<Instant>,
}

impl Verdict {
    /// The failure, once it is known.
    pub fn failure(&self) -> Option<&Arc<Failure>> {
        self.failure.as_ref()
    }

    /// An error if the job has failed.
    pub fn check(&self) -> Result<(), CommError> {
        match &self.failure {
            Some(failure) => Err(CommError::Failed(Arc::clone(failure))),
            None => Ok(()),
        }
    }

    /// Whether this rank has made or heard a report.
    pub fn has_report(&self) -> bool {
        self.report.is_some()
    }

    /// Takes a report: on rank 0 anybody's, elsewhere this rank's own.
    pub fn report(&mut self, failure: Failure, weight: u32, decides: bool, now: Instant) {
        let wait = match (decides, weight) {
            (true, CERTAIN) => Duration::ZERO,
            (true, _) => HEARING,
            (false, _) => PATIENCE,
        };
        let due = self.due.get_or_insert(now + wait);
        *due = (*due).min(now + wait);
        match &mut self.report {
            None => self.report = Some((failure, weight)),
            Some((kept, weightiest)) if weight > *weightiest => {
                let mut surer = failure;
                merge_waiting(&mut surer, kept);
                (*kept, *weightiest) = (surer, weight);
            }
            Some((kept, _)) => merge_waiting(kept, &failure),
        }
    }

    /// Takes the verdict.
    pub fn settle(&mut self, failure: Failure) {
        self.failure.get_or_insert_with(|| Arc::new(failure));
    }

    /// Decides when it is time to. Returns the failure when it does.
    pub fn decide(&mut self, now: Instant) -> Option<Arc<Failure>> {
        if self.failure.is_some() || self.due.is_none_or(|due| now < due) {
            return None;
        }
        let (failure, _) = self.report.take()?;
        self.settle(failure);
        self.failure.clone()
    }
}

fn merge_waiting(into: &mut Failure, from: &Failure) {
    for waiting in &from.waiting {
        if !into.waiting.iter().any(|known| known.rank == waiting.rank) {
            into.waiting.push(waiting.clone());
        }
    }
    into.waiting.sort_by_key(|waiting| waiting.rank);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Cause;

    fn failure(rank: usize) -> Failure {
        let cause = Cause::Mismatch { detail: String::new() };
        Failure { rank, step: 1, call: None, cause, waiting: Vec::new(), flights: Vec::new() }
    }

    #[test]
    fn the_surest_of_several_reports_counts_after_a_moment() {
        let begin = Instant::now();
        let mut verdict = Verdict::default();
        verdict.report(failure(3), 1, true, begin);
        verdict.report(failure(2), 3, true, begin);
        verdict.report(failure(1), 1, true, begin);
        assert!(verdict.decide(begin).is_none() && verdict.check().is_ok());
        assert_eq!(verdict.decide(begin + HEARING).unwrap().rank, 2);
        assert!(verdict.decide(begin + HEARING).is_none(), "it is decided once");
        verdict.settle(failure(0));
        assert_eq!(verdict.failure().unwrap().rank, 2, "and never again");
    }

    #[test]
    fn an_error_counts_at_once_and_other_ranks_wait_for_the_verdict() {
        let begin = Instant::now();
        let mut decides = Verdict::default();
        decides.report(failure(1), 2, true, begin);
        decides.report(failure(2), CERTAIN, true, begin);
        assert_eq!(decides.decide(begin).unwrap().rank, 2);
        let mut waits = Verdict::default();
        waits.report(failure(1), CERTAIN, false, begin);
        assert!(waits.decide(begin + HEARING).is_none());
        assert_eq!(waits.decide(begin + PATIENCE).unwrap().rank, 1);
    }
}
