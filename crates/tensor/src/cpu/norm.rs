//! RMSNorm over rows, and over the heads of queries and keys.

use std::ops::Range;

use super::parallel::{DisjointMut, Threads};
use super::simd::{LANES, join, sum, vectorized};
use crate::backend::{Heads, TOKEN_BLOCK};

/// Rows of a task.
const ROWS: usize = 32;

/// Columns of a weight gradient that a task owns.
const COLUMNS: usize = 32;

pub(super) fn rms_norm(
    threads: &Threads,
    x: &[f32],
    weight: &[f32],
    epsilon: f32,
    y: &mut [f32],
    rstd: &mut [f32],
) {
    let d = weight.len();
    assert_eq!([x.len(), y.len()], [rstd.len() * d; 2], "rms_norm: rows of {d}");
    let y = DisjointMut::new(y);
    threads.chunks_mut(rstd, ROWS, |task, rstd| {
        let start = task * ROWS * d;
        let part = start..start + rstd.len() * d;
        // SAFETY: every task has rows of its own.
        let (x, y) = (&x[part.clone()], unsafe { y.range(part) });
        for ((y, x), rstd) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(rstd) {
            *rstd = vectorized(
                #[inline(always)]
                || norm_row(x, weight, epsilon, y),
            );
        }
    });
}

/// `y = x * rstd * weight`; returns rstd.
#[inline(always)]
fn norm_row(x: &[f32], weight: &[f32], epsilon: f32, y: &mut [f32]) -> f32 {
    let rstd = 1.0 / (sum(x, |v| v * v) / x.len() as f32 + epsilon).sqrt();
    for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
        *y = x * rstd * w;
    }
    rstd
}

pub(super) fn rms_norm_backward(
    threads: &Threads,
    dy: &[f32],
    x: &[f32],
    weight: &[f32],
    rstd: &[f32],
    dx: &mut [f32],
) {
    let d = weight.len();
    assert_eq!([x.len(), dy.len(), dx.len()], [rstd.len() * d; 3], "rms_norm_backward: rows of {d}");
    threads.chunks_mut(dx, ROWS * d, |task, dx| {
        let (dy, x, rstd) = (&dy[task * ROWS * d..], &x[task * ROWS * d..], &rstd[task * ROWS..]);
        let rows = dx.chunks_exact_mut(d).zip(dy.chunks_exact(d)).zip(x.chunks_exact(d)).zip(rstd);
        for (((dx, dy), x), &rstd) in rows {
            vectorized(
                #[inline(always)]
                || {
                    let along = slope_along(dy, x, weight, rstd);
                    for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
                        *dx += dy * w * rstd - x * along;
                    }
                },
            );
        }
    });
}

/// The part of the gradient that points along `x`: `rstd^3 * mean(dy * weight * x)`.
#[inline(always)]
fn slope_along(dy: &[f32], x: &[f32], weight: &[f32], rstd: f32) -> f32 {
    let mut sums = [0f32; LANES];
    let (dy, dy_tail) = dy.as_chunks::<LANES>();
    let (weight, weight_tail) = weight.as_chunks::<LANES>();
    let (x_blocks, x_tail) = x.as_chunks::<LANES>();
    for ((dy, w), x) in dy.iter().zip(weight).zip(x_blocks) {
        for lane in 0..LANES {
            sums[lane] += dy[lane] * w[lane] * x[lane];
        }
    }
    for (lane, ((dy, w), x)) in dy_tail.iter().zip(weight_tail).zip(x_tail).enumerate() {
        sums[lane] += dy * w * x;
    }
    join(sums) / x.len() as f32 * rstd * rstd * rstd
}

pub(super) fn rms_norm_weight_grad(
    threads: &Threads,
    dy: &[f32],
    x: &[f32],
    rstd: &[f32],
    d: usize,
    dweight: &mut [f32],
) {
    assert_eq!([x.len(), dy.len()], [rstd.len() * d; 2], "rms_norm_weight_grad: rows of {d}");
    assert_eq!(dweight.len(), d, "rms_norm_weight_grad: the weight has {d} elements");
    let heads = HeadRows { width: d, first: 0, count: 1, rstd_width: 1, rstd_first: 0, head_dim: d };
    weight_grad(threads, dy, x, rstd, heads, dweight);
}

pub(super) fn head_norm(
    threads: &Threads,
    heads: Heads,
    raw: &[f32],
    q_weight: &[f32],
    k_weight: &[f32],
    epsilon: f32,
    out: &mut [f32],
    rstd: &mut [f32],
) {
    let (width, normed) = (heads.qkv_width(), heads.heads + heads.kv_heads);
    assert_eq!([raw.len(), out.len()], [rstd.len() / normed * width; 2], "head_norm: rows of {width}");
    assert_eq!([q_weight.len(), k_weight.len()], [heads.head_dim; 2], "head_norm: weights of a head");
    let out = DisjointMut::new(out);
    threads.chunks_mut(rstd, ROWS * normed, |task, rstd| {
        let start = task * ROWS * width;
        let part = start..start + rstd.len() / normed * width;
        // SAFETY: every task has rows of its own.
        let (raw, out) = (&raw[part.clone()], unsafe { out.range(part) });
        let rows =
            out.chunks_exact_mut(width).zip(raw.chunks_exact(width)).zip(rstd.chunks_exact_mut(normed));
        for ((out, raw), rstd) in rows {
            vectorized(
                #[inline(always)]
                || norm_heads(heads, raw, q_weight, k_weight, epsilon, out, rstd),
            );
        }
    });
}

