//! Feed-forward networks with SwiGLU (Shazeer, 2020) over runs of rows, each run with weights of its own.
//!
//! A task takes some rows of one run through the whole network, so that hidden values stay in cache. How rows are
//! cut into tasks changes no bit: every value depends on its row alone, and weight gradients are cut by element.

use std::ops::Range;

use super::gemm::{Matrix, MatrixMut, gemm};
use super::simd::{LANES, dot, sigmoid, silu, vectorized};
use super::{DisjointMut, Scratch, Threads};
use crate::backend::{Dims, FfnRun, FfnShape};

/// Rows of a task at most: more would push hidden values out of the second-level cache.
const MOST_ROWS: usize = 384;
/// Rows of a task at least: fewer do not pay for packing the weights.
const LEAST_ROWS: usize = 48;
/// Rows of a task are multiples of this, which suits the register tile of the product.
const ROW_STEP: usize = 12;
/// Tasks a thread, so that a late thread does not hold up the others for long.
const TASKS_A_THREAD: usize = 6;
/// Rows and columns at most of a weight-gradient tile, and columns at least.
const GRADIENT_ROWS: usize = 512;
const GRADIENT_COLUMNS: usize = 256;
const LEAST_GRADIENT_COLUMNS: usize = 64;

/// [`crate::Backend::ffn`].
pub(super) fn ffn(
    threads: &Threads,
    shape: FfnShape,
    runs: &[FfnRun],
    x: &[f32],
    weights: &[f32],
    row_weight: Option<&[f32]>,
    gu: &mut [f32],
    y: &mut [f32],
) {
    let FfnShape { d_model: d, ffn: f, .. } = shape;
    check_rows(runs);
    let tiles = Tiles::new(runs, threads.count());
    let (gu, y) = (DisjointMut::new(gu), DisjointMut::new(y));
    threads.run(tiles.count, |index| {
        let (run, rows) = tiles.get(index);
        let (w13, w2) = run_weights(shape, run, weights);
        let m = rows.len();
        // SAFETY: rows of different tasks are disjoint: within a run by their cut, between runs by `check_rows`.
        let (gu, y) = unsafe { (gu.range(scaled(&rows, 2 * f)), y.range(scaled(&results(run, &rows), d))) };
        let x = Matrix::rows(&x[scaled(&rows, d)], d);
        gemm(Dims { m, n: 2 * f, k: d }, x, Matrix::rows(w13, 2 * f), MatrixMut::rows(gu, 2 * f), false);
        let mut h = Scratch::take(m * f);
        swiglu(f, gu, &mut h);
        gemm(Dims { m, n: d, k: f }, Matrix::rows(&h, f), Matrix::rows(w2, d), MatrixMut::rows(y, d), false);
        if let Some(row_weight) = row_weight {
            scale_rows(d, y, &row_weight[rows]);
        }
    });
}

/// [`crate::Backend::ffn_backward`].
///
/// The gradient of a row's weight is the dot product of the gradient of `h` (before the weight) with `h`, in
/// [`super::simd::LANES`] partial sums.
pub(super) fn ffn_backward(
    threads: &Threads,
    shape: FfnShape,
    runs: &[FfnRun],
    dy: &[f32],
    weights: &[f32],
    row_weight: Option<&[f32]>,
    gu: &mut [f32],
    h: &mut [f32],
    dx: &mut [f32],
    drow_weight: Option<&mut [f32]>,
) {
    let FfnShape { d_model: d, ffn: f, .. } = shape;
    check_rows(runs);
    let tiles = Tiles::new(runs, threads.count());
    let (gu, h, dx) = (DisjointMut::new(gu), DisjointMut::new(h), DisjointMut::new(dx));
    let drow_weight = drow_weight.map(DisjointMut::new);
    threads.run(tiles.count, |index| {
        let (run, rows) = tiles.get(index);
        let (w13, w2) = run_weights(shape, run, weights);
        let m = rows.len();
        // SAFETY: rows of different tasks are disjoint: within a run by their cut, between runs by `check_rows`.
        let (gu, h, dx) = unsafe {
            let dx = dx.range(scaled(&results(run, &rows), d));
            (gu.range(scaled(&rows, 2 * f)), h.range(scaled(&rows, f)), dx)
        };
        // SAFETY: as above.
        let drow_weight = drow_weight.map(|all| unsafe { all.range(rows.clone()) });
        let mut dh = Scratch::take(m * f);
        let dy = Matrix::rows(&dy[scaled(&rows, d)], d);
        gemm(Dims { m, n: f, k: d }, dy, Matrix::columns(w2, d), MatrixMut::rows(&mut dh, f), false);
        swiglu_backward(f, row_weight.map(|all| &all[rows]), &dh, gu, h, drow_weight);
        let dgu = Matrix::rows(gu, 2 * f);
        gemm(Dims { m, n: d, k: 2 * f }, dgu, Matrix::columns(w13, 2 * f), MatrixMut::rows(dx, d), false);
    });
}

