//! A grid laid onto ranks.

use std::ops::Range;

use crate::grid::{Grid, MeshError, check_divides};

/// A grid folded onto `ranks` ranks: rank r holds the consecutive slots `r * slots/ranks ..`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fold {
    grid: Grid,
    ranks: usize,
}

impl Fold {
    /// Folds a validated `grid` onto `ranks` ranks.
    ///
    /// # Errors
    /// If `ranks` does not divide the slots; the error lists the rank counts that do.
    pub fn new(grid: Grid, ranks: usize) -> Result<Self, MeshError> {
        check_divides("ranks", ranks, "the grid's slots", grid.slots(), grid.slots())?;
        Ok(Self { grid, ranks })
    }

    /// The grid.
    pub fn grid(&self) -> &Grid {
        &self.grid
    }

    /// Ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Slots a rank holds.
    pub fn slots_per_rank(&self) -> usize {
        self.grid.slots() / self.ranks
    }

    /// The slots of `rank`.
    pub fn slots_of(&self, rank: usize) -> Range<usize> {
        let each = self.slots_per_rank();
        rank * each..(rank + 1) * each
    }

    /// The rank that holds `slot`.
    pub fn rank_of(&self, slot: usize) -> usize {
        slot / self.slots_per_rank()
    }

    /// The slots that a rank runs through a layer together, in order: whole expert groups one at a time where the rank
    /// holds whole groups, otherwise all of its slots, since their groups span ranks.
    pub fn waves(&self, rank: usize) -> Vec<Range<usize>> {
        let slots = self.slots_of(rank);
        let width = self.wave_slots();
        slots.step_by(width).map(|start| start..start + width).collect()
    }

    /// Slots in a wave; see [`Fold::waves`].
    pub fn wave_slots(&self) -> usize {
        let each = self.slots_per_rank();
        if each.is_multiple_of(self.grid.expert_group) { self.grid.expert_group } else { each }
    }

    /// The ranks that exchange tokens with `rank`: the smallest range of ranks around it that holds whole expert groups.
    pub fn dispatch_ranks(&self, rank: usize) -> Range<usize> {
        let width =
            least_common_multiple(self.slots_per_rank(), self.grid.expert_group) / self.slots_per_rank();
        let start = rank / width * width;
        start..start + width
    }
}

fn least_common_multiple(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fold(replicas: usize, expert_group: usize, ranks: usize) -> Fold {
        Fold::new(Grid { replicas, expert_group, ..Grid::default() }, ranks).expect("the test's folds divide")
    }

    #[test]
    fn groups_that_a_rank_holds_whole_run_one_after_the_other() {
        assert_eq!(fold(8, 2, 2).waves(1), [4..6, 6..8]);
        assert_eq!(fold(8, 8, 2).waves(1), [4..8]);
        assert_eq!(fold(6, 3, 3).waves(1), [2..4]);
    }

    #[test]
    fn dispatch_spans_the_ranks_of_whole_groups() {
        assert_eq!(fold(8, 4, 4).dispatch_ranks(3), 2..4);
        assert_eq!(fold(8, 2, 2).dispatch_ranks(1), 1..2);
        assert_eq!(fold(6, 3, 3).dispatch_ranks(1), 0..3);
    }

    #[test]
    fn ranks_that_do_not_divide_are_refused_with_those_that_do() {
        let error = Fold::new(Grid { replicas: 6, ..Grid::default() }, 4).expect_err("4 does not divide 6");
        assert_eq!(
            error.to_string(),
            "ranks = 4 does not divide the grid's slots = 6; values that do: 1, 2, 3, 6"
        );
    }

    proptest! {
        #[test]
        fn waves_cover_a_ranks_slots_and_dispatch_ranks_hold_whole_groups(
            group in 1usize..7, groups in 1usize..7, divisor in 1usize..43,
        ) {
            let slots = group * groups;
            let ranks = (1..=slots).filter(|r| slots % r == 0).nth(divisor % 3).unwrap_or(1);
            let fold = fold(slots, group, ranks);
            for rank in 0..ranks {
                let covered: Vec<usize> = fold.waves(rank).into_iter().flatten().collect();
                prop_assert_eq!(covered, fold.slots_of(rank).collect::<Vec<_>>());
                let span = fold.dispatch_ranks(rank);
                prop_assert!(span.contains(&rank) && span.end <= ranks);
                prop_assert_eq!(fold.slots_of(span.start).start % group, 0);
                prop_assert_eq!(fold.slots_of(span.end - 1).end % group, 0);
            }
        }
    }
}
