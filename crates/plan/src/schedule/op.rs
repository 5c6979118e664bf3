//! One op of a schedule.

use std::fmt;

/// One micro-batch at one stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Chunk {
    /// The stage, counted through the whole pipeline.
    pub stage: u16,
    /// The micro-batch.
    pub micro_batch: u32,
}

impl fmt::Display for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.micro_batch, self.stage)
    }
}

/// What a rank does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    /// `F`: forward of a whole stage.
    Forward(Chunk),
    /// `B`: gradients of a stage's input and of its weights.
    Backward(Chunk),
    /// `I`: gradient of a stage's input alone.
    BackwardInput(Chunk),
    /// `W`: gradients of a stage's weights, put off until now.
    BackwardWeight(Chunk),
    /// `F+B`: one micro-batch forward while another goes backward, each computing while the other communicates.
    Overlapped {
        /// Goes forward.
        forward: Chunk,
        /// Goes backward.
        backward: Chunk,
    },
    /// Kernels of a part of a layer, or of the end of a step.
    Kernel(Kernel),
    /// Starts an exchange between ranks and goes on.
    Start(Exchange),
    /// Waits for an exchange that was started.
    Finish(Exchange),
}

impl Op {
    /// The chunk that the op runs forward.
    pub fn forward(&self) -> Option<Chunk> {
        match self {
            Self::Forward(chunk) | Self::Overlapped { forward: chunk, .. } => Some(*chunk),
            _ => None,
        }
    }

    /// The chunk whose input gradient the op computes.
    pub fn backward(&self) -> Option<Chunk> {
        match self {
            Self::Backward(chunk) | Self::BackwardInput(chunk) | Self::Overlapped { backward: chunk, .. } => {
                Some(*chunk)
            }
            _ => None,
        }
    }

    /// The chunk whose weight gradients the op computes.
    pub fn weights(&self) -> Option<Chunk> {
        match self {
            Self::Backward(chunk)
            | Self::BackwardWeight(chunk)
            | Self::Overlapped { backward: chunk, .. } => Some(*chunk),
            _ => None,
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forward(chunk) => write!(f, "F{chunk}"),
            Self::Backward(chunk) => write!(f, "B{chunk}"),
            Self::BackwardInput(chunk) => write!(f, "I{chunk}"),
            Self::BackwardWeight(chunk) => write!(f, "W{chunk}"),
            Self::Overlapped { forward, backward } => write!(f, "F{forward}+B{backward}"),
            Self::Kernel(kernel) => kernel.fmt(f),
            Self::Start(exchange) => write!(f, "start:{exchange}"),
            Self::Finish(exchange) => write!(f, "finish:{exchange}"),
        }
    }
}

/// Where in a step a kernel or an exchange belongs; what does not apply is 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Site {
    /// Layer; the stage or the engine's unit where these move as a whole.
    pub layer: u16,
    /// Wave of slots.
    pub wave: u16,
    /// Accumulation turn.
    pub turn: u32,
}

/// Which sweep over the layers a kernel belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pass {
    /// Outputs.
    Forward,
    /// Outputs once more, because they were not kept.
    Again,
    /// Gradients of inputs.
    Backward,
    /// Gradients of weights.
    Weights,
    /// The end of the step.
    Update,
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Forward => "forward",
            Self::Again => "again",
            Self::Backward => "backward",
            Self::Weights => "weights",
            Self::Update => "update",
        })
    }
}

/// Kernels that run together; names are those of the engine's profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// What they compute.
    pub kind: KernelKind,
    /// In which sweep.
    pub pass: Pass,
    /// Where.
    pub site: Site,
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}@{}", self.kind.name(), self.pass, self.site.layer)
    }
}

/// What kernels compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KernelKind {
    /// Embedding table.
    Embedding,
    /// Attention with its norm and projections.
    Attention,
    /// Dense feed-forward network with its norm.
    DenseFfn,
    /// Router with its norm.
    Router,
    /// Rows into the order of their experts, or back.
    Permute,
    /// Shared experts.
    SharedExperts,
    /// Routed experts.
    Experts,
    /// Weight gradients of routed experts.
    ExpertWeights,
    /// All other weight gradients of a layer.
    DenseWeights,
    /// Final norm, output head and loss, forward and backward at once.
    Head,
    /// Joins gradient accumulators along the tree.
    JoinGradients,
    /// Squares of the reduced gradient.
    GradientNorm,
    /// Update of the shard.
    Optimizer,
}

impl KernelKind {
    /// Its name in a profile.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Attention => "attention",
            Self::DenseFfn => "dense ffn",
            Self::Router => "router",
            Self::Permute => "permute",
            Self::SharedExperts => "shared experts",
            Self::Experts => "experts",
            Self::ExpertWeights => "expert weights",
            Self::DenseWeights => "dense weights",
            Self::Head => "head",
            Self::JoinGradients => "join gradients",
            Self::GradientNorm => "gradient norm",
            Self::Optimizer => "optimizer",
        }
    }
}

/// An exchange between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Exchange {
    /// What moves.
    pub kind: ExchangeKind,
    /// Where.
    pub site: Site,
}

impl fmt::Display for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.kind.name(), self.site.layer)
    }
}

/// What moves between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExchangeKind {
    /// Numbers of target tokens, before the first forward.
    Targets,
    /// How many rows go where.
    DispatchCounts,
    /// Rows (or gradients of outputs) to their experts.
    Dispatch,
    /// The weights of rows.
    DispatchWeights,
    /// Outputs of experts (or gradients of rows) back.
    Combine,
    /// Gradients of the rows' weights.
    CombineWeights,
    /// Losses and routing counts.
    Losses,
    /// Reduce-scatter of gradients.
    ReduceGradients,
    /// Partial sums of the gradient norm.
    GradientNorm,
    /// All-gather of parameters.
    GatherParameters,
    /// Times and bytes of the step.
    Times,
}

impl ExchangeKind {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Targets => "targets",
            Self::DispatchCounts => "dispatch counts",
            Self::Dispatch => "dispatch",
            Self::DispatchWeights => "dispatch weights",
            Self::Combine => "combine",
            Self::CombineWeights => "combine weights",
            Self::Losses => "losses",
            Self::ReduceGradients => "reduce gradients",
            Self::GradientNorm => "gradient norm",
            Self::GatherParameters => "gather parameters",
            Self::Times => "times",
        }
    }
}
