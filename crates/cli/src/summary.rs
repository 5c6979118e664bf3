//! What a finished run has to show.

use std::collections::BTreeMap;

use unisono_comm::Ledger;
use unisono_mesh::LinkClass;
use unisono_plan::dispatch::kind;
use unisono_train::config::DispatchConfig;
use unisono_train::system::readable;
use unisono_train::{RunConfig, Started, Summary};

use crate::style::{Paint, bar, between, duration, grouped, percent, spark, table};

/// The whole summary; `on_hosts` if ranks were on several.
pub fn render(
    summary: &Summary,
    started: &Started,
    config: &RunConfig,
    on_hosts: bool,
    paint: Paint,
) -> String {
    let mut lines = outcome(summary, started, paint);
    if summary.step <= started.from_step {
        return lines.join("\n") + "\n";
    }
    let mut moved = traffic(&summary.ledger);
    moved.extend(flat_instead(&summary.ledger, started, config).map(|line| paint.yellow(&line)));
    let sections = [
        ("Predicted and measured (training steps, all ranks)", agreement(summary, on_hosts, paint)),
        ("What moved (all ranks)", moved),
        ("Time by phase (mean rank)", phases(summary)),
        (
            "Expert load (rows of each expert, over their mean)",
            expert_load(&summary.expert_load, config.model.first_dense),
        ),
        ("Memory", memory(summary)),
    ];
    for (title, body) in sections {
        if !body.is_empty() {
            lines.extend([String::new(), paint.strong(title)]);
            lines.extend(body);
        }
    }
    lines.push(String::new());
    lines.join("\n")
}

fn outcome(summary: &Summary, started: &Started, paint: Paint) -> Vec<String> {
    let steps = summary.step.saturating_sub(started.from_step);
    if steps == 0 {
        let at = format!("The run is at step {} of {} already", summary.step, started.steps);
        return vec![format!("{}: nothing to train. More steps: --resume --steps N", paint.strong(&at))];
    }
    let tokens = steps * started.tokens_per_step as u64;
    let mut lines = vec![
        paint.strong("Summary"),
        format!(
            "  {} steps in {}: {} tokens, {} tokens/s all in all",
            grouped(steps),
            duration(summary.seconds),
            grouped(tokens),
            grouped((tokens as f64 / summary.seconds.max(1e-9)) as u64),
        ),
    ];
    lines.extend(
        summary.last_loss.map(|loss| format!("  training loss    {loss:.4} nats, step {}", summary.step)),
    );
    if let Some(record) = &summary.validation {
        lines.push(paint.green(&format!(
            "  validation loss  {:.4} nats, {:.3} bits/byte, step {}",
            record.loss, record.bits_per_byte, record.validation_step
        )));
    }
    if summary.skipped_steps > 0 {
        lines.push(paint.yellow(&format!(
            "  {} steps were skipped for numbers that are not finite",
            summary.skipped_steps
        )));
    }
    lines
}

/// Step time, memory and bytes by kind of call, as the planner said and as they were.
fn agreement(summary: &Summary, on_hosts: bool, paint: Paint) -> Vec<String> {
    let off =
        |predicted: f64, measured: f64| format!("{:+.0}%", 100.0 * (measured / predicted.max(1e-12) - 1.0));
    let mut rows = vec![["", "predicted", "measured", ""].map(String::from).to_vec()];
    let time = &summary.step_time;
    let (said, by) = match time.predicted_s {
        Some(seconds) => (duration(seconds) + &between(time.interval_80_s), off(seconds, time.measured_s)),
        None => ("-".into(), String::new()),
    };
    rows.push(vec!["step, median".into(), said, duration(time.measured_s), by]);
    if let Some(most) = summary.memory.iter().max_by_key(|record| record.measured) {
        let by = off(most.estimated as f64, most.measured as f64);
        let [said, measured] = [most.estimated, most.measured].map(readable);
        rows.push(vec!["memory, largest rank".into(), said, measured, by]);
    }
    let mut kinds: BTreeMap<&str, [u64; 2]> = BTreeMap::new();
    for record in &summary.step_traffic {
        let sums = kinds.entry(&record.kind).or_default();
        sums[0] += record.predicted.bytes_sent;
        sums[1] += record.measured.bytes_sent;
    }
    for (kind, [said, measured]) in kinds {
        let by = if said == measured {
            "exact".into()
        } else {
            format!("{} bytes", measured as i128 - said as i128)
        };
        rows.push(vec![kind.replace('_', " "), readable(said), readable(measured), by]);
    }
    let mut lines = table(&rows, 1);
    if time.predicted_s.is_none() {
        lines.push(paint.faint(match on_hosts {
            false => "  `unisono bench local` measures this machine; then the step is predicted, too",
            true => "  with `--cluster FILE`, which describes the hosts, the step is predicted, too (docs/plan.md)",
        }));
    }
    lines
}

fn link_name(link: LinkClass) -> &'static str {
    match link {
        LinkClass::SameRank => "same rank",
        LinkClass::SameNode => "same node",
        LinkClass::OtherNode => "other node",
    }
}

