//! Where every parameter lies.
//!
//! What is used together is a *unit*: the embedding, each layer, the head with its norm. A unit is one flat buffer: its
//! dense tensors (those that every rank computes with), then the blocks of the routed experts that the rank holds. Each
//! tensor is padded with zeros to whole chunks of [`NORM_CHUNK`] elements, so that shards and the gradient norm count in
//! chunks.

use std::ops::Range;

use crate::model::ModelConfig;

/// Elements of a chunk of the gradient norm and of optimizer shards.
pub const NORM_CHUNK: usize = 4096;

/// How a tensor starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// All ones.
    Ones,
    /// Normal with this standard deviation.
    Normal(f32),
}

/// One tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// Its name, such as `layers.3.wqkv`.
    pub name: String,
    /// Rows and columns (a vector has one row).
    pub shape: [usize; 2],
    /// First element in its unit, or in its expert's block.
    pub offset: usize,
    /// Elements with padding.
    pub padded: usize,
    /// Whether weight decay applies.
    pub decay: bool,
    /// How it starts.
    pub init: Init,
}

impl TensorSpec {
    /// Elements without padding.
    pub fn len(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its elements in its unit or block, without padding.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }
}

/// The dense tensors of one layer; absent ones are `None`.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerTensors {
    /// Norm before attention, `[d]`.
    pub attn_norm: TensorSpec,
    /// Queries, keys, values, `[d, qkv_width]`.
    pub wqkv: TensorSpec,
    /// Norms of query and key heads, `[head_dim]` each.
    pub qk_norm: Option<[TensorSpec; 2]>,
    /// Attention output, `[heads * head_dim, d]`.
    pub wo: TensorSpec,
    /// Norm before the feed-forward network, `[d]`.
    pub ffn_norm: TensorSpec,
    /// Dense feed-forward network, or the shared experts of an MoE layer: `w13` `[d, 2 ffn]` and `w2` `[ffn, d]`.
    pub ffn: Option<[TensorSpec; 2]>,
    /// Router, `[d, num_experts]`.
    pub router: Option<TensorSpec>,
}

/// The layout of a model's parameters.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// Token embedding, `[vocab, d]`; unit [`Layout::EMBED`].
    pub embed: TensorSpec,
    /// The layers' dense tensors; units [`Layout::layer_unit`].
    pub layers: Vec<LayerTensors>,
    /// Norm before the head, `[d]`; unit [`Layout::head_unit`].
    pub final_norm: TensorSpec,
    /// Output head `[vocab, d]`, unit [`Layout::table_unit`]: the embedding if tied.
    pub head: TensorSpec,
    /// `w13` `[d, 2 ffn]` and `w2` `[ffn, d]` of an expert, offsets within its block; the names lack the layer and expert.
    pub expert: [TensorSpec; 2],
    /// Dense elements of each unit.
    units: Vec<usize>,
    tied: bool,
    moe_layers: Range<usize>,
    num_experts: usize,
}

struct Builder {
    next: usize,
}

impl Builder {
    fn tensor(&mut self, name: String, shape: [usize; 2], decay: bool, init: Init) -> TensorSpec {
        let padded = (shape[0] * shape[1]).next_multiple_of(NORM_CHUNK);
        let offset = self.next;
        self.next += padded;
        TensorSpec { name, shape, offset, padded, decay, init }
    }

    fn norm(&mut self, name: String, width: usize) -> TensorSpec {
        self.tensor(name, [1, width], false, Init::Ones)
    }

    fn ffn(&mut self, prefix: &str, d: usize, width: usize, std: f32, out_std: f32) -> [TensorSpec; 2] {
        [
            self.tensor(format!("{prefix}w13"), [d, 2 * width], true, Init::Normal(std)),
            self.tensor(format!("{prefix}w2"), [width, d], true, Init::Normal(out_std)),
        ]
    }

