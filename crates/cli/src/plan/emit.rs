//! The plan as a config that `unisono train` runs.

use unisono_plan::{
    Attention, ModelConfig, Parallelism, Pattern, Precision, Recomputation, Routing, Sharding,
};
use unisono_train::RunConfig;
use unisono_train::config::RecomputeConfig;

use super::answer::Answer;
use crate::error::CliError;

/// The config of the chosen layout. `model` is the config's own model where the question came from one.
pub fn config(answer: &Answer, model: Option<ModelConfig>) -> Result<String, CliError> {
    let missing = missing(answer);
    if !missing.is_empty() {
        let list: Vec<String> = missing.iter().map(|feature| format!("  - {feature}")).collect();
        return Err(CliError::usage(format!(
            "the engine cannot run this plan yet; it lacks\n{}\nnearest: --precision f32 --layout \"{}\"",
            list.join("\n"),
            nearest(answer)
        )));
    }
    let (layout, training) = (&answer.chosen.layout, &answer.training);
    let mut config = RunConfig::default();
    config.grid.replicas = layout.data;
    config.grid.expert_group = layout.expert;
    config.model = match model {
        Some(model) => model,
        None => engine_model(answer)?,
    };
    config.train.sequence_length = training.sequence;
    config.train.micro_batch = layout.micro_batch;
    config.train.accumulate = layout.micro_batches(training);
    config.train.steps = answer.outlook.steps as u64;
    config.train.recompute = match layout.recompute {
        Recomputation::None => RecomputeConfig::None,
        Recomputation::Modules(_) => RecomputeConfig::Selective,
        Recomputation::Full => RecomputeConfig::Full,
    };
    let toml = config.to_toml().map_err(|error| CliError::usage(error.to_string()))?;
    let head = format!(
        "# unisono plan: {} on {} {}, {layout}; predicted step {:.3} s.\n# mpirun -n {} unisono train THIS_FILE\n\n",
        answer.model.name,
        answer.cluster.gpus,
        answer.cluster.gpu.name,
        answer.chosen.priced.step_s,
        layout.gpus(),
    );
    // What is written must read back as a config that can be trained.
    RunConfig::load(&toml, &[]).map_err(|error| CliError::usage(format!("--emit: {error}")))?;
    Ok(head + &toml)
}

/// What the plan asks for and the engine does not have.
fn missing(answer: &Answer) -> Vec<String> {
    let (layout, training, model) = (&answer.chosen.layout, &answer.training, &answer.model);
    let mut out = Vec::new();
    let mut lacks = |missing: bool, what: String| {
        if missing {
            out.push(what);
        }
    };
    lacks(layout.tensor > 1, format!("tensor parallelism (tp{})", layout.tensor));
    lacks(
        layout.pipeline > 1,
        format!("pipeline parallelism (pp{}, {})", layout.pipeline, layout.schedule.name()),
    );
    lacks(layout.context > 1, format!("context parallelism (cp{})", layout.context));
    lacks(
        layout.expert_tensor > 1,
        format!("tensor parallelism within experts (etp{})", layout.expert_tensor),
    );
    lacks(layout.sharding == Sharding::Zero3, "sharded parameters (zero3)".into());
    lacks(training.compute != Precision::F32, format!("products in {}", training.compute));
    lacks(matches!(model.attention, Attention::Latent { .. }), "latent attention (MLA)".into());
    lacks(model.window.is_some(), "sliding-window attention".into());
    lacks(model.state_space.is_some(), "state-space layers".into());
    lacks(model.mtp_layers > 0, "multi-token prediction".into());
    lacks(!model.gated, "feed-forward networks without a gate".into());
    lacks(model.parallel_blocks, "parallel attention and feed-forward blocks".into());
    lacks(model.moe.is_some_and(|moe| moe.latent.is_some()), "experts in a latent space".into());
    let every_layer = matches!(model.pattern, Pattern::Uniform { moe_every: 0 | 1, .. });
    lacks(!every_layer && model.state_space.is_none(), "MoE in only some of the layers".into());
    lacks(training.routing != Routing::Balanced, "a prescribed skew of routing".into());
    out
}

/// A layout of the engine's axes alone, on as many GPUs.
fn nearest(answer: &Answer) -> Parallelism {
    let layout = &answer.chosen.layout;
    let (gpus, batch) = (layout.gpus(), answer.training.global_batch);
    let data = (1..=gpus.min(batch)).rev().find(|data| batch.is_multiple_of(*data)).unwrap_or(1);
    let experts = answer.model.moe.map_or(1, |moe| moe.experts);
    let fits = |expert: &usize| experts.is_multiple_of(*expert) && data.is_multiple_of(*expert);
    let expert = (1..=layout.expert).rev().find(fits).unwrap_or(1);
    Parallelism {
        data,
        expert,
        sharding: Sharding::Zero1,
        recompute: layout.recompute,
        ..Parallelism::default()
    }
}

/// The architecture as the engine's own description; only what [`missing`] let through.
fn engine_model(answer: &Answer) -> Result<ModelConfig, CliError> {
    let model = &answer.model;
    let Attention::Grouped { heads, kv_heads, head_dim } = model.attention else {
        return Err(CliError::usage("the engine has no latent attention"));
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
    config.validate().map_err(|error| CliError::usage(format!("--emit: {error}")))?;
    Ok(config)
}
