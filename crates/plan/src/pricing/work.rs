//! What a micro-batch costs on one rank, layer kind by layer kind: shapes of every kernel and bytes of every exchange.

use std::ops::AddAssign;

use crate::architecture::{Architecture, Attention, FeedForward, LayerKind, Mixer, MoeShape, StateSpace};
use crate::collectives::Way;
use crate::kernels::AttentionShape;
use crate::parallelism::{Parallelism, Recomputation, Training};
use crate::precision::Precision;
use crate::software::Trainable;

use super::rates::{Rates, Wait};

/// Seconds of one pass by what they are spent on; communication as if nothing hid it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Work {
    /// Products.
    pub gemm_s: f64,
    /// Products of experts.
    pub grouped_s: f64,
    /// Attention.
    pub attention_s: f64,
    /// Kernels bound by memory.
    pub memory_s: f64,
    /// Tensor-parallel collectives.
    pub tensor_s: f64,
    /// Exchange of keys and values between context-parallel ranks.
    pub context_s: f64,
    /// Dispatch and combine.
    pub expert_s: f64,
    /// Kernels launched.
    pub kernels: f64,
    /// Launches that the GPU waits for, since the host had to wait for the GPU before.
    pub awaited: f64,
}

impl Work {
    /// Seconds of kernels that compute.
    pub fn compute_s(&self) -> f64 {
        self.gemm_s + self.grouped_s + self.attention_s + self.memory_s
    }

    /// Adds `other`, `times` over.
    pub fn add(&mut self, other: &Self, times: f64) {
        self.gemm_s += times * other.gemm_s;
        self.grouped_s += times * other.grouped_s;
        self.attention_s += times * other.attention_s;
        self.memory_s += times * other.memory_s;
        self.tensor_s += times * other.tensor_s;
        self.context_s += times * other.context_s;
        self.expert_s += times * other.expert_s;
        self.kernels += times * other.kernels;
        self.awaited += times * other.awaited;
    }
}

impl AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        self.add(&other, 1.0);
    }
}

/// The three passes of a layer: forward, gradient of the input, gradient of the weights.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Passes {
    /// Forward.
    pub forward: Work,
    /// Backward towards the input, recomputation included.
    pub input: Work,
    /// Backward towards the weights.
    pub weight: Work,
}

impl Passes {
    /// Adds `other`, `times` over.
    pub fn add(&mut self, other: &Self, times: f64) {
        self.forward.add(&other.forward, times);
        self.input.add(&other.input, times);
        self.weight.add(&other.weight, times);
    }

    /// The three together.
    pub fn all(&self) -> Work {
        let mut all = self.forward;
        all += self.input;
        all += self.weight;
        all
    }
}

/// The sizes that a layout gives a micro-batch on one rank.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes<'a> {
    pub model: &'a Architecture,
    pub layout: &'a Parallelism,
    pub training: &'a Training,
    pub rates: &'a Rates,
    /// Rows of the fullest expert-parallel rank over the even share.
    pub uneven: f64,
}

/// What a clamp before the activation of experts reads and writes, forward and backward, in tensors of their hidden width: both halves
/// clamped and joined; two masks and the gradients of the halves joined (Megatron-Core 0.16).
const CLAMPED: [f64; 2] = [8.0, 10.0];

/// The same of a bias times the router's weight after the second product, in tensors of the model's width, of which 32-bit ones
/// count twice: multiplied, added, joined, rounded; and back, with sums over rows and columns (Megatron-Core 0.16).
const BIASED: [f64; 2] = [14.0, 20.0];

