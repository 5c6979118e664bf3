//! Bytes that cross each class of links in a step.

use crate::architecture::{FeedForward, Mixer};
use crate::collectives::{Collective, CollectiveModel, Exchange, Group};
use crate::parallelism::{Parallelism, Recomputation};
use crate::software::Trainable;

use super::{Passes, Pricer};

/// Why bytes are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Axis {
    /// Between the halves of a tensor-parallel layer.
    Tensor,
    /// Keys and values of other parts of a sequence.
    Context,
    /// Rows to their experts and back.
    Expert,
    /// Activations and their gradients between stages.
    Pipeline,
    /// Gradients and parameters between replicas.
    Data,
}

impl Axis {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Tensor, Self::Context, Self::Expert, Self::Pipeline, Self::Data];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tensor => "tensor",
            Self::Context => "context",
            Self::Expert => "expert",
            Self::Pipeline => "pipeline",
            Self::Data => "data",
        }
    }
}

/// Bytes that a GPU sends in a step, by axis and by level of the network (innermost first): the mean over pipeline ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct Traffic {
    /// Names of the levels.
    pub levels: Vec<String>,
    /// `[axis][level]`, axes in the order of [`Axis::ALL`].
    pub bytes: Vec<Vec<f64>>,
}

impl Traffic {
    /// Bytes over one level.
    pub fn of_level(&self, level: usize) -> f64 {
        self.bytes.iter().map(|levels| levels[level]).sum()
    }

    fn add(&mut self, axis: Axis, by_level: &[f64], times: f64) {
        for (sum, bytes) in self.bytes[axis as usize].iter_mut().zip(by_level) {
            *sum += times * bytes;
        }
    }
}

impl Traffic {
    /// The classes of links that an axis crosses, innermost first: `NVLink + network`; empty where it sends nothing.
    pub fn links(&self, axis: Axis) -> String {
        let crossed = self.levels.iter().zip(&self.bytes[axis as usize]).filter(|(_, bytes)| **bytes > 0.0);
        crossed.map(|(level, _)| level.as_str()).collect::<Vec<_>>().join(" + ")
    }
}

impl Pricer {
    /// What a GPU sends in a step of a checked layout.
    pub fn traffic(&self, layout: &Parallelism) -> Traffic {
        let cluster = &self.rates.cluster;
        let model = CollectiveModel::of(cluster);
        let mut traffic = Traffic {
            levels: cluster.levels.iter().map(|level| level.name.clone()).collect(),
            bytes: vec![vec![0.0; cluster.levels.len()]; Axis::ALL.len()],
        };
        // Layers and micro-batches that pass a GPU, on average.
        let micro_batches = layout.micro_batches(&self.training) as f64;
        for layer in 0..self.model.layers + self.model.mtp_layers {
            self.layer_traffic(layout, &model, layer, micro_batches / layout.pipeline as f64, &mut traffic);
        }
        self.pipeline_traffic(layout, micro_batches, &mut traffic);
        self.state_traffic(layout, &model, &mut traffic);
        traffic
    }

    fn layer_traffic(
        &self,
        layout: &Parallelism,
        model: &CollectiveModel,
        layer: usize,
        times: f64,
        traffic: &mut Traffic,
    ) {
        let (kind, width) = (self.model.kind(layer), self.training.element_bytes());
        let tokens = self.sizes(layout).tokens();
        let again = if layout.recompute == Recomputation::Full { 1.0 } else { 0.0 };
        let mixer = f64::from(u8::from(kind.mixer != Mixer::None && !self.model.parallel_blocks));
        let shared = self.model.moe.as_ref().is_some_and(|moe| moe.shared_ffn > 0);
        let network = match kind.ffn {
            FeedForward::None => 0.0,
            FeedForward::Moe => f64::from(u8::from(shared)),
            FeedForward::Dense => 1.0,
        };
        let gathers = 2.0 + 2.0 * again + if layout.sequence_parallel { 3.0 } else { 2.0 };
        let bytes = width * tokens * self.model.hidden as f64;
        let group = Group { size: layout.tensor, stride: 1 };
        let sent = model.bytes_by_level(Collective::AllGather, bytes, group);
        traffic.add(Axis::Tensor, &sent, times * gathers * (mixer + network));
        if kind.mixer == Mixer::Attention {
            let attention = &self.model.attention;
            let heads = (attention.kv_heads() as f64 / layout.tensor as f64).max(1.0);
            let keys =
                tokens * layout.context as f64 * heads * (attention.qk_dim() + attention.v_dim()) as f64;
            let group = Group { size: layout.context, stride: layout.tensor };
            let sent = model.bytes_by_level(Collective::AllGather, width * keys, group);
            traffic.add(Axis::Context, &sent, times * (3.0 + again));
        }
        if kind.ffn == FeedForward::Moe {
            self.expert_traffic(layout, model, times, again, traffic);
        }
    }

