//! The watchdog: a thread a process that ends a run in which a rank keeps others waiting for too long, and says which.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::deck::FlightDeck;
use super::diagnosis::{Diagnosis, diagnose};
use super::pace::Limits;
use super::record::{FlightRecord, Identity, Reason, read_records};
use crate::error::{Cause, Failure, Waiting};

/// How often it looks, at most and at least.
const TICKS: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(200)];
/// Looks within the shortest time-out.
const LOOKS: u32 = 8;
/// The name of the file by which a process asks the others for their records.
const ASKED: &str = "asked";
/// The name of the file by which a process tells others that a rank has died.
const DIED: &str = "died";

/// How long the watchdog gives others, in its own ticks.
#[derive(Debug, Clone, Copy)]
pub struct Grace {
    /// For the records of other processes.
    pub records: Duration,
    /// For the ranks of this process to come back after the run has failed.
    pub ranks: Duration,
}

impl Default for Grace {
    fn default() -> Self {
        Self { records: Duration::from_secs(5), ranks: Duration::from_secs(5) }
    }
}

/// Watches the ranks of this process while it lives.
///
/// Where one of them waits in a call for longer than its time-out (see [`Activity`](super::Activity)), and nobody has said
/// meanwhile that it works alone and gets on ([`Communicator::beat`](crate::Communicator::beat)), all processes write
/// the flight records of their ranks, read those of the others, and end the run with [`Cause::Stalled`], which names the
/// rank, its step and call, and who waits. Time is counted in looks of the watchdog's own, so that a process that was
/// stopped and goes on (Ctrl-Z, a suspended machine) raises no alarm.
///
/// Where another process tells by a file that a rank has died ([`tell_of_death`]), and the ranks of this one do not hear it from
/// their transport, which may hang for that reason, it writes their flight records and gives them up.
#[derive(Debug)]
pub struct Watchdog {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

struct Watch<F> {
    deck: FlightDeck,
    limits: Limits,
    grace: Grace,
    tick: Duration,
    stopped: Receiver<()>,
    abandon: F,
}

/// How long a rank has waited in one call.
#[derive(Debug, Clone, Copy, Default)]
struct Wait {
    call: Option<u64>,
    /// Of others, so far.
    beats: u64,
    time: Duration,
}

impl Watchdog {
    /// Watches the ranks of `deck`. If they do not come back after the run has failed because one is stuck outside of all
    /// calls, or in the transport after another has died, `abandon` is called with the failure: only the end of the process
    /// helps then.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn start(
        deck: FlightDeck,
        limits: Limits,
        grace: Grace,
        abandon: impl Fn(&Failure) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (stop, stopped) = channel();
        let tick = (limits.min.min(limits.max) / LOOKS).clamp(TICKS[0], TICKS[1]);
        let watch = Watch { deck, limits, grace, tick, stopped, abandon };
        let thread = std::thread::Builder::new().name("watchdog".into()).spawn(move || watch.run())?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A watchdog that panicked has nothing more to say.
            let _ = thread.join();
        }
    }
}

impl<F: Fn(&Failure)> Watch<F> {
    fn run(&self) {
        let mut waits = Vec::new();
        while let Some(gap) = self.sleep() {
            if let Some(dead) = self.told_of_death() {
                return self.outlive(dead);
            }
            let ranks = self.deck.ranks();
            waits.resize(ranks.len(), Wait::default());
            let mut longest = None;
            for (comm, wait) in ranks.iter().zip(&mut waits) {
                let call = comm.core().transport.recorder().waiting().map(|(number, _)| number);
                let beats = comm.core().transport.beats();
                let goes_on = call.is_some() && (wait.call, wait.beats) == (call, beats);
                wait.time = if goes_on { wait.time + gap } else { Duration::ZERO };
                (wait.call, wait.beats) = (call, beats);
                if wait.time > comm.timeout(self.limits) {
                    longest = longest.max(Some(wait.time));
                }
            }
            if (longest.is_some() || self.is_asked()) && self.alarm(longest) {
                return;
            }
        }
    }

