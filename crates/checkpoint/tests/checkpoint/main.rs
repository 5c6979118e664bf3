//! Checkpoints: what is saved is read on any layout, and damage is found.

mod common;
mod corruption;
mod save_and_read;
