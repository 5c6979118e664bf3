//! The vector functions against f64, and their fixed order of sums.

use unisono_tensor::cpu::simd::{LANES, dot, exp, join, max, sigmoid, silu, sum, vectorized};

/// Distance in units in the last place of the nearest f32.
fn ulps(value: f32, exact: f64) -> f64 {
    let nearest = exact as f32;
    let ulp = f64::from(f32::from_bits(nearest.to_bits() + 1)) - f64::from(nearest);
    (f64::from(value) - exact).abs() / ulp
}

fn every_so_often(from: f32, to: f32) -> impl Iterator<Item = f32> {
    const STEPS: u32 = 400_000;
    (0..=STEPS).map(move |step| from + (to - from) * (step as f32 / STEPS as f32))
}

#[test]
fn exp_is_within_one_and_a_half_ulps() {
    let worst = every_so_often(-87.3, 88.37).map(|x| ulps(exp(x), f64::from(x).exp())).fold(0.0, f64::max);
    assert!(worst < 1.5, "{worst} ulps");
    let near_zero = every_so_often(-1e-3, 1e-3).map(|x| ulps(exp(x), f64::from(x).exp())).fold(0.0, f64::max);
    assert!(near_zero < 1.0, "{near_zero} ulps");
}

#[test]
fn exp_at_the_edges() {
    assert_eq!(exp(0.0), 1.0);
    assert_eq!(exp(-0.0), 1.0);
    assert_eq!(exp(f32::NEG_INFINITY).to_bits(), 0);
    assert_eq!(exp(-1e30).to_bits(), 0);
    assert_eq!((exp(-87.69).to_bits(), exp(-88.0).to_bits()), (0, 0));
    assert!(exp(-87.33) >= f32::MIN_POSITIVE);
    for x in every_so_often(-87.68, -87.3) {
        assert!((f64::from(exp(x)) - f64::from(x).exp()).abs() <= 2.1e-45, "exp({x})");
    }
    assert!(exp(88.37).is_finite() && exp(88.37) > 2.3e38);
    assert_eq!((exp(88.4), exp(88.8), exp(1e30)), (f32::INFINITY, f32::INFINITY, f32::INFINITY));
    assert_eq!(exp(f32::INFINITY), f32::INFINITY);
    assert!(exp(f32::NAN).is_nan() && exp(-f32::NAN).is_nan());
}

#[test]
fn exp_has_the_same_bits_alone_and_in_a_vectorized_loop() {
    let x: Vec<f32> = every_so_often(-110.0, 100.0).collect();
    let mut together = x.clone();
    vectorized(
        #[inline(always)]
        || together.iter_mut().for_each(|value| *value = exp(*value)),
    );
    assert!(x.iter().zip(&together).all(|(x, y)| exp(*x).to_bits() == y.to_bits()));
}

#[test]
fn sigmoid_and_silu_follow_f64() {
    for x in every_so_often(-80.0, 80.0) {
        let exact = 1.0 / (1.0 + (-f64::from(x)).exp());
        assert!(ulps(sigmoid(x), exact) < 3.0, "sigmoid({x})");
        if x.abs() > 1e-6 {
            let (value, exact) = (f64::from(silu(x)), f64::from(x) * exact);
            assert!((value - exact).abs() <= exact.abs() * 4e-7, "silu({x})");
        }
    }
    assert_eq!((sigmoid(-200.0), sigmoid(200.0), silu(0.0)), (0.0, 1.0, 0.0));
}

#[test]
fn sums_go_over_the_same_lanes_whatever_the_length() {
    let value = |i: usize| ((i * 2_654_435_761) % 1000) as f32 * 1e-3 - 0.37;
    for len in (0..100).chain([256, 1000, 4096]) {
        let x: Vec<f32> = (0..len).map(value).collect();
        let y: Vec<f32> = (0..len).map(|i| value(i + 7)).collect();
        let mut lanes = [0.0f32; LANES];
        (0..len).for_each(|i| lanes[i % LANES] += x[i] * y[i]);
        let vector = vectorized(
            #[inline(always)]
            || dot(&x, &y),
        );
        assert_eq!(vector.to_bits(), join(lanes).to_bits(), "{len} elements");
        let exact: f64 = x.iter().map(|x| f64::from(*x)).sum();
        assert!((f64::from(sum(&x, |x| x)) - exact).abs() <= 1e-5 * len as f64);
        assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    }
}
