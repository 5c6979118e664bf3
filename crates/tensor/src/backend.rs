//! The kernels that layers are made of, forward and backward, as one trait.
//!
//! All matrices are row-major and contiguous, elements are f32. `rows` counts tokens (or token-expert pairs).
//! Index arguments (token ids, routing tables, offsets) are host slices: the host needs them to plan communication.
//! Every kernel gives the same bits for a row whatever other rows are computed beside it and on however many
//! threads; where a kernel sums over rows, its doc states the order.

use std::ops::Range;

/// An owned flat buffer of f32 on a device.
pub trait Buffer: Send + Sync + 'static {
    /// A shared view of a part.
    type Ref<'a>: Copy + Send + Sync;
    /// An exclusive view of a part.
    type Mut<'a>: Send;

    /// Elements.
    fn len(&self) -> usize;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// A part of the buffer, `range` in elements.
    fn slice(&self, range: Range<usize>) -> Self::Ref<'_>;
    /// A part of the buffer for writing, `range` in elements.
    fn slice_mut(&mut self, range: Range<usize>) -> Self::Mut<'_>;
    /// All of it.
    fn all(&self) -> Self::Ref<'_> {
        self.slice(0..self.len())
    }
    /// All of it, for writing.
    fn all_mut(&mut self) -> Self::Mut<'_> {
        self.slice_mut(0..self.len())
    }
}

/// Shared view of backend `B`'s buffers.
pub type Ref<'a, B> = <<B as Backend>::Buf as Buffer>::Ref<'a>;
/// Exclusive view of backend `B`'s buffers.
pub type Mut<'a, B> = <<B as Backend>::Buf as Buffer>::Mut<'a>;

/// Which operand of a product is transposed; see [`Backend::matmul`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    /// `c[m, n] = a[m, k] * b[k, n]`: forward.
    Plain,
    /// `c[m, n] = a[m, k] * b[n, k]^T`: gradient of the input (`b` is the weight as stored).
    TransposedRight,
    /// `c[m, n] = a[k, m]^T * b[k, n]`: gradient of the weight (k runs over tokens).
    TransposedLeft,
}

/// Sizes of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dims {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
}

/// Heads of an attention layer. A token's row of `qkv` is `heads` queries, then `kv_heads` keys, then `kv_heads` values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head; even.
    pub head_dim: usize,
}

impl Heads {
    /// Elements of a `qkv` row.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
    /// Elements of a query (and attention output) row.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }
    /// Elements of the keys (or the values) of a token.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// What attention reads: queries of consecutive positions of one or more sequences, and all keys they may look at.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape<'a> {
    /// Heads.
    pub heads: Heads,
    /// Sequences in the batch; `q` has `sequences * queries` rows, `kv` has `sequences * keys` rows.
    pub sequences: usize,
    /// Query rows a sequence.
    pub queries: usize,
    /// Key rows a sequence, `keys >= queries`; the queries are the last rows: query i stands at position
    /// `keys - queries + i`. In training both are the sequence length.
    pub keys: usize,
    /// For every query row, the position in its sequence of the first token of its document: the query sees keys
    /// `document_start..=position`.
    pub document_start: &'a [u32],
}

/// A run of rows that goes through one feed-forward network (an expert, or a dense FFN for the rows of one slot).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FfnRun {
    /// The rows of the inputs, of hidden values and of row weights.
    pub rows: Range<usize>,
    /// The first row of the results (`y`, `dx`): they may stand elsewhere, since they leave on their own.
    pub out: usize,
    /// Offset in the weight buffer of `w13` `[d_model, 2 * ffn]` (gate columns, then up columns).
    pub w13: usize,
    /// Offset in the weight buffer of `w2` `[ffn, d_model]`.
    pub w2: usize,
    /// Offset in the gradient buffer of the gradient of `w13`.
    pub dw13: usize,
    /// Offset in the gradient buffer of the gradient of `w2`.
    pub dw2: usize,
}

/// Sizes of a (grouped) feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FfnShape {
    /// Width of the inputs and outputs.
    pub d_model: usize,
    /// Hidden width.
    pub ffn: usize,
    /// Rows of one weight-gradient product: a run's rows are cut into blocks of this many, ascending.
    pub row_block: usize,
}

