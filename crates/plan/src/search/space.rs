//! Every feasible layout of a training on a cluster, in a fixed order.

use crate::architecture::{Architecture, Attention, FeedForward};
use crate::hardware::Cluster;
use crate::parallelism::{Modules, Parallelism, Recomputation, Sharding, Training};
use crate::schedule::ScheduleKind;

/// Context parallelism is for long sequences: a rank keeps at least so many tokens of one.
const LEAST_TOKENS: usize = 4096;

/// The longest pipelines and micro-batches that are tried, and stages a rank.
const MOST_PIPELINE: usize = 64;
const MOST_MICRO_BATCH: usize = 16;
const MOST_STAGES: usize = 8;

/// What may be computed again, from nothing to everything, of parts that the model has: first DeepSeek-V3's choice (norms,
/// latent up-projections and the experts' activation), then whole feed-forward networks as well. The core of attention is
/// free: fused attention always computes it again.
fn recomputations(model: &Architecture) -> [Recomputation; 4] {
    let has = |ffn| (0..model.layers).any(|layer| model.kind(layer).ffn == ffn);
    let (moe, dense) = (has(FeedForward::Moe), has(FeedForward::Dense));
    let small = Modules {
        core_attention: true,
        mla_up_projection: matches!(model.attention, Attention::Latent { .. }),
        mlp: false,
        moe_activation: moe,
        moe: false,
        layernorm: true,
    };
    let more = Modules { mlp: dense, moe, ..small };
    [Recomputation::None, Recomputation::Modules(small), Recomputation::Modules(more), Recomputation::Full]
}

/// The degrees of all feasible layouts: an iterator over layouts with the simplest schedule, a micro-batch of one sequence
/// and nothing recomputed; [`Layouts::variants`] gives the rest.
#[derive(Debug, Clone)]
pub struct Layouts {
    model: Architecture,
    training: Training,
    recompute: Vec<Recomputation>,
    degrees: std::vec::IntoIter<Parallelism>,
}

impl Layouts {
    /// All layouts of `training` of `model` on the whole of `cluster`, a half or a quarter of it, or as much as divides well.
    pub fn new(model: &Architecture, cluster: &Cluster, training: &Training) -> Self {
        let mut degrees = Vec::new();
        for gpus in counts(cluster.gpus) {
            dense_degrees(model, cluster, training, gpus, &mut degrees);
        }
        let recompute = recomputations(model).to_vec();
        Self { model: model.clone(), training: training.clone(), recompute, degrees: degrees.into_iter() }
    }

    /// The same with nothing but `recompute` computed again.
    pub fn recomputing(mut self, recompute: Recomputation) -> Self {
        self.recompute = vec![recompute];
        self
    }

    /// The layouts that differ from `degrees` in micro-batch, schedule and recomputation.
    pub fn variants(&self, degrees: Parallelism) -> impl Iterator<Item = Parallelism> {
        let sequences = self.training.global_batch / degrees.data;
        let schedules = schedules(&self.model, degrees.pipeline);
        let micro_batches = powers(MOST_MICRO_BATCH).filter(move |size| sequences.is_multiple_of(*size));
        micro_batches.flat_map(move |micro_batch| {
            let allowed = schedules.clone().into_iter().filter(move |(schedule, virtual_stages)| {
                schedule.check_sizes(degrees.pipeline, *virtual_stages, sequences / micro_batch).is_ok()
            });
            allowed.flat_map(move |(schedule, virtual_stages)| {
                self.recompute.iter().map(move |recompute| Parallelism {
                    micro_batch,
                    schedule,
                    virtual_stages,
                    recompute: *recompute,
                    ..degrees
                })
            })
        })
    }
}

impl Iterator for Layouts {
    type Item = Parallelism;

    fn next(&mut self) -> Option<Parallelism> {
        self.degrees.next()
    }
}

/// How many of so many GPUs are used: all, a half, a quarter; of a number that divides badly also the largest 2^n and 3 x 2^n.
fn counts(gpus: usize) -> Vec<usize> {
    let parts = [1, 2, 4].into_iter().filter(|part| gpus.is_multiple_of(*part)).map(|part| gpus / part);
    let round = [1, 3].map(|odd| powers(gpus / odd).last().map_or(0, |power| odd * power));
    let awkward = !round.contains(&gpus);
    let mut counts: Vec<usize> =
        parts.chain(round.into_iter().filter(|count| awkward && *count > 0)).collect();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    counts.dedup();
    counts
}

/// 1, 2, 4, ... up to `most`.
fn powers(most: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(1), |size| Some(size * 2)).take_while(move |size| *size <= most)
}

fn divisors(of: usize, most: usize) -> impl Iterator<Item = usize> {
    (1..=most.min(of)).filter(move |size| of.is_multiple_of(*size))
}

fn dense_degrees(
    model: &Architecture,
    cluster: &Cluster,
    training: &Training,
    gpus: usize,
    degrees: &mut Vec<Parallelism>,
) {
    let heads = model.attention.heads();
    let longest = (training.sequence / LEAST_TOKENS).max(1);
    for tensor in powers(cluster.nvlink_domain().min(heads)).filter(|size| gpus.is_multiple_of(*size)) {
        for context in powers(longest).filter(|size| (gpus / tensor).is_multiple_of(*size)) {
            let rest = gpus / tensor / context;
            for pipeline in divisors(rest, MOST_PIPELINE.min(model.layers)) {
                let data = rest / pipeline;
                let dense = Parallelism { tensor, context, pipeline, data, ..Parallelism::default() };
                for sharding in shardings(&dense) {
                    expert_degrees(model, training, Parallelism { sharding, ..dense }, degrees);
                }
            }
        }
    }
}

/// With pipelines, states of the optimizer are sharded; without, gradients and parameters may be, too.
fn shardings(layout: &Parallelism) -> Vec<Sharding> {
    match (layout.data * layout.context, layout.pipeline) {
        (1, _) => vec![Sharding::None],
        (_, 1) => vec![Sharding::Zero1, Sharding::Zero2, Sharding::Zero3],
        _ => vec![Sharding::Zero1],
    }
}

fn expert_degrees(
    model: &Architecture,
    training: &Training,
    dense: Parallelism,
    degrees: &mut Vec<Parallelism>,
) {
    let experts = model.moe.as_ref().map_or(1, |moe| moe.experts);
    let whole = [1, dense.tensor];
    for expert_tensor in whole.into_iter().take(if dense.tensor > 1 && experts > 1 { 2 } else { 1 }) {
        for expert in divisors(experts, experts) {
            let layout = Parallelism { expert, expert_tensor, ..dense };
            if layout.check(model, training).is_ok() {
                degrees.push(layout);
            }
        }
    }
}

/// Schedules with their stages a rank, all that the model has layers for.
fn schedules(model: &Architecture, pipeline: usize) -> Vec<(ScheduleKind, usize)> {
    let mut all = vec![(ScheduleKind::OneForwardOneBackward, 1)];
    if pipeline > 1 {
        all.push((ScheduleKind::ZeroBubble, 1));
        let most = MOST_STAGES.min(model.layers / pipeline);
        all.extend((2..=most).map(|stages| (ScheduleKind::Interleaved, stages)));
        if 2 * pipeline <= model.layers {
            all.push((ScheduleKind::DualPipeV, 2));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_that_divide_badly_leave_some_gpus_idle() {
        assert_eq!(counts(2048), [2048, 1024, 512]);
        assert_eq!(counts(96), [96, 48, 24]);
        assert_eq!(counts(100), [100, 96, 64, 50, 25]);
        assert_eq!(counts(1), [1]);
    }
}