    fn layer(&mut self, model: &ModelConfig, layer: usize) -> LayerTensors {
        let d = model.hidden_size;
        let std = model.initializer_range;
        let out_std = residual_std(model);
        let name = |what: &str| format!("layers.{layer}.{what}");
        let attn_norm = self.norm(name("attn_norm"), d);
        let wqkv = self.tensor(name("wqkv"), [d, model.qkv_width()], true, Init::Normal(std));
        let qk_norm = model
            .qk_norm
            .then(|| [self.norm(name("q_norm"), model.head_dim), self.norm(name("k_norm"), model.head_dim)]);
        let heads_width = model.num_attention_heads * model.head_dim;
        let wo = self.tensor(name("wo"), [heads_width, d], true, Init::Normal(out_std));
        let ffn_norm = self.norm(name("ffn_norm"), d);
        let is_moe = model.is_moe(layer);
        let router =
            is_moe.then(|| self.tensor(name("router"), [d, model.num_experts], true, Init::Normal(std)));
        let ffn = match (is_moe, model.num_shared_experts) {
            (true, 0) => None,
            (true, _) => Some(self.ffn(&name("shared."), d, model.shared_width(), std, out_std)),
            (false, _) => Some(self.ffn(&name(""), d, model.intermediate_size, std, out_std)),
        };
        LayerTensors { attn_norm, wqkv, qk_norm, wo, ffn_norm, ffn, router }
    }
}

fn residual_std(model: &ModelConfig) -> f32 {
    model.initializer_range / (2.0 * model.num_hidden_layers as f32).sqrt()
}

impl Layout {
    /// The layout of a validated model.
    pub fn new(model: &ModelConfig) -> Self {
        let d = model.hidden_size;
        let std = model.initializer_range;
        let mut unit = Builder { next: 0 };
        let embed = unit.tensor("embed".into(), [model.vocab_size, d], true, Init::Normal(std));
        let mut units = vec![unit.next];
        let mut layers = Vec::with_capacity(model.num_hidden_layers);
        for layer in 0..model.num_hidden_layers {
            unit = Builder { next: 0 };
            layers.push(unit.layer(model, layer));
            units.push(unit.next);
        }
        unit = Builder { next: 0 };
        let final_norm = unit.norm("final_norm".into(), d);
        let head = match model.tie_embeddings {
            true => embed.clone(),
            false => unit.tensor("head".into(), [model.vocab_size, d], true, Init::Normal(std)),
        };
        units.push(unit.next);
        let mut block = Builder { next: 0 };
        let expert = block.ffn("", d, model.moe_intermediate_size, std, residual_std(model));
        let first = model.num_hidden_layers - model.moe_layers();
        Self {
            embed,
            layers,
            final_norm,
            head,
            expert,
            units,
            tied: model.tie_embeddings,
            moe_layers: first..model.num_hidden_layers,
            num_experts: model.num_experts,
        }
    }

    /// The unit of the embedding.
    pub const EMBED: usize = 0;

    /// The unit of a layer.
    pub fn layer_unit(layer: usize) -> usize {
        layer + 1
    }

    /// The unit of the final norm and, unless it is tied, of the output head.
    pub fn head_unit(&self) -> usize {
        self.units.len() - 1
    }

    /// The unit that holds the output head's table.
    pub fn table_unit(&self) -> usize {
        if self.tied { Self::EMBED } else { self.head_unit() }
    }

    /// How many units there are, in the order of the forward.
    pub fn units(&self) -> usize {
        self.units.len()
    }

    /// Dense elements of a unit, padding included.
    pub fn unit_len(&self, unit: usize) -> usize {
        self.units[unit]
    }

    /// Dense elements of all units, padding included.
    pub fn dense_len(&self) -> usize {
        self.units.iter().sum()
    }

    /// Which of the MoE layers a unit is, if it is one.
    pub fn moe_layer_of(&self, unit: usize) -> Option<usize> {
        let layer = unit.checked_sub(1).filter(|layer| self.moe_layers.contains(layer))?;
        Some(layer - self.moe_layers.start)
    }

    /// The first of a unit's dense chunks among all chunks of the model.
    pub fn first_chunk(&self, unit: usize) -> usize {
        self.units[..unit].iter().sum::<usize>() / NORM_CHUNK
    }

    /// The first chunk of an expert's block among all chunks of the model; `moe_layer` counts MoE layers.
    pub fn first_expert_chunk(&self, moe_layer: usize, expert: usize) -> usize {
        let blocks = moe_layer * self.num_experts + expert;
        (self.dense_len() + blocks * self.expert_len()) / NORM_CHUNK
    }

