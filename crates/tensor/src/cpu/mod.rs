//! The CPU implementation, on slices. Each module holds one family of kernels as free functions.

use std::ops::Range;

use crate::backend::*;
use crate::buffer::{HostBuffer, Pool};

mod attention;
mod bf16;
mod crew;
mod elementwise;
mod ffn;
mod gemm;
mod head;
mod matmul;
mod norm;
mod parallel;
mod rope;
mod router;
mod rows;
pub mod simd;
mod system_memory;
mod team;

pub use crew::Crew;
pub use gemm::{Matrix, MatrixMut, gemm};
pub use parallel::{DisjointMut, Scratch, Threads};
pub use system_memory::{keep_freed_memory, prepare_thread};

/// The CPU backend of one rank: its buffers and its private compute threads. Cloning shares both.
#[derive(Clone)]
pub struct Cpu {
    pool: Pool,
    threads: Threads,
}

impl Cpu {
    /// A backend with `threads` compute threads, the one that calls its kernels among them.
    pub fn new(threads: usize) -> Self {
        Self { pool: Pool::default(), threads: Threads::new(threads) }
    }

    /// As [`Cpu::new`], for the rank `me` of a crew: ranks that wait help with its tasks.
    pub fn in_crew(threads: usize, crew: &Crew, me: usize) -> Self {
        Self { pool: Pool::default(), threads: Threads::in_crew(threads, crew, me) }
    }

    /// The compute threads.
    pub fn threads(&self) -> &Threads {
        &self.threads
    }
}

impl Backend for Cpu {
    type Buf = HostBuffer;
    type Host = HostBuffer;

