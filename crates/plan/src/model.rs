//! The model as a config file describes it.

use serde::{Deserialize, Serialize};

use unisono_mesh::{MeshError, check_divides};

use crate::architecture::{LARGEST_SIZE, MOST_LAYERS};

/// How router logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScoreFunction {
    /// Each expert on its own, as DeepSeek-V3.
    Sigmoid,
    /// Over all experts, as Mixtral and Qwen3.
    Softmax,
}

/// Sizes and switches of a decoder-only MoE transformer; `docs/config.md` gives the names of Hugging Face's configs where
/// they are others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// Tokens of the vocabulary; at least the tokenizer's.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Transformer layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Elements of a head; even.
    pub head_dim: usize,
    /// Hidden width of dense feed-forward layers.
    pub intermediate_size: usize,
    /// Hidden width of one routed expert (and of each shared expert).
    pub moe_intermediate_size: usize,
    /// Routed experts of an MoE layer; 0 makes every layer dense.
    pub num_experts: usize,
    /// Routed experts that a token visits.
    pub top_k: usize,
    /// Experts that every token visits.
    pub num_shared_experts: usize,
    /// How many of the first layers are dense.
    pub first_dense: usize,
    /// Groups of consecutive experts for group-limited routing; 1 for none.
    pub num_groups: usize,
    /// Groups that a token may choose from.
    pub top_groups: usize,
    /// How router logits become scores.
    pub score_function: ScoreFunction,
    /// Divide the chosen scores by their sum.
    pub normalize_top_k: bool,
    /// Factor on the chosen weights.
    pub routed_scaling_factor: f32,
    /// Step of the auxiliary-loss-free balance bias, once an optimizer step; 0 switches it off.
    pub bias_update_rate: f32,
    /// Coefficient of the sequence-wise balance loss; 0 switches it off.
    pub balance_loss_coef: f32,
    /// Coefficient of the router's z-loss; 0 switches it off.
    pub z_loss_coef: f32,
    /// Route round-robin whatever the scores say: for benchmarks.
    pub force_balance: bool,
    /// RMSNorm on each query and key head.
    pub qk_norm: bool,
    /// Use the embedding table as the output head.
    pub tie_embeddings: bool,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Added to the mean square under the root of every RMSNorm.
    pub rms_norm_eps: f32,
    /// Standard deviation of the initial weights; projections into the residual stream get it divided by sqrt(2 layers).
    pub initializer_range: f32,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            vocab_size: 4096,
            hidden_size: 256,
            num_hidden_layers: 4,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 64,
            intermediate_size: 768,
            moe_intermediate_size: 256,
            num_experts: 16,
            top_k: 2,
            num_shared_experts: 1,
            first_dense: 1,
            num_groups: 1,
            top_groups: 1,
            score_function: ScoreFunction::Sigmoid,
            normalize_top_k: true,
            routed_scaling_factor: 1.0,
            bias_update_rate: 1e-3,
            balance_loss_coef: 1e-4,
            z_loss_coef: 0.0,
            force_balance: false,
            qk_norm: true,
            tie_embeddings: false,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            initializer_range: 0.02,
        }
    }
}

/// A model that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// A field that cannot have its value.
    #[error("model.{field} = {value}: {rule}")]
    Value {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What would be right.
        rule: String,
    },
    /// Something does not divide something.
    #[error(transparent)]
    Divides(#[from] MeshError),
}

impl ModelConfig {
    /// Checks every field against every other.
    ///
    /// # Errors
    /// Names the field, its value and what would be right.
    pub fn validate(&self) -> Result<(), ModelError> {
        self.validate_sizes()?;
        self.validate_router()?;
        let floats = [
            ("routed_scaling_factor", self.routed_scaling_factor, f32::MIN_POSITIVE),
            ("bias_update_rate", self.bias_update_rate, 0.0),
            ("balance_loss_coef", self.balance_loss_coef, 0.0),
            ("z_loss_coef", self.z_loss_coef, 0.0),
            ("rope_theta", self.rope_theta, 1.0),
            ("rms_norm_eps", self.rms_norm_eps, f32::MIN_POSITIVE),
            ("initializer_range", self.initializer_range, f32::MIN_POSITIVE),
        ];
        for (field, value, least) in floats {
            check(value.is_finite() && value >= least, field, value, || {
                format!("must be finite and at least {least:e}")
            })?;
        }
        Ok(())
    }

    fn validate_sizes(&self) -> Result<(), ModelError> {
        let sizes = [
            ("vocab_size", self.vocab_size, 2),
            ("hidden_size", self.hidden_size, 2),
            ("num_hidden_layers", self.num_hidden_layers, 1),
            ("num_attention_heads", self.num_attention_heads, 1),
            ("num_key_value_heads", self.num_key_value_heads, 1),
            ("head_dim", self.head_dim, 2),
            ("intermediate_size", self.intermediate_size, 1),
            ("moe_intermediate_size", self.moe_intermediate_size, 1),
            ("num_experts", self.num_experts, 0),
            ("num_shared_experts", self.num_shared_experts, 0),
            ("first_dense", self.first_dense, 0),
        ];
        for (field, value, least) in sizes {
            let most = if field == "num_hidden_layers" { MOST_LAYERS } else { LARGEST_SIZE };
            check((least..=most).contains(&value), field, value, || {
                format!("must be between {least} and {most}")
            })?;
        }
        let heads = self.num_attention_heads;
        let kv_heads = self.num_key_value_heads;
        check_divides("model.num_key_value_heads", kv_heads, "model.num_attention_heads", heads, heads)?;
        check(self.head_dim.is_multiple_of(2), "head_dim", self.head_dim, || {
            "must be even: rotary pairs".into()
        })?;
        let layers = self.num_hidden_layers;
        check(self.first_dense <= layers, "first_dense", self.first_dense, || {
            format!("must be at most num_hidden_layers = {layers}")
        })
    }

