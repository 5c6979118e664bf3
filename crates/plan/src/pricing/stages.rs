//! Which layers lie on which pipeline rank.

use std::iter::Sum;
use std::ops::Range;

use crate::architecture::{Architecture, FeedForward, LayerKind, LayerParameters};
use crate::parallelism::Parallelism;

/// At most so many distinct kinds of layers: mixers, networks, windows.
pub(crate) const MOST_KINDS: usize = 8;

/// Layers of a model, counted by kind up to every layer.
#[derive(Debug, Clone)]
pub(crate) struct Stages {
    kinds: Vec<(LayerKind, bool)>,
    /// Parameters of a layer of each kind.
    parameters: Vec<LayerParameters>,
    /// `[layer]` layers of each kind before it.
    before: Vec<[u32; MOST_KINDS]>,
    /// Layers of multi-token prediction, which stay with the head.
    with_head: usize,
    /// How many layers have as many active parameters as the heads and what stays with them.
    head_layers: usize,
}

/// What a pipeline rank holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Share {
    /// Layers of each kind.
    pub layers: [u32; MOST_KINDS],
    /// Whether it embeds.
    pub embedding: bool,
    /// Whether it computes the loss.
    pub head: bool,
}

impl Stages {
    pub fn of(model: &Architecture) -> Self {
        let (mut kinds, mut before) = (Vec::new(), vec![[0; MOST_KINDS]]);
        let mut count = [0; MOST_KINDS];
        for layer in 0..model.layers + model.mtp_layers {
            let kind = (model.kind(layer), model.is_windowed(layer));
            let at = kinds.iter().position(|known| *known == kind).unwrap_or_else(|| {
                kinds.push(kind);
                kinds.len() - 1
            });
            count[at.min(MOST_KINDS - 1)] += 1;
            before.push(count);
        }
        let heads = (1 + model.mtp_layers) * model.hidden * model.vocab;
        let layers =
            model.active_parameters().saturating_sub(model.embedding_parameters()) / model.layers.max(1);
        let head_layers = (heads as f64 / layers.max(1) as f64).round() as usize;
        let parameters = kinds.iter().map(|(kind, _)| model.layer_parameters(*kind)).collect();
        Self { kinds, parameters, before, with_head: model.mtp_layers, head_layers }
    }

    /// Layers with experts, those of multi-token prediction included.
    pub fn moe_layers(&self) -> usize {
        let all = self.before.last().into_iter().flatten();
        let of_kind = all.zip(&self.kinds).filter(|(_, (kind, _))| kind.ffn == FeedForward::Moe);
        of_kind.map(|(layers, _)| *layers as usize).sum()
    }

    /// Layers with experts among those of a share.
    pub fn moe_layers_of(&self, share: &Share) -> f64 {
        let all = share.layers.iter().zip(&self.kinds);
        all.filter(|(_, (kind, _))| kind.ffn == FeedForward::Moe).map(|(layers, _)| f64::from(*layers)).sum()
    }

    pub fn kinds(&self) -> &[(LayerKind, bool)] {
        &self.kinds
    }

    /// Parameters of a layer of each kind.
    pub fn parameters(&self) -> &[LayerParameters] {
        &self.parameters
    }

    /// Layers of chunk `chunk` of `chunks`: as many in each if they divide. Otherwise the last gets fewer by the layers that its
    /// head amounts to, as published recipes do, and the others are as even as can be, the first ones having fewer.
    pub fn chunk(&self, chunk: usize, chunks: usize) -> Range<usize> {
        let all = self.before.len() - 1;
        let layers = all - self.with_head;
        let last = match layers.is_multiple_of(chunks) {
            true => layers / chunks,
            false => {
                let even = ((layers + self.head_layers) as f64 / chunks as f64).round() as usize;
                even.saturating_sub(self.head_layers)
            }
        };
        if chunk + 1 == chunks {
            return layers - last..all;
        }
        let (others, left) = (chunks - 1, layers - last);
        let (base, more) = (left / others, left % others);
        let fewer_first = (others - more).div_ceil(2);
        let start = |chunk: usize| chunk * base + chunk.saturating_sub(fewer_first).min(more);
        start(chunk)..start(chunk + 1)
    }

