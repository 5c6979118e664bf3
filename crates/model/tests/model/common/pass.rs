//! Every tensor of one forward and backward pass, by its name in `fixtures/README.md`.

use std::collections::BTreeMap;

use unisono_comm::CommError;
use unisono_model::{LossScale, SlotLosses, Transformer};
use unisono_plan::Layout;
use unisono_tensor::{Backend, Buffer, Cpu, Dims, HeadGradients, IGNORE, Product};

use super::{Case, Gradients, Reference};

/// Tensors by name; experts and counts as numbers.
pub type Tensors = BTreeMap<String, Vec<f32>>;

/// Runs a case forward and backward.
///
/// # Errors
/// If an exchange fails.
pub fn every_tensor(case: &Case) -> Result<Tensors, CommError> {
    let mut gradients = case.zeros();
    let Case { reference, model, parameters, batch, scale } = case;
    let outcome = model.forward_backward(parameters, batch, scale, &mut gradients)?;
    let mut ours = model.take_activations();
    add_sums(reference, &mut ours);
    add_logits(case, &mut ours);
    add_losses(reference, scale, &outcome.losses[0], &mut ours);
    add_gradients(model, &gradients, &mut ours);
    ours.insert("loss.per_token".into(), losses_of_tokens(case)?);
    Ok(ours)
}

/// Logits and their gradient, which the head holds a tile of tokens at a time. With the logits for rows and the identity
/// for a table, its products are exact: the logits pass it unchanged, and the gradient of its rows is theirs.
fn add_logits(case: &Case, ours: &mut Tensors) {
    let (backend, reference) = (case.model.backend(), &case.reference);
    let (d, vocab) = (reference.model.hidden_size, reference.model.vocab_size);
    let buffer = |values: &[f32]| {
        let mut buffer = backend.alloc(values.len());
        backend.upload(values, buffer.all_mut());
        buffer
    };
    let table = if reference.model.tie_embeddings { "embed" } else { "head" };
    let (x, table) = (buffer(&ours["act.final_norm"]), buffer(&reference.floats[table]));
    let targets = &case.batch.targets;
    let mut logits = backend.alloc(targets.len() * vocab);
    let dims = Dims { m: targets.len(), n: vocab, k: d };
    backend.matmul(Product::TransposedRight, dims, x.all(), table.all(), logits.all_mut(), false);

    let identity: Vec<f32> = (0..vocab * vocab).map(|at| f32::from(at % (vocab + 1) == 0)).collect();
    let mut dlogits = backend.alloc(logits.len());
    let gradients = HeadGradients { scale: case.scale.token(), dx: Some(dlogits.all_mut()), dtable: None };
    backend.head_loss(logits.all(), buffer(&identity).all(), vocab, targets, Some(gradients));
    ours.insert("act.logits".into(), logits.to_vec());
    ours.insert("grad.act.logits".into(), dlogits.to_vec());
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

fn add_losses(reference: &Reference, scale: &LossScale, losses: &SlotLosses, ours: &mut Tensors) {
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
