//! The predicted step as a Chrome trace, in the form of a run's own.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use unisono_plan::SimulatedStep;
use unisono_plan::simulate::{Cut, Lane, svg, trace_events};

use crate::error::{CliError, STORAGE};
use crate::screen::{Screen, complain};
use crate::style::{duration, grouped};

/// The template of the bar of a large trace.
pub const BAR: &str = "writing events {bar:30} {pos}/{len}  {elapsed}";

/// The most events of a trace: 140 MB, for a page of Perfetto keeps all of it in the memory of a browser.
const MOST_EVENTS: usize = 1 << 20;

/// The most boxes of a drawing: 5 MB.
const MOST_BOXES: usize = 1 << 15;

/// Events between two looks at the clock.
const BATCH: usize = 1 << 12;

/// What is written faster needs no bar.
const MOMENT: Duration = Duration::from_millis(500);

/// Writes the trace, and says what of a large one was left out.
pub fn write(step: &SimulatedStep, path: &Path) -> Result<(), CliError> {
    let screen = Screen::new(BAR);
    let begin = Instant::now();
    let mut shown = false;
    let tell = |done: usize, all: usize| {
        if begin.elapsed() < MOMENT {
            return;
        }
        match std::mem::replace(&mut shown, true) {
            false => screen.start(done as u64, all as u64),
            true => screen.advance(done as u64, all as u64, String::new()),
        }
    };
    let written = File::create(path).and_then(|file| {
        let mut out = BufWriter::new(file);
        let cut = chrome(&mut out, step, MOST_EVENTS, tell)?;
        out.flush().map(|()| cut)
    });
    screen.finish();
    let cut = written
        .map_err(|error| CliError { code: STORAGE, message: format!("write {}: {error}", path.display()) })?;
    if let Some(cut) = cut {
        let said = said(&cut, step, "events", "a page of Perfetto may not open");
        complain("note", &format!("{}: {said}", path.display()));
    }
    Ok(())
}

/// What is said of a trace or a drawing whose middle is left out: of so many events or boxes, and what more of them would do.
fn said(cut: &Cut, step: &SimulatedStep, what: &str, more: &str) -> String {
    let whole_s = step.simulated.seconds;
    format!(
        "{} of {} {what}, those that begin in the first {} and the last {} of the step's {}; with more {more}: a smaller --batch leaves \
         nothing out",
        grouped(cut.kept as u64),
        grouped(cut.all as u64),
        duration(cut.from_s),
        duration(whole_s - cut.to_s),
        duration(whole_s)
    )
}

/// The drawing of a step, and what is said where it is not of all of it.
pub fn drawing(step: &SimulatedStep) -> (String, Option<String>) {
    let (text, cut) = svg(&step.schedule, &step.simulated, MOST_BOXES);
    (text, cut.map(|cut| said(&cut, step, "boxes", "a browser may not show it")))
}

/// Writes the order of passes: drawn if the file ends in .svg, else a line a rank.
pub fn write_schedule(step: &SimulatedStep, path: &Path) -> Result<(), CliError> {
    if path.extension().is_none_or(|extension| extension != "svg") {
        return super::write(path, &step.schedule.to_string());
    }
    let (text, left_out) = drawing(step);
    super::write(path, &text)?;
    if let Some(left_out) = left_out {
        complain("note", &format!("{}: {left_out}", path.display()));
    }
    Ok(())
}

