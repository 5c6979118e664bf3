//! A simulated step as trace events and as a drawing.

use std::fmt::Write as _;

use super::{Lane, Simulated, Span};
use crate::schedule::{Op, Pass, Schedule};

/// One box of a trace viewer.
#[derive(Debug, Clone, PartialEq)]
pub struct TraceEvent {
    /// The simulated rank.
    pub rank: usize,
    /// Its lane.
    pub lane: Lane,
    /// The segment's name.
    pub name: &'static str,
    /// The op that it belongs to.
    pub op: String,
    /// Seconds since the step's start.
    pub start_s: f64,
    /// Its length.
    pub seconds: f64,
}

/// The events of a step simulated with its spans, by rank, then by start.
pub fn trace_events(schedule: &Schedule, simulated: &Simulated) -> impl Iterator<Item = TraceEvent> {
    let mut spans: Vec<&Span> = simulated.spans.iter().collect();
    spans.sort_by(|a, b| a.rank.cmp(&b.rank).then(a.start_s.total_cmp(&b.start_s)).then(a.lane.cmp(&b.lane)));
    let event = move |span: &Span| TraceEvent {
        rank: span.rank as usize,
        lane: span.lane,
        name: span.name,
        op: op_of(schedule, span).to_string(),
        start_s: span.start_s,
        seconds: span.seconds,
    };
    spans.into_iter().map(event)
}

/// The op of a span; of an overlapped one, its half.
fn op_of(schedule: &Schedule, span: &Span) -> Op {
    let op = schedule.ranks[span.rank as usize % schedule.ranks.len()][span.op as usize];
    match op {
        Op::Overlapped { forward, .. } if span.half == 0 => Op::Forward(forward),
        Op::Overlapped { backward, .. } => Op::Backward(backward),
        op => op,
    }
}

/// The middle of a step, of which nothing is written or drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cut {
    /// Where it begins, in seconds of the step.
    pub from_s: f64,
    /// Where it ends.
    pub to_s: f64,
    /// What is left, of how many.
    pub kept: usize,
    /// All there is.
    pub all: usize,
}

impl Cut {
    /// What leaves about `most` of what begins at `starts`, half of them from the start and half of them from the end; none if there are no
    /// more.
    pub fn of(mut starts: Vec<f64>, most: usize) -> Option<Self> {
        let all = starts.len();
        if all <= most {
            return None;
        }
        let mut at = |index: usize| *starts.select_nth_unstable_by(index, f64::total_cmp).1;
        let (from_s, to_s) = (at(most / 2), at(all - most / 2));
        let cut = Self { from_s, to_s, kept: 0, all };
        let kept = starts.iter().filter(|start_s| !cut.takes(**start_s)).count();
        Some(Self { kept, ..cut })
    }

    /// Whether what begins at `start_s` is left out.
    pub fn takes(&self, start_s: f64) -> bool {
        start_s >= self.from_s && start_s < self.to_s
    }
}

const ROW: f64 = 24.0;
const LEFT: f64 = 64.0;
const WIDTH: f64 = 1200.0;
/// What stands for the middle of a step that is left out.
const GAP: f64 = 30.0;

