//! Model descriptions and what they cost: sizes, parameters, memory, floating-point operations; and plans of clusters:
//! architectures, hardware, parallelism. Pure.

mod advice;
mod architecture;
mod calibration;
pub mod collectives;
mod dense;
pub mod dispatch;
pub mod engine;
mod hardware;
pub mod kernels;
mod layout;
mod layout_name;
mod model;
mod nearest;
mod outlook;
mod parallelism;
mod precision;
mod pricing;
mod ranged;
mod rank_memory;
pub mod schedule;
pub mod search;
mod shards;
pub mod simulate;
mod software;
mod table;
mod unevenness;
pub mod validate;

pub use advice::{Change, Place, Trial, best_changes, bottleneck, changes, trials};
pub use architecture::{
    Architecture, Attention, FeedForward, HuggingFaceError, LayerKind, LayerParameters, Mixer, MoeShape,
    Numerics, Pattern, SizeError, StateSpace, UnknownModel, Weight, WeightGroup, Window,
};
pub use calibration::{
    Calibration, CommonConstants, Constants, FITTED, GpuConstants, PART_SPREADS, PartSpread,
    SoftwareConstants,
};
pub use dense::{Equal, Synchronisation};
pub use engine::{KeptActivations, MemoryEstimate, StepMemory};
pub use hardware::{Cluster, ClusterError, Gpu, Level};
pub use layout::{Init, LayerTensors, Layout, NORM_CHUNK, TensorSpec};
pub use layout_name::LayoutNameError;
pub use model::{ModelConfig, ModelError, ScoreFunction};
pub use outlook::Outlook;
pub use parallelism::{
    Modules, Optimizer, Parallelism, ParallelismError, Recomputation, Routing, Sharding, Training,
};
pub use precision::{Precision, PrecisionError};
pub use pricing::{
    Axis, Breakdown, BubbleTerms, Communication, ExchangeTerms, IntervalTerms, KernelTerms, OverheadTerms,
    PartTerms, Passes, Priced, Pricer, RoutedStep, SimulatedStep, Traffic, Work, price,
};
pub use ranged::Ranged;
pub use rank_memory::{
    CommunicationBuffers, HeldTensor, MemoryTerms, ParameterTensor, RankMemory, RankTensors, Unit,
};
pub use shards::{Piece, SegmentKind, ShardedSegment, Shards};
pub use software::{DispatchKind, Habits, Software, Trainable};
pub use unevenness::Percentiles;