/// What the config asked of dispatch and did not get.
fn flat_instead(ledger: &Ledger, started: &Started, config: &RunConfig) -> Option<String> {
    let layout = &config.layout;
    let asked = layout.dispatch == DispatchConfig::Hierarchical && layout.dispatch_rows > 0;
    let moved = |kind: &str| ledger.rows.iter().any(|row| row.kind == kind);
    let flat = moved(kind::DISPATCH) && !moved(kind::DISPATCH_INSIDE);
    (asked && started.world.nodes.len() > 1 && flat).then(|| {
        format!(
            "  dispatch travelled flat, in rounds: layout.dispatch_rows = {} holds no hierarchical exchange; raise it",
            layout.dispatch_rows
        )
    })
}

/// Bytes and time by call, group and link class.
fn traffic(ledger: &Ledger) -> Vec<String> {
    let header = ["call", "group", "link", "calls", "sent", "waiting", "moving"].map(String::from).to_vec();
    let mut rows = vec![header];
    for row in &ledger.rows {
        rows.push(vec![
            row.kind.replace('_', " "),
            row.group.clone(),
            link_name(row.link).into(),
            grouped(row.calls),
            readable(row.bytes_sent),
            duration(row.wait_seconds),
            duration(row.move_seconds),
        ]);
    }
    if rows.len() == 1 {
        return Vec::new();
    }
    let mut lines = table(&rows, 3);
    if let (true, Some(busiest)) = (ledger.ranks.len() > 1, ledger.busiest_rank()) {
        lines.push(format!(
            "  between ranks {}; busiest is rank {}: {} out, {} in",
            readable(ledger.bytes_sent()),
            busiest.rank,
            readable(busiest.bytes_sent),
            readable(busiest.bytes_received),
        ));
    }
    lines
}

/// Where the time went, longest first; what takes less than a hundredth is put together.
fn phases(summary: &Summary) -> Vec<String> {
    let named: f64 = summary.phases.iter().map(|(_, _, seconds)| seconds).sum();
    let whole = summary.seconds.max(named).max(1e-9);
    let mut all: Vec<(String, String, f64)> = summary.phases.clone();
    all.push(("other".into(), "start, data, saving".into(), whole - named));
    all.sort_by(|a, b| b.2.total_cmp(&a.2));
    let small = all.split_off(all.partition_point(|(_, _, seconds)| seconds / whole >= 0.01));
    if !small.is_empty() {
        let seconds = small.iter().map(|(_, _, seconds)| seconds).sum();
        all.push(("smaller".into(), format!("{} phases", small.len()), seconds));
    }
    let longest = all.iter().map(|(_, _, seconds)| seconds / whole).fold(1e-9, f64::max);
    let row = |(lane, name, seconds): &(String, String, f64)| {
        let share = seconds / whole;
        // Filled up, so that the bars begin at the same column.
        let bar = format!("{:<30}", bar(share / longest, 30));
        vec![lane.clone(), name.clone(), duration(*seconds), percent(share), bar]
    };
    table(&all.iter().map(row).collect::<Vec<_>>(), 2)
}

/// A small histogram a layer.
fn expert_load(load: &[Vec<u64>], first_layer: usize) -> Vec<String> {
    let line = |(index, counts): (usize, &Vec<u64>)| {
        let mean = counts.iter().sum::<u64>() as f64 / counts.len().max(1) as f64;
        let shares: Vec<f64> = counts.iter().map(|count| *count as f64 / mean.max(1e-9)).collect();
        let least = shares.iter().copied().fold(f64::INFINITY, f64::min);
        let most = shares.iter().copied().fold(0.0, f64::max);
        // Wide layers: neighbouring experts share a bar.
        let width = shares.len().div_ceil(64);
        let bars: Vec<f64> =
            shares.chunks(width).map(|chunk| chunk.iter().sum::<f64>() / chunk.len() as f64).collect();
        let layer = first_layer + index;
        format!("  layer {layer:>2}  {}  {least:.2} to {most:.2}", spark(&bars, most.max(2.0)))
    };
    load.iter().enumerate().map(line).collect()
}

/// Estimated before the first step with even routing and at most, the same for the rows that then came, and measured, next
/// to the latter.
fn memory(summary: &Summary) -> Vec<String> {
    let mut rows = vec![
        ["", "even routing", "at most", "as routed", "measured", "", "states"].map(String::from).to_vec(),
    ];
    for (rank, record) in summary.memory.iter().enumerate() {
        let off = record.measured as f64 / record.as_routed.max(1) as f64 - 1.0;
        let [even, most, routed, measured, states] =
            [record.even, record.estimated, record.as_routed, record.measured, record.states].map(readable);
        rows.push(vec![
            format!("rank {rank}"),
            even,
            most,
            routed,
            measured,
            format!("{:+.0}%", 100.0 * off),
            states,
        ]);
    }
    let mut lines = table(&rows, 1);
    lines
        .extend(summary.peak_rss.map(|bytes| format!("  process: {} resident at its peak", readable(bytes))));
    lines
}