    /// Rows there and results back; the backward sends gradients both ways as results come back.
    fn expert_traffic(
        &self,
        layout: &Parallelism,
        model: &CollectiveModel,
        times: f64,
        again: f64,
        traffic: &mut Traffic,
    ) {
        let [out, back] = self.training.wire_bytes().map(|bytes| self.expert_bytes(layout, model, bytes));
        traffic.add(Axis::Expert, &out, times * (1.0 + again));
        traffic.add(Axis::Expert, &back, times * (3.0 + again));
    }

    /// Bytes over each level of one exchange of a micro-batch's rows with experts, an element of `element_bytes`.
    pub(super) fn expert_bytes(
        &self,
        layout: &Parallelism,
        model: &CollectiveModel,
        element_bytes: f64,
    ) -> Vec<f64> {
        let Some(moe) = &self.model.moe else { return vec![0.0; self.rates.cluster.levels.len()] };
        let group = Group { size: layout.expert, stride: layout.expert_tensor };
        let tokens = self.sizes(layout).tokens() / layout.tensor as f64;
        let row_bytes = element_bytes * self.model.dispatch_width() as f64;
        if !self.training.dispatch.deduplicated {
            let bytes = tokens * moe.top_k as f64 * row_bytes;
            return model.bytes_by_level(Collective::AllToAll, bytes, group);
        }
        let exchange = Exchange {
            tokens,
            row_bytes,
            top_k: moe.top_k,
            experts: moe.experts,
            group,
            max_servers: (moe.groups > 1).then_some(moe.top_groups),
            multiprocessors: 0,
        };
        model.exchange_bytes(&exchange)
    }

    /// Each chunk's activations go to the rank of the next one, and their gradients back.
    fn pipeline_traffic(&self, layout: &Parallelism, micro_batches: f64, traffic: &mut Traffic) {
        let (bytes, apart) = (self.message_bytes(layout), layout.stage_gpus());
        let times = 2.0 * micro_batches / layout.pipeline as f64;
        for chunk in 1..layout.chunks() {
            let [from, to] = [chunk - 1, chunk].map(|chunk| layout.rank_of_chunk(chunk));
            if from != to {
                let level = self.rates.cluster.level_between(from * apart, to * apart);
                traffic.bytes[Axis::Pipeline as usize][level] += times * bytes;
            }
        }
    }

    fn state_traffic(&self, layout: &Parallelism, model: &CollectiveModel, traffic: &mut Traffic) {
        if self.training.trainable == Trainable::Adapters {
            return;
        }
        let dense = Group { size: layout.data * layout.context, stride: layout.tensor };
        let expert = Group { size: layout.expert_data(), stride: layout.expert * layout.expert_tensor };
        let (gradients, weights) =
            (self.training.optimizer.gradients.bytes(), self.training.compute.bytes().clamp(2.0, 4.0));
        let times = layout.state_exchanges(&self.training);
        let each = times.gradients * gradients + times.weights * weights;
        for rank in 0..layout.pipeline {
            let held = self.rank_parameters(layout, &self.stages.share(layout, rank));
            for (parameters, group) in [(held.dense, dense), (held.experts, expert)] {
                let sent = model.bytes_by_level(Collective::AllGather, each * parameters, group);
                traffic.add(Axis::Data, &sent, 1.0 / layout.pipeline as f64);
            }
        }
    }

    /// The passes of every distinct kind of layer of a checked layout, in the order of [`Pricer::kinds`].
    pub fn passes_by_kind(&self, layout: &Parallelism) -> Vec<Passes> {
        self.kind_passes(layout)
    }
}
