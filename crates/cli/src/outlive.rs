//! The end of a job in which a rank has died.
//!
//! `mpirun` of Open MPI sends every process that it has not seen end well two signals, with a second's sleep before each, and
//! counts a rank that was killed, or has ended with an error, among them. It does so on its own host first, then on the others
//! at once. No rank can tell it that there is nobody left to wait for, but who has written its flight record can end the sleeps.
//!
//! Other launchers kill all that is left within milliseconds (MPICH's), so that nobody can write a record any more: there each
//! rank tells its guard from time to time what it would write.

use std::io::{BufRead, BufReader, Write, stdin};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{Builder, sleep};
use std::time::{Duration, Instant};

use unisono_comm::mpi::Daemon;
use unisono_comm::watch::{FlightDeck, FlightRecord, Identity, Reason, read_records, tell_of_death};
use unisono_train::run_folder::{FLIGHT, read_identity};

use crate::args;
use crate::error::{CliError, DONE};
use crate::signals::LAST_WORDS;

/// Longer than it takes `mpirun` to come to the last host where it must sleep through on its own.
const STAY: Duration = Duration::from_secs(3);
/// Between two signals, which are otherwise one.
const PAUSE: Duration = Duration::from_millis(200);

/// Ends this process after another rank has died; the first one `here` hurries `mpirun`. The others stay as well, since it
/// notices when one of them ends. All have time to write their flight records before.
pub fn outlive(first_here: bool, code: u8) -> ! {
    sleep(LAST_WORDS);
    if let Some(daemon) = Daemon::find() {
        if first_here {
            hurry(daemon);
        } else {
            sleep(STAY);
        }
    }
    signal_hook::low_level::exit(i32::from(code));
}

fn hurry(daemon: Daemon) {
    let end = Instant::now() + STAY;
    while daemon.wake() && Instant::now() < end {
        sleep(PAUSE);
    }
}

/// How old what a guard knows of its rank may be.
const NEWS: Duration = Duration::from_millis(200);
/// The last word of a rank that ends in good order.
const GOODBYE: &[u8] = b".";

/// A process that notices when this one dies, where no other rank does or could tell of it.
pub struct Guard {
    process: Child,
    /// While it is there, the guard is told what the rank does.
    rank_lives: Sender<()>,
}

impl Guard {
    /// Starts one for `rank`, whose run, if there is one, goes to a folder and has its ranks on a deck. None where it would be of
    /// no use, or cannot be started: then the launcher notices alone.
    pub fn start(rank: usize, alone_here: bool, run: Option<(&Path, FlightDeck)>) -> Option<Self> {
        let daemon = Daemon::find();
        let useful = if daemon.is_some() { alone_here } else { run.is_some() };
        if !useful {
            return None;
        }
        let mut command = Command::new(std::env::current_exe().ok()?);
        command.arg("guard").arg(rank.to_string());
        if let Some(daemon) = daemon {
            command.arg("--daemon").arg(daemon.process().to_string());
        }
        if let Some((folder, _)) = &run {
            command.arg("--folder").arg(folder);
        }
        // What is meant for the rank's group is not for it, and it keeps no output of the rank's open.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = command.spawn().ok()?;
        let pipe = process.stdin.take()?;
        let deck = run.map(|(_, deck)| deck).filter(|_| daemon.is_none());
        let (rank_lives, ended) = channel();
        let talk = move || keep_informed(pipe, deck.as_ref(), &ended);
        Builder::new().name("guard".into()).spawn(talk).ok()?;
        Some(Self { process, rank_lives })
    }

    /// The rank ends in good order.
    pub fn dismiss(mut self) {
        drop(self.rank_lives);
        let _ = self.process.wait();
    }
}

/// Tells a guard what the rank does, if it is to know, until the rank ends.
fn keep_informed(mut pipe: ChildStdin, deck: Option<&FlightDeck>, ended: &Receiver<()>) {
    while ended.recv_timeout(NEWS) == Err(RecvTimeoutError::Timeout) {
        let records = deck.map(|deck| deck.records(&Reason::Killed)).unwrap_or_default();
        // A record belongs to a run, and its process is one rank.
        let Some(record) = records.first().filter(|record| record.run != Identity::default()) else {
            continue;
        };
        let told = serde_json::to_vec(record).map(|mut line| {
            line.push(b'\n');
            pipe.write_all(&line)
        });
        if !matches!(told, Ok(Ok(()))) {
            // The guard was killed.
            return;
        }
    }
    let _ = pipe.write_all(GOODBYE);
}

/// `unisono guard`: waits until the rank that has started it ends. If that was without a word, and not because the rank was told to
/// end, it tells the others of its run, and writes what it knows of the rank; when the others have had time to write their flight
/// records, it hurries `mpirun`.
pub fn guard(args: &args::Guard) -> Result<u8, CliError> {
    let Some(last) = last_word(&mut BufReader::new(stdin())) else { return Ok(DONE) };
    if let Some(folder) = &args.folder
        && let Ok(Some(run)) = read_identity(folder)
    {
        let (flight, run) = (folder.join(FLIGHT), Identity { run_id: run.run_id, epoch: run.epoch });
        let written = own_record(&flight, &run, args.rank);
        if written.as_ref().is_some_and(|record| record.reason == Reason::Terminated) {
            return Ok(DONE);
        }
        let known = serde_json::from_slice::<FlightRecord>(&last).ok();
        if let Some(known) = known.filter(|known| written.is_none() && known.run == run) {
            // If it cannot be written, `doctor` says that the rank left none.
            let _ = known.written_now().write(&flight);
        }
        // If it cannot be written, the others hear it from `mpirun`.
        let _ = tell_of_death(&flight, &run, args.rank);
    }
    if let Some(daemon) = args.daemon {
        sleep(LAST_WORDS);
        if let Some(daemon) = Daemon::of(daemon) {
            hurry(daemon);
        }
    }
    Ok(DONE)
}

/// What a rank told last before it ended, a line that may be empty; None if it was its goodbye.
fn last_word(told: &mut impl BufRead) -> Option<Vec<u8>> {
    let (mut last, mut line) = (Vec::new(), Vec::new());
    // An error is the end of the rank, too.
    while matches!(told.read_until(b'\n', &mut line), Ok(1..)) {
        if line == GOODBYE {
            return None;
        }
        // What was cut short is no news.
        if line.ends_with(b"\n") {
            std::mem::swap(&mut last, &mut line);
        }
        line.clear();
    }
    Some(last)
}

/// What `rank` has written itself.
fn own_record(flight: &Path, run: &Identity, rank: usize) -> Option<FlightRecord> {
    let found = read_records(flight).ok()?;
    found.records.into_iter().find(|record| record.rank == rank && record.run == *run)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_whole_line_counts_unless_there_was_a_goodbye() {
        let last = |told: &str| last_word(&mut told.as_bytes());
        assert_eq!(last(""), Some(Vec::new()));
        assert_eq!(last("{1}\n{2}\n{3"), Some(b"{2}\n".to_vec()));
        assert_eq!(last("{1}\n."), None);
        assert_eq!(last("."), None);
    }
}
