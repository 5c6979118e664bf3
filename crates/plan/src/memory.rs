//! What a rank needs of memory, tensor by tensor.

use unisono_mesh::{ExpertPlacement, Fold};

use crate::layout::Layout;
use crate::model::ModelConfig;

/// Which activations are kept; see the engine's option of the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeptActivations {
    /// All.
    All,
    /// Those that cost a product.
    Products,
    /// Each layer's input.
    LayerInputs,
}

/// What a step works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepShape {
    /// Rows of one slot in one accumulation step.
    pub slot_rows: usize,
    /// Which activations are kept.
    pub kept: KeptActivations,
}

/// Memory of one rank at its peak, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Parameters that the rank computes with.
    pub parameters: u64,
    /// Moments of the rank's shard (ZeRO-1).
    pub optimizer: u64,
    /// Gradient accumulators of the slots that run together, and partial sums that wait in the tree.
    pub gradients: u64,
    /// Activations kept for the backward, and the largest set of temporary ones.
    pub activations: u64,
    /// The reduced gradient of the shard, and parameters under way to other ranks.
    pub exchange: u64,
}

impl MemoryEstimate {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.parameters + self.optimizer + self.gradients + self.activations + self.exchange
    }

    /// By name.
    pub fn parts(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("parameters", self.parameters),
            ("optimizer", self.optimizer),
            ("gradients", self.gradients),
            ("activations", self.activations),
            ("exchange", self.exchange),
        ]
    }

    /// The estimate for `rank`, with balanced routing. `owned` elements of optimizer state are its shard; `sent`
    /// elements of updated parameters leave it.
    pub fn new(
        model: &ModelConfig,
        fold: &Fold,
        rank: usize,
        step: StepShape,
        owned: usize,
        sent: usize,
    ) -> Self {
        let layout = Layout::new(model);
        let placement = ExpertPlacement::new(*fold, model.num_experts);
        let held = if model.num_experts == 0 { 0 } else { placement.experts_of(rank).len() };
        let moe_block = layout.moe_layers().len() * layout.expert_len();
        let floats = |elements: usize| elements as u64 * 4;
        Self {
            parameters: floats(layout.dense_len() + held * moe_block),
            optimizer: floats(2 * owned),
            gradients: floats(gradient_elements(model, fold, rank, layout.dense_len(), moe_block)),
            activations: floats(activation_elements(model, fold.wave_slots() * step.slot_rows, step.kept)),
            exchange: floats(owned + sent),
        }
    }
}

/// Accumulators of the widest moment: the running wave's, and what earlier waves left in the tree.
fn gradient_elements(model: &ModelConfig, fold: &Fold, rank: usize, dense: usize, moe_block: usize) -> usize {
    let placement = ExpertPlacement::new(*fold, model.num_experts);
    let waves = fold.waves(rank);
    let instances = |wave: &std::ops::Range<usize>| match model.num_experts {
        0 => 0,
        _ => placement.instances(wave.clone()).len(),
    };
    let mut widest = 0;
    for wave in &waves {
        let before = waves[0].start..wave.start;
        let roots = unisono_mesh::tree::roots(before.clone(), fold.grid().slots()).len();
        let width = fold.grid().expert_group;
        let groups = before.start / width..before.end / width;
        let group_roots = unisono_mesh::tree::roots(groups, fold.grid().groups()).len();
        let copied = if waves.len() > 1 && wave.len() > 1 { dense } else { 0 };
        let experts = (instances(wave) + group_roots * model.num_experts) * moe_block;
        widest = widest.max((wave.len() + roots) * dense + copied + experts);
    }
    widest
}

/// Elements of activations at the peak of one accumulation step over `rows` rows.
fn activation_elements(model: &ModelConfig, rows: usize, kept: KeptActivations) -> usize {
    let layers = 0..model.num_hidden_layers;
    let kept_sum: usize = layers.clone().map(|layer| rows * kept_width(model, layer, kept)).sum();
    let again = match kept {
        KeptActivations::LayerInputs => layers
            .clone()
            .map(|layer| rows * kept_width(model, layer, KeptActivations::All))
            .max()
            .unwrap_or(0),
        _ => 0,
    };
    let temporary = layers.map(|layer| rows * temporary_width(model, layer)).max().unwrap_or(0);
    let head = rows * 4 * model.hidden_size;
    kept_sum + again + temporary.max(head)
}

/// Elements a row that layer `layer` keeps for its backward.
fn kept_width(model: &ModelConfig, layer: usize, kept: KeptActivations) -> usize {
    let (d, qkv) = (model.hidden_size, model.qkv_width());
    if kept == KeptActivations::LayerInputs {
        return d;
    }
    let all = kept == KeptActivations::All;
    let heads = model.num_attention_heads;
    let query_width = heads * model.head_dim;
    let head_norm = if model.qk_norm { qkv + heads + model.num_key_value_heads } else { 0 };
    let placed = if all || !model.qk_norm { qkv } else { 0 };
    let normed = if all { 2 * d } else { 0 };
    let attention = d + 1 + head_norm + placed + query_width + heads;
    let ffn = match model.is_moe(layer) {
        false => 2 * model.intermediate_size,
        true => {
            // Routing tables and row weights are words of the same size as an element.
            let tables = 5 * model.top_k + model.num_experts;
            model.top_k * (d + 2 * model.moe_intermediate_size) + 2 * model.shared_width() + tables
        }
    };
    attention + d + 1 + normed + ffn
}

/// Elements a row of the largest set of temporary tensors in the backward of layer `layer`.
fn temporary_width(model: &ModelConfig, layer: usize) -> usize {
    let (d, qkv) = (model.hidden_size, model.qkv_width());
    let query_width = model.num_attention_heads * model.head_dim;
    let attention = 4 * d + 3 * qkv + query_width;
    let ffn = match model.is_moe(layer) {
        false => 4 * d + model.intermediate_size,
        true => {
            let routed = model.top_k * (3 * d + model.moe_intermediate_size);
            routed + 5 * d + model.shared_width() + model.num_experts
        }
    };
    attention.max(ffn)
}
