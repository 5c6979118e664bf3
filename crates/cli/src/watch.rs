//! A run as it goes, for the person who watches it.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use unisono_mesh::Fold;
use unisono_plan::MemoryEstimate;
use unisono_train::system::readable;
use unisono_train::{Event, NodeRecord, Observer, RunConfig, Started, StepRecord, ValidationRecord};

use crate::screen::Screen;
use crate::signals::Signals;
use crate::style::{between, counted, duration, grouped, percent, short};

/// Shows the events of a run.
pub struct Watch<'a> {
    /// Where to.
    pub screen: Arc<Screen>,
    /// Who may ask to stop.
    pub signals: &'a Signals,
    /// What runs.
    pub config: &'a RunConfig,
    seen: Mutex<Seen>,
}

/// What has been shown.
#[derive(Debug, Default, Clone)]
pub struct Seen {
    /// The beginning.
    pub started: Option<Started>,
    /// The newest step.
    pub last: Option<StepRecord>,
    /// The newest step with a line.
    shown: Option<u64>,
    /// The newest checkpoint of this start.
    pub checkpoint: Option<u64>,
}

impl<'a> Watch<'a> {
    /// Has seen nothing yet.
    pub fn new(screen: Arc<Screen>, signals: &'a Signals, config: &'a RunConfig) -> Self {
        Self { screen, signals, config, seen: Mutex::default() }
    }

    /// What was seen. Shows the last step, if it has no line yet.
    pub fn finish(self) -> Seen {
        let mut seen = self.seen.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(record) = seen.last.take_if(|record| seen.shown != Some(record.step)) {
            self.screen.line(&step_line(&record, self.config));
            seen.last = Some(record);
        }
        self.screen.finish();
        seen
    }

    fn started(&self, started: Started, seen: &mut Seen) {
        for line in introduction(&started, self.config) {
            self.screen.line(&line);
        }
        for passed in &started.rejected {
            self.screen.complain("warning", &format!("passed over a checkpoint: {passed}"));
        }
        self.screen.start(started.from_step, started.steps);
        seen.started = Some(started);
    }

    fn step(&self, record: StepRecord, seen: &mut Seen) {
        let steps = self.config.train.steps;
        let message =
            format!("loss {:.4}  {} tokens/s", record.loss, grouped(record.tokens_per_s.round() as u64));
        let first = seen.last.is_none();
        if first || record.step == steps || record.step.is_multiple_of(self.config.log.every) {
            self.screen.line(&step_line(&record, self.config));
            seen.shown = Some(record.step);
        }
        self.screen.advance(record.step, steps, message);
        seen.last = Some(record);
    }
}

impl Observer for Watch<'_> {
    fn event(&self, event: Event) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Started(started) => self.started(*started, &mut seen),
            Event::Step(record) => self.step(*record, &mut seen),
            Event::Validation(record) => {
                self.screen.line(&self.screen.paint.green(&validation_line(&record, self.config)));
            }
            Event::Checkpoint { step, bytes, seconds } => {
                let line = format!(
                    "step {}  checkpoint of {} saved in {}",
                    position(step, self.config),
                    readable(bytes),
                    duration(seconds)
                );
                self.screen.line(&self.screen.paint.faint(&line));
                seen.checkpoint = Some(step);
            }
            Event::Warning(message) => self.screen.complain("warning", &message),
        }
    }

    fn stop(&self) -> bool {
        self.signals.stop()
    }
}

/// `12/400`, as wide for every step.
fn position(step: u64, config: &RunConfig) -> String {
    let steps = config.train.steps.to_string();
    format!("{step:>width$}/{steps}", width = steps.len())
}

/// One step in one line of at most 100 columns; behind `comm` the share of time and what was moved.
fn step_line(record: &StepRecord, config: &RunConfig) -> String {
    let load = match record.expert_load.is_empty() {
        true => String::new(),
        false => format!("  load {:.2}", record.expert_load_max_over_mean),
    };
    let skipped = if record.skipped { "  skipped" } else { "" };
    format!(
        "step {}  loss {:.4}  {:.3} bits/byte  grad {:.2}  {:>6} tok/s{load}  comm {:>3} {}{skipped}",
        position(record.step, config),
        record.loss,
        record.bits_per_byte,
        record.grad_norm,
        grouped(record.tokens_per_s.round() as u64),
        percent(record.communication_share),
        mebibytes(record.bytes_moved) + " MiB",
    )
}

fn validation_line(record: &ValidationRecord, config: &RunConfig) -> String {
    format!(
        "step {}  validation loss {:.4}  {:.3} bits/byte  over {} tokens",
        position(record.validation_step, config),
        record.loss,
        record.bits_per_byte,
        grouped(record.tokens)
    )
}

