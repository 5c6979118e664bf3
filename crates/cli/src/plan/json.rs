//! The answer as JSON. Seconds, bytes and dollars, whatever the terminal shows.

use serde_json::{Map, Value, json};
use unisono_plan::kernels::{Kernel, KernelModel};
use unisono_plan::search::Plan;
use unisono_plan::simulate::{StepParts, step_parts};
use unisono_plan::{Axis, Cluster, Level, Outlook, Ranged, RankMemory, bottleneck};

use super::answer::Answer;
use super::{show, tensors};

/// One object.
pub fn object(answer: &Answer) -> Value {
    let (what, share) = bottleneck(&answer.chosen.priced);
    let kernels = KernelModel::of(&answer.cluster.gpu);
    let precision = answer.training.compute;
    let origin = |kernel| {
        let precision = if matches!(kernel, Kernel::Attention) { precision.wide() } else { precision };
        kernels.origin(kernel, precision).to_string()
    };
    json!({
        "model": {
            "name": answer.model.name,
            "parameters": answer.model.parameters(),
            "active_parameters": answer.model.active_parameters(),
        },
        "cluster": cluster(&answer.cluster),
        "training": answer.training,
        "measured": {
            "products": origin(Kernel::Gemm),
            "attention": origin(Kernel::Attention),
            "experts": origin(Kernel::GroupedGemm),
        },
        "searched": answer.found.as_ref().map(|found| json!({
            "priced": found.priced,
            "feasible": found.feasible,
            "front": found.front.iter().map(|found| plan(answer, found)).collect::<Vec<_>>(),
        })),
        "chosen": plan(answer, &answer.chosen),
        "riskier": answer.riskier().map(|riskier| plan(answer, riskier)),
        "nearest_that_fits": answer.nearest_that_fits.map(|layout| layout.to_string()),
        "tflops_per_gpu": answer.flops_per_s_per_gpu().value / 1e12,
        "tflops_per_gpu_interval_80": answer.flops_per_s_per_gpu().times(1e-12).interval,
        "share_of_bf16_peak": answer.model_flops_share().value,
        "share_of_bf16_peak_interval_80": answer.model_flops_share().interval,
        "routing": answer.uneven.map(|uneven| json!({
            "fullest_rank_p50": uneven.rows.p50,
            "fullest_rank_p95": uneven.rows.p95,
            "step_even_s": uneven.even_step.value,
            "step_even_interval_80_s": uneven.even_step.interval,
            "step_p50_s": answer.chosen.priced.step_s,
            "step_p50_interval_80_s": answer.chosen.priced.interval_s,
            "step_p95_s": uneven.slow_step.value,
            "step_p95_interval_80_s": uneven.slow_step.interval,
            "memory_even_bytes": uneven.even_bytes.value,
            "memory_even_interval_80_bytes": uneven.even_bytes.interval,
            "memory_p50_bytes": uneven.median_bytes.value,
            "memory_p50_interval_80_bytes": uneven.median_bytes.interval,
            "memory_p95_bytes": answer.chosen.priced.bytes().value,
            "memory_p95_interval_80_bytes": answer.chosen.priced.bytes().interval,
        })),
        "breakdown_s": parts(&answer.chosen.priced.breakdown.parts()),
        "breakdown_interval_80_s": intervals(answer),
        "simulated": simulated(answer),
        "hidden_communication_s": answer.chosen.priced.breakdown.all_hidden_s(),
        "communication": communication(answer),
        "memory_bytes_by_pipeline_rank": answer.memory.iter().map(memory).collect::<Vec<_>>(),
        "tensors_by_pipeline_rank": tensors::object(answer),
        "sent_bytes_per_gpu": traffic(answer),
        "run": run(answer),
        "limit": {"what": what, "share": share},
        "changes": answer.changes.iter().map(|change| json!({
            "what": change.what,
            "step_s": change.step.value,
            "step_interval_80_s": change.step.interval,
            "saves": change.saves,
        })).collect::<Vec<_>>(),
    })
}

/// GPUs and every level of their network, innermost first.
fn cluster(cluster: &Cluster) -> Value {
    let level = |level: &Level| {
        json!({
            "name": level.name,
            "width": level.width,
            "bytes_per_s": level.bytes_per_s,
            "latency_s": level.latency_s,
            "oversubscription": level.oversubscription,
        })
    };
    json!({
        "gpu": cluster.gpu.label(),
        "gpus": cluster.gpus,
        "per_server": cluster.per_server,
        "nvlink_domain": cluster.nvlink_domain(),
        "levels": cluster.levels.iter().map(level).collect::<Vec<_>>(),
        "usd_per_gpu_hour": cluster.price_usd_per_gpu_hour,
        "failures_per_gpu_hour": cluster.failures_per_gpu_hour,
    })
}

