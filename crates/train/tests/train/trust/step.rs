//! What a step computes, next to what it says it does: comparing runs with each other would not show that all of them are wrong.

use std::path::Path;

use unisono_checkpoint::Reader;
use unisono_train::run_folder::CHECKPOINTS;

use super::known_failures::{distance, gradients};
use crate::common::{config, run};

fn floats(run: &Path, step: u64, name: &str) -> Vec<f32> {
    let reader = Reader::open(&run.join(CHECKPOINTS), step).expect("a checkpoint");
    let tensor = reader.tensors().iter().find(|tensor| tensor.name == name).expect("a tensor of this name");
    let bytes = reader.read(name, 0..tensor.len()).expect("a whole tensor");
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// The same sequences in one pass or in several: their gradients are those of one mean.
#[test]
fn accumulated_gradients_are_those_of_the_whole_batch() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let of = |accumulate: usize, micro_batch: usize| {
        let mut config = config();
        (config.train.accumulate, config.train.micro_batch) = (accumulate, micro_batch);
        config.train.clip_norm = 0.0;
        config.train.steps = 1;
        config.checkpoint.every = 1;
        let path = folder.path().join(format!("{accumulate} x {micro_batch}"));
        let ran = run(&config, &path, 2);
        (ran.steps[0].loss, gradients(&path))
    };
    let (loss, whole) = of(1, 4);
    assert!(whole.iter().any(|(_, gradient)| gradient.iter().any(|value| *value != 0.0)));
    for (accumulate, micro_batch) in [(2, 2), (4, 1)] {
        let (other_loss, parts) = of(accumulate, micro_batch);
        assert!((other_loss / loss - 1.0).abs() < 1e-5, "{other_loss} and {loss}");
        for ((name, a), (other_name, b)) in whole.iter().zip(&parts) {
            assert_eq!(name, other_name);
            let off = distance(a, b);
            assert!(off < 1e-4, "{name} of {accumulate} turns is off by {off}");
        }
    }
}

/// Experts with fewer rows than the mean over all slots become more likely by one rate a step, those with more less likely.
#[test]
fn balance_bias_moves_against_the_load_of_all_slots() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for ranks in [1, 4] {
        let mut config = config();
        config.train.steps = 3;
        config.checkpoint.every = 3;
        let path = folder.path().join(ranks.to_string());
        let ran = run(&config, &path, ranks);
        let rate = config.model.bias_update_rate;
        let mut moved = 0;
        for (nth, layer) in (config.model.first_dense..config.model.num_hidden_layers).enumerate() {
            let mut expected = vec![0f32; config.model.num_experts];
            for step in &ran.steps {
                let load = &step.expert_load[nth];
                let mean = load.iter().sum::<u64>() as f64 / load.len() as f64;
                for (bias, &rows) in expected.iter_mut().zip(load) {
                    let behind = mean - rows as f64;
                    if behind != 0.0 {
                        *bias += rate * behind.signum() as f32;
                        moved += 1;
                    }
                }
            }
            assert_eq!(floats(&path, 3, &format!("layers.{layer}.router_bias")), expected, "{ranks} ranks");
        }
        assert!(moved > 0, "the load was even in every step");
    }
}
