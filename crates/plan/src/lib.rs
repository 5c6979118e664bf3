//! Model descriptions and what they cost: sizes, parameters, memory, floating-point operations; and plans of clusters:
//! architectures, hardware, parallelism. Pure.

mod architecture;
mod hardware;
mod layout;
mod memory;
mod model;
mod parallelism;
mod precision;
pub mod schedule;
pub mod simulate;
mod software;
mod table;

pub use architecture::{
    Architecture, Attention, FeedForward, HuggingFaceError, LayerKind, LayerParameters, Mixer, MoeShape,
    Pattern, StateSpace, UnknownModel, Window,
};
pub use hardware::{Cluster, ClusterError, Gpu, Level};
pub use layout::{Init, LayerTensors, Layout, NORM_CHUNK, TensorSpec};
pub use memory::{KeptActivations, MemoryEstimate, StepShape};
pub use model::{ModelConfig, ModelError, ScoreFunction};
pub use parallelism::{
    Modules, Optimizer, Parallelism, ParallelismError, Recomputation, Routing, Sharding, Training,
};
pub use precision::{Precision, PrecisionError};
pub use software::{DispatchKind, Software, Trainable};
