//! This process as a rank of an MPI job.

use std::any::Any;
use std::error::Error;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::engine::Engine;
use super::raw::Library;
use super::telling::{FIRST, telling};
use super::verdict::{CERTAIN, DOUBTFUL};
use super::wire::Message;
use crate::communicator::Communicator;
use crate::error::{Cause, CommError, Failure, RunError, SHOWN, Waiting};
use crate::flight::FlightRecorder;
use crate::transport::{Call, Done, GroupId, NativeSums, Ticket, Transport};

type Boxed = Box<dyn Error + Send + Sync>;

/// How soon started calls are looked after again where something has come while the rank computes. Without news the pause
/// doubles up to [`IDLE`]: each look interrupts the computation for longer than it takes itself.
const BUSY: Duration = Duration::from_micros(250);
/// How often messages are looked for while nothing is under way.
const IDLE: Duration = Duration::from_millis(1);
/// How often a waiting rank looks before it gives way to others.
const LOOKS: u32 = 64;

/// How MPI is used; equal on all ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MpiOptions {
    /// Larger messages are cut: counts of MPI end at 2^31. Results do not depend on it.
    pub chunk_bytes: usize,
    /// A sum takes about so many bytes of each rank at once, and stages at most twice as many of each; between nodes 32 times
    /// as many in all, if that is more. Results do not depend on it.
    pub bucket_bytes: usize,
    /// So many members of a group are named to the others, for what is said if they open it with other members. Results do
    /// not depend on it.
    pub named_ranks: usize,
}

impl Default for MpiOptions {
    fn default() -> Self {
        Self { chunk_bytes: 1 << 30, bucket_bytes: 1 << 20, named_ranks: SHOWN }
    }
}

/// This process's rank in an MPI job.
pub struct MpiRanks {
    engine: Arc<Engine>,
    world: Communicator,
    helper: Mutex<Option<JoinHandle<()>>>,
    stop: Arc<AtomicBool>,
}

impl fmt::Debug for MpiRanks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MpiRanks(rank {} of {})", self.engine.rank, self.engine.size)
    }
}

impl MpiRanks {
    /// Joins the job that a launcher started this process for. Once a process, and all processes of the job do.
    ///
    /// MPI waits until all have come, however long that is. A thread of its own calls `tell` meanwhile with the time that has
    /// gone: after a minute, then whenever that has doubled.
    ///
    /// # Errors
    /// If MPI cannot be initialised for several threads.
    pub fn join(options: MpiOptions, tell: impl Fn(Duration) + Send + 'static) -> Result<Self, CommError> {
        let library = telling("start of MPI", FIRST, tell, Library::start)?;
        let engine = Arc::new(Engine::new(library, options)?);
        let world = Communicator::over(Arc::new(MpiTransport::new(Arc::clone(&engine))))?;
        let stop = Arc::new(AtomicBool::new(false));
        let helper = thread::Builder::new().name("communication".into()).spawn({
            let (engine, stop) = (Arc::clone(&engine), Arc::clone(&stop));
            move || help(&engine, &stop)
        });
        let helper = helper.map_err(|error| CommError::Transport(format!("no thread to be had: {error}")))?;
        Ok(Self { engine, world, helper: Mutex::new(Some(helper)), stop })
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.engine.rank
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        self.engine.size
    }

    /// The node of every rank.
    pub fn node_of(&self) -> Vec<usize> {
        self.engine.nodes.clone()
    }

    /// How many ranks are on this rank's node.
    pub fn ranks_here(&self) -> usize {
        let here = self.engine.nodes[self.engine.rank];
        self.engine.nodes.iter().filter(|node| **node == here).count()
    }

    /// Whether this rank is the lowest on its node but for `dead`.
    pub fn is_first_here_without(&self, dead: usize) -> bool {
        let nodes = &self.engine.nodes;
        let here = nodes[self.engine.rank];
        (0..self.engine.size).find(|&rank| rank != dead && nodes[rank] == here) == Some(self.engine.rank)
    }

    /// The MPI library, for example `Open MPI v4.1.4`.
    pub fn library(&self) -> &str {
        &self.engine.version
    }

    /// This rank's handle on all ranks.
    pub fn world(&self) -> &Communicator {
        &self.world
    }

