//! The binary as a person uses it: what it writes, what it prints, how it ends.

mod common;
mod data;
mod doctor;
mod local;
mod mistakes;
mod plan;
mod signals;
mod train;
mod verify;
