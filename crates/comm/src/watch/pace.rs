//! What a rank is doing and how long others may have to wait for it: long where nobody can know, soon where the same
//! work has been done before.

use std::collections::VecDeque;
use std::fmt;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::communicator::Communicator;

/// What a rank is doing. All ranks do the same at a time, so a rank that waits judges others by its own activity.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activity {
    /// Opens data, makes or restores the state.
    #[default]
    Starting,
    /// A training step.
    Step,
    /// A validation.
    Validation,
    /// Saves a checkpoint.
    Checkpoint,
    /// Between these: writes records, shows them, asks whether to go on.
    Between,
}

impl fmt::Display for Activity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Step => "training",
            Self::Validation => "validating",
            Self::Checkpoint => "saving a checkpoint",
            Self::Between => "between steps",
        })
    }
}

/// Bounds of the time-out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// However fast steps are, a rank may take this long.
    pub min: Duration,
    /// However slow steps are, and whatever else a rank does, it may take no longer.
    pub max: Duration,
}

/// How much longer than the longest recent one a step or validation may take.
const FACTOR: u32 = 10;
/// How many of a kind must have been done before their times count.
const NEEDED: usize = 2;
/// How many of a kind are recent.
const RECENT: usize = 16;

/// What a rank is doing, and how long it has taken lately.
#[derive(Debug, Default)]
pub struct Pace {
    activity: Activity,
    began: Option<Instant>,
    steps: VecDeque<Duration>,
    validations: VecDeque<Duration>,
}

impl Pace {
    /// Notes that the rank ends what it did and does `activity` from `now` on.
    fn enter(&mut self, activity: Activity, now: Instant) {
        let taken = self.began.map(|began| now.saturating_duration_since(began));
        if let (Some(recent), Some(taken)) = (self.recent(), taken) {
            recent.push_back(taken);
            if recent.len() > RECENT {
                recent.pop_front();
            }
        }
        (self.activity, self.began) = (activity, Some(now));
    }

    /// Times of the activity, if they say anything about the next one. How long storage takes nobody can know, and what
    /// comes between steps may wait for a person.
    fn recent(&mut self) -> Option<&mut VecDeque<Duration>> {
        match self.activity {
            Activity::Step => Some(&mut self.steps),
            Activity::Validation => Some(&mut self.validations),
            Activity::Starting | Activity::Checkpoint | Activity::Between => None,
        }
    }

    /// What the rank is doing.
    pub fn activity(&self) -> Activity {
        self.activity
    }

    /// How long this rank may wait for another one now.
    pub fn timeout(&mut self, limits: Limits) -> Duration {
        match self.recent() {
            Some(recent) if recent.len() >= NEEDED => {
                let longest = recent.iter().max().copied().unwrap_or_default();
                longest.saturating_mul(FACTOR).max(limits.min).min(limits.max)
            }
            _ => limits.max,
        }
    }
}

impl Communicator {
    /// Says what this rank does from now on, until it says something else. Holds for all handles of the rank.
    pub fn enter(&self, activity: Activity) {
        let mut pace = self.core().pace.lock().unwrap_or_else(PoisonError::into_inner);
        pace.enter(activity, Instant::now());
    }

    /// Says that this rank gets on with work that it does alone while others wait for it: their time-outs begin anew. It may
    /// be said often, and means nothing if the work does not get on: then the watchdog finds the rank.
    pub fn beat(&self) {
        self.core().transport.beat();
    }

    /// What this rank said it does.
    pub fn activity(&self) -> Activity {
        self.core().pace.lock().unwrap_or_else(PoisonError::into_inner).activity()
    }

    /// How long this rank may wait for another one now.
    pub(super) fn timeout(&self, limits: Limits) -> Duration {
        self.core().pace.lock().unwrap_or_else(PoisonError::into_inner).timeout(limits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { min: Duration::from_secs(30), max: Duration::from_secs(1800) };

    /// Does each activity for so many seconds, and says how long one may wait at its end.
    fn timeouts(pace: &mut Pace, activities: &[(Activity, u64)]) -> Vec<u64> {
        let mut now = pace.began.unwrap_or_else(Instant::now);
        let mut after = |(activity, seconds): &(Activity, u64)| {
            pace.enter(*activity, now);
            now += Duration::from_secs(*seconds);
            pace.timeout(LIMITS).as_secs()
        };
        activities.iter().map(&mut after).collect()
    }

    #[test]
    fn only_repeated_work_has_a_short_time_out() {
        use Activity::{Between, Checkpoint, Starting, Step, Validation};
        let mut pace = Pace::default();
        let first = [(Starting, 90), (Step, 60), (Between, 0), (Step, 1), (Between, 0)];
        assert_eq!(timeouts(&mut pace, &first), [1800; 5]);
        // The slow first step still counts.
        assert_eq!(timeouts(&mut pace, &[(Step, 1), (Between, 0)]), [600, 1800]);
        // Until enough others have followed.
        let steps: Vec<_> = [(Step, 5), (Between, 0)].into_iter().cycle().take(2 * RECENT).collect();
        assert_eq!(timeouts(&mut pace, &steps)[2 * RECENT - 2], 50);
        // A checkpoint or a first validation may take long, however fast steps are, and changes nothing for steps.
        let others = [(Checkpoint, 900), (Validation, 300), (Between, 300), (Step, 5)];
        assert_eq!(timeouts(&mut pace, &others), [1800, 1800, 1800, 50]);
        assert_eq!(
            timeouts(&mut pace, &[(Validation, 1), (Between, 0), (Validation, 1)]),
            [1800, 1800, 1800]
        );
        let fast: Vec<_> = [(Step, 0), (Between, 0)].into_iter().cycle().take(2 * RECENT + 2).collect();
        assert_eq!(timeouts(&mut pace, &fast)[2 * RECENT], 30);
    }
}