/// [`crate::Backend::ffn_weight_grad`].
pub(super) fn ffn_weight_grad(
    threads: &Threads,
    shape: FfnShape,
    runs: &[FfnRun],
    x: &[f32],
    dgu: &[f32],
    h: &[f32],
    dy: &[f32],
    dweights: &mut [f32],
) {
    let FfnShape { d_model: d, ffn: f, .. } = shape;
    assert!(shape.row_block > 0, "row_block is 0: a weight-gradient product needs rows");
    check_gradients(shape, runs, dweights.len());
    let (dw13, dw2) = GradientGrid::pair(shape, runs.len(), threads.count());
    let dweights = DisjointMut::new(dweights);
    let tiles = dw13.tiles() + dw2.tiles();
    threads.run(runs.len() * tiles, |index| {
        let (run, tile) = (&runs[index / tiles], index % tiles);
        let (grid, offset, left, right, tile) = if tile < dw13.tiles() {
            (&dw13, run.dw13, Matrix::columns(x, d), Matrix::rows(dgu, 2 * f), tile)
        } else {
            (&dw2, run.dw2, Matrix::columns(h, f), Matrix::rows(dy, d), tile - dw13.tiles())
        };
        let (rows, columns) = grid.get(tile);
        for start in run.rows.clone().step_by(shape.row_block) {
            let k = shape.row_block.min(run.rows.end - start);
            let offset = offset + rows.start * grid.n + columns.start;
            // SAFETY: tiles of different tasks share no element: within a gradient by the grid, between gradients by
            // `check_gradients`.
            let dst = unsafe { MatrixMut::tile(dweights.pointer(offset), dweights.len() - offset, grid.n) };
            let dims = Dims { m: rows.len(), n: columns.len(), k };
            gemm(dims, left.skip(rows.start, start), right.skip(start, columns.start), dst, true);
        }
    });
}

/// The runs' rows, cut into tasks: equal parts of a run, never rows of two runs.
struct Tiles<'a> {
    runs: &'a [FfnRun],
    most_rows: usize,
    count: usize,
}

impl<'a> Tiles<'a> {
    fn new(runs: &'a [FfnRun], threads: usize) -> Self {
        let rows: usize = runs.iter().map(|run| run.rows.len()).sum();
        let most_rows = if threads == 1 {
            MOST_ROWS
        } else {
            (rows / (threads * TASKS_A_THREAD)).clamp(LEAST_ROWS, MOST_ROWS)
        };
        let count = runs.iter().map(|run| run.rows.len().div_ceil(most_rows)).sum();
        Self { runs, most_rows, count }
    }

    fn get(&self, mut index: usize) -> (&'a FfnRun, Range<usize>) {
        for run in self.runs {
            let parts = run.rows.len().div_ceil(self.most_rows);
            if index < parts {
                let step = run.rows.len().div_ceil(parts).next_multiple_of(ROW_STEP);
                let start = run.rows.start + index * step;
                return (run, start.min(run.rows.end)..(start + step).min(run.rows.end));
            }
            index -= parts;
        }
        unreachable!("a task beyond the runs' rows")
    }
}

/// The tiles of one weight gradient `[m, n]`.
struct GradientGrid {
    m: usize,
    n: usize,
    columns: usize,
}

impl GradientGrid {
    /// The grids of `w13` and `w2`, fine enough for all threads.
    fn pair(shape: FfnShape, runs: usize, threads: usize) -> (Self, Self) {
        let FfnShape { d_model: d, ffn: f, .. } = shape;
        let mut columns = GRADIENT_COLUMNS;
        loop {
            let pair = (Self { m: d, n: 2 * f, columns }, Self { m: f, n: d, columns });
            let enough = threads == 1 || runs * (pair.0.tiles() + pair.1.tiles()) >= threads * TASKS_A_THREAD;
            if enough || columns <= LEAST_GRADIENT_COLUMNS {
                return pair;
            }
            columns /= 2;
        }
    }

    fn tiles(&self) -> usize {
        self.m.div_ceil(GRADIENT_ROWS) * self.n.div_ceil(self.columns)
    }

    fn get(&self, tile: usize) -> (Range<usize>, Range<usize>) {
        let across = self.n.div_ceil(self.columns);
        let (row, column) = (tile / across * GRADIENT_ROWS, tile % across * self.columns);
        (row..self.m.min(row + GRADIENT_ROWS), column..self.n.min(column + self.columns))
    }
}

/// `h = silu(gate) * up` for rows of `gu` `[rows, 2 * f]`.
fn swiglu(f: usize, gu: &[f32], h: &mut [f32]) {
    vectorized(
        #[inline(always)]
        || {
            for (gu, h) in gu.chunks_exact(2 * f).zip(h.chunks_exact_mut(f)) {
                let (gate, up) = gu.split_at(f);
                for ((h, gate), up) in h.iter_mut().zip(gate).zip(up) {
                    *h = silu(*gate) * *up;
                }
            }
        },
    );
}