/// A rank is a process, its lanes are threads, as in the trace of `unisono train --trace`. Of the engine's own list a rank's calls are
/// the communication lane, with what they wait for; what is on its way between hosts meanwhile has a third. Writes one event after
/// the other, about `most` of them, and tells how many of how many; returns what was left out.
fn chrome(
    out: &mut impl Write,
    step: &SimulatedStep,
    most: usize,
    mut tell: impl FnMut(usize, usize),
) -> std::io::Result<Option<Cut>> {
    let cut = Cut::of(step.simulated.spans.iter().map(|span| span.start_s).collect(), most);
    out.write_all(b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[")?;
    let mut separator = "\n";
    let mut line = |out: &mut dyn Write, event: &Value| {
        write!(out, "{}{event}", std::mem::replace(&mut separator, ",\n"))
    };
    let engine = is_engine(step);
    let lanes = if engine { LANES } else { &LANES[..2] };
    for rank in 0..step.simulated.ranks.len() {
        let name = |lane: usize, what: &str, args: Value| json!({"ph": "M", "pid": rank, "tid": lane, "name": what, "args": args});
        line(out, &name(0, "process_name", json!({"name": format!("rank {rank}")})))?;
        line(out, &name(0, "process_sort_index", json!({"sort_index": rank})))?;
        for (lane, lane_name) in lanes.iter().enumerate() {
            line(out, &name(lane, "thread_name", json!({"name": lane_name})))?;
        }
    }
    let all = cut.map_or(step.simulated.spans.len(), |cut| cut.kept);
    let events = trace_events(&step.schedule, &step.simulated);
    let kept = events.filter(|event| !cut.is_some_and(|cut| cut.takes(event.start_s)));
    // When each rank has done what it does itself.
    let mut done_s = vec![0.0; step.simulated.ranks.len()];
    for (index, event) in kept.enumerate() {
        let is_call = engine && event.lane == Lane::Compute && event.op.starts_with("finish:");
        let lane = match event.lane {
            Lane::Compute => usize::from(is_call),
            Lane::Communication => 1 + usize::from(engine),
        };
        let end_s = event.start_s + event.seconds;
        let start_s = if is_call { done_s[event.rank] } else { event.start_s };
        if event.lane == Lane::Compute {
            done_s[event.rank] = end_s;
        }
        let value = json!({
            "ph": "X",
            "pid": event.rank,
            "tid": lane,
            "name": event.name,
            "cat": LANES[lane],
            "ts": start_s * 1e6,
            "dur": (end_s - start_s) * 1e6,
            "args": {"op": event.op},
        });
        line(out, &value)?;
        if index.is_multiple_of(BATCH) {
            tell(index, all);
        }
    }
    out.write_all(b"\n]}\n")?;
    Ok(cut)
}

/// The lanes of a rank; the last one is that of the engine's own lists.
const LANES: &[&str] = &["compute", "communication", "network"];

/// Whether a step is the engine's own list, which has no pipeline.
fn is_engine(step: &SimulatedStep) -> bool {
    step.schedule.stages() == 0
}

#[cfg(test)]
mod tests {
    use unisono_plan::{Architecture, Cluster, DispatchKind, Parallelism, Pricer, Training};

    use super::*;

    #[test]
    fn a_large_trace_keeps_both_ends_and_says_how_much_of_it() {
        let model = Architecture::built_in("Llama-3.1-8B").unwrap();
        let cluster = Cluster::parse("h100x8").unwrap();
        let training = Training {
            global_batch: 64,
            dispatch: DispatchKind { deduplicated: true, overlapped: false, padded: false },
            ..Training::default()
        };
        let layout: Parallelism = "pp8 interleaved vp2".parse().unwrap();
        let step = Pricer::new(&model, &cluster, &training).simulate(&layout, true).unwrap();
        let write = |most: usize| {
            let mut out = Vec::new();
            let cut = chrome(&mut out, &step, most, |_, _| {}).unwrap();
            let trace: Value = serde_json::from_slice(&out).unwrap();
            let events = trace["traceEvents"].as_array().unwrap().clone();
            (cut, events.into_iter().filter(|event| event["ph"] == "X").collect::<Vec<_>>())
        };
        let (cut, whole) = write(usize::MAX);
        assert_eq!((cut, whole.len()), (None, step.simulated.spans.len()));
        let (cut, some) = write(1000);
        let cut = cut.unwrap();
        assert!(whole.len() > 2000 && some.len() == cut.kept && some.len().abs_diff(1000) <= 16);
        let starts = |event: &Value| event["ts"].as_f64().unwrap() / 1e6;
        assert!(some.iter().all(|event| !cut.takes(starts(event))));
        assert!(
            some.iter().any(|event| starts(event) == 0.0)
                && some.iter().any(|event| event["name"] == "optimizer")
        );
        assert!(said(&cut, &step, "events", "it").starts_with(&format!("{} of ", grouped(cut.kept as u64))));
    }
}
