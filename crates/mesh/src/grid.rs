//! The logical grid and every check of what divides what.

use serde::{Deserialize, Serialize};

/// The most replicas of a grid: more than any machine has devices.
const MOST_REPLICAS: usize = 1 << 20;

/// The largest machine a run is described for. See the axes' docs; all sizes are at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Grid {
    /// Data-parallel width.
    pub replicas: usize,
    /// Context-parallel width. Only 1 so far.
    pub sequence_chunks: usize,
    /// Tensor-parallel width. Only 1 so far.
    pub tensor_shards: usize,
    /// Slots that dispatch tokens together; divides the slots and the experts.
    pub expert_group: usize,
    /// Pipeline stages. Only 1 so far.
    pub stages: usize,
    /// Groups of consecutive experts within which a combine is summed first; divides the experts.
    pub expert_nodes: usize,
}

impl Default for Grid {
    fn default() -> Self {
        Self {
            replicas: 1,
            sequence_chunks: 1,
            tensor_shards: 1,
            expert_group: 1,
            stages: 1,
            expert_nodes: 1,
        }
    }
}

/// A layout that cannot be, with what would be possible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MeshError {
    /// An axis of size zero.
    #[error("grid.{axis} is 0; it must be at least 1")]
    Zero {
        /// The axis.
        axis: &'static str,
    },
    /// More replicas than any machine has devices.
    #[error("grid.replicas = {size}: must be at most {MOST_REPLICAS}")]
    TooManyReplicas {
        /// What was asked for.
        size: usize,
    },
    /// An axis that the engine cannot split yet.
    #[error("grid.{axis} = {size}: this axis is not built yet; set it to 1")]
    NotBuilt {
        /// The axis.
        axis: &'static str,
        /// What was asked for.
        size: usize,
    },
    /// Something does not divide something.
    #[error("{axis} = {size} does not divide {what} = {whole}; values that do: {}", list(.divisors))]
    NotADivisor {
        /// The axis (or count) that should divide.
        axis: &'static str,
        /// Its size.
        size: usize,
        /// What it should divide.
        what: &'static str,
        /// The size of that.
        whole: usize,
        /// What would work.
        divisors: Vec<usize>,
    },
}