/// Turns `gu` into its gradient, writes `h` times the row weight and the gradient of the row weight.
fn swiglu_backward(
    f: usize,
    row_weight: Option<&[f32]>,
    dh: &[f32],
    gu: &mut [f32],
    h: &mut [f32],
    mut drow_weight: Option<&mut [f32]>,
) {
    vectorized(
        #[inline(always)]
        || {
            let rows = dh.chunks_exact(f).zip(gu.chunks_exact_mut(2 * f)).zip(h.chunks_exact_mut(f));
            for (row, ((dh, gu), h)) in rows.enumerate() {
                let weight = row_weight.map_or(1.0, |weight| weight[row]);
                let (gate, up) = gu.split_at_mut(f);
                swiglu_backward_row(weight, dh, gate, up, h);
                if let Some(drow_weight) = drow_weight.as_deref_mut() {
                    drow_weight[row] = dot(dh, h);
                }
                h.iter_mut().for_each(|h| *h *= weight);
            }
        },
    );
}

/// One row: `gate` and `up` become their gradients, `h` is written without the weight.
#[inline(always)]
fn swiglu_backward_row(weight: f32, dh: &[f32], gate: &mut [f32], up: &mut [f32], h: &mut [f32]) {
    let (dh, dh_tail) = dh.as_chunks::<LANES>();
    let (gate, gate_tail) = gate.as_chunks_mut::<LANES>();
    let (up, up_tail) = up.as_chunks_mut::<LANES>();
    let (h, h_tail) = h.as_chunks_mut::<LANES>();
    for (((dh, gate), up), h) in dh.iter().zip(gate).zip(up).zip(h) {
        // Results go through arrays of their own: `gate` and `up` lie in one row, and the compiler would check in vain
        // that the rows of one stay apart from those of the other.
        let (mut dgate, mut dup, mut product) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        for lane in 0..LANES {
            let all = swiglu_gradient(weight * dh[lane], gate[lane], up[lane]);
            (dgate[lane], dup[lane], product[lane]) = all;
        }
        (*gate, *up, *h) = (dgate, dup, product);
    }
    for (((dh, gate), up), h) in dh_tail.iter().zip(gate_tail).zip(up_tail).zip(h_tail) {
        (*gate, *up, *h) = swiglu_gradient(weight * *dh, *gate, *up);
    }
}

/// Gradients of `gate` and `up`, and `h` itself.
#[inline(always)]
fn swiglu_gradient(dh: f32, gate: f32, up: f32) -> (f32, f32, f32) {
    let share = sigmoid(gate);
    let active = gate * share;
    (dh * up * (share + active * (1.0 - share)), dh * active, active * up)
}

/// Multiplies each row of `y` `[rows, d]` by its weight.
fn scale_rows(d: usize, y: &mut [f32], row_weight: &[f32]) {
    vectorized(
        #[inline(always)]
        || {
            for (y, weight) in y.chunks_exact_mut(d).zip(row_weight) {
                y.iter_mut().for_each(|y| *y *= *weight);
            }
        },
    );
}

fn scaled(rows: &Range<usize>, width: usize) -> Range<usize> {
    rows.start * width..rows.end * width
}

/// Where the results of `rows` of a run stand.
fn results(run: &FfnRun, rows: &Range<usize>) -> Range<usize> {
    let start = run.out + rows.start - run.rows.start;
    start..start + rows.len()
}

fn run_weights<'a>(shape: FfnShape, run: &FfnRun, weights: &'a [f32]) -> (&'a [f32], &'a [f32]) {
    let len = shape.d_model * shape.ffn;
    (&weights[run.w13..run.w13 + 2 * len], &weights[run.w2..run.w2 + len])
}

/// Runs and their results must follow each other: tasks of different runs write their rows at the same time.
fn check_rows(runs: &[FfnRun]) {
    for pair in runs.windows(2) {
        let (first, second) = (&pair[0].rows, &pair[1].rows);
        assert!(
            first.start <= first.end && first.end <= second.start && second.start <= second.end,
            "rows of feed-forward runs must ascend and not overlap: {first:?} comes before {second:?}"
        );
        let (first, second) = (pair[0].out + first.len(), pair[1].out);
        assert!(
            first <= second,
            "results of feed-forward runs must ascend and not overlap: those before row {first} come before row {second}"
        );
    }
}

/// Gradients of different runs must not overlap: tasks of different runs write them at the same time.
fn check_gradients(shape: FfnShape, runs: &[FfnRun], len: usize) {
    let size = shape.d_model * shape.ffn;
    let parts = |run: &FfnRun| [run.dw13..run.dw13 + 2 * size, run.dw2..run.dw2 + size];
    let apart = |a: &Range<usize>, b: &Range<usize>| a.end <= b.start || b.end <= a.start;
    for (index, run) in runs.iter().enumerate() {
        let [dw13, dw2] = parts(run);
        let others = runs[..index].iter().flat_map(parts);
        let alone = others.into_iter().all(|other| apart(&dw13, &other) && apart(&dw2, &other));
        assert!(
            alone && apart(&dw13, &dw2) && dw13.end <= len && dw2.end <= len,
            "gradients {dw13:?} and {dw2:?} of feed-forward run {index} overlap others or end beyond {len} elements"
        );
    }
}
