//! The private compute threads of a rank, and what tasks need: disjoint parts of a buffer, scratch memory.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

use super::crew::{Crew, Work};
use super::system_memory::prepare_thread;
use super::team::Team;

/// Compute threads of one rank. Cloning shares them.
///
/// Kernels split their work into tasks whose results do not depend on who runs them, so neither the number of threads
/// nor the order of tasks changes a bit.
#[derive(Clone)]
pub struct Threads {
    /// Ranks that may help, this one among them, and its number.
    crew: Crew,
    me: usize,
    /// The threads besides the caller's.
    team: Option<Arc<Team>>,
}

impl Threads {
    /// `count` threads, the one that calls [`Threads::run`] among them. Where the system refuses threads, there are fewer.
    pub fn new(count: usize) -> Self {
        Self::in_crew(count, &Crew::new(1), 0)
    }

    /// As [`Threads::new`], for the rank `me` of a crew: ranks that wait help with its tasks.
    pub fn in_crew(count: usize, crew: &Crew, me: usize) -> Self {
        assert!(me < crew.ranks(), "rank {me} of a crew of {}", crew.ranks());
        prepare_thread();
        let team = (count > 1).then(|| Arc::new(Team::new(count - 1, crew, me)));
        Self { crew: crew.clone(), me, team }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        1 + self.team.as_ref().map_or(0, |team| team.count())
    }

    /// Runs `task(0)` to `task(tasks - 1)`, each once, in any order, on all threads: a free thread takes the next one.
    /// Put long tasks first. Allocates nothing.
    pub fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        if tasks < 2 || (self.count() < 2 && self.crew.ranks() < 2) {
            return (0..tasks).for_each(task);
        }
        let work = Work::new(tasks, &task);
        let opened = self.crew.open(self.me, &work);
        if let (Some(_), Some(team)) = (&opened, &self.team) {
            team.wake();
        }
        work.run();
        drop(opened);
    }

    /// Cuts `0..rows` into ranges of at most `block` rows and runs `task` on each.
    pub fn run_rows(&self, rows: usize, block: usize, task: impl Fn(Range<usize>) + Sync) {
        let block = block.max(1);
        self.run(rows.div_ceil(block), |index| task(index * block..rows.min((index + 1) * block)));
    }

    /// Cuts `data` into chunks of at most `chunk` elements and runs `task(index, chunk)` on each.
    pub fn chunks_mut<T: Send>(&self, data: &mut [T], chunk: usize, task: impl Fn(usize, &mut [T]) + Sync) {
        let chunk = chunk.max(1);
        let (len, parts) = (data.len(), DisjointMut::new(data));
        self.run(len.div_ceil(chunk), |index| {
            let range = index * chunk..len.min((index + 1) * chunk);
            // SAFETY: ranges of different indices do not overlap, and `run` runs each index once.
            task(index, unsafe { parts.range(range) });
        });
    }
}

/// A slice that tasks write disjoint parts of.
#[derive(Clone, Copy)]
pub struct DisjointMut<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: it is an exclusive borrow of the slice; handing out parts is unsafe and demands that they be disjoint.
unsafe impl<T: Send> Send for DisjointMut<'_, T> {}
// SAFETY: as above; a shared reference gives access to the elements only through the unsafe methods.
unsafe impl<T: Send> Sync for DisjointMut<'_, T> {}

impl<'a, T> DisjointMut<'a, T> {
    /// Borrows the slice until the last part is gone.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// Elements of the whole slice.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the slice has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part for writing.
    ///
    /// # Safety
    /// While the part lives, no other part that overlaps it may live.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn range(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} elements", self.len);
        // SAFETY: within the slice by the assertion; alone by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// Pointer to the element at `offset <= len`, for parts that are no ranges (tiles of a matrix).
    pub fn pointer(&self, offset: usize) -> *mut T {
        assert!(offset <= self.len, "{offset} of {} elements", self.len);
        self.start.wrapping_add(offset)
    }
}

/// One line of a cache: scratch memory starts at a line's start.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

const LINE: usize = 16;

// SAFETY: 16 floats without padding; all bit patterns are valid.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Line {}

thread_local! {
    static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Scratch memory of the current thread, given back when dropped and used again: a steady step allocates none.
pub struct Scratch {
    lines: Vec<Line>,
    len: usize,
}

impl Scratch {
    /// `len` elements with unspecified contents, aligned to a cache line.
    pub fn take(len: usize) -> Self {
        let needed = len.div_ceil(LINE);
        let mut lines = FREE.with_borrow_mut(|free| {
            let fits = (0..free.len()).filter(|&i| free[i].len() >= needed).min_by_key(|&i| free[i].len());
            let largest = || (0..free.len()).max_by_key(|&i| free[i].len());
            fits.or_else(largest).map(|index| free.swap_remove(index)).unwrap_or_default()
        });
        if lines.len() < needed {
            lines.resize(needed, Line::default());
        }
        Self { lines, len }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        // While the thread ends there may be nothing left to give back to.
        let _ = FREE.try_with(|free| free.borrow_mut().push(lines));
    }
}

impl Deref for Scratch {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}