    /// For benchmarks: whether sums of vectors over all ranks, of which each holds one leaf, are the MPI library's own from
    /// now on. They are not exact. All ranks say the same.
    pub fn sum_natively(&self, on: bool) {
        self.engine.native_sums.store(on, Ordering::Relaxed);
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Runs `body` as this rank, as [`run_ranks`](crate::run_ranks) does on threads, and returns what it returns.
    ///
    /// # Errors
    /// The first root cause in the job if a rank panics, returns an error or leaves early, or calls do not match; the
    /// same on all ranks. The error value is there on the rank that returned it.
    pub fn run<T, E, F>(&self, body: F) -> Result<T, RunError>
    where
        E: Into<Boxed>,
        F: FnOnce(Communicator) -> Result<T, E>,
    {
        let outcome = catch_unwind(AssertUnwindSafe(|| body(self.world.clone()).map_err(Into::into)));
        let (cause, source) = match outcome {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => (Cause::Errored { message: error.to_string() }, Some(error)),
            Err(payload) => (Cause::Panicked { message: panic_message(payload.as_ref()) }, None),
        };
        let failure = self.settle(cause);
        let mine = failure.rank == self.rank() && matches!(failure.cause, Cause::Errored { .. });
        let consequence =
            source.as_ref().is_some_and(|error| matches!(error.downcast_ref(), Some(CommError::Failed(_))));
        Err(RunError { failure, source: source.filter(|_| mine && !consequence) })
    }

    /// Tells the job that this rank ends with an error, and returns why the job has failed: for this, unless another
    /// rank was first.
    pub fn fail(&self, message: String) -> Arc<Failure> {
        self.settle(Cause::Errored { message })
    }

    fn settle(&self, cause: Cause) -> Arc<Failure> {
        let mut state = self.engine.lock();
        let doubtful = self.engine.library_failed.load(Ordering::Relaxed);
        let weight = if doubtful { DOUBTFUL } else { CERTAIN };
        state.report(&self.engine, self.engine.failure(cause), weight);
        loop {
            if let Some(failure) = state.verdict.failure() {
                return Arc::clone(failure);
            }
            // Should MPI itself have failed, the rank's own report stands when the time is over.
            let _ = state.progress(&self.engine);
            drop(state);
            thread::yield_now();
            state = self.engine.lock();
        }
    }

    /// The process was told to end, and so are the others: from now on it calls none of them dead.
    pub fn expect_end(&self) {
        self.engine.ending.store(true, Ordering::Relaxed);
    }

    /// Whether the process was told to end.
    pub fn expects_end(&self) -> bool {
        self.engine.ending.load(Ordering::Relaxed)
    }

    /// The failure, if this rank is the one that found out that another one has died.
    pub fn found_dead(&self) -> Option<Arc<Failure>> {
        let state = self.engine.lock();
        state.verdict.failure().filter(|_| state.is_witness()).cloned()
    }

    /// Says that this rank tells people why the job has failed: the others need not.
    pub fn says(&self) {
        let mut state = self.engine.lock();
        // Who does not hear it says the same once more.
        let _ = state.tell_all(&Message::Said);
        let _ = state.progress(&self.engine);
    }

    /// Whether another rank tells people why the job has failed.
    pub fn was_said(&self) -> bool {
        let mut state = self.engine.lock();
        while matches!(state.progress(&self.engine), Ok(true)) {}
        state.said
    }

    /// Leaves the job in good order: waits until all ranks do, and finalises MPI. That waits for all ranks once more, without end:
    /// a thread of its own calls `tell` meanwhile, as for [`MpiRanks::join`].
    ///
    /// # Errors
    /// [`CommError::Failed`] if the job has failed, or a rank has neither left nor said that it gets on
    /// ([`Communicator::beat`]) for `patience`.
    pub fn leave(
        &self,
        patience: Option<Duration>,
        tell: impl Fn(Duration) + Send + 'static,
    ) -> Result<(), CommError> {
        let mut state = self.engine.lock();
        state.tell_all(&Message::Bye)?;
        let (mut waited, mut looked) = (Duration::ZERO, Instant::now());
        let mut beats = 0;
        loop {
            state.progress(&self.engine)?;
            state.verdict.check()?;
            if state.all_gone() {
                break;
            }
            if patience.is_some_and(|patience| waited > patience) {
                state.report_staying(&self.engine, waited);
            }
            drop(state);
            thread::sleep(BUSY);
            // A process that was stopped itself has not waited meanwhile.
            waited += looked.elapsed().min(IDLE * LOOKS);
            looked = Instant::now();
            let heard = self.engine.beats.load(Ordering::Relaxed);
            if std::mem::replace(&mut beats, heard) != heard {
                waited = Duration::ZERO;
            }
            state = self.engine.lock();
        }
        drop(state);
        self.stop_helper();
        telling("end of MPI", FIRST, tell, || {
            self.engine.lock().finalise();
            Ok(())
        })
    }

    /// Ends the whole job at once; the launcher returns `code`.
    pub fn abort(&self, code: i32) {
        // What was told to others should have left.
        let _ = self.engine.lock().progress(&self.engine);
        self.engine.lock().library.abort(code);
    }

    fn stop_helper(&self) {
        self.stop.store(true, Ordering::Release);
        let helper = self.helper.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(helper) = helper {
            // It has no panic of its own to tell of: a rank's thread finds the same error in its next call.
            let _ = helper.join();
        }
    }
}

impl Drop for MpiRanks {
    fn drop(&mut self) {
        self.stop_helper();
    }
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a value that is no text".into())
}

/// Looks after started calls while the rank's own thread does not.
fn help(engine: &Engine, stop: &AtomicBool) {
    let mut pause = IDLE;
    while !stop.load(Ordering::Acquire) {
        pause = IDLE.min(2 * pause);
        if !engine.waits.load(Ordering::Acquire) {
            let mut state = engine.lock();
            // An error comes up again in the rank's next call.
            let Ok(news) = state.progress(engine) else { return };
            if news && state.is_busy() {
                pause = BUSY;
            }
        }
        thread::sleep(pause);
    }
}

/// The rank's side of the [`Transport`] seam.
struct MpiTransport {
    engine: Arc<Engine>,
    /// Every rank of this node has a core: looking again costs nobody anything.
    cores_for_all: bool,
}

impl MpiTransport {
    fn new(engine: Arc<Engine>) -> Self {
        let cores_for_all = engine.lock().has_cores_for_all();
        Self { engine, cores_for_all }
    }

