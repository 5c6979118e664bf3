//! The cases of `fixtures/`, ready to be run.

pub mod exact;
#[path = "../../../../tensor/tests/tensor/formulas.rs"]
#[allow(dead_code, reason = "the tests of kernels use the rest")]
pub mod formulas;
pub mod pass;
#[path = "../../../../tensor/tests/tensor/support.rs"]
#[allow(dead_code, reason = "the tests of kernels use the rest")]
pub mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

use safetensors::SafeTensors;
use unisono_comm::{CommError, run_ranks};
use unisono_mesh::{Fold, Grid};
use unisono_model::{
    Batch, GradientSink, LossScale, ParameterSource, Profile, Recompute, Transformer, UnitGradients,
    UnitParameters,
};
use unisono_plan::ModelConfig;
use unisono_plan::dispatch::DispatchShape;
use unisono_tensor::{Backend, Cpu, IGNORE};

/// A test of every fixture: `$check` gets its name.
macro_rules! every_fixture {
    ($check:ident) => {
        #[test]
        fn everything_on() {
            $check("full");
        }

        #[test]
        fn softmax_scores_and_tied_embeddings() {
            $check("softmax_tied");
        }

        #[test]
        fn dense_layers_only() {
            $check("dense");
        }

        #[test]
        fn one_expert_a_token_beside_two_shared_ones() {
            $check("top1_shared2");
        }

        #[test]
        fn group_limited_softmax() {
            $check("softmax_groups");
        }
    };
}
pub(crate) use every_fixture;

/// Largest difference from the reference, relative to the largest value of the tensor.
const TOLERANCE: f32 = 2e-5;

/// Holds a tensor to its reference.
pub fn compare(name: &str, ours: &[f32], theirs: &[f32]) {
    assert_eq!(ours.len(), theirs.len(), "{name}: lengths");
    let scale = theirs.iter().fold(1e-6f32, |largest, value| largest.max(value.abs()));
    for (index, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() <= TOLERANCE * scale, "{name}[{index}]: {a} and {b} (largest {scale})");
    }
}

/// A case: its tensors and its model.
pub struct Reference {
    pub floats: BTreeMap<String, Vec<f32>>,
    pub words: BTreeMap<String, Vec<u32>>,
    pub model: ModelConfig,
    pub sequence_length: usize,
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The F32 and the U32 tensors of a file.
pub fn load_tensors(name: &str) -> (BTreeMap<String, Vec<f32>>, BTreeMap<String, Vec<u32>>) {
    let bytes = std::fs::read(fixture(&format!("{name}.safetensors"))).expect("the file is there");
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
    (floats, words)
}

pub fn load(case: &str) -> Reference {
    let json = std::fs::read_to_string(fixture(&format!("{case}.json"))).expect("the case has a config");
    let mut config: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&json).expect("JSON");
    let sequence_length =
        config.remove("sequence_length").expect("a sequence length").as_u64().expect("a number");
    let model: ModelConfig = serde_json::from_value(config.into()).expect("the fields are the model's");
    let (floats, words) = load_tensors(case);
    Reference { floats, words, model, sequence_length: sequence_length as usize }
}

/// All units, whole.
pub struct Parameters(pub Vec<UnitParameters<Cpu>>);

impl ParameterSource<Cpu> for Parameters {
    fn unit(&self, unit: usize, _next: Option<usize>) -> Result<UnitParameters<Cpu>, CommError> {
        Ok(self.0[unit].clone())
    }
}

/// Gradients of all units.
pub struct Gradients(pub Vec<UnitGradients<Cpu>>);

impl GradientSink<Cpu> for Gradients {
    fn unit(&mut self, unit: usize) -> &mut UnitGradients<Cpu> {
        &mut self.0[unit]
    }

    fn ready(&mut self, _unit: usize) -> Result<(), CommError> {
        Ok(())
    }
}

fn unit_parameters(reference: &Reference, model: &Transformer<Cpu>, unit: usize) -> UnitParameters<Cpu> {
    let layout = model.layout();
    let moe = layout.moe_layer_of(unit).is_some();
    let experts = if moe { layout.num_experts() } else { 0 };
    let dense = layout.unit_len(unit);
    let mut values = model.backend().zeros(dense + experts * layout.expert_len());
    for tensor in layout.unit_tensors(unit) {
        values[tensor.range()].copy_from_slice(&reference.floats[&tensor.name]);
    }
    for expert in 0..experts {
        for (which, tensor) in layout.expert.iter().enumerate() {
            let start = dense + expert * layout.expert_len() + tensor.offset;
            let name = layout.expert_tensor_name(unit - 1, expert, which);
            values[start..start + tensor.len()].copy_from_slice(&reference.floats[&name]);
        }
    }
    let bias =
        if moe { reference.floats[&format!("layers.{}.router_bias", unit - 1)].as_slice() } else { &[] };
    UnitParameters { values: Rc::new(values), bias: bias.into() }
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

/// A case on one rank.
pub struct Case {
    pub reference: Reference,
    pub model: Transformer<Cpu>,
    pub parameters: Parameters,
    pub batch: Batch,
    pub scale: LossScale,
}

impl Case {
    pub fn zeros(&self) -> Gradients {
        let (backend, layout) = (self.model.backend(), self.model.layout());
        let experts = self.reference.model.num_experts;
        let unit = |unit| UnitGradients::zeros(backend, layout, unit, 1, experts);
        Gradients((0..layout.units()).map(unit).collect())
    }
}

/// Runs `body` on a case.
pub fn run(case: &str, recompute: Recompute, body: impl Fn(Case) -> Result<(), CommError> + Sync) {
    run_ranks(1, |comm| {
        let reference = load(case);
        let fold = Fold::new(Grid::default(), 1).expect("one rank");
        let group = comm.subgroup("experts", &[0])?;
        let (profile, length) = (Profile::new(Instant::now()), reference.sequence_length);
        let (backend, config) = (Cpu::new(2), reference.model.clone());
        let shape = DispatchShape::default();
        let mut model =
            Transformer::new(backend, config, fold, 0, group, length, recompute, shape, true, profile);
        model.keep_activations();
        let units = (0..model.layout().units()).map(|unit| unit_parameters(&reference, &model, unit));
        let (parameters, batch) = (Parameters(units.collect()), batch(&reference));
        let targets = batch.targets.iter().filter(|t| **t != IGNORE).count() as u64;
        let scale = LossScale { targets, sequences: batch.sequences as u64, sequence_length: length };
        body(Case { reference, model, parameters, batch, scale })
    })
    .expect("the pass runs");
}
