//! The layers of a sparse Mixture-of-Experts transformer, each a forward, a backward of the input and a separate
//! weight-gradient step. Generic over the [`Backend`](unisono_tensor::Backend); names no device.

mod attention;
mod batch;
mod decode;
mod dispatch;
mod feed_forward;
mod moe;
mod moe_rounds;
mod parameters;
mod profile;
mod transformer;

pub use batch::{Batch, LossScale, SlotLosses};
pub use decode::{Cache, Decoder};
pub use dispatch::bench;
pub use parameters::{
    GradientSink, ParameterSource, UnitGradients, UnitParameters, initialize_expert, initialize_unit,
};
pub use profile::{Lane, Profile, Span};
pub use transformer::{Activations, Outcome, Recompute, Transformer};
