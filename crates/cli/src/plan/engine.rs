//! Models as the engine trains them.

use unisono_data::Tokenizer;
use unisono_plan::{Architecture, Attention, ModelConfig, Pattern};
use unisono_train::RunConfig;

use super::question::Origin;
use crate::error::CliError;

/// A config that trains a model: the model's own, or else `rest` with this model, the widest expert group in its own that divides the experts, and
/// sequences no longer than the model has positions.
///
/// # Errors
/// If the engine does not have what the model needs; [`missing`] lists it.
pub fn config(model: &Architecture, origin: &Origin, rest: RunConfig) -> Result<RunConfig, String> {
    let numerics = match origin {
        Origin::Config(config) => return Ok(RunConfig::clone(config)),
        Origin::HuggingFace(numerics) => Some(numerics),
        Origin::BuiltIn => None,
    };
    let mut config = RunConfig { model: described(model)?, ..rest };
    if let Some(numerics) = numerics {
        numerics.apply(&mut config.model);
    }
    let (experts, widest) = (config.model.num_experts, config.grid.expert_group);
    let divides = |group: &usize| widest.is_multiple_of(*group) && experts.is_multiple_of(*group);
    config.grid.expert_group = (1..=widest).rev().find(divides).unwrap_or(1);
    let longest = numerics.and_then(|numerics| numerics.positions).unwrap_or(usize::MAX);
    config.train.sequence_length = config.train.sequence_length.min(longest);
    Ok(config)
}

/// What in a config of [`config`] nobody has chosen.
pub fn defaults(origin: &Origin) -> &'static str {
    match origin {
        Origin::Config(_) => "What a plan does not decide is as in that config.",
        Origin::HuggingFace(_) => {
            "Balance, optimizer and data are defaults: a config.json does not say them."
        }
        Origin::BuiltIn => {
            "Score function, normalize_top_k, rope_theta, rms_norm_eps, balance, optimizer and data are defaults: the planner \
             does not know them."
        }
    }
}

/// Which data the config needs where it names none and the built-in text has tokens that its vocabulary has not.
pub fn lacking_data(config: &RunConfig) -> Result<Option<String>, CliError> {
    let (vocabulary, built_in) = (config.model.vocab_size, Tokenizer::builtin()?.vocab_size() as usize);
    Ok((config.data.path.is_none() && vocabulary < built_in).then(|| {
        format!(
            "data.path must name a dataset whose tokenizer has at most model.vocab_size = {vocabulary} tokens \
             (`unisono data prepare --tokenizer`): the built-in one has {built_in}"
        )
    }))
}

/// What of a model the engine does not have.
pub fn missing(model: &Architecture, origin: &Origin) -> Vec<String> {
    let [shared, routed] = model.moe.map_or([0, 1], |moe| [moe.shared_ffn, moe.expert_ffn]);
    let every_layer = matches!(model.pattern, Pattern::Uniform { moe_every: 0 | 1, .. });
    let features = [
        (matches!(model.attention, Attention::Latent { .. }), "latent attention (MLA)".into()),
        (model.window.is_some(), "sliding-window attention".into()),
        (model.state_space.is_some(), "state-space layers".into()),
        (model.mtp_layers > 0, "multi-token prediction".into()),
        (!model.gated, "feed-forward networks without a gate".into()),
        (model.parallel_blocks, "parallel attention and feed-forward blocks".into()),
        (model.moe.is_some_and(|moe| moe.latent.is_some()), "experts in a latent space".into()),
        (!every_layer && model.state_space.is_none(), "MoE in only some of the layers".into()),
        (
            !shared.is_multiple_of(routed),
            format!("shared experts of width {shared}, no multiple of the routed experts' {routed}"),
        ),
    ];
    let mut missing = lacking(features);
    if let Origin::HuggingFace(numerics) = origin {
        missing.extend(numerics.lacking.iter().map(ToString::to_string));
    }
    missing
}

/// The features that are lacking.
pub fn lacking<const N: usize>(features: [(bool, String); N]) -> Vec<String> {
    features.into_iter().filter(|(lacks, _)| *lacks).map(|(_, what)| what).collect()
}

/// The architecture as the engine's own description.
fn described(model: &Architecture) -> Result<ModelConfig, String> {
    let Attention::Grouped { heads, kv_heads, head_dim } = model.attention else {
        return Err("the engine has no latent attention".into());
    };
    let first_dense = match model.pattern {
        Pattern::Uniform { first_dense, .. } => first_dense,
        Pattern::Letters(_) => 0,
    };
    let mut config = ModelConfig {
        vocab_size: model.vocab,
        hidden_size: model.hidden,
        num_hidden_layers: model.layers,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        intermediate_size: model.ffn_dense.max(1),
        num_experts: 0,
        num_shared_experts: 0,
        first_dense,
        qk_norm: model.qk_norm,
        tie_embeddings: model.tied_embeddings,
        ..ModelConfig::default()
    };
    if let Some(moe) = model.moe {
        config.num_experts = moe.experts;
        config.top_k = moe.top_k;
        config.moe_intermediate_size = moe.expert_ffn;
        config.num_shared_experts = moe.shared_ffn / moe.expert_ffn;
        config.num_groups = moe.groups.max(1);
        config.top_groups = moe.top_groups.max(1);
    }
    config.validate().map_err(|error| error.to_string())?;
    Ok(config)
}