/// Draws a step simulated with its spans: one row a rank, time to the right, one box an op, with its micro-batch where
/// there is room. Where there are no stages, exchanges that are under way are the lower half of a row, the rest the upper one. Colours are classes (`forward`, `backward`, `input`, `weights`, `other`, darker from the second stage of a
/// rank on) with defaults that read on light and on dark ground. Of more than `most` boxes those at the start and at the end of the step
/// are drawn, which is said at the foot and returned.
pub fn svg(schedule: &Schedule, simulated: &Simulated, most: usize) -> (String, Option<Cut>) {
    let (shapes, cut) = boxes(schedule, simulated, most);
    let scale = Scale::of(simulated.seconds, cut);
    let height = ROW * (simulated.ranks.len() as f64 + 1.0);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <style>.forward{{fill:#5b8ff9}}.backward{{fill:#61c17a}}.input{{fill:#8fd3a3}}.weights{{fill:#b59be6}}\
         .other{{fill:#a8a8a8}}.later{{filter:brightness(.75)}}.label{{fill:#888}}</style>\n",
        LEFT + WIDTH + 8.0
    );
    for rank in 0..simulated.ranks.len() {
        let y = ROW * rank as f64 + 16.0;
        let _ = writeln!(text, "<text class=\"label\" x=\"0\" y=\"{y:.1}\">rank {rank}</text>");
    }
    for shape in shapes {
        shape.draw(&mut text, &scale);
    }
    let (foot, end) = (height - 6.0, LEFT + WIDTH);
    if let Some(Cut { from_s, to_s, kept, all }) = cut {
        let (x, ranks) = (LEFT + from_s * scale.per_s + GAP / 2.0, height - ROW);
        let _ = writeln!(
            text,
            "<rect class=\"label\" x=\"{x:.1}\" y=\"0\" width=\"1\" height=\"{ranks}\"/>\
             <text class=\"label\" x=\"{LEFT}\" y=\"{foot:.1}\">{kept} of {all} boxes: from {from_s:.6} s to the line, \
             at {to_s:.6} s, nothing is drawn</text>"
        );
    }
    let _ = writeln!(
        text,
        "<text class=\"label\" text-anchor=\"end\" x=\"{end}\" y=\"{foot:.1}\">{:.6} s</text>\n</svg>",
        simulated.seconds
    );
    (text, cut)
}

/// Where a time is drawn.
struct Scale {
    per_s: f64,
    cut: Option<Cut>,
}

impl Scale {
    fn of(step_s: f64, cut: Option<Cut>) -> Self {
        let (width, seconds) = match cut {
            Some(cut) => (WIDTH - GAP, cut.from_s + step_s - cut.to_s),
            None => (WIDTH, step_s),
        };
        Self { per_s: width / seconds.max(f64::MIN_POSITIVE), cut }
    }

    fn x(&self, at_s: f64) -> f64 {
        LEFT + match self.cut {
            Some(cut) if at_s >= cut.to_s => (cut.from_s + at_s - cut.to_s) * self.per_s + GAP,
            Some(cut) => at_s.min(cut.from_s) * self.per_s,
            None => at_s * self.per_s,
        }
    }
}

/// One op (or half of one) from its first segment to its last.
struct Shape {
    rank: usize,
    /// The row's half: 0 whole, 1 upper, 2 lower.
    part: u8,
    class: &'static str,
    label: String,
    title: String,
    start_s: f64,
    end_s: f64,
}

/// The boxes of a step, and what of more than `most` is left out.
fn boxes(schedule: &Schedule, simulated: &Simulated, most: usize) -> (Vec<Shape>, Option<Cut>) {
    let mut spans: Vec<&Span> = simulated.spans.iter().collect();
    spans.sort_by_key(|span| (span.rank, span.op, span.half));
    let same = |a: &&Span, b: &&Span| (a.rank, a.op, a.half) == (b.rank, b.op, b.half);
    let starts = spans.chunk_by(same).map(start_s).collect();
    let cut = Cut::of(starts, most);
    let kept = spans.chunk_by(same).filter(|spans| !cut.is_some_and(|cut| cut.takes(start_s(spans))));
    (kept.map(|spans| shape(schedule, spans)).collect(), cut)
}

fn start_s(spans: &[&Span]) -> f64 {
    spans.iter().map(|span| span.start_s).fold(f64::INFINITY, f64::min)
}

fn shape(schedule: &Schedule, spans: &[&Span]) -> Shape {
    let rank = spans[0].rank as usize;
    let list = &schedule.ranks[rank % schedule.ranks.len()];
    let op = op_of(schedule, spans[0]);
    let (class, chunk) = match op {
        Op::Forward(chunk) => ("forward", Some(chunk)),
        Op::Backward(chunk) => ("backward", Some(chunk)),
        Op::BackwardInput(chunk) => ("input", Some(chunk)),
        Op::BackwardWeight(chunk) => ("weights", Some(chunk)),
        Op::Kernel(kernel) => (class_of(kernel.pass), None),
        _ => ("other", None),
    };
    let first_stage =
        schedule.placement.iter().position(|at| usize::from(*at) == rank % schedule.ranks.len());
    let later = chunk.is_some_and(|chunk| first_stage != Some(usize::from(chunk.stage)));
    let overlapped = matches!(list[spans[0].op as usize], Op::Overlapped { .. });
    Shape {
        rank,
        part: match op {
            _ if overlapped => spans[0].half + 1,
            Op::Start(_) if schedule.stages() == 0 => 2,
            _ if schedule.stages() == 0 => 1,
            _ => 0,
        },
        class: if later { later_class(class) } else { class },
        label: chunk.map_or_else(String::new, |chunk| chunk.micro_batch.to_string()),
        title: op.to_string(),
        start_s: start_s(spans),
        end_s: spans.iter().map(|span| span.start_s + span.seconds).fold(0.0, f64::max),
    }
}

fn class_of(pass: Pass) -> &'static str {
    match pass {
        Pass::Forward => "forward",
        Pass::Again => "forward later",
        Pass::Backward => "backward",
        Pass::Weights => "weights",
        Pass::Update => "other",
    }
}

fn later_class(class: &'static str) -> &'static str {
    match class {
        "forward" => "forward later",
        "backward" => "backward later",
        "input" => "input later",
        _ => "weights later",
    }
}

impl Shape {
    fn draw(&self, text: &mut String, scale: &Scale) {
        let x = scale.x(self.start_s);
        let width = scale.x(self.end_s) - x;
        let (top, height) = match self.part {
            0 => (0.0, ROW - 4.0),
            part => (f64::from(part - 1) * (ROW - 4.0) / 2.0, (ROW - 4.0) / 2.0),
        };
        let y = ROW * self.rank as f64 + top;
        let _ = write!(
            text,
            "<rect class=\"{}\" x=\"{x:.2}\" y=\"{y:.1}\" width=\"{width:.2}\" height=\"{height:.1}\"><title>{}</title></rect>",
            self.class, self.title
        );
        if width > 7.0 * self.label.len() as f64 && self.part == 0 {
            let _ = write!(text, "<text x=\"{:.2}\" y=\"{:.1}\">{}</text>", x + 2.0, y + 14.0, self.label);
        }
        text.push('\n');
    }
}
