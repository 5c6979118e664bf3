//! RMSNorm over rows, and over the heads of queries and keys.

use super::parallel::{DisjointMut, Scratch, Threads};
use super::simd::{LANES, join, sum, vectorized};
use crate::backend::{Heads, TOKEN_BLOCK};

/// Rows of a task.
const ROWS: usize = 32;

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
    base: Option<&[f32]>,
    dx: &mut [f32],
) {
    let d = weight.len();
    assert_eq!([x.len(), dy.len(), dx.len()], [rstd.len() * d; 3], "rms_norm_backward: rows of {d}");
    assert!(base.is_none_or(|base| base.len() == dx.len()), "rms_norm_backward: base is not shaped like dx");
    threads.chunks_mut(dx, ROWS * d, |task, dx| {
        for (i, dx) in dx.chunks_exact_mut(d).enumerate() {
            let row = task * ROWS + i;
            let part = row * d..(row + 1) * d;
            let base = base.map(|base| &base[part.clone()]);
            vectorized(
                #[inline(always)]
                || turn_gradient(&dy[part.clone()], &x[part.clone()], weight, rstd[row], base, dx),
            );
        }
    });
}

/// One row of [`rms_norm_backward`].
#[inline(always)]
fn turn_gradient(dy: &[f32], x: &[f32], weight: &[f32], rstd: f32, base: Option<&[f32]>, dx: &mut [f32]) {
    let along = slope_along(dy, x, weight, rstd);
    let terms = dx.iter_mut().zip(dy).zip(x).zip(weight);
    match base {
        Some(base) => {
            terms.zip(base).for_each(|((((dx, dy), x), w), base)| *dx = base + (dy * w * rstd - x * along));
        }
        None => terms.for_each(|(((dx, dy), x), w)| *dx = dy * w * rstd - x * along),
    }
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
    dout: &[f32],
    raw: &[f32],
    q_weight: &[f32],
    k_weight: &[f32],
    rstd: &[f32],
    draw: &mut [f32],
) {
    let (width, normed) = (heads.qkv_width(), heads.heads + heads.kv_heads);
    let len = rstd.len() / normed * width;
    assert_eq!([raw.len(), dout.len(), draw.len()], [len; 3], "head_norm_backward: rows of {width}");
    assert_eq!(
        [q_weight.len(), k_weight.len()],
        [heads.head_dim; 2],
        "head_norm_backward: weights of a head"
    );
    threads.chunks_mut(draw, ROWS * width, |task, draw| {
        for (i, draw) in draw.chunks_exact_mut(width).enumerate() {
            let row = task * ROWS + i;
            let part = row * width..(row + 1) * width;
            let (dout, raw) = (&dout[part.clone()], &raw[part]);
            let rstd = &rstd[row * normed..(row + 1) * normed];
            vectorized(
                #[inline(always)]
                || turn_head_gradients(heads, dout, raw, q_weight, k_weight, rstd, draw),
            );
        }
    });
}

/// One row of [`head_norm_backward`].
#[inline(always)]
fn turn_head_gradients(
    heads: Heads,
    dout: &[f32],
    raw: &[f32],
    q_weight: &[f32],
    k_weight: &[f32],
    rstd: &[f32],
    draw: &mut [f32],
) {
    let hd = heads.head_dim;
    let parts = draw.chunks_exact_mut(hd).zip(dout.chunks_exact(hd)).zip(raw.chunks_exact(hd)).zip(rstd);
    for (head, (((draw, dout), raw), &rstd)) in parts.enumerate() {
        let weight = if head < heads.heads { q_weight } else { k_weight };
        turn_gradient(dout, raw, weight, rstd, None, draw);
    }
    let values = rstd.len() * hd;
    draw[values..].copy_from_slice(&dout[values..]);
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
/// heads ascending; blocks ascending.
fn weight_grad(threads: &Threads, dy: &[f32], x: &[f32], rstd: &[f32], heads: HeadRows, dweight: &mut [f32]) {
    let rows = rstd.len() / heads.rstd_width;
    let mut sums = Scratch::take(rows.div_ceil(TOKEN_BLOCK) * heads.head_dim);
    threads.chunks_mut(&mut sums, heads.head_dim, |block, sum| {
        let rows = block * TOKEN_BLOCK..rows.min((block + 1) * TOKEN_BLOCK);
        let part = rows.start * heads.width..rows.end * heads.width;
        let rstd = &rstd[rows.start * heads.rstd_width..rows.end * heads.rstd_width];
        vectorized(
            #[inline(always)]
            || sum_block(&dy[part.clone()], &x[part], rstd, heads, sum),
        );
    });
    for sum in sums.chunks_exact(heads.head_dim) {
        dweight.iter_mut().zip(sum).for_each(|(d, s)| *d += s);
    }
}

/// One block of [`weight_grad`].
#[inline(always)]
fn sum_block(dy: &[f32], x: &[f32], rstd: &[f32], heads: HeadRows, sum: &mut [f32]) {
    sum.fill(0.0);
    let rows = dy.chunks_exact(heads.width).zip(x.chunks_exact(heads.width));
    for ((dy, x), rstd) in rows.zip(rstd.chunks_exact(heads.rstd_width)) {
        for head in 0..heads.count {
            let start = heads.first + head * heads.head_dim;
            let part = start..start + heads.head_dim;
            let rstd = rstd[heads.rstd_first + head];
            for ((sum, dy), x) in sum.iter_mut().zip(&dy[part.clone()]).zip(&x[part]) {
                *sum += dy * x * rstd;
            }
        }
    }
}
