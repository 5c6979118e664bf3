//! Host buffers that go back to their pool when dropped, so that a steady step asks the system for no memory.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::backend::Buffer;

/// A flat f32 buffer in host memory, recycled on drop.
pub struct HostBuffer {
    data: Vec<f32>,
    len: usize,
    pool: Pool,
}

/// The recycled buffers of one rank. Cloning shares it.
#[derive(Clone, Default)]
pub struct Pool(Arc<Mutex<Shelf>>);

#[derive(Default)]
struct Shelf {
    free: BTreeMap<usize, Vec<Vec<f32>>>,
    held: usize,
    in_use: usize,
    peak: usize,
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
        let data = reused.unwrap_or_else(|| {
            shelf.held += capacity * size_of::<f32>();
            vec![0.0; capacity]
        });
        shelf.in_use += data.len() * size_of::<f32>();
        shelf.peak = shelf.peak.max(shelf.in_use);
        HostBuffer { data, len, pool: self.clone() }
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
    fn pop(&mut self, size: usize) -> Option<Vec<f32>> {
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
        let data = std::mem::take(&mut self.data);
        let mut shelf = self.pool.shelf();
        shelf.in_use -= data.len() * size_of::<f32>();
        shelf.free.entry(data.len()).or_default().push(data);
    }
}

impl Deref for HostBuffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.data[..self.len]
    }
}

impl DerefMut for HostBuffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data[..self.len]
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
    fn peak_counts_what_was_in_use_together() {
        let pool = Pool::default();
        let (a, b) = (pool.take(1024), pool.take(1024));
        drop((a, b));
        let _c = pool.take(1024);
        assert_eq!(pool.memory(), (4096, 8192));
    }
}
