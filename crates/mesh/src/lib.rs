//! The logical grid, its folds, groups, shard arithmetic and expert placement. Pure: no files, clocks or threads.
//!
//! A [`Grid`] is the largest machine that a run is described for; a [`Fold`] lays it onto the ranks that are there.
//! Numbers depend on the grid, never on the fold.

mod experts;
mod fold;
pub mod gathering;
mod grid;
mod link;
pub mod reduction;
pub mod shard;
pub mod tree;

pub use experts::{ExpertPlacement, Instance};
pub use fold::Fold;
pub use grid::{Grid, MeshError, check_divides};
pub use link::LinkClass;
