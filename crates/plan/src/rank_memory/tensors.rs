//! Memory of a chosen plan tensor by tensor, from the tables that its sums are made of.

use std::borrow::Cow;

use crate::architecture::{LayerKind, Weight, WeightGroup};
use crate::parallelism::Parallelism;
use crate::pricing::{MOST_KINDS, Pricer, Share};
use crate::schedule::InFlight;
use crate::software::Trainable;

use super::activations::{Kept, Tensor};
use super::{Alive, COMMUNICATOR_BYTES, Moment, groups, receives, sharded};

/// What a tensor belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// A layer of a kind.
    Layer {
        /// What it consists of.
        kind: LayerKind,
        /// Whether its attention is windowed.
        windowed: bool,
    },
    /// The embedding.
    Embedding,
    /// The output head with its norm, and what multi-token prediction has beside its layers.
    Head,
    /// The whole rank.
    Rank,
}

/// A parameter with its gradient and optimizer states.
#[derive(Debug, Clone, PartialEq)]
pub struct ParameterTensor {
    /// What it belongs to.
    pub unit: Unit,
    /// Its name in transformers.
    pub name: &'static str,
    /// Elements along each axis that tensor and expert parallelism leave a GPU; a fraction where a degree does not divide them.
    pub shape: Vec<f64>,
    /// So many layers of the rank have one.
    pub layers: u32,
    /// Bytes of an element: as weight, as gradient, as master copy and moments.
    pub element_bytes: [f64; 3],
    /// Bytes of one that a GPU holds, after sharding over replicas: weights, gradients, optimizer states.
    pub bytes: [f64; 3],
}

/// What else a rank holds.
#[derive(Debug, Clone, PartialEq)]
pub struct HeldTensor {
    /// The part of [`super::RankMemory::parts`] that it counts to.
    pub part: &'static str,
    /// What it belongs to.
    pub unit: Unit,
    /// What it is.
    pub name: Cow<'static, str>,
    /// Bytes of one: of one layer and micro-batch, where it belongs to a layer.
    pub bytes: f64,
    /// So many are held at the peak: of what layers keep, layers times micro-batches in flight.
    pub count: usize,
    /// Whether it belongs to a micro-batch that waits for its backward or its weight gradients; the rest passes or stays.
    pub is_kept: bool,
    /// Whether the backward computes it again, so that none is kept.
    pub recomputed: bool,
}

/// Everything that a pipeline rank holds at its peak.
#[derive(Debug, Clone, PartialEq)]
pub struct RankTensors {
    /// Weights, gradients and optimizer states.
    pub parameters: Vec<ParameterTensor>,
    /// The rest.
    pub held: Vec<HeldTensor>,
}

impl RankTensors {
    /// Bytes of all tensors of a part of [`super::RankMemory::parts`].
    pub fn bytes(&self, part: &str) -> f64 {
        let states = ["weights", "gradients", "optimizer"].iter().position(|state| *state == part);
        match states {
            Some(state) => self.parameters.iter().map(|of| f64::from(of.layers) * of.bytes[state]).sum(),
            None => {
                let held = self.held.iter().filter(|of| of.part == part);
                held.map(|of| of.count as f64 * of.bytes).sum()
            }
        }
    }

    fn push(
        &mut self,
        part: &'static str,
        unit: Unit,
        name: impl Into<Cow<'static, str>>,
        bytes: f64,
        count: usize,
    ) {
        let is_kept = part == "operands";
        self.held.push(HeldTensor {
            part,
            unit,
            name: name.into(),
            bytes,
            count,
            is_kept,
            recomputed: false,
        });
    }
}

