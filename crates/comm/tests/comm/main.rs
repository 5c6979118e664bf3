//! Collectives and exact sums between threads, what is counted of them, and what goes wrong.

mod collectives;
mod common;
mod exact;
mod failures;
mod ledger;
mod watchdog;