    fn alloc(&self, len: usize) -> HostBuffer {
        self.pool.take(len)
    }
    fn hand_to_host(&self, buffer: HostBuffer) -> HostBuffer {
        buffer
    }
    fn take_from_host(&self, host: HostBuffer) -> HostBuffer {
        host
    }
    fn alloc_host(&self, len: usize) -> HostBuffer {
        self.pool.take(len)
    }
    fn on_host(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.threads().run(tasks, task);
    }
    fn memory(&self) -> (usize, usize) {
        self.pool.memory()
    }
    fn upload(&self, src: &[f32], dst: &mut [f32]) {
        dst.copy_from_slice(src);
    }
    fn download(&self, src: &[f32], dst: &mut [f32]) {
        dst.copy_from_slice(src);
    }
    fn fill(&self, dst: &mut [f32], value: f32) {
        elementwise::fill(self.threads(), dst, value)
    }
    fn copy(&self, src: &[f32], dst: &mut [f32]) {
        elementwise::copy(self.threads(), src, dst)
    }
    fn add(&self, dst: &mut [f32], src: &[f32]) {
        elementwise::add(self.threads(), dst, src)
    }
    fn add_within(&self, buffer: &mut [f32], into: usize, from: usize, len: usize) {
        let (low, high) = buffer.split_at_mut(into.max(from));
        let (low, high) = (&mut low[into.min(from)..][..len], &mut high[..len]);
        let (dst, src) = if into < from { (low, high) } else { (high, low) };
        self.add(dst, src);
    }
    fn matmul(&self, product: Product, dims: Dims, a: &[f32], b: &[f32], c: &mut [f32], accumulate: bool) {
        matmul::matmul(self.threads(), product, dims, a, b, c, accumulate)
    }
    fn embedding(&self, ids: &[u32], table: &[f32], d: usize, out: &mut [f32]) {
        rows::embedding(self.threads(), ids, table, d, out)
    }
    fn embedding_backward(&self, ids: &[u32], dout: &[f32], d: usize, dtable: &mut [f32]) {
        rows::embedding_backward(self.threads(), ids, dout, d, dtable)
    }
    fn rms_norm(&self, x: &[f32], weight: &[f32], epsilon: f32, y: &mut [f32], rstd: &mut [f32]) {
        norm::rms_norm(self.threads(), x, weight, epsilon, y, rstd)
    }
    fn rms_norm_backward(
        &self,
        dy: &[f32],
        x: &[f32],
        weight: &[f32],
        rstd: &[f32],
        base: Option<&[f32]>,
        dx: &mut [f32],
    ) {
        norm::rms_norm_backward(self.threads(), dy, x, weight, rstd, base, dx)
    }
    fn rms_norm_weight_grad(&self, dy: &[f32], x: &[f32], rstd: &[f32], d: usize, dweight: &mut [f32]) {
        norm::rms_norm_weight_grad(self.threads(), dy, x, rstd, d, dweight)
    }
    fn head_norm(
        &self,
        heads: Heads,
        raw: &[f32],
        q_weight: &[f32],
        k_weight: &[f32],
        epsilon: f32,
        out: &mut [f32],
        rstd: &mut [f32],
    ) {
        norm::head_norm(self.threads(), heads, raw, q_weight, k_weight, epsilon, out, rstd)
    }
    fn head_norm_backward(
        &self,
        heads: Heads,
        dout: &[f32],
        raw: &[f32],
        q_weight: &[f32],
        k_weight: &[f32],
        rstd: &[f32],
        draw: &mut [f32],
    ) {
        norm::head_norm_backward(self.threads(), heads, dout, raw, q_weight, k_weight, rstd, draw)
    }
    fn head_norm_weight_grad(
        &self,
        heads: Heads,
        dout: &[f32],
        raw: &[f32],
        rstd: &[f32],
        dq_weight: &mut [f32],
        dk_weight: &mut [f32],
    ) {
        norm::head_norm_weight_grad(self.threads(), heads, dout, raw, rstd, dq_weight, dk_weight)
    }
    fn rope(&self, heads: Heads, qkv: &mut [f32], positions: &[u32], table: &[f32], inverse: bool) {
        rope::rope(self.threads(), heads, qkv, positions, table, inverse)
    }
    fn attention(
        &self,
        shape: AttentionShape<'_>,
        q: &[f32],
        q_stride: usize,
        kv: &[f32],
        kv_stride: usize,
        out: &mut [f32],
        lse: &mut [f32],
    ) {
        attention::attention(self.threads(), shape, q, q_stride, kv, kv_stride, out, lse)
    }
    fn attention_backward(
        &self,
        shape: AttentionShape<'_>,
        dout: &[f32],
        qkv: &[f32],
        out: &[f32],
        lse: &[f32],
        dqkv: &mut [f32],
    ) {
        attention::attention_backward(self.threads(), shape, dout, qkv, out, lse, dqkv)
    }
    fn ffn(
        &self,
        shape: FfnShape,
        runs: &[FfnRun],
        x: &[f32],
        weights: &[f32],
        row_weight: Option<&[f32]>,
        gu: &mut [f32],
        y: &mut [f32],
    ) {
        ffn::ffn(self.threads(), shape, runs, x, weights, row_weight, gu, y)
    }
    fn ffn_backward(
        &self,
        shape: FfnShape,
        runs: &[FfnRun],
        dy: &[f32],
        weights: &[f32],
        row_weight: Option<&[f32]>,
        gu: &mut [f32],
        h: &mut [f32],
        dx: &mut [f32],
        drow_weight: Option<&mut [f32]>,
    ) {
        ffn::ffn_backward(self.threads(), shape, runs, dy, weights, row_weight, gu, h, dx, drow_weight)
    }
    fn ffn_weight_grad(
        &self,
        shape: FfnShape,
        runs: &[FfnRun],
        x: &[f32],
        dgu: &[f32],
        h: &[f32],
        dy: &[f32],
        dweights: &mut [f32],
    ) {
        ffn::ffn_weight_grad(self.threads(), shape, runs, x, dgu, h, dy, dweights)
    }
    fn router(&self, shape: RouterShape, logits: &[f32], bias: &[f32]) -> Routing {
        router::router(self.threads(), shape, logits, bias)
    }
    fn router_backward(
        &self,
        shape: RouterShape,
        logits: &[f32],
        routing: &Routing,
        dweights: &[f32],
        balance: f32,
        z: f32,
        dlogits: &mut [f32],
    ) {
        router::router_backward(self.threads(), shape, logits, routing, dweights, balance, z, dlogits)
    }
    fn gather_rows(&self, src: &[f32], d: usize, index: &[u32], dst: &mut [f32]) {
        rows::gather_rows(self.threads(), src, d, index, dst)
    }
    fn combine_rows(
        &self,
        src: &[f32],
        d: usize,
        experts: &[u32],
        index: &[u32],
        top_k: usize,
        node_size: usize,
        wire: Wire,
        shared: Option<&[f32]>,
        base: Option<&[f32]>,
        out: &mut [f32],
    ) {
        let choices = rows::Choices { experts, index, node_size };
        rows::combine_rows(self.threads(), src, d, choices, top_k, wire, shared, base, out)
    }
    fn pack_bf16(&self, src: &[f32], d: usize, dst: &mut [f32]) {
        bf16::pack(self.threads(), src, d, dst)
    }
    fn unpack_bf16(&self, src: &[f32], d: usize, dst: &mut [f32]) {
        bf16::unpack(self.threads(), src, d, dst)
    }
    fn head_loss(
        &self,
        x: &[f32],
        table: &[f32],
        d: usize,
        targets: &[u32],
        gradients: Option<HeadGradients<'_, Self>>,
    ) -> f64 {
        head::head_loss(self.threads(), x, table, d, targets, gradients)
    }
    fn chunk_squares(&self, x: &[f32], out: &mut Vec<f64>) {
        elementwise::chunk_squares(self.threads(), x, out)
    }
    fn adamw(
        &self,
        step: AdamW,
        runs: &[(Range<usize>, bool)],
        gradient: &[f32],
        parameter: &mut [f32],
        first: &mut [f32],
        second: &mut [f32],
    ) {
        elementwise::adamw(self.threads(), step, runs, gradient, parameter, first, second)
    }
}
