//! Training: the numerics contract, what a run moves and holds next to what was predicted, and what may go wrong.

mod common;
mod contract;
mod dispatch;
mod examples;
mod memory;
mod overlap;
mod sharding;
mod traffic;
mod trust;
