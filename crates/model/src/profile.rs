//! Where a rank's time goes: a sum a phase always, single spans on request.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Whether a span computes or communicates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    /// Kernels.
    Compute,
    /// Collectives, waiting included.
    Communication,
}

impl Lane {
    /// `compute` or `communication`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::Communication => "communication",
        }
    }
}

/// One phase, once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    /// Where it belongs.
    pub lane: Lane,
    /// Its phase.
    pub name: &'static str,
    /// When it began, since the profile's start.
    pub start: Duration,
    /// How long it took.
    pub length: Duration,
}

/// The profile of one rank. Cloning shares it.
#[derive(Debug, Clone)]
pub struct Profile {
    start: Instant,
    keep_spans: Rc<Cell<bool>>,
    inner: Rc<RefCell<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    phases: BTreeMap<(Lane, &'static str), Duration>,
    spans: Vec<Span>,
}

impl Profile {
    /// An empty profile whose times count from `start`; ranks that share a trace share it.
    pub fn new(start: Instant) -> Self {
        Self { start, keep_spans: Rc::default(), inner: Rc::default() }
    }

    /// Whether single spans are kept from now on.
    pub fn keep_spans(&self, keep: bool) {
        self.keep_spans.set(keep);
    }

    /// Times `work` as a compute phase.
    pub fn compute<T>(&self, name: &'static str, work: impl FnOnce() -> T) -> T {
        self.span(Lane::Compute, name, work)
    }

    /// Times `work` as a communication phase.
    pub fn communicate<T>(&self, name: &'static str, work: impl FnOnce() -> T) -> T {
        self.span(Lane::Communication, name, work)
    }

    fn span<T>(&self, lane: Lane, name: &'static str, work: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = work();
        let length = begin.elapsed();
        let mut inner = self.inner.borrow_mut();
        *inner.phases.entry((lane, name)).or_default() += length;
        if self.keep_spans.get() {
            inner.spans.push(Span { lane, name, start: begin.duration_since(self.start), length });
        }
        result
    }

    /// The time of every phase so far.
    pub fn phases(&self) -> Vec<(Lane, &'static str, Duration)> {
        self.inner.borrow().phases.iter().map(|((lane, name), time)| (*lane, *name, *time)).collect()
    }

    /// Time in a lane so far.
    pub fn total(&self, lane: Lane) -> Duration {
        self.inner.borrow().phases.iter().filter(|((l, _), _)| *l == lane).map(|(_, time)| *time).sum()
    }

    /// The spans kept since they were last taken.
    pub fn take_spans(&self) -> Vec<Span> {
        std::mem::take(&mut self.inner.borrow_mut().spans)
    }
}