    fn validate_router(&self) -> Result<(), ModelError> {
        let experts = self.num_experts;
        if experts == 0 {
            return Ok(());
        }
        check((1..=experts).contains(&self.top_k), "top_k", self.top_k, || {
            format!("must be between 1 and num_experts = {experts}")
        })?;
        let groups = self.num_groups;
        check_divides("model.num_groups", groups, "model.num_experts", experts, experts)?;
        check((1..=groups).contains(&self.top_groups), "top_groups", self.top_groups, || {
            format!("must be between 1 and num_groups = {groups}")
        })?;
        let reach = experts / groups * self.top_groups;
        check(self.top_k <= reach, "top_k", self.top_k, || {
            format!("must be at most the {reach} experts of top_groups = {} groups", self.top_groups)
        })
    }

    /// Whether layer `layer` has routed experts.
    pub fn is_moe(&self, layer: usize) -> bool {
        self.num_experts > 0 && layer >= self.first_dense
    }

    /// Layers with routed experts.
    pub fn moe_layers(&self) -> usize {
        if self.num_experts == 0 { 0 } else { self.num_hidden_layers - self.first_dense }
    }

    /// Elements of a token's queries, keys and values.
    pub fn qkv_width(&self) -> usize {
        (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
    }

    /// Hidden width of the shared experts together.
    pub fn shared_width(&self) -> usize {
        self.num_shared_experts * self.moe_intermediate_size
    }

    /// Multiply-adds of one token's forward pass in products with weights, and in causal attention over documents of
    /// `sequence` tokens (each token sees half of them on average).
    pub fn forward_macs(&self, sequence: usize) -> f64 {
        let d = self.hidden_size;
        let attention = d * self.qkv_width() + self.num_attention_heads * self.head_dim * d;
        let scores = self.num_attention_heads * self.head_dim * (sequence + 1);
        let ffn = |width: usize| 3 * d * width;
        let per_layer = |layer| match self.is_moe(layer) {
            true => {
                d * self.num_experts + ffn(self.top_k * self.moe_intermediate_size) + ffn(self.shared_width())
            }
            false => ffn(self.intermediate_size),
        };
        let layers: usize = (0..self.num_hidden_layers).map(|l| attention + scores + per_layer(l)).sum();
        (layers + d * self.vocab_size) as f64
    }

    /// Floating-point operations of one token's forward and backward pass: a multiply-add counts two, the backward twice
    /// the forward, recomputation not at all.
    pub fn train_flops(&self, sequence: usize) -> f64 {
        6.0 * self.forward_macs(sequence)
    }
}

fn check(
    holds: bool,
    field: &'static str,
    value: impl ToString,
    rule: impl FnOnce() -> String,
) -> Result<(), ModelError> {
    if holds { Ok(()) } else { Err(ModelError::Value { field, value: value.to_string(), rule: rule() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(change: impl FnOnce(&mut ModelConfig)) -> String {
        let mut model = ModelConfig::default();
        change(&mut model);
        model.validate().map_or_else(|e| e.to_string(), |()| "ok".into())
    }

    #[test]
    fn errors_name_field_value_and_rule() {
        assert_eq!(said(|_| ()), "ok");
        assert_eq!(said(|m| m.top_k = 17), "model.top_k = 17: must be between 1 and num_experts = 16");
        assert_eq!(
            said(|m| m.num_key_value_heads = 3),
            "model.num_key_value_heads = 3 does not divide model.num_attention_heads = 4; values that do: 1, 2, 4"
        );
        for groups in [0, 5] {
            let expect = format!(
                "model.num_groups = {groups} does not divide model.num_experts = 16; values that do: 1, 2, 4, 8, 16"
            );
            assert_eq!(said(|m| m.num_groups = groups), expect);
        }
        assert_eq!(
            said(|m| (m.num_groups, m.top_groups, m.top_k) = (8, 1, 4)),
            "model.top_k = 4: must be at most the 2 experts of top_groups = 1 groups"
        );
        assert_eq!(
            said(|m| m.rope_theta = f32::NAN),
            "model.rope_theta = NaN: must be finite and at least 1e0"
        );
    }

    #[test]
    fn flops_count_active_experts_only() {
        let model = ModelConfig { first_dense: 0, ..ModelConfig::default() };
        let weights = 4 * (256 * 512 + 256 * 256 + 256 * 16 + 3 * 3 * 256 * 256) + 256 * 4096;
        let scores = 4 * 256 * 257;
        assert_eq!(model.forward_macs(256), (weights + scores) as f64);
    }
}
