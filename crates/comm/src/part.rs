//! Shared send buffers, with and without their element type.

use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;

type Owner = dyn Any + Send + Sync;

/// A range of bytes of a shared buffer: what a [`Transport`](crate::Transport) sends.
#[derive(Clone)]
pub struct Piece {
    owner: Arc<Owner>,
    view: fn(&Owner) -> &[u8],
    range: Range<usize>,
}

impl Piece {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &(self.view)(&*self.owner)[self.range.clone()]
    }

    /// How many bytes it has.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

impl fmt::Debug for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Piece({:?} bytes)", self.range)
    }
}

/// A range of elements of a shared buffer, to be sent.
///
/// Cloning is cheap and copies no element. The buffer is released once the call that sends it is finished.
pub struct Part<T> {
    owner: Arc<Owner>,
    view: fn(&Owner) -> &[u8],
    range: Range<usize>,
    element: PhantomData<fn() -> T>,
}

impl<T: Pod> Part<T> {
    /// Elements `range` of `buffer`. That the range lies in the buffer is checked by the call that sends it.
    pub fn new<S: AsRef<[T]> + Send + Sync + 'static>(buffer: Arc<S>, range: Range<usize>) -> Self {
        Self { owner: buffer, view: view_bytes::<S, T>, range, element: PhantomData }
    }

    /// All of `buffer`.
    pub fn whole<S: AsRef<[T]> + Send + Sync + 'static>(buffer: Arc<S>) -> Self {
        let range = 0..(*buffer).as_ref().len();
        Self::new(buffer, range)
    }

    /// The elements of the part that are at `range` of it, as a part of the same buffer.
    pub fn slice(&self, range: Range<usize>) -> Self {
        let start = self.range.start;
        Self { range: start + range.start..start + range.end, ..self.clone() }
    }

    /// Which elements of the buffer these are.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// How many elements it has.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// How many elements the whole buffer has.
    pub(crate) fn buffer_len(&self) -> usize {
        (self.view)(&*self.owner).len() / size_of::<T>().max(1)
    }

    pub(crate) fn into_piece(self) -> Piece {
        let size = size_of::<T>();
        Piece { owner: self.owner, view: self.view, range: self.range.start * size..self.range.end * size }
    }
}

impl<T> Clone for Part<T> {
    fn clone(&self) -> Self {
        Self {
            owner: Arc::clone(&self.owner),
            view: self.view,
            range: self.range.clone(),
            element: PhantomData,
        }
    }
}

impl<T> fmt::Debug for Part<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Part({:?} of {})", self.range, std::any::type_name::<T>())
    }
}

impl<T: Pod, S: AsRef<[T]> + Send + Sync + 'static> From<Arc<S>> for Part<T> {
    fn from(buffer: Arc<S>) -> Self {
        Self::whole(buffer)
    }
}

fn view_bytes<S: AsRef<[T]> + 'static, T: Pod>(owner: &Owner) -> &[u8] {
    let buffer: &S =
        owner.downcast_ref().expect("a part is only made together with the view of its own buffer type");
    bytemuck::cast_slice(buffer.as_ref())
}
