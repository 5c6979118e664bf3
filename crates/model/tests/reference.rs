//! Every tensor of forward and backward against the PyTorch reference in `fixtures/`.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use safetensors::SafeTensors;
use unisono_comm::run_ranks;
use unisono_mesh::{Fold, Grid};
use unisono_model::{Batch, Gradients, LossScale, Parameters, Profile, Recompute, Transformer};
use unisono_plan::ModelConfig;
use unisono_tensor::{Backend, Cpu, IGNORE};

/// Largest difference, relative to the largest value of the tensor.
const TOLERANCE: f32 = 2e-5;

struct Reference {
    floats: BTreeMap<String, Vec<f32>>,
    words: BTreeMap<String, Vec<u32>>,
    model: ModelConfig,
    sequence_length: usize,
}

fn load(case: &str) -> Reference {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let json = std::fs::read_to_string(folder.join(format!("{case}.json"))).expect("the case has a config");
    let mut config: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&json).expect("JSON");
    let sequence_length =
        config.remove("sequence_length").expect("a sequence length").as_u64().expect("a number");
    let model: ModelConfig = serde_json::from_value(config.into()).expect("the fields are the model's");
    let bytes = std::fs::read(folder.join(format!("{case}.safetensors"))).expect("the case has tensors");
    let tensors = SafeTensors::deserialize(&bytes).expect("safetensors");
    let (mut floats, mut words) = (BTreeMap::new(), BTreeMap::new());
    for (name, view) in tensors.iter() {
        let values = view.data().as_chunks::<4>().0.iter();
        match view.dtype() {
            safetensors::Dtype::F32 => {
                floats.insert(name.to_string(), values.map(|b| f32::from_le_bytes(*b)).collect());
            }
            safetensors::Dtype::U32 => {
                words.insert(name.to_string(), values.map(|b| u32::from_le_bytes(*b)).collect());
            }
            _ => {}
        }
    }
    Reference { floats, words, model, sequence_length: sequence_length as usize }
}

fn parameters(reference: &Reference, model: &Transformer<Cpu>) -> Parameters<Cpu> {
    let layout = model.layout();
    let backend = model.backend();
    let mut dense = backend.zeros(layout.dense_len());
    for tensor in layout.dense_tensors() {
        dense[tensor.range()].copy_from_slice(&reference.floats[&tensor.name]);
    }
    let mut experts = backend.zeros(layout.expert_blocks() * layout.expert_len());
    let blocks = layout.moe_layers().flat_map(|layer| (0..layout.num_experts()).map(move |e| (layer, e)));
    for (index, (layer, expert)) in blocks.enumerate() {
        for (which, tensor) in layout.expert.iter().enumerate() {
            let start = index * layout.expert_len() + tensor.offset;
            let name = layout.expert_tensor_name(layer, expert, which);
            experts[start..start + tensor.len()].copy_from_slice(&reference.floats[&name]);
        }
    }
    let bias =
        layout.moe_layers().map(|layer| reference.floats[&format!("layers.{layer}.router_bias")].clone());
    let bias = bias.collect();
    Parameters { dense, experts, bias }
}

fn batch(reference: &Reference) -> Batch {
    let rows = reference.words["ids"].len();
    let length = reference.sequence_length;
    Batch {
        slots: 0..1,
        sequences: rows / length,
        sequence_length: length,
        inputs: reference.words["ids"].clone(),
        targets: reference.words["targets"].clone(),
        document_start: reference.words["document_start"].clone(),
        positions: (0..rows).map(|row| (row % length) as u32).collect(),
    }
}

fn compare(name: &str, ours: &[f32], theirs: &[f32]) {
    assert_eq!(ours.len(), theirs.len(), "{name}: lengths");
    let scale = theirs.iter().fold(1e-6f32, |largest, value| largest.max(value.abs()));
    for (index, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() <= TOLERANCE * scale, "{name}[{index}]: {a} and {b} (largest {scale})");
    }
}

fn check(case: &str, recompute: Recompute) {
    let reference = load(case);
    run_ranks(1, |comm| {
        let fold = Fold::new(Grid::default(), 1).expect("one rank");
        let group = comm.subgroup("experts", &[0])?;
        let profile = Profile::new(Instant::now());
        let length = reference.sequence_length;
        let backend = Cpu::new(2);
        let mut model = Transformer::new(
            backend,
            reference.model.clone(),
            fold,
            0,
            group,
            length,
            recompute,
            256,
            profile,
        );
        model.keep_activations();
        let parameters = parameters(&reference, &model);
        let batch = batch(&reference);
        let instances = reference.model.num_experts;
        let mut gradients = Gradients::zeros(model.backend(), model.layout(), 1, instances);
        let targets = batch.targets.iter().filter(|t| **t != IGNORE).count() as u64;
        let scale = LossScale {
            targets,
            sequences: batch.sequences as u64,
            sequence_length: reference.sequence_length,
        };
        let outcome = model.forward_backward(&parameters, &batch, &scale, &mut gradients)?;
        compare_losses(&reference, &scale, &outcome.losses[0]);
        compare_activations(&reference, &model);
        compare_gradients(&reference, &model, &gradients);
        Ok::<_, unisono_comm::CommError>(())
    })
    .expect("the pass runs");
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

fn compare_gradients(reference: &Reference, model: &Transformer<Cpu>, gradients: &Gradients<Cpu>) {
    let layout = model.layout();
    for tensor in layout.dense_tensors() {
        compare(
            &tensor.name,
            &gradients.dense[tensor.range()],
            &reference.floats[&format!("grad.{}", tensor.name)],
        );
    }
    let layers = layout.moe_layers().len();
    for layer in layout.moe_layers() {
        for expert in 0..layout.num_experts() {
            let block = (expert * layers + layer - layout.moe_layers().start) * layout.expert_len();
            for (which, tensor) in layout.expert.iter().enumerate() {
                let range = block + tensor.offset..block + tensor.offset + tensor.len();
                let name = format!("grad.{}", layout.expert_tensor_name(layer, expert, which));
                compare(&name, &gradients.experts[range], &reference.floats[&name]);
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
