//! Where a pass finds parameters and leaves gradients, unit by unit, and how parameters start.

use std::rc::Rc;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use unisono_comm::CommError;
use unisono_plan::{Init, Layout, TensorSpec};
use unisono_tensor::Backend;

/// The parameters of one unit. Cloning shares them.
pub struct UnitParameters<B: Backend> {
    /// Its dense tensors (see [`Layout`]), then the blocks of the experts that the rank holds, ascending.
    pub values: Rc<B::Buf>,
    /// Balance bias of an MoE layer, `[num_experts]`, the same on all ranks; empty for other units.
    pub bias: Rc<[f32]>,
}

impl<B: Backend> Clone for UnitParameters<B> {
    fn clone(&self) -> Self {
        Self { values: Rc::clone(&self.values), bias: Rc::clone(&self.bias) }
    }
}

/// Where a pass finds parameters.
pub trait ParameterSource<B: Backend> {
    /// The parameters of `unit`, to be dropped after use. `next` is the unit that will be asked for after it, so that
    /// it can be on its way meanwhile.
    ///
    /// # Errors
    /// If an exchange fails.
    fn unit(&self, unit: usize, next: Option<usize>) -> Result<UnitParameters<B>, CommError>;
}

/// Where a pass leaves gradients.
pub trait GradientSink<B: Backend> {
    /// The accumulators of `unit`, to add to.
    fn unit(&mut self, unit: usize) -> &mut UnitGradients<B>;

    /// Says that the pass has nothing more to add to `unit`.
    ///
    /// # Errors
    /// If an exchange fails.
    fn ready(&mut self, unit: usize) -> Result<(), CommError>;
}

/// Gradient accumulators of one unit for one wave.
pub struct UnitGradients<B: Backend> {
    /// `[slots of the wave, unit_len]`.
    pub dense: B::Buf,
    /// `[expert instances of the wave, expert_len]`; empty unless the unit is an MoE layer.
    pub experts: B::Buf,
    unit_len: usize,
}

impl<B: Backend> UnitGradients<B> {
    /// Zeroed accumulators; `instances` are those of an MoE layer.
    pub fn zeros(backend: &B, layout: &Layout, unit: usize, slots: usize, instances: usize) -> Self {
        let unit_len = layout.unit_len(unit);
        let instances = layout.moe_layer_of(unit).map_or(0, |_| instances);
        Self {
            dense: backend.zeros(slots * unit_len),
            experts: backend.zeros(instances * layout.expert_len()),
            unit_len,
        }
    }

    /// Where the accumulator of the wave's `index`-th slot starts.
    pub fn slot(&self, index: usize) -> usize {
        index * self.unit_len
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

/// The initial dense parameters of a unit, padding zero.
pub fn initialize_unit(layout: &Layout, unit: usize, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0; layout.unit_len(unit)];
    for tensor in layout.unit_tensors(unit) {
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
        let values = initialize_unit(&layout, Layout::EMBED, 7);
        let embed = &values[layout.embed.range()];
        let mean = embed.iter().map(|v| f64::from(*v)).sum::<f64>() / embed.len() as f64;
        let variance = embed.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / embed.len() as f64;
        assert!(mean.abs() < 1e-4, "mean {mean}");
        assert!((variance.sqrt() - 0.02).abs() < 1e-4, "deviation {}", variance.sqrt());
        let head = initialize_unit(&layout, layout.head_unit(), 7);
        assert!(head[layout.final_norm.range()].iter().all(|v| *v == 1.0));
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