/// One row of [`head_norm`].
#[inline(always)]
fn norm_heads(
    heads: Heads,
    raw: &[f32],
    q_weight: &[f32],
    k_weight: &[f32],
    epsilon: f32,
    out: &mut [f32],
    rstd: &mut [f32],
) {
    let hd = heads.head_dim;
    for (head, rstd) in rstd.iter_mut().enumerate() {
        let weight = if head < heads.heads { q_weight } else { k_weight };
        let part = head * hd..(head + 1) * hd;
        *rstd = norm_row(&raw[part.clone()], weight, epsilon, &mut out[part]);
    }
    let values = rstd.len() * hd;
    out[values..].copy_from_slice(&raw[values..]);
}

pub(super) fn head_norm_backward(
    threads: &Threads,
    heads: Heads,
    d: &mut [f32],
    raw: &[f32],
    q_weight: &[f32],
    k_weight: &[f32],
    rstd: &[f32],
) {
    let (width, normed) = (heads.qkv_width(), heads.heads + heads.kv_heads);
    assert_eq!([raw.len(), d.len()], [rstd.len() / normed * width; 2], "head_norm_backward: rows of {width}");
    assert_eq!(
        [q_weight.len(), k_weight.len()],
        [heads.head_dim; 2],
        "head_norm_backward: weights of a head"
    );
    threads.chunks_mut(d, ROWS * width, |task, d| {
        let (raw, rstd) = (&raw[task * ROWS * width..], &rstd[task * ROWS * normed..]);
        let rows = d.chunks_exact_mut(width).zip(raw.chunks_exact(width)).zip(rstd.chunks_exact(normed));
        for ((d, raw), rstd) in rows {
            vectorized(
                #[inline(always)]
                || turn_head_gradients(heads, d, raw, q_weight, k_weight, rstd),
            );
        }
    });
}

/// One row of [`head_norm_backward`].
#[inline(always)]
fn turn_head_gradients(
    heads: Heads,
    d: &mut [f32],
    raw: &[f32],
    q_weight: &[f32],
    k_weight: &[f32],
    rstd: &[f32],
) {
    let hd = heads.head_dim;
    let parts = d.chunks_exact_mut(hd).zip(raw.chunks_exact(hd)).zip(rstd);
    for (head, ((d, x), &rstd)) in parts.enumerate() {
        let weight = if head < heads.heads { q_weight } else { k_weight };
        let along = slope_along(d, x, weight, rstd);
        for ((d, x), w) in d.iter_mut().zip(x).zip(weight) {
            *d = *d * w * rstd - x * along;
        }
    }
}

pub(super) fn head_norm_weight_grad(
    threads: &Threads,
    heads: Heads,
    dout: &[f32],
    raw: &[f32],
    rstd: &[f32],
    dq_weight: &mut [f32],
    dk_weight: &mut [f32],
) {
    let (width, normed) = (heads.qkv_width(), heads.heads + heads.kv_heads);
    assert_eq!(
        [raw.len(), dout.len()],
        [rstd.len() / normed * width; 2],
        "head_norm_weight_grad: rows of {width}"
    );
    assert_eq!(
        [dq_weight.len(), dk_weight.len()],
        [heads.head_dim; 2],
        "head_norm_weight_grad: weights of a head"
    );
    let queries = HeadRows {
        width,
        first: 0,
        count: heads.heads,
        rstd_width: normed,
        rstd_first: 0,
        head_dim: heads.head_dim,
    };
    let keys = HeadRows { first: heads.q_width(), count: heads.kv_heads, rstd_first: heads.heads, ..queries };
    weight_grad(threads, dout, raw, rstd, queries, dq_weight);
    weight_grad(threads, dout, raw, rstd, keys, dk_weight);
}

/// Where the normed vectors of a row stand: `count` heads of `head_dim` from column `first`, their `rstd` from
/// `rstd_first`.
#[derive(Clone, Copy)]
struct HeadRows {
    width: usize,
    first: usize,
    count: usize,
    rstd_width: usize,
    rstd_first: usize,
    head_dim: usize,
}

/// `dweight += dy * x * rstd` over all rows and their heads: each block of [`TOKEN_BLOCK`] rows from zero, rows and
/// heads ascending; blocks ascending. Tasks own columns.
fn weight_grad(threads: &Threads, dy: &[f32], x: &[f32], rstd: &[f32], heads: HeadRows, dweight: &mut [f32]) {
    let (width, rstd_width) = (heads.width, heads.rstd_width);
    threads.chunks_mut(dweight, COLUMNS, |task, dweight| {
        let columns = task * COLUMNS..task * COLUMNS + dweight.len();
        let blocks = dy.chunks(TOKEN_BLOCK * width).zip(x.chunks(TOKEN_BLOCK * width));
        for ((dy, x), rstd) in blocks.zip(rstd.chunks(TOKEN_BLOCK * rstd_width)) {
            vectorized(
                #[inline(always)]
                || add_block(dy, x, rstd, heads, columns.clone(), dweight),
            );
        }
    });
}

/// One block of [`weight_grad`].
#[inline(always)]
fn add_block(
    dy: &[f32],
    x: &[f32],
    rstd: &[f32],
    heads: HeadRows,
    columns: Range<usize>,
    dweight: &mut [f32],
) {
    let mut sum = [0f32; COLUMNS];
    let rows = dy.chunks_exact(heads.width).zip(x.chunks_exact(heads.width));
    for ((dy, x), rstd) in rows.zip(rstd.chunks_exact(heads.rstd_width)) {
        for head in 0..heads.count {
            let start = heads.first + head * heads.head_dim;
            let part = start + columns.start..start + columns.end;
            let rstd = rstd[heads.rstd_first + head];
            for ((sum, dy), x) in sum.iter_mut().zip(&dy[part.clone()]).zip(&x[part]) {
                *sum += dy * x * rstd;
            }
        }
    }
    dweight.iter_mut().zip(&sum).for_each(|(d, s)| *d += s);
}
