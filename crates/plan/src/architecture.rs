//! A model as the planner sees it: sizes, parameters and floating-point operations.

mod counts;
mod hugging_face;
mod known;
mod limits;
mod weights;

use std::borrow::Cow;

use crate::model::ModelConfig;

pub use counts::LayerParameters;
pub use hugging_face::{HuggingFaceError, Numerics};
pub use known::UnknownModel;
pub(crate) use known::distance;
pub use limits::SizeError;
pub(crate) use limits::{LARGEST_SIZE, MOST_LAYERS};
pub use weights::{Weight, WeightGroup};

/// Sizes of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Attention {
    /// Multi-head and grouped-query attention.
    Grouped {
        /// Query heads.
        heads: usize,
        /// Key and value heads.
        kv_heads: usize,
        /// Elements of a head.
        head_dim: usize,
    },
    /// Latent attention (MLA, DeepSeek-V2).
    Latent {
        /// Heads.
        heads: usize,
        /// Width of compressed queries; `None` when queries are projected directly.
        q_lora_rank: Option<usize>,
        /// Width of compressed keys and values.
        kv_lora_rank: usize,
        /// Elements of a query or key head without position.
        nope: usize,
        /// Elements of a query head, and of the one shared key, with position.
        rope: usize,
        /// Elements of a value head.
        value: usize,
    },
}

impl Attention {
    /// Query heads.
    pub fn heads(&self) -> usize {
        match *self {
            Self::Grouped { heads, .. } | Self::Latent { heads, .. } => heads,
        }
    }

    /// Key and value heads as the attention kernel sees them.
    pub fn kv_heads(&self) -> usize {
        match *self {
            Self::Grouped { kv_heads, .. } => kv_heads,
            Self::Latent { heads, .. } => heads,
        }
    }

    /// Elements of a query or key head.
    pub fn qk_dim(&self) -> usize {
        match *self {
            Self::Grouped { head_dim, .. } => head_dim,
            Self::Latent { nope, rope, .. } => nope + rope,
        }
    }

    /// Elements of a value head.
    pub fn v_dim(&self) -> usize {
        match *self {
            Self::Grouped { head_dim, .. } => head_dim,
            Self::Latent { value, .. } => value,
        }
    }
}

/// Attention that sees only the last `tokens` tokens, in layer `first` and every `every`-th from there on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Window {
    /// Tokens that a token sees.
    pub tokens: usize,
    /// The first layer that is windowed.
    pub first: usize,
    /// One layer of so many is windowed; 1 for all.
    pub every: usize,
}

impl Window {
    /// Whether layer `layer` is windowed.
    pub fn includes(&self, layer: usize) -> bool {
        layer.checked_sub(self.first).is_some_and(|after| after.is_multiple_of(self.every.max(1)))
    }
}

/// Sizes of an MoE layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MoeShape {
    /// Routed experts.
    pub experts: usize,
    /// Routed experts that a token visits.
    pub top_k: usize,
    /// Hidden width of a routed expert.
    pub expert_ffn: usize,
    /// Hidden width of the shared experts together; 0 without any.
    pub shared_ffn: usize,
    /// Groups of experts for group-limited routing; 1 for none.
    pub groups: usize,
    /// Groups that a token may choose from.
    pub top_groups: usize,
    /// Width into which tokens are projected before dispatch; `None` for the hidden width.
    pub latent: Option<usize>,
}

/// Sizes of a state-space mixer (Mamba-2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StateSpace {
    /// Heads.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements of the state for each element of a head.
    pub state: usize,
    /// Groups that share input and output projections of the state.
    pub groups: usize,
}

/// What mixes tokens in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mixer {
    /// Nothing.
    None,
    /// Attention.
    Attention,
    /// A state-space model.
    StateSpace,
}

/// The feed-forward network of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FeedForward {
    /// None.
    None,
    /// One for all tokens.
    Dense,
    /// Experts.
    Moe,
}

/// What a layer consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerKind {
    /// What mixes tokens.
    pub mixer: Mixer,
    /// What works on each token.
    pub ffn: FeedForward,
}

