//! Discrete-event steps of DeepSeek-V3's pipeline: 16 pipeline ranks, DualPipeV, two layers a stage, experts over 64 replicas.
//! 2,048 ranks by symmetry, and 16,384 ranks of which no two replicas are equal.

use std::time::Instant;

use unisono_plan::schedule::{Op, Schedule, ScheduleKind};
use unisono_plan::simulate::{
    Costs, LinkClass, Replicas, Segment, StageCosts, Transfer, UniformCosts, simulate,
};

const PIPELINE: usize = 16;
/// Layers of a stage of DualPipeV.
const LAYERS: usize = 2;
const EXPERT_PARALLEL: u32 = 64;

/// The passes of a layer: attention, dispatch, experts, combine. Seconds are of DeepSeek-V3's order.
fn layer(attention_s: f64, experts_s: f64) -> [Segment; 4] {
    let exchange =
        |name, seconds| Segment { group: EXPERT_PARALLEL, link: Some(0), ..Segment::exchange(name, seconds) };
    [
        Segment::compute("attention", attention_s),
        exchange("dispatch", 0.9e-3),
        Segment::compute("experts", experts_s),
        exchange("combine", 1.1e-3),
    ]
}

fn stage(layers: usize) -> StageCosts {
    let passes = |attention_s, experts_s| layer(attention_s, experts_s).repeat(layers);
    StageCosts {
        forward: passes(2.0e-3, 2.5e-3),
        input: passes(2.2e-3, 2.5e-3),
        weights: vec![Segment::compute("weights", 3.0e-3 * layers as f64)],
        backward: passes(4.0e-3, 4.0e-3),
        reduce: vec![Segment { group: EXPERT_PARALLEL, ..Segment::exchange("reduce", 20e-3) }],
    }
}

fn costs() -> UniformCosts {
    UniformCosts {
        stages: vec![stage(LAYERS); 2 * PIPELINE],
        transfer: Transfer { seconds: 0.6e-3, link: Some(0) },
        update: vec![vec![Segment::compute("optimizer", 0.2)]; PIPELINE],
        gather: vec![vec![Segment::exchange("gather", 20e-3)]; PIPELINE],
        // The network adapter of a rank.
        links: vec![LinkClass { name: "network", ranks: 1, capacity: 1.0 }],
        slowdown: 0.05,
    }
}

/// Every replica has forwards of its own length.
struct Skewed {
    base: UniformCosts,
    /// `[replica]`
    forward: Vec<Vec<Segment>>,
}

impl Skewed {
    fn new(base: UniformCosts, replicas: usize) -> Self {
        let forward = (0..replicas).map(|replica| {
            let factor = 1.0 + 0.02 * (replica * 7919 % replicas) as f64 / replicas as f64;
            let scaled = |segment: &Segment| Segment { seconds: segment.seconds * factor, ..*segment };
            base.stages[0].forward.iter().map(scaled).collect()
        });
        Self { forward: forward.collect(), base }
    }
}

impl Costs for Skewed {
    fn segments(&self, replica: usize, rank: usize, op: &Op) -> &[Segment] {
        match op {
            Op::Forward(_) => &self.forward[replica],
            _ => self.base.segments(replica, rank, op),
        }
    }

    fn transfer(&self, replica: usize, from_stage: u16, to_stage: u16) -> Transfer {
        self.base.transfer(replica, from_stage, to_stage)
    }

    fn links(&self) -> &[LinkClass] {
        self.base.links()
    }

    fn slowdown(&self) -> f64 {
        self.base.slowdown()
    }
}

/// Seconds that this process has run on a core so far; 0 where the system does not tell. Unlike the time of day it does not
/// count what others run.
fn core_s() -> f64 {
    let status = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    let nanoseconds = status.split_whitespace().next().and_then(|field| field.parse::<f64>().ok());
    nanoseconds.unwrap_or(0.0) / 1e9
}

/// The most memory that this process has held, in MB; 0 where the system does not tell.
fn peak_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

fn measure(
    name: &str,
    schedule: &Schedule,
    costs: &impl Costs,
    replicas: Replicas,
    ranks: usize,
    rounds: usize,
) {
    let mut seconds = Vec::new();
    let mut result = None;
    for _ in 0..rounds {
        let (begin, core) = (Instant::now(), core_s());
        let simulated = simulate(schedule, costs, replicas, false).expect("the schedule is free of deadlock");
        seconds.push((begin.elapsed().as_secs_f64(), core_s() - core));
        assert!(result.as_ref().is_none_or(|before| *before == simulated), "results differ between rounds");
        result = Some(simulated);
    }
    seconds.sort_by(|a, b| a.1.total_cmp(&b.1));
    let (simulated, (elapsed, core)) = (result.expect("at least one round"), seconds[seconds.len() / 2]);
    println!(
        "{name:22} {ranks:6} ranks  {:5} ops a rank  {:10} events  {:8.1} ms ({:8.1} on a core)  peak {:5} MB  step {:.3} s",
        schedule.ranks[0].len(),
        simulated.events,
        elapsed * 1e3,
        core * 1e3,
        peak_mb(),
        simulated.seconds,
    );
}

fn main() {
    for kind in ScheduleKind::ALL {
        let (virtual_stages, stages) = match kind {
            ScheduleKind::OneForwardOneBackward | ScheduleKind::ZeroBubble => (1, PIPELINE),
            ScheduleKind::Interleaved | ScheduleKind::DualPipeV => (2, 2 * PIPELINE),
        };
        let schedule = kind
            .schedule(PIPELINE, virtual_stages, 15 * PIPELINE / 2)
            .or_else(|_| kind.schedule(PIPELINE, virtual_stages, 8 * PIPELINE));
        let schedule = schedule.expect("allowed sizes").then_update();
        let costs = UniformCosts { stages: vec![stage(2 * LAYERS * PIPELINE / stages); stages], ..costs() };
        measure(&format!("{kind} by symmetry"), &schedule, &costs, Replicas::symmetric(128), 2048, 15);
    }
    let schedule = ScheduleKind::DualPipeV.schedule(PIPELINE, 2, 120).expect("allowed sizes").then_update();
    for replicas in [128, 1024] {
        let skewed = Skewed::new(costs(), replicas);
        let name = "dualpipev, all ranks";
        measure(name, &schedule, &skewed, Replicas::all(replicas), PIPELINE * replicas, 1);
    }
}
