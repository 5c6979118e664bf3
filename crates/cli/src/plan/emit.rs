//! The plan as a config that `unisono train` runs.

use unisono_plan::{
    Attention, ModelConfig, Parallelism, Pattern, Precision, Recomputation, Routing, Sharding,
};
use unisono_train::RunConfig;
use unisono_train::config::{DispatchConfig, RecomputeConfig, ReduceEvery, WireConfig};

use super::answer::Answer;
use crate::error::CliError;

/// The config of the chosen layout. `model` is the config's own model where the question came from one.
pub fn config(answer: &Answer, model: Option<ModelConfig>) -> Result<String, CliError> {
    let mut missing = missing_of_layout(answer);
    missing.extend(missing_of_model(answer));
    if !missing.is_empty() {
        let list: Vec<String> = missing.iter().map(|feature| format!("  - {feature}")).collect();
        let remedy = match missing_of_model(answer).is_empty() {
            true => format!("nearest: --precision f32 --wire bf16 --layout \"{}\"", nearest(answer)),
            false => "no layout of this model runs until it has".to_string(),
        };
        return Err(CliError::usage(format!(
            "the engine cannot run this plan yet; it lacks\n{}\n{remedy}",
            list.join("\n")
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
    if training.wire == Precision::Bf16 && layout.expert > 1 {
        config.train.dispatch_wire = WireConfig::Bf16;
    }
    lay_out(answer, &mut config);
    config.train.recompute = match layout.recompute {
        Recomputation::None => RecomputeConfig::None,
        Recomputation::Modules(_) => RecomputeConfig::Selective,
        Recomputation::Full => RecomputeConfig::Full,
    };
    let toml = config.to_toml().map_err(|error| CliError::usage(error.to_string()))?;
    let head = format!(
        "# unisono plan: {} on {} {}, {layout}; predicted step {:.3} s.\n\
         # Score function, balance, optimizer and data are defaults where a plan does not know them.\n# mpirun -n {} unisono train THIS_FILE\n\n",
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

/// Sharding and dispatch.
fn lay_out(answer: &Answer, config: &mut RunConfig) {
    let (layout, dispatch) = (&answer.chosen.layout, answer.training.dispatch);
    config.layout.zero = match layout.sharding {
        Sharding::None | Sharding::Zero1 => 1,
        Sharding::Zero2 => 2,
        Sharding::Zero3 => 3,
    };
    if config.layout.zero > 1 && config.train.accumulate > 1 {
        config.train.reduce_every = ReduceEvery::Microbatch;
    }
    config.layout.overlap = dispatch.overlapped;
    let servers = layout.expert.div_ceil(answer.cluster.per_server);
    if dispatch.deduplicated && servers > 1 && config.model.num_experts.is_multiple_of(servers) {
        config.grid.expert_nodes = servers;
        config.layout.dispatch = DispatchConfig::Hierarchical;
    }
}

/// What of layout and training the engine does not have.
fn missing_of_layout(answer: &Answer) -> Vec<String> {
    let (layout, training) = (&answer.chosen.layout, &answer.training);
    let wire = layout.expert > 1 && !matches!(training.wire, Precision::F32 | Precision::Bf16);
    let pipeline = format!("pipeline parallelism (pp{}, {})", layout.pipeline, layout.schedule.name());
    let features = [
        (layout.tensor > 1, format!("tensor parallelism (tp{})", layout.tensor)),
        (layout.pipeline > 1, pipeline),
        (layout.context > 1, format!("context parallelism (cp{})", layout.context)),
        (
            layout.expert_tensor > 1,
            format!("tensor parallelism within experts (etp{})", layout.expert_tensor),
        ),
        (layout.sharding == Sharding::None, "replicas that share out nothing (zero0)".into()),
        (training.compute != Precision::F32, format!("products in {}", training.compute)),
        (wire, format!("rows to experts in {}", training.wire)),
        (training.routing != Routing::Balanced, "a prescribed skew of routing".into()),
    ];
    lacking(features)
}

/// What of the model the engine does not have.
fn missing_of_model(answer: &Answer) -> Vec<String> {
    let model = &answer.model;
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
    ];
    lacking(features)
}

fn lacking<const N: usize>(features: [(bool, String); N]) -> Vec<String> {
    features.into_iter().filter(|(lacks, _)| *lacks).map(|(_, what)| what).collect()
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

/// The architecture as the engine's own description; only what passed the check for missing features.
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