/// What each axis crosses and takes: on the slowest pipeline rank, as far as nothing hides it and under kernels.
fn communication(answer: &Answer) -> Value {
    let spreads = answer.pricer().axis_spreads(&answer.chosen.priced.breakdown);
    let axes = show::communication(answer).into_iter().map(|(axis, [exposed_s, hidden_s])| {
        let levels = answer.traffic.levels.iter().zip(&answer.traffic.bytes[axis as usize]);
        let crosses: Vec<&String> =
            levels.filter(|(_, bytes)| **bytes > 0.0).map(|(level, _)| level).collect();
        let by_link =
            answer.traffic.levels.iter().zip(&answer.communication[axis as usize]).map(|(level, of)| {
                (level.clone(), json!({"exposed_s": of.exposed_s, "hidden_s": of.hidden_s}))
            });
        let of = json!({
            "crosses": crosses,
            "exposed_s": exposed_s,
            "hidden_s": hidden_s,
            "exposed_interval_80_s": Ranged::around(exposed_s, spreads[axis as usize]).interval,
            "hidden_interval_80_s": Ranged::around(hidden_s, spreads[axis as usize]).interval,
            "by_link": Value::Object(by_link.collect()),
        });
        (axis.name().to_string(), of)
    });
    Value::Object(axes.collect())
}

/// Of the parts of the step.
fn intervals(answer: &Answer) -> Value {
    let parts = answer.pricer().ranged_parts(&answer.chosen.priced.breakdown);
    Value::Object(
        parts.into_iter().map(|(name, seconds)| (name.to_string(), json!(seconds.interval))).collect(),
    )
}

fn parts(parts: &[(&'static str, f64)]) -> Value {
    Value::Object(parts.iter().map(|(name, value)| (name.to_string(), json!(value))).collect::<Map<_, _>>())
}

/// The step op by op: where the time of every pipeline rank goes.
fn simulated(answer: &Answer) -> Option<Value> {
    let step = answer.simulate().ok()?;
    let of_rank =
        |rank: &StepParts| parts(&StepParts::NAMES.into_iter().zip(rank.seconds()).collect::<Vec<_>>());
    let ranks: Vec<Value> = step_parts(&step.schedule, &step.simulated).iter().map(of_rank).collect();
    Some(json!({"step_s": step.simulated.seconds, "parts_s_by_pipeline_rank": ranks}))
}

/// A layout with its price.
pub fn plan(answer: &Answer, plan: &Plan) -> Value {
    let outlook = Outlook::of(&plan.priced, &answer.cluster, &plan.layout, &answer.training);
    json!({
        "layout": plan.layout.to_string(),
        "gpus": plan.layout.gpus(),
        "step_s": plan.priced.step_s,
        "interval_80_s": plan.priced.interval_s,
        "memory_bytes": plan.priced.bytes().value,
        "memory_interval_80_bytes": plan.priced.bytes().interval,
        "free_bytes": plan.headroom_bytes,
        "free_interval_80_bytes": show::free(answer, plan.priced.bytes()).interval,
        "fits": plan.priced.fits,
        "fit_probability": plan.fit_probability,
        "days": outlook.days.value,
        "days_interval_80": outlook.days.interval,
        "usd": outlook.usd.value,
        "usd_interval_80": outlook.usd.interval,
    })
}

fn memory(memory: &RankMemory) -> Value {
    let mut object = parts(&memory.parts());
    object["total"] = json!(memory.total());
    object
}

fn traffic(answer: &Answer) -> Value {
    let axes = Axis::ALL.map(|axis| {
        let levels = answer.traffic.levels.iter().zip(&answer.traffic.bytes[axis as usize]);
        let levels = levels.map(|(level, bytes)| (level.clone(), json!(bytes))).collect::<Map<_, _>>();
        (axis.name().to_string(), Value::Object(levels))
    });
    Value::Object(axes.into_iter().collect())
}

fn run(answer: &Answer) -> Value {
    let (outlook, training) = (&answer.outlook, &answer.training);
    let mut object = json!({
        "steps": outlook.steps,
        "checkpoint_s": outlook.checkpoint_s,
        "failures_are_rare": outlook.failures_are_rare,
    });
    let ranged = [
        ("failure_every_s", outlook.failure_every_s),
        ("checkpoint_every_s", outlook.checkpoint_every_s),
        ("goodput", outlook.goodput),
        ("tokens_per_s", outlook.tokens_per_s),
        ("gpu_hours", outlook.gpu_hours),
        ("gpu_hours_per_trillion_tokens", outlook.gpu_hours_per_trillion(training)),
        ("days", outlook.days),
        ("usd", outlook.usd),
        ("usd_without_failures", outlook.usd_without_failures),
        ("usd_per_trillion_tokens", outlook.usd_per_trillion(training)),
    ];
    for (name, of) in ranged {
        object[name] = json!(of.value);
        object[format!("{name}_interval_80")] = json!(of.interval);
    }
    object
}
