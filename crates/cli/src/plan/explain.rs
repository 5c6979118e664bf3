//! The formulas with their numbers.

use std::iter::once;

use serde_json::{Map, Value, json};
use unisono_plan::collectives::places_touched;
use unisono_plan::schedule::ScheduleKind;
use unisono_plan::simulate::{StepParts, step_parts};
use unisono_plan::{
    ExchangeTerms, IntervalTerms, LayerKind, Ranged, RankMemory, RankTensors, Sharding, Unit, Work,
};

use super::answer::Answer;
use super::{GIB, show, tensors};
use crate::screen::say;
use crate::style::{Paint, Scale, counted, figure, grouped, off, short, table, without_empty};

/// A heading and its lines; no lines where there is nothing to say.
type Section = (&'static str, Vec<String>);

fn sections(answer: &Answer) -> [Section; 14] {
    let ranks = tensors::ranks(answer);
    [
        ("parameters", parameters(answer)),
        ("operations", operations(answer)),
        ("a kernel", kernel(answer)),
        ("a layer of each kind, milliseconds a micro-batch", layers(answer)),
        ("exchanges, as if nothing hid them", exchanges(answer)),
        ("dispatch", dispatch(answer)),
        ("pipeline", pipeline(answer)),
        ("overhead", overhead(answer)),
        ("interval", interval(answer)),
        ("memory of the fullest rank, GiB", memory(answer, &ranks[answer.chosen.priced.worst_rank])),
        (
            "weights tensor by tensor, MiB of one on a GPU; by pipeline rank so many layers",
            tensors::parameters(answer, &ranks),
        ),
        (
            "what layers keep tensor by tensor, MiB of one; by pipeline rank layers x micro-batches that hold it",
            tensors::kept(answer, &ranks),
        ),
        ("what else pipeline ranks hold at the peak, MiB", tensors::others(answer, &ranks)),
        ("checkpoints and money", money(answer)),
    ]
}

/// Prints how the figures come about.
pub fn print(answer: &Answer) {
    let paint = Paint::new(&std::io::stdout());
    for (title, lines) in sections(answer) {
        if !lines.is_empty() {
            say(&format!("\n{}\n{}\n", paint.strong(&format!("How: {title}")), lines.join("\n")));
        }
    }
}

/// The same as lists of lines, by heading.
pub fn object(answer: &Answer) -> Value {
    let filled = sections(answer).into_iter().filter(|(_, lines)| !lines.is_empty());
    let trimmed = |lines: Vec<String>| lines.iter().map(|line| json!(line.trim())).collect::<Vec<_>>();
    Value::Object(
        filled.map(|(title, lines)| (title.to_string(), json!(trimmed(lines)))).collect::<Map<_, _>>(),
    )
}

/// Layers of each kind, and their parameters.
fn parameters(answer: &Answer) -> Vec<String> {
    let model = &answer.model;
    let mut kinds: Vec<(LayerKind, usize)> = Vec::new();
    for layer in 0..model.layers {
        let kind = model.kind(layer);
        match kinds.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, layers)) => *layers += 1,
            None => kinds.push((kind, 1)),
        }
    }
    let mut lines = Vec::new();
    for (kind, layers) in &kinds {
        let of = model.layer_parameters(*kind);
        let parts = [
            ("mixer", of.mixer + of.mixer_replicated),
            ("dense network", of.ffn),
            ("experts", of.experts),
            ("router", of.router),
            ("norms", of.norms),
        ];
        let written = parts.iter().filter(|(_, count)| *count > 0);
        let written: Vec<String> =
            written.map(|(name, count)| format!("{name} {}", short(*count as u64))).collect();
        let all = short((layers * of.total()) as u64);
        lines.push(format!(
            "  {} of {} x ({}) = {all}",
            counted(*layers as u64, "layer"),
            name(*kind),
            written.join(" + ")
        ));
    }
    let tables = if model.tied_embeddings { 1 } else { 2 };
    lines.push(format!(
        "  with {} of {} x {}: {}",
        counted(tables, "table"),
        grouped(model.vocab as u64),
        grouped(model.hidden as u64),
        short(model.parameters() as u64)
    ));
    if let Some(moe) = &model.moe {
        lines.push(format!(
            "  active: {} of {} routed experts, {}",
            moe.top_k,
            moe.experts,
            short(model.active_parameters() as u64)
        ));
    }
    lines
}

