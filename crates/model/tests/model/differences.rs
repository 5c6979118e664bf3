//! Every layer's gradients, of each parameter and of each activation that its backward passes on, its input among them:
//! central finite differences of the loss of a forward pass in f64, which is first held to the engine's own forward.

use crate::common::exact::{Exact, forward};
use crate::common::pass::every_tensor;
use crate::common::support::{Rng, dot, gradient, widen};
use crate::common::{Reference, compare, every_fixture, run};
use unisono_model::Recompute;

/// Largest error of a derivative, relative to the largest element (for elements) or the length (for directions) of the
/// tensor's gradient. What differences in f64 are off by themselves is far below.
const TOLERANCE: f64 = 1e-5;
/// Elements of every tensor that are moved one by one, beside the one with the largest gradient.
const ELEMENTS: usize = 12;
/// Directions that every tensor is moved along, all its elements at a time.
const DIRECTIONS: usize = 2;

/// The slope of the loss as `name` moves along `direction`. The step must not change an expert: a choice has no slope.
fn slope(reference: &Reference, still: &Exact, name: &str, direction: &[f64]) -> f64 {
    let loss = |step: &[f64]| {
        let by: Vec<f64> = direction.iter().map(|along| step[0] * along).collect();
        let tensors = forward(reference, Some((name, &by)));
        for (experts, chosen) in still.iter().filter(|(name, _)| name.ends_with("act.experts")) {
            assert_eq!(&tensors[experts], chosen, "{name}: the step changes {experts}");
        }
        tensors["loss.total"][0]
    };
    gradient(&[0.0], loss)[0]
}

fn length(values: &[f64]) -> f64 {
    dot(values, values).sqrt()
}

fn unit(values: &[f64]) -> Vec<f64> {
    let length = length(values).max(f64::MIN_POSITIVE);
    values.iter().map(|value| value / length).collect()
}

/// The unit vector between the gradient and a random one: along it the loss moves, and no element is left out.
fn direction(gradient: &[f64], rng: &mut Rng) -> Vec<f64> {
    let random = unit(&widen(&rng.values(gradient.len())));
    unit(&unit(gradient).iter().zip(&random).map(|(g, r)| g + r).collect::<Vec<_>>())
}

fn check_gradient(reference: &Reference, still: &Exact, name: &str, ours: &[f64], rng: &mut Rng) {
    let check = |what: &str, along: &[f64], scale: f64| {
        let (want, got) = (slope(reference, still, name, along), dot(ours, along));
        let error = (want - got).abs();
        assert!(
            error <= TOLERANCE * scale.max(1e-6),
            "{name}, {what}: the loss rises by {want}, the gradient says {got} (scale {scale})"
        );
    };
    let largest = (0..ours.len()).max_by(|a, b| ours[*a].abs().total_cmp(&ours[*b].abs()));
    let largest = largest.expect("no tensor is empty");
    for element in [largest].into_iter().chain((0..ELEMENTS).map(|_| rng.below(ours.len()))) {
        let mut along = vec![0.0; ours.len()];
        along[element] = 1.0;
        check(&format!("element {element}"), &along, ours[largest].abs());
    }
    for _ in 0..DIRECTIONS {
        check("a direction", &direction(ours, rng), length(ours));
    }
}

fn check(case: &str) {
    run(case, Recompute::Selective, |case| {
        let ours = every_tensor(&case)?;
        let still = forward(&case.reference, None);
        let (gradients, results): (Vec<_>, Vec<_>) =
            ours.iter().partition(|(name, _)| name.starts_with("grad."));
        assert!(results.iter().map(|(name, _)| *name).eq(still.keys()), "both have the same tensors");
        for (name, ours) in results {
            let exact: Vec<f32> = still[name].iter().map(|value| *value as f32).collect();
            compare(name, ours, &exact);
        }
        let mut rng = Rng::new(1);
        for (name, ours) in gradients {
            let name = name.trim_start_matches("grad.");
            check_gradient(&case.reference, &still, name, &widen(ours), &mut rng);
        }
        Ok(())
    });
}

every_fixture!(check);
