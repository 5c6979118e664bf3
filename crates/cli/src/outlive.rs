//! The end of a job in which a rank has died, under `mpirun` of Open MPI.
//!
//! `mpirun` sends every process that it has not seen end well two signals, with a second's sleep before each, and counts a
//! rank that was killed, or has ended with an error, among them. It does so on its own host first, then on the others at once.
//! No rank can tell it that there is nobody left to wait for, but who has written its flight record can end the sleeps.

use std::io::{Read, Write, stdin};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use unisono_comm::mpi::Daemon;
use unisono_comm::watch::{Identity, Reason, read_records, tell_of_death};
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

/// A process that notices when this one dies, where no other rank does.
pub struct Guard(Child);

impl Guard {
    /// Starts one for `rank`, whose run goes to `folder` if there is one. None where it would be of no use, or cannot be
    /// started: then `mpirun` notices alone.
    pub fn start(rank: usize, folder: Option<&Path>) -> Option<Self> {
        let daemon = Daemon::find()?;
        let mut command = Command::new(std::env::current_exe().ok()?);
        command.arg("guard").arg(rank.to_string()).arg(daemon.process().to_string()).args(folder);
        // What is meant for the rank's group is not for it, and it keeps no output of the rank's open.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().ok().map(Self)
    }

    /// The rank ends in good order.
    pub fn dismiss(mut self) {
        if let Some(mut pipe) = self.0.stdin.take() {
            // It may have been killed.
            let _ = pipe.write_all(b".");
        }
        let _ = self.0.wait();
    }
}

/// `unisono guard`: waits until the rank that has started it ends. If that was without a word, and not because the rank was told to
/// end, it tells the others of its run; when they have had time to write their flight records, it hurries `mpirun`.
pub fn guard(args: &args::Guard) -> Result<u8, CliError> {
    let mut word = Vec::new();
    // An error is the end of the rank, too.
    let _ = stdin().read_to_end(&mut word);
    if word.is_empty() {
        if let Some(folder) = &args.folder
            && let Ok(Some(run)) = read_identity(folder)
        {
            let (flight, run) = (folder.join(FLIGHT), Identity { run_id: run.run_id, epoch: run.epoch });
            if was_told_to_end(&flight, &run, args.rank) {
                return Ok(DONE);
            }
            // If it cannot be written, the others hear it from `mpirun`.
            let _ = tell_of_death(&flight, &run, args.rank);
        }
        sleep(LAST_WORDS);
        if let Some(daemon) = Daemon::of(args.daemon) {
            hurry(daemon);
        }
    }
    Ok(DONE)
}

/// Whether the last that `rank` has said of itself is that it was told to end.
fn was_told_to_end(flight: &Path, run: &Identity, rank: usize) -> bool {
    let Ok(found) = read_records(flight) else { return false };
    let mut own = found.records.iter().filter(|record| record.rank == rank && record.run == *run);
    own.any(|record| record.reason == Reason::Terminated)
}
