//! What one layer keeps for the backward of one micro-batch.

use crate::architecture::{Architecture, Attention, FeedForward, LayerKind, Mixer, MoeShape};
use crate::parallelism::{Parallelism, Recomputation, Training};
use crate::precision::Precision;
use crate::schedule::ChunkBytes;

/// Which part of a layer a tensor belongs to, and hence what spares it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// The layer's input: kept always.
    Input,
    /// What a norm leaves.
    Norm,
    /// Queries, keys, values of latent attention.
    UpProjection,
    /// Scores of attention that is not fused.
    Core,
    /// Inside of a dense feed-forward network.
    Mlp,
    /// What the experts' activation function leaves.
    MoeActivation,
    /// Rows as experts got them: the buffer that dispatch lands in, whose gradient leaves from one of the same size.
    Dispatch,
    /// Anything else of an MoE layer.
    Moe,
    /// Anything else.
    Other,
}

/// A half of a layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Half {
    /// What mixes tokens, with its norm.
    Mixer,
    /// The rest, and what goes in.
    Network,
    /// Both.
    #[default]
    Both,
}

/// A tensor of a layer for one micro-batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Tensor {
    pub name: &'static str,
    part: Part,
    /// Bytes until the gradient of the layer's input is done.
    pub bytes: f64,
    /// Bytes of it from then on, until the gradients of the layer's weights are done.
    pub operand: f64,
}

impl Tensor {
    /// Whether it is a buffer of dispatch.
    pub fn is_dispatched(&self) -> bool {
        self.part == Part::Dispatch
    }

    /// Whether it is the layer's input.
    pub fn is_input(&self) -> bool {
        self.part == Part::Input
    }

    /// Whether the backward computes it again.
    pub fn is_recomputed(&self, recompute: Recomputation) -> bool {
        spared(self.part, recompute)
    }
}

/// What a layer keeps of a micro-batch, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct LayerBytes {
    /// All of it.
    pub kept: ChunkBytes,
    /// What of the activations lies in buffers of dispatch.
    pub dispatched: f64,
}

/// What is alive only while the backward is in a layer, in bytes: what is computed again, and the largest gradients.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Temporary {
    /// Outside of buffers of dispatch.
    pub bytes: f64,
    /// In buffers of dispatch: rows that are dispatched again, gradients that land in them and leave from them.
    pub dispatched: f64,
}

impl Temporary {
    /// Both.
    pub fn total(&self) -> f64 {
        self.bytes + self.dispatched
    }

    fn add(&mut self, of: &Tensor, times: usize) {
        let sum = if of.is_dispatched() { &mut self.dispatched } else { &mut self.bytes };
        *sum += times as f64 * of.bytes;
    }
}

/// Tensors that one layer keeps, with their bytes: the table that both sums and lists of memory are made of.
///
/// Between a layer's input gradient and its weight gradients these are the inputs of products, computed again or not, and the
/// gradients of their outputs. Under sequence parallelism inputs stay split and are gathered once more, gradients stay gathered (as
/// zero-bubble-pipeline-parallelism by Qi et al. does); norms' gradients are not put off.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Kept {
    tensors: Vec<Tensor>,
    /// So many are the mixer's.
    of_mixer: usize,
    /// The tensor whose gradient takes the place of the one that it is made of.
    in_place: Option<usize>,
}

