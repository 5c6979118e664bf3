//! One page that needs nothing else: timeline, memory, Pareto front, bytes, dense against MoE.

mod charts;

use std::fmt::Write as _;

use unisono_plan::bottleneck;

use super::answer::{Answer, Wanted};
use super::{GIB, compare, show, trace};
use crate::error::CliError;
use crate::style::{Scale, grouped, grouped_range, percent};

const STYLE: &str = include_str!("report/style.css");

/// The page. Searches for dense twins of a sparse model on the way.
pub fn page(answer: &Answer) -> Result<String, CliError> {
    let step = answer.simulate()?;
    let title = format!(
        "{} on {} {}",
        answer.model.name,
        grouped(answer.cluster.gpus as u64),
        answer.cluster.gpu.label()
    );
    let mut body =
        format!("<h1>{}</h1>\n<p class=\"lead\">{}</p>\n", escape(&title), escape(&show::header(answer)));
    body.push_str(&figures(answer));
    section(&mut body, "The step", &breakdown_note(answer), &charts::breakdown(answer));
    let (drawing, left_out) = trace::drawing(&step);
    let left_out = left_out.map_or_else(String::new, |left_out| format!(" Drawn are {left_out}."));
    let note = format!(
        "Pipeline ranks from top to bottom, time to the right: forward blue, backward green, weight gradients violet, the rest grey; \
         numbers are micro-batches. Simulated op by op: {:.3} s; in closed form {:.3} s.{left_out}",
        step.simulated.seconds,
        answer.closed_form().step_s
    );
    section(&mut body, "Timeline", &note, &format!("<div class=\"scroll\">{drawing}</div>"));
    let note = format!(
        "GiB on a GPU of each pipeline rank at its peak; the line is what a GPU has, {:.1} GiB.",
        answer.cluster.gpu.memory_bytes / GIB
    );
    section(&mut body, "Memory", &note, &charts::memory(answer));
    if let Some(uneven) = answer.uneven {
        let note = format!(
            "A step waits in every MoE layer for the fullest of {} expert-parallel ranks. Memory is planned for one step of twenty.",
            answer.chosen.layout.expert
        );
        section(&mut body, "Uneven routing", &note, &charts::routing(answer, &uneven));
    }
    if let Some(found) = &answer.found {
        let note = format!(
            "{} of {} layouts fit. Each dot is one that no other beats in time, free memory and cost at once; larger dots cost more.",
            grouped(found.feasible as u64),
            grouped(found.priced as u64)
        );
        section(&mut body, "Pareto front", &note, &charts::front(answer, &found.front));
    }
    if !answer.outlook.failures_are_rare {
        let _ = writeln!(body, "<p>The run: {}.</p>", escape(show::TOO_MANY_FAILURES));
    }
    let note = "Seconds of a step on the slowest pipeline rank, by why something is sent: what nothing hides, and what runs under kernels.";
    section(&mut body, "Communication", note, &charts::communication(answer));
    section(
        &mut body,
        "Bytes over links",
        "GB that a GPU sends in a step, by why and by which links.",
        &charts::traffic(answer),
    );
    if let Some(table) = dense(answer) {
        let note = format!(
            "The same tokens on the same cluster, the fastest layout that fits each, in brackets where 80% of runs lie; {}.",
            compare::TWINS.join(" ")
        );
        section(&mut body, "Dense against MoE", &note, &table);
    }
    section(&mut body, "What would help most", "Changes tried one at a time.", &changes(answer));
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
        escape(&title)
    ))
}

fn section(body: &mut String, title: &str, note: &str, content: &str) {
    let _ = writeln!(body, "<section>\n<h2>{title}</h2>\n<p>{}</p>\n{content}\n</section>", escape(note));
}

/// Text in HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The same, where a layout's name may be broken between what is computed again.
fn breakable(text: &str) -> String {
    escape(text).replace('=', "=<wbr>").replace('+', "+<wbr>")
}

