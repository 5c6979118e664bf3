//! What limits a step, and which changes to layout, training or cluster would help most.

use crate::architecture::Architecture;
use crate::hardware::Cluster;
use crate::parallelism::{Parallelism, Recomputation, Routing, Training};
use crate::precision::Precision;
use crate::pricing::{Priced, Pricer};
use crate::ranged::Ranged;
use crate::schedule::ScheduleKind;
use crate::search::SAFE;

/// Where a change is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// In the layout: costs nothing.
    Layout,
    /// In how is trained: formats, batch, overlap, balance.
    Training,
    /// In what is rented or bought.
    Cluster,
}

/// One change and what it would bring.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Where.
    pub place: Place,
    /// What, in words.
    pub what: String,
    /// Seconds of a step of as many tokens as before.
    pub step: Ranged,
    /// Share of the step that it saves, as predicted.
    pub saves: f64,
    /// Whether it fits the memory, and as surely as can be counted on or as without the change.
    pub fits: bool,
}

/// A change to try; each takes a simulation.
#[derive(Debug, Clone, PartialEq)]
pub struct Trial {
    place: Place,
    what: String,
    layout: Parallelism,
    /// Where another cluster or training is tried.
    other: Option<Box<(Cluster, Training)>>,
    /// Times as many sequences as before.
    batch: f64,
}

impl Trial {
    /// What the change would bring to `model`, whose layout takes `now` with `pricer`; nothing where it cannot be.
    pub fn price(&self, model: &Architecture, pricer: &Pricer, now: &Priced) -> Option<Change> {
        let then = match self.other.as_deref() {
            Some((cluster, training)) => Pricer::new(model, cluster, training).price_simulated(&self.layout),
            None => pricer.price_simulated(&self.layout),
        };
        let then = then.ok()?;
        let step = then.step().times(self.batch.recip());
        let saves = 1.0 - step.value / now.step_s;
        let odds = |priced: &Priced| priced.fit_probability(pricer.gpu().memory_bytes);
        let fits = then.fits && odds(&then) >= SAFE.min(odds(now));
        Some(Change { place: self.place, what: self.what.clone(), step, saves, fits })
    }
}

/// Savings below this are noise.
const LEAST_SAVING: f64 = 0.002;

/// Tries changes one at a time and ranks those that help; `most` of them.
pub fn changes(
    model: &Architecture,
    cluster: &Cluster,
    layout: &Parallelism,
    training: &Training,
    most: usize,
) -> Vec<Change> {
    let pricer = Pricer::new(model, cluster, training);
    let Ok(now) = pricer.price_simulated(layout) else { return Vec::new() };
    let trials = trials(cluster, layout, training);
    best_changes(trials.iter().filter_map(|trial| trial.price(model, &pricer, &now)).collect(), most)
}

/// All changes that are tried, one at a time.
pub fn trials(cluster: &Cluster, layout: &Parallelism, training: &Training) -> Vec<Trial> {
    let mut all = layout_trials(layout);
    all.extend(training_trials(cluster, layout, training));
    all.extend(cluster_trials(cluster, layout, training));
    all
}

/// Changes that fit, by what they save, the best of each kind; `most` of them.
pub fn best_changes(mut found: Vec<Change>, most: usize) -> Vec<Change> {
    found.retain(|change| change.fits && change.saves > LEAST_SAVING);
    found.sort_by(|a, b| b.saves.total_cmp(&a.saves).then(a.what.cmp(&b.what)));
    // One change of the layout stands for its neighbours.
    let mut layouts = 0;
    found.retain(|change| {
        layouts += usize::from(change.place == Place::Layout);
        change.place != Place::Layout || layouts <= 1
    });
    found.truncate(most);
    found
}