    /// What chunk `chunk` of `chunks` holds.
    pub fn chunk_share(&self, chunk: usize, chunks: usize) -> Share {
        let held = self.chunk(chunk, chunks);
        let layers = |kind: usize| self.before[held.end][kind] - self.before[held.start][kind];
        Share { layers: std::array::from_fn(layers), embedding: chunk == 0, head: chunk + 1 == chunks }
    }

    /// The kind of the first layer of chunk `chunk` of `chunks`, by its place in [`Self::kinds`]; none where it has no layers.
    pub fn first_kind(&self, chunk: usize, chunks: usize) -> Option<usize> {
        let layer = Some(self.chunk(chunk, chunks)).filter(|layers| !layers.is_empty())?.start;
        let [before, after] = [layer, layer + 1].map(|layer| self.before[layer]);
        (0..MOST_KINDS).find(|kind| after[*kind] > before[*kind])
    }

    /// What pipeline rank `rank` holds, in the order of its stages.
    pub fn chunk_shares(&self, layout: &Parallelism, rank: usize) -> impl Iterator<Item = Share> {
        let (layout, chunks) = (*layout, layout.chunks());
        (0..layout.virtual_stages).map(move |turn| self.chunk_share(layout.chunk(rank, turn), chunks))
    }

    /// What pipeline rank `rank` holds in all of its stages.
    pub fn share(&self, layout: &Parallelism, rank: usize) -> Share {
        self.chunk_shares(layout, rank).sum()
    }
}

impl Sum for Share {
    fn sum<I: Iterator<Item = Self>>(chunks: I) -> Self {
        let mut sum = Self::default();
        for chunk in chunks {
            sum.layers.iter_mut().zip(chunk.layers).for_each(|(sum, layers)| *sum += layers);
            sum.embedding |= chunk.embedding;
            sum.head |= chunk.head;
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::ScheduleKind;

    #[test]
    fn every_layer_lies_on_one_rank_and_the_ends_hold_fewer() {
        for name in ["DeepSeek-V3", "Llama-3.1-405B", "Nemotron-3-Nano-30B", "GPT-OSS-20B"] {
            let model = Architecture::built_in(name).unwrap();
            let stages = Stages::of(&model);
            for (pipeline, virtual_stages) in [(1, 1), (4, 1), (8, 3), (16, 2), (7, 1)] {
                let schedules = [ScheduleKind::Interleaved, ScheduleKind::DualPipeV];
                for schedule in schedules.into_iter().take(if virtual_stages == 2 { 2 } else { 1 }) {
                    let layout = Parallelism { pipeline, virtual_stages, schedule, ..Parallelism::default() };
                    let shares: Vec<Share> = (0..pipeline).map(|rank| stages.share(&layout, rank)).collect();
                    let held: u32 = shares.iter().flat_map(|share| share.layers).sum();
                    assert_eq!(held as usize, model.layers + model.mtp_layers, "{name} {layout:?}");
                    assert_eq!(shares.iter().filter(|share| share.head).count(), 1);
                    assert_eq!(shares.iter().filter(|share| share.embedding).count(), 1);
                }
            }
        }
        let stages = Stages::of(&Architecture::built_in("Llama-3.1-405B").unwrap());
        let sizes: Vec<usize> = [0, 1, 62, 63].map(|chunk| stages.chunk(chunk, 64).len()).to_vec();
        assert_eq!(sizes, [1, 2, 2, 1]);
        // The last has one of 61 layers, the layer of multi-token prediction and two heads.
        let stages = Stages::of(&Architecture::built_in("DeepSeek-V3").unwrap());
        let sizes: Vec<usize> = [0, 1, 14, 15].map(|chunk| stages.chunk(chunk, 16).len()).to_vec();
        assert_eq!(sizes, [4, 4, 4, 2]);
    }
}