    /// Keeps in mind that the library has failed, if that is the error.
    fn noted<T>(&self, outcome: Result<T, CommError>) -> Result<T, CommError> {
        if matches!(outcome, Err(CommError::Transport(_))) {
            self.engine.library_failed.store(true, Ordering::Relaxed);
        }
        outcome
    }

    fn poll(&self, ticket: Ticket) -> Result<Done, CommError> {
        let engine = &self.engine;
        let (mut looks, mut heard) = (0u32, None);
        loop {
            let mut state = engine.lock();
            // By either thread.
            if heard.replace(state.heard) != Some(state.heard) {
                if let Some(done) = state.take(ticket.0)? {
                    state.wait_in(None);
                    return Ok(done);
                }
                state.wait_in(Some(ticket.0));
            }
            state.verdict.check()?;
            let news = state.progress(engine)?;
            drop(state);
            looks = if news { 0 } else { looks + 1 };
            if looks > 0 && (!self.cores_for_all || looks.is_multiple_of(LOOKS)) {
                thread::yield_now();
            }
        }
    }
}

impl Transport for MpiTransport {
    fn rank(&self) -> usize {
        self.engine.rank
    }

    fn size(&self) -> usize {
        self.engine.size
    }

    fn node(&self, rank: usize) -> usize {
        self.engine.nodes[rank]
    }

    fn bucket_bytes(&self) -> usize {
        self.engine.options.bucket_bytes
    }

    fn set_step(&self, step: u64) {
        self.engine.step.store(step, Ordering::Relaxed);
    }

    fn recorder(&self) -> &FlightRecorder {
        &self.engine.recorder
    }

    fn failure(&self) -> Option<Arc<Failure>> {
        self.engine.lock().verdict.failure().cloned()
    }

    fn has_failed(&self) -> bool {
        self.engine.failed.load(Ordering::Relaxed)
    }

    fn fail(&self, failure: Arc<Failure>) {
        let mut failure = Failure::clone(&failure);
        let mut state = self.engine.lock();
        if failure.call.is_none() {
            state.add_last_call(&self.engine, &mut failure);
        }
        state.accuse(&self.engine, failure, 1);
    }

    fn beat(&self) {
        self.engine.lock().beat();
    }

    fn beats(&self) -> u64 {
        self.engine.beats.load(Ordering::Relaxed)
    }

    fn waiting(&self) -> Option<Waiting> {
        self.engine.lock().waits(self.engine.rank)
    }

    fn open_group(&self, name: &str, members: &[usize]) -> Result<GroupId, CommError> {
        self.noted(self.engine.lock().open_group(&self.engine, name, members))
    }

    fn start(&self, call: Call) -> Result<Ticket, CommError> {
        self.noted(self.engine.lock().start(&self.engine, call)).map(Ticket)
    }

    fn finish(&self, ticket: Ticket) -> Result<Done, CommError> {
        let begin = Instant::now();
        self.engine.waits.store(true, Ordering::Release);
        let done = self.noted(self.poll(ticket));
        self.engine.waits.store(false, Ordering::Release);
        let done = done?;
        let moving: Duration = done.moving.iter().sum();
        Ok(Done { wait: begin.elapsed().saturating_sub(moving), ..done })
    }

    fn native_sums(&self) -> Option<&dyn NativeSums> {
        self.engine.native_sums.load(Ordering::Relaxed).then_some(&*self.engine as &dyn NativeSums)
    }

    fn cancel(&self, ticket: Ticket) {
        self.engine.lock().cancel(&self.engine, ticket.0);
    }
}