impl Pricer {
    /// What pipeline rank `rank` of a checked layout holds at its peak, tensor by tensor: what [`Pricer::rank_memory`] sums.
    pub fn rank_tensors(&self, layout: &Parallelism, rank: usize) -> RankTensors {
        let bytes = self.kept_bytes(layout);
        let alive = self.alive(layout, rank, &bytes);
        let moment = self.moment(layout, rank, &alive, &bytes);
        let kept: Vec<Kept> = self.kept_by_kind(layout).collect();
        let mut tensors =
            RankTensors { parameters: self.parameter_tensors(layout, &alive.share), held: Vec::new() };
        self.push_kept(&mut tensors, layout, rank, &alive, &moment, &kept);
        self.push_passing(&mut tensors, layout, &alive, &moment, &kept);
        self.push_communication(&mut tensors, layout, rank, &alive, &moment);
        for of in self.workspaces() {
            tensors.push("workspace", Unit::Rank, of.name, of.bytes, of.count);
        }
        let memory = self.memory_of(layout, rank, &bytes);
        let gaps = "gaps between what comes and goes";
        tensors.push("fragmentation", Unit::Rank, gaps, memory.fragmentation, 1);
        tensors.push("context", Unit::Rank, "the process before it allocates anything", memory.context, 1);
        tensors
    }

    fn unit(&self, at: usize) -> Unit {
        let (kind, windowed) = self.kinds()[at];
        Unit::Layer { kind, windowed }
    }

    /// Kinds of layers that `share` has, by their place in [`Pricer::kinds`], with their number.
    fn kinds_of(share: &Share) -> impl Iterator<Item = (usize, u32)> {
        (0..MOST_KINDS).zip(share.layers).filter(|(_, layers)| *layers > 0)
    }

    fn parameter_tensors(&self, layout: &Parallelism, share: &Share) -> Vec<ParameterTensor> {
        let (d, vocab) = (self.model.hidden, self.model.vocab);
        let mut all = Vec::new();
        let mut push = |unit, layers, weight: Weight| {
            all.push(self.parameter_tensor(layout, unit, layers, &weight));
        };
        for (at, layers) in Self::kinds_of(share) {
            let weights = self.model.layer_weights(self.kinds()[at].0);
            weights.into_iter().for_each(|weight| push(self.unit(at), layers, weight));
        }
        let table = |name| Weight { name, group: WeightGroup::Mixer, shape: vec![vocab, d], split: Some(0) };
        let whole = |name, shape: &[usize]| Weight {
            name,
            group: WeightGroup::Norm,
            shape: shape.to_vec(),
            split: None,
        };
        if share.embedding {
            push(Unit::Embedding, 1, table("embed_tokens"));
        }
        if share.head {
            if !(share.embedding && self.model.tied_embeddings) {
                push(Unit::Head, 1, table("lm_head"));
            }
            push(Unit::Head, 1, whole("norm", &[d]));
            let extra = self.model.mtp_layers as u32;
            let prediction = [
                whole("eh_proj", &[d, 2 * d]),
                whole("enorm", &[d]),
                whole("hnorm", &[d]),
                whole("shared_head.norm", &[d]),
            ];
            let prediction = prediction.into_iter().filter(|_| extra > 0);
            prediction.for_each(|weight| push(Unit::Head, extra, weight));
        }
        all
    }

    fn parameter_tensor(
        &self,
        layout: &Parallelism,
        unit: Unit,
        layers: u32,
        weight: &Weight,
    ) -> ParameterTensor {
        let mut shape: Vec<f64> = weight.shape.iter().map(|elements| *elements as f64).collect();
        let of_experts = weight.group == WeightGroup::Experts;
        let degree = if of_experts { layout.expert_tensor } else { layout.tensor };
        if let Some(axis) = weight.split {
            shape[axis] /= degree as f64;
        }
        if of_experts {
            shape[0] /= layout.expert as f64;
        }
        let elements: f64 = shape.iter().product();
        let held = match of_experts {
            true => sharded(layout, 0.0, elements),
            false => sharded(layout, elements, 0.0),
        };
        let element_bytes = self.state_widths();
        let bytes = std::array::from_fn(|state| held[state] * element_bytes[state]);
        ParameterTensor { unit, name: weight.name, shape, layers, element_bytes, bytes }
    }

