//! The planner against measurements, formulas and itself.

mod collectives;
mod coverage;
mod deepseek_v3;
mod hosts;
mod kernels;
mod memory;
mod outlook;
mod schedules;
mod search;
mod simulation;
mod validate;
