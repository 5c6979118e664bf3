//! Ranks of one process that lend each other their cores: who waits takes tasks of who computes. A rank's own threads take them
//! from the same desk.
//!
//! An uneven routing gives one rank more rows than another in every layer, and every exchange waits for the slower. On one
//! machine the core of the one that waits is at hand. Results of tasks do not depend on who runs them, so no bit changes.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Ranks that help each other. Cloning shares it.
#[derive(Clone)]
pub struct Crew {
    desks: Arc<[Desk]>,
}

/// What one rank lets others do.
#[derive(Default)]
struct Desk {
    /// Counts openings and closings: odd while there is something, for a look without the lock.
    turn: AtomicUsize,
    lent: Mutex<Option<Lent>>,
}

impl Desk {
    /// Takes tasks while there are some; whether there were any.
    fn help(&self) -> bool {
        let lent = {
            let lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(Lent(work)) = *lent else { return false };
            // SAFETY: while the pointer lies on the desk, whose lock is held, its owner has not let go of the work.
            let work = unsafe { &*work };
            if !work.has_some() {
                return false;
            }
            work.helpers.fetch_add(1, Ordering::Relaxed);
            work
        };
        lent.help();
        // The owner may let go of the work from here on.
        lent.helpers.fetch_sub(1, Ordering::Release);
        true
    }
}

/// Work that lies on the stack of the rank that lends it, until [`Opened`] is dropped.
#[derive(Clone, Copy)]
struct Lent(*const Work<'static>);

// SAFETY: what it points to is Sync, and outlives every use: a helper announces itself under the desk's lock, and the owner
// takes the pointer back under that lock and then waits for all helpers.
unsafe impl Send for Lent {}

/// Tasks that several threads take from.
pub(super) struct Work<'a> {
    next: AtomicUsize,
    tasks: usize,
    task: &'a (dyn Fn(usize) + Sync),
    helpers: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl<'a> Work<'a> {
    pub fn new(tasks: usize, task: &'a (dyn Fn(usize) + Sync)) -> Self {
        Self { next: AtomicUsize::new(0), tasks, task, helpers: AtomicUsize::new(0), panic: Mutex::new(None) }
    }

    /// Takes tasks until none is left.
    pub fn run(&self) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.tasks {
                break;
            }
            (self.task)(index);
        }
    }

    fn has_some(&self) -> bool {
        self.next.load(Ordering::Relaxed) < self.tasks
    }

    /// As [`Work::run`], for another rank: a panic is the owner's.
    fn help(&self) {
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| self.run())) {
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
    }
}

/// Work that others may join in, until dropped: then no helper is left in it.
pub(super) struct Opened<'a> {
    desk: &'a Desk,
    work: &'a Work<'a>,
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        self.desk.turn.fetch_add(1, Ordering::Relaxed);
        *self.desk.lent.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let mut looks = 0u32;
        while self.work.helpers.load(Ordering::Acquire) > 0 {
            looks += 1;
            if looks.is_multiple_of(64) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        let payload = self.work.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = payload
            && !std::thread::panicking()
        {
            resume_unwind(payload);
        }
    }
}

impl Crew {
    /// A crew of `ranks` ranks.
    pub fn new(ranks: usize) -> Self {
        Self { desks: (0..ranks).map(|_| Desk::default()).collect() }
    }

    /// How many ranks there are.
    pub fn ranks(&self) -> usize {
        self.desks.len()
    }

    /// Takes tasks of other ranks while there are some, for the rank `me`; whether there were any.
    pub fn help(&self, me: usize) -> bool {
        let others = (1..self.desks.len()).map(|ahead| &self.desks[(me + ahead) % self.desks.len()]);
        let open = others.filter(|desk| !desk.turn.load(Ordering::Relaxed).is_multiple_of(2));
        open.fold(false, |helped, desk| desk.help() | helped)
    }

    /// As a thread of the rank `me`, takes tasks of its work if it is not the work of turn `seen`, which becomes its turn.
    pub(super) fn help_own(&self, me: usize, seen: &mut usize) -> bool {
        self.has_new(me, *seen) && {
            *seen = self.desks[me].turn.load(Ordering::Relaxed);
            self.desks[me].help()
        }
    }

    /// Whether the rank `me` has work that is not that of turn `seen`.
    pub(super) fn has_new(&self, me: usize, seen: usize) -> bool {
        let turn = self.desks[me].turn.load(Ordering::SeqCst);
        !turn.is_multiple_of(2) && turn != seen
    }

    /// Lets others join in the work of the rank `me`; nothing if it already lends some.
    pub(super) fn open<'a>(&'a self, me: usize, work: &'a Work<'a>) -> Option<Opened<'a>> {
        let desk = &self.desks[me];
        let mut lent = desk.lent.lock().unwrap_or_else(PoisonError::into_inner);
        if lent.is_some() {
            return None;
        }
        *lent = Some(Lent(std::ptr::from_ref(work).cast()));
        desk.turn.fetch_add(1, Ordering::SeqCst);
        Some(Opened { desk, work })
    }
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    use super::*;
    use crate::cpu::Threads;

    /// Runs `work` as rank 0 while rank 1 helps; how many tasks rank 1 ran.
    fn with_a_helper(work: impl Fn(&Threads, &AtomicUsize)) -> usize {
        let (crew, done, helped) = (Crew::new(2), AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            let helper = std::thread::Builder::new().name("helper".into());
            let help = || {
                while !done.load(Ordering::Acquire) {
                    crew.help(1);
                }
            };
            helper.spawn_scoped(scope, help).unwrap();
            let threads = Threads::in_crew(1, &crew, 0);
            let outcome = catch_unwind(AssertUnwindSafe(|| work(&threads, &helped)));
            done.store(true, Ordering::Release);
            outcome.unwrap_or_else(|payload| resume_unwind(payload));
        });
        helped.into_inner()
    }

    fn by_helper() -> bool {
        std::thread::current().name() == Some("helper")
    }

    #[test]
    fn every_task_runs_once_whoever_runs_it() {
        let helped = with_a_helper(|threads, helped| {
            // A busy machine may not let the helper run for a while.
            for _ in 0..200 {
                for tasks in [2, 3, 17, 400] {
                    let ran: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    threads.run(tasks, |index| {
                        ran[index].fetch_add(1, Ordering::Relaxed);
                        std::thread::sleep(Duration::from_micros(50));
                        helped.fetch_add(usize::from(by_helper()), Ordering::Relaxed);
                    });
                    assert!(ran.iter().all(|count| count.load(Ordering::Relaxed) == 1));
                }
                if helped.load(Ordering::Relaxed) > 0 {
                    break;
                }
            }
        });
        assert!(helped > 0, "the helper ran no task");
    }

    #[test]
    #[should_panic(expected = "a task of rank 0 fails on rank 1")]
    fn a_panic_is_the_owners() {
        with_a_helper(|threads, _| {
            for _ in 0..1000 {
                threads.run(8, |_| {
                    std::thread::sleep(Duration::from_micros(50));
                    assert!(!by_helper(), "a task of rank 0 fails on rank 1");
                });
            }
        });
    }

    #[test]
    fn a_task_may_run_tasks() {
        with_a_helper(|threads, _| {
            let sum = AtomicUsize::new(0);
            threads.run(20, |i| {
                threads.run(5, |j| {
                    sum.fetch_add(i * 5 + j, Ordering::Relaxed);
                })
            });
            assert_eq!(sum.into_inner(), (0..100).sum());
        });
    }
}
