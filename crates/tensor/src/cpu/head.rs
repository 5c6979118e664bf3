//! The output head fused with cross-entropy: logits of a tile of tokens at a time.

use super::gemm::Matrix;
use super::matmul::tiled;
use super::simd::{exp, max, vectorized};
use super::{Cpu, DisjointMut, Scratch, Threads, simd};
use crate::backend::{Dims, HeadGradients, IGNORE, TOKEN_BLOCK};

/// Tokens of a tile: one product of the gradient of the table.
const TILE: usize = 256;
/// Tokens of a softmax task.
const SOFTMAX_ROWS: usize = 16;
/// Padding of a row of logits: rows that are a power of two apart would compete for the same lines of the cache.
const PADDING: usize = 16;

/// [`crate::Backend::head_loss`].
///
/// A row's loss is `ln(sum of e^(logit - max)) + max - logit of the target` in f64; the sum over the vocabulary is
/// f32, in [`super::simd::LANES`] partial sums.
pub(super) fn head_loss(
    threads: &Threads,
    x: &[f32],
    table: &[f32],
    d: usize,
    targets: &[u32],
    mut gradients: Option<HeadGradients<'_, Cpu>>,
) -> f64 {
    let (rows, vocab) = (targets.len(), table.len() / d);
    assert!(x.len() == rows * d && table.len() == vocab * d, "head: {rows} targets, {} inputs", x.len());
    let stride = vocab.next_multiple_of(PADDING) + PADDING;
    let mut logits = Scratch::take(TILE.min(rows) * stride);
    let mut loss = 0.0;
    for start in (0..rows).step_by(TILE) {
        let end = rows.min(start + TILE);
        let (m, x, targets) = (end - start, &x[start * d..end * d], &targets[start..end]);
        let x = Matrix::rows(x, d);
        let table_rows = Matrix::rows(table, d);
        let dims = Dims { m, n: vocab, k: d };
        tiled(threads, dims, x, Matrix::columns(table, d), &mut logits, stride, false);
        let scale = gradients.as_ref().map(|gradients| gradients.scale);
        let mut losses = [0.0; TILE];
        softmax(threads, &mut logits[..m * stride], stride, vocab, targets, scale, &mut losses[..m]);
        for block in losses[..m].chunks(TOKEN_BLOCK) {
            loss += block.iter().sum::<f64>();
        }
        let Some(HeadGradients { dx, dtable, .. }) = &mut gradients else { continue };
        if let Some(dx) = dx {
            let (dlogits, dx) = (Matrix::rows(&logits, stride), &mut dx[start * d..end * d]);
            tiled(threads, Dims { m, n: d, k: vocab }, dlogits, table_rows, dx, d, false);
        }
        if let Some(dtable) = dtable {
            let dlogits = Matrix::columns(&logits, stride);
            tiled(threads, Dims { m: vocab, n: d, k: m }, dlogits, x, dtable, d, true);
        }
    }
    loss
}

/// Losses of rows of logits; with the factor of the loss, the logits become their gradients.
fn softmax(
    threads: &Threads,
    logits: &mut [f32],
    stride: usize,
    vocab: usize,
    targets: &[u32],
    scale: Option<f32>,
    losses: &mut [f64],
) {
    let losses = DisjointMut::new(losses);
    threads.chunks_mut(logits, SOFTMAX_ROWS * stride, |index, logits| {
        for (row, logits) in logits.chunks_exact_mut(stride).enumerate() {
            let row = index * SOFTMAX_ROWS + row;
            let loss = vectorized(
                #[inline(always)]
                || softmax_row(&mut logits[..vocab], targets[row], scale),
            );
            // SAFETY: each row is one task's.
            let place = unsafe { losses.range(row..row + 1) };
            place[0] = loss;
        }
    });
}

#[inline(always)]
fn softmax_row(logits: &mut [f32], target: u32, scale: Option<f32>) -> f64 {
    if target == IGNORE {
        if scale.is_some() {
            logits.fill(0.0);
        }
        return 0.0;
    }
    let target = target as usize;
    let (largest, chosen) = (max(logits), logits[target]);
    let sum = match scale {
        None => simd::sum(logits, |logit| exp(logit - largest)),
        Some(scale) => {
            logits.iter_mut().for_each(|logit| *logit = exp(*logit - largest));
            let sum = simd::sum(logits, |e| e);
            let factor = scale / sum;
            logits.iter_mut().for_each(|e| *e *= factor);
            logits[target] -= scale;
            sum
        }
    };
    libm::log(f64::from(sum)) + (f64::from(largest) - f64::from(chosen))
}