    /// What layers keep of micro-batches in flight, and what weight gradients wait for.
    fn push_kept(
        &self,
        tensors: &mut RankTensors,
        layout: &Parallelism,
        rank: usize,
        alive: &Alive,
        moment: &Moment,
        kept: &[Kept],
    ) {
        let turns =
            || alive.chunks.iter().enumerate().map(|(turn, of)| (turn, of, moment.peak.in_flight(turn)));
        let waits = self.training.trainable != Trainable::Adapters;
        for (at, _) in Self::kinds_of(&alive.share) {
            let count = |pick: fn(InFlight) -> usize| -> usize {
                turns().map(|(_, chunk, in_flight)| chunk.layers[at] as usize * pick(in_flight)).sum()
            };
            let [layers, waiting] = [count(|of| of.activations), count(|of| of.weight_operands)];
            let first = |turn| self.stages.first_kind(layout.chunk(rank, turn), layout.chunks());
            let from_others = turns()
                .filter(|(turn, chunk, _)| receives(layout, rank, *turn, chunk) && first(*turn) == Some(at));
            let received: usize = from_others.map(|(_, _, in_flight)| in_flight.activations).sum();
            for of in kept[at].tensors(moment.bytes.half).filter(|of| of.bytes > 0.0) {
                let recomputed = of.is_recomputed(layout.recompute);
                let less = if of.is_input() { received } else { 0 };
                tensors.held.push(HeldTensor {
                    part: if of.is_dispatched() { "dispatch" } else { "activations" },
                    unit: self.unit(at),
                    name: of.name.into(),
                    bytes: of.bytes,
                    count: if recomputed { 0 } else { layers - less },
                    is_kept: true,
                    recomputed,
                });
            }
            let operands = kept[at].tensors(moment.bytes.half).filter(|of| of.operand > 0.0);
            for of in operands.filter(|_| waits && waiting > 0) {
                tensors.push("operands", self.unit(at), of.name, of.operand, waiting);
            }
        }
        let heads = turns().filter(|(_, chunk, _)| chunk.head);
        let waiting: usize = heads.map(|(_, _, in_flight)| in_flight.weight_operands).sum();
        if waits && waiting > 0 {
            let name = "inputs of the head and gradients of the logits";
            tensors.push("operands", Unit::Head, name, moment.bytes.head, waiting);
        }
    }

    /// Tensors of the layer, or of the loss, that is being computed.
    fn push_passing(
        &self,
        tensors: &mut RankTensors,
        layout: &Parallelism,
        alive: &Alive,
        moment: &Moment,
        kept: &[Kept],
    ) {
        let in_loss = alive.peaks_in_loss(&moment.peak);
        if alive.share.head {
            let count = usize::from(in_loss);
            tensors.push("logits", Unit::Head, "logits and their gradient", alive.logits, count);
        }
        if in_loss || alive.share.layers[alive.widest] == 0 {
            return;
        }
        let kept = &kept[alive.widest];
        let unit = self.unit(alive.widest);
        let mut push = |of: &Tensor, name: String, count| {
            let part = if of.is_dispatched() { "dispatch" } else { "temporary" };
            tensors.push(part, unit, name, of.bytes, count);
        };
        let again = kept.tensors(super::Half::Both).filter(|of| of.is_recomputed(layout.recompute));
        for of in again.filter(|of| of.bytes > 0.0) {
            push(of, format!("{}, computed again", of.name), 1);
        }
        if let Some((of, gradients)) = kept.widest() {
            push(of, format!("gradient of {}", of.name), gradients);
        }
    }

    fn push_communication(
        &self,
        tensors: &mut RankTensors,
        layout: &Parallelism,
        rank: usize,
        alive: &Alive,
        moment: &Moment,
    ) {
        let part = "communication";
        let held = self.rank_parameters(layout, &alive.share);
        let buckets = self.buckets(layout, &alive.share, &held);
        for of in buckets.into_iter().filter(|of| of.bytes > 0.0) {
            tensors.push(part, Unit::Rank, of.name, of.bytes, of.count);
        }
        let receiving =
            alive.chunks.iter().enumerate().filter(|(turn, chunk)| receives(layout, rank, *turn, chunk));
        let count: usize = receiving.map(|(turn, _)| moment.peak.in_flight(turn).activations).sum();
        if count > 0 {
            tensors.push(
                part,
                Unit::Rank,
                "inputs of stages, as received",
                self.message_bytes(layout),
                count,
            );
        }
        for group in groups(layout) {
            tensors.push(part, Unit::Rank, group, COMMUNICATOR_BYTES, 1);
        }
    }
}