/// How the router turns logits into a choice; the fields of the model's config.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RouterShape {
    /// Routed experts.
    pub experts: usize,
    /// Experts a token visits.
    pub top_k: usize,
    /// Sigmoid scores, otherwise softmax.
    pub sigmoid: bool,
    /// Divide the chosen scores by their sum.
    pub normalize: bool,
    /// Factor on the chosen weights.
    pub scaling: f32,
    /// Groups of consecutive experts for group-limited routing; 1 for none.
    pub groups: usize,
    /// Groups a token may choose from.
    pub top_groups: usize,
    /// Ignore scores for selection: token t takes experts `(t * top_k + choice) % experts`, t counted in its sequence.
    pub force_balance: bool,
    /// Rows of a sequence: the balance loss is sequence-wise.
    pub sequence: usize,
}

/// How rows travel between tokens and experts. What is not `F32` rounds them, also where they stay on their rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Wire {
    /// As they are.
    #[default]
    F32,
    /// Rounded to bfloat16 (to nearest, ties to even), half the bytes.
    Bf16,
}

impl Wire {
    /// Elements of a buffer that a row of `d` values takes on the wire: with [`Wire::Bf16`] two values share one.
    pub fn width(self, d: usize) -> usize {
        match self {
            Self::F32 => d,
            Self::Bf16 => d.div_ceil(2),
        }
    }
}

/// An index that stands for no row; see [`Backend::combine_rows`].
pub const NO_ROW: u32 = u32::MAX;

/// What the router decided for `rows` tokens.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Routing {
    /// `[rows, top_k]` chosen experts, ascending within a row.
    pub experts: Vec<u32>,
    /// `[rows, top_k]` their weights.
    pub weights: Vec<f32>,
    /// `[sequences, experts]` how often each sequence chose each expert.
    pub counts: Vec<u32>,
    /// `[sequences]` sequence-wise balance loss: `sum_e f_e P_e`, before its coefficient.
    pub balance_loss: Vec<f64>,
    /// `[sequences]` sum over the sequence's tokens of the squared log-sum-exp of the logits, before its coefficient.
    pub z_loss: Vec<f64>,
    /// `[sequences]` sum over tokens of the entropy of the normalised scores, in nats.
    pub entropy: Vec<f64>,
}

/// Step of AdamW; scalars are computed once in f64 by the caller and rounded once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub learning_rate: f32,
    /// First-moment decay.
    pub beta1: f32,
    /// Second-moment decay.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay; applied where a run asks for it.
    pub weight_decay: f32,
    /// `1 / (1 - beta1^step)`.
    pub correction1: f32,
    /// `1 / (1 - beta2^step)`.
    pub correction2: f32,
    /// Factor on the gradient: the clip coefficient.
    pub gradient_scale: f32,
}

/// Target of a position that is not predicted.
pub const IGNORE: u32 = u32::MAX;

/// Elements of a chunk of the gradient norm; optimizer shards are whole chunks.
pub const NORM_CHUNK: usize = 4096;

/// Tokens of a block in sums over tokens that are no products.
pub const TOKEN_BLOCK: usize = 64;

