//! The formulas with their numbers.

use std::iter::once;

use unisono_plan::Work;
use unisono_plan::collectives::places_touched;
use unisono_plan::schedule::ScheduleKind;
use unisono_plan::simulate::{StepParts, step_parts};

use super::answer::Answer;
use super::show;
use crate::screen::say;
use crate::style::{Paint, Scale, counted, grouped, table};

/// Prints how the figures come about.
pub fn print(answer: &Answer) {
    let paint = Paint::new(&std::io::stdout());
    let sections = [
        ("How: operations and parameters", counts(answer)),
        ("How: a layer of each kind, milliseconds a micro-batch", layers(answer)),
        ("How: pipeline", pipeline(answer)),
        ("How: dispatch", dispatch(answer)),
        ("How: checkpoints and money", money(answer)),
    ];
    for (title, lines) in sections {
        if !lines.is_empty() {
            say(&format!("\n{}\n{}\n", paint.strong(title), lines.join("\n")));
        }
    }
}

fn counts(answer: &Answer) -> Vec<String> {
    let (model, training) = (&answer.model, &answer.training);
    let flops = |causal, mtp| model.train_flops(training.sequence, causal, mtp) / 1e9;
    let (gpus, tokens) = (answer.chosen.layout.gpus() as f64, answer.outlook.tokens_per_s);
    vec![
        format!(
            "  GFLOP a token, forward and backward: causal {:.1}, without multi-token prediction {:.1}, all pairs {:.1}",
            flops(true, true),
            flops(true, false),
            flops(false, true)
        ),
        format!(
            "  TFLOP/s a GPU = {:.1} GFLOP x {} tokens/s / {gpus} GPUs = {:.0}",
            flops(true, true),
            grouped(tokens as u64),
            flops(true, true) * tokens / gpus / 1e3
        ),
    ]
}

fn layers(answer: &Answer) -> Vec<String> {
    let pricer = answer.pricer();
    let head = [
        "kind",
        "pass",
        "products",
        "experts",
        "attention",
        "memory",
        "tensor",
        "context",
        "dispatch",
        "kernels",
    ];
    let mut rows = vec![head.map(String::from).to_vec()];
    for ((kind, windowed), passes) in pricer.kinds().iter().zip(pricer.passes_by_kind(&answer.chosen.layout))
    {
        let window = if *windowed { ", windowed" } else { "" };
        let name = format!("{:?} + {:?}{window}", kind.mixer, kind.ffn);
        let works = [("forward", passes.forward), ("input", passes.input), ("weights", passes.weight)];
        rows.extend(works.into_iter().map(|(pass, work)| row(&name, pass, &work)));
    }
    table(&rows, 2)
}

fn row(kind: &str, pass: &str, work: &Work) -> Vec<String> {
    let seconds = [
        work.gemm_s,
        work.grouped_s,
        work.attention_s,
        work.memory_s,
        work.tensor_s,
        work.context_s,
        work.expert_s,
    ];
    let mut row = vec![kind.to_string(), pass.to_string()];
    row.extend(seconds.map(|seconds| format!("{:.3}", 1e3 * seconds)));
    row.push(format!("{:.0}", work.kernels));
    row
}

fn pipeline(answer: &Answer) -> Vec<String> {
    let (layout, training) = (&answer.chosen.layout, &answer.training);
    if layout.pipeline == 1 {
        return Vec::new();
    }
    let formula = match layout.schedule {
        ScheduleKind::OneForwardOneBackward => "(p-1)(F+B)",
        ScheduleKind::Interleaved => "(p-1)(F+B)/v",
        ScheduleKind::ZeroBubble => "(p-1)(F+I-W)",
        ScheduleKind::DualPipeV => "(p-1)(F&B+I-2W)/2 of both chunks of a rank",
    };
    let (step, closed) = (answer.simulate(), answer.closed_form());
    let mut lines = vec![
        format!(
            "  {}: bubble {formula}, B = I + W, p = {}, v = {}, {} micro-batches of {}: {:.3} s",
            layout.schedule.name(),
            layout.pipeline,
            layout.virtual_stages,
            layout.micro_batches(training),
            counted(layout.micro_batch as u64, "sequence"),
            closed.breakdown.bubble_s
        ),
        format!("  the step in closed form, which prunes the search, {:.3} s", closed.step_s),
    ];
    if let Ok(step) = step {
        lines.push(format!(
            "  the step simulated op by op {:.3} s; of it, in seconds of each rank:",
            step.simulated.seconds
        ));
        lines.extend(parts(&step_parts(&step.schedule, &step.simulated)));
    }
    lines
}

/// A line a pipeline rank, and their mean.
fn parts(ranks: &[StepParts]) -> Vec<String> {
    let mut rows = vec![once("rank").chain(StepParts::NAMES).map(String::from).collect::<Vec<_>>()];
    let mut mean = [0.0; StepParts::NAMES.len()];
    let row = |name: String, seconds: [f64; StepParts::NAMES.len()]| {
        once(name).chain(seconds.map(|seconds| format!("{seconds:.3}"))).collect::<Vec<_>>()
    };
    for (rank, parts) in ranks.iter().enumerate() {
        rows.push(row(rank.to_string(), parts.seconds()));
        mean.iter_mut().zip(parts.seconds()).for_each(|(mean, s)| *mean += s / ranks.len() as f64);
    }
    rows.push(row("mean".into(), mean));
    table(&rows, 1)
}

fn dispatch(answer: &Answer) -> Vec<String> {
    let (Some(moe), layout) = (&answer.model.moe, &answer.chosen.layout) else { return Vec::new() };
    if layout.expert == 1 {
        return Vec::new();
    }
    let width = answer.cluster.nvlink_domain().min(layout.expert);
    let servers = layout.expert.div_ceil(width);
    let limit = if moe.groups > 1 { moe.top_groups.clamp(1, servers) } else { servers };
    let ranks = places_touched(moe.experts, moe.top_k, layout.expert);
    let experts = moe.experts * limit / servers;
    let away = places_touched(experts, moe.top_k, limit) * (servers - 1) as f64 / servers as f64;
    vec![
        format!(
            "  copies of a row: {} to one rank each = {:.2} that leave; once a rank R(1 - C(E-E/R,k)/C(E,k)) = {ranks:.2} (E {}, k {}, R {})",
            moe.top_k,
            moe.top_k as f64 * (layout.expert - 1) as f64 / layout.expert as f64,
            moe.experts,
            moe.top_k,
            layout.expert,
        ),
        format!("  once a server, {limit} of {servers} servers at most: {away:.2} over the network"),
    ]
}

fn money(answer: &Answer) -> Vec<String> {
    let outlook = &answer.outlook;
    vec![
        format!(
            "  checkpoint interval (Young) sqrt(2 x {:.1} s x {:.0} s) = {:.0} s",
            outlook.checkpoint_s, outlook.failure_every_s, outlook.checkpoint_every_s
        ),
        format!(
            "  {} GPU-hours x ${:.2} / {:.3} of the time that trains = {}",
            show::hours(outlook.gpu_hours),
            answer.cluster.price_usd_per_gpu_hour,
            outlook.goodput,
            Scale::dollars(outlook.usd).write(outlook.usd)
        ),
    ]
}