/// Which layers are of which kind.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Pattern {
    /// Attention and a feed-forward network in every layer.
    Uniform {
        /// The first layers are dense.
        first_dense: usize,
        /// Among the others the last of every so many has experts; 1 for all.
        moe_every: usize,
    },
    /// One letter a layer, as Nemotron-H writes it: `M` state space, `*` attention, `-` dense network, `E` experts.
    Letters(Cow<'static, str>),
}

/// A decoder-only transformer. Widths in elements.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    /// What it is called.
    pub name: String,
    /// Layers, without embedding, head and multi-token prediction.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Whether the embedding is the output head.
    pub tied_embeddings: bool,
    /// Whether feed-forward networks have a gate (SwiGLU): three matrices instead of two.
    pub gated: bool,
    /// Attention.
    pub attention: Attention,
    /// Norms of query and key heads.
    pub qk_norm: bool,
    /// Sliding-window attention.
    pub window: Option<Window>,
    /// Hidden width of dense feed-forward networks.
    pub ffn_dense: usize,
    /// Experts.
    pub moe: Option<MoeShape>,
    /// State-space mixers.
    pub state_space: Option<StateSpace>,
    /// Which layers are of which kind.
    pub pattern: Pattern,
    /// Attention and feed-forward network read the same norm and add to the residual together.
    pub parallel_blocks: bool,
    /// Extra layers that predict further tokens (DeepSeek-V3).
    pub mtp_layers: usize,
    /// Products of experts have biases and their activation is clamped (GPT-OSS): kernels of their own where the network of experts is
    /// not one kernel.
    pub expert_biases: bool,
}

impl Architecture {
    /// The kind of layer `layer`; layers from `self.layers` on are those of multi-token prediction, of the last kind.
    pub fn kind(&self, layer: usize) -> LayerKind {
        let layer = layer.min(self.layers.saturating_sub(1));
        match &self.pattern {
            Pattern::Uniform { first_dense, moe_every } => {
                let sparse = self.moe.is_some()
                    && layer >= *first_dense
                    && (layer - first_dense + 1).is_multiple_of((*moe_every).max(1));
                let ffn = if sparse { FeedForward::Moe } else { FeedForward::Dense };
                LayerKind { mixer: Mixer::Attention, ffn }
            }
            Pattern::Letters(letters) => {
                let letters = letters.as_bytes();
                match letters.get(layer % letters.len().max(1)) {
                    Some(b'M') => LayerKind { mixer: Mixer::StateSpace, ffn: FeedForward::None },
                    Some(b'E') => LayerKind { mixer: Mixer::None, ffn: FeedForward::Moe },
                    Some(b'-') => LayerKind { mixer: Mixer::None, ffn: FeedForward::Dense },
                    _ => LayerKind { mixer: Mixer::Attention, ffn: FeedForward::None },
                }
            }
        }
    }

    /// Whether layer `layer` sees only its window.
    pub fn is_windowed(&self, layer: usize) -> bool {
        self.window.is_some_and(|window| window.includes(layer))
    }

    /// Layers whose feed-forward network has experts, without those of multi-token prediction.
    pub fn moe_layers(&self) -> usize {
        (0..self.layers).filter(|layer| self.kind(*layer).ffn == FeedForward::Moe).count()
    }
}

impl From<&ModelConfig> for Architecture {
    fn from(model: &ModelConfig) -> Self {
        let moe = (model.num_experts > 0).then(|| MoeShape {
            experts: model.num_experts,
            top_k: model.top_k,
            expert_ffn: model.moe_intermediate_size,
            shared_ffn: model.shared_width(),
            groups: model.num_groups,
            top_groups: model.top_groups,
            latent: None,
        });
        Self {
            name: "config".into(),
            layers: model.num_hidden_layers,
            hidden: model.hidden_size,
            vocab: model.vocab_size,
            tied_embeddings: model.tie_embeddings,
            gated: true,
            attention: Attention::Grouped {
                heads: model.num_attention_heads,
                kv_heads: model.num_key_value_heads,
                head_dim: model.head_dim,
            },
            qk_norm: model.qk_norm,
            window: None,
            ffn_dense: model.intermediate_size,
            moe,
            state_space: None,
            pattern: Pattern::Uniform { first_dense: model.first_dense, moe_every: 1 },
            parallel_blocks: false,
            mtp_layers: 0,
            expert_biases: false,
        }
    }
}
