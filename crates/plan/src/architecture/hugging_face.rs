//! Hugging Face's `config.json`: llama, mixtral, qwen3_moe, olmoe, deepseek_v3, GPT-2 style.

use serde::Deserialize;

use super::{Architecture, Attention, MoeShape, Pattern, Window};

/// A `config.json` that cannot be read as an architecture.
#[derive(Debug, thiserror::Error)]
pub enum HuggingFaceError {
    /// Not the expected JSON.
    #[error("config.json: {0}")]
    Json(#[from] serde_json::Error),
    /// A family of models whose fields are not known to mean what those of the others do.
    #[error(
        "config.json: model_type {0:?} is not known; known: {known}. Without model_type a file is read as llama",
        known = KNOWN.join(", ")
    )]
    ModelType(String),
    /// A field is missing or has an impossible value.
    #[error("config.json: {field}: {rule}")]
    Field {
        /// The field.
        field: &'static str,
        /// What would be right.
        rule: &'static str,
    },
}

/// Families whose files were read and compared.
const KNOWN: [&str; 19] = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "olmo",
    "olmo2",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "kimi_k2",
    "gpt_oss",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gpt_bigcode",
    "openai-gpt",
];

/// The fields that decide sizes, by all their names.
#[derive(Debug, Deserialize)]
struct Config {
    model_type: Option<String>,
    #[serde(alias = "n_layer")]
    num_hidden_layers: Option<usize>,
    #[serde(alias = "n_embd")]
    hidden_size: Option<usize>,
    vocab_size: Option<usize>,
    #[serde(alias = "n_head")]
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(alias = "n_inner")]
    intermediate_size: Option<usize>,
    moe_intermediate_size: Option<usize>,
    shared_expert_intermediate_size: Option<usize>,
    #[serde(alias = "num_local_experts", alias = "n_routed_experts")]
    num_experts: Option<usize>,
    num_experts_per_tok: Option<usize>,
    n_shared_experts: Option<usize>,
    n_group: Option<usize>,
    topk_group: Option<usize>,
    first_k_dense_replace: Option<usize>,
    decoder_sparse_step: Option<usize>,
    #[serde(default)]
    mlp_only_layers: Vec<usize>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    #[serde(default)]
    layer_types: Vec<String>,
    use_parallel_residual: Option<bool>,
    q_lora_rank: Option<usize>,
    kv_lora_rank: Option<usize>,
    qk_nope_head_dim: Option<usize>,
    qk_rope_head_dim: Option<usize>,
    v_head_dim: Option<usize>,
    num_nextn_predict_layers: Option<usize>,
    tie_word_embeddings: Option<bool>,
}

impl Architecture {
    /// The architecture that a Hugging Face `config.json` describes.
    ///
    /// # Errors
    /// Text that is no JSON, and fields that are missing, zero or contradict each other, by name.
    pub fn from_hugging_face(json: &str) -> Result<Self, HuggingFaceError> {
        let config: Config = serde_json::from_str(json)?;
        let kind = config.model_type.clone().unwrap_or_else(|| "llama".into());
        if !KNOWN.contains(&kind.as_str()) {
            return Err(HuggingFaceError::ModelType(kind));
        }
        let classic = matches!(kind.as_str(), "gpt2" | "gpt_neo" | "gpt_neox" | "gpt_bigcode" | "openai-gpt");
        let hidden = required(config.hidden_size, "hidden_size")?;
        let layers = required(config.num_hidden_layers, "num_hidden_layers")?;
        let moe = config.moe()?;
        let pattern = config.pattern(layers)?;
        Ok(Self {
            layers,
            hidden,
            vocab: required(config.vocab_size, "vocab_size")?,
            tied_embeddings: config.tie_word_embeddings.unwrap_or(classic),
            gated: !classic,
            attention: config.attention(hidden)?,
            qk_norm: matches!(kind.as_str(), "qwen3" | "qwen3_moe" | "olmoe"),
            window: config.window()?,
            ffn_dense: config.intermediate_size.unwrap_or(4 * hidden),
            moe,
            state_space: None,
            pattern,
            parallel_blocks: kind == "gpt_neox" && config.use_parallel_residual != Some(false),
            mtp_layers: config.num_nextn_predict_layers.unwrap_or(0),
            name: kind,
        })
    }
}

