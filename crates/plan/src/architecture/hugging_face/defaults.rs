//! What a family of models takes where its `config.json` leaves a field out: transformers' `configuration_*.py` of 2026, and of
//! kimi_k2, which is not among them, DeepSeek-V3's. The sizes that make a model (layers, width, heads, vocabulary) must be said.

use serde_json::{Map, Value};

use super::{EXPERTS, WIDTH};

type Fields = &'static [(&'static str, usize)];

const DEEPSEEK_V3: Fields = &[
    ("intermediate_size", 18_432),
    ("moe_intermediate_size", 2048),
    ("n_routed_experts", 256),
    ("n_shared_experts", 1),
    ("num_experts_per_tok", 8),
    ("n_group", 8),
    ("topk_group", 4),
    ("first_k_dense_replace", 3),
    ("kv_lora_rank", 512),
    ("q_lora_rank", 1536),
    ("qk_nope_head_dim", 128),
    ("qk_rope_head_dim", 64),
    ("v_head_dim", 128),
];

const DEFAULTS: [(&str, Fields); 15] = [
    ("llama", &[("intermediate_size", 11_008)]),
    ("mistral", &[("intermediate_size", 14_336), ("num_key_value_heads", 8), ("sliding_window", 4096)]),
    (
        "mixtral",
        &[
            ("intermediate_size", 14_336),
            ("num_key_value_heads", 8),
            ("num_local_experts", 8),
            ("num_experts_per_tok", 2),
        ],
    ),
    ("qwen2", &[("intermediate_size", 22_016), ("num_key_value_heads", 32), ("sliding_window", 4096)]),
    (
        "qwen2_moe",
        &[
            ("intermediate_size", 5632),
            ("num_key_value_heads", 16),
            ("moe_intermediate_size", 1408),
            ("shared_expert_intermediate_size", 5632),
            ("num_experts", 60),
            ("num_experts_per_tok", 4),
            ("sliding_window", 4096),
        ],
    ),
    (
        "qwen3",
        &[
            ("intermediate_size", 22_016),
            ("num_key_value_heads", 32),
            ("head_dim", 128),
            ("sliding_window", 4096),
        ],
    ),
    (
        "qwen3_moe",
        &[
            ("intermediate_size", 6144),
            ("num_key_value_heads", 4),
            ("moe_intermediate_size", 768),
            ("num_experts", 128),
            ("num_experts_per_tok", 8),
            ("sliding_window", 4096),
        ],
    ),
    ("olmo", &[("intermediate_size", 11_008)]),
    ("olmo2", &[("intermediate_size", 11_008)]),
    ("olmoe", &[("intermediate_size", 2048), ("num_experts", 64), ("num_experts_per_tok", 8)]),
    (
        "deepseek_v2",
        &[
            ("intermediate_size", 11_008),
            ("moe_intermediate_size", 1407),
            ("n_routed_experts", 64),
            ("n_shared_experts", 2),
            ("kv_lora_rank", 512),
            ("q_lora_rank", 1536),
            ("qk_nope_head_dim", 128),
            ("qk_rope_head_dim", 64),
            ("v_head_dim", 128),
        ],
    ),
    ("deepseek_v3", DEEPSEEK_V3),
    ("kimi_k2", DEEPSEEK_V3),
    (
        "gpt_oss",
        &[
            ("intermediate_size", 2880),
            ("num_key_value_heads", 8),
            ("head_dim", 64),
            ("num_local_experts", 128),
            ("num_experts_per_tok", 4),
            ("sliding_window", 128),
        ],
    ),
    ("gpt_neox", &[("intermediate_size", 24_576)]),
];

/// Sets what a file of a family leaves out under all of a field's names. `null` is said: of key and value heads that there are as many
/// as heads, of a window or a rank that there is none.
pub(super) fn set(kind: &str, fields: &mut Map<String, Value>) {
    let Some((_, defaults)) = DEFAULTS.iter().find(|(family, _)| *family == kind) else { return };
    for (name, value) in *defaults {
        let names = [EXPERTS, WIDTH].into_iter().find(|names| names.contains(name));
        if !names.unwrap_or(&[*name]).iter().any(|name| fields.contains_key(*name)) {
            fields.insert((*name).to_string(), (*value).into());
        }
    }
}
