//! Drawings of the report, as SVG that takes its colours from the page.

use std::fmt::Write as _;

use unisono_plan::Axis;
use unisono_plan::search::Plan;

use super::super::GIB;
use super::super::answer::{Answer, Uneven};
use super::super::show;
use super::escape;
use crate::style::{Scale, percent};

const WIDTH: f64 = 1080.0;
const LABEL: f64 = 190.0;
const ROW: f64 = 26.0;
/// Colours of the page's style, `--c0` and so on: one for each part of a rank's memory.
const COLOURS: usize = 12;

/// The start of a drawing of this height, which scrolls where the window is narrower than its text can be read in.
fn open(height: f64) -> String {
    format!(
        "<div class=\"scroll\"><svg viewBox=\"0 0 {WIDTH} {height}\" font-size=\"13\" font-family=\"system-ui, sans-serif\" role=\"img\">\n"
    )
}

/// The end of a drawing.
const END: &str = "</svg></div>";

fn text(svg: &mut String, class: &str, anchor: &str, x: f64, y: f64, content: &str) {
    let content = escape(content);
    let _ = writeln!(
        svg,
        "<text class=\"{class}\" text-anchor=\"{anchor}\" x=\"{x:.1}\" y=\"{y:.1}\">{content}</text>"
    );
}

fn block(svg: &mut String, colour: usize, [x, y, width, height]: [f64; 4], title: &str) {
    let title = escape(title);
    let _ = writeln!(
        svg,
        "<rect class=\"k{}\" x=\"{x:.2}\" y=\"{y:.2}\" width=\"{:.2}\" height=\"{height:.2}\"><title>{title}</title></rect>",
        colour % COLOURS,
        width.max(0.0)
    );
}

fn line(svg: &mut String, class: &str, [x1, y1, x2, y2]: [f64; 4]) {
    let _ = writeln!(
        svg,
        "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
    );
}

fn legend(names: &[String]) -> String {
    let entries: String = names.iter().enumerate().map(|(at, name)| entry(at, name)).collect();
    format!("<div class=\"legend\">{entries}</div>")
}

fn entry(colour: usize, name: &str) -> String {
    format!("<span><i style=\"background:var(--c{})\"></i>{}</span>", colour % COLOURS, escape(name))
}

/// The parts of the step, one bar each.
pub fn breakdown(answer: &Answer) -> String {
    let priced = &answer.chosen.priced;
    let parts = answer.pricer().ranged_parts(&priced.breakdown);
    let parts: Vec<_> = parts.into_iter().filter(|(_, seconds)| seconds.value > 0.0).collect();
    let most = parts.iter().map(|(_, seconds)| seconds.value).fold(f64::MIN_POSITIVE, f64::max);
    let scale = Scale::seconds(priced.step_s);
    let mut svg = open(ROW * parts.len() as f64 + 4.0);
    for (at, (name, seconds)) in parts.iter().enumerate() {
        let y = ROW * at as f64;
        let width = (WIDTH - LABEL - 260.0) * seconds.value / most;
        text(&mut svg, "chart-soft", "start", 0.0, y + 17.0, name);
        block(&mut svg, 0, [LABEL + 30.0, y + 4.0, width, ROW - 9.0], name);
        let share = 100.0 * seconds.value / priced.step_s;
        let label = format!("{}, {share:.1}%", show::part(scale, *seconds));
        text(&mut svg, "chart-text", "start", LABEL + 36.0 + width, y + 17.0, &label);
    }
    svg + END
}

/// The step with even routing, in the median and in one of twenty; rows and memory of the fullest rank beside it.
pub fn routing(answer: &Answer, uneven: &Uneven) -> String {
    let priced = &answer.chosen.priced;
    let steps = [
        ("even", 1.0, uneven.even_step, uneven.even_bytes.value),
        ("median", uneven.rows.p50, priced.step(), uneven.median_bytes.value),
        ("one of twenty", uneven.rows.p95, uneven.slow_step, priced.memory.total()),
    ];
    let scale = Scale::seconds(priced.step_s);
    let mut svg = open(ROW * steps.len() as f64 + 4.0);
    for (at, (name, rows, step, bytes)) in steps.into_iter().enumerate() {
        let y = ROW * at as f64;
        let width = (WIDTH - LABEL - 500.0) * step.value / uneven.slow_step.value;
        text(&mut svg, "chart-soft", "start", 0.0, y + 17.0, name);
        block(&mut svg, 0, [LABEL, y + 4.0, width, ROW - 9.0], name);
        let free = answer.cluster.gpu.memory_bytes - bytes;
        let memory = format!("{:.1} GiB held, {:.1} free", bytes / GIB, free / GIB);
        let label = format!("{}, {rows:.2} times its rows, {memory}", scale.ranged(step));
        text(&mut svg, "chart-text", "start", LABEL + 8.0 + width, y + 17.0, &label);
    }
    svg + END
}

