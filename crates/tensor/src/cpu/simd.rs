//! Vector arithmetic that gives the same bits on every machine.
//!
//! Loops are plain Rust that the compiler vectorises for the instruction set found at run time
//! ([`vectorized`]). Elementwise arithmetic is exact per operation (no fused multiply-add, no
//! approximate reciprocals), so the width of a vector does not matter and a tail runs the same operations as the
//! body. Sums do depend on their order: they go over [`LANES`] partial sums, whatever the machine's vectors are.

use pulp::Arch;

/// Partial sums of a reduction: element i belongs to sum `i % LANES`.
pub const LANES: usize = 16;

/// Runs `body` compiled for the widest vectors of this machine. What `body` calls must be `#[inline(always)]`
/// to be compiled with it.
#[inline(always)]
pub fn vectorized<R>(body: impl FnOnce() -> R) -> R {
    Arch::new().dispatch(body)
}

/// `e^x` with an error below 1.5 units in the last place; without branches, so that loops over it vectorise.
///
/// Exactly 0 below -87.7 and infinite above 88.4, a little earlier than rounding would have it; NaN stays NaN. Range
/// reduction by `ln 2` in two parts, then `2^n (1 + r + r^2 q(r))` with the near-minimax polynomial of degree 5 for
/// `q`, evaluated as a tree (Estrin), because a loop over `exp` waits for latencies.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Their exponents are those of zero and of infinity.
    const SMALLEST: f32 = -88.0;
    const LARGEST: f32 = 88.7;
    // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = if x < SMALLEST { SMALLEST } else { x };
    let x = if x > LARGEST { LARGEST } else { x };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let square = r * r;
    let high = 1.393_365e-3 + r * 1.989_099_1e-4;
    let middle = 4.166_646_7e-2 + r * 8.333_31e-3;
    let low = 0.5 + r * 1.666_666_7e-1;
    let q = low + square * (middle + square * high);
    let mantissa = (q * square + r) + 1.0;
    mantissa * f32::from_bits(rounded.to_bits().wrapping_add(127) << 23)
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// Joins the partial sums of a reduction: halves, pairwise.
#[inline(always)]
pub fn join(sums: [f32; LANES]) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|lane| sums[lane] + sums[lane + 8]);
    let four: [f32; 4] = std::array::from_fn(|lane| eight[lane] + eight[lane + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// Sum of `term(a[i], b[i])`, in [`LANES`] partial sums joined by [`join`]. Call it inside [`vectorized`].
#[inline(always)]
pub fn sum2(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (a_blocks, a_tail) = a.as_chunks::<LANES>();
    let (b_blocks, b_tail) = b.as_chunks::<LANES>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..LANES {
            sums[lane] += term(a[lane], b[lane]);
        }
    }
    // A copy, so that the sums of the loop above stay in registers.
    let mut total = sums;
    for (lane, (a, b)) in a_tail.iter().zip(b_tail).enumerate() {
        total[lane] += term(*a, *b);
    }
    join(total)
}

/// Sum of `term(x[i])`, in [`LANES`] partial sums joined by [`join`]. Call it inside [`vectorized`].
#[inline(always)]
pub fn sum(x: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    sum2(x, x, |value, _| term(value))
}

/// Dot product, in [`LANES`] partial sums. Call it inside [`vectorized`].
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum2(a, b, |a, b| a * b)
}

/// The largest element, negative infinity for none; NaN elements are passed over. Call it inside [`vectorized`].
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let larger = |best: f32, value: f32| if value > best { value } else { best };
    let mut best = [f32::NEG_INFINITY; LANES];
    let (blocks, tail) = x.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            best[lane] = larger(best[lane], block[lane]);
        }
    }
    let rest = tail.iter().fold(f32::NEG_INFINITY, |best, value| larger(best, *value));
    larger(rest, largest(best))
}

/// The largest lane; a call of its own, as [`join`].
#[inline(never)]
fn largest(lanes: [f32; LANES]) -> f32 {
    lanes.into_iter().fold(f32::NEG_INFINITY, |best, value| if value > best { value } else { best })
}
