//! What the kernel tests share: numbers, comparisons, finite differences.

use unisono_tensor::Cpu;

/// A small reproducible generator (SplitMix64).
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// `n` values, evenly in -1..1.
    pub fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
    }
}

pub fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}

pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// A buffer whose contents a kernel must not keep.
pub fn poison(n: usize) -> Vec<f32> {
    vec![f32::NAN; n]
}

/// `got` and `want` differ by at most `tolerance` times the largest magnitude of `want`.
#[track_caller]
pub fn assert_close(name: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{name}: lengths");
    let scale = want.iter().fold(1e-3f64, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*g) - w).abs();
        assert!(error <= tolerance * scale, "{name}[{i}]: got {g}, want {w}, scale {scale}");
    }
}

/// Central differences of `f` at `x`, for the elements `which`.
pub fn differences(x: &[f64], which: &[usize], mut f: impl FnMut(&[f64]) -> f64) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut at = x.to_vec();
    let mut slope = |i: usize| {
        at[i] = x[i] + STEP;
        let above = f(&at);
        at[i] = x[i] - STEP;
        let below = f(&at);
        at[i] = x[i];
        (above - below) / (2.0 * STEP)
    };
    which.iter().map(|&i| slope(i)).collect()
}

/// Central differences of `f` for all elements.
pub fn gradient(x: &[f64], f: impl FnMut(&[f64]) -> f64) -> Vec<f64> {
    differences(x, &(0..x.len()).collect::<Vec<_>>(), f)
}

/// The same bits on 1, 2 and 3 threads; returns what one thread gave.
#[track_caller]
pub fn on_any_threads<T: PartialEq + std::fmt::Debug>(run: impl Fn(&Cpu) -> T) -> T {
    let one = run(&Cpu::new(1));
    for threads in [2, 3] {
        assert!(run(&Cpu::new(threads)) == one, "{threads} threads give other bits than one");
    }
    one
}
