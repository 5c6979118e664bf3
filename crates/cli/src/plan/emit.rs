//! The plan as a config that `unisono train` runs.

use unisono_data::Tokenizer;
use unisono_plan::{
    Attention, ModelConfig, Modules, Optimizer, Parallelism, Pattern, Precision, Pricer, Recomputation,
    Routing, Sharding, Training,
};
use unisono_train::RunConfig;
use unisono_train::config::{DispatchConfig, RecomputeConfig, ReduceEvery, WireConfig};

use super::GIB;
use super::answer::Answer;
use super::question::Origin;
use crate::error::CliError;

/// A config, and what it still needs.
#[derive(Debug)]
pub struct Emitted {
    /// The file.
    pub text: String,
    /// Which data, where the built-in text does not do.
    pub data: Option<String>,
}

/// The config of the chosen layout. Of a config of ours everything stays that the plan does not decide.
pub fn config(answer: &Answer, origin: &Origin) -> Result<Emitted, CliError> {
    let of_model = missing_of_model(answer, origin);
    let of_layout = missing_of_layout(answer);
    let missing: Vec<String> = of_layout.iter().chain(&of_model).map(|what| format!("  - {what}")).collect();
    if !missing.is_empty() {
        let remedy = match of_model.is_empty() {
            true => nearest(answer),
            false => "no layout of this model runs until it has".to_string(),
        };
        return Err(CliError::usage(format!(
            "the engine cannot run this plan yet; it lacks\n{}\n{remedy}",
            missing.join("\n")
        )));
    }
    let mut config = match origin {
        Origin::Config(config) => RunConfig::clone(config),
        Origin::HuggingFace(numerics) => {
            let mut config = RunConfig { model: engine_model(answer)?, ..RunConfig::default() };
            numerics.apply(&mut config.model);
            config
        }
        Origin::BuiltIn => RunConfig { model: engine_model(answer)?, ..RunConfig::default() },
    };
    lay_out(answer, &mut config);
    let toml = config.to_toml().map_err(|error| CliError::usage(error.to_string()))?;
    // What is written must read back as a config that can be trained.
    RunConfig::load(&toml, &[]).map_err(|error| CliError::usage(format!("--emit: {error}")))?;
    let data = data(&config)?;
    let mut text = head(answer, origin, data.is_some());
    text.extend(data.iter().map(|data| format!("# {data}.\n")));
    Ok(Emitted { text: text + "\n" + &toml, data })
}

/// Which data the config needs where it names none and the built-in text has tokens that its vocabulary has not.
fn data(config: &RunConfig) -> Result<Option<String>, CliError> {
    let (vocabulary, built_in) = (config.model.vocab_size, Tokenizer::builtin()?.vocab_size() as usize);
    Ok((config.data.path.is_none() && vocabulary < built_in).then(|| {
        format!(
            "data.path must name a dataset whose tokenizer has at most model.vocab_size = {vocabulary} tokens \
             (`unisono data prepare --tokenizer`): the built-in one has {built_in}"
        )
    }))
}

/// Where the config is from, and what in it nobody has chosen.
fn head(answer: &Answer, origin: &Origin, needs_data: bool) -> String {
    let layout = &answer.chosen.layout;
    let rest = match origin {
        Origin::Config(_) => "What a plan does not decide is as in that config.",
        Origin::HuggingFace(_) => {
            "Balance, optimizer and data are defaults: a config.json does not say them."
        }
        Origin::BuiltIn => {
            "Score function, normalize_top_k, rope_theta, rms_norm_eps, balance, optimizer and data are defaults: the planner \
             does not know them."
        }
    };
    let data = if needs_data { " --set data.path=DATASET" } else { "" };
    format!(
        "# unisono plan: {} on {} {}, {layout}; predicted step {:.3} s.\n# {rest}\n# mpirun -n {} unisono train THIS_FILE{data}\n",
        answer.model.name,
        answer.cluster.gpus,
        answer.cluster.gpu.label(),
        answer.chosen.priced.step_s,
        layout.gpus(),
    )
}

/// Grid, batch, sharding, recomputation and dispatch.
fn lay_out(answer: &Answer, config: &mut RunConfig) {
    let (layout, training) = (&answer.chosen.layout, &answer.training);
    config.grid.replicas = layout.data;
    config.grid.expert_group = layout.expert;
    config.train.sequence_length = training.sequence;
    config.train.micro_batch = layout.micro_batch;
    config.train.accumulate = layout.micro_batches(training);
    config.train.steps = answer.outlook.steps as u64;
    config.train.dispatch_wire = match training.wire {
        // What does not travel needs no rounding.
        Precision::Bf16 if layout.expert > 1 => WireConfig::Bf16,
        Precision::Bf16 => config.train.dispatch_wire,
        _ => WireConfig::F32,
    };
    if let Some(recompute) = recompute(answer) {
        config.train.recompute = recompute;
    }
    config.layout.zero = match layout.sharding {
        Sharding::None | Sharding::Zero1 => 1,
        Sharding::Zero2 => 2,
        Sharding::Zero3 => 3,
    };
    if config.layout.zero > 1 && config.train.accumulate > 1 {
        config.train.reduce_every = ReduceEvery::Microbatch;
    }
    config.layout.overlap = training.dispatch.overlapped;
    config.layout.dispatch = DispatchConfig::Flat;
    if let Some(servers) = deduplicated_over(answer) {
        config.grid.expert_nodes = servers;
        config.layout.dispatch = DispatchConfig::Hierarchical;
    }
}