    /// Sleeps for a tick; how long that counts for, or None at the end of the watch.
    fn sleep(&self) -> Option<Duration> {
        let begin = Instant::now();
        match self.stopped.recv_timeout(self.tick) {
            Err(RecvTimeoutError::Timeout) => Some(begin.elapsed().min(2 * self.tick)),
            _ => None,
        }
    }

    /// Ticks until `done` or for `time`; false if the watch has ended.
    fn tick_until(&self, time: Duration, mut done: impl FnMut() -> bool) -> bool {
        let mut left = time;
        while !done() && !left.is_zero() {
            match self.sleep() {
                Some(gap) => left = left.saturating_sub(gap),
                None => return false,
            }
        }
        true
    }

    /// Whether all ranks of the run are in this process.
    fn is_alone(&self) -> bool {
        let ranks = self.deck.ranks();
        ranks.first().is_none_or(|comm| ranks.len() >= comm.core().transport.size())
    }

    fn is_asked(&self) -> bool {
        let Some((folder, run)) = self.deck.place() else { return false };
        !self.is_alone() && is_asked_in(&folder, &run)
    }

    fn told_of_death(&self) -> Option<usize> {
        let (folder, run) = self.deck.place()?;
        if self.is_alone() { None } else { death_in(&folder, &run) }
    }

    /// Rank `dead` has died. The ranks of this process have a tick to come back by themselves.
    fn outlive(&self, dead: usize) {
        if self.sleep().is_none() {
            return;
        }
        // Who has heard it from the transport comes back when it has done what it computes.
        let heard = || self.deck.ranks().iter().all(|comm| comm.core().transport.has_failed());
        if heard() && !self.tick_until(self.grace.ranks, || false) {
            return;
        }
        let message = Cause::Died.to_string();
        // If it cannot be written, there is nobody left to tell.
        let reason = Reason::Failed { rank: dead, message, step: None, call: None };
        let _ = self.deck.write_last(&self.deck.records(&reason));
        let (waiting, flights) = (Vec::new(), Vec::new());
        (self.abandon)(&Failure { rank: dead, step: 0, call: None, cause: Cause::Died, waiting, flights });
    }

    /// A rank has waited for `waited`; None if another process has found that. Returns whether that has ended the run, or the
    /// watch has ended.
    fn alarm(&self, waited: Option<Duration>) -> bool {
        let knows_others = self.is_alone() || self.deck.place().is_some();
        let failure = if knows_others { self.diagnosed(waited) } else { self.waited_for(waited) };
        let Some(failure) = failure.map(Arc::new) else { return knows_others };
        self.deck.fail(&failure);
        if self.tick_until(self.grace.ranks, || false) {
            (self.abandon)(&failure);
        }
        true
    }

    /// What the records of all ranks say; None if the watch has ended meanwhile.
    fn diagnosed(&self, waited: Option<Duration>) -> Option<Failure> {
        let mut records = self.deck.records(&Reason::Stalled);
        // What cannot be written is still known here.
        let _ = self.deck.write_last(&records);
        if !self.is_alone() && !self.ask_others(&mut records) {
            return None;
        }
        Some(Self::failure(waited, &diagnose(&records), &records))
    }

    /// While ranks share no folder: for whom those of this process wait, if they still do.
    fn waited_for(&self, waited: Option<Duration>) -> Option<Failure> {
        let ranks = self.deck.ranks();
        let waiting: Vec<Waiting> = ranks.iter().filter_map(|comm| comm.core().transport.waiting()).collect();
        let (first, size) = (waiting.first()?, ranks.first()?.core().transport.size());
        let detail =
            format!("has not come to {}: it is stopped, it died or it still reads its data", first.call);
        Some(Failure {
            rank: *first.for_ranks.first()?,
            step: first.call.step,
            call: None,
            cause: Cause::Stalled { waited_s: waited.map(|time| time.as_secs_f64()), detail },
            waiting,
            flights: vec![Vec::new(); size],
        })
    }

    /// Asks the other processes for their records and adds them; false if the watch has ended meanwhile.
    fn ask_others(&self, records: &mut Vec<FlightRecord>) -> bool {
        let Some((folder, run)) = self.deck.place() else { return false };
        let size = records.first().map_or(0, |record| record.ranks);
        let _ = ask(&folder, &run);
        let own: Vec<FlightRecord> = std::mem::take(records);
        let alive = self.tick_until(self.grace.records, || {
            *records = read_records(&folder).map(|found| found.records).unwrap_or_default();
            records.retain(|record| record.run == run && record.reason == Reason::Stalled);
            records.len() >= size
        });
        records.retain(|record| own.iter().all(|mine| mine.rank != record.rank));
        records.extend(own);
        alive
    }