/// The few numbers that matter most.
fn figures(answer: &Answer) -> String {
    let (priced, outlook) = (&answer.chosen.priced, &answer.outlook);
    let seconds = Scale::seconds(priced.step_s);
    let (days, dollars) = show::scales([outlook]);
    let riskier = answer.riskier().map(|plan| {
        let step = seconds.write(plan.priced.step_s);
        format!(" (the fastest of all, {} in {step}: {})", plan.layout, percent(plan.fit_probability))
    });
    let flops = answer.flops_per_s_per_gpu().times(1e-12);
    let figures = [
        (
            "layout",
            answer.chosen.layout.to_string(),
            format!("{} GPUs", grouped(answer.chosen.layout.gpus() as u64)),
        ),
        (
            "step",
            seconds.write(priced.step_s),
            format!("80% of runs: {} {}", seconds.range(priced.interval_s), seconds.name),
        ),
        (
            "throughput",
            format!("{} tokens/s", grouped(outlook.tokens_per_s.value as u64)),
            format!(
                "80% of runs: {} to {}; {:.0} ({:.0} to {:.0}) TFLOP/s a GPU, {} of peak",
                grouped(outlook.tokens_per_s.interval[0] as u64),
                grouped(outlook.tokens_per_s.interval[1] as u64),
                flops.value,
                flops.interval[0],
                flops.interval[1],
                percent(answer.model_flops_share().value)
            ),
        ),
        (
            "memory",
            format!("{:.1} GiB", priced.memory.total() / GIB),
            format!(
                "{} GiB free on the fullest GPU, fits with a probability of {}{}; 80% of runs: {} GiB",
                show::gib(show::free(answer, priced.bytes())),
                percent(answer.chosen.fit_probability),
                riskier.unwrap_or_default(),
                show::gib(priced.bytes())
            ),
        ),
        (
            "run",
            format!("{}, {}", days.write(outlook.days.value), dollars.write(outlook.usd.value)),
            format!(
                "80% of runs: {} {}, {} {}; {} GPU-hours of training, {} goodput",
                days.range(outlook.days.interval),
                days.name,
                dollars.range(outlook.usd.interval),
                dollars.name,
                show::hours(outlook.gpu_hours),
                percent(outlook.goodput.value)
            ),
        ),
    ];
    let cards = figures.map(|(name, value, note)| {
        format!(
            "<div class=\"card\"><div class=\"name\">{name}</div><div class=\"value\">{}</div><div class=\"note\">{}</div></div>",
            breakable(&value),
            breakable(&note)
        )
    });
    format!("<div class=\"cards\">{}</div>\n", cards.join("\n"))
}

fn breakdown_note(answer: &Answer) -> String {
    let (what, share) = bottleneck(&answer.chosen.priced);
    format!(
        "On the slowest pipeline rank. The largest part is {what}, {}. {}{}.",
        percent(share),
        show::PARTS[..1].to_uppercase(),
        &show::PARTS[1..],
    )
}

fn changes(answer: &Answer) -> String {
    let rows = answer.changes.iter().map(|change| {
        let step = Scale::seconds(answer.chosen.priced.step_s).ranged(change.step);
        vec![change.what.clone(), step, format!("-{:.1}%", 100.0 * change.saves)]
    });
    html_table(&["change", "step (80% of runs)", "saves"], &rows.collect::<Vec<_>>())
}

/// The model beside its dense twins, where it has any and they fit.
fn dense(answer: &Answer) -> Option<String> {
    let mut rows = vec![compared(answer)];
    let wanted = Wanted { recompute: answer.recompute, ..Wanted::default() };
    for (_, twin) in compare::twins(&answer.model) {
        let other = Answer::to(twin.clone(), answer.cluster.clone(), answer.training.clone(), wanted);
        rows.push(
            other.map_or_else(|_| vec![twin.name, "no layout fits".into()], |answer| compared(&answer)),
        );
    }
    let head = ["model", "layout", "step", "GPU-hours a T tokens", "time", "cost"];
    (rows.len() > 1).then(|| html_table(&head, &rows))
}

fn compared(answer: &Answer) -> Vec<String> {
    let outlook = &answer.outlook;
    let (days, dollars) = show::scales([outlook]);
    vec![
        answer.model.name.clone(),
        answer.chosen.layout.to_string(),
        Scale::seconds(answer.chosen.priced.step_s).ranged(answer.chosen.priced.step()),
        grouped_range(outlook.gpu_hours_per_trillion(&answer.training)),
        days.ranged(outlook.days),
        dollars.ranged(outlook.usd),
    ]
}

fn html_table(head: &[&str], rows: &[Vec<String>]) -> String {
    let cells = |tag: &str, cells: Vec<String>| {
        let cells: String = cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect();
        format!("<tr>{cells}</tr>\n")
    };
    let head = cells("th", head.iter().map(ToString::to_string).collect());
    let rows: String = rows.iter().map(|row| cells("td", row.clone())).collect();
    format!("<div class=\"scroll\"><table>\n{head}{rows}</table></div>")
}