/// Stacked bars, one a pipeline rank.
pub fn memory(answer: &Answer) -> String {
    let limit = answer.cluster.gpu.memory_bytes;
    let most = answer.memory.iter().map(|rank| rank.total()).fold(limit, f64::max);
    let row = if answer.memory.len() > 24 { 12.0 } else { ROW };
    let height = row * answer.memory.len() as f64;
    let scale = (WIDTH - LABEL) / most;
    let mut svg = open(height + 22.0);
    for (rank, memory) in answer.memory.iter().enumerate() {
        let y = row * rank as f64;
        let label = format!("rank {rank}: {:.1} GiB", memory.total() / GIB);
        text(&mut svg, "chart-soft", "start", 0.0, y + 0.7 * row, &label);
        let mut x = LABEL;
        for (at, (name, bytes)) in memory.parts().into_iter().enumerate() {
            block(
                &mut svg,
                at,
                [x, y + 2.0, bytes * scale, row - 4.0],
                &format!("{name} {:.2} GiB", bytes / GIB),
            );
            x += bytes * scale;
        }
    }
    let x = LABEL + limit * scale - 1.0;
    line(&mut svg, "chart-limit", [x, 0.0, x, height]);
    text(&mut svg, "chart-soft", "end", x, height + 16.0, &format!("{:.1} GiB", limit / GIB));
    svg + END + &legend(&answer.memory[0].parts().map(|(name, _)| name.to_string()))
}

/// Seconds of a step against free memory; area by dollars.
pub fn front(answer: &Answer, plans: &[Plan]) -> String {
    const HEIGHT: f64 = 330.0;
    const LEFT: f64 = 60.0;
    let range = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, 0.0f64), |(low, high), value| (low.min(value), high.max(value)))
    };
    let (fastest, slowest) = range(&mut plans.iter().map(|plan| plan.priced.step_s));
    let (_, most_free) = range(&mut plans.iter().map(|plan| plan.headroom_bytes));
    let (_, dearest) = range(&mut plans.iter().map(|plan| plan.run_usd));
    let (low, high) = (0.95 * fastest, 1.05 * slowest);
    let scale = Scale::seconds(high);
    let x = |seconds: f64| LEFT + (WIDTH - LEFT - 20.0) * (seconds / low).ln() / (high / low).ln();
    let y = |bytes: f64| HEIGHT - 40.0 - (HEIGHT - 60.0) * bytes / (1.05 * most_free);
    let mut svg = open(HEIGHT);
    for step in 0..=4 {
        let share = f64::from(step) / 4.0;
        let (seconds, bytes) = (low * (high / low).powf(share), share * most_free);
        line(&mut svg, "chart-line", [x(seconds), 15.0, x(seconds), HEIGHT - 40.0]);
        let label = format!("{} {}", scale.number(seconds, 1), scale.name);
        text(&mut svg, "chart-soft", "middle", x(seconds), HEIGHT - 22.0, &label);
        line(&mut svg, "chart-line", [LEFT, y(bytes), WIDTH - 20.0, y(bytes)]);
        text(&mut svg, "chart-soft", "end", LEFT - 8.0, y(bytes) + 4.0, &format!("{:.0}", bytes / GIB));
    }
    text(&mut svg, "chart-soft", "end", WIDTH - 20.0, HEIGHT - 4.0, "time of a step; upwards: free GiB");
    for plan in plans {
        let chosen = plan.layout == answer.chosen.layout;
        let radius = 3.0 + 7.0 * (plan.run_usd / dearest.max(f64::MIN_POSITIVE)).sqrt();
        let title = format!(
            "{}: {}, {} GiB free (fits with a probability of {}), {}",
            plan.layout,
            scale.ranged(plan.priced.step()),
            show::gib(show::free(answer, plan.priced.bytes())),
            percent(plan.fit_probability),
            Scale::dollars(plan.run_usd).ranged(plan.priced.step().growing(plan.run_usd))
        );
        let _ = writeln!(
            svg,
            "<circle class=\"{}\" fill-opacity=\"0.75\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"{radius:.1}\"><title>{}</title></circle>",
            if chosen { "k4" } else { "k0" },
            x(plan.priced.step_s),
            y(plan.headroom_bytes),
            escape(&title)
        );
    }
    // Above the highest dot.
    let _ = writeln!(svg, "<rect class=\"k4\" x=\"{LEFT:.1}\" y=\"2\" width=\"9\" height=\"9\"/>");
    text(&mut svg, "chart-text", "start", LEFT + 15.0, 11.0, &format!("chosen: {}", answer.chosen.layout));
    svg + END
}

