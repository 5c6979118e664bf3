//! From a row to what is priced. What the row leaves open becomes several candidates, of which the caller takes the fastest
//! that fits: whoever published a number had looked for it.

use crate::architecture::{Architecture, Attention};
use crate::calibration::TEST_SKEW;
use crate::hardware::Cluster;
use crate::parallelism::{
    Modules, Optimizer, Parallelism, ParallelismError, Recomputation, Routing, Sharding, Training,
};
use crate::precision::Precision;
use crate::schedule::ScheduleKind;
use crate::software::{DispatchKind, Habits, Software, Trainable};

use super::case::{Case, Kind};
use super::golden;
use super::model::Models;
use super::names;
use super::neighbours::fully_sharded;
use super::recipes::{self, recipe};

/// Micro-batches of a pipeline stage where no batch is printed: enough that the bubble is small.
const MICRO_BATCHES_A_STAGE: usize = 8;
/// Sequence length where none is printed.
const SEQUENCE: usize = 4096;
/// Sequences of a replica in torchtitan's published benchmarks of models that fit a GPU, where none are printed.
const TITAN_SEQUENCES: usize = 2;
/// GPUs where no number is printed and the degrees need no more.
const GPUS: usize = 8;

/// What a row describes.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    pub architecture: Architecture,
    pub cluster: Cluster,
    /// Whether the GPU is not the row's, but the one that comes nearest.
    pub nearest_gpu: bool,
    /// Each with its training, whose batch the layout divides.
    pub candidates: Vec<(Parallelism, Training)>,
}

/// Reads a row whose blanks its neighbours have filled as far as they could.
pub(super) fn interpret(case: &Case, models: &Models) -> Result<Setup, String> {
    if ["mimo_", "multimodal"].iter().any(|word| case.mentions(word)) {
        return Err("the printed shape is only the language part of the model".into());
    }
    if case.says_nothing_of_the_plan() {
        return Err("neither the number of GPUs nor a batch nor a degree is printed".into());
    }
    let architecture = super::model::architecture(case, models)?;
    let (gpu, nearest_gpu) = names::gpu_of(&case.gpu)?;
    let printed = case.gpus.map(|gpus| gpus as usize).or_else(|| all_gpus(case));
    let gpus = printed.unwrap_or_else(|| fewest_gpus(case).max(GPUS));
    let cluster = Cluster::of(gpu, gpus).map_err(|error| error.to_string())?;
    let mut refused = None;
    let candidates = relaxed(case).into_iter().find_map(|case| {
        let (found, first) = candidates(&case, &architecture, &cluster);
        refused = refused.take().or(first);
        (!found.is_empty()).then_some(found)
    });
    let Some(candidates) = candidates else {
        let why = refused.map_or("they are no multiple of tp x pp x cp".into(), |error| error.to_string());
        return Err(format!("no layout of {} fits on {gpus} GPUs: {why}", describe(case)));
    };
    Ok(Setup { architecture, cluster, nearest_gpu, candidates })
}

/// The row, and what is left of it without the degrees that are misprinted most easily: virtual stages, then the micro-batch, too.
fn relaxed(case: &Case) -> [Case; 3] {
    let mut without = [case.clone(), case.clone(), case.clone()];
    without[1].degrees.virtual_stages = None;
    without[2].degrees.virtual_stages = None;
    without[2].degrees.micro_batch = None;
    without
}

