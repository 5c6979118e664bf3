//! Where every parameter lies.
//!
//! Dense parameters (all that every rank computes with) lie in one flat buffer; the parameters of a routed expert form
//! a block, and a rank's blocks lie in a second one, by (MoE layer, expert). Each tensor is padded with zeros to whole
//! chunks of [`NORM_CHUNK`] elements, so that shards and the gradient norm count in chunks.

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

/// One tensor in a flat buffer.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// Its name, such as `layers.3.wqkv`.
    pub name: String,
    /// Rows and columns (a vector has one row).
    pub shape: [usize; 2],
    /// First element.
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

    /// Its elements in the flat buffer, without padding.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }
}

/// Offsets of the tensors of one layer in the dense buffer; absent ones are `None`.
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
    /// Token embedding, `[vocab, d]`.
    pub embed: TensorSpec,
    /// The layers' dense tensors.
    pub layers: Vec<LayerTensors>,
    /// Norm before the head, `[d]`.
    pub final_norm: TensorSpec,
    /// Output head `[vocab, d]`; the embedding if tied.
    pub head: TensorSpec,
    /// `w13` `[d, 2 ffn]` and `w2` `[ffn, d]` of an expert, offsets within its block; the names lack the layer and expert.
    pub expert: [TensorSpec; 2],
    dense_len: usize,
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
        let mut dense = Builder { next: 0 };
        let d = model.hidden_size;
        let std = model.initializer_range;
        let embed = dense.tensor("embed".into(), [model.vocab_size, d], true, Init::Normal(std));
        let layers = (0..model.num_hidden_layers).map(|layer| dense.layer(model, layer)).collect();
        let final_norm = dense.norm("final_norm".into(), d);
        let head = match model.tie_embeddings {
            true => embed.clone(),
            false => dense.tensor("head".into(), [model.vocab_size, d], true, Init::Normal(std)),
        };
        let mut block = Builder { next: 0 };
        let expert = block.ffn("", d, model.moe_intermediate_size, std, residual_std(model));
        let first = model.num_hidden_layers - model.moe_layers();
        Self {
            embed,
            layers,
            final_norm,
            head,
            expert,
            dense_len: dense.next,
            moe_layers: first..model.num_hidden_layers,
            num_experts: model.num_experts,
        }
    }

    /// Elements of the dense buffer, padding included.
    pub fn dense_len(&self) -> usize {
        self.dense_len
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
        (self.dense_len + self.expert_blocks() * self.expert_len()) / NORM_CHUNK
    }

    /// Every dense tensor once, in buffer order.
    pub fn dense_tensors(&self) -> Vec<&TensorSpec> {
        let mut all = vec![&self.embed];
        for layer in &self.layers {
            all.extend([&layer.attn_norm, &layer.wqkv]);
            all.extend(layer.qk_norm.iter().flatten());
            all.extend([&layer.wo, &layer.ffn_norm]);
            all.extend(layer.router.iter());
            all.extend(layer.ffn.iter().flatten());
        }
        all.push(&self.final_norm);
        if self.head.offset != self.embed.offset {
            all.push(&self.head);
        }
        all
    }

    /// The full name of tensor `which` (0 for `w13`, 1 for `w2`) of an expert.
    pub fn expert_tensor_name(&self, layer: usize, expert: usize, which: usize) -> String {
        format!("layers.{layer}.experts.{expert}.{}", self.expert[which].name)
    }

    /// Parameters without padding: all, and those that one token uses given `top_k` experts a layer.
    pub fn parameters(&self, top_k: usize) -> (usize, usize) {
        let dense: usize = self.dense_tensors().iter().map(|t| t.len()).sum();
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
        let mut next = 0;
        for tensor in layout.dense_tensors() {
            assert_eq!(tensor.offset, next, "{}", tensor.name);
            assert!(tensor.padded.is_multiple_of(NORM_CHUNK) && tensor.padded >= tensor.len());
            next += tensor.padded;
        }
        assert_eq!(next, layout.dense_len());
    }

    #[test]
    fn tied_embeddings_share_the_table() {
        let tied = Layout::new(&ModelConfig { tie_embeddings: true, ..ModelConfig::default() });
        assert_eq!(tied.head.offset, tied.embed.offset);
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
