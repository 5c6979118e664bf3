//! Starts the ranks of one process and finds out what became of them.

use std::any::Any;
use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, available_parallelism};

use super::world::World;
use super::{Meanwhile, PretendedLink, ThreadTransport};
use crate::communicator::Communicator;
use crate::error::{Cause, CommError, Failure, RunError};

type Boxed = Box<dyn Error + Send + Sync>;

/// A world of ranks that are threads of this process, with its options.
#[derive(Debug, Clone)]
pub struct ThreadRanks {
    ranks: usize,
    stack_bytes: Option<usize>,
    bucket_bytes: usize,
    jitter: Option<u64>,
    nodes: Vec<usize>,
    placed: Vec<usize>,
    link: Option<PretendedLink>,
    meanwhile: Option<Meanwhile>,
}

/// Runs `body` on `ranks` threads, each with its world communicator, and returns what they return, by rank.
///
/// # Errors
/// The first root cause if a rank panics, returns an error or leaves early, calls do not match, or nothing can go on.
pub fn run_ranks<T, E, F>(ranks: usize, body: F) -> Result<Vec<T>, RunError>
where
    T: Send,
    E: Into<Boxed>,
    F: Fn(Communicator) -> Result<T, E> + Sync,
{
    ThreadRanks::new(ranks).run(body)
}

impl ThreadRanks {
    /// `ranks` ranks, with the usual options.
    pub fn new(ranks: usize) -> Self {
        // Sums read the senders' memory where it is, so there is no staging to keep small.
        Self {
            ranks,
            stack_bytes: None,
            bucket_bytes: usize::MAX,
            jitter: None,
            nodes: Vec::new(),
            placed: Vec::new(),
            link: None,
            meanwhile: None,
        }
    }

    /// What a rank does while it waits for others, where every rank has a core: called with its number again and again, says
    /// whether there was anything to do.
    #[must_use]
    pub fn meanwhile(mut self, work: impl Fn(usize) -> bool + Send + Sync + 'static) -> Self {
        self.meanwhile = Some(Meanwhile(Arc::new(work)));
        self
    }

    /// The stack of each rank's thread, in bytes.
    #[must_use]
    pub fn stack_bytes(mut self, bytes: usize) -> Self {
        self.stack_bytes = Some(bytes);
        self
    }

    /// Cuts reductions into calls that take at most this many bytes from a rank. Threads need none; results do not
    /// depend on it.
    #[must_use]
    pub fn bucket_bytes(mut self, bytes: usize) -> Self {
        self.bucket_bytes = bytes;
        self
    }

    /// Pretends that the ranks are on nodes: the first `sizes[0]` on node 0, the next `sizes[1]` on node 1 and so on.
    /// Ranks that are left over are one more node; without sizes all are on one.
    #[must_use]
    pub fn nodes(mut self, sizes: &[usize]) -> Self {
        self.nodes = sizes.to_vec();
        self
    }

    /// Pretends that rank i is on node `nodes[i]`, as where ranks are dealt out over hosts in turn; the ranks that are left
    /// over are where [`nodes`](Self::nodes) says.
    #[must_use]
    pub fn placed(mut self, nodes: &[usize]) -> Self {
        self.placed = nodes.to_vec();
        self
    }

    /// For measurements: puts a link between the pretended nodes.
    #[must_use]
    pub fn link(mut self, link: Option<PretendedLink>) -> Self {
        self.link = link;
        self
    }

    /// The node of every rank.
    pub fn node_of(&self) -> Vec<usize> {
        let sized = self.nodes.iter().enumerate().flat_map(|(node, &size)| std::iter::repeat_n(node, size));
        let sized = sized.chain(std::iter::repeat(self.nodes.len())).skip(self.placed.len());
        self.placed.iter().copied().chain(sized).take(self.ranks).collect()
    }

    /// For tests: ranks start calls and take what arrives late and in another order, drawn from `seed`.
    #[must_use]
    pub fn jitter(mut self, seed: u64) -> Self {
        self.jitter = Some(seed);
        self
    }