    /// Elements of one expert's block, padding included.
    pub fn expert_len(&self) -> usize {
        self.expert[0].padded + self.expert[1].padded
    }

    /// Layers with routed experts.
    pub fn moe_layers(&self) -> Range<usize> {
        self.moe_layers.clone()
    }

    /// Routed experts of an MoE layer.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Expert blocks of the whole model.
    pub fn expert_blocks(&self) -> usize {
        self.moe_layers.len() * self.num_experts
    }

    /// Chunks of the whole model: the dense ones, then those of each expert block by (layer, expert).
    pub fn chunks(&self) -> usize {
        (self.dense_len() + self.expert_blocks() * self.expert_len()) / NORM_CHUNK
    }

    /// The dense tensors of a unit, in buffer order; a tied head is in the embedding's.
    pub fn unit_tensors(&self, unit: usize) -> Vec<&TensorSpec> {
        if unit == Self::EMBED {
            return vec![&self.embed];
        }
        let Some(layer) = self.layers.get(unit - 1) else {
            let head = (!self.tied).then_some(&self.head);
            return std::iter::once(&self.final_norm).chain(head).collect();
        };
        let mut all = vec![&layer.attn_norm, &layer.wqkv];
        all.extend(layer.qk_norm.iter().flatten());
        all.extend([&layer.wo, &layer.ffn_norm]);
        all.extend(layer.router.iter());
        all.extend(layer.ffn.iter().flatten());
        all
    }

    /// Every dense tensor once, unit by unit.
    pub fn dense_tensors(&self) -> impl Iterator<Item = &TensorSpec> {
        (0..self.units()).flat_map(|unit| self.unit_tensors(unit))
    }

    /// The full name of tensor `which` (0 for `w13`, 1 for `w2`) of an expert.
    pub fn expert_tensor_name(&self, layer: usize, expert: usize, which: usize) -> String {
        format!("layers.{layer}.experts.{expert}.{}", self.expert[which].name)
    }

    /// Parameters without padding: all, and those that one token uses given `top_k` experts a layer.
    pub fn parameters(&self, top_k: usize) -> (usize, usize) {
        let dense: usize = self.dense_tensors().map(TensorSpec::len).sum();
        let expert = self.expert[0].len() + self.expert[1].len();
        let all = dense + self.expert_blocks() * expert;
        (all, dense + self.moe_layers.len() * top_k.min(self.num_experts) * expert)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_follow_each_other_in_whole_chunks() {
        let layout = Layout::new(&ModelConfig::default());
        let mut chunks = 0;
        for unit in 0..layout.units() {
            let mut next = 0;
            assert_eq!(layout.first_chunk(unit), chunks);
            for tensor in layout.unit_tensors(unit) {
                assert_eq!(tensor.offset, next, "{}", tensor.name);
                assert!(tensor.padded.is_multiple_of(NORM_CHUNK) && tensor.padded >= tensor.len());
                next += tensor.padded;
            }
            assert_eq!(next, layout.unit_len(unit));
            chunks += next / NORM_CHUNK;
        }
        let last = layout.first_expert_chunk(layout.moe_layers().len() - 1, layout.num_experts() - 1);
        assert_eq!(
            (chunks, last),
            (layout.first_expert_chunk(0, 0), layout.chunks() - layout.expert_len() / NORM_CHUNK)
        );
    }

    #[test]
    fn tied_embeddings_share_the_table() {
        let tied = Layout::new(&ModelConfig { tie_embeddings: true, ..ModelConfig::default() });
        assert_eq!((tied.table_unit(), &tied.head), (Layout::EMBED, &tied.embed));
        let untied = Layout::new(&ModelConfig::default());
        assert_eq!(untied.dense_len() - tied.dense_len(), 4096 * 256);
    }

    #[test]
    fn norms_have_no_weight_decay() {
        let layout = Layout::new(&ModelConfig::default());
        for tensor in layout.dense_tensors() {
            assert_eq!(tensor.decay, !tensor.name.ends_with("norm"), "{}", tensor.name);
        }
    }
}