/// The servers of an expert group where a row goes once to each; `None` where there is only one.
fn deduplicated_over(answer: &Answer) -> Option<usize> {
    let servers = answer.chosen.layout.expert.div_ceil(answer.cluster.per_server);
    (answer.training.dispatch.deduplicated && servers > 1).then_some(servers)
}

/// The engine's name of what the plan computes again; `None` where it has none.
fn recompute(answer: &Answer) -> Option<RecomputeConfig> {
    // Attention is fused and always computes its core again.
    let free = |modules: Modules| Modules { core_attention: false, ..modules };
    // The engine's: all that costs no product.
    let selective =
        Modules { layernorm: true, moe_activation: answer.model.moe.is_some(), ..Modules::default() };
    match answer.chosen.layout.recompute {
        Recomputation::None => Some(RecomputeConfig::None),
        Recomputation::Full => Some(RecomputeConfig::Full),
        Recomputation::SELECTIVE => Some(RecomputeConfig::Selective),
        Recomputation::Modules(modules) if free(modules) == selective => Some(RecomputeConfig::Selective),
        Recomputation::Modules(_) => None,
    }
}

/// What of layout and training the engine does not have.
fn missing_of_layout(answer: &Answer) -> Vec<String> {
    let (layout, training) = (&answer.chosen.layout, &answer.training);
    let wire = layout.expert > 1 && !matches!(training.wire, Precision::F32 | Precision::Bf16);
    let servers = deduplicated_over(answer).unwrap_or(1);
    let experts = answer.model.moe.map_or(1, |moe| moe.experts);
    let uneven = !experts.is_multiple_of(servers);
    let pipeline = format!("pipeline parallelism (pp{}, {})", layout.pipeline, layout.schedule.name());
    let features = [
        (layout.tensor > 1, format!("tensor parallelism (tp{})", layout.tensor)),
        (layout.pipeline > 1, pipeline),
        (layout.context > 1, format!("context parallelism (cp{})", layout.context)),
        (
            layout.expert_tensor > 1,
            format!("tensor parallelism within experts (etp{})", layout.expert_tensor),
        ),
        (
            layout.sharding == Sharding::None && layout.data > 1,
            "replicas that share out nothing (zero0)".into(),
        ),
        (
            recompute(answer).is_none(),
            format!("this choice of what is computed again ({layout}); it has none, selective and full"),
        ),
        (training.compute != Precision::F32, format!("products in {}", training.compute)),
        (
            training.optimizer != Optimizer::default(),
            "moments in bf16 (--optimizer adam-bf16-moments)".into(),
        ),
        (wire, format!("rows to experts in {}", training.wire)),
        (
            uneven,
            format!(
                "rows that go once to each of {servers} servers, over which {experts} experts do not divide evenly \
                     (--no-deduplication sends them one by one)"
            ),
        ),
        (training.routing != Routing::Balanced, "a prescribed skew of routing".into()),
    ];
    lacking(features)
}

/// What of the model the engine does not have.
fn missing_of_model(answer: &Answer, origin: &Origin) -> Vec<String> {
    let model = &answer.model;
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

fn lacking<const N: usize>(features: [(bool, String); N]) -> Vec<String> {
    features.into_iter().filter(|(lacks, _)| *lacks).map(|(_, what)| what).collect()
}

/// The options of a plan with the engine's axes and formats alone, on as many GPUs: of those that fit the one most alike.
fn nearest(answer: &Answer) -> String {
    let layout = &answer.chosen.layout;
    let (gpus, batch) = (layout.gpus(), answer.training.global_batch);
    let data = (1..=gpus.min(batch)).rev().find(|data| batch.is_multiple_of(*data)).unwrap_or(1);
    let experts = answer.model.moe.map_or(1, |moe| moe.experts);
    let divides = |expert: &usize| experts.is_multiple_of(*expert) && data.is_multiple_of(*expert);
    let expert = (1..=layout.expert).rev().find(divides).unwrap_or(1);
    let own = recompute(answer).map_or(Recomputation::SELECTIVE, |_| layout.recompute);
    let shardings = [Sharding::Zero1, Sharding::Zero2, Sharding::Zero3].into_iter();
    let candidates = shardings.flat_map(|sharding| {
        [own, Recomputation::SELECTIVE, Recomputation::Full].map(|recompute| Parallelism {
            data,
            expert,
            sharding,
            recompute,
            ..Parallelism::default()
        })
    });
    let training = Training {
        compute: Precision::F32,
        wire: Precision::Bf16,
        optimizer: Optimizer::default(),
        routing: Routing::Balanced,
        ..answer.training.clone()
    };
    let pricer = Pricer::new(&answer.model, &answer.cluster, &training);
    let capacity = answer.cluster.gpu.memory_bytes;
    let lacking = |layout: &Parallelism| pricer.price(layout).map(|priced| priced.memory.total() - capacity);
    let known: Vec<(Parallelism, f64)> =
        candidates.filter_map(|layout| Some((layout, lacking(&layout).ok()?))).collect();
    let fitting = known.iter().find(|(_, lacking)| *lacking <= 0.0);
    let least = known.iter().min_by(|a, b| a.1.total_cmp(&b.1));
    let Some((layout, lacking)) = fitting.or(least) else {
        return "no layout of this model runs until it has".into();
    };
    let wire = if answer.model.moe.is_some() { " --wire bf16" } else { "" };
    let beyond = match *lacking > 0.0 {
        true => format!(", {:.1} GiB a GPU too large", lacking / GIB),
        false => String::new(),
    };
    format!("nearest{beyond}: --precision f32{wire} --optimizer adam --layout \"{layout}\"")
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
