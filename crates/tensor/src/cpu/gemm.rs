//! The one entry point for products of matrices.
//!
//! The contract (DESIGN.md, section 3): an element of a result depends on its row of the left operand and its column
//! of the right one, never on which other rows and columns are computed beside it, where they lie in memory, in
//! which order they are stored, or on threads. The crate `gemm` underneath does not promise that. Read in its source
//! (0.19) and measured:
//!
//! - sums of up to 512 products are never split: each is one chain of fused multiply-adds, ascending. Longer ones are
//!   split by rules that look at the shape and the caches, so we cut them into blocks of [`K_BLOCK`] ourselves;
//! - results with one row or one column go to kernels with another order: we compute two and keep one;
//! - so do small results (up to 256 elements) whose operands are both contiguous along the sum: we repack one. Larger
//!   ones take the common path, which packs for itself, so that repacking them would cost and change nothing.
//!
//! `gemm` takes its packing buffers (at most a block of an operand) from the allocator at each call; they come back from
//! its free lists without a system call.

use std::marker::PhantomData;

use super::Scratch;
use crate::backend::Dims;

/// Sums are cut into blocks of this many products, ascending; each block is added to the result in place.
pub const K_BLOCK: usize = 256;

/// Results up to this size go to another kernel if both operands are contiguous along the sum.
const SMALL_RESULT: usize = 256;

/// A matrix to read: element (i, j) stands at `i * row_stride + j * column_stride`.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Rows stored one after another, `row_stride` elements from start to start.
    pub fn rows(data: &'a [f32], row_stride: usize) -> Self {
        Self { data, row_stride, column_stride: 1 }
    }

    /// Columns stored one after another: the transpose of [`Matrix::rows`].
    pub fn columns(data: &'a [f32], column_stride: usize) -> Self {
        Self { data, row_stride: 1, column_stride }
    }

    /// The same matrix without its first `rows` rows and `columns` columns.
    pub fn skip(self, rows: usize, columns: usize) -> Self {
        let start = rows * self.row_stride + columns * self.column_stride;
        Self { data: &self.data[start.min(self.data.len())..], ..self }
    }

    fn check(&self, rows: usize, columns: usize, what: &str) {
        let last = last(rows, self.row_stride, columns, self.column_stride);
        assert!(
            rows == 0 || columns == 0 || last < self.data.len(),
            "the {what} operand of a product, [{rows}, {columns}] with strides ({}, {}), reaches past its {} elements",
            self.row_stride,
            self.column_stride,
            self.data.len()
        );
    }
}

/// Where the last element of a matrix stands; beyond any slice if that overflows.
fn last(rows: usize, row_stride: usize, columns: usize, column_stride: usize) -> usize {
    let down = rows.saturating_sub(1).saturating_mul(row_stride);
    down.saturating_add(columns.saturating_sub(1).saturating_mul(column_stride))
}

/// A matrix to write, stored by rows: element (i, j) stands at `i * row_stride + j`.
pub struct MatrixMut<'a> {
    start: *mut f32,
    len: usize,
    row_stride: usize,
    data: PhantomData<&'a mut [f32]>,
}

impl<'a> MatrixMut<'a> {
    /// Rows of a slice, `row_stride` elements from start to start.
    pub fn rows(data: &'a mut [f32], row_stride: usize) -> Self {
        Self { start: data.as_mut_ptr(), len: data.len(), row_stride, data: PhantomData }
    }

    /// A tile inside a larger matrix: `start` points to its first element, `len` elements from there on belong to the
    /// same allocation.
    ///
    /// # Safety
    /// `start` is valid for `len` elements, and while the tile lives nothing else accesses the elements of its rows
    /// that a product writes.
    pub unsafe fn tile(start: *mut f32, len: usize, row_stride: usize) -> Self {
        Self { start, len, row_stride, data: PhantomData }
    }
}

