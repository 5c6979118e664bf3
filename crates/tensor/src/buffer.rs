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
    /// Free parts of arenas and how many elements they have; no two are neighbours.
    free: BTreeMap<Place, usize>,
    in_use: usize,
}

/// Where a part of an arena begins: which arena, and which of its elements.
type Place = (usize, usize);

/// Memory of the system, cut into blocks and never given back.
struct Arena {
    mapping: MmapMut,
    /// Elements up to the last one that a block ever had.
    used: usize,
}

/// A part of an arena that nothing else refers to: whoever holds it may read and write its elements.
struct Block {
    start: NonNull<f32>,
    place: Place,
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

/// Elements of the smallest block that stands at the beginning of a free part.
const LARGE: usize = 2048;

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

    /// Elements.
    fn len(&self) -> usize {
        self.mapping.len() / size_of::<f32>()
    }

    /// Where element `index` lies.
    fn at(&mut self, index: usize) -> NonNull<f32> {
        assert!(index < self.len());
        // SAFETY: the element lies in the mapping.
        let start = unsafe { self.mapping.as_mut_ptr().cast::<f32>().add(index) };
        NonNull::new(start).expect("a mapping does not begin at 0")
    }
}

impl Pool {
    /// A buffer of `len` elements with unspecified contents.
    pub fn take(&self, len: usize) -> HostBuffer {
        let block = self.shelf().cut(len.max(1).next_multiple_of(ALIGNMENT / size_of::<f32>()));
        HostBuffer { block, len, pool: self.clone() }
    }

    /// Bytes in use now, and bytes taken from the system, in use or waiting for reuse.
    pub fn memory(&self) -> (usize, usize) {
        let shelf = self.shelf();
        let taken: usize = shelf.arenas.iter().map(|arena| arena.used).sum();
        (shelf.in_use, taken * size_of::<f32>())
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shelf {
    /// A block of `capacity` elements, of the smallest free part that is large enough; memory that no block had before comes last.
    /// Small blocks stand at a part's end, so that large ones find its beginning together with what is before it.
    fn cut(&mut self, capacity: usize) -> Block {
        assert!(capacity <= isize::MAX as usize / size_of::<f32>(), "a buffer of {capacity} elements");
        let fits = self.free.iter().map(|(place, len)| (*place, *len)).filter(|(_, len)| *len >= capacity);
        let is_new = |((arena, start), len): (Place, usize)| start + len > self.arenas[arena].used;
        let (new, (part, len)) = fits
            .map(|part| (is_new(part), part))
            .min_by_key(|(new, part)| (*new, part.1))
            .unwrap_or_else(|| {
                let arena = Arena::new(capacity * size_of::<f32>());
                let all = ((self.arenas.len(), 0), arena.len());
                self.arenas.push(arena);
                (true, all)
            });
        self.free.remove(&part);
        let (index, first) = part;
        let at_end = capacity < LARGE && !new;
        let (start, rest) = if at_end { (first + len - capacity, first) } else { (first, first + capacity) };
        if len > capacity {
            self.free.insert((index, rest), len - capacity);
        }
        let arena = &mut self.arenas[index];
        arena.used = arena.used.max(start + capacity);
        self.in_use += capacity * size_of::<f32>();
        Block { start: arena.at(start), place: (index, start), capacity }
    }

    /// Takes a block back and joins it with free neighbours.
    fn give_back(&mut self, block: &Block) {
        self.in_use -= block.capacity * size_of::<f32>();
        let (mut place, mut len) = (block.place, block.capacity);
        let before = self.free.range(..place).next_back().map(|(place, len)| (*place, *len));
        if let Some((before, size)) = before.filter(|((arena, start), len)| (*arena, start + len) == place) {
            (place, len) = (before, len + size);
        }
        len += self.free.remove(&(place.0, place.1 + len)).unwrap_or(0);
        self.free.insert(place, len);
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        self.pool.shelf().give_back(&self.block);
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
    fn a_dropped_buffer_serves_the_next_requests() {
        let pool = Pool::default();
        let first = pool.take(1000);
        let address = first.as_ptr();
        drop(first);
        let (a, b) = (pool.take(500), pool.take(300));
        assert_eq!((a.as_ptr(), b.as_ptr()), (address, a.as_ptr().wrapping_add(512)));
        assert_eq!(pool.memory(), ((512 + 304) * 4, 1008 * 4));
    }

    #[test]
    fn the_smallest_part_that_is_large_enough_serves_a_request_and_small_ones_get_its_end() {
        let pool = Pool::default();
        let [wide, wall, narrow, last] = [8192, 16, 4096, 16].map(|len| pool.take(len));
        let (at_wide, at_narrow) = (wide.as_ptr(), narrow.as_ptr());
        drop((wide, narrow));
        let (small, large) = (pool.take(16), pool.take(4096));
        assert_eq!(small.as_ptr(), at_narrow.wrapping_add(4096 - 16));
        assert_eq!(large.as_ptr(), at_wide);
        assert_eq!(pool.take(4080).as_ptr(), at_narrow);
        assert_eq!(pool.memory().1, (8192 + 16 + 4096 + 16) * 4);
        drop((wall, last));
    }

    #[test]
    fn neighbours_that_are_free_serve_a_request_of_both_their_sizes_whatever_the_order_they_were_let_go_in() {
        for order in [[0, 1, 2], [2, 1, 0], [0, 2, 1], [1, 0, 2]] {
            let pool = Pool::default();
            let mut buffers = [1000, 2000, 500].map(|len| Some(pool.take(len)));
            let (kept, address) = (pool.take(64), buffers[0].as_ref().map(|buffer| buffer.as_ptr()));
            order.into_iter().for_each(|index| buffers[index] = None);
            assert_eq!(Some(pool.take(3500).as_ptr()), address, "{order:?}");
            assert_eq!(pool.memory(), (64 * 4, (1008 + 2000 + 512 + 64) * 4));
            drop(kept);
        }
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
}
