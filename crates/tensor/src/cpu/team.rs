//! Threads of a rank besides its own: they take tasks from its desk, and stay awake for a while when there is none.
//!
//! A step has hundreds of kernels, some of them shorter than it takes to wake a thread.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::crew::Crew;
use super::system_memory::prepare_thread;

/// How long a thread looks for work before it sleeps.
const AWAKE: Duration = Duration::from_micros(200);

/// Threads that help one rank until dropped.
pub(super) struct Team {
    threads: Vec<JoinHandle<()>>,
    bell: Arc<Bell>,
}

/// Where threads without work sleep.
#[derive(Default)]
struct Bell {
    asleep: AtomicUsize,
    ended: Mutex<bool>,
    rung: Condvar,
}

impl Team {
    /// As many of `count` threads as the system gives, for the rank `me` of a crew.
    pub fn new(count: usize, crew: &Crew, me: usize) -> Self {
        let bell = Arc::new(Bell::default());
        let threads = (1..=count).map_while(|index| {
            let (crew, bell) = (crew.clone(), bell.clone());
            let serve = move || {
                prepare_thread();
                bell.serve(&crew, me);
            };
            thread::Builder::new().name(format!("compute-{index}")).spawn(serve).ok()
        });
        Self { threads: threads.collect(), bell }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// Wakes those that sleep, after the rank has opened its work.
    pub fn wake(&self) {
        if self.bell.asleep.load(Ordering::SeqCst) > 0 {
            drop(self.bell.ended.lock().unwrap_or_else(PoisonError::into_inner));
            self.bell.rung.notify_all();
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        *self.bell.ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.bell.rung.notify_all();
        for thread in self.threads.drain(..) {
            // A task's panic went to the rank.
            let _ = thread.join();
        }
    }
}

impl Bell {
    /// Helps the rank `me` until the team ends.
    fn serve(&self, crew: &Crew, me: usize) {
        let (mut seen, mut looks, mut idle_since) = (0, 0u32, Instant::now());
        loop {
            if crew.help_own(me, &mut seen) {
                (looks, idle_since) = (0, Instant::now());
                continue;
            }
            looks += 1;
            if !looks.is_multiple_of(64) {
                std::hint::spin_loop();
            } else if idle_since.elapsed() < AWAKE {
                thread::yield_now();
            } else if self.sleep(|| crew.has_new(me, seen)) {
                idle_since = Instant::now();
            } else {
                return;
            }
        }
    }

    /// Sleeps until there is work; whether the team goes on.
    fn sleep(&self, has_work: impl Fn() -> bool) -> bool {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        // Counted before it looks, as the rank opens its work before it counts: one of them sees the other.
        self.asleep.fetch_add(1, Ordering::SeqCst);
        while !*ended && !has_work() {
            ended = self.rung.wait(ended).unwrap_or_else(PoisonError::into_inner);
        }
        self.asleep.fetch_sub(1, Ordering::SeqCst);
        !*ended
    }
}
