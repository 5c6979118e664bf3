//! The private compute threads of a rank.

/// Compute threads of one rank.
#[derive(Clone)]
pub struct Threads {
    count: usize,
}

impl Threads {
    /// `count` threads, the caller among them.
    pub fn new(count: usize) -> Self {
        Self { count }
    }
    /// How many.
    pub fn count(&self) -> usize {
        self.count
    }
    /// Runs `task(0..tasks)`, each once, in any order, on all threads.
    pub fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        (0..tasks).for_each(task);
    }
}
