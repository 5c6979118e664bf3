//! MPI's own start and end wait for all ranks, and say nothing meanwhile: somebody has to.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::CommError;

/// After so long it is said for the first time, then after twice as long, and so on.
pub(super) const FIRST: Duration = Duration::from_secs(60);
/// How often the time is looked at, at least.
const LOOK: Duration = Duration::from_secs(1);

/// Does `work`, called `name`, and tells meanwhile how long it has taken: after `first`, then after twice as long, and so on.
///
/// # Errors
/// Those of `work`, and if there is no thread to be had.
pub(super) fn telling<T>(
    name: &str,
    first: Duration,
    tell: impl Fn(Duration) + Send + 'static,
    work: impl FnOnce() -> Result<T, CommError>,
) -> Result<T, CommError> {
    let (stop, stopped) = channel();
    let watcher = thread::Builder::new().name(name.into());
    let watcher = watcher.spawn(move || watch(first, &stopped, &tell));
    let watcher = watcher.map_err(|error| CommError::Transport(format!("no thread to be had: {error}")))?;
    let outcome = work();
    drop::<std::sync::mpsc::Sender<()>>(stop);
    // Had it panicked, it would have nothing more to say.
    let _ = watcher.join();
    outcome
}

fn watch(first: Duration, stopped: &Receiver<()>, tell: &impl Fn(Duration)) {
    let look = first.min(LOOK);
    let (mut waited, mut due) = (Duration::ZERO, first);
    loop {
        let begin = Instant::now();
        if stopped.recv_timeout(look) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        // A process that was stopped itself has not waited meanwhile.
        waited += begin.elapsed().min(2 * look);
        if waited >= due {
            tell(waited);
            due *= 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn what_takes_long_is_told_of_until_it_is_over() {
        let first = Duration::from_millis(100);
        let told = Arc::new(Mutex::new(Vec::new()));
        let tell = {
            let told = Arc::clone(&told);
            move |waited| told.lock().unwrap().push(waited)
        };
        assert_eq!(telling("one", Duration::from_secs(60), tell.clone(), || Ok(7)).unwrap(), 7);
        assert!(told.lock().unwrap().is_empty());
        let outcome = telling("one", first, tell, || {
            thread::sleep(10 * first);
            Err::<(), _>(CommError::Transport("no".into()))
        });
        assert!(outcome.is_err());
        let at_the_end = told.lock().unwrap().clone();
        assert!((1..=4).contains(&at_the_end.len()) && at_the_end[0] >= first, "{at_the_end:?}");
        assert!(at_the_end.windows(2).all(|pair| pair[1] - pair[0] > first), "{at_the_end:?}");
        thread::sleep(3 * first);
        assert_eq!(*told.lock().unwrap(), at_the_end);
    }
}
