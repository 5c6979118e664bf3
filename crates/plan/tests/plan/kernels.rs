//! The kernel tables against measurements that were left out of their fit, and sanity beyond what was measured.

use proptest::prelude::*;
use unisono_plan::kernels::{AttentionShape, KernelModel, Pass};
use unisono_plan::{Gpu, PART_SPREADS, Precision};

use crate::coverage::holds_four_of_five;

/// Rows of `kernel,gpu,precision,sizes...,microseconds`.
const HELD_BACK: &str = include_str!("../data/kernels_held_back.csv");

fn predicted_s(kernel: &str, model: &KernelModel, precision: Precision, sizes: &[usize]) -> f64 {
    match (kernel, sizes) {
        ("gemm", &[m, n, k]) => model.gemm(m, n, k, precision),
        ("attention", &[batch, sequence, heads, kv_heads, dim]) => {
            let shape = AttentionShape {
                batch,
                queries: sequence,
                keys: sequence,
                heads,
                kv_heads,
                qk_dim: dim,
                v_dim: dim,
                causal: true,
                window: None,
            };
            model.attention(Pass::Forward, &shape, precision)
        }
        ("grouped", &[tokens, hidden, inner, top_k, experts, ranks]) => {
            let (rows, here) = ((tokens * top_k) as f64 / ranks as f64, experts / ranks);
            model.grouped_gemm(rows, here, 2 * inner, hidden, precision)
                + model.grouped_gemm(rows, here, hidden, inner, precision)
                + model.permutation(tokens as f64, hidden, precision)
        }
        _ => panic!("{kernel} {sizes:?}"),
    }
}

/// Absolute relative errors of a kernel over its held-back rows, ascending.
fn errors(kernel: &str) -> Vec<f64> {
    let mut errors: Vec<f64> = ratios(kernel).iter().map(|ratio| (ratio - 1.0).abs()).collect();
    errors.sort_by(f64::total_cmp);
    errors
}

/// Predicted over measured seconds of a kernel's held-back rows.
fn ratios(kernel: &str) -> Vec<f64> {
    let mut ratios = Vec::new();
    for line in HELD_BACK.lines().filter(|line| line.starts_with(kernel)) {
        let fields: Vec<&str> = line.split(',').collect();
        let model = KernelModel::of(&Gpu::named(fields[1]).unwrap());
        let sizes: Vec<usize> = fields[3..fields.len() - 1].iter().map(|f| f.parse().unwrap()).collect();
        let measured_us: f64 = fields[fields.len() - 1].parse().unwrap();
        let predicted = predicted_s(kernel, &model, fields[2].parse().unwrap(), &sizes);
        ratios.push(predicted * 1e6 / measured_us);
    }
    ratios
}

#[test]
fn about_four_of_five_sizes_left_out_lie_in_the_interval_of_their_table() {
    for (part, kernel) in ["gemm", "grouped", "attention"].into_iter().enumerate() {
        holds_four_of_five(kernel, &ratios(kernel), PART_SPREADS[part].table);
    }
}

#[test]
fn sizes_left_out_of_the_fit_are_predicted() {
    // Kernel, rows, bounds of the median and of the ninth decile.
    let cases = [("gemm", 250, 0.04, 0.11), ("attention", 140, 0.04, 0.12), ("grouped", 230, 0.06, 0.18)];
    for (kernel, rows, median, ninth) in cases {
        let errors = errors(kernel);
        let (m, n) = (errors[errors.len() / 2], errors[errors.len() * 9 / 10]);
        println!("{kernel}: {} rows, median {:.1}%, p90 {:.1}%", errors.len(), 100.0 * m, 100.0 * n);
        assert!(errors.len() >= rows, "{kernel}: {} rows", errors.len());
        assert!(m <= median && n <= ninth, "{kernel}: median {m:.3}, p90 {n:.3}");
    }
}

proptest! {
    /// On every GPU, in every precision and far outside the measured sizes, a larger product takes at least as long (to
    /// what rounding of the tables to thousandths leaves), and no product beats the roofline of its operations.
    #[test]
    fn larger_products_take_longer_and_none_beats_the_peak(
        gpu in 0..Gpu::all().len(),
        precision in 0..Precision::ALL.len(),
        sizes in [1usize..200_000, 1usize..200_000, 1usize..200_000],
        axis in 0..3usize,
        factor in 1usize..9,
    ) {
        let (gpu, precision) = (Gpu::all()[gpu], Precision::ALL[precision]);
        let model = KernelModel::of(&gpu);
        let mut larger = sizes;
        larger[axis] *= factor;
        let seconds = |s: [usize; 3]| model.gemm(s[0], s[1], s[2], precision);
        let (small, large) = (seconds(sizes), seconds(larger));
        prop_assert!(large >= small * 0.95, "{} {precision} {sizes:?} {small} {larger:?} {large}", gpu.name);
        let flops = 2.0 * sizes.iter().map(|&s| s as f64).product::<f64>();
        prop_assert!(small.is_finite() && flops / small <= gpu.peak_flops(precision));
    }

    /// The same of experts' products, attention and what only moves memory.
    #[test]
    fn other_kernels_are_positive_and_grow(
        gpu in 0..Gpu::all().len(),
        precision in 0..Precision::ALL.len(),
        rows in 1usize..1_000_000,
        experts in 1usize..400,
        widths in (64usize..20_000, 64usize..20_000),
        sequence in 1usize..200_000,
    ) {
        let (gpu, precision) = (Gpu::all()[gpu], Precision::ALL[precision]);
        let model = KernelModel::of(&gpu);
        let grouped = |rows: usize| model.grouped_gemm(rows as f64, experts, widths.0, widths.1, precision);
        prop_assert!(grouped(rows) > 0.0 && grouped(2 * rows) >= 0.85 * grouped(rows));
        let flops = 2.0 * (rows * widths.0 * widths.1) as f64;
        prop_assert!(flops / grouped(rows) <= gpu.peak_flops(precision));
        let seconds = |tokens: usize| {
            let shape = AttentionShape {
                batch: 1, queries: tokens, keys: tokens, heads: 32, kv_heads: 8, qk_dim: 192, v_dim: 128,
                causal: true, window: None,
            };
            (model.attention(Pass::Forward, &shape, precision), model.attention(Pass::Backward, &shape, precision))
        };
        let (forward, backward) = seconds(sequence);
        prop_assert!(backward >= forward && seconds(2 * sequence).0 >= 0.95 * forward);
        prop_assert!(model.memory_bound(2e9) > 1.9 * model.memory_bound(1e9));
    }
}
