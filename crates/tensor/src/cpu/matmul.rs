//! Products of whole matrices, cut into a grid of tiles.

use super::gemm::{Matrix, MatrixMut, gemm};
use super::{DisjointMut, Threads};
use crate::backend::{Dims, Product};

/// Columns of a tile: multiples of this, so that no tile ends within the register tile of the product.
const COLUMN_STEP: usize = 32;
/// Rows of a tile: multiples of this, for the same reason.
const ROW_STEP: usize = 6;
/// Rows of a tile at most: their packed values stay in the second-level cache.
const MOST_ROWS: usize = 384;
/// Multiply-adds below which a tile costs more in packing and dispatch than it gains.
const SMALLEST_TILE: usize = 1 << 20;

/// [`crate::Backend::matmul`].
pub(super) fn matmul(
    threads: &Threads,
    product: Product,
    dims: Dims,
    a: &[f32],
    b: &[f32],
    c: &mut [f32],
    accumulate: bool,
) {
    let Dims { m, n, k } = dims;
    assert!(
        a.len() == m * k && b.len() == k * n && c.len() == m * n,
        "{product:?} with {dims:?} got operands of {} and {} elements and a result of {}",
        a.len(),
        b.len(),
        c.len()
    );
    let (lhs, rhs) = match product {
        Product::Plain => (Matrix::rows(a, k), Matrix::rows(b, n)),
        Product::TransposedRight => (Matrix::rows(a, k), Matrix::columns(b, k)),
        Product::TransposedLeft => (Matrix::columns(a, m), Matrix::rows(b, n)),
    };
    tiled(threads, dims, lhs, rhs, c, n, accumulate);
}

/// A product on all threads; `dst` has rows of `row_stride` elements, `n` of them written.
pub(super) fn tiled(
    threads: &Threads,
    dims: Dims,
    lhs: Matrix<'_>,
    rhs: Matrix<'_>,
    dst: &mut [f32],
    row_stride: usize,
    accumulate: bool,
) {
    let Dims { m, n, k } = dims;
    if m == 0 || n == 0 {
        return;
    }
    let (rows, columns) = tile(dims, threads.count());
    let across = n.div_ceil(columns);
    let dst = DisjointMut::new(dst);
    threads.run(m.div_ceil(rows) * across, |index| {
        let (row, column) = (index / across * rows, index % across * columns);
        let start = row * row_stride + column;
        let dims = Dims { m: rows.min(m - row), n: columns.min(n - column), k };
        // SAFETY: tiles of different tasks share no element: they differ in their rows or in their columns.
        let dst = unsafe { MatrixMut::tile(dst.pointer(start), dst.len() - start, row_stride) };
        gemm(dims, lhs.skip(row, 0), rhs.skip(0, column), dst, accumulate);
    });
}

/// Rows and columns of a tile. Any shape gives the same bits. One thread takes whole rows; several share out equal tiles, as
/// many to each, in the grid that packs the fewest elements: an operand is packed once for each tile that reads it.
fn tile(dims: Dims, threads: usize) -> (usize, usize) {
    let Dims { m, n, k } = dims;
    let least_down = m.div_ceil(MOST_ROWS);
    let wanted = threads.min(m * n * k.max(1) / SMALLEST_TILE).max(1);
    let grids = (1..=wanted).map(|across| {
        let down = wanted.div_ceil(across).max(least_down);
        let even = (down * across).is_multiple_of(wanted);
        (if even { down } else { down.next_multiple_of(wanted) }, across)
    });
    let (down, across) = grids.min_by_key(|&(down, across)| across * m + down * n).unwrap_or((1, 1));
    let part = |len: usize, parts: usize, step: usize| len.div_ceil(parts).next_multiple_of(step).min(len);
    (part(m, down, ROW_STEP), part(n, across, COLUMN_STEP))
}
