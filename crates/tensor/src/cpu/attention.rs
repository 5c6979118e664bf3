//! Causal attention in blocks of queries and keys, with online softmax (Dao et al., FlashAttention, 2022 and 2023).
//!
//! Keys are visited in blocks at absolute positions, ascending. A block that no query of a task sees is skipped; for a
//! query that sees nothing of a visited block, the block changes no bit: its probabilities are +0, its rescaling 1.

use std::ops::Range;

use super::gemm::{Matrix, MatrixMut, gemm};
use super::parallel::{DisjointMut, Scratch, Threads};
use super::simd::{self, vectorized};
use crate::backend::{AttentionShape, Dims, Heads};

/// Keys of a block, and queries of a block of the forward; blocks begin at multiples of it.
const BLOCK: usize = 64;

/// Queries that the backward takes together, from the block of keys on: its products are larger than with one block, and no
/// query before the keys is among them.
const QUERIES: usize = 4 * BLOCK;

/// Fewest products of a sum that [`gemm`] fuses. Sums over fewer keys are filled up with zeros, so that a query's bits do not
/// tell whether later keys stood beside its own.
const FUSED: usize = 3;

/// Columns of a score block that are treated together: rows of blocks are padded to whole groups.
const GROUP: usize = 16;

/// Rows of keys or values (or of queries): `head(row)` is one head of a row.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [f32],
    stride: usize,
    head_dim: usize,
}

impl<'a> Rows<'a> {
    /// Rows `rows.start..` as a matrix `[rows, head_dim]`, the head at column `first`.
    fn matrix(&self, row: usize, first: usize) -> Matrix<'a> {
        Matrix::rows(&self.data[row * self.stride + first..], self.stride)
    }

    /// Rows `rows.start..` as a matrix `[head_dim, rows]`.
    fn transposed(&self, row: usize, first: usize) -> Matrix<'a> {
        Matrix::columns(&self.data[row * self.stride + first..], self.stride)
    }

    /// The head at column `first` of a row.
    fn head(&self, row: usize, first: usize) -> &'a [f32] {
        &self.data[row * self.stride + first..][..self.head_dim]
    }
}

pub(super) fn attention(
    threads: &Threads,
    shape: AttentionShape<'_>,
    q: &[f32],
    q_stride: usize,
    kv: &[f32],
    kv_stride: usize,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let AttentionShape { heads, sequences, queries, keys, .. } = shape;
    check(shape);
    let rows = sequences * queries;
    assert_eq!(
        [out.len(), lse.len()],
        [rows * heads.q_width(), rows * heads.heads],
        "attention: {rows} queries"
    );
    if rows == 0 {
        return;
    }
    let (first, last) = ((keys - queries) / BLOCK, keys.div_ceil(BLOCK));
    let (out, lse) = (DisjointMut::new(out), DisjointMut::new(lse));
    let q = Rows { data: q, stride: q_stride, head_dim: heads.head_dim };
    let kv = Rows { data: kv, stride: kv_stride, head_dim: heads.head_dim };
    let each = sequences * heads.kv_heads;
    threads.run(each * (last - first), |task| {
        // The last queries see the most keys: they go first.
        let block = last - 1 - task / each;
        let positions = (block * BLOCK).max(keys - queries)..((block + 1) * BLOCK).min(keys);
        let tile = QueryTile {
            shape,
            sequence: task % each / heads.kv_heads,
            kv_head: task % heads.kv_heads,
            positions,
        };
        // SAFETY: every task has its own queries and heads.
        unsafe { tile.forward(q, kv, &out, &lse) };
    });
}

/// Sizes that fit each other.
fn check(shape: AttentionShape<'_>) {
    let Heads { heads, kv_heads, head_dim } = shape.heads;
    assert!(
        kv_heads > 0 && heads.is_multiple_of(kv_heads) && head_dim > 0,
        "attention: {heads} heads, {kv_heads} KV heads, head_dim {head_dim}"
    );
    assert!(shape.queries <= shape.keys, "attention: {} queries, {} keys", shape.queries, shape.keys);
    let rows = shape.sequences * shape.queries;
    assert_eq!(shape.document_start.len(), rows, "attention: one document start a query");
}

/// Queries of one block and sequence, of all heads that share a KV head. Column `head * count + i` of its matrices is query
/// i of the group's head.
struct QueryTile<'a> {
    shape: AttentionShape<'a>,
    sequence: usize,
    kv_head: usize,
    positions: Range<usize>,
}

/// What a query tile computes with, a vector a row; rows padded to whole groups of columns.
struct Softmax<'a> {
    max: &'a mut [f32],
    sum: &'a mut [f32],
    rescale: &'a mut [f32],
    first: &'a mut [u32],
    last: &'a mut [u32],
}

