use unisono_tensor::{Backend, Cpu, RouterShape, Routing};

use crate::formulas::{balance_z_entropy, choose, scores, weights};
use crate::support::*;

const BASIC: RouterShape = RouterShape {
    experts: 8,
    top_k: 2,
    sigmoid: true,
    normalize: true,
    scaling: 2.5,
    groups: 1,
    top_groups: 1,
    force_balance: false,
    sequence: 12,
};

/// Shapes that cover every switch.
fn shapes() -> Vec<RouterShape> {
    vec![
        BASIC,
        RouterShape { sigmoid: false, scaling: 1.0, ..BASIC },
        RouterShape { normalize: false, sequence: 70, ..BASIC },
        RouterShape { sigmoid: false, normalize: false, sequence: 1, ..BASIC },
        RouterShape { experts: 1, top_k: 1, ..BASIC },
        RouterShape { experts: 5, top_k: 5, sigmoid: false, ..BASIC },
        RouterShape { experts: 24, top_k: 4, groups: 6, top_groups: 3, sequence: 130, ..BASIC },
        RouterShape { experts: 12, top_k: 3, groups: 12, top_groups: 4, sigmoid: false, ..BASIC },
        RouterShape { experts: 7, top_k: 3, force_balance: true, ..BASIC },
        RouterShape { experts: 64, top_k: 8, sequence: 33, ..BASIC },
    ]
}

struct Case {
    shape: RouterShape,
    logits: Vec<f32>,
    bias: Vec<f32>,
    dweights: Vec<f32>,
}

fn case(shape: RouterShape, sequences: usize) -> Case {
    let mut rng = Rng::new((shape.experts * 31 + shape.top_k) as u64);
    let rows = sequences * shape.sequence;
    let logits = rng.values(rows * shape.experts).iter().map(|v| 3.0 * v).collect();
    let bias = rng.values(shape.experts).iter().map(|v| 0.2 * v).collect();
    Case { shape, logits, bias, dweights: rng.values(rows * shape.top_k) }
}

/// Everything that the backward is the gradient of, with the choices held fixed.
fn objective(case: &Case, routing: &Routing, logits: &[f64], balance: f64, z: f64) -> f64 {
    let (shape, mut total) = (case.shape, 0.0);
    for (row, logits) in logits.chunks_exact(shape.experts).enumerate() {
        let choices = row * shape.top_k..(row + 1) * shape.top_k;
        let w = weights(shape, &scores(shape, logits), &routing.experts[choices.clone()]);
        total += dot(&w, &widen(&case.dweights[choices]));
    }
    let sequences = logits.chunks_exact(shape.experts * shape.sequence);
    for (logits, counts) in sequences.zip(routing.counts.chunks_exact(shape.experts)) {
        let [balance_loss, z_loss, _] = balance_z_entropy(shape, logits, counts);
        total += balance * balance_loss + z * z_loss;
    }
    total
}

#[test]
fn the_router_is_the_reference() {
    for shape in shapes() {
        let case = case(shape, 3);
        let routing = on_any_threads(|cpu| cpu.router(shape, &case.logits, &case.bias));
        let mut counts = vec![0u32; 3 * shape.experts];
        let mut want_weights = Vec::new();
        for (row, logits) in widen(&case.logits).chunks_exact(shape.experts).enumerate() {
            let s = scores(shape, logits);
            let key: Vec<f64> = s.iter().zip(&case.bias).map(|(s, b)| s + f64::from(*b)).collect();
            let want = choose(shape, &key, row % shape.sequence);
            let got = &routing.experts[row * shape.top_k..(row + 1) * shape.top_k];
            assert_eq!(got.iter().map(|&e| e as usize).collect::<Vec<_>>(), want, "{shape:?} row {row}");
            want_weights.extend(weights(shape, &s, got));
            got.iter().for_each(|&e| counts[row / shape.sequence * shape.experts + e as usize] += 1);
        }
        assert_eq!(routing.counts, counts);
        assert_close("weights", &routing.weights, &want_weights, 1e-6);
        let sequences = case.logits.chunks_exact(shape.sequence * shape.experts);
        for (i, logits) in sequences.enumerate() {
            let counts = &counts[i * shape.experts..(i + 1) * shape.experts];
            let want = balance_z_entropy(shape, &widen(logits), counts);
            let got = [routing.balance_loss[i], routing.z_loss[i], routing.entropy[i]];
            for (got, want) in got.iter().zip(want) {
                assert!((got - want).abs() <= 2e-6 * want.abs().max(1.0), "{shape:?}: {got} {want}");
            }
        }
    }
}

#[test]
fn the_backward_is_the_slope_of_weights_balance_and_z_loss() {
    for shape in shapes() {
        let case = case(shape, 2);
        let routing = Cpu::new(1).router(shape, &case.logits, &case.bias);
        for (balance, z) in [(0.0, 0.0), (3.0, 0.0), (0.0, 0.05), (0.5, 0.01)] {
            let dlogits = on_any_threads(|cpu| {
                let mut dlogits = poison(case.logits.len());
                cpu.router_backward(shape, &case.logits, &routing, &case.dweights, balance, z, &mut dlogits);
                dlogits.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            });
            let dlogits: Vec<f32> = dlogits.into_iter().map(f32::from_bits).collect();
            let logits = widen(&case.logits);
            let sampled: Vec<usize> = (0..60).map(|i| i * 7919 % logits.len()).collect();
            let want = differences(&logits, &sampled, |logits| {
                objective(&case, &routing, logits, f64::from(balance), f64::from(z))
            });
            let got: Vec<f32> = sampled.iter().map(|&i| dlogits[i]).collect();
            assert_close(&format!("{shape:?} {balance} {z}"), &got, &want, 2e-5);
        }
    }
}