impl Kept {
    /// The tensors of a layer of `kind` for one micro-batch, on a rank whose experts get `uneven` times the even share of rows.
    pub fn of(
        model: &Architecture,
        layout: &Parallelism,
        training: &Training,
        kind: LayerKind,
        uneven: f64,
    ) -> Self {
        let sizes = Sizes::of(model, layout, training);
        let mut kept = Self { tensors: Vec::with_capacity(32), of_mixer: 0, in_place: None };
        if kind.mixer != Mixer::None {
            kept.push("residual stream", Part::Input, sizes.width * sizes.split * sizes.hidden);
            kept.input("norm before the mixer", Part::Norm, sizes.input * sizes.split * sizes.hidden);
        }
        match kind.mixer {
            Mixer::None => {}
            Mixer::Attention => kept.attention(model, &sizes),
            Mixer::StateSpace => kept.state_space(model, &sizes),
        }
        if kind.mixer != Mixer::None && !model.parallel_blocks {
            kept.gradient("gradient of the mixer's output", sizes.input * sizes.tokens * sizes.hidden);
        }
        kept.of_mixer = kept.tensors.len();
        if kind.ffn == FeedForward::None {
            return kept;
        }
        let first = if kind.mixer == Mixer::None { Part::Input } else { Part::Other };
        if !model.gated && model.state_space.is_none() && training.software.is_megatron() {
            // GPT drops out after attention and network: a mask, and what the fused addition of bias and residual reads.
            let part = if kind.ffn == FeedForward::Moe { Part::Moe } else { Part::Other };
            kept.push("dropout", part, (2.0 + sizes.width) * sizes.split * sizes.hidden);
        }
        if !model.parallel_blocks {
            kept.push("residual stream after the mixer", first, sizes.width * sizes.split * sizes.hidden);
            kept.input("norm before the network", Part::Norm, sizes.input * sizes.split * sizes.hidden);
        }
        match (kind.ffn, &model.moe) {
            (FeedForward::Moe, Some(moe)) => kept.experts(model, moe, layout, &sizes, uneven),
            _ => kept.network(model, model.ffn_dense, DENSE_NAMES, Part::Mlp, &sizes),
        }
        kept
    }

    fn push(&mut self, name: &'static str, part: Part, bytes: f64) {
        self.tensors.push(Tensor { name, part, bytes, operand: 0.0 });
    }

    /// What a product with weights reads, too.
    fn input(&mut self, name: &'static str, part: Part, bytes: f64) {
        self.tensors.push(Tensor { name, part, bytes, operand: bytes });
    }

    /// The gradient of what such a product writes.
    fn gradient(&mut self, name: &'static str, operand: f64) {
        self.tensors.push(Tensor { name, part: Part::Other, bytes: 0.0, operand });
    }

    fn attention(&mut self, model: &Architecture, sizes: &Sizes) {
        let attention = &model.attention;
        let heads = attention.heads() as f64 / sizes.tensor;
        let kv_heads = (attention.kv_heads() as f64 / sizes.tensor).max(1.0);
        let (qk, v) = (attention.qk_dim() as f64, attention.v_dim() as f64);
        let of = |elements: f64| sizes.width * sizes.tokens * elements;
        let part = match attention {
            Attention::Latent { .. } => Part::UpProjection,
            Attention::Grouped { .. } => Part::Other,
        };
        // What is rotated of a latent key is no output of its up-projection.
        let mut projected = heads * qk + kv_heads * (qk + v);
        if let Attention::Latent { q_lora_rank, kv_lora_rank, rope, .. } = *attention {
            let ranks = (q_lora_rank.unwrap_or(0) + kv_lora_rank) as f64;
            let rotated = rope as f64;
            projected -= kv_heads * rotated;
            let compressed = sizes.input * sizes.tokens * (ranks + rotated);
            self.push("compressed queries, keys, values", Part::Other, sizes.width * sizes.tokens * ranks);
            self.gradient("gradients of compressed queries, keys, values", compressed);
            self.input("norms of compressed queries, keys, values", Part::Norm, compressed);
        }
        self.push("queries", part, of(heads * qk));
        self.push("keys", part, of(kv_heads * qk));
        self.push("values", part, of(kv_heads * v));
        self.gradient("gradients of queries, keys, values", sizes.input * sizes.tokens * projected);
        if model.qk_norm {
            self.push("queries and keys before their norms", Part::Other, of((heads + kv_heads) * qk));
        }
        self.push("log-sum-exp of attention", Part::Other, 4.0 * sizes.tokens * heads);
        if sizes.unfused {
            // Korthikanti et al. (2022): softmax in 16 bits; GPT's dropout and its mask.
            let scores = sizes.tokens * sizes.sequence * heads;
            let dropout = if model.gated { 0.0 } else { sizes.width + 1.0 };
            if model.gated {
                // Without dropout the gradient of scores overwrites that of the softmax.
                self.in_place = Some(self.tensors.len());
            }
            self.push("attention scores", Part::Core, (sizes.width + dropout) * scores);
        }
        if sizes.input < sizes.width {
            self.push("attention output", Part::Other, of(heads * v));
            self.input("attention output in 8 bits", Part::Other, sizes.input * sizes.tokens * heads * v);
        } else {
            self.input("attention output", Part::Other, of(heads * v));
        }
    }