impl Config {
    fn attention(&self, hidden: usize) -> Result<Attention, HuggingFaceError> {
        let heads = required(self.num_attention_heads, "num_attention_heads")?;
        if let Some(kv_lora_rank) = self.kv_lora_rank {
            return Ok(Attention::Latent {
                heads,
                q_lora_rank: self.q_lora_rank,
                kv_lora_rank,
                nope: required(self.qk_nope_head_dim, "qk_nope_head_dim")?,
                rope: required(self.qk_rope_head_dim, "qk_rope_head_dim")?,
                value: required(self.v_head_dim, "v_head_dim")?,
            });
        }
        let kv_heads = self.num_key_value_heads.unwrap_or(heads);
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(field("num_key_value_heads", "must divide num_attention_heads"));
        }
        Ok(Attention::Grouped { heads, kv_heads, head_dim: self.head_dim.unwrap_or(hidden / heads) })
    }

    fn moe(&self) -> Result<Option<MoeShape>, HuggingFaceError> {
        let Some(experts) = self.num_experts.filter(|experts| *experts > 0) else { return Ok(None) };
        let top_k = required(self.num_experts_per_tok, "num_experts_per_tok")?;
        if top_k > experts {
            return Err(field("num_experts_per_tok", "must be at most the number of experts"));
        }
        let width = self.moe_intermediate_size.or(self.intermediate_size);
        let expert_ffn = required(width, "moe_intermediate_size or intermediate_size")?;
        let shared = self.n_shared_experts.unwrap_or(0) * expert_ffn;
        let groups = self.n_group.unwrap_or(1).max(1);
        Ok(Some(MoeShape {
            experts,
            top_k,
            expert_ffn,
            shared_ffn: self.shared_expert_intermediate_size.unwrap_or(shared),
            groups,
            top_groups: self.topk_group.unwrap_or(1).clamp(1, groups),
            latent: None,
        }))
    }

    /// Which layers see only a window: all, or every so many from the first on.
    fn window(&self) -> Result<Option<Window>, HuggingFaceError> {
        let Some(tokens) = self.sliding_window.filter(|_| self.use_sliding_window != Some(false)) else {
            return Ok(None);
        };
        let slides: Vec<bool> = self.layer_types.iter().map(|kind| kind == "sliding_attention").collect();
        if !slides.is_empty() && !slides.contains(&true) {
            return Ok(None);
        }
        let every = slides.iter().skip(1).position(|slides| *slides).map_or(slides.len().max(1), |at| at + 1);
        match slides.iter().enumerate().all(|(layer, slides)| *slides == layer.is_multiple_of(every)) {
            true => Ok(Some(Window { tokens, every })),
            false => Err(field(
                "layer_types",
                "sliding_attention must be in every so many layers from the first on",
            )),
        }
    }

    fn pattern(&self, layers: usize) -> Result<Pattern, HuggingFaceError> {
        let first_dense = self.first_k_dense_replace.unwrap_or(self.mlp_only_layers.len());
        let leading = (0..self.mlp_only_layers.len()).all(|layer| self.mlp_only_layers.contains(&layer));
        match leading && first_dense <= layers {
            true => {
                Ok(Pattern::Uniform { first_dense, moe_every: self.decoder_sparse_step.unwrap_or(1).max(1) })
            }
            false => Err(field("mlp_only_layers", "must be the first layers")),
        }
    }
}

fn required(value: Option<usize>, name: &'static str) -> Result<usize, HuggingFaceError> {
    value.filter(|value| *value > 0).ok_or_else(|| field(name, "is missing; must be at least 1"))
}