    /// Runs `body` on every rank, on threads named `rank 0`, `rank 1`, ...; as [`run_ranks`].
    ///
    /// # Errors
    /// As [`run_ranks`].
    pub fn run<T, E, F>(&self, body: F) -> Result<Vec<T>, RunError>
    where
        T: Send,
        E: Into<Boxed>,
        F: Fn(Communicator) -> Result<T, E> + Sync,
    {
        let spin = available_parallelism().is_ok_and(|cores| self.ranks <= cores.get());
        let mut world = World::new(self.node_of(), self.bucket_bytes, spin, self.jitter, self.link);
        world.meanwhile.clone_from(&self.meanwhile);
        let world = Arc::new(world);
        let outcomes: Vec<Option<Result<T, Boxed>>> = thread::scope(|scope| {
            let mut threads = Vec::with_capacity(self.ranks);
            for rank in 0..self.ranks {
                let (world, body) = (Arc::clone(&world), &body);
                let mut builder = thread::Builder::new().name(format!("rank {rank}"));
                if let Some(bytes) = self.stack_bytes {
                    builder = builder.stack_size(bytes);
                }
                let spawned = builder.spawn_scoped(scope, {
                    let world = Arc::clone(&world);
                    move || run_rank(&world, rank, body)
                });
                match spawned {
                    Ok(thread) => threads.push(thread),
                    Err(error) => world.exit(rank, Some(Cause::NotStarted { message: error.to_string() })),
                }
            }
            threads.into_iter().map(|thread| thread.join().unwrap_or(None)).collect()
        });
        settle(&world, outcomes)
    }
}

/// Runs one rank; None if it panicked.
fn run_rank<T, E, F>(world: &Arc<World>, rank: usize, body: &F) -> Option<Result<T, Boxed>>
where
    E: Into<Boxed>,
    F: Fn(Communicator) -> Result<T, E> + Sync,
{
    let result = catch_unwind(AssertUnwindSafe(|| {
        let transport = Arc::new(ThreadTransport::new(Arc::clone(world), rank));
        match Communicator::over(transport) {
            Ok(communicator) => body(communicator).map_err(Into::into),
            Err(error) => Err(error.into()),
        }
    }));
    let cause = match &result {
        Ok(Ok(_)) => None,
        Ok(Err(error)) => Some(Cause::Errored { message: error.to_string() }),
        Err(payload) => Some(Cause::Panicked { message: panic_message(payload.as_ref()) }),
    };
    world.exit(rank, cause);
    result.ok()
}

fn settle<T>(world: &World, outcomes: Vec<Option<Result<T, Boxed>>>) -> Result<Vec<T>, RunError> {
    if let Some(failure) = world.lock().failure.clone() {
        return Err(RunError { source: root_cause(&failure, outcomes), failure });
    }
    // Without a failure every rank has returned a value: any other outcome is recorded as one.
    Ok(outcomes.into_iter().flatten().flatten().collect())
}

/// The error value of the rank that failed, unless it is only the word that the run has failed.
fn root_cause<T>(failure: &Failure, outcomes: Vec<Option<Result<T, Boxed>>>) -> Option<Boxed> {
    if !matches!(failure.cause, Cause::Errored { .. }) {
        return None;
    }
    let error = outcomes.into_iter().nth(failure.rank).flatten()?.err()?;
    let consequence = matches!(error.downcast_ref(), Some(CommError::Failed(_)));
    (!consequence).then_some(error)
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a value that is no text".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_on_the_nodes_that_were_said() {
        let nodes = |ranks: &ThreadRanks| {
            let all =
                ranks.run(|comm| Ok::<_, CommError>((0..5).map(|rank| comm.node(rank)).collect::<Vec<_>>()));
            all.unwrap().swap_remove(3)
        };
        let ranks = ThreadRanks::new(5).nodes(&[1, 2]);
        assert_eq!(nodes(&ranks), [0, 1, 1, 2, 2]);
        assert_eq!(nodes(&ranks.clone().placed(&[0, 1, 0, 1, 0])), [0, 1, 0, 1, 0]);
        assert_eq!(nodes(&ranks.placed(&[2, 0])), [2, 0, 1, 2, 2]);
    }
}