/// Bars by axis: what nothing hides, and what runs under kernels.
pub fn communication(answer: &Answer) -> String {
    let axes = show::communication(answer);
    let most = axes.iter().map(|(_, seconds)| seconds.iter().sum()).fold(f64::MIN_POSITIVE, f64::max);
    let scale = Scale::seconds(answer.chosen.priced.step_s);
    let mut svg = open(ROW * axes.len().max(1) as f64 + 4.0);
    for (row, (axis, seconds)) in axes.iter().enumerate() {
        let y = ROW * row as f64;
        let name = format!("{}: {}", axis.name(), answer.traffic.links(*axis));
        text(&mut svg, "chart-soft", "start", 0.0, y + 17.0, &name);
        let mut x = LABEL + 30.0;
        for (part, seconds) in seconds.iter().enumerate() {
            let width = (WIDTH - LABEL - 330.0) * seconds / most;
            let title = format!("{}: {}", COMMUNICATION[part], scale.write(*seconds));
            block(&mut svg, [4, 6][part], [x, y + 4.0, width, ROW - 9.0], &title);
            x += width;
        }
        let [exposed, hidden] = seconds.map(|seconds| scale.write(seconds));
        text(
            &mut svg,
            "chart-text",
            "start",
            x + 8.0,
            y + 17.0,
            &format!("{exposed} exposed, {hidden} hidden"),
        );
    }
    let legend = [(4, COMMUNICATION[0]), (6, COMMUNICATION[1])].map(|(colour, name)| entry(colour, name));
    svg + END + &format!("<div class=\"legend\">{}</div>", legend.concat())
}

/// The halves of [`communication`].
const COMMUNICATION: [&str; 2] = ["exposed", "hidden under kernels"];

/// Bars by axis, stacked by level of the network.
pub fn traffic(answer: &Answer) -> String {
    let axes: Vec<Axis> = show::communication(answer).into_iter().map(|(axis, _)| axis).collect();
    let total = |axis: usize| answer.traffic.bytes[axis].iter().sum::<f64>();
    let most = axes.iter().map(|axis| total(*axis as usize)).fold(f64::MIN_POSITIVE, f64::max);
    let scale = (WIDTH - LABEL - 170.0) / most;
    let mut svg = open(ROW * axes.len().max(1) as f64 + 4.0);
    for (row, axis) in axes.iter().enumerate() {
        let y = ROW * row as f64;
        text(&mut svg, "chart-soft", "start", 0.0, y + 17.0, axis.name());
        let mut x = LABEL;
        for (level, bytes) in answer.traffic.bytes[*axis as usize].iter().enumerate() {
            let title = format!("{}: {:.2} GB", answer.traffic.levels[level], bytes / 1e9);
            block(&mut svg, level, [x, y + 4.0, bytes * scale, ROW - 9.0], &title);
            x += bytes * scale;
        }
        let label = format!("{:.2} GB", total(*axis as usize) / 1e9);
        text(&mut svg, "chart-text", "start", x + 8.0, y + 17.0, &label);
    }
    svg + END + &legend(&answer.traffic.levels)
}