impl QueryTile<'_> {
    /// Query heads that share the KV head.
    fn group(&self) -> usize {
        self.shape.heads.heads / self.shape.heads.kv_heads
    }

    /// Row of `q` of the tile's first query.
    fn first_row(&self) -> usize {
        self.sequence * self.shape.queries + self.positions.start - (self.shape.keys - self.shape.queries)
    }

    /// Column of a query row at which head `head` of the group begins.
    fn head_column(&self, head: usize) -> usize {
        (self.kv_head * self.group() + head) * self.shape.heads.head_dim
    }

    /// # Safety
    /// Nobody else writes the tile's rows and heads of `out` and `lse`.
    unsafe fn forward(
        &self,
        q: Rows<'_>,
        kv: Rows<'_>,
        out: &DisjointMut<'_, f32>,
        lse: &DisjointMut<'_, f32>,
    ) {
        let hd = self.shape.heads.head_dim;
        let columns = self.group() * self.positions.len();
        let width = columns.next_multiple_of(GROUP);
        let mut queries = Scratch::take(columns * hd);
        let mut scores = Scratch::take(BLOCK * width);
        let mut mixed = Scratch::take(columns * hd);
        let mut state = Scratch::take(5 * width);
        mixed.fill(0.0);
        vectorized(
            #[inline(always)]
            || self.scale_queries(q, &mut queries),
        );
        let mut softmax = Softmax::new(&mut state, width);
        let starts = self.set_visible(&mut softmax);
        let (k_column, v_column) = (self.kv_head * hd, (self.shape.heads.kv_heads + self.kv_head) * hd);
        let mut start = starts.start / BLOCK * BLOCK;
        while start < self.positions.end {
            let keys = start..(start + BLOCK).min(self.positions.end);
            let row = self.sequence * self.shape.keys + start;
            let dims = Dims { m: keys.len(), n: columns, k: hd };
            gemm(
                dims,
                kv.matrix(row, k_column),
                Matrix::columns(&queries, hd),
                MatrixMut::rows(&mut scores, width),
                false,
            );
            let masked = keys.start < starts.end || keys.end > self.positions.start + 1;
            vectorized(
                #[inline(always)]
                || softmax.visit(&mut scores[..keys.len() * width], start as u32, masked),
            );
            vectorized(
                #[inline(always)]
                || rescale_rows(&mut mixed, &softmax.rescale[..columns]),
            );
            let mut few = Scratch::take(if keys.len() < FUSED { FUSED * hd } else { 0 });
            let values = if keys.len() < FUSED {
                few.fill(0.0);
                for (key, few) in few.chunks_exact_mut(hd).take(keys.len()).enumerate() {
                    few.copy_from_slice(kv.head(row + key, v_column));
                }
                scores[keys.len() * width..FUSED * width].fill(0.0);
                Matrix::rows(&few, hd)
            } else {
                kv.matrix(row, v_column)
            };
            let dims = Dims { m: columns, n: hd, k: keys.len().max(FUSED) };
            let probabilities = Matrix::columns(&scores, width);
            gemm(dims, probabilities, values, MatrixMut::rows(&mut mixed, hd), true);
            start = keys.end;
        }
        // SAFETY: by the caller's promise.
        unsafe { self.write(&mixed, &softmax, out, lse) };
    }

    /// Scaled queries: `[columns, head_dim]`.
    #[inline(always)]
    fn scale_queries(&self, q: Rows<'_>, scaled: &mut [f32]) {
        let scale = scale(self.shape.heads);
        let (first, count) = (self.first_row(), self.positions.len());
        for (column, scaled) in scaled.chunks_exact_mut(self.shape.heads.head_dim).enumerate() {
            let query = q.head(first + column % count, self.head_column(column / count));
            scaled.iter_mut().zip(query).for_each(|(scaled, value)| *scaled = value * scale);
        }
    }

    /// Sets which keys every column sees; returns the range from the first key that any sees to the last first key.
    fn set_visible(&self, softmax: &mut Softmax<'_>) -> Range<usize> {
        let (first, count) = (self.first_row(), self.positions.len());
        let (mut least, mut most) = (usize::MAX, 0);
        for (column, (from, to)) in softmax.first.iter_mut().zip(softmax.last.iter_mut()).enumerate() {
            let position = self.positions.start + column % count;
            let start = (self.shape.document_start[first + column % count] as usize).min(position);
            (*from, *to) = (start as u32, position as u32);
            (least, most) = (least.min(start), most.max(start));
        }
        least..most
    }

    /// Divides by the sums of probabilities, writes the rows and their log-sum-exp.
    ///
    /// # Safety
    /// As [`QueryTile::forward`].
    unsafe fn write(
        &self,
        mixed: &[f32],
        softmax: &Softmax<'_>,
        out: &DisjointMut<'_, f32>,
        lse: &DisjointMut<'_, f32>,
    ) {
        let heads = self.shape.heads;
        let (first, count) = (self.first_row(), self.positions.len());
        for (column, mixed) in mixed.chunks_exact(heads.head_dim).enumerate() {
            let (row, head) = (first + column % count, column / count);
            let start = row * heads.q_width() + self.head_column(head);
            let at = row * heads.heads + self.kv_head * self.group() + head;
            // SAFETY: one head of one row of the tile, which is the caller's.
            let (out, lse) = unsafe { (out.range(start..start + heads.head_dim), lse.range(at..at + 1)) };
            let factor = 1.0 / softmax.sum[column];
            out.iter_mut().zip(mixed).for_each(|(o, m)| *o = m * factor);
            lse[0] = softmax.max[column] + libm::logf(softmax.sum[column]);
        }
    }
}

