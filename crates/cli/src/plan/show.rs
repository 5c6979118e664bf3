//! The answer for a terminal.

use unisono_plan::kernels::{Kernel, KernelModel};
use unisono_plan::search::{Plan, SAFE};
use unisono_plan::{Axis, Communication, Level, Outlook, Place, Ranged, bottleneck};

use super::GIB;
use super::answer::{Answer, FITTING};
use crate::screen::say;
use crate::style::{
    Paint, Scale, bar, between, counted, duration, grouped, grouped_range, off, percent, short, table,
    without_empty,
};

/// What is said of the column of [`off`].
pub const OFF: &str = "80%: where eight of ten runs lie, for step, days and dollars";

/// How sure the parts of a step are.
pub const PARTS: &str = "80% intervals of parts: of kernels left out of tables, of constants fitted to other runs, and of what all parts err by together";

/// What is said of seconds by link.
pub const WAITED: &str =
    "an exchange that uses several links at once: its seconds are those of the one it waits for";

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
        say(&format!("  {}\n", paint.faint(&format!("{fit} of {all} layouts fit; {OFF}"))));
    }
    heading(&format!("Chosen: {}; 80% intervals in brackets", answer.chosen.layout));
    lines(step(answer));
    heading("The step, on the slowest pipeline rank");
    lines(breakdown(answer));
    say(&format!("  {}\n", paint.faint(PARTS)));
    heading("Memory by pipeline rank, GiB");
    lines(memory(answer));
    heading(
        "Communication in a step: time on the slowest rank, as far as nothing hides it and under kernels; GB that a GPU sends",
    );
    lines(traffic(answer));
    if answer.traffic.levels.len() > 1 {
        say(&format!("  {}\n", paint.faint(WAITED)));
    }
    heading("The run");
    lines(run(answer));
    let (what, share) = bottleneck(&answer.chosen.priced);
    heading(&format!(
        "What limits it: {what}, {} of the step. Tried one at a time, a step would take",
        percent(share)
    ));
    lines(advice(answer));
    if !answer.chosen.priced.fits {
        say(&format!("\n{}\n", paint.red(&does_not_fit(answer))));
    }
}

/// Model, cluster and training in two lines.
pub fn header(answer: &Answer) -> String {
    let model = &answer.model;
    format!(
        "{}: {} parameters, {} active. {}.\n{}",
        model.name,
        short(model.parameters() as u64),
        short(model.active_parameters() as u64),
        cluster(answer),
        match model.moe {
            Some(_) => training(answer),
            None => format!("{}, products in {}.", batches(answer), answer.training.compute),
        },
    )
}

/// GPUs and every level of their network.
pub fn cluster(answer: &Answer) -> String {
    let cluster = &answer.cluster;
    let inner = cluster.levels.len() - 1;
    let level = |(at, level): (usize, &Level)| {
        let within = if at < inner || at == 0 { format!(" within {}", level.width) } else { String::new() };
        let shared = match level.oversubscription > 1.0 {
            true => format!(" shared by {}", level.oversubscription),
            false => String::new(),
        };
        format!(", {} GB/s {}{within}{shared}", round(level.bytes_per_s / 1e9), level.name)
    };
    let levels: String = cluster.levels.iter().enumerate().map(level).collect();
    format!("{} {}{levels}", grouped(cluster.gpus as u64), cluster.gpu.label())
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
    let experts = match answer.model.moe {
        Some(_) => format!("; experts {}", kernels.origin(Kernel::GroupedGemm, precision)),
        None => String::new(),
    };
    format!(
        "products {}; attention {}{experts}",
        kernels.origin(Kernel::Gemm, precision),
        kernels.origin(Kernel::Attention, precision.wide()),
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
    let head = ["layout", "GPUs", "step", days.name, dollars.name, "80%", "free GiB", "fits"];
    let mut rows = vec![head.map(String::from).to_vec()];
    let mut again = Vec::new();
    rows.extend(plans.iter().zip(&outlooks).map(|(plan, outlook)| {
        vec![
            shortened(&plan.layout.to_string(), &mut again),
            grouped(plan.layout.gpus() as u64),
            duration(plan.priced.step_s),
            days.number(outlook.days.value, 1),
            dollars.number(outlook.usd.value, 2),
            off(plan.priced.step()),
            gib(free(answer, plan.priced.bytes())),
            percent(plan.fit_probability),
        ]
    }));
    let notes = again.iter().enumerate().map(|(at, again)| format!("  [{}] {again}", at + 1));
    table(&rows, 1).into_iter().chain(notes).collect()
}

/// The layout with a number in place of the parts that are computed again, where there are many; they join `again`.
fn shortened(layout: &str, again: &mut Vec<String>) -> String {
    let Some((rest, parts)) = layout.split_once("recompute=").filter(|(_, parts)| parts.contains('+')) else {
        return layout.to_string();
    };
    let at = again.iter().position(|known| known == parts).unwrap_or_else(|| {
        again.push(parts.to_string());
        again.len() - 1
    });
    format!("{rest}recompute=[{}]", at + 1)
}

/// The units of a table's days and dollars.
pub fn scales<'a>(outlooks: impl IntoIterator<Item = &'a Outlook>) -> (Scale, Scale) {
    let most = outlooks
        .into_iter()
        .fold([0.0f64; 2], |[days, usd], outlook| [days.max(outlook.days.value), usd.max(outlook.usd.value)]);
    (Scale::days(most[0]), Scale::dollars(most[1]))
}

