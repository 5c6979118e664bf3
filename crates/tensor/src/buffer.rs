//! Host buffers that go back to their pool when dropped, so that a steady step asks the system for no memory.
//!
//! A pool maps its memory in large pieces and asks for huge pages there (`madvise`, where Linux offers them): a step reads and
//! writes hundreds of MiB once, and with pages of 4 KiB much of its time goes into finding where they lie.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::MmapMut;

use crate::backend::Buffer;

/// A flat f32 buffer in host memory, recycled on drop.
pub struct HostBuffer {
    block: Block,
    len: usize,
    /// Also keeps the block's arena mapped.
    pool: Pool,
}

/// The recycled buffers of one rank. Cloning shares it.
#[derive(Clone, Default)]
pub struct Pool(Arc<Mutex<Shelf>>);

#[derive(Default)]
struct Shelf {
    arenas: Vec<Arena>,
    free: BTreeMap<usize, Vec<Block>>,
    held: usize,
    in_use: usize,
    peak: usize,
}

/// Memory of the system, given away from its start to its end and never taken back.
struct Arena {
    mapping: MmapMut,
    used: usize,
}

/// A part of an arena that nothing else refers to: whoever holds it may read and write its elements.
struct Block {
    start: NonNull<f32>,
    capacity: usize,
}

// SAFETY: a block is the only reference to its elements, like a box of them.
unsafe impl Send for Block {}
// SAFETY: as for a box.
unsafe impl Sync for Block {}

/// Bytes of a huge page.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// Bytes of an arena, unless a buffer needs more: pages that nobody has used take no memory.
const ARENA: usize = 64 << 20;

/// Buffers begin at multiples of this many bytes: a line of a cache, and a vector.
const ALIGNMENT: usize = 64;

impl Arena {
    /// # Panics
    /// If the system has no memory for `bytes`.
    fn new(bytes: usize) -> Self {
        let bytes = bytes.next_multiple_of(HUGE_PAGE).max(ARENA);
        let mapping = MmapMut::map_anon(bytes)
            .unwrap_or_else(|error| panic!("the system has no {bytes} bytes for a buffer: {error}"));
        // Where there are no huge pages the common ones do.
        #[cfg(target_os = "linux")]
        let _ = mapping.advise(memmap2::Advice::HugePage);
        Self { mapping, used: 0 }
    }

    /// `capacity` elements, zero, or nothing if there is no room.
    fn cut(&mut self, capacity: usize) -> Option<Block> {
        let end = self.used.checked_add(capacity.checked_mul(size_of::<f32>())?)?;
        if end > self.mapping.len() {
            return None;
        }
        // SAFETY: `used` lies in the mapping.
        let start = unsafe { self.mapping.as_mut_ptr().add(self.used) };
        self.used = end.next_multiple_of(ALIGNMENT);
        NonNull::new(start.cast()).map(|start| Block { start, capacity })
    }
}

impl Block {
    fn bytes(&self) -> usize {
        self.capacity * size_of::<f32>()
    }
}

/// A free buffer serves a request of at least this share of its size (numerator over 4): with three quarters less memory would lie
/// idle, but a row count that was not there before would take new memory in any step.
const SMALLEST_SHARE_OF_4: usize = 2;

impl Pool {
    /// A buffer of `len` elements with unspecified contents.
    pub fn take(&self, len: usize) -> HostBuffer {
        let capacity = capacity_for(len);
        let mut shelf = self.shelf();
        let fits = shelf.free.range(capacity..).map(|(size, _)| *size).next();
        let reused =
            fits.filter(|size| size * SMALLEST_SHARE_OF_4 / 4 <= capacity).and_then(|size| shelf.pop(size));
        let block = reused.unwrap_or_else(|| shelf.cut(capacity));
        shelf.in_use += block.bytes();
        shelf.peak = shelf.peak.max(shelf.in_use);
        HostBuffer { block, len, pool: self.clone() }
    }

    /// Bytes in use now, and at most since the start.
    pub fn memory(&self) -> (usize, usize) {
        let shelf = self.shelf();
        (shelf.in_use, shelf.peak)
    }