/// `Attention + Dense`
pub fn name(kind: LayerKind) -> String {
    format!("{:?} + {:?}", kind.mixer, kind.ffn)
}

fn operations(answer: &Answer) -> Vec<String> {
    let (model, training) = (&answer.model, &answer.training);
    let flops = |causal, mtp| figure(model.train_flops(training.sequence, causal, mtp) / 1e9);
    let without = match model.mtp_layers {
        0 => String::new(),
        _ => format!(", without multi-token prediction {}", flops(true, false)),
    };
    let (gpus, rate) = (answer.chosen.layout.gpus(), answer.outlook.tokens_per_s.value);
    vec![
        format!(
            "  GFLOP a token, forward and backward: causal {}{without}, all pairs {}",
            flops(true, true),
            flops(false, true)
        ),
        format!(
            "  TFLOP/s a GPU = {} GFLOP x {} tokens/s / {gpus} GPUs = {}",
            flops(true, true),
            grouped(rate as u64),
            figure(answer.flops_per_s_per_gpu().value / 1e12)
        ),
    ]
}

/// A product: the roofline, the efficiency of the tables, what training does to it.
fn kernel(answer: &Answer) -> Vec<String> {
    let terms = answer.pricer().kernel_terms(&answer.chosen.layout);
    let [m, n, k] = terms.product.sizes;
    let weights = match terms.product.experts > 1.0 {
        true => format!(" over {} experts of {n:.0} x {k:.0}", terms.product.experts),
        false => format!(" by {n:.0} x {k:.0}"),
    };
    let (flops, bytes) = (figure(terms.product.flops / 1e9), figure(terms.product.bytes / 1e6));
    vec![
        format!(
            "  {}, {}: {m:.0} rows{weights}, {flops} GFLOP, {bytes} MB",
            terms.name, answer.training.compute
        ),
        format!(
            "  roofline max({flops} GFLOP / {} TFLOP/s, {bytes} MB / {} TB/s) = {} ms",
            figure(terms.peak_flops / 1e12),
            figure(terms.peak_bytes_per_s / 1e12),
            figure(1e3 * terms.roofline_s())
        ),
        format!(
            "  / {} (efficiency in the tables) x {} (calibrated) = {} ms",
            figure(terms.efficiency),
            figure(terms.factor),
            figure(1e3 * terms.seconds)
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
        let name = format!("{}{window}", name(*kind));
        let works = [("forward", passes.forward), ("input", passes.input), ("weights", passes.weight)];
        rows.extend(works.into_iter().map(|(pass, work)| row(&name, pass, &work)));
    }
    table(&without_empty(rows, "0.000"), 2)
}

fn exchanges(answer: &Answer) -> Vec<String> {
    let terms = answer.pricer().exchange_terms(&answer.chosen.layout);
    if terms.is_empty() {
        return Vec::new();
    }
    let mut rows = vec![
        ["axis", "what", "ranks x apart", "MB", "(latency + size / bandwidth) x calibrated", "ms"]
            .map(String::from)
            .to_vec(),
    ];
    rows.extend(terms.iter().map(|terms| exchange(answer, terms)));
    table(&rows, 5)
}

fn exchange(answer: &Answer, terms: &ExchangeTerms) -> Vec<String> {
    let levels = answer.traffic.levels.iter().zip(&terms.bytes).filter(|(_, bytes)| **bytes > 0.0);
    let over: Vec<String> = levels.map(|(level, bytes)| format!("{level} {}", figure(bytes / 1e6))).collect();
    vec![
        terms.axis.name().to_string(),
        terms.what.to_string(),
        format!("{} x {}", terms.ranks, terms.stride),
        over.join(", "),
        format!(
            "({} ms + {} MB / {} GB/s of {}) x {}",
            figure(1e3 * terms.latency_s),
            figure(terms.waited_bytes() / 1e6),
            figure(terms.bytes_per_s() / 1e9),
            answer.traffic.levels[terms.level],
            figure(terms.factor)
        ),
        figure(1e3 * terms.seconds),
    ]
}

fn overhead(answer: &Answer) -> Vec<String> {
    let terms = answer.pricer().overhead_terms(&answer.chosen.layout);
    let overhead_s = answer.chosen.priced.breakdown.overhead_s;
    vec![format!(
        "  {:.3} s once + {:.4} x log2({}) x {} s of the rest in closed form = {} s",
        terms.once_s,
        terms.straggler,
        counted(terms.servers as u64, "server"),
        figure(terms.rest_s),
        figure(overhead_s)
    )]
}

fn interval(answer: &Answer) -> Vec<String> {
    let priced = &answer.chosen.priced;
    let terms = answer.pricer().interval_terms(&priced.breakdown);
    let bytes = priced.bytes();
    let band = (bytes.interval[1] / bytes.value).ln();
    vec![
        format!(
            "  step x or / exp({:.4} x sqrt({:.3}^2 of families left out + {:.3}^2 of borrowed kernels)) = {:.3}: {} to {} s",
            IntervalTerms::QUANTILE,
            terms.fit,
            terms.borrowed,
            terms.spread(),
            figure(priced.interval_s[0]),
            figure(priced.interval_s[1])
        ),
        format!("  memory x or / exp({band:.3}): {} GiB", show::gib(bytes)),
        format!(
            "  parts x or / exp({:.4} x sqrt(sum of squares)) of the spreads of tables, constants, borrowed kernels and of all parts together:",
            IntervalTerms::QUANTILE
        ),
    ]
    .into_iter()
    .chain(spreads(answer))
    .collect()
}

/// A line a part: the spreads that make its interval, with their head.
fn spreads(answer: &Answer) -> Vec<String> {
    let breakdown = &answer.chosen.priced.breakdown;
    let parts = breakdown.parts().into_iter().zip(answer.pricer().part_terms(breakdown));
    let mut rows = vec![["part", "tables", "constants", "borrowed", "all", "80%"].map(String::from).to_vec()];
    rows.extend(parts.filter(|((_, seconds), _)| *seconds > 0.0).map(|((name, _), terms)| {
        let spreads = [terms.table, terms.constants, terms.borrowed, terms.common];
        let spreads = spreads.map(|spread| format!("{spread:.3}"));
        once(name.to_string()).chain(spreads).chain([off(Ranged::around(1.0, terms.spread()))]).collect()
    }));
    table(&rows, 1)
}

/// The terms of the fullest rank's memory.
fn memory(answer: &Answer, tensors: &RankTensors) -> Vec<String> {
    let (priced, layout) = (&answer.chosen.priced, &answer.chosen.layout);
    let (memory, pricer) = (&priced.memory, answer.pricer());
    let terms = pricer.memory_terms(layout, priced.worst_rank);
    let state = |bytes: f64, width: f64| match width > 0.0 {
        true => format!("{width} B x {}", short((bytes / width) as u64)),
        false => "none".into(),
    };
    let [weight, gradient, optimizer] = terms.widths;
    let [dense, experts] = terms.parameters.map(|count| short(count as u64));
    let held = match answer.model.moe {
        Some(_) => format!("{dense} and {experts} in experts"),
        None => dense,
    };
    let sharded = match layout.sharding {
        Sharding::None => "not sharded",
        Sharding::Zero1 => "optimizer sharded",
        Sharding::Zero2 => "optimizer and gradients sharded",
        Sharding::Zero3 => "all sharded",
    };
    // Of each kind of layer: how many times micro-batches in flight, and bytes of one.
    let by_layer = |part: &str| {
        let mut sums: Vec<(Unit, usize, f64)> = Vec::new();
        for of in tensors.held.iter().filter(|of| of.part == part && of.count > 0) {
            match sums.iter_mut().find(|(unit, count, _)| (*unit, *count) == (of.unit, of.count)) {
                Some((_, _, bytes)) => *bytes += of.bytes,
                None => sums.push((of.unit, of.count, of.bytes)),
            }
        }
        let sums = sums.iter().map(|(_, count, bytes)| format!("{count} x {}", figure(bytes / GIB)));
        sums.collect::<Vec<_>>().join(" + ")
    };
    let rows = [
        (
            "weights",
            memory.weights,
            format!("{}; the rank holds {held}; {sharded}", state(memory.weights, weight)),
        ),
        ("gradients", memory.gradients, state(memory.gradients, gradient)),
        ("optimizer", memory.optimizer, state(memory.optimizer, optimizer)),
        (
            "activations",
            memory.activations,
            format!("layers x micro-batches in flight: {}", by_layer("activations")),
        ),
        ("dispatch", memory.dispatch, format!("{}, at the 95th percentile of routing", by_layer("dispatch"))),
        ("operands", memory.operands, format!("weight gradients that wait: {}", by_layer("operands"))),
        ("temporary", memory.temporary, "of the layer that needs most".into()),
        ("logits", memory.logits, "the peak is in the loss".into()),
        ("communication", memory.communication.total(), communication(memory)),
        ("workspace", memory.workspace, "libraries of products".into()),
        (
            "fragmentation",
            memory.fragmentation,
            format!(
                "{:.2} x what comes and goes: activations to logits, buckets, what stages received",
                RankMemory::FRAGMENTATION
            ),
        ),
        ("context", memory.context, "of the process, before it allocates anything".into()),
    ];
    let filled = rows.into_iter().filter(|(_, bytes, _)| *bytes > 0.0);
    let mut rows: Vec<Vec<String>> =
        filled.map(|(name, bytes, how)| vec![name.into(), how, figure(bytes / GIB)]).collect();
    let at = format!("pipeline rank {}", priced.worst_rank);
    rows.push(vec!["all".into(), at, figure(memory.total() / GIB)]);
    table(&rows, 2)
}

/// `received by stages 0.1 + channels 1.0`
fn communication(memory: &RankMemory) -> String {
    let of = &memory.communication;
    let parts = [("buckets", of.buckets), ("received by stages", of.received), ("channels", of.channels)];
    let filled = parts.into_iter().filter(|(_, bytes)| *bytes > 0.0);
    let written: Vec<String> =
        filled.map(|(name, bytes)| format!("{name} {}", figure(bytes / GIB))).collect();
    written.join(" + ")
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
            "  {}: bubble {formula}, B = I + W, p = {}, v = {}, {} micro-batches of {}",
            layout.schedule.name(),
            layout.pipeline,
            layout.virtual_stages,
            layout.micro_batches(training),
            counted(layout.micro_batch as u64, "sequence"),
        ),
        format!("  {}, where ranks wait for longer ones {:.4} s", bubble(answer), closed.breakdown.bubble_s),
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

/// The formula of the schedule's bubble with its numbers.
fn bubble(answer: &Answer) -> String {
    let layout = &answer.chosen.layout;
    let terms = answer.pricer().bubble_terms(layout);
    let [f, i, w, both] = [terms.forward_s, terms.input_s, terms.weight_s, terms.overlapped_s]
        .map(|seconds| format!("{seconds:.4}"));
    let waits = layout.pipeline - 1;
    let formula = match layout.schedule {
        ScheduleKind::OneForwardOneBackward => format!("{waits} x ({f} + {i} + {w})"),
        ScheduleKind::Interleaved => format!("{waits} x ({f} + {i} + {w}) / {}", layout.virtual_stages),
        ScheduleKind::ZeroBubble => format!("{waits} x ({f} + {i} - {w})"),
        ScheduleKind::DualPipeV => format!("{waits} x ({both} + {i} - 2 x {w}) / 2"),
    };
    let together = match layout.schedule {
        ScheduleKind::DualPipeV => format!(", F&B {both} s"),
        _ => String::new(),
    };
    format!(
        "F {f} s, I {i} s, W {w} s{together} of the rank that has most to do: {formula} = {:.4} s",
        terms.even_s
    )
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
    let mut lines = vec![format!(
        "  copies of a row: {} to one rank each = {:.2} that leave; once a rank R(1 - C(E-E/R,k)/C(E,k)) = {ranks:.2} (E {}, k {}, R {})",
        moe.top_k,
        moe.top_k as f64 * (layout.expert - 1) as f64 / layout.expert as f64,
        moe.experts,
        moe.top_k,
        layout.expert,
    )];
    if servers > 1 {
        lines.push(format!(
            "  once a server, {limit} of {servers} servers at most: {away:.2} over the network"
        ));
    }
    lines
}

fn money(answer: &Answer) -> Vec<String> {
    let outlook = &answer.outlook;
    let dollars = Scale::dollars(outlook.usd.value);
    vec![
        if outlook.fails() {
            format!(
                "  checkpoint interval (Young) sqrt(2 x {:.1} s x {:.0} s) = {:.0} s",
                outlook.checkpoint_s, outlook.failure_every_s.value, outlook.checkpoint_every_s.value
            )
        } else {
            "  no failures, hence no checkpoints".into()
        },
        format!(
            "  {} GPU-hours x ${:.2} / {:.3} of the time that trains = {}",
            show::whole_hours(outlook.gpu_hours.value),
            answer.cluster.price_usd_per_gpu_hour,
            outlook.goodput.value,
            dollars.write(outlook.usd.value)
        ),
    ]
}