/// `dst = lhs * rhs`, or `dst += lhs * rhs` if `accumulate`, on the calling thread. `lhs` is `[m, k]`, `rhs` `[k, n]`,
/// `dst` `[m, n]` with a row stride of at least `n`. With `k == 0` the product is zero.
///
/// Sums run over blocks of 256 products, ascending; within a block ascending from zero by fused multiply-adds
/// (on machines that have them), then the block is added to `dst`. A last block of one or two products is multiplied
/// and added onto `dst` without fusing. Panics if an operand is too short.
pub fn gemm(dims: Dims, lhs: Matrix<'_>, rhs: Matrix<'_>, dst: MatrixMut<'_>, accumulate: bool) {
    let Dims { m, n, k } = dims;
    lhs.check(m, k, "left");
    rhs.check(k, n, "right");
    if m == 0 || n == 0 {
        return;
    }
    assert!(
        (dst.row_stride >= n || m == 1) && last(m, dst.row_stride, n, 1) < dst.len,
        "the result of a product, [{m}, {n}] with row stride {}, does not fit its {} elements",
        dst.row_stride,
        dst.len
    );
    // SAFETY: the operands reach no further than their slices, checked above.
    unsafe {
        if m == 1 || n == 1 {
            padded(dims, lhs, rhs, dst.start, dst.row_stride, accumulate);
        } else {
            in_blocks(dims, lhs, rhs, dst.start, dst.row_stride, accumulate);
        }
    }
}

/// Results of one row or one column: computed twice side by side (strides of zero repeat the operand), kept once.
///
/// # Safety
/// As [`in_blocks`], but for `m` and `n` of at least 1.
unsafe fn padded(
    dims: Dims,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    dst: *mut f32,
    row_stride: usize,
    accumulate: bool,
) {
    let (m, n) = (dims.m.max(2), dims.n.max(2));
    let lhs = if dims.m == 1 { Matrix { row_stride: 0, ..lhs } } else { lhs };
    let rhs = if dims.n == 1 { Matrix { column_stride: 0, ..rhs } } else { rhs };
    let mut scratch = Scratch::take(m * n);
    let place = |i: usize, j: usize| dst.wrapping_add(i.min(dims.m - 1) * row_stride + j.min(dims.n - 1));
    // SAFETY: `place` stays within the result; the operands are repeated in place.
    unsafe {
        if accumulate {
            (0..m * n).for_each(|at| scratch[at] = *place(at / n, at % n));
        }
        in_blocks(Dims { m, n, k: dims.k }, lhs, rhs, scratch.as_mut_ptr(), n, accumulate);
        for i in 0..dims.m {
            (0..dims.n).for_each(|j| *place(i, j) = scratch[i * n + j]);
        }
    }
}

/// The product in blocks of `K_BLOCK`.
///
/// # Safety
/// The operands hold `[m, k]` and `[k, n]`, `dst` is valid for `m` rows of `n` elements, `m` and `n` are at least 2.
unsafe fn in_blocks(
    dims: Dims,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    dst: *mut f32,
    row_stride: usize,
    accumulate: bool,
) {
    let Dims { m, n, k } = dims;
    let repack = m * n <= SMALL_RESULT && lhs.column_stride == 1 && rhs.row_stride == 1;
    let mut packed = Scratch::take(if repack { K_BLOCK.min(k) * n } else { 0 });
    let mut start = 0;
    loop {
        let k = K_BLOCK.min(dims.k - start);
        let left = lhs.data.as_ptr().wrapping_add(start * lhs.column_stride);
        let mut right = rhs.data.as_ptr().wrapping_add(start * rhs.row_stride);
        let mut right_strides = (rhs.row_stride, rhs.column_stride);
        if repack {
            for (at, value) in packed.iter_mut().enumerate().take(k * n) {
                // SAFETY: inside the right operand.
                *value = unsafe { *right.add(at / n * rhs.row_stride + at % n * rhs.column_stride) };
            }
            (right, right_strides) = (packed.as_ptr(), (n, 1));
        }
        // SAFETY: by the caller's promise; strides fit isize because slices do.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                dst,
                1,
                row_stride as isize,
                accumulate || start > 0,
                left,
                lhs.column_stride as isize,
                lhs.row_stride as isize,
                right,
                right_strides.1 as isize,
                right_strides.0 as isize,
                1.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
        start += k;
        if start >= dims.k {
            return;
        }
    }
}