/// What is left of a GPU's memory.
pub fn free(answer: &Answer, used: Ranged) -> Ranged {
    used.left_of(answer.cluster.gpu.memory_bytes)
}

/// GiB with their interval.
pub fn gib(bytes: Ranged) -> String {
    let [value, low, high] = [bytes.value, bytes.interval[0], bytes.interval[1]].map(|bytes| bytes / GIB);
    format!("{value:.1} ({low:.1} to {high:.1})")
}

/// The unit of the chosen step and of what it consists of.
fn seconds(answer: &Answer) -> Scale {
    Scale::seconds(answer.chosen.priced.step_s)
}

fn step(answer: &Answer) -> Vec<String> {
    let (priced, scale) = (&answer.chosen.priced, seconds(answer));
    let (flops, share) = (answer.flops_per_s_per_gpu().times(1e-12), answer.model_flops_share().times(100.0));
    let mut lines = vec![
        format!("  step {}", scale.ranged(priced.step())),
        format!("  {} tokens/s", grouped_range(answer.outlook.tokens_per_s)),
        format!(
            "  {:.0} ({:.0} to {:.0}) TFLOP/s a GPU (causal, recomputation not counted), {:.0}% ({:.0} to {:.0}%) of the bf16 peak",
            flops.value,
            flops.interval[0],
            flops.interval[1],
            share.value,
            share.interval[0],
            share.interval[1]
        ),
        format!(
            "  {} of {:.1} GiB on the fullest GPU (pipeline rank {}), {} free: fits with a probability of {}",
            gib(priced.bytes()),
            answer.cluster.gpu.memory_bytes / GIB,
            priced.worst_rank,
            gib(free(answer, priced.bytes())),
            percent(answer.chosen.fit_probability)
        ),
    ];
    if let Some(riskier) = answer.riskier() {
        lines.push(format!(
            "  the fastest of all, {} in {}, fits with a probability of {} only: the chosen one is the fastest of {} or more",
            riskier.layout,
            scale.ranged(riskier.priced.step()),
            percent(riskier.fit_probability),
            percent(SAFE)
        ));
    }
    if let Some(fitting) = answer.nearest_that_fits.filter(|_| priced.fits) {
        lines.push(format!("  {FITTING}{fitting} ({} or more)", percent(SAFE)));
    }
    if let Some(uneven) = answer.uneven {
        lines.push(format!(
            "  uneven routing: the fullest of {} expert-parallel ranks gets {:.2} times its share in the median step, {:.2} times in one \
             of twenty,\n  which takes {}; memory is for the latter, in the median step it is {} GiB; evenly, {} and {} GiB",
            answer.chosen.layout.expert,
            uneven.rows.p50,
            uneven.rows.p95,
            scale.ranged(uneven.slow_step),
            gib(uneven.median_bytes),
            scale.ranged(uneven.even_step),
            gib(uneven.even_bytes)
        ));
    }
    lines
}

/// Seconds of a part of the step, which may be few beside the step's: `0.588 s (0.456 to 0.756)`.
pub fn part(scale: Scale, seconds: Ranged) -> String {
    let [low, high] = seconds.interval.map(|end| scale.number(end, 3));
    format!("{} ({low} to {high})", scale.write(seconds.value))
}

fn breakdown(answer: &Answer) -> Vec<String> {
    let (priced, scale) = (&answer.chosen.priced, seconds(answer));
    let parts = answer.pricer().ranged_parts(&priced.breakdown);
    let rows: Vec<Vec<String>> = parts
        .into_iter()
        .filter(|(_, seconds)| seconds.value > 0.0)
        .map(|(name, seconds)| {
            let share = seconds.value / priced.step_s;
            vec![name.into(), bar(share, 30), part(scale, seconds), format!("{:.1}%", 100.0 * share)]
        })
        .collect();
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
    table(&without_empty(rows, "0.0"), 1)
}

/// All ranks of a short pipeline; of a long one the ends and the fullest.
pub fn shown_ranks(answer: &Answer) -> Vec<usize> {
    let ranks = answer.memory.len();
    (0..ranks)
        .filter(|rank| {
            ranks <= 8 || *rank < 3 || *rank + 3 > ranks || *rank == answer.chosen.priced.worst_rank
        })
        .collect()
}