#[test]
fn a_sequence_is_routed_alike_beside_others() {
    for shape in shapes() {
        let case = case(shape, 3);
        let cpu = Cpu::new(2);
        let whole = cpu.router(shape, &case.logits, &case.bias);
        let mut dwhole = poison(case.logits.len());
        cpu.router_backward(shape, &case.logits, &whole, &case.dweights, 0.3, 0.1, &mut dwhole);
        let (elements, pairs) = (shape.sequence * shape.experts, shape.sequence * shape.top_k);
        let alone = cpu.router(shape, &case.logits[elements..2 * elements], &case.bias);
        assert_eq!(alone.experts, whole.experts[pairs..2 * pairs]);
        assert_eq!(bits(&alone.weights), bits(&whole.weights[pairs..2 * pairs]));
        assert_eq!(alone.counts, whole.counts[shape.experts..2 * shape.experts]);
        let sums = |r: &Routing, i: usize| [r.balance_loss[i], r.z_loss[i], r.entropy[i]].map(f64::to_bits);
        assert_eq!(sums(&alone, 0), sums(&whole, 1));
        let mut dalone = poison(elements);
        let logits = &case.logits[elements..2 * elements];
        cpu.router_backward(shape, logits, &alone, &case.dweights[pairs..2 * pairs], 0.3, 0.1, &mut dalone);
        assert_eq!(bits(&dalone), bits(&dwhole[elements..2 * elements]));
    }
}

#[test]
fn ties_go_to_the_lower_index() {
    let shape = RouterShape { experts: 8, top_k: 3, groups: 4, top_groups: 2, sequence: 1, ..BASIC };
    let routing = Cpu::new(1).router(shape, &[0.5; 8], &[0.0; 8]);
    assert_eq!(routing.experts, [0, 1, 2]);
    let routing = Cpu::new(1).router(RouterShape { groups: 1, top_groups: 1, ..shape }, &[0.5; 8], &[0.0; 8]);
    assert_eq!(routing.experts, [0, 1, 2]);
    let mut bias = [0.0; 8];
    (bias[5], bias[7]) = (0.25, 0.25);
    let routing = Cpu::new(1).router(shape, &[0.5; 8], &bias);
    assert_eq!(routing.experts, [4, 5, 7], "groups 2 and 3, then the lower of 4 and 6");
}

#[test]
fn bias_steers_the_choice_and_never_the_weights() {
    let shape = RouterShape { experts: 4, top_k: 2, normalize: false, scaling: 1.0, sequence: 1, ..BASIC };
    let logits = [2.0f32, 1.0, 0.0, -1.0];
    let routing = Cpu::new(1).router(shape, &logits, &[0.0, -1.0, 0.0, 1.0]);
    assert_eq!(routing.experts, [0, 3]);
    let want: Vec<f64> = [2.0f64, -1.0].iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect();
    assert_close("weights", &routing.weights, &want, 1e-6);
}

#[test]
fn logits_that_are_not_finite_choose_experts_that_exist() {
    for shape in shapes() {
        let mut case = case(shape, 1);
        for (i, logit) in case.logits.iter_mut().enumerate() {
            match i % 4 {
                0 => *logit = f32::NAN,
                1 => *logit = f32::INFINITY,
                2 => *logit = f32::NEG_INFINITY,
                _ => {}
            }
        }
        let cpu = Cpu::new(2);
        let routing = cpu.router(shape, &case.logits, &case.bias);
        for row in routing.experts.chunks_exact(shape.top_k) {
            assert!(row.windows(2).all(|pair| pair[0] < pair[1]), "{row:?}");
            assert!(row.iter().all(|&e| (e as usize) < shape.experts));
        }
        let mut dlogits = poison(case.logits.len());
        cpu.router_backward(shape, &case.logits, &routing, &case.dweights, 0.1, 0.1, &mut dlogits);
        assert!(routing.z_loss[0].is_nan(), "what is not finite stays visible");
    }
}

#[test]
fn extreme_logits_stay_finite() {
    let shape = RouterShape { experts: 4, top_k: 2, sequence: 1, ..BASIC };
    for sigmoid in [true, false] {
        let shape = RouterShape { sigmoid, ..shape };
        for logits in [[-200.0f32; 4], [200.0; 4], [-200.0, 200.0, -90.0, 90.0]] {
            let cpu = Cpu::new(1);
            let routing = cpu.router(shape, &logits, &[0.0; 4]);
            assert!(routing.weights.iter().all(|w| w.is_finite()), "{logits:?}: {routing:?}");
            assert!(routing.entropy[0].is_finite() && routing.balance_loss[0].is_finite(), "{routing:?}");
            let mut dlogits = poison(4);
            cpu.router_backward(shape, &logits, &routing, &[1.0, -1.0], 0.1, 0.1, &mut dlogits);
            assert!(dlogits.iter().all(|d| d.is_finite()), "{logits:?}: {dlogits:?}");
        }
    }
}
