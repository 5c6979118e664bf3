//! The gradient of every parameter tensor against central finite differences of the whole loss: differences in f64 of the
//! backend's own f32 pass, so within 2%. Kernels are held to f64 references and closer in `crates/tensor/tests`, layers to PyTorch's
//! gradients in `reference.rs`.

mod common;

use std::ops::Range;
use std::rc::Rc;

use common::{Case, run};
use unisono_comm::CommError;
use unisono_model::Recompute;
use unisono_plan::Layout;

/// Length of a step along a direction: short enough that no token changes its experts (the fixtures keep a gap), long
/// enough that the rounding of an f32 pass stays below `TOLERANCE`.
const STEP: f64 = 4e-3;
/// Largest error of a derivative, relative to the length of the tensor's gradient.
const TOLERANCE: f64 = 0.02;

/// Where a tensor lies in its unit's parameters and gradients.
struct Tensor {
    name: String,
    unit: usize,
    dense: bool,
    parameter: Range<usize>,
    gradient: Range<usize>,
}

fn tensors(case: &Case) -> Vec<Tensor> {
    let layout = case.model.layout();
    let dense = (0..layout.units()).flat_map(|unit| {
        layout.unit_tensors(unit).into_iter().map(move |tensor| Tensor {
            name: tensor.name.clone(),
            unit,
            dense: true,
            parameter: tensor.range(),
            gradient: tensor.range(),
        })
    });
    let blocks =
        layout.moe_layers().flat_map(|layer| (0..layout.num_experts()).map(move |expert| (layer, expert)));
    let expert = blocks.flat_map(|(layer, expert)| {
        layout.expert.iter().enumerate().map(move |(which, tensor)| {
            let unit = Layout::layer_unit(layer);
            let gradient = expert * layout.expert_len() + tensor.offset;
            let parameter = layout.unit_len(unit) + gradient;
            Tensor {
                name: layout.expert_tensor_name(layer, expert, which),
                unit,
                dense: false,
                parameter: parameter..parameter + tensor.len(),
                gradient: gradient..gradient + tensor.len(),
            }
        })
    });
    dense.chain(expert).collect()
}

/// A tensor's values, to be moved.
fn values<'a>(case: &'a mut Case, tensor: &Tensor) -> &'a mut [f32] {
    let unit = Rc::get_mut(&mut case.parameters.0[tensor.unit].values).expect("no pass is under way");
    &mut unit[tensor.parameter.clone()]
}

/// The loss with a tensor moved by `step` along `direction`.
fn loss(case: &mut Case, tensor: &Tensor, direction: &[f64], step: f64) -> Result<f64, CommError> {
    let kept = values(case, tensor).to_vec();
    for ((value, kept), along) in values(case, tensor).iter_mut().zip(&kept).zip(direction) {
        *value = (f64::from(*kept) + step * along) as f32;
    }
    let outcome = case.model.evaluate(&case.parameters, &case.batch)?;
    values(case, tensor).copy_from_slice(&kept);
    let (losses, model, scale) = (outcome.losses[0], &case.reference.model, &case.scale);
    let sequences = scale.sequences as f64;
    Ok(losses.cross_entropy / scale.targets as f64
        + f64::from(model.balance_loss_coef) * losses.balance / sequences
        + f64::from(model.z_loss_coef) * losses.z / (sequences * scale.sequence_length as f64))
}

/// The unit vector between the gradient and a pseudo-random one: along it the loss moves, and no component is left out.
fn direction(gradient: &[f64], seed: u64) -> Vec<f64> {
    let mut state = seed;
    let random: Vec<f64> = gradient
        .iter()
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f64 / f64::from(1u32 << 30) - 1.0
        })
        .collect();
    let mixed = unit(gradient).into_iter().zip(unit(&random)).map(|(g, r)| g + r).collect::<Vec<_>>();
    unit(&mixed)
}

fn unit(values: &[f64]) -> Vec<f64> {
    let length = norm(values);
    values.iter().map(|value| value / length).collect()
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

fn check(name: &str) {
    run(name, Recompute::Selective, |mut case| {
        let mut gradients = case.zeros();
        case.model.forward_backward(&case.parameters, &case.batch, &case.scale, &mut gradients)?;
        let mut moved = 0;
        for (index, tensor) in tensors(&case).iter().enumerate() {
            let of_unit = &gradients.0[tensor.unit];
            let buffer = if tensor.dense { &of_unit.dense } else { &of_unit.experts };
            let gradient: Vec<f64> = buffer[tensor.gradient.clone()].iter().map(|g| f64::from(*g)).collect();
            let length = norm(&gradient);
            if length == 0.0 {
                // An expert that no token chose.
                continue;
            }
            let along = direction(&gradient, index as u64 + 1);
            let step = STEP;
            let rise = loss(&mut case, tensor, &along, step)? - loss(&mut case, tensor, &along, -step)?;
            let expected: f64 = gradient.iter().zip(&along).map(|(g, a)| g * a).sum();
            let error = (rise / (2.0 * step) - expected).abs();
            assert!(
                error <= TOLERANCE * length,
                "{name}, {}: the loss rises by {} along a direction, the gradient says {expected}",
                tensor.name,
                rise / (2.0 * step)
            );
            moved += 1;
        }
        assert!(moved >= 10, "only {moved} tensors were moved");
        Ok(())
    });
}

#[test]
fn everything_on() {
    check("full");
}

#[test]
fn softmax_scores_and_tied_embeddings() {
    check("softmax_tied");
}

#[test]
fn dense_layers_only() {
    check("dense");
}

#[test]
fn one_expert_a_token_beside_two_shared_ones() {
    check("top1_shared2");
}

#[test]
fn group_limited_softmax() {
    check("softmax_groups");
}
