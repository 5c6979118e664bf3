//! The weights of a layer, tensor by tensor; every count of parameters is a sum of these. Biases are left out.
//!
//! Names and shapes (outputs x inputs) are those of the models' implementations in transformers, experts of a layer as one tensor.

use super::{Architecture, Attention, FeedForward, LayerKind, Mixer};

/// How a weight is laid out over ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightGroup {
    /// Attention or state space, split by tensor parallelism.
    Mixer,
    /// Low-rank projections of latent attention, which every tensor rank holds whole.
    MixerReplicated,
    /// Dense feed-forward network and shared experts, split by tensor parallelism.
    Network,
    /// Routed experts, spread over expert-parallel ranks and split by expert-tensor parallelism.
    Experts,
    /// Router and projections to the experts' width, which every tensor rank holds whole.
    Router,
    /// Norms, which every tensor rank holds whole.
    Norm,
}

/// A weight of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weight {
    /// Its name.
    pub name: &'static str,
    /// How it is laid out over ranks.
    pub group: WeightGroup,
    /// Elements along each axis; of experts the first is their number.
    pub shape: Vec<usize>,
    /// The axis that tensor (of experts expert-tensor) parallelism splits.
    pub split: Option<usize>,
}

impl Weight {
    /// All elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The weights of a layer under construction.
#[derive(Default)]
struct Weights(Vec<Weight>);

impl Weights {
    fn push(&mut self, name: &'static str, group: WeightGroup, shape: &[usize], split: Option<usize>) {
        self.0.push(Weight { name, group, shape: shape.to_vec(), split });
    }

    fn norm(&mut self, name: &'static str, width: usize) {
        self.push(name, WeightGroup::Norm, &[width], None);
    }

    /// A matrix of the mixer whose outputs are split.
    fn column(&mut self, name: &'static str, outputs: usize, inputs: usize) {
        self.push(name, WeightGroup::Mixer, &[outputs, inputs], Some(0));
    }

    /// One whose inputs are split.
    fn row(&mut self, name: &'static str, outputs: usize, inputs: usize) {
        self.push(name, WeightGroup::Mixer, &[outputs, inputs], Some(1));
    }
}

impl Architecture {
    /// The weights of a layer of `kind`.
    pub fn layer_weights(&self, kind: LayerKind) -> Vec<Weight> {
        let d = self.hidden;
        let mut weights = Weights::default();
        if kind.mixer != Mixer::None {
            weights.norm("input_layernorm", d);
        }
        match kind.mixer {
            Mixer::None => {}
            Mixer::Attention => self.attention_weights(&mut weights),
            Mixer::StateSpace => self.state_space_weights(&mut weights),
        }
        if kind.ffn == FeedForward::None {
            return weights.0;
        }
        weights.norm("post_attention_layernorm", d);
        let mut network = |names: [&'static str; 3], group, experts: &[usize], width: usize, inner: usize| {
            let [gate, up, down] = names;
            let first = experts.len();
            let matrix = |outputs, inputs| [experts, &[outputs, inputs]].concat();
            if self.gated {
                weights.push(gate, group, &matrix(inner, width), Some(first));
            }
            weights.push(up, group, &matrix(inner, width), Some(first));
            weights.push(down, group, &matrix(width, inner), Some(first + 1));
        };
        match (kind.ffn, self.moe) {
            (FeedForward::Moe, Some(moe)) => {
                let width = self.dispatch_width();
                let names = ["experts.gate_proj", "experts.up_proj", "experts.down_proj"];
                network(names, WeightGroup::Experts, &[moe.experts], width, moe.expert_ffn);
                if moe.shared_ffn > 0 {
                    let names =
                        ["shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj"];
                    network(names, WeightGroup::Network, &[], d, moe.shared_ffn);
                }
                weights.push("router", WeightGroup::Router, &[moe.experts, d], None);
                if let Some(latent) = moe.latent {
                    weights.push("fc1_latent_proj", WeightGroup::Router, &[latent, d], None);
                    weights.push("fc2_latent_proj", WeightGroup::Router, &[d, latent], None);
                }
            }
            _ => network(["gate_proj", "up_proj", "down_proj"], WeightGroup::Network, &[], d, self.ffn_dense),
        }
        weights.0
    }

    fn attention_weights(&self, weights: &mut Weights) {
        let d = self.hidden;
        match self.attention {
            Attention::Grouped { heads, kv_heads, head_dim } => {
                weights.column("q_proj", heads * head_dim, d);
                weights.column("k_proj", kv_heads * head_dim, d);
                weights.column("v_proj", kv_heads * head_dim, d);
                weights.row("o_proj", d, heads * head_dim);
                if self.qk_norm {
                    weights.norm("q_norm", head_dim);
                    weights.norm("k_norm", head_dim);
                }
            }
            Attention::Latent { heads, q_lora_rank, kv_lora_rank, nope, rope, value } => {
                let whole = WeightGroup::MixerReplicated;
                match q_lora_rank {
                    Some(rank) => {
                        weights.push("q_a_proj", whole, &[rank, d], None);
                        weights.norm("q_a_layernorm", rank);
                        weights.column("q_b_proj", heads * (nope + rope), rank);
                    }
                    None => weights.column("q_proj", heads * (nope + rope), d),
                }
                weights.push("kv_a_proj_with_mqa", whole, &[kv_lora_rank + rope, d], None);
                weights.norm("kv_a_layernorm", kv_lora_rank);
                weights.column("kv_b_proj", heads * (nope + value), kv_lora_rank);
                weights.row("o_proj", d, heads * value);
            }
        }
    }

    /// Mamba-2's; its convolution is 4 wide and has a bias.
    fn state_space_weights(&self, weights: &mut Weights) {
        let Some(of) = self.state_space else { return };
        let inner = of.heads * of.head_dim;
        let convolved = inner + 2 * of.groups * of.state;
        weights.column("in_proj", inner + convolved + of.heads, self.hidden);
        weights.column("conv1d", convolved, 4);
        let mut vector = |name, elements| weights.push(name, WeightGroup::Mixer, &[elements], Some(0));
        vector("conv1d.bias", convolved);
        vector("A_log", of.heads);
        vector("D", of.heads);
        vector("dt_bias", of.heads);
        vector("norm", inner);
        weights.row("out_proj", self.hidden, inner);
    }
}