/// What was found before the first step.
fn introduction(started: &Started, config: &RunConfig) -> Vec<String> {
    let (total, active) = started.parameters;
    let passes = started.steps as f64 * started.tokens_per_step as f64 / started.train_tokens.max(1) as f64;
    let source = config
        .data
        .path
        .as_deref()
        .map_or_else(|| "built-in text (Shakespeare)".into(), |path: &Path| path.display().to_string());
    let mut lines = vec![
        model_line(config),
        format!(
            "size    {} parameters, {} of them active for a token",
            short(total as u64),
            short(active as u64)
        ),
        layout_line(started, config),
    ];
    lines.extend(machine_lines(started));
    lines.extend([
        format!(
            "batch   {} sequences of {} tokens = {} tokens a step, {} steps",
            config.global_batch(),
            config.train.sequence_length,
            grouped(started.tokens_per_step as u64),
            grouped(started.steps),
        ),
        format!(
            "data    {source}: {} training tokens; the run reads {}",
            grouped(started.train_tokens),
            if passes < 1.0 {
                format!("{:.1}% of them", 100.0 * passes)
            } else {
                format!("them {passes:.1} times")
            },
        ),
    ]);
    lines.extend(memory_lines(started));
    lines.extend(started.predicted_step_s.map(|seconds| {
        let rate = grouped((started.tokens_per_step as f64 / seconds) as u64);
        let seconds = duration(seconds) + &between(started.predicted_interval_s);
        format!("step    ~{seconds}, {rate} tokens/s, by what `unisono bench local` measured")
    }));
    lines.push(format!("run     {}", started.folder.display()));
    if started.from_step > 0 {
        lines.push(format!("resume  from the checkpoint of step {}", started.from_step));
    }
    lines.push(String::new());
    lines
}

fn model_line(config: &RunConfig) -> String {
    let model = &config.model;
    let dense = if model.first_dense > 0 { format!(" ({} dense)", model.first_dense) } else { String::new() };
    let layers = format!("model   {} layers{dense} of width {}", model.num_hidden_layers, model.hidden_size);
    if model.moe_layers() == 0 {
        return format!("{layers}, no experts");
    }
    let shared = match model.num_shared_experts {
        0 => String::new(),
        shared => format!(" + {shared} shared"),
    };
    format!("{layers}, {} experts, top {}{shared}", model.num_experts, model.top_k)
}

fn layout_line(started: &Started, config: &RunConfig) -> String {
    let grid = &config.grid;
    let each = Fold::new(*grid, started.ranks).map_or(0, |fold| fold.slots_per_rank());
    format!(
        "layout  {} in expert groups of {}, folded onto {} of {}: {} each",
        counted(grid.slots() as u64, "replica"),
        grid.expert_group,
        counted(started.ranks as u64, "rank"),
        counted(started.threads as u64, "thread"),
        counted(each as u64, "replica"),
    )
}

/// Nodes that are alike in a line each, and what lies between the ranks.
fn machine_lines(started: &Started) -> Vec<String> {
    /// More lines would be a list nobody reads.
    const SHOWN: usize = 8;
    let world = &started.world;
    let node = |node: &NodeRecord| {
        let ranks: Vec<String> = node.ranks.iter().map(usize::to_string).collect();
        let ranks = match ranks.as_slice() {
            [one] => format!("rank {one}"),
            [first, .., last] if node.ranks.windows(2).all(|pair| pair[1] == pair[0] + 1) => {
                format!("ranks {first}-{last}")
            }
            list => format!("ranks {}", list.join(", ")),
        };
        format!("        {}: {ranks}, {}, {} cores", node.host, node.cpu, node.cores)
    };
    let (near, far) = world.links;
    let count = world.nodes.len();
    let nodes = counted(count as u64, "node");
    let links = match (near, far) {
        (0, 0) => "no links".to_string(),
        (1, 0) => "1 link within the node".to_string(),
        (near, 0) => format!("{near} links within the node"),
        (near, far) => format!("{near} links within nodes, {far} between nodes"),
    };
    let mut lines = vec![format!("machine {nodes}, {links}, over {}", world.transport)];
    lines.extend(world.nodes.iter().take(SHOWN).map(node));
    if count > SHOWN {
        lines.push(format!("        and {} more", count - SHOWN));
    }
    lines
}

/// What ranks need with even routing, what the fullest may need while routing is uneven, and the fullest by part.
fn memory_lines(started: &Started) -> Vec<String> {
    let ranks = &started.memory;
    let Some(fullest) = ranks.iter().max_by_key(|rank| rank.total()) else { return Vec::new() };
    let even = ranks.iter().map(MemoryEstimate::even);
    let even = match [even.clone().min(), even.max()].map(|bytes| mebibytes(bytes.unwrap_or(0))) {
        [least, most] if least == most => most,
        [least, most] => format!("{least} to {most}"),
    };
    let uneven = match fullest.imbalance {
        0 => String::new(),
        _ => format!(" with even routing, up to {} while a new router's is not", mebibytes(fullest.total())),
    };
    let parts = fullest.parts().into_iter().filter(|(what, _)| *what != "imbalance");
    let parts: Vec<String> = parts.map(|(what, bytes)| format!("{what} {}", mebibytes(bytes))).collect();
    vec![format!("memory  ~{even} MiB a rank{uneven}"), format!("        fullest: {}", parts.join(", "))]
}

/// A number of MiB, with a decimal where it is small.
fn mebibytes(bytes: u64) -> String {
    let value = bytes as f64 / f64::from(1 << 20);
    if value < 9.95 { format!("{value:.1}") } else { format!("{value:.0}") }
}