/// Factor of the scores.
fn scale(heads: Heads) -> f32 {
    1.0 / (heads.head_dim as f32).sqrt()
}

impl<'a> Softmax<'a> {
    fn new(state: &'a mut [f32], width: usize) -> Self {
        let (max, rest) = state.split_at_mut(width);
        let (sum, rest) = rest.split_at_mut(width);
        let (rescale, rest) = rest.split_at_mut(width);
        let (first, last) = bytemuck::cast_slice_mut(rest).split_at_mut(width);
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        Self { max, sum, rescale, first, last }
    }

    /// Turns the scores of a block of keys `[keys, width]` into probabilities relative to the largest score so far, and
    /// updates the sums; `rescale` is what earlier results are to be multiplied by.
    #[inline(always)]
    fn visit(&mut self, scores: &mut [f32], first_key: u32, masked: bool) {
        let width = self.max.len();
        for start in (0..width).step_by(GROUP) {
            if masked {
                self.mask(scores, first_key, start);
            }
            self.visit_group(scores, start);
        }
    }

    /// Keys that a query does not see get negative infinity.
    #[inline(always)]
    fn mask(&self, scores: &mut [f32], first_key: u32, start: usize) {
        let first: &[u32; GROUP] = group(self.first, start);
        let last: &[u32; GROUP] = group(self.last, start);
        for (key, row) in scores.chunks_exact_mut(self.max.len()).enumerate() {
            let position = first_key + key as u32;
            let row: &mut [f32; GROUP] = group_mut(row, start);
            for lane in 0..GROUP {
                let visible = (position >= first[lane]) & (position <= last[lane]);
                row[lane] = if visible { row[lane] } else { f32::NEG_INFINITY };
            }
        }
    }

    #[inline(always)]
    fn visit_group(&mut self, scores: &mut [f32], start: usize) {
        let width = self.max.len();
        let max_before: [f32; GROUP] = *group(self.max, start);
        let mut max = max_before;
        for row in scores.chunks_exact(width) {
            let row: &[f32; GROUP] = group(row, start);
            for lane in 0..GROUP {
                max[lane] = if row[lane] > max[lane] { row[lane] } else { max[lane] };
            }
        }
        let mut sum: [f32; GROUP] = *group(self.sum, start);
        let mut reference = max;
        let rescale: &mut [f32; GROUP] = group_mut(self.rescale, start);
        for lane in 0..GROUP {
            // A query that has seen no key yet: e^(-inf - 0) is 0, where -inf - -inf were not a number.
            reference[lane] = if max[lane] == f32::NEG_INFINITY { 0.0 } else { max[lane] };
            rescale[lane] = simd::exp(max_before[lane] - reference[lane]);
            sum[lane] *= rescale[lane];
        }
        for row in scores.chunks_exact_mut(width) {
            let row: &mut [f32; GROUP] = group_mut(row, start);
            for lane in 0..GROUP {
                row[lane] = simd::exp(row[lane] - reference[lane]);
                sum[lane] += row[lane];
            }
        }
        *group_mut(self.max, start) = max;
        *group_mut(self.sum, start) = sum;
    }
}

/// One group of columns.
#[inline(always)]
fn group<T>(row: &[T], start: usize) -> &[T; GROUP] {
    row[start..].first_chunk().expect("rows are padded to whole groups")
}

/// One group of columns, for writing.
#[inline(always)]
fn group_mut<T>(row: &mut [T], start: usize) -> &mut [T; GROUP] {
    row[start..].first_chunk_mut().expect("rows are padded to whole groups")
}