    fn state_space(&mut self, model: &Architecture, sizes: &Sizes) {
        let Some(of) = model.state_space else { return };
        let inner = (of.heads * of.head_dim) as f64 / sizes.tensor;
        let states = (2 * of.groups * of.state) as f64 / sizes.tensor;
        let bytes = |elements: f64| sizes.width * sizes.tokens * elements;
        // Convolution and scan are one kernel that computes its inside again in the backward (mamba_ssm's
        // `mamba_split_conv1d_scan_combined`, Megatron's default): what goes in, and what comes out before its gate, after it in
        // the layout of the next layer, and after its norm.
        let projected = 2.0 * inner + states + of.heads as f64 / sizes.tensor;
        self.push("state-space projection", Part::Other, bytes(projected));
        self.gradient("gradient of the state-space projection", sizes.input * sizes.tokens * projected);
        let operand = sizes.input * sizes.tokens * inner;
        self.tensors.push(Tensor {
            name: "scan output",
            part: Part::Other,
            bytes: bytes(3.0 * inner),
            operand,
        });
    }

    fn network(
        &mut self,
        model: &Architecture,
        ffn: usize,
        names: [&'static str; 5],
        part: Part,
        sizes: &Sizes,
    ) {
        let inner = sizes.tokens * ffn as f64 / sizes.tensor;
        let gates = model.ffn_matrices() as f64 - 1.0;
        let [gated, plain, gradient, after, output] = names;
        let before = if model.gated { gated } else { plain };
        self.push(before, part, sizes.width * gates * inner);
        self.gradient(gradient, sizes.input * gates * inner);
        self.input(after, part, sizes.input * inner);
        self.gradient(output, sizes.input * sizes.tokens * sizes.hidden);
    }

    fn experts(
        &mut self,
        model: &Architecture,
        moe: &MoeShape,
        layout: &Parallelism,
        sizes: &Sizes,
        uneven: f64,
    ) {
        let rows = sizes.tokens / sizes.tensor * (moe.top_k * layout.expert_tensor) as f64 * uneven;
        let inner = rows * moe.expert_ffn as f64 / layout.expert_tensor as f64;
        let gates = model.ffn_matrices() as f64 - 1.0;
        let dispatched = model.dispatch_width() as f64;
        let scores = sizes.split * moe.experts as f64;
        self.push("router scores", Part::Moe, 8.0 * scores);
        self.gradient("gradients of router scores", 4.0 * scores);
        if moe.latent.is_some() {
            let tokens = sizes.split * dispatched;
            self.push("tokens for experts", Part::Moe, 2.0 * sizes.width * tokens);
            // Of what is narrowed the gradient; of what is widened again the input, and the gradient at full width.
            let widened = sizes.split * sizes.hidden;
            self.gradient("operands of projections around experts", sizes.input * (2.0 * tokens + widened));
        }
        self.input("rows dispatched to experts", Part::Dispatch, sizes.input * rows * dispatched);
        let before = if model.gated { "gate and up of experts" } else { "up of experts" };
        self.push(before, Part::Moe, sizes.width * gates * inner);
        self.gradient("gradient of the input of experts' activation", sizes.input * gates * inner);
        self.input("activation of experts", Part::MoeActivation, sizes.input * inner);
        self.gradient("gradients of experts' outputs", sizes.input * rows * dispatched);
        if moe.shared_ffn > 0 {
            self.network(model, moe.shared_ffn, SHARED_NAMES, Part::Moe, sizes);
        }
    }

    /// All tensors of a half of the layer; its input belongs to both.
    pub fn tensors(&self, half: Half) -> impl Iterator<Item = &Tensor> {
        let counts = move |at: usize, part: Part| match half {
            Half::Both => true,
            Half::Mixer => at < self.of_mixer,
            Half::Network => at >= self.of_mixer || part == Part::Input,
        };
        self.tensors.iter().enumerate().filter(move |(at, of)| counts(*at, of.part)).map(|(_, of)| of)
    }

    /// Bytes of a half under `recompute`.
    pub fn bytes(&self, half: Half, recompute: Recomputation) -> LayerBytes {
        let mut sum = LayerBytes::default();
        for of in self.tensors(half) {
            sum.kept.weight_operands += of.operand;
            if !of.is_recomputed(recompute) {
                sum.kept.activations += of.bytes;
                sum.dispatched += if of.is_dispatched() { of.bytes } else { 0.0 };
            }
        }
        sum
    }

    /// The tensor whose backward needs most room, and how many gradients of its size are then alive.
    pub fn widest(&self) -> Option<(&Tensor, usize)> {
        let gradients = |at: usize| if self.in_place == Some(at) { 1 } else { 2 };
        let all = self.tensors.iter().enumerate().map(|(at, of)| (of, gradients(at)));
        let room = |(of, gradients): &(&Tensor, usize)| *gradients as f64 * of.bytes;
        all.max_by(|one, other| room(one).total_cmp(&room(other)))
    }

    /// What is alive only while the backward is in this layer: what is computed again, and as many gradients as the widest
    /// pair of tensors.
    pub fn temporary(&self, recompute: Recomputation) -> Temporary {
        let mut sum = Temporary::default();
        self.tensors.iter().filter(|of| of.is_recomputed(recompute)).for_each(|of| sum.add(of, 1));
        if let Some((of, gradients)) = self.widest() {
            sum.add(of, gradients);
        }
        sum
    }
}

/// Names of a dense network's tensors: before the activation with a gate and without, their gradient, after it, the gradient of the
/// output.
const DENSE_NAMES: [&str; 5] = [
    "gate and up",
    "up",
    "gradient of the activation's input",
    "activation",
    "gradient of the network's output",
];
/// The same of shared experts.
const SHARED_NAMES: [&str; 5] = [
    "gate and up of shared experts",
    "up of shared experts",
    "gradient of the input of shared experts' activation",
    "activation of shared experts",
    "gradient of shared experts' output",
];

fn spared(part: Part, recompute: Recomputation) -> bool {
    let of = recompute.modules();
    match part {
        Part::Input => false,
        _ if super::full(recompute) => true,
        Part::Norm => of.layernorm,
        Part::UpProjection => of.mla_up_projection,
        Part::Core => of.core_attention,
        Part::Mlp => of.mlp,
        Part::MoeActivation => of.moe_activation || of.moe,
        Part::Dispatch | Part::Moe => of.moe,
        Part::Other => false,
    }
}

struct Sizes {
    tokens: f64,
    sequence: f64,
    unfused: bool,
    split: f64,
    hidden: f64,
    tensor: f64,
    /// Bytes of an element.
    width: f64,
    /// Bytes of an element that only a product reads.
    input: f64,
}

impl Sizes {
    fn of(model: &Architecture, layout: &Parallelism, training: &Training) -> Self {
        let tokens = (layout.micro_batch * training.sequence) as f64 / layout.context as f64;
        let tensor = layout.tensor as f64;
        let width = if training.compute == Precision::F32 { 4.0 } else { 2.0 };
        let input = if training.compute.is_narrow() { training.compute.bytes() } else { width };
        let split = if layout.sequence_parallel { tokens / tensor } else { tokens };
        let sequence = training.sequence as f64;
        let unfused = !training.software.fuses_attention();
        Self { tokens, sequence, unfused, split, hidden: model.hidden as f64, tensor, width, input }
    }
}