impl Sizes<'_> {
    /// The format of products that are never narrow: attention, router, head.
    pub fn wide(&self) -> Precision {
        self.training.compute.wide()
    }

    /// Tokens of a micro-batch within a tensor-parallel region.
    pub fn tokens(&self) -> f64 {
        (self.layout.micro_batch * self.training.sequence) as f64 / self.layout.context as f64
    }

    /// Tokens of a micro-batch between tensor-parallel regions.
    pub fn split_tokens(&self) -> f64 {
        if self.layout.sequence_parallel { self.tokens() / self.layout.tensor as f64 } else { self.tokens() }
    }

    /// Rows that the experts of the fullest rank get from a micro-batch.
    pub fn expert_rows(&self, moe: &MoeShape) -> f64 {
        let of_rank = self.tokens() / self.layout.tensor as f64;
        of_rank * (moe.top_k * self.layout.expert_tensor) as f64 * self.uneven
    }

    /// The passes of what mixes tokens in a layer.
    pub fn mixer(&self, mixer: Mixer, windowed: bool) -> Passes {
        let mut passes = Passes::default();
        match mixer {
            Mixer::None => {}
            Mixer::Attention => self.attention(&mut passes, windowed),
            Mixer::StateSpace => self.state_space(&mut passes),
        }
        passes
    }

    /// The passes of a layer of `kind`, of which `passes` are its mixer's.
    pub fn layer(&self, mut passes: Passes, kind: LayerKind, windowed: bool) -> Passes {
        match (kind.ffn, &self.model.moe) {
            (FeedForward::None, _) => {}
            (FeedForward::Moe, Some(moe)) => self.experts(&mut passes, moe),
            _ => self.dense(&mut passes, self.model.ffn_dense, true),
        }
        self.recompute(&mut passes, kind, windowed);
        if self.training.trainable == Trainable::Adapters {
            passes.weight = Work::default();
        }
        passes
    }

    /// A product of `m` tokens with an `n x k` weight: forward, and both gradients.
    fn linear(&self, passes: &mut Passes, m: f64, n: f64, k: f64) {
        let (rates, precision) = (self.rates, self.training.compute);
        passes.forward.gemm_s += rates.gemm(m, n, k, precision);
        passes.input.gemm_s += rates.gemm(m, k, n, precision);
        passes.weight.gemm_s += rates.gemm(n, k, m, precision);
        self.count(passes, 1.0);
        if precision.is_narrow() {
            // What is multiplied is written in both orders, by the kernel that made it.
            self.stream(passes, 2.0 * precision.bytes() * m * k, 2.0 * precision.bytes() * m * n);
        }
    }

    /// Kernels of `forward` and `backward` bytes.
    fn stream(&self, passes: &mut Passes, forward: f64, backward: f64) {
        passes.forward.memory_s += self.rates.stream(forward);
        passes.input.memory_s += self.rates.stream(backward);
        self.count(passes, 1.0);
    }

    fn count(&self, passes: &mut Passes, kernels: f64) {
        passes.forward.kernels += kernels;
        passes.input.kernels += kernels;
        passes.weight.kernels += kernels;
    }

    /// A norm and the addition to the residual stream.
    fn norm(&self, passes: &mut Passes) {
        let elements = self.split_tokens() * self.model.hidden as f64;
        let bytes = self.training.element_bytes() * elements;
        self.stream(passes, 5.0 * bytes, 7.0 * bytes);
    }

    /// Gathers tokens before a tensor-parallel region and scatters sums after it; the backward gathers once more for the
    /// gradient of the weights.
    fn region(&self, passes: &mut Passes) {
        if self.layout.tensor == 1 {
            return;
        }
        let bytes = self.training.element_bytes() * self.tokens() * self.model.hidden as f64;
        let once = self.rates.gather(bytes, self.layout.tensor, 1);
        passes.forward.tensor_s += 2.0 * once;
        let again = if self.layout.sequence_parallel { 3.0 } else { 2.0 };
        passes.input.tensor_s += again * once;
    }

    fn attention(&self, passes: &mut Passes, windowed: bool) {
        let (m, d, t) = (self.tokens(), self.model.hidden as f64, self.layout.tensor as f64);
        let attention = &self.model.attention;
        self.norm(passes);
        match *attention {
            Attention::Grouped { heads, kv_heads, head_dim } => {
                let kv = (kv_heads as f64 / t).max(1.0);
                let qkv = (heads as f64 / t + 2.0 * kv) * head_dim as f64;
                self.linear(passes, m, qkv, d);
                let placed = 2.0 * self.training.element_bytes() * m * qkv;
                let normed = if self.model.qk_norm { 2.0 } else { 1.0 };
                self.stream(passes, normed * placed, normed * placed);
            }
            Attention::Latent { heads, q_lora_rank, kv_lora_rank, nope, rope, value } => {
                let (q_dim, kv_dim) = ((nope + rope) as f64, (nope + value) as f64);
                let heads = heads as f64 / t;
                let m_split = self.split_tokens();
                if let Some(rank) = q_lora_rank {
                    self.linear(passes, m_split, rank as f64, d);
                }
                self.linear(passes, m, heads * q_dim, q_lora_rank.map_or(d, |rank| rank as f64));
                self.linear(passes, m_split, (kv_lora_rank + rope) as f64, d);
                self.linear(passes, m, heads * kv_dim, kv_lora_rank as f64);
                let joined = 2.0 * self.training.element_bytes() * m * heads * (2.0 * q_dim + value as f64);
                self.stream(passes, joined, joined);
            }
        }
        self.core(passes, windowed);
        let heads = attention.heads() as f64 / t;
        self.linear(passes, m, d, heads * attention.v_dim() as f64);
        if !self.model.parallel_blocks {
            self.region(passes);
        }
    }

    /// Attention itself: a rank's queries against all keys, which context-parallel ranks hand around.
    fn core(&self, passes: &mut Passes, windowed: bool) {
        let attention = &self.model.attention;
        let shape = AttentionShape {
            batch: self.layout.micro_batch,
            queries: (self.training.sequence / self.layout.context).max(1),
            keys: self.training.sequence,
            heads: (attention.heads() / self.layout.tensor).max(1),
            kv_heads: (attention.kv_heads() / self.layout.tensor).max(1),
            qk_dim: attention.qk_dim(),
            v_dim: attention.v_dim(),
            causal: true,
            window: self.model.window.filter(|_| windowed).map(|window| window.tokens),
        };
        let [forward, backward] = match self.training.software.fuses_attention() {
            true => self.rates.attention(&shape, self.wide()),
            false => self.unfused(&shape),
        };
        passes.forward.attention_s += forward;
        passes.input.attention_s += backward;
        self.count(passes, 2.0);
        if self.layout.context > 1 {
            let once = self.rates.gather(self.key_bytes(), self.layout.context, self.layout.tensor);
            passes.forward.context_s += once;
            passes.input.context_s += 2.0 * once;
        }
    }

    /// Bytes of a layer's keys and values of all context-parallel ranks.
    pub fn key_bytes(&self) -> f64 {
        let attention = &self.model.attention;
        let kv = (attention.kv_heads() as f64 / self.layout.tensor as f64).max(1.0);
        let widths = (attention.qk_dim() + attention.v_dim()) as f64;
        self.training.element_bytes() * self.tokens() * self.layout.context as f64 * kv * widths
    }

    /// Attention before it was fused: all scores are computed, written, masked, normalised, dropped out and read again:
    /// five passes over them forward, eight backward.
    fn unfused(&self, shape: &AttentionShape) -> [f64; 2] {
        let (queries, keys) = (shape.queries as f64, shape.keys as f64);
        let wide = self.wide();
        let products = (shape.batch * shape.heads) as f64
            * (self.rates.gemm(queries, keys, shape.qk_dim as f64, wide)
                + self.rates.gemm(queries, shape.v_dim as f64, keys, wide));
        let scores = 2.0 * (shape.batch * shape.heads) as f64 * queries * keys;
        let factor = self.rates.calibration.attention();
        [
            products + factor * self.rates.kernels.memory_bound(5.0 * scores),
            2.0 * products + factor * self.rates.kernels.memory_bound(8.0 * scores),
        ]
    }

    /// Mamba-2: projections, and a scan of states in chunks.
    fn state_space(&self, passes: &mut Passes) {
        let Some(StateSpace { heads, head_dim, state, groups }) = self.model.state_space else { return };
        let (m, d, t) = (self.tokens(), self.model.hidden as f64, self.layout.tensor as f64);
        let inner = (heads * head_dim) as f64 / t;
        let projected = 2.0 * inner + (2 * groups * state + heads) as f64 / t;
        self.norm(passes);
        self.linear(passes, m, projected, d);
        self.linear(passes, m, d, inner);
        // Convolution, gate and norm, and the states of every chunk of 128 tokens, read and written in 16 bits.
        let bytes =
            self.training.element_bytes() * m * (6.0 * projected + 3.0 * inner * state as f64 / 128.0);
        let bytes = self.rates.calibration.common.scan * bytes;
        self.stream(passes, bytes, 2.0 * bytes);
        let operations = 6.0 * m * inner * state as f64;
        let scan = self.rates.scan(operations);
        passes.forward.attention_s += scan;
        passes.input.attention_s += 2.5 * scan;
        self.count(passes, 10.0);
        self.region(passes);
    }

    fn dense(&self, passes: &mut Passes, ffn: usize, own_region: bool) {
        let (m, d) = (self.tokens(), self.model.hidden as f64);
        let inner = ffn as f64 / self.layout.tensor as f64;
        let gates = self.model.ffn_matrices() as f64 - 1.0;
        if own_region && !self.model.parallel_blocks {
            self.norm(passes);
        }
        self.linear(passes, m, gates * inner, d);
        let bytes = self.training.element_bytes() * m * inner;
        self.stream(passes, (gates + 1.0) * bytes, (2.0 * gates + 1.0) * bytes);
        self.linear(passes, m, d, inner);
        if own_region {
            self.region(passes);
        }
    }

    /// The network of experts; the host works harder for its many small kernels.
    fn experts(&self, passes: &mut Passes, moe: &MoeShape) {
        let mut own = Passes::default();
        self.routed(&mut own, moe);
        let dispatch = self.training.dispatch;
        let asks =
            self.layout.expert > 1 && dispatch.asks_for_counts() && self.training.software.is_megatron();
        let of = &self.rates.calibration;
        // The backward knows the counts of its forward, unless another micro-batch's forward runs with it.
        let again = asks && dispatch.overlapped;
        for (work, waits) in [(&mut own.forward, asks), (&mut own.input, again), (&mut own.weight, again)] {
            work.kernels *= of.software.moe_launch;
            work.awaited = if waits { of.common.awaited * work.kernels } else { 0.0 };
        }
        passes.add(&own, 1.0);
    }

    fn routed(&self, passes: &mut Passes, moe: &MoeShape) {
        let d = self.model.hidden as f64;
        let m = self.split_tokens();
        self.norm(passes);
        self.router(passes, moe);
        if moe.shared_ffn > 0 {
            self.dense(passes, moe.shared_ffn, false);
            self.region(passes);
        }
        let dispatched = self.model.dispatch_width() as f64;
        if let Some(latent) = moe.latent {
            self.linear(passes, m, latent as f64, d);
            self.linear(passes, m, d, latent as f64);
        }
        let rows = self.expert_rows(moe);
        let here = (moe.experts / self.layout.expert) as f64;
        let inner = moe.expert_ffn as f64 / self.layout.expert_tensor as f64;
        let gates = self.model.ffn_matrices() as f64 - 1.0;
        self.grouped(passes, rows, here, gates * inner, dispatched);
        let hidden = self.training.element_bytes() * rows * inner;
        self.stream(passes, (gates + 1.0) * hidden, (2.0 * gates + 1.0) * hidden);
        self.grouped(passes, rows, here, dispatched, inner);
        let rows_bytes = self.training.element_bytes() * rows * dispatched;
        if self.model.expert_biases && !self.training.software.fuses_experts() {
            let [forward, backward] = CLAMPED;
            self.stream(passes, forward * hidden, backward * hidden);
            let [forward, backward] = BIASED;
            self.stream(passes, forward * rows_bytes, backward * rows_bytes);
            // Each expert's rows apart.
            self.count(passes, 2.0 * here);
        }
        // Rows into the order of experts and back: read and written, each way.
        self.stream(passes, 4.0 * rows_bytes, 4.0 * rows_bytes);
        self.exchange(passes, moe);
    }

    fn router(&self, passes: &mut Passes, moe: &MoeShape) {
        let (m, wide) = (self.split_tokens(), self.wide());
        let experts = moe.experts as f64;
        passes.forward.gemm_s += self.rates.gemm(m, experts, self.model.hidden as f64, wide);
        passes.input.gemm_s += self.rates.gemm(m, self.model.hidden as f64, experts, wide);
        passes.weight.gemm_s += self.rates.gemm(experts, self.model.hidden as f64, m, wide);
        self.stream(passes, 4.0 * 6.0 * m * experts, 4.0 * 4.0 * m * experts);
        self.count(passes, 12.0);
    }

    fn grouped(&self, passes: &mut Passes, rows: f64, here: f64, n: f64, k: f64) {
        let (rates, precision) = (self.rates, self.training.compute);
        passes.forward.grouped_s += rates.grouped(rows, here, n, k, precision);
        passes.input.grouped_s += rates.grouped(rows, here, k, n, precision);
        passes.weight.grouped_s += rates.grouped(rows, here, n, k, precision);
        // One product an expert, and of narrow formats one cast each.
        let each = if precision.is_narrow() { 2.0 } else { 1.0 };
        self.count(passes, 1.0 + each * here * rates.calibration.software.expert_launch);
        if precision.is_narrow() {
            let cast = 2.0 * precision.bytes();
            self.stream(passes, cast * rows * k, cast * rows * n);
        }
    }

    /// Seconds of rows on their way to experts, and of results on their way back.
    pub fn exchange_s(&self, moe: &MoeShape) -> [f64; 2] {
        let tokens = self.tokens() / self.layout.tensor as f64;
        let dispatched = self.model.dispatch_width() as f64;
        let [sent, back] = self.training.wire_bytes().map(|bytes| bytes * dispatched);
        let once = self.training.dispatch.deduplicated;
        // An exchange takes as long as the rank that receives, or sends back, most.
        let exchange =
            |way, bytes| self.uneven * self.rates.dispatch(way, tokens, bytes, moe, self.layout, once);
        [exchange(Way::Dispatch, sent), exchange(Way::Combine, back)]
    }

    /// What they wait for.
    pub fn exchange_wait(&self, moe: &MoeShape) -> [Wait; 2] {
        let tokens = self.tokens() / self.layout.tensor as f64;
        let dispatched = self.model.dispatch_width() as f64;
        let [sent, back] = self.training.wire_bytes().map(|bytes| bytes * dispatched);
        let once = self.training.dispatch.deduplicated;
        let wait = |way, bytes| {
            let wait = self.rates.dispatch_wait(way, tokens, bytes, moe, self.layout, once);
            Wait { factor: self.uneven * wait.factor, ..wait }
        };
        [wait(Way::Dispatch, sent), wait(Way::Combine, back)]
    }

    /// Bytes that the tensor-parallel gather within an expert brings together.
    pub fn expert_gather_bytes(&self, moe: &MoeShape) -> f64 {
        let rows = self.tokens() / self.layout.tensor as f64 * (self.layout.expert_tensor * moe.top_k) as f64;
        self.training.element_bytes() * rows * self.model.dispatch_width() as f64
    }

    /// Dispatch and combine, and the tensor-parallel gather within an expert.
    fn exchange(&self, passes: &mut Passes, moe: &MoeShape) {
        if self.layout.expert > 1 {
            let [there, home] = self.exchange_s(moe);
            passes.forward.expert_s += there + home;
            passes.input.expert_s += 2.0 * home;
            self.count(passes, 4.0);
        }
        if self.layout.expert_tensor > 1 {
            let once = self.rates.gather(self.expert_gather_bytes(moe), self.layout.expert_tensor, 1);
            passes.forward.tensor_s += 2.0 * once;
            passes.input.tensor_s += 2.0 * once;
        }
    }

    /// Adds to the backward what it computes again.
    fn recompute(&self, passes: &mut Passes, kind: LayerKind, windowed: bool) {
        let forward = passes.forward;
        match self.layout.recompute {
            Recomputation::None => {}
            Recomputation::Full => passes.input += forward,
            Recomputation::Modules(modules) => {
                let mut again = Work::default();
                if modules.core_attention
                    && kind.mixer == Mixer::Attention
                    && !self.training.software.fuses_attention()
                {
                    let mut core = Passes::default();
                    self.core(&mut core, windowed);
                    again += core.forward;
                }
                if modules.moe && kind.ffn == FeedForward::Moe {
                    let mut experts = Passes::default();
                    if let Some(moe) = &self.model.moe {
                        self.experts(&mut experts, moe);
                    }
                    again += experts.forward;
                }
                if modules.mlp && kind.ffn == FeedForward::Dense {
                    let mut dense = Passes::default();
                    self.dense(&mut dense, self.model.ffn_dense, false);
                    again += dense.forward;
                }
                if modules.mla_up_projection
                    && let Attention::Latent { heads, q_lora_rank, kv_lora_rank, nope, rope, value } =
                        self.model.attention
                {
                    let heads = heads as f64 / self.layout.tensor as f64;
                    let q_rank = q_lora_rank.unwrap_or(self.model.hidden) as f64;
                    let (m, compute) = (self.tokens(), self.training.compute);
                    again.gemm_s += self.rates.gemm(m, heads * (nope + rope) as f64, q_rank, compute)
                        + self.rates.gemm(m, heads * (nope + value) as f64, kv_lora_rank as f64, compute);
                }
                if modules.layernorm {
                    let bytes =
                        self.training.element_bytes() * self.split_tokens() * self.model.hidden as f64;
                    again.memory_s += self.rates.stream(4.0 * bytes);
                }
                if modules.moe_activation
                    && let Some(moe) = &self.model.moe
                {
                    let inner = (moe.expert_ffn / self.layout.expert_tensor) as f64;
                    again.memory_s += self
                        .rates
                        .stream(3.0 * self.training.element_bytes() * self.expert_rows(moe) * inner);
                }
                passes.input += again;
            }
        }
    }

    /// Embedding of a micro-batch: rows gathered, gradients scattered.
    pub fn embedding(&self) -> Passes {
        let mut passes = Passes::default();
        let bytes = self.training.element_bytes() * self.split_tokens() * self.model.hidden as f64;
        self.stream(&mut passes, 3.0 * bytes, 6.0 * bytes);
        passes
    }

    /// Head and loss of a micro-batch.
    pub fn head(&self) -> Passes {
        let mut passes = Passes::default();
        let (m, d, wide) = (self.tokens(), self.model.hidden as f64, self.wide());
        let vocab = self.model.vocab as f64 / self.layout.tensor as f64;
        self.norm(&mut passes);
        passes.forward.gemm_s += self.rates.gemm(m, vocab, d, wide);
        passes.input.gemm_s += self.rates.gemm(m, d, vocab, wide);
        passes.weight.gemm_s += self.rates.gemm(vocab, d, m, wide);
        self.stream(&mut passes, 14.0 * m * vocab, 8.0 * m * vocab);
        self.region(&mut passes);
        if self.training.trainable == Trainable::Adapters {
            passes.weight = Work::default();
        }
        passes
    }
}