/// Communication by axis and class of links.
fn traffic(answer: &Answer) -> Vec<String> {
    let (traffic, scale) = (&answer.traffic, seconds(answer));
    let mut rows = vec![["axis", "over", "exposed", "hidden", "80%", "GB"].map(String::from).to_vec()];
    let row = |name: &str, link: &str, of: Communication, apart: String, bytes: f64| {
        let [exposed, hidden] = [of.exposed_s, of.hidden_s].map(|seconds| scale.write(seconds));
        vec![name.into(), link.into(), exposed, hidden, apart, format!("{:.2}", bytes / 1e9)]
    };
    let spreads = answer.pricer().axis_spreads(&answer.chosen.priced.breakdown);
    let mut sums = vec![(Communication::default(), 0.0); traffic.levels.len()];
    for (axis, _) in communication(answer) {
        let mut name = axis.name();
        for (level, link) in traffic.levels.iter().enumerate() {
            let (of, bytes) =
                (answer.communication[axis as usize][level], traffic.bytes[axis as usize][level]);
            if bytes > 0.0 || of != Communication::default() {
                let apart = off(Ranged::around(1.0, spreads[axis as usize]));
                rows.push(row(std::mem::take(&mut name), link, of, apart, bytes));
                sums[level] = (sums[level].0 + of, sums[level].1 + bytes);
            }
        }
    }
    let mut name = "all";
    let used = sums.iter().zip(&traffic.levels).filter(|(sum, _)| **sum != Default::default());
    for ((of, bytes), link) in used {
        rows.push(row(std::mem::take(&mut name), link, *of, String::new(), *bytes));
    }
    table(&rows, 2)
}

/// The axes that send anything, with the seconds that nothing hides and those under kernels.
pub fn communication(answer: &Answer) -> Vec<(Axis, [f64; 2])> {
    let step = &answer.chosen.priced.breakdown;
    let seconds = step.exposed_s().into_iter().zip(step.hidden_s);
    let all =
        Axis::ALL.into_iter().zip(seconds).map(|(axis, (exposed_s, hidden_s))| (axis, [exposed_s, hidden_s]));
    all.filter(|(axis, _)| !answer.traffic.links(*axis).is_empty()).collect()
}

/// What is said where checkpoints, days and dollars mean little.
pub const TOO_MANY_FAILURES: &str = "failures come so often that a restart or the interval between checkpoints is no small part of the \
                                     time between them: Young's formula does not hold, days and dollars are guesses";

fn run(answer: &Answer) -> Vec<String> {
    let (outlook, training) = (&answer.outlook, &answer.training);
    let (days, dollars) = scales([outlook]);
    let mut lines = vec![
        format!(
            "  {}, {} GPU-hours of training, {} a trillion tokens",
            counted(outlook.steps as u64, "step"),
            hours(outlook.gpu_hours),
            grouped_range(outlook.gpu_hours_per_trillion(training))
        ),
        if outlook.fails() {
            format!(
                "  a failure every {}, a checkpoint every {} ({} each): {:.1} ({:.1} to {:.1}%) of the time trains",
                lasting(outlook.failure_every_s),
                lasting(outlook.checkpoint_every_s),
                duration(outlook.checkpoint_s),
                100.0 * outlook.goodput.value,
                100.0 * outlook.goodput.interval[0],
                100.0 * outlook.goodput.interval[1]
            )
        } else {
            "  no failures, hence no checkpoints: all of the time trains".into()
        },
        format!(
            "  {} and {} at ${:.2} a GPU-hour ({} of it trains)",
            days.ranged(outlook.days),
            dollars.ranged(outlook.usd),
            answer.cluster.price_usd_per_gpu_hour,
            dollars.write(outlook.usd_without_failures.value),
        ),
        format!("  ${} a trillion tokens", grouped_range(outlook.usd_per_trillion(training))),
    ];
    if !outlook.failures_are_rare {
        lines.push(format!("  {TOO_MANY_FAILURES}"));
    }
    lines
}

/// A duration with its interval, if it is not known.
fn lasting(seconds: Ranged) -> String {
    let [low, high] = seconds.interval;
    let between = if low < high { between(Some(seconds.interval)) } else { String::new() };
    format!("{}{between}", duration(seconds.value))
}

/// GPU-hours, whole where there are many.
pub fn whole_hours(hours: f64) -> String {
    if hours < 10.0 { format!("{hours:.2}") } else { grouped(hours as u64) }
}

/// The same with their interval.
pub fn hours(hours: Ranged) -> String {
    let [low, high] = hours.interval.map(whole_hours);
    format!("{} ({low} to {high})", whole_hours(hours.value))
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
                seconds(answer).ranged(change.step),
                format!("-{:.1}%", 100.0 * change.saves),
            ]
        })
        .collect();
    table(&rows, 2)
}

/// What is missing, and what to do.
pub fn does_not_fit(answer: &Answer) -> String {
    let fitting = answer.nearest_that_fits.map_or_else(
        || "without --layout the planner looks for one that fits".to_string(),
        |fitting| format!("{FITTING}{fitting}"),
    );
    format!("This layout needs {:.1} GiB more than a GPU has; {fitting}", -answer.chosen.headroom_bytes / GIB)
}
