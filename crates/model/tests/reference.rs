//! Every tensor of forward and backward against the PyTorch reference in `fixtures/`.

mod common;

use std::collections::BTreeMap;

use common::{Case, Gradients, Reference, compare, run};
use unisono_comm::CommError;
use unisono_model::{LossScale, Recompute, Transformer};
use unisono_plan::Layout;
use unisono_tensor::{Cpu, IGNORE};

/// Results of the reference that no part of a pass holds.
const NEVER_HELD: [(&str, &str); 2] = [
    (
        "act.logits",
        "the head keeps those of a tile of tokens; `decoding.rs` compares the decoder's, all of them",
    ),
    ("grad.act.logits", "the head turns a tile's logits into it in place and multiplies it at once"),
];

type Tensors = BTreeMap<String, Vec<f32>>;

fn check(case: &str, recompute: Recompute) {
    run(case, recompute, |case| {
        let mut gradients = case.zeros();
        let Case { reference, model, parameters, batch, scale } = &case;
        let outcome = model.forward_backward(parameters, batch, scale, &mut gradients)?;
        let mut ours = model.take_activations();
        add_sums(reference, &mut ours);
        add_losses(reference, scale, &outcome.losses[0], &mut ours);
        add_gradients(model, &gradients, &mut ours);
        ours.insert("loss.per_token".into(), losses_of_tokens(&case)?);
        compare_all(reference, ours);
        Ok(())
    });
}

/// What is not a parameter or another input.
fn is_result(name: &str) -> bool {
    name.starts_with("grad.") || name.starts_with("loss.") || name.contains("act.")
}

/// Every result of the reference with ours; neither side may have one that the other lacks.
fn compare_all(reference: &Reference, mut ours: Tensors) {
    let words = reference.words.iter().map(|(name, words)| (name, words.iter().map(|w| *w as f32).collect()));
    let floats = reference.floats.iter().map(|(name, values)| (name, values.clone()));
    let results = floats.chain(words).filter(|(name, _): &(&String, Vec<f32>)| is_result(name));
    for (name, theirs) in results {
        match ours.remove(name) {
            Some(ours) => compare(name, &ours, &theirs),
            None => assert!(NEVER_HELD.iter().any(|(never, _)| never == name), "a pass does not give {name}"),
        }
    }
    assert!(ours.is_empty(), "the reference lacks {:?}", ours.keys());
}

/// What is added to something else as it is computed: the difference stands for it. The gradient of a sum is that of each
/// of its terms.
fn add_sums(reference: &Reference, ours: &mut Tensors) {
    let minus = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<f32>>();
    let model = &reference.model;
    for layer in 0..model.num_hidden_layers {
        let at = |what: &str| format!("layers.{layer}.act.{what}");
        if !model.is_moe(layer) {
            continue;
        }
        let ffn = minus(&ours[&at("out")], &ours[&at("attn_residual")]);
        let of_sum = ours[&format!("grad.{}", at("ffn"))].clone();
        let routed = match ours.get(&at("shared")) {
            Some(shared) => minus(&ffn, shared),
            None => ffn.clone(),
        };
        if model.num_shared_experts > 0 {
            ours.insert(format!("grad.{}", at("shared")), of_sum.clone());
        }
        ours.insert(at("ffn"), ffn);
        ours.insert(at("routed"), routed);
        ours.insert(format!("grad.{}", at("routed")), of_sum);
    }
}

fn add_losses(
    reference: &Reference,
    scale: &LossScale,
    losses: &unisono_model::SlotLosses,
    ours: &mut Tensors,
) {
    let model = &reference.model;
    let sequences = scale.sequences as f64;
    let tokens = sequences * scale.sequence_length as f64;
    let terms = [
        ("loss.ce", losses.cross_entropy / scale.targets as f64),
        ("loss.balance", f64::from(model.balance_loss_coef) * losses.balance / sequences),
        ("loss.z", f64::from(model.z_loss_coef) * losses.z / tokens),
    ];
    let total = terms.iter().map(|(_, value)| value).sum();
    for (name, value) in terms.into_iter().chain([("loss.total", total)]) {
        ours.insert(name.into(), vec![value as f32]);
    }
}

/// Evaluates with the target of one token at a time.
fn losses_of_tokens(case: &Case) -> Result<Vec<f32>, CommError> {
    let Case { model, parameters, batch, .. } = case;
    let mut losses = vec![0.0; batch.targets.len()];
    for (row, loss) in losses.iter_mut().enumerate() {
        let mut alone = batch.clone();
        alone.targets.fill(IGNORE);
        alone.targets[row] = batch.targets[row];
        *loss = model.evaluate(parameters, &alone)?.losses[0].cross_entropy as f32;
    }
    Ok(losses)
}

fn add_gradients(model: &Transformer<Cpu>, gradients: &Gradients, ours: &mut Tensors) {
    let layout = model.layout();
    for (unit, gradients) in gradients.0.iter().enumerate() {
        for tensor in layout.unit_tensors(unit) {
            ours.insert(format!("grad.{}", tensor.name), gradients.dense[tensor.range()].to_vec());
        }
    }
    for layer in layout.moe_layers() {
        for expert in 0..layout.num_experts() {
            let block = expert * layout.expert_len();
            for (which, tensor) in layout.expert.iter().enumerate() {
                let range = block + tensor.offset..block + tensor.offset + tensor.len();
                let name = format!("grad.{}", layout.expert_tensor_name(layer, expert, which));
                ours.insert(name, gradients.0[Layout::layer_unit(layer)].experts[range].to_vec());
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