/// Every degree doubled at the cost of another, other schedules, other recomputation.
fn layout_trials(layout: &Parallelism) -> Vec<Trial> {
    let mut tried: Vec<Parallelism> = Vec::new();
    for up in 0..4 {
        for down in (0..4).filter(|down| *down != up) {
            let mut degrees = [layout.tensor, layout.pipeline, layout.context, layout.data];
            if degrees[down].is_multiple_of(2) {
                degrees[up] *= 2;
                degrees[down] /= 2;
                let [tensor, pipeline, context, data] = degrees;
                tried.push(Parallelism { tensor, pipeline, context, data, ..*layout });
            }
        }
    }
    for micro_batch in [layout.micro_batch * 2, layout.micro_batch / 2] {
        tried.push(Parallelism { micro_batch, ..*layout });
    }
    for expert in [layout.expert * 2, layout.expert / 2] {
        tried.push(Parallelism { expert, ..*layout });
    }
    for recompute in [Recomputation::None, Recomputation::SELECTIVE, Recomputation::Full] {
        tried.push(Parallelism { recompute, ..*layout });
    }
    for schedule in ScheduleKind::ALL {
        for virtual_stages in [1, 2, 4] {
            tried.push(Parallelism { schedule, virtual_stages, ..*layout });
        }
    }
    let trial = |layout: Parallelism| {
        let what = format!("lay it out as {layout}");
        Trial { place: Place::Layout, what, layout, other: None, batch: 1.0 }
    };
    tried.into_iter().filter(|other| other != layout).map(trial).collect()
}

fn training_trials(cluster: &Cluster, layout: &Parallelism, training: &Training) -> Vec<Trial> {
    let mut out = Vec::new();
    let mut with = |what: &str, batch: f64, edit: &dyn Fn(&mut Training)| {
        let mut other = training.clone();
        edit(&mut other);
        let other = Some(Box::new((cluster.clone(), other)));
        out.push(Trial { place: Place::Training, what: what.into(), layout: *layout, other, batch });
    };
    let narrow = cluster.gpu.fp8_flops > cluster.gpu.bf16_flops;
    if narrow && !training.compute.is_narrow() {
        with("compute products in fp8", 1.0, &|training| training.compute = Precision::Fp8);
    }
    if layout.expert > 1 {
        if !training.wire.is_narrow() {
            with("send rows to experts in fp8", 1.0, &|training| training.wire = Precision::Fp8);
        }
        if !training.dispatch.deduplicated {
            with("send a row once to a server", 1.0, &|training| training.dispatch.deduplicated = true);
        }
        if !training.dispatch.overlapped {
            let what = "overlap dispatch with another micro-batch";
            with(what, 1.0, &|training| training.dispatch.overlapped = true);
        }
    }
    if training.routing != Routing::Balanced {
        with("balance the experts perfectly", 1.0, &|training| training.routing = Routing::Balanced);
    }
    with("twice the batch", 2.0, &|training| training.global_batch *= 2);
    out
}

fn cluster_trials(cluster: &Cluster, layout: &Parallelism, training: &Training) -> Vec<Trial> {
    let mut out = Vec::new();
    let mut with = |what: String, edit: &dyn Fn(&mut Cluster)| {
        let mut other = cluster.clone();
        edit(&mut other);
        let other = Some(Box::new((other, training.clone())));
        out.push(Trial { place: Place::Cluster, what, layout: *layout, other, batch: 1.0 });
    };
    for (at, level) in cluster.levels.iter().enumerate() {
        with(format!("twice the bandwidth of {}", level.name), &|cluster| {
            cluster.levels[at].bytes_per_s *= 2.0
        });
    }
    let domain = cluster.nvlink_domain();
    if domain < 64 && cluster.levels.get(1).is_some_and(|outer| outer.width >= 64) {
        let what = format!("{} over 64 GPUs instead of {domain}", cluster.levels[0].name);
        with(what, &|cluster| cluster.levels[0].width = 64);
    }
    with("twice the memory bandwidth".into(), &|cluster| cluster.gpu.memory_bytes_per_s *= 2.0);
    out
}

/// The largest part of the step, and its share.
pub fn bottleneck(priced: &Priced) -> (&'static str, f64) {
    let parts = priced.breakdown.parts();
    let largest = parts.iter().max_by(|a, b| a.1.total_cmp(&b.1)).copied().unwrap_or(("nothing", 0.0));
    (largest.0, largest.1 / priced.step_s)
}
