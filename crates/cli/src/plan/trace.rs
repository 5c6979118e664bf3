//! The predicted step as a Chrome trace, in the form of a run's own.

use serde_json::{Value, json};
use unisono_plan::simulate::{Lane, trace_events};

use super::answer::Answer;
use crate::error::CliError;

/// A rank is a process, its lanes are threads, as in the trace of `unisono train --trace`.
pub fn chrome(answer: &Answer) -> Result<String, CliError> {
    let step = answer.simulate()?;
    let mut events: Vec<Value> = Vec::new();
    let mut name = |rank: usize, lane: usize, what: &str, args: Value| {
        events.push(json!({"ph": "M", "pid": rank, "tid": lane, "name": what, "args": args}));
    };
    for rank in 0..step.simulated.ranks.len() {
        name(rank, 0, "process_name", json!({"name": format!("rank {rank}")}));
        name(rank, 0, "process_sort_index", json!({"sort_index": rank}));
        for lane in [Lane::Compute, Lane::Communication] {
            name(rank, thread(lane), "thread_name", json!({"name": lane_name(lane)}));
        }
    }
    for event in trace_events(&step.schedule, &step.simulated) {
        events.push(json!({
            "ph": "X",
            "pid": event.rank,
            "tid": thread(event.lane),
            "name": event.name,
            "cat": lane_name(event.lane),
            "ts": event.start_s * 1e6,
            "dur": event.seconds * 1e6,
            "args": {"op": event.op},
        }));
    }
    let lines: Vec<String> = events.iter().map(Value::to_string).collect();
    Ok(format!("{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n{}\n]}}\n", lines.join(",\n")))
}

fn thread(lane: Lane) -> usize {
    match lane {
        Lane::Compute => 0,
        Lane::Communication => 1,
    }
}

fn lane_name(lane: Lane) -> &'static str {
    match lane {
        Lane::Compute => "compute",
        Lane::Communication => "communication",
    }
}
