//! Which rank owns which elements of which parameters' optimizer state (ZeRO-1), as pure arithmetic.
//!
//! The parameters are *segments*: the dense buffer, then each expert block by (MoE layer, expert). A segment is summed
//! over its leaves (slots for the dense one, expert groups for an expert) and cut into shards of whole norm chunks
//! over the ranks that hold it.

use std::ops::Range;

use unisono_comm::{GatherPlan, GatherSegment, ReducePlan, Segment};
use unisono_mesh::{ExpertPlacement, Fold, shard};
use unisono_plan::{Layout, NORM_CHUNK};

/// What a segment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentKind {
    /// All dense parameters.
    Dense,
    /// The block of one expert.
    Expert {
        /// Index among the MoE layers.
        moe_layer: usize,
        /// The expert.
        expert: usize,
    },
}

/// One segment and its cut.
#[derive(Debug, Clone)]
pub struct ShardedSegment {
    /// What it is.
    pub kind: SegmentKind,
    /// Leaves of its sum.
    pub items: usize,
    /// `[rank]` leaves that a rank holds.
    pub held: Vec<Range<usize>>,
    /// `[rank]` elements whose optimizer state a rank owns.
    pub shards: Vec<Range<usize>>,
    /// The first of its chunks among all chunks of the model.
    pub first_chunk: usize,
}

/// One piece of a rank's shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The segment.
    pub segment: usize,
    /// What that is.
    pub kind: SegmentKind,
    /// Elements of the segment.
    pub range: Range<usize>,
    /// Where they start in the rank's concatenated shards.
    pub offset: usize,
}

/// The cut of a whole model over the ranks of a fold.
#[derive(Debug, Clone)]
pub struct Shards {
    /// All segments, in order.
    pub segments: Vec<ShardedSegment>,
    chunks: usize,
}

impl Shards {
    /// Cuts a model over a fold.
    pub fn new(layout: &Layout, placement: &ExpertPlacement, fold: &Fold) -> Self {
        let ranks = fold.ranks();
        let cut = |len: usize, owners: &[usize]| {
            let mut shards = vec![0..0; ranks];
            for (index, rank) in owners.iter().enumerate() {
                shards[*rank] = shard::part_in_chunks(len, NORM_CHUNK, owners.len(), index);
            }
            shards
        };
        let everyone: Vec<usize> = (0..ranks).collect();
        let mut segments = vec![ShardedSegment {
            kind: SegmentKind::Dense,
            items: fold.grid().slots(),
            held: (0..ranks).map(|rank| fold.slots_of(rank)).collect(),
            shards: cut(layout.dense_len(), &everyone),
            first_chunk: 0,
        }];
        let mut first_chunk = layout.dense_len() / NORM_CHUNK;
        for moe_layer in 0..layout.moe_layers().len() {
            for expert in 0..layout.num_experts() {
                segments.push(ShardedSegment {
                    kind: SegmentKind::Expert { moe_layer, expert },
                    items: fold.grid().groups(),
                    held: (0..ranks).map(|rank| placement.groups_of(rank, expert)).collect(),
                    shards: cut(layout.expert_len(), &placement.ranks_of(expert)),
                    first_chunk,
                });
                first_chunk += layout.expert_len() / NORM_CHUNK;
            }
        }
        Self { segments, chunks: first_chunk }
    }

    /// Chunks of the whole model.
    pub fn chunks(&self) -> usize {
        self.chunks
    }

    /// The pieces whose optimizer state `rank` owns, in the order of a reduce-scatter's output.
    pub fn pieces(&self, rank: usize) -> Vec<Piece> {
        let mut offset = 0;
        let mut pieces = Vec::new();
        for (index, segment) in self.segments.iter().enumerate() {
            let range = segment.shards[rank].clone();
            if !range.is_empty() {
                let len = range.len();
                pieces.push(Piece { segment: index, kind: segment.kind, range, offset });
                offset += len;
            }
        }
        pieces
    }

    /// Elements whose optimizer state `rank` owns.
    pub fn owned_len(&self, rank: usize) -> usize {
        self.segments.iter().map(|segment| segment.shards[rank].len()).sum()
    }

    /// The chunks that `rank` owns, as ranges of all chunks, ascending and merged.
    pub fn owned_chunks(&self, rank: usize) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for segment in &self.segments {
            let shard = &segment.shards[rank];
            if shard.is_empty() {
                continue;
            }
            let start = segment.first_chunk + shard.start / NORM_CHUNK;
            let end = segment.first_chunk + shard.end / NORM_CHUNK;
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        ranges
    }

    /// The reduce-scatter of all gradients.
    pub fn reduce_plan(&self) -> ReducePlan {
        let segments = self.segments.iter().map(|segment| Segment {
            items: segment.items,
            held: segment.held.clone(),
            shards: segment.shards.clone(),
        });
        ReducePlan { segments: segments.collect() }
    }

    /// The all-gather of updated parameters of one kind. A segment that one rank holds alone stays where it is.
    /// `offset` says where a segment lies in this rank's receive buffer (any value if the rank does not hold it).
    pub fn gather_plan(
        &self,
        dense: bool,
        offset: impl Fn(SegmentKind) -> usize,
    ) -> (GatherPlan, Vec<usize>) {
        let (mut segments, mut chosen) = (Vec::new(), Vec::new());
        for (index, segment) in self.segments.iter().enumerate() {
            let wanted: Vec<bool> = segment.held.iter().map(|leaves| !leaves.is_empty()).collect();
            let shared = wanted.iter().filter(|wants| **wants).count() > 1;
            if shared && (segment.kind == SegmentKind::Dense) == dense {
                segments.push(GatherSegment {
                    shards: segment.shards.clone(),
                    wanted,
                    offset: offset(segment.kind),
                });
                chosen.push(index);
            }
        }
        (GatherPlan { segments }, chosen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use unisono_mesh::Grid;
    use unisono_plan::ModelConfig;

    #[test]
    fn every_chunk_is_owned_once_on_every_fold() {
        let model =
            ModelConfig { num_experts: 12, hidden_size: 64, vocab_size: 300, ..ModelConfig::default() };
        let layout = Layout::new(&model);
        for (replicas, expert_group) in [(6, 3), (6, 6), (6, 2), (6, 1)] {
            for ranks in [1, 2, 3, 6] {
                let fold =
                    Fold::new(Grid { replicas, expert_group, ..Grid::default() }, ranks).expect("divides");
                let shards = Shards::new(&layout, &ExpertPlacement::new(fold, 12), &fold);
                assert_eq!(shards.chunks(), layout.chunks());
                let mut owned: Vec<usize> =
                    (0..ranks).flat_map(|r| shards.owned_chunks(r)).flatten().collect();
                owned.sort_unstable();
                assert_eq!(
                    owned,
                    (0..layout.chunks()).collect::<Vec<_>>(),
                    "{replicas} {expert_group} {ranks}"
                );
            }
        }
    }
}