/// The feasible layouts that the row may mean, and why the first of the others is none.
fn candidates(
    case: &Case,
    architecture: &Architecture,
    cluster: &Cluster,
) -> (Vec<(Parallelism, Training)>, Option<ParallelismError>) {
    let precision = precision(case);
    let (mut feasible, mut refused) = (Vec::new(), None);
    for layout in layouts(case, architecture, cluster) {
        let training = training(case, architecture, precision, &layout);
        match layout.check(architecture, &training) {
            Ok(()) => feasible.push((layout, training)),
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    (feasible, refused)
}

/// The GPUs of a run that prints its replicas instead.
fn all_gpus(case: &Case) -> Option<usize> {
    let degrees = &case.degrees;
    let replicas = degrees.data.filter(|_| case.kind == Kind::Run)?;
    let others = [degrees.tensor, degrees.context, degrees.pipeline];
    Some(others.iter().fold(replicas as usize, |gpus, of| gpus.saturating_mul(of.unwrap_or(1) as usize)))
}

/// The GPUs that the printed degrees need at least.
fn fewest_gpus(case: &Case) -> usize {
    let of = |degree: Option<u64>| degree.unwrap_or(1) as usize;
    let degrees = &case.degrees;
    let dense = of(degrees.tensor) * of(degrees.context);
    let experts = of(degrees.expert) * of(degrees.expert_tensor);
    of(degrees.pipeline) * dense * experts.div_ceil(dense)
}

fn describe(case: &Case) -> String {
    let of = |degree: Option<u64>| degree.map_or("?".to_string(), |degree| degree.to_string());
    let degrees = &case.degrees;
    format!(
        "tp {} pp {} cp {} ep {} mbs {} gbs {}",
        of(degrees.tensor),
        of(degrees.pipeline),
        of(degrees.context),
        of(degrees.expert),
        of(degrees.micro_batch),
        of(case.global_batch)
    )
}

/// The format of products. Where none is printed: fp8 for NVIDIA's own frameworks, whose tables leave out what is their default.
fn precision(case: &Case) -> Precision {
    let own = ["megatron-bridge", "mlperf", "megatron-core"].iter().any(|name| case.mentions(name));
    names::precision(&case.precision).unwrap_or(if own { Precision::Fp8 } else { Precision::Bf16 })
}

fn training(case: &Case, model: &Architecture, compute: Precision, layout: &Parallelism) -> Training {
    let unit = layout.data * layout.micro_batch;
    let wanted = case.global_batch.map_or(unit * MICRO_BATCHES_A_STAGE * layout.pipeline, |b| b as usize);
    // Interleaved schedules take rounds of as many micro-batches as there are ranks.
    let unit = if layout.virtual_stages > 1 { unit * layout.pipeline } else { unit };
    Training {
        sequence: case.sequence.map_or(SEQUENCE, |sequence| sequence as usize),
        global_batch: wanted.div_ceil(unit) * unit,
        tokens: 1e12,
        compute,
        wire: if case.mentions("hai-llm") { Precision::Fp8 } else { Precision::Bf16 },
        optimizer: optimizer(case, model),
        routing: match case.kind {
            Kind::Golden => Routing::PowerLaw { exponent: TEST_SKEW },
            _ => Routing::Balanced,
        },
        dispatch: DispatchKind {
            deduplicated: deduplicates(case),
            overlapped: overlaps(case),
            padded: case.mentions("token-drop"),
        },
        trainable: if case.mentions("lora") { Trainable::Adapters } else { Trainable::All },
        software: software(case),
        habits: Habits {
            // Torchtitan compiles its loss since February 2025.
            compiled_loss: !case.source.contains("2024"),
            captured_attention: case.mentions("cudagraph"),
            experts_in_turn: golden::experts_in_turn(case),
        },
    }
}

/// Whether tokens are sent once to a server: where a library that does so is named, by the recipes of Megatron-Bridge, and in
/// Megatron-Core since it uses it.
fn deduplicates(case: &Case) -> bool {
    let named = ["deepep", "hybridep", "hai-llm"].iter().any(|name| case.mentions(name));
    named
        || recipe(case).is_some_and(|of| of.deduplicated)
        || case.framework.eq_ignore_ascii_case("Megatron-Core")
}

/// Whether tokens travel while another micro-batch computes.
fn overlaps(case: &Case) -> bool {
    let named = case.mentions("overlap") && !case.mentions("overlap off") && !case.mentions("no overlap");
    let set = recipe(case).is_some_and(|of| of.overlapped) || recipes::practises_overlap(case);
    named || case.mentions("hai-llm") || set
}

/// NVIDIA's recipes accumulate and reduce gradients in 16 bits; Megatron itself, and its tests, in 32. For models with latent attention
/// Megatron-Bridge's recipes keep moments in 16 bits, too.
fn optimizer(case: &Case, model: &Architecture) -> Optimizer {
    let of = |narrow: bool| if narrow { Precision::Bf16 } else { Precision::F32 };
    let latent = matches!(model.attention, Attention::Latent { .. });
    Optimizer {
        gradients: of(["nemo", "megatron-bridge", "maxtext"].iter().any(|name| case.mentions(name))),
        moments: of(latent && case.mentions("megatron-bridge")),
        ..Optimizer::default()
    }
}

/// The family of software, by the names of frameworks and releases.
fn software(case: &Case) -> Software {
    match () {
        () if case.kind == Kind::Golden && !golden::fused_attention(case) => Software::Megatron2021,
        () if case.framework.eq_ignore_ascii_case("DeepSpeed") => Software::DeepSpeed2021,
        () if case.mentions("megatron-deepspeed") => Software::Megatron2021,
        () if case.mentions("megatron-lm")
            && ["A100", "A800"].iter().any(|gpu| case.gpu.starts_with(gpu)) =>
        {
            Software::Megatron2021
        }
        () if case.mentions("llm-foundry") || case.framework.to_lowercase().starts_with("fsdp") => {
            Software::TorchEager
        }
        () if case.mentions("torchtitan") => Software::TorchCompiled,
        () if case.mentions("maxtext") || case.mentions("paxml") => Software::Xla,
        () if recipe(case).is_some_and(|of| of.whole_iterations) => Software::MegatronCoreGraphs,
        () => Software::MegatronCore,
    }
}

/// Every layout that the row may mean.
fn layouts(case: &Case, model: &Architecture, cluster: &Cluster) -> Vec<Parallelism> {
    let degrees = &case.degrees;
    let flat = fully_sharded(case) || case.mentions("tp+ep");
    let tensors = options(degrees.tensor, if fully_sharded(case) { &[1] } else { &[1, 2, 4, 8] });
    let pipelines = options(degrees.pipeline, if flat { &[1] } else { &[1, 2, 4, 8, 16] });
    let contexts = options(degrees.context, &[1]);
    let mut found = Vec::new();
    for &tensor in &tensors {
        for &pipeline in &pipelines {
            for &context in &contexts {
                let Some(grid) = fold(case, cluster.gpus, [tensor, pipeline, context]) else { continue };
                for expert in experts(case, model, cluster, &grid) {
                    for virtual_stages in interleavings(case, model, grid.pipeline) {
                        for micro_batch in micro_batches(case, model, &grid) {
                            for recompute in recomputations(case) {
                                found.push(Parallelism {
                                    expert,
                                    expert_tensor: expert_tensor(case, model, &grid, expert),
                                    virtual_stages,
                                    micro_batch,
                                    recompute,
                                    schedule: schedule(case, virtual_stages),
                                    ..grid
                                });
                            }
                        }
                    }
                }
            }
        }
    }
    found
}

fn options(printed: Option<u64>, otherwise: &[usize]) -> Vec<usize> {
    printed.map_or(otherwise.to_vec(), |degree| vec![degree as usize])
}

/// The grid of `[tensor, pipeline, context]` on so many GPUs. A pipeline degree that does not divide them is a misprint
/// (`PP=41` stands for PP=1); there are never more replicas than sequences: the context takes what is left.
fn fold(case: &Case, gpus: usize, [tensor, mut pipeline, mut context]: [usize; 3]) -> Option<Parallelism> {
    if !gpus.is_multiple_of(tensor * pipeline * context) {
        pipeline = 1;
    }
    if !gpus.is_multiple_of(tensor * pipeline * context) {
        return None;
    }
    let mut data = gpus / (tensor * pipeline * context);
    data = golden::most_replicas(case).map_or(data, |most| data.min(most as usize));
    while case.global_batch.is_some_and(|batch| data as u64 > batch) && data.is_multiple_of(2) {
        data /= 2;
        context *= 2;
    }
    let sequence_parallel = tensor > 1 && sequence_parallel(case);
    Some(Parallelism {
        tensor,
        pipeline,
        context,
        data,
        sequence_parallel,
        sharding: sharding(case),
        ..Parallelism::default()
    })
}

/// Megatron splits the sequence between tensor-parallel regions since 2022, and must for experts; its tests only where their name
/// says so.
fn sequence_parallel(case: &Case) -> bool {
    let old = case.mentions("megatron-deepspeed")
        || case.file.contains("2021")
        || case.file.contains("korthikanti");
    let named = case.mentions("+sp") || case.mentions("sequence_parallel");
    named || case.shape.experts.is_some() || !(old || case.kind == Kind::Golden)
}

fn schedule(case: &Case, virtual_stages: usize) -> ScheduleKind {
    match () {
        () if case.mentions("dualpipe") && virtual_stages == 2 => ScheduleKind::DualPipeV,
        () if case.is_zero_bubble() => ScheduleKind::ZeroBubble,
        () if virtual_stages > 1 => ScheduleKind::Interleaved,
        () => ScheduleKind::OneForwardOneBackward,
    }
}

/// As printed; else Megatron's distributed optimizer, but in the years before it and in tests that do not ask for it.
fn sharding(case: &Case) -> Sharding {
    let plain = case.mentions("megatron-deepspeed") || case.file.contains("korthikanti");
    match case.sharding {
        _ if fully_sharded(case) => Sharding::Zero3,
        Some(printed) => printed,
        None if plain || case.kind == Kind::Golden => Sharding::None,
        None => Sharding::Zero1,
    }
}

fn experts(case: &Case, model: &Architecture, cluster: &Cluster, grid: &Parallelism) -> Vec<usize> {
    let Some(moe) = &model.moe else { return vec![1] };
    let ranks = grid.tensor * grid.context * grid.data;
    let fits = |degree: &usize| moe.experts.is_multiple_of(*degree) && ranks.is_multiple_of(*degree);
    let printed = case.degrees.expert.map(|degree| degree as usize);
    if let Some(degree) = printed.filter(fits) {
        return vec![degree];
    }
    // AutoModel spreads experts over all ranks that share states.
    let spread = case.mentions("automodel");
    let widest = printed.unwrap_or(if spread { ranks } else { cluster.nvlink_domain().max(8) });
    let mut choices: Vec<usize> = (1..=widest.min(moe.experts)).filter(fits).collect();
    if printed.is_some() || spread {
        choices = choices.last().copied().into_iter().collect();
    }
    choices
}

/// As printed; else Megatron's habit before it folded experts, which is the tensor degree, or 1.
fn expert_tensor(case: &Case, model: &Architecture, grid: &Parallelism, expert: usize) -> usize {
    if model.moe.is_none() {
        return 1;
    }
    let before = case.kind == Kind::Golden || case.mentions("5d") || case.mentions("tp+ep");
    let wanted = case.degrees.expert_tensor.map_or(if before { grid.tensor } else { 1 }, |d| d as usize);
    let ranks = grid.tensor * grid.context * grid.data;
    if ranks.is_multiple_of(wanted * expert) { wanted } else { 1 }
}

/// Chunks of a pipeline rank: as printed; else any that gives chunks of equal size, for software that interleaves.
fn interleavings(case: &Case, model: &Architecture, pipeline: usize) -> Vec<usize> {
    if pipeline > 1 && case.mentions("dualpipe") {
        return vec![2];
    }
    if pipeline == 1 || case.not_interleaved {
        return vec![1];
    }
    if let Some(printed) = case.degrees.virtual_stages {
        return vec![printed as usize];
    }
    if case.mentions("interleaved1f1b") {
        return vec![2];
    }
    let never = ["megatron-deepspeed", "torchtitan", "simumax", "primus", "hai-llm", "deepspeed"];
    if case.kind == Kind::Golden || never.iter().any(|name| case.mentions(name)) {
        return vec![1];
    }
    let of_rank = model.layers / pipeline;
    // Llama 3 counts the embedding and the head as layers.
    let even = |chunks: &usize| {
        [model.layers, model.layers + 2].iter().any(|layers| layers.is_multiple_of(pipeline * chunks))
    };
    let mut choices: Vec<usize> = (1..=of_rank).filter(even).collect();
    if !choices.contains(&1) {
        choices.push(1);
    }
    choices
}

fn micro_batches(case: &Case, model: &Architecture, grid: &Parallelism) -> Vec<usize> {
    if let Some(recipe) = recipes::micro_batch(case, model.moe.is_some()) {
        return vec![recipe];
    }
    match case.degrees.micro_batch {
        Some(printed) => vec![printed as usize],
        // Torchtitan cuts a replica's batch into as many micro-batches as there are stages.
        None if case.mentions("torchtitan") => {
            let of_replica = case.global_batch.map(|batch| batch as usize / grid.data);
            vec![match of_replica {
                Some(of_replica) if grid.pipeline > 1 => (of_replica / grid.pipeline).max(1),
                Some(_) => 1,
                None => TITAN_SEQUENCES,
            }]
        }
        None if grid.pipeline > 1 => vec![1],
        None => vec![1, 2, 4, 8],
    }
}

fn recomputations(case: &Case) -> Vec<Recomputation> {
    let recipe = recipe(case).and_then(|of| of.recompute).or_else(|| recipes::best_practice(case));
    let recipe = recipe.filter(|_| case.recompute.is_empty());
    let text = recipe.map_or_else(|| case.recompute.to_lowercase(), str::to_string);
    if text.starts_with("full") {
        return vec![Recomputation::Full];
    }
    if text.contains("none") || case.kind == Kind::Golden && text.is_empty() {
        return vec![Recomputation::None];
    }
    let names: Vec<&str> = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').collect();
    let modules = Modules {
        // By itself, or where no list says otherwise; what is offloaded is not there either.
        core_attention: names.contains(&"core_attn")
            || text.starts_with("selective") && !text.contains('[')
            || case.mentions("offload"),
        mla_up_projection: names.contains(&"mla_up_proj"),
        // Torchtitan's selective recomputation keeps every other product.
        mlp: names.contains(&"mlp") || names.contains(&"sac") || case.mentions("torchtitan"),
        moe_activation: names.contains(&"moe_act"),
        moe: names.contains(&"moe"),
        layernorm: names.contains(&"layernorm"),
    };
    if modules != Modules::default() {
        return vec![Recomputation::Modules(modules)];
    }
    if !text.is_empty() {
        return vec![Recomputation::None];
    }
    // Megatron-Bridge's recipes for models with experts compute these again before they do whole layers.
    let parts = Modules {
        core_attention: false,
        mla_up_projection: true,
        mlp: true,
        moe_activation: true,
        moe: false,
        layernorm: true,
    };
    vec![Recomputation::None, Recomputation::SELECTIVE, Recomputation::Modules(parts), Recomputation::Full]
}