fn field(field: &'static str, rule: &'static str) -> HuggingFaceError {
    HuggingFaceError::Field { field, rule }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configs_of_every_style_give_the_known_model() {
        let layer_types = [r#""sliding_attention","full_attention""#; 12].join(",");
        let gpt_oss = format!(
            r#"{{"model_type":"gpt_oss","num_hidden_layers":24,"hidden_size":2880,"vocab_size":201088,
            "num_attention_heads":64,"num_key_value_heads":8,"head_dim":64,"intermediate_size":2880,
            "num_local_experts":32,"num_experts_per_tok":4,"sliding_window":128,"tie_word_embeddings":false,
            "layer_types":[{layer_types}]}}"#
        );
        let cases = [
            (
                "Qwen3-30B-A3B",
                r#"{"model_type":"qwen3_moe","num_hidden_layers":48,"hidden_size":2048,"vocab_size":151936,
                "num_attention_heads":32,"num_key_value_heads":4,"head_dim":128,"intermediate_size":6144,
                "moe_intermediate_size":768,"num_experts":128,"num_experts_per_tok":8,"decoder_sparse_step":1,
                "mlp_only_layers":[],"sliding_window":null,"use_sliding_window":false,"tie_word_embeddings":false}"#,
            ),
            (
                "Mixtral-8x7B",
                r#"{"model_type":"mixtral","num_hidden_layers":32,"hidden_size":4096,"vocab_size":32000,
                "num_attention_heads":32,"num_key_value_heads":8,"intermediate_size":14336,"num_local_experts":8,
                "num_experts_per_tok":2,"sliding_window":null,"tie_word_embeddings":false}"#,
            ),
            (
                "DeepSeek-V3",
                r#"{"model_type":"deepseek_v3","num_hidden_layers":61,"hidden_size":7168,"vocab_size":129280,
                "num_attention_heads":128,"num_key_value_heads":128,"intermediate_size":18432,
                "moe_intermediate_size":2048,"n_routed_experts":256,"n_shared_experts":1,"num_experts_per_tok":8,
                "n_group":8,"topk_group":4,"first_k_dense_replace":3,"q_lora_rank":1536,"kv_lora_rank":512,
                "qk_nope_head_dim":128,"qk_rope_head_dim":64,"v_head_dim":128,"num_nextn_predict_layers":1}"#,
            ),
            (
                "Llama-3.1-8B",
                r#"{"model_type":"llama","num_hidden_layers":32,"hidden_size":4096,"vocab_size":128256,
                "num_attention_heads":32,"num_key_value_heads":8,"intermediate_size":14336}"#,
            ),
            ("GPT-OSS-20B", &gpt_oss),
            (
                "MPT-125m",
                r#"{"model_type":"gpt2","n_layer":12,"n_embd":768,"n_head":12,"vocab_size":50368,"n_inner":null}"#,
            ),
        ];
        for (name, json) in cases {
            let read = Architecture::from_hugging_face(json).unwrap();
            assert_eq!(Architecture { name: name.into(), ..read }, Architecture::built_in(name).unwrap());
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let said = |json: &str| Architecture::from_hugging_face(json).unwrap_err().to_string();
        assert_eq!(
            said(r#"{"hidden_size":8}"#),
            "config.json: num_hidden_layers: is missing; must be at least 1"
        );
        assert!(said("[").starts_with("config.json: EOF"));
        let unknown = said(r#"{"model_type":"t5","hidden_size":8}"#);
        assert!(
            unknown.starts_with("config.json: model_type \"t5\" is not known; known: llama, "),
            "{unknown}"
        );
        let last = r#"{"num_hidden_layers":3,"hidden_size":8,"vocab_size":9,"num_attention_heads":1,"sliding_window":4,
            "layer_types":["full_attention","full_attention","sliding_attention"]}"#;
        assert!(said(last).contains("layer_types: sliding_attention must be in every"));
    }
}
