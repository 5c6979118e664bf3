//! bfloat16 as a format for rows on the wire: two values in the bits of one f32.

use super::parallel::Threads;
use super::simd::vectorized;

/// Values of a task.
const TASK: usize = 16 * 1024;

/// The nearest bfloat16, ties to even, as its upper 16 bits. A NaN stays one.
#[inline(always)]
fn bits(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1));
    if value.is_nan() { (bits | 0x40_0000) >> 16 } else { rounded >> 16 }
}

/// `value` rounded to bfloat16.
#[inline(always)]
pub(super) fn round(value: f32) -> f32 {
    f32::from_bits(bits(value) << 16)
}

pub(super) fn pack(threads: &Threads, src: &[f32], d: usize, dst: &mut [f32]) {
    let width = check(src, dst, d);
    let rows = (TASK / d.max(1)).max(1);
    threads.chunks_mut(dst, rows * width, |task, dst| {
        vectorized(
            #[inline(always)]
            || {
                for (src, dst) in src[task * rows * d..].chunks_exact(d).zip(dst.chunks_exact_mut(width)) {
                    let (pairs, last) = src.as_chunks::<2>();
                    for (pair, dst) in pairs.iter().zip(dst.iter_mut()) {
                        *dst = f32::from_bits(bits(pair[0]) | (bits(pair[1]) << 16));
                    }
                    if let [last] = last {
                        dst[width - 1] = f32::from_bits(bits(*last));
                    }
                }
            },
        );
    });
}

pub(super) fn unpack(threads: &Threads, src: &[f32], d: usize, dst: &mut [f32]) {
    let width = check(dst, src, d);
    let rows = (TASK / d.max(1)).max(1);
    threads.chunks_mut(dst, rows * d, |task, dst| {
        vectorized(
            #[inline(always)]
            || {
                for (src, dst) in src[task * rows * width..].chunks_exact(width).zip(dst.chunks_exact_mut(d))
                {
                    let (pairs, last) = dst.as_chunks_mut::<2>();
                    for (src, pair) in src.iter().zip(pairs) {
                        *pair = [
                            f32::from_bits(src.to_bits() << 16),
                            f32::from_bits(src.to_bits() & 0xFFFF_0000),
                        ];
                    }
                    if let [last] = last {
                        *last = f32::from_bits(src[width - 1].to_bits() << 16);
                    }
                }
            },
        );
    });
}

/// The packed width of a row.
fn check(values: &[f32], packed: &[f32], d: usize) -> usize {
    assert!(d > 0, "bf16: rows of no values");
    let (rows, width) = (values.len() / d, d.div_ceil(2));
    assert_eq!(
        [values.len(), packed.len()],
        [rows * d, rows * width],
        "bf16: {rows} rows of {d} values take {width} elements each"
    );
    width
}