fn list(values: &[usize]) -> String {
    values.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

/// All divisors of `n` that also divide `m`, ascending.
fn common_divisors(n: usize, m: usize) -> Vec<usize> {
    (1..=n.min(m)).filter(|d| n.is_multiple_of(*d) && m.is_multiple_of(*d)).collect()
}

/// Checks that `size` divides `whole`; `also` narrows the remedies to those that divide it too.
///
/// # Errors
/// Names both and the divisors that work.
pub fn check_divides(
    axis: &'static str,
    size: usize,
    what: &'static str,
    whole: usize,
    also: usize,
) -> Result<(), MeshError> {
    if size > 0 && whole.is_multiple_of(size) {
        return Ok(());
    }
    Err(MeshError::NotADivisor { axis, size, what, whole, divisors: common_divisors(whole, also) })
}

impl Grid {
    /// Slots: (replica, sequence chunk) pairs.
    pub fn slots(&self) -> usize {
        self.replicas * self.sequence_chunks
    }

    /// Expert groups: how many copies of all experts the full machine has.
    pub fn groups(&self) -> usize {
        self.slots() / self.expert_group
    }

    /// Checks the grid alone and against a model with `num_experts` routed experts (0 for a dense model).
    ///
    /// # Errors
    /// Names the axis, what it must divide and the divisors that work.
    pub fn validate(&self, num_experts: usize) -> Result<(), MeshError> {
        let axes = [
            ("replicas", self.replicas),
            ("sequence_chunks", self.sequence_chunks),
            ("tensor_shards", self.tensor_shards),
            ("expert_group", self.expert_group),
            ("stages", self.stages),
            ("expert_nodes", self.expert_nodes),
        ];
        if let Some((axis, _)) = axes.iter().find(|(_, size)| *size == 0) {
            return Err(MeshError::Zero { axis });
        }
        if self.replicas > MOST_REPLICAS {
            return Err(MeshError::TooManyReplicas { size: self.replicas });
        }
        let not_built = ["sequence_chunks", "tensor_shards", "stages"];
        if let Some((axis, size)) = axes.iter().find(|(axis, size)| *size > 1 && not_built.contains(axis)) {
            return Err(MeshError::NotBuilt { axis, size: *size });
        }
        let experts = if num_experts == 0 { self.slots() } else { num_experts };
        check_divides("grid.expert_group", self.expert_group, "the grid's slots", self.slots(), experts)?;
        if num_experts > 0 {
            check_divides(
                "grid.expert_group",
                self.expert_group,
                "model.num_experts",
                num_experts,
                self.slots(),
            )?;
            check_divides(
                "grid.expert_nodes",
                self.expert_nodes,
                "model.num_experts",
                num_experts,
                num_experts,
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// With a divisor that an error offers, nothing is said of that axis any more; without experts to divide, nothing at all.
        #[test]
        fn every_divisor_that_an_error_offers_works(
            replicas in 1usize..200, expert_group in 1usize..200, expert_nodes in 1usize..50, experts in 0usize..200,
        ) {
            let grid = Grid { replicas, expert_group, expert_nodes, ..Grid::default() };
            if let Err(error) = grid.validate(experts) {
                let MeshError::NotADivisor { axis, size, divisors, .. } = error else { panic!("{error}") };
                prop_assert!(!divisors.is_empty() && !divisors.contains(&size));
                for divisor in divisors {
                    let mut remedied = grid;
                    match axis {
                        "grid.expert_group" => remedied.expert_group = divisor,
                        "grid.expert_nodes" => remedied.expert_nodes = divisor,
                        other => panic!("{other}"),
                    }
                    match remedied.validate(experts) {
                        Ok(()) => {}
                        Err(MeshError::NotADivisor { axis: next, .. }) => {
                            prop_assert!(axis == "grid.expert_group" && next == "grid.expert_nodes", "{divisor}: {next}");
                        }
                        Err(error) => panic!("{divisor}: {error}"),
                    }
                }
            }
        }

        #[test]
        fn every_number_of_ranks_that_an_error_offers_works(replicas in 1usize..300, ranks in 0usize..400) {
            let grid = Grid { replicas, ..Grid::default() };
            if let Err(error) = crate::Fold::new(grid, ranks) {
                let MeshError::NotADivisor { divisors, .. } = error else { panic!("{error}") };
                prop_assert!(!divisors.is_empty() && !divisors.contains(&ranks));
                for divisor in divisors {
                    prop_assert!(crate::Fold::new(grid, divisor).is_ok(), "{divisor}");
                }
            }
        }
    }

    fn grid(replicas: usize, expert_group: usize) -> Grid {
        Grid { replicas, expert_group, ..Grid::default() }
    }

    fn check(grid: Grid, experts: usize, expect: &str) {
        let said = grid.validate(experts).map_or_else(|e| e.to_string(), |()| "ok".into());
        assert_eq!(said, expect);
    }

    #[test]
    fn errors_name_the_axis_and_the_divisors_that_work() {
        check(grid(usize::MAX, 1), 16, "grid.replicas = 18446744073709551615: must be at most 1048576");
        check(grid(8, 4), 16, "ok");
        check(grid(6, 3), 12, "ok");
        check(
            grid(8, 3),
            12,
            "grid.expert_group = 3 does not divide the grid's slots = 8; values that do: 1, 2, 4",
        );
        check(
            grid(6, 6),
            8,
            "grid.expert_group = 6 does not divide model.num_experts = 8; values that do: 1, 2",
        );
        check(grid(0, 1), 8, "grid.replicas is 0; it must be at least 1");
        let stages = Grid { stages: 2, ..grid(8, 1) };
        check(stages, 8, "grid.stages = 2: this axis is not built yet; set it to 1");
        let nodes = Grid { expert_nodes: 3, ..grid(8, 1) };
        check(
            nodes,
            8,
            "grid.expert_nodes = 3 does not divide model.num_experts = 8; values that do: 1, 2, 4, 8",
        );
    }
}