#[inline(always)]
fn rescale_rows(rows: &mut [f32], factors: &[f32]) {
    let width = rows.len() / factors.len();
    for (row, &factor) in rows.chunks_exact_mut(width).zip(factors) {
        if factor != 1.0 {
            row.iter_mut().for_each(|v| *v *= factor);
        }
    }
}

pub(super) fn attention_backward(
    threads: &Threads,
    shape: AttentionShape<'_>,
    dout: &[f32],
    qkv: &[f32],
    out: &[f32],
    lse: &[f32],
    dqkv: &mut [f32],
) {
    check(shape);
    let (heads, rows) = (shape.heads, shape.sequences * shape.queries);
    assert_eq!(shape.queries, shape.keys, "attention_backward: as many queries as keys");
    assert_eq!([qkv.len(), dqkv.len()], [rows * heads.qkv_width(); 2], "attention_backward: {rows} rows");
    assert_eq!([dout.len(), out.len()], [rows * heads.q_width(); 2], "attention_backward: {rows} rows");
    assert_eq!(lse.len(), rows * heads.heads, "attention_backward: {rows} rows");
    let dqkv = DisjointMut::new(dqkv);
    threads.run(shape.sequences * heads.kv_heads, |task| {
        let rows_of = |data, stride| Rows { data, stride, head_dim: heads.head_dim };
        let backward = Backward {
            shape,
            first_row: task / heads.kv_heads * shape.keys,
            kv_head: task % heads.kv_heads,
            qkv: rows_of(qkv, heads.qkv_width()),
            out: rows_of(out, heads.q_width()),
            dout: rows_of(dout, heads.q_width()),
            lse,
        };
        // SAFETY: every task has its own sequence and heads.
        unsafe { backward.run(&dqkv) };
    });
}

/// The backward of one sequence and the heads that share one KV head.
struct Backward<'a> {
    shape: AttentionShape<'a>,
    first_row: usize,
    kv_head: usize,
    qkv: Rows<'a>,
    out: Rows<'a>,
    dout: Rows<'a>,
    lse: &'a [f32],
}

/// Scratch for a block of keys.
struct KeyBlock {
    keys: Range<usize>,
    /// Gradients of keys and values, `[BLOCK, head_dim]`.
    dk: Scratch,
    dv: Scratch,
    /// Probabilities and their gradients, then the gradients of the scores, `[QUERIES, BLOCK]`, a query a row.
    p: Scratch,
    ds: Scratch,
}