    /// Bytes taken from the system, in use or waiting for reuse.
    pub fn held(&self) -> usize {
        self.shelf().held
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shelf {
    /// A block that no buffer had before.
    fn cut(&mut self, capacity: usize) -> Block {
        self.held += capacity * size_of::<f32>();
        let mut rooms = self.arenas.iter_mut();
        if let Some(block) = rooms.find_map(|arena| arena.cut(capacity)) {
            return block;
        }
        let mut arena = Arena::new(capacity * size_of::<f32>());
        let block = arena.cut(capacity).expect("an arena is at least as large as its first block");
        self.arenas.push(arena);
        block
    }

    fn pop(&mut self, size: usize) -> Option<Block> {
        self.free.get_mut(&size).and_then(Vec::pop).inspect(|_| {
            if self.free.get(&size).is_some_and(Vec::is_empty) {
                self.free.remove(&size);
            }
        })
    }
}

/// Sizes are rounded up to an eighth of a power of two, so that row counts which vary a little share buffers.
fn capacity_for(len: usize) -> usize {
    let step = (len.next_power_of_two() / 16).max(64);
    len.max(1).next_multiple_of(step)
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        let nothing = Block { start: NonNull::dangling(), capacity: 0 };
        let block = std::mem::replace(&mut self.block, nothing);
        let mut shelf = self.pool.shelf();
        shelf.in_use -= block.bytes();
        shelf.free.entry(block.capacity).or_default().push(block);
    }
}

impl Deref for HostBuffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: a block's elements are mapped, zero or written since, and `len` is at most its capacity.
        unsafe { std::slice::from_raw_parts(self.block.start.as_ptr(), self.len) }
    }
}

impl DerefMut for HostBuffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, and nothing else refers to them.
        unsafe { std::slice::from_raw_parts_mut(self.block.start.as_ptr(), self.len) }
    }
}

impl AsRef<[f32]> for HostBuffer {
    fn as_ref(&self) -> &[f32] {
        self
    }
}

impl AsMut<[f32]> for HostBuffer {
    fn as_mut(&mut self) -> &mut [f32] {
        self
    }
}

impl fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostBuffer({} elements)", self.len)
    }
}

impl Buffer for HostBuffer {
    type Ref<'a> = &'a [f32];
    type Mut<'a> = &'a mut [f32];

    fn len(&self) -> usize {
        self.len
    }
    fn slice(&self, range: Range<usize>) -> &[f32] {
        &self[range]
    }
    fn slice_mut(&mut self, range: Range<usize>) -> &mut [f32] {
        &mut self[range]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_serves_the_next_request_of_its_size() {
        let pool = Pool::default();
        let first = pool.take(1000);
        let address = first.as_ptr();
        drop(first);
        assert_eq!(pool.take(990).as_ptr(), address);
        assert_eq!(pool.held(), capacity_for(1000) * 4);
    }

    #[test]
    fn buffers_share_no_element_whatever_their_sizes() {
        let pool = Pool::default();
        let arena = ARENA / size_of::<f32>();
        let lens = [2, 0, 1000, arena - 5000, 5000, arena + 1, 64, 3 * arena, 7];
        let mut buffers: Vec<HostBuffer> = lens.iter().map(|len| pool.take(*len)).collect();
        for (buffer, value) in buffers.iter_mut().zip(1..) {
            assert!(buffer.iter().all(|element| *element == 0.0));
            assert!((buffer.as_ptr() as usize).is_multiple_of(ALIGNMENT));
            if let [first, .., last] = &mut buffer[..] {
                (*first, *last) = (value as f32, value as f32);
            }
        }
        // Buffers outlive the pool that they were taken from.
        drop(pool);
        for (buffer, value) in buffers.iter().zip(1..) {
            if let [first, .., last] = &buffer[..] {
                assert_eq!([*first, *last], [value as f32; 2]);
            }
        }
    }

    #[test]
    fn peak_counts_what_was_in_use_together() {
        let pool = Pool::default();
        let (a, b) = (pool.take(1024), pool.take(1024));
        drop((a, b));
        let _c = pool.take(1024);
        assert_eq!(pool.memory(), (4096, 8192));
    }
}
