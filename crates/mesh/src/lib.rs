//! The logical grid, its folds, groups, shard arithmetic and expert placement.

pub mod tree;
