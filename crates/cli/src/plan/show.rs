//! The answer for a terminal.

use unisono_plan::kernels::{Kernel, KernelModel};
use unisono_plan::search::Plan;
use unisono_plan::{Axis, Outlook, Place, bottleneck};

use super::GIB;
use super::answer::{Answer, SAFE};
use crate::screen::say;
use crate::style::{Paint, Scale, bar, counted, duration, grouped, percent, short, table};

/// Everything about the chosen layout, after a table of the best.
pub fn print(answer: &Answer, rows: usize) {
    let paint = Paint::new(&std::io::stdout());
    let heading = |text: &str| say(&format!("\n{}\n", paint.strong(text)));
    let lines = |lines: Vec<String>| say(&format!("{}\n", lines.join("\n")));
    say(&format!("{}\n", header(answer)));
    say(&format!("{}\n", paint.faint(&origin(answer))));
    if let Some(found) = &answer.found {
        heading("Best layouts: no other is better in time, headroom and cost at once");
        lines(plans(answer, &found.front[..rows.min(found.front.len())]));
        let (fit, all) = (grouped(found.feasible as u64), grouped(found.priced as u64));
        say(&format!("  {}\n", paint.faint(&format!("{fit} of {all} layouts fit"))));
    }
    heading(&format!("Chosen: {}; 80% intervals in brackets", answer.chosen.layout));
    lines(step(answer));
    heading("The step, on the slowest pipeline rank");
    lines(breakdown(answer));
    heading("Memory by pipeline rank, GiB");
    lines(memory(answer));
    heading("Bytes that a GPU sends in a step, GB");
    lines(traffic(answer));
    heading("The run");
    lines(run(answer));
    let (what, share) = bottleneck(&answer.chosen.priced);
    heading(&format!("What limits it: {what}, {} of the step", percent(share)));
    lines(advice(answer));
    if !answer.chosen.priced.fits {
        say(&format!("\n{}\n", paint.red(&does_not_fit(answer))));
    }
}

/// Model, cluster and training in two lines.
pub fn header(answer: &Answer) -> String {
    let (model, cluster) = (&answer.model, &answer.cluster);
    let network = match &cluster.levels[1..] {
        [] => String::new(),
        [.., outer] => {
            let rate = format!(", {} GB/s {}", (outer.bytes_per_s / 1e9).round(), outer.name);
            let shared = outer.oversubscription > 1.0;
            if shared { format!("{rate} shared by {}", outer.oversubscription) } else { rate }
        }
    };
    format!(
        "{}: {} parameters, {} active. {} {}, {} GB/s {} within {}{network}.\n{}",
        model.name,
        short(model.parameters() as u64),
        short(model.active_parameters() as u64),
        grouped(cluster.gpus as u64),
        cluster.gpu.name,
        (cluster.levels[0].bytes_per_s / 1e9).round(),
        cluster.levels[0].name,
        cluster.nvlink_domain(),
        training(answer),
    )
}

/// The training in a line.
pub fn training(answer: &Answer) -> String {
    let (compute, rows) = (answer.training.compute, answer.training.row_format());
    format!("{}, products in {compute}, rows to experts in {rows}.", batches(answer))
}

/// How much is read: `14.8 T tokens, 15,360 x 4,096 a step`.
pub fn batches(answer: &Answer) -> String {
    let training = &answer.training;
    let [batch, sequence] = [training.global_batch, training.sequence].map(|number| grouped(number as u64));
    format!("{} tokens, {batch} x {sequence} a step", tokens(training.tokens))
}

/// Whose measurements the prediction rests on.
pub fn origin(answer: &Answer) -> String {
    let kernels = KernelModel::of(&answer.cluster.gpu);
    let precision = answer.training.compute;
    format!(
        "products {}; attention {}; experts {}",
        kernels.origin(Kernel::Gemm, precision),
        kernels.origin(Kernel::Attention, precision.wide()),
        kernels.origin(Kernel::GroupedGemm, precision)
    )
}

/// `14.8 T`
pub fn tokens(number: f64) -> String {
    if number >= 1e12 { format!("{} T", round(number / 1e12)) } else { short(number as u64) }
}

fn round(number: f64) -> f64 {
    (number * 100.0).round() / 100.0
}

