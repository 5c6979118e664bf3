//! Rotary position embedding.

use super::parallel::Threads;
use super::simd::vectorized;
use crate::backend::Heads;

/// Rows of a task.
const ROWS: usize = 32;

pub(super) fn rope(
    threads: &Threads,
    heads: Heads,
    qkv: &mut [f32],
    positions: &[u32],
    table: &[f32],
    inverse: bool,
) {
    let (width, head_dim) = (heads.qkv_width(), heads.head_dim);
    assert!(head_dim.is_multiple_of(2), "rope: head_dim {head_dim} is odd");
    assert_eq!(qkv.len(), positions.len() * width, "rope: {} positions, rows of {width}", positions.len());
    let turned = heads.q_width() + heads.kv_width();
    threads.chunks_mut(qkv, ROWS * width, |task, rows| {
        for (row, &position) in rows.chunks_exact_mut(width).zip(&positions[task * ROWS..]) {
            let start = position as usize * head_dim;
            let Some(angles) = table.get(start..start + head_dim) else {
                panic!("rope: position {position} of a table of {} positions", table.len() / head_dim);
            };
            vectorized(
                #[inline(always)]
                || turn(&mut row[..turned], angles, inverse),
            );
        }
    });
}

/// Turns the heads of one row by the angles of its position (cosines, then sines).
#[inline(always)]
fn turn(row: &mut [f32], angles: &[f32], inverse: bool) {
    let (cosines, sines) = angles.split_at(angles.len() / 2);
    let sign = if inverse { -1.0 } else { 1.0 };
    for head in row.chunks_exact_mut(angles.len()) {
        let (left, right) = head.split_at_mut(cosines.len());
        for (((a, b), cos), sin) in left.iter_mut().zip(right).zip(cosines).zip(sines) {
            let sin = sign * sin;
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}
