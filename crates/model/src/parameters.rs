//! A rank's parameters and gradients, and how parameters start.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use unisono_plan::{Init, Layout, TensorSpec};
use unisono_tensor::{Backend, Buffer};

/// The parameters a rank computes with.
pub struct Parameters<B: Backend> {
    /// All dense parameters, by [`Layout`].
    pub dense: B::Buf,
    /// Blocks of the experts that the rank holds, by (MoE layer, expert).
    pub experts: B::Buf,
    /// Balance bias of each MoE layer, `[num_experts]`; the same on all ranks.
    pub bias: Vec<Vec<f32>>,
}

/// Gradient accumulators of one wave.
pub struct Gradients<B: Backend> {
    /// `[slots of the wave, dense_len]`.
    pub dense: B::Buf,
    /// `[expert instances of the wave, MoE layers, expert_len]`.
    pub experts: B::Buf,
}

impl<B: Backend> Gradients<B> {
    /// Zeroed accumulators.
    pub fn zeros(backend: &B, layout: &Layout, slots: usize, instances: usize) -> Self {
        let expert = layout.moe_layers().len() * layout.expert_len();
        Self { dense: backend.zeros(slots * layout.dense_len()), experts: backend.zeros(instances * expert) }
    }

    /// Sets all to zero.
    pub fn clear(&mut self, backend: &B) {
        backend.fill(self.dense.all_mut(), 0.0);
        backend.fill(self.experts.all_mut(), 0.0);
    }
}

/// A generator whose numbers depend on (seed, purpose, logical name) alone: which rank asks makes no difference.
pub(crate) fn generator(seed: u64, purpose: &str, name: &str) -> ChaCha8Rng {
    let mut key = [0u8; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&fnv1a(purpose).to_le_bytes());
    let mut generator = ChaCha8Rng::from_seed(key);
    generator.set_stream(fnv1a(name));
    generator
}

/// The 64-bit FNV-1a hash (Fowler, Noll and Vo).
fn fnv1a(text: &str) -> u64 {
    text.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Normal values by Box and Muller's method, two for every pair of uniform ones.
fn fill_normal(values: &mut [f32], std: f32, generator: &mut ChaCha8Rng) {
    let uniform = |bits: u64| (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64);
    for pair in values.chunks_mut(2) {
        let radius = libm::sqrt(-2.0 * libm::log(1.0 - uniform(generator.next_u64())));
        let (sin, cos) = libm::sincos(std::f64::consts::TAU * uniform(generator.next_u64()));
        for (value, direction) in pair.iter_mut().zip([cos, sin]) {
            *value = (radius * direction) as f32 * std;
        }
    }
}

fn initialize(tensor: &TensorSpec, name: &str, seed: u64, values: &mut [f32]) {
    match tensor.init {
        Init::Ones => values.fill(1.0),
        Init::Normal(std) => fill_normal(values, std, &mut generator(seed, "initialize", name)),
    }
}

/// The initial dense parameters, padding zero.
pub fn initialize_dense(layout: &Layout, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0; layout.dense_len()];
    for tensor in layout.dense_tensors() {
        initialize(tensor, &tensor.name, seed, &mut values[tensor.range()]);
    }
    values
}

/// The initial block of one expert of layer `layer`, padding zero.
pub fn initialize_expert(layout: &Layout, layer: usize, expert: usize, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0; layout.expert_len()];
    for (which, tensor) in layout.expert.iter().enumerate() {
        let name = layout.expert_tensor_name(layer, expert, which);
        initialize(tensor, &name, seed, &mut values[tensor.range()]);
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use unisono_plan::ModelConfig;

    #[test]
    fn initial_values_have_the_stated_mean_and_deviation() {
        let layout = Layout::new(&ModelConfig::default());
        let values = initialize_dense(&layout, 7);
        let embed = &values[layout.embed.range()];
        let mean = embed.iter().map(|v| f64::from(*v)).sum::<f64>() / embed.len() as f64;
        let variance = embed.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / embed.len() as f64;
        assert!(mean.abs() < 1e-4, "mean {mean}");
        assert!((variance.sqrt() - 0.02).abs() < 1e-4, "deviation {}", variance.sqrt());
        assert!(values[layout.final_norm.range()].iter().all(|v| *v == 1.0));
    }

    #[test]
    fn experts_and_seeds_start_differently() {
        let layout = Layout::new(&ModelConfig::default());
        let first = initialize_expert(&layout, 1, 0, 7);
        assert_ne!(first, initialize_expert(&layout, 1, 1, 7));
        assert_ne!(first, initialize_expert(&layout, 1, 0, 8));
        assert_eq!(first, initialize_expert(&layout, 1, 0, 7));
    }
}
