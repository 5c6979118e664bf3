//! Every tensor of forward and backward against the PyTorch reference in `fixtures/`.

mod common;

use common::{Case, Gradients, Reference, run};
use unisono_model::{LossScale, Recompute, Transformer};
use unisono_plan::Layout;
use unisono_tensor::Cpu;

/// Largest difference, relative to the largest value of the tensor.
const TOLERANCE: f32 = 2e-5;

fn compare(name: &str, ours: &[f32], theirs: &[f32]) {
    assert_eq!(ours.len(), theirs.len(), "{name}: lengths");
    let scale = theirs.iter().fold(1e-6f32, |largest, value| largest.max(value.abs()));
    for (index, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() <= TOLERANCE * scale, "{name}[{index}]: {a} and {b} (largest {scale})");
    }
}

fn check(case: &str, recompute: Recompute) {
    run(case, recompute, |case| {
        let mut gradients = case.zeros();
        let Case { reference, model, parameters, batch, scale } = &case;
        let outcome = model.forward_backward(parameters, batch, scale, &mut gradients)?;
        compare_losses(reference, scale, &outcome.losses[0]);
        compare_activations(reference, model);
        compare_gradients(reference, model, &gradients);
        Ok(())
    });
}

fn compare_losses(reference: &Reference, scale: &LossScale, losses: &unisono_model::SlotLosses) {
    let model = &reference.model;
    let sequences = scale.sequences as f64;
    let tokens = sequences * scale.sequence_length as f64;
    let ours = [
        ("loss.ce", losses.cross_entropy / scale.targets as f64),
        ("loss.balance", f64::from(model.balance_loss_coef) * losses.balance / sequences),
        ("loss.z", f64::from(model.z_loss_coef) * losses.z / tokens),
    ];
    for (name, value) in ours {
        if let Some(theirs) = reference.floats.get(name) {
            compare(name, &[value as f32], theirs);
        }
    }
}

fn compare_activations(reference: &Reference, model: &Transformer<Cpu>) {
    let kept = model.take_activations();
    let mut compared = 0;
    for (name, ours) in &kept {
        let theirs = reference.floats.get(name).unwrap_or_else(|| panic!("the reference lacks {name}"));
        compare(name, ours, theirs);
        compared += 1;
    }
    assert!(compared >= 16 * reference.model.num_hidden_layers, "only {compared} activations were compared");
}

fn compare_gradients(reference: &Reference, model: &Transformer<Cpu>, gradients: &Gradients) {
    let layout = model.layout();
    for (unit, gradients) in gradients.0.iter().enumerate() {
        for tensor in layout.unit_tensors(unit) {
            let theirs = &reference.floats[&format!("grad.{}", tensor.name)];
            compare(&tensor.name, &gradients.dense[tensor.range()], theirs);
        }
    }
    for layer in layout.moe_layers() {
        for expert in 0..layout.num_experts() {
            let block = expert * layout.expert_len();
            for (which, tensor) in layout.expert.iter().enumerate() {
                let range = block + tensor.offset..block + tensor.offset + tensor.len();
                let name = format!("grad.{}", layout.expert_tensor_name(layer, expert, which));
                let ours = &gradients.0[Layout::layer_unit(layer)].experts[range];
                compare(&name, ours, &reference.floats[&name]);
            }
        }
    }
}

#[test]
fn everything_on() {
    for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
        check("full", recompute);
    }
}

#[test]
fn softmax_scores_and_tied_embeddings() {
    check("softmax_tied", Recompute::Selective);
}

#[test]
fn dense_layers_only() {
    check("dense", Recompute::Selective);
}

#[test]
fn one_expert_a_token_beside_two_shared_ones() {
    check("top1_shared2", Recompute::Selective);
}

#[test]
fn group_limited_softmax() {
    check("softmax_groups", Recompute::None);
}