fn plans(answer: &Answer, plans: &[Plan]) -> Vec<String> {
    let outlook = |plan: &Plan| Outlook::of(&plan.priced, &answer.cluster, &plan.layout, &answer.training);
    let outlooks: Vec<Outlook> = plans.iter().map(outlook).collect();
    let (days, dollars) = scales(&outlooks);
    let head = ["layout", "GPUs", "step", "80% interval", "free GiB", "fits", days.name, dollars.name];
    let mut rows = vec![head.map(String::from).to_vec()];
    rows.extend(plans.iter().zip(&outlooks).map(|(plan, outlook)| {
        vec![
            plan.layout.to_string(),
            grouped(plan.layout.gpus() as u64),
            duration(plan.priced.step_s),
            interval(plan.priced.interval_s),
            format!("{:.1}", plan.headroom_bytes / GIB),
            percent(answer.fit_probability(plan)),
            days.number(outlook.days, 1),
            dollars.number(outlook.usd, 2),
        ]
    }));
    table(&rows, 1)
}

/// The units of a table's days and dollars.
pub fn scales<'a>(outlooks: impl IntoIterator<Item = &'a Outlook>) -> (Scale, Scale) {
    let most = outlooks
        .into_iter()
        .fold([0.0f64; 2], |[days, usd], outlook| [days.max(outlook.days), usd.max(outlook.usd)]);
    (Scale::days(most[0]), Scale::dollars(most[1]))
}

fn interval([low, high]: [f64; 2]) -> String {
    format!("{} to {}", duration(low), duration(high))
}

/// The unit of the chosen step and of what it consists of.
fn seconds(answer: &Answer) -> Scale {
    Scale::seconds(answer.chosen.priced.step_s)
}

/// The 80% interval of tokens per second.
fn rates(answer: &Answer) -> String {
    let [fast, slow] = answer.chosen.priced.interval_of(1.0).map(|times| answer.outlook.tokens_per_s / times);
    format!("{} to {}", grouped(slow as u64), grouped(fast as u64))
}

fn step(answer: &Answer) -> Vec<String> {
    let (priced, scale) = (&answer.chosen.priced, seconds(answer));
    let [least, most] = priced.memory_interval().map(|bytes| bytes / GIB);
    let mut lines = vec![
        format!("  step {} ({})", scale.write(priced.step_s), scale.range(priced.interval_s)),
        format!(
            "  {} tokens/s ({}), {:.0} TFLOP/s a GPU (causal, recomputation not counted), {} of the bf16 peak",
            grouped(answer.outlook.tokens_per_s as u64),
            rates(answer),
            answer.flops_per_s_per_gpu() / 1e12,
            percent(answer.model_flops_share())
        ),
        format!(
            "  {:.1} ({least:.1} to {most:.1}) of {:.1} GiB on the fullest GPU (pipeline rank {}), {:.1} GiB free: fits with a \
             probability of {}",
            priced.memory.total() / GIB,
            answer.cluster.gpu.memory_bytes / GIB,
            priced.worst_rank,
            answer.chosen.headroom_bytes / GIB,
            percent(answer.fit_probability(&answer.chosen))
        ),
    ];
    if let Some(safer) = answer.safer() {
        lines.push(format!(
            "  the fastest that fits with a probability of {} or more: {}, {}, {:.1} GiB free",
            percent(SAFE),
            safer.layout,
            scale.write(safer.priced.step_s),
            safer.headroom_bytes / GIB
        ));
    }
    if let Some(uneven) = answer.uneven() {
        lines.push(format!(
            "  uneven routing: the fullest of {} expert-parallel ranks gets {:.2} times its share in the median step, {:.2} times in one \
             of twenty, which takes {}; memory is for the latter; evenly, {} and {:.1} GiB",
            answer.chosen.layout.expert,
            uneven.rows.p50,
            uneven.rows.p95,
            scale.write(uneven.slow_step_s),
            scale.write(uneven.even_step_s),
            uneven.even_bytes / GIB
        ));
    }
    lines
}

fn breakdown(answer: &Answer) -> Vec<String> {
    let (priced, scale) = (&answer.chosen.priced, seconds(answer));
    let mut rows: Vec<Vec<String>> = priced
        .breakdown
        .parts()
        .into_iter()
        .filter(|(_, seconds)| *seconds > 0.0)
        .map(|(name, seconds)| {
            let share = seconds / priced.step_s;
            vec![name.into(), bar(share, 30), scale.write(seconds), format!("{:.1}%", 100.0 * share)]
        })
        .collect();
    let hidden = scale.write(priced.breakdown.hidden_s);
    rows.push(vec!["hidden communication".into(), "under kernels".into(), hidden, String::new()]);
    table(&rows, 2)
}

