//! What limits a step, and which changes to layout, training or cluster would help most.

use crate::architecture::Architecture;
use crate::hardware::Cluster;
use crate::parallelism::{Parallelism, Recomputation, Routing, Training};
use crate::precision::Precision;
use crate::pricing::{Priced, Pricer};
use crate::ranged::Ranged;
use crate::schedule::ScheduleKind;

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
    /// Whether it fits the memory.
    pub fits: bool,
}

/// Savings below this are noise.
const LEAST_SAVING: f64 = 0.002;

/// Tries changes one at a time and ranks those that fit by what they save, the best of each kind; `most` of them.
pub fn changes(
    model: &Architecture,
    cluster: &Cluster,
    layout: &Parallelism,
    training: &Training,
    most: usize,
) -> Vec<Change> {
    let pricer = Pricer::new(model, cluster, training);
    let Ok(now) = pricer.price_simulated(layout) else { return Vec::new() };
    let mut found = layout_changes(&pricer, layout, &now);
    found.extend(training_changes(model, cluster, layout, training, &now));
    found.extend(cluster_changes(model, cluster, layout, training, &now));
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

fn change(place: Place, what: impl Into<String>, now: &Priced, then: &Priced, batch: f64) -> Change {
    let step = then.step().times(batch.recip());
    Change { place, what: what.into(), step, saves: 1.0 - step.value / now.step_s, fits: then.fits }
}

/// Every degree doubled at the cost of another, other schedules, other recomputation.
fn layout_changes(pricer: &Pricer, layout: &Parallelism, now: &Priced) -> Vec<Change> {
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
    let priced = tried.iter().filter(|other| *other != layout).filter_map(|other| {
        let then = pricer.price_simulated(other).ok()?;
        Some(change(Place::Layout, format!("lay it out as {other}"), now, &then, 1.0))
    });
    priced.collect()
}

fn training_changes(
    model: &Architecture,
    cluster: &Cluster,
    layout: &Parallelism,
    training: &Training,
    now: &Priced,
) -> Vec<Change> {
    let mut out = Vec::new();
    let mut with = |what: &str, batch: f64, edit: &dyn Fn(&mut Training)| {
        let mut other = training.clone();
        edit(&mut other);
        if let Ok(then) = Pricer::new(model, cluster, &other).price_simulated(layout) {
            out.push(change(Place::Training, what, now, &then, batch));
        }
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

fn cluster_changes(
    model: &Architecture,
    cluster: &Cluster,
    layout: &Parallelism,
    training: &Training,
    now: &Priced,
) -> Vec<Change> {
    let mut out = Vec::new();
    let mut with = |what: String, edit: &dyn Fn(&mut Cluster)| {
        let mut other = cluster.clone();
        edit(&mut other);
        if let Ok(then) = Pricer::new(model, &other, training).price_simulated(layout) {
            out.push(change(Place::Cluster, what, now, &then, 1.0));
        }
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