/// The kernels. Layers are generic over this trait and name no device.
pub trait Backend: Clone + Send + Sync + 'static {
    /// The backend's buffers.
    type Buf: Buffer;
    /// A buffer in host memory that collectives can move; the same as `Buf` on a CPU.
    type Host: AsRef<[f32]> + AsMut<[f32]> + Send + Sync + 'static;

    /// A buffer of `len` elements with unspecified (but initialised) contents, recycled where possible.
    fn alloc(&self, len: usize) -> Self::Buf;
    /// A buffer of zeros.
    fn zeros(&self, len: usize) -> Self::Buf {
        let mut buffer = self.alloc(len);
        self.fill(buffer.all_mut(), 0.0);
        buffer
    }
    /// Hands a buffer to the host (free on a CPU).
    fn hand_to_host(&self, buffer: Self::Buf) -> Self::Host;
    /// Takes a buffer from the host (free on a CPU).
    fn take_from_host(&self, host: Self::Host) -> Self::Buf;
    /// A host buffer of `len` elements with unspecified contents.
    fn alloc_host(&self, len: usize) -> Self::Host;
    /// Runs `task(0)` to `task(tasks - 1)`, each once, in any order, on the threads that the backend has on the host.
    fn on_host(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }
    /// Bytes of this rank's buffers now, and all that it has taken for buffers, which it keeps: `(now, taken)`.
    fn memory(&self) -> (usize, usize);
    /// Writes host values into `dst` (same length).
    fn upload(&self, src: &[f32], dst: Mut<'_, Self>);
    /// Reads `src` into host memory (same length).
    fn download(&self, src: Ref<'_, Self>, dst: &mut [f32]);

    /// `dst = value`.
    fn fill(&self, dst: Mut<'_, Self>, value: f32);
    /// `dst = src`.
    fn copy(&self, src: Ref<'_, Self>, dst: Mut<'_, Self>);
    /// `dst = dst + src`, elementwise.
    fn add(&self, dst: Mut<'_, Self>, src: Ref<'_, Self>);

    /// `buffer[into..into + len] += buffer[from..from + len]`; the ranges do not overlap.
    fn add_within(&self, buffer: Mut<'_, Self>, into: usize, from: usize, len: usize);

    /// `c = product(a, b)`, or `c += product(a, b)` if `accumulate`. Sums over k in blocks of 256, ascending,
    /// accumulated in place.
    fn matmul(
        &self,
        product: Product,
        dims: Dims,
        a: Ref<'_, Self>,
        b: Ref<'_, Self>,
        c: Mut<'_, Self>,
        accumulate: bool,
    );

    /// Embedding lookup: `out[row] = table[ids[row]]`, `out` `[rows, d]`.
    fn embedding(&self, ids: &[u32], table: Ref<'_, Self>, d: usize, out: Mut<'_, Self>);
    /// `dtable[ids[row]] += dout[row]`, rows ascending (parallel over columns).
    fn embedding_backward(&self, ids: &[u32], dout: Ref<'_, Self>, d: usize, dtable: Mut<'_, Self>);

    /// RMSNorm (Zhang and Sennrich, 2019): `y = x * rstd * weight`, `rstd = 1/sqrt(mean(x^2) + epsilon)` per row of `d`.
    /// `x`, `y` `[rows, d]`, `weight` `[d]`, `rstd` `[rows]`.
    fn rms_norm(
        &self,
        x: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        epsilon: f32,
        y: Mut<'_, Self>,
        rstd: Mut<'_, Self>,
    );
    /// Gradient of the input: `dx = base + ...`, `base` the residual branch's gradient or none.
    fn rms_norm_backward(
        &self,
        dy: Ref<'_, Self>,
        x: Ref<'_, Self>,
        weight: Ref<'_, Self>,
        rstd: Ref<'_, Self>,
        base: Option<Ref<'_, Self>>,
        dx: Mut<'_, Self>,
    );
    /// Gradient of the weight: `dweight += sum over rows of dy * x * rstd`: blocks of [`TOKEN_BLOCK`] rows, each
    /// summed ascending from zero, blocks added ascending.
    fn rms_norm_weight_grad(
        &self,
        dy: Ref<'_, Self>,
        x: Ref<'_, Self>,
        rstd: Ref<'_, Self>,
        d: usize,
        dweight: Mut<'_, Self>,
    );

    /// Per-head RMSNorm of queries and keys: heads `0..heads` with `q_weight`, the next `kv_heads` with `k_weight`
    /// (both `[head_dim]`); values are copied. `raw`, `out` `[rows, qkv_width]`, `rstd` `[rows, heads + kv_heads]`.
    fn head_norm(
        &self,
        heads: Heads,
        raw: Ref<'_, Self>,
        q_weight: Ref<'_, Self>,
        k_weight: Ref<'_, Self>,
        epsilon: f32,
        out: Mut<'_, Self>,
        rstd: Mut<'_, Self>,
    );
    /// Gradient `draw` of `raw` from `dout` of `out`, `[rows, qkv_width]`; values pass through.
    fn head_norm_backward(
        &self,
        heads: Heads,
        dout: Ref<'_, Self>,
        raw: Ref<'_, Self>,
        q_weight: Ref<'_, Self>,
        k_weight: Ref<'_, Self>,
        rstd: Ref<'_, Self>,
        draw: Mut<'_, Self>,
    );
    /// Gradients of both weights, accumulated; blocks of [`TOKEN_BLOCK`] rows ascending, heads ascending within a row.
    fn head_norm_weight_grad(
        &self,
        heads: Heads,
        dout: Ref<'_, Self>,
        raw: Ref<'_, Self>,
        rstd: Ref<'_, Self>,
        dq_weight: Mut<'_, Self>,
        dk_weight: Mut<'_, Self>,
    );

    /// Rotary embedding (Su et al., 2021), halves of a head paired as in Hugging Face's Llama, in place on queries and
    /// keys of `qkv` `[rows, qkv_width]`. `table` `[max_positions, head_dim]`: cosines then sines of a position.
    /// `inverse` rotates back: the backward.
    fn rope(&self, heads: Heads, qkv: Mut<'_, Self>, positions: &[u32], table: Ref<'_, Self>, inverse: bool);

    /// Causal attention with grouped KV heads, never the whole score matrix; online softmax over KV blocks of a fixed
    /// size at absolute positions, ascending. `q` has rows of `q_stride` elements that begin with the queries, `kv` rows
    /// of `kv_stride` elements that begin with the keys, then the values. `out` `[sequences * queries, q_width]`,
    /// `lse` `[sequences * queries, heads]` (log-sum-exp of the scaled scores). Scale is `1/sqrt(head_dim)`.
    fn attention(
        &self,
        shape: AttentionShape<'_>,
        q: Ref<'_, Self>,
        q_stride: usize,
        kv: Ref<'_, Self>,
        kv_stride: usize,
        out: Mut<'_, Self>,
        lse: Mut<'_, Self>,
    );
    /// Gradient of `qkv` `[rows, qkv_width]`, written whole (training shape: queries == keys). KV blocks ascending; within
    /// a block, the query heads of its group ascending, then blocks of queries from the first of its positions on, ascending.
    fn attention_backward(
        &self,
        shape: AttentionShape<'_>,
        dout: Ref<'_, Self>,
        qkv: Ref<'_, Self>,
        out: Ref<'_, Self>,
        lse: Ref<'_, Self>,
        dqkv: Mut<'_, Self>,
    );

    /// Feed-forward networks over runs of rows: `gu = x w13`, `h = silu(gate) * up`, `y = row_weight * (h w2)`.
    /// `x`, `y` `[rows, d_model]`, `gu` `[rows, 2 * ffn]` (kept for the backward), `row_weight` `[rows]` or none for 1.
    fn ffn(
        &self,
        shape: FfnShape,
        runs: &[FfnRun],
        x: Ref<'_, Self>,
        weights: Ref<'_, Self>,
        row_weight: Option<&[f32]>,
        gu: Mut<'_, Self>,
        y: Mut<'_, Self>,
    );
    /// Gradient of the inputs. `gu` holds the forward's values and becomes their gradient; `h` `[rows, ffn]` receives
    /// `row_weight * h` for the weight step; `dx` `[rows, d_model]` is written; `drow_weight` `[rows]` receives the
    /// gradient of the row weights.
    fn ffn_backward(
        &self,
        shape: FfnShape,
        runs: &[FfnRun],
        dy: Ref<'_, Self>,
        weights: Ref<'_, Self>,
        row_weight: Option<&[f32]>,
        gu: Mut<'_, Self>,
        h: Mut<'_, Self>,
        dx: Mut<'_, Self>,
        drow_weight: Option<&mut [f32]>,
    );
    /// Gradients of the weights, accumulated: `dw13 += x^T dgu`, `dw2 += h^T dy`, one product for each block of
    /// `row_block` rows of a run, ascending.
    fn ffn_weight_grad(
        &self,
        shape: FfnShape,
        runs: &[FfnRun],
        x: Ref<'_, Self>,
        dgu: Ref<'_, Self>,
        h: Ref<'_, Self>,
        dy: Ref<'_, Self>,
        dweights: Mut<'_, Self>,
    );

    /// Chooses experts for `logits` `[rows, experts]`, selection by score + `bias` `[experts]`, weights by score alone;
    /// groups score by the sum of their two best; ties go to the lower index (DeepSeek-V3, section 2.1.2).
    fn router(&self, shape: RouterShape, logits: Ref<'_, Self>, bias: &[f32]) -> Routing;
    /// Gradient of the logits from the gradient of the weights `dweights` `[rows, top_k]`, of the sequence-wise balance
    /// loss (times `balance` a sequence) and of the z-loss (times `z` a token). `dlogits` `[rows, experts]` is written.
    fn router_backward(
        &self,
        shape: RouterShape,
        logits: Ref<'_, Self>,
        routing: &Routing,
        dweights: &[f32],
        balance: f32,
        z: f32,
        dlogits: Mut<'_, Self>,
    );

    /// `dst[i] = src[index[i]]`, rows of `d`; a row of `dst` whose index is [`NO_ROW`] stays as it is.
    fn gather_rows(&self, src: Ref<'_, Self>, d: usize, index: &[u32], dst: Mut<'_, Self>);
    /// The combine: `out[row] = base[row] + (shared[row] + sum over expert nodes ascending of (sum over the row's experts on
    /// that node, ascending, of src[index[row, choice]]))`. `experts`, `index` `[rows, top_k]`, `node_size` experts a
    /// node; a missing `base` or `shared` adds nothing, and so does a choice at [`NO_ROW`], whose row is part of an earlier
    /// choice's. A node's sum is rounded as `wire` rounds.
    fn combine_rows(
        &self,
        src: Ref<'_, Self>,
        d: usize,
        experts: &[u32],
        index: &[u32],
        top_k: usize,
        node_size: usize,
        wire: Wire,
        shared: Option<Ref<'_, Self>>,
        base: Option<Ref<'_, Self>>,
        out: Mut<'_, Self>,
    );

    /// Rounds rows of `d` values to bfloat16, two values in one element of `dst`: rows of `d.div_ceil(2)`.
    fn pack_bf16(&self, src: Ref<'_, Self>, d: usize, dst: Mut<'_, Self>);
    /// The inverse of [`Backend::pack_bf16`]: `dst` has rows of `d` values.
    fn unpack_bf16(&self, src: Ref<'_, Self>, d: usize, dst: Mut<'_, Self>);

    /// Output head fused with cross-entropy; logits exist for a tile of tokens at a time. `x` `[rows, d]`, `table`
    /// `[vocab, d]`, `targets` `[rows]` ([`IGNORE`] is skipped). Returns the sum of the losses in nats: blocks of
    /// [`TOKEN_BLOCK`] rows ascending, in f64. With `gradients` (the factor of the loss, `dx` `[rows, d]` written, `dtable`
    /// `[vocab, d]` accumulated over tiles of 256 rows ascending) it runs the backward in the same pass, of the input, of
    /// the table or of both, with the same bits: the divisor of the loss is known before.
    fn head_loss(
        &self,
        x: Ref<'_, Self>,
        table: Ref<'_, Self>,
        d: usize,
        targets: &[u32],
        gradients: Option<HeadGradients<'_, Self>>,
    ) -> f64;

    /// Squares summed over each chunk of [`NORM_CHUNK`] elements, in f64 (eight interleaved partial sums, joined in
    /// order), appended to `out`.
    fn chunk_squares(&self, x: Ref<'_, Self>, out: &mut Vec<f64>);
    /// AdamW (Loshchilov and Hutter, 2019) in place. `runs` are ranges of the buffers, each with or without weight decay.
    fn adamw(
        &self,
        step: AdamW,
        runs: &[(Range<usize>, bool)],
        gradient: Ref<'_, Self>,
        parameter: Mut<'_, Self>,
        first: Mut<'_, Self>,
        second: Mut<'_, Self>,
    );
}

/// Where [`Backend::head_loss`] writes its gradients.
pub struct HeadGradients<'a, B: Backend> {
    /// Factor of the loss: one over the number of target tokens of the step.
    pub scale: f32,
    /// Gradient of `x`, written.
    pub dx: Option<Mut<'a, B>>,
    /// Gradient of `table`, accumulated.
    pub dtable: Option<Mut<'a, B>>,
}
