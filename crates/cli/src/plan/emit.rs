//! The plan as a config that `unisono train` runs.

use unisono_plan::{
    Modules, Optimizer, Parallelism, Precision, Pricer, Recomputation, Routing, Sharding, Training,
};
use unisono_train::RunConfig;
use unisono_train::config::{DispatchConfig, RecomputeConfig, ReduceEvery, WireConfig};

use super::GIB;
use super::answer::Answer;
use super::engine::{self, lacking};
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
    let of_model = engine::missing(&answer.model, origin);
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
    let refused = |error: String| CliError::usage(format!("--emit: {error}"));
    let mut config = engine::config(&answer.model, origin, RunConfig::default()).map_err(refused)?;
    lay_out(answer, &mut config);
    let toml = config.to_toml().map_err(|error| refused(error.to_string()))?;
    // What is written must read back as a config that can be trained.
    RunConfig::load(&toml, &[]).map_err(|error| refused(error.to_string()))?;
    let data = engine::lacking_data(&config)?;
    let mut text = head(answer, origin, data.is_some());
    text.extend(data.iter().map(|data| format!("# {data}.\n")));
    Ok(Emitted { text: text + "\n" + &toml, data })
}

/// Where the config is from, and what in it nobody has chosen.
fn head(answer: &Answer, origin: &Origin, needs_data: bool) -> String {
    let layout = &answer.chosen.layout;
    let rest = engine::defaults(origin);
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
