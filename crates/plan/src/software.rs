//! What executes a plan. The same plan takes a different time in other software: how many kernels a layer is, what is fused, what
//! waits for what.

use serde::{Deserialize, Serialize};

/// A family of training software, of those that published measurements name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Software {
    /// Megatron-Core with Transformer Engine as of 2023 to 2025, and what is built on it: NeMo, Megatron-Bridge, Primus.
    #[default]
    MegatronCore,
    /// The same with whole iterations captured in CUDA graphs, the network of experts in one kernel and attention in 8 bits
    /// (Megatron-Bridge's recipes in mxfp8 on Grace since 26.06): the host launches next to nothing.
    MegatronCoreGraphs,
    /// Megatron-LM and Megatron-DeepSpeed of 2021 and 2022: attention scores in memory, blocking tensor-parallel collectives.
    Megatron2021,
    /// DeepSpeed's ZeRO-3 of 2021: the same kernels, and gathers that wait for each other.
    DeepSpeed2021,
    /// PyTorch without compilation under FSDP, such as llm-foundry.
    TorchEager,
    /// PyTorch compiled layer by layer under FSDP2, such as torchtitan.
    TorchCompiled,
    /// JAX programs compiled as a whole, such as MaxText.
    Xla,
}

impl Software {
    /// Whether attention keeps its scores on chip.
    pub fn fuses_attention(self) -> bool {
        !matches!(self, Self::Megatron2021 | Self::DeepSpeed2021)
    }
}

impl Software {
    /// Whether biases and a clamped activation of experts are part of other kernels.
    pub fn fuses_experts(self) -> bool {
        !matches!(self, Self::MegatronCore | Self::Megatron2021)
    }

    /// Whether layers are Megatron's.
    pub fn is_megatron(self) -> bool {
        matches!(self, Self::MegatronCore | Self::MegatronCoreGraphs | Self::Megatron2021)
    }
}

/// What some releases or settings of a family of software do with memory and others do not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Habits {
    /// The loss is compiled: logits exist in 16 bits only, and so does their gradient.
    pub compiled_loss: bool,
    /// Attention is captured in CUDA graphs, layer by layer.
    pub captured_attention: bool,
    /// Experts run one after the other, not as grouped products.
    pub experts_in_turn: bool,
}

/// How tokens travel to experts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DispatchKind {
    /// A token is sent once to a server, however many of its experts live there (DeepEP, HybridEP).
    pub deduplicated: bool,
    /// It travels while another micro-batch computes (DualPipe, Megatron's overlap of expert communication).
    pub overlapped: bool,
    /// Every expert gets a fixed number of rows, some dropped or empty: the host need not ask the GPU how many there are.
    pub padded: bool,
}

impl DispatchKind {
    /// Whether the host waits for the GPU's counts before it can launch what comes after dispatch.
    pub fn asks_for_counts(self) -> bool {
        !self.deduplicated && !self.padded
    }
}

/// Which parameters are trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trainable {
    /// All.
    #[default]
    All,
    /// Low-rank adapters only (LoRA): no weight gradients, reductions or optimizer states of the model's own parameters.
    Adapters,
}
