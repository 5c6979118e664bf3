//! Which rank holds which expert, for which group.
//!
//! An expert group is `expert_group` (X) consecutive slots; the slot at index j of each group owns the experts
//! `j * E/X .. (j + 1) * E/X`. A rank owns what its slots own.

use std::ops::Range;

use crate::fold::Fold;

/// Expert placement of a fold for `num_experts` routed experts.
#[derive(Debug, Clone, Copy)]
pub struct ExpertPlacement {
    fold: Fold,
    num_experts: usize,
}

/// One expert as it serves one group on a rank: its own rows and its own gradient, parameters shared between groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instance {
    /// The expert group.
    pub group: usize,
    /// The expert.
    pub expert: usize,
}

impl ExpertPlacement {
    /// Placement for a validated grid.
    pub fn new(fold: Fold, num_experts: usize) -> Self {
        Self { fold, num_experts }
    }

    /// Routed experts.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Experts that one slot owns.
    pub fn experts_per_slot(&self) -> usize {
        self.num_experts / self.fold.grid().expert_group
    }

    /// The rank that runs `expert` for the tokens of `slot`.
    pub fn rank_for(&self, slot: usize, expert: usize) -> usize {
        let width = self.fold.grid().expert_group;
        self.fold.rank_of(slot / width * width + expert / self.experts_per_slot())
    }

    /// The experts whose parameters `rank` holds, ascending.
    pub fn experts_of(&self, rank: usize) -> Vec<usize> {
        let mut experts: Vec<usize> =
            self.instances(self.fold.slots_of(rank)).iter().map(|i| i.expert).collect();
        experts.sort_unstable();
        experts.dedup();
        experts
    }

    /// The groups for which `rank` runs `expert`: a contiguous range, empty if it does not hold the expert.
    pub fn groups_of(&self, rank: usize, expert: usize) -> Range<usize> {
        let width = self.fold.grid().expert_group;
        let owner = expert / self.experts_per_slot();
        let slots = self.fold.slots_of(rank);
        let first = slots.start.saturating_sub(owner).div_ceil(width);
        let end = (slots.end + width - 1).saturating_sub(owner) / width;
        first..end.max(first)
    }

    /// The ranks that hold `expert`, ascending: its expert-data-parallel group.
    pub fn ranks_of(&self, expert: usize) -> Vec<usize> {
        (0..self.fold.ranks()).filter(|rank| !self.groups_of(*rank, expert).is_empty()).collect()
    }

    /// What the given consecutive slots own, by (group, expert).
    pub fn instances(&self, slots: Range<usize>) -> Vec<Instance> {
        let (width, each) = (self.fold.grid().expert_group, self.experts_per_slot());
        slots
            .flat_map(|slot| {
                let first = slot % width * each;
                (first..first + each).map(move |expert| Instance { group: slot / width, expert })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Grid;
    use proptest::prelude::*;

    fn placement(replicas: usize, expert_group: usize, ranks: usize, experts: usize) -> ExpertPlacement {
        let grid = Grid { replicas, expert_group, ..Grid::default() };
        grid.validate(experts).expect("the test's grids are valid");
        ExpertPlacement::new(Fold::new(grid, ranks).expect("the test's folds divide"), experts)
    }

    #[test]
    fn a_fold_that_cuts_groups_gives_a_rank_experts_of_two_groups() {
        let placement = placement(6, 3, 3, 12);
        assert_eq!(placement.experts_of(1), [0, 1, 2, 3, 8, 9, 10, 11]);
        assert_eq!(placement.groups_of(1, 8), 0..1);
        assert_eq!(placement.groups_of(1, 0), 1..2);
        assert_eq!(placement.ranks_of(5), [0, 2]);
        assert_eq!(placement.rank_for(4, 9), 2);
    }

    proptest! {
        #[test]
        fn every_group_has_every_expert_once(group in 1usize..5, groups in 1usize..5, each in 1usize..4, pick in 0usize..9) {
            let slots = group * groups;
            let folds: Vec<usize> = (1..=slots).filter(|r| slots % r == 0).collect();
            let placement = placement(slots, group, folds[pick % folds.len()], group * each);
            for expert in 0..group * each {
                let mut served: Vec<usize> = Vec::new();
                for rank in placement.ranks_of(expert) {
                    let range = placement.groups_of(rank, expert);
                    for g in range.clone() {
                        prop_assert_eq!(placement.rank_for(g * group, expert), rank);
                    }
                    prop_assert!(placement.experts_of(rank).contains(&expert));
                    served.extend(range);
                }
                prop_assert_eq!(served, (0..groups).collect::<Vec<_>>());
            }
        }
    }
}
