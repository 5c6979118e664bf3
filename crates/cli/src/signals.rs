//! Ctrl-C and SIGTERM: the first ends the run after a checkpoint, a second Ctrl-C ends it at once. Before the first step there
//! is nothing to save, and a signal ends the process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals as Arriving;

use unisono_comm::Place;

use crate::error::CliError;

/// How long a process lives on that was told to end, or that ends because another one has died: `mpirun` kills all others
/// when one has ended, and they may still be writing their flight records.
pub const LAST_WORDS: Duration = Duration::from_millis(300);

/// From now on the first SIGINT or SIGTERM ends the process, after `clean_up`.
///
/// # Errors
/// If the system refuses.
pub fn clean_up_at_signal(clean_up: impl Fn() + Send + 'static) -> Result<(), CliError> {
    let mut arriving = Arriving::new([SIGINT, SIGTERM]).map_err(refused)?;
    let wait = move || {
        if let Some(signal) = arriving.forever().next() {
            clean_up();
            std::process::exit(128 + signal);
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait).map(drop).map_err(refused)
}

fn refused(error: std::io::Error) -> CliError {
    CliError::usage(format!("cannot listen for signals: {error}"))
}

/// What follows from a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// The run ends after a checkpoint.
    Save,
    /// The process ends.
    End,
}

/// What has arrived so far.
#[derive(Debug, Default)]
struct State {
    /// The signal that asked to stop; 0 for none.
    asked: AtomicI32,
    /// There is nothing left to save: a signal ends the process.
    at_once: AtomicBool,
}

/// Listens for signals.
#[derive(Debug)]
pub struct Signals(Arc<State>);

impl Signals {
    /// Listens from now on; `notice` is called when a stop is asked for, and says what follows. Other processes of the job at
    /// `place` get SIGTERM, too.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn listen(place: Place, notice: impl Fn() -> Then + Send + 'static) -> Result<Self, CliError> {
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        let mut arriving = Arriving::new([SIGINT, SIGTERM]).map_err(refused)?;
        let listen = move || {
            for signal in arriving.forever() {
                if signal == SIGTERM {
                    place.expect_end();
                }
                let again = signal == SIGINT && shared.asked.load(Ordering::SeqCst) != 0;
                if again || shared.at_once.load(Ordering::SeqCst) {
                    end(signal);
                }
                shared.asked.store(signal, Ordering::SeqCst);
                if notice() == Then::End {
                    end(signal);
                }
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(listen).map_err(refused)?;
        Ok(Self(state))
    }

    /// Whether a stop was asked for.
    pub fn stop(&self) -> bool {
        self.0.asked.load(Ordering::SeqCst) != 0
    }

    /// Whether it was SIGTERM: a scheduler wants the machine back.
    pub fn terminated(&self) -> bool {
        self.0.asked.load(Ordering::SeqCst) == SIGTERM
    }

    /// From now on a signal ends the process: all is saved.
    pub fn quit_at_once(&self) {
        self.0.at_once.store(true, Ordering::SeqCst);
    }
}

/// Ends the process, as a shell reports one that a signal has ended.
fn end(signal: i32) -> ! {
    if signal == SIGTERM {
        std::thread::sleep(LAST_WORDS);
    }
    std::process::exit(128 + signal);
}
