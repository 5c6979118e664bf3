//! Model descriptions and what they cost: sizes, parameters, memory, floating-point operations. Pure.

mod layout;
mod memory;
mod model;
pub mod schedule;

pub use layout::{Init, LayerTensors, Layout, NORM_CHUNK, TensorSpec};
pub use memory::{KeptActivations, MemoryEstimate, StepShape};
pub use model::{ModelConfig, ModelError, ScoreFunction};