    fn failure(waited: Option<Duration>, diagnosis: &Diagnosis, records: &[FlightRecord]) -> Failure {
        let culprit = diagnosis.culprits.first();
        let first = diagnosis.waiting.first().map(|waiting| waiting.rank);
        let rank = culprit.map(|culprit| culprit.rank).or(first).unwrap_or_default();
        let others =
            diagnosis.culprits.iter().skip(1).map(|other| format!("rank {} {}", other.rank, other.verdict));
        let own =
            culprit.map_or_else(|| "all have come to its call".into(), |culprit| culprit.verdict.to_string());
        let detail = std::iter::once(own).chain(others).collect::<Vec<_>>().join("; ");
        let size = records.first().map_or(0, |record| record.ranks);
        let mut flights = vec![Vec::new(); size];
        for record in records {
            if let Some(flight) = flights.get_mut(record.rank) {
                flight.clone_from(&record.calls);
            }
        }
        Failure {
            rank,
            step: culprit.map_or(0, |culprit| culprit.step),
            call: culprit.and_then(|culprit| culprit.last_call.clone()),
            cause: Cause::Stalled { waited_s: waited.map(|time| time.as_secs_f64()), detail },
            waiting: diagnosis.waiting.clone(),
            flights,
        }
    }
}

/// What stands in the file by which records of this start of the run are asked for.
fn request(run: &Identity) -> String {
    format!("{} {}", run.run_id, run.epoch)
}

/// Several processes may ask at once: they write the same.
fn ask(folder: &Path, run: &Identity) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    fs::write(folder.join(ASKED), request(run))
}

/// Whether records of this start are asked for. One of an earlier start asks for nothing.
fn is_asked_in(folder: &Path, run: &Identity) -> bool {
    let expected = request(run);
    let mut found = Vec::new();
    let file = fs::File::open(folder.join(ASKED));
    let read = file.and_then(|file| file.take(1 + expected.len() as u64).read_to_end(&mut found));
    read.is_ok() && found == expected.as_bytes()
}

/// Tells the processes of this start of the run that `rank` has died, by a file in the `folder` of flight records. Several may
/// say it at once.
///
/// # Errors
/// If it cannot be written.
pub fn tell_of_death(folder: &Path, run: &Identity, rank: usize) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    let written = folder.join(format!("{DIED}.{}", std::process::id()));
    fs::write(&written, format!("{} {rank}\n", request(run)))?;
    fs::rename(written, folder.join(DIED))
}

/// Forgets what processes of an earlier start asked and told in the `folder` of flight records.
pub fn forget_messages(folder: &Path) {
    for name in [ASKED, DIED] {
        // Mostly there is none; one that stays is of another start.
        let _ = fs::remove_file(folder.join(name));
    }
}

/// The rank that has died, if the file says so of this start.
fn death_in(folder: &Path, run: &Identity) -> Option<usize> {
    let expected = request(run);
    let mut found = String::new();
    let file = fs::File::open(folder.join(DIED)).ok()?;
    file.take(expected.len() as u64 + 32).read_to_string(&mut found).ok()?;
    found.strip_prefix(&expected)?.strip_prefix(' ')?.strip_suffix('\n')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_death_is_told_to_the_same_start_only() {
        let folder = tempfile::tempdir().unwrap();
        let start = |epoch| Identity { run_id: "a-1".into(), epoch };
        assert_eq!(death_in(folder.path(), &start(1)), None);
        tell_of_death(folder.path(), &start(1), 12).unwrap();
        assert_eq!(death_in(folder.path(), &start(1)), Some(12));
        assert_eq!(death_in(folder.path(), &start(11)), None);
        fs::write(folder.path().join(DIED), "a-1 1 1").unwrap();
        assert_eq!(death_in(folder.path(), &start(1)), None, "it is not written to its end");
    }
}
