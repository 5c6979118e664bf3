//! The kernels of a training step: the [`Backend`] trait, forward and backward, and its implementation on the CPU.

mod backend;
mod buffer;
pub mod cpu;

pub use backend::*;
pub use buffer::{HostBuffer, Pool};
pub use cpu::Cpu;
