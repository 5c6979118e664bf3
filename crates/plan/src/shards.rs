//! Which rank owns which elements of which parameters' states, as pure arithmetic.
//!
//! The parameters are *segments*, unit by unit: a unit's dense tensors, then the block of each of its experts. A segment
//! is summed over its leaves (slots for dense ones, expert groups for an expert) and cut into shards of whole norm
//! chunks over the ranks that hold it: all of them, or the expert's data-parallel group.

use std::ops::Range;

use unisono_mesh::{ExpertPlacement, Fold, shard};

use crate::layout::{Layout, NORM_CHUNK};

/// What a segment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentKind {
    /// The dense parameters of a unit.
    Dense {
        /// The unit.
        unit: usize,
    },
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
    /// Its elements.
    pub len: usize,
    /// Leaves of its sum.
    pub items: usize,
    /// `[rank]` leaves that a rank holds.
    pub held: Vec<Range<usize>>,
    /// `[rank]` elements whose states a rank owns.
    pub shards: Vec<Range<usize>>,
    /// The first of its chunks among all chunks of the model.
    pub first_chunk: usize,
}

impl ShardedSegment {
    /// Whether a rank computes with it.
    pub fn is_held(&self, rank: usize) -> bool {
        !self.held[rank].is_empty()
    }

    /// Whether more than one rank computes with it.
    pub fn is_shared(&self) -> bool {
        self.held.iter().filter(|held| !held.is_empty()).count() > 1
    }
}

/// One piece of a rank's shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The segment.
    pub segment: usize,
    /// What that is.
    pub kind: SegmentKind,
    /// Its unit.
    pub unit: usize,
    /// Elements of the segment.
    pub range: Range<usize>,
    /// Where they start in the rank's shards of the unit, one after the other.
    pub offset: usize,
}

/// The cut of a whole model over the ranks of a fold.
#[derive(Debug, Clone)]
pub struct Shards {
    /// All segments, unit by unit.
    pub segments: Vec<ShardedSegment>,
    /// The segments of each unit.
    units: Vec<Range<usize>>,
    chunks: usize,
}

impl Shards {
    /// Cuts a model over a fold.
    pub fn new(layout: &Layout, placement: &ExpertPlacement, fold: &Fold) -> Self {
        let ranks = fold.ranks();
        let everyone: Vec<usize> = (0..ranks).collect();
        let (mut segments, mut units) = (Vec::new(), Vec::with_capacity(layout.units()));
        for unit in 0..layout.units() {
            let first = segments.len();
            segments.push(ShardedSegment {
                kind: SegmentKind::Dense { unit },
                len: layout.unit_len(unit),
                items: fold.grid().slots(),
                held: (0..ranks).map(|rank| fold.slots_of(rank)).collect(),
                shards: cut(layout.unit_len(unit), &everyone, ranks, unit),
                first_chunk: layout.first_chunk(unit),
            });
            if let Some(moe_layer) = layout.moe_layer_of(unit) {
                segments.extend((0..layout.num_experts()).map(|expert| ShardedSegment {
                    kind: SegmentKind::Expert { moe_layer, expert },
                    len: layout.expert_len(),
                    items: fold.grid().groups(),
                    held: (0..ranks).map(|rank| placement.groups_of(rank, expert)).collect(),
                    shards: cut(layout.expert_len(), &placement.ranks_of(expert), ranks, unit + expert),
                    first_chunk: layout.first_expert_chunk(moe_layer, expert),
                }));
            }
            units.push(first..segments.len());
        }
        Self { segments, units, chunks: layout.chunks() }
    }

    /// Chunks of the whole model.
    pub fn chunks(&self) -> usize {
        self.chunks
    }

    /// How many units there are.
    pub fn units(&self) -> usize {
        self.units.len()
    }

    /// The segments of a unit, the dense one first.
    pub fn of_unit(&self, unit: usize) -> &[ShardedSegment] {
        &self.segments[self.units[unit].clone()]
    }

    /// The pieces whose states `rank` owns, unit by unit, each in the order of its reduce-scatter's output.
    pub fn pieces(&self, rank: usize) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for (unit, segments) in self.units.iter().enumerate() {
            let mut offset = 0;
            for (segment, cut) in segments.clone().map(|index| (index, &self.segments[index])) {
                let range = cut.shards[rank].clone();
                if !range.is_empty() {
                    let len = range.len();
                    pieces.push(Piece { segment, kind: cut.kind, unit, range, offset });
                    offset += len;
                }
            }
        }
        pieces
    }

    /// Elements of a unit whose states `rank` owns.
    pub fn owned_of_unit(&self, rank: usize, unit: usize) -> usize {
        self.of_unit(unit).iter().map(|segment| segment.shards[rank].len()).sum()
    }

    /// Elements whose states `rank` owns.
    pub fn owned_len(&self, rank: usize) -> usize {
        (0..self.units()).map(|unit| self.owned_of_unit(rank, unit)).sum()
    }

    /// The chunks that `rank` owns, as ranges of all chunks, in the order of its pieces; neighbours merged.
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
}

/// Cuts `len` elements over `owners` of `ranks` ranks. The first owner is another one from segment to segment, so that
/// what does not divide is not always the same rank's.
fn cut(len: usize, owners: &[usize], ranks: usize, turn: usize) -> Vec<Range<usize>> {
    let mut shards = vec![0..0; ranks];
    for (index, rank) in owners.iter().enumerate() {
        let part = (index + turn) % owners.len();
        shards[*rank] = shard::part_in_chunks(len, NORM_CHUNK, owners.len(), part);
    }
    shards
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelConfig;
    use unisono_mesh::Grid;

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
                for rank in 0..ranks {
                    let even = layout.chunks() * NORM_CHUNK / ranks;
                    let owned = shards.owned_len(rank);
                    assert!(
                        owned.abs_diff(even) * 10 < even,
                        "rank {rank} of {ranks} owns {owned} of {even}"
                    );
                }
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