impl Backward<'_> {
    fn group(&self) -> usize {
        self.shape.heads.heads / self.shape.heads.kv_heads
    }

    /// Column of a row of queries at which head `head` of the group begins.
    fn head_column(&self, head: usize) -> usize {
        (self.kv_head * self.group() + head) * self.shape.heads.head_dim
    }

    /// Columns of a row of `qkv` at which the keys and the values begin.
    fn kv_columns(&self) -> [usize; 2] {
        let Heads { heads, kv_heads, head_dim } = self.shape.heads;
        [(heads + self.kv_head) * head_dim, (heads + kv_heads + self.kv_head) * head_dim]
    }

    /// # Safety
    /// Nobody else accesses the rows of this sequence and the columns of these heads in `dqkv`.
    unsafe fn run(&self, dqkv: &DisjointMut<'_, f32>) {
        let (hd, length) = (self.shape.heads.head_dim, self.shape.keys);
        let mut delta = Scratch::take(self.group() * length);
        for (at, delta) in delta.iter_mut().enumerate() {
            let (row, column) = (self.first_row + at % length, self.head_column(at / length));
            *delta = vectorized(
                #[inline(always)]
                || simd::dot(self.dout.head(row, column), self.out.head(row, column)),
            );
            // SAFETY: the caller's rows and columns.
            unsafe { self.gradient_of(dqkv, row, column) }.fill(0.0);
        }
        let [dk, dv] = [0; 2].map(|_| Scratch::take(BLOCK * hd));
        let [p, ds] = [0; 2].map(|_| Scratch::take(QUERIES.min(length) * BLOCK));
        let mut block = KeyBlock { keys: 0..0, dk, dv, p, ds };
        let [k_column, v_column] = self.kv_columns();
        for start in (0..length).step_by(BLOCK) {
            block.keys = start..(start + BLOCK).min(length);
            block.dk.fill(0.0);
            block.dv.fill(0.0);
            for head in 0..self.group() {
                for query in (start..length).step_by(QUERIES) {
                    let queries = query..(query + QUERIES).min(length);
                    if self.sees(&queries, &block.keys) {
                        // SAFETY: the caller's rows and columns.
                        unsafe { self.visit(&mut block, head, queries, &delta[head * length..], dqkv) };
                    }
                }
            }
            for (i, key) in block.keys.clone().enumerate() {
                let part = i * hd..(i + 1) * hd;
                for (from, column) in [(&block.dk, k_column), (&block.dv, v_column)] {
                    // SAFETY: the caller's rows and columns.
                    let to = unsafe { self.gradient_of(dqkv, self.first_row + key, column) };
                    to.copy_from_slice(&from[part.clone()]);
                }
            }
        }
    }

    /// One head of a row of the gradient.
    ///
    /// # Safety
    /// No other part that overlaps it may live.
    unsafe fn gradient_of<'b>(
        &self,
        dqkv: &DisjointMut<'b, f32>,
        row: usize,
        column: usize,
    ) -> &'b mut [f32] {
        let start = row * self.shape.heads.qkv_width() + column;
        // SAFETY: by the caller's promise.
        unsafe { dqkv.range(start..start + self.shape.heads.head_dim) }
    }

    /// First key that the query at `position` sees.
    fn document_start(&self, position: usize) -> usize {
        (self.shape.document_start[self.first_row + position] as usize).min(position)
    }

    /// Whether any of the queries (which stand in or behind the block) sees any of the keys.
    fn sees(&self, queries: &Range<usize>, keys: &Range<usize>) -> bool {
        queries.clone().any(|position| self.document_start(position) < keys.end)
    }

    /// Adds what a block of queries of one head contributes.
    ///
    /// # Safety
    /// As [`Backward::run`].
    unsafe fn visit(
        &self,
        block: &mut KeyBlock,
        head: usize,
        queries: Range<usize>,
        delta: &[f32],
        dqkv: &DisjointMut<'_, f32>,
    ) {
        let (hd, row, column) =
            (self.shape.heads.head_dim, self.first_row + queries.start, self.head_column(head));
        let (q, dout) = (self.qkv.matrix(row, column), self.dout.matrix(row, column));
        let (m, n) = (queries.len(), block.keys.len());
        let to_scores = Dims { m, n, k: hd };
        let first = self.first_row + block.keys.start;
        let [k, v] = self.kv_columns().map(|column| self.qkv.transposed(first, column));
        gemm(to_scores, q, k, MatrixMut::rows(&mut block.p, BLOCK), false);
        gemm(to_scores, dout, v, MatrixMut::rows(&mut block.ds, BLOCK), false);
        self.score_gradients(block, head, queries, delta);
        let to_keys = Dims { m: n, n: hd, k: m };
        gemm(to_keys, Matrix::columns(&block.p, BLOCK), dout, MatrixMut::rows(&mut block.dv, hd), true);
        gemm(to_keys, Matrix::columns(&block.ds, BLOCK), q, MatrixMut::rows(&mut block.dk, hd), true);
        let width = self.shape.heads.qkv_width();
        let start = row * width + column;
        // SAFETY: rows of this sequence, columns of this head.
        let dq = unsafe { MatrixMut::tile(dqkv.pointer(start), dqkv.len() - start, width) };
        let keys = self.qkv.matrix(first, self.kv_columns()[0]);
        gemm(Dims { m, n: hd, k: n }, Matrix::rows(&block.ds, BLOCK), keys, dq, true);
    }

    /// From scores to probabilities `p`, from their gradients to those of the unscaled scores `ds`.
    fn score_gradients(&self, block: &mut KeyBlock, head: usize, queries: Range<usize>, delta: &[f32]) {
        let Heads { heads, .. } = self.shape.heads;
        let (scale, count) = (scale(self.shape.heads), block.keys.len());
        let rows = block.p.chunks_exact_mut(BLOCK).zip(block.ds.chunks_exact_mut(BLOCK));
        for (position, (p, ds)) in queries.zip(rows) {
            let lse = self.lse[(self.first_row + position) * heads + self.kv_head * self.group() + head];
            let in_block = |key: usize| key.clamp(block.keys.start, block.keys.end) - block.keys.start;
            let end = in_block(position + 1);
            let start = in_block(self.document_start(position)).min(end);
            for hidden in [0..start, end..count] {
                p[hidden.clone()].fill(0.0);
                ds[hidden].fill(0.0);
            }
            let delta = delta[position];
            vectorized(
                #[inline(always)]
                || {
                    for (p, ds) in p[start..end].iter_mut().zip(&mut ds[start..end]) {
                        *p = simd::exp(*p * scale - lse);
                        *ds = *p * (*ds - delta) * scale;
                    }
                },
            );
        }
    }
}