fn memory(answer: &Answer) -> Vec<String> {
    let mut head = vec!["rank".to_string()];
    head.extend(answer.memory[0].parts().map(|(name, _)| name.to_string()));
    head.extend(["total", "free"].map(String::from));
    let mut rows = vec![head];
    for rank in shown_ranks(answer) {
        let memory = &answer.memory[rank];
        let mut row = vec![rank.to_string()];
        row.extend(memory.parts().map(|(_, bytes)| format!("{:.1}", bytes / GIB)));
        row.push(format!("{:.1}", memory.total() / GIB));
        row.push(format!("{:.1}", (answer.cluster.gpu.memory_bytes - memory.total()) / GIB));
        rows.push(row);
    }
    table(&rows, 1)
}

/// All ranks of a short pipeline; of a long one the ends and the fullest.
fn shown_ranks(answer: &Answer) -> Vec<usize> {
    let ranks = answer.memory.len();
    (0..ranks)
        .filter(|rank| {
            ranks <= 8 || *rank < 3 || *rank + 3 > ranks || *rank == answer.chosen.priced.worst_rank
        })
        .collect()
}

fn traffic(answer: &Answer) -> Vec<String> {
    let traffic = &answer.traffic;
    let mut head = vec!["axis".to_string()];
    head.extend(traffic.levels.iter().cloned());
    let mut rows = vec![head];
    for axis in Axis::ALL {
        let bytes = &traffic.bytes[axis as usize];
        if bytes.iter().sum::<f64>() > 0.0 {
            let mut row = vec![axis.name().to_string()];
            row.extend(bytes.iter().map(|bytes| format!("{:.2}", bytes / 1e9)));
            rows.push(row);
        }
    }
    let mut sum = vec!["all".to_string()];
    sum.extend((0..traffic.levels.len()).map(|level| format!("{:.2}", traffic.of_level(level) / 1e9)));
    rows.push(sum);
    table(&rows, 1)
}

/// What is said where checkpoints, days and dollars mean little.
pub const TOO_MANY_FAILURES: &str = "failures come so often that a restart or the interval between checkpoints is no small part of the \
                                     time between them: Young's formula does not hold, days and dollars are guesses";

fn run(answer: &Answer) -> Vec<String> {
    let (outlook, training, priced) = (&answer.outlook, &answer.training, &answer.chosen.priced);
    let (days, dollars) = scales([outlook]);
    let mut lines = vec![
        format!(
            "  {}, {} GPU-hours of training, {} a trillion tokens",
            counted(outlook.steps as u64, "step"),
            hours(outlook.gpu_hours),
            grouped(outlook.gpu_hours_per_trillion(training) as u64)
        ),
        format!(
            "  a failure every {}, a checkpoint every {} ({} each): {} of the time trains",
            duration(outlook.failure_every_s),
            duration(outlook.checkpoint_every_s),
            duration(outlook.checkpoint_s),
            percent(outlook.goodput)
        ),
        format!(
            "  {} ({}) and {} ({}) at ${:.2} a GPU-hour ({} of it trains), ${} a trillion tokens",
            days.write(outlook.days),
            days.range(priced.interval_of(outlook.days)),
            dollars.write(outlook.usd),
            dollars.range(priced.interval_of(outlook.usd)),
            answer.cluster.price_usd_per_gpu_hour,
            dollars.write(outlook.usd_without_failures),
            grouped(outlook.usd_per_trillion(training) as u64)
        ),
    ];
    if !outlook.failures_are_rare {
        lines.push(format!("  {TOO_MANY_FAILURES}"));
    }
    lines
}

/// GPU-hours, whole where there are many.
pub fn hours(hours: f64) -> String {
    if hours < 10.0 { format!("{hours:.2}") } else { grouped(hours as u64) }
}

fn advice(answer: &Answer) -> Vec<String> {
    if answer.changes.is_empty() {
        return vec!["  no single change that was tried helps".into()];
    }
    let rows: Vec<Vec<String>> = answer
        .changes
        .iter()
        .map(|change| {
            let place = match change.place {
                Place::Layout => "layout",
                Place::Training => "training",
                Place::Cluster => "cluster",
            };
            vec![
                place.into(),
                change.what.clone(),
                seconds(answer).write(change.step_s),
                format!("-{:.1}%", 100.0 * change.saves),
            ]
        })
        .collect();
    table(&rows, 2)
}

/// What is missing, and what to do.
pub fn does_not_fit(answer: &Answer) -> String {
    format!(
        "This layout needs {:.1} GiB more than a GPU has; without --layout the planner looks for one that fits.",
        -answer.chosen.headroom_bytes / GIB
    )
}
