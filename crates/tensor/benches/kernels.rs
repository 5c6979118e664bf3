//! Rates of the kernels that are made of products, next to what the crate `gemm` alone reaches on the same shapes
//! with one thread a core: `cargo bench -p unisono-tensor --bench kernels [-- NAME]`.
//!
//! Both are measured in turn, many times, and the best of each counts: other work on the machine hits both alike.

use std::hint::black_box;
use std::sync::{Barrier, LazyLock};
use std::time::{Duration, Instant};

use unisono_tensor::cpu::keep_freed_memory;
use unisono_tensor::{
    AttentionShape, Backend, Cpu, Dims, FfnRun, FfnShape, HeadGradients, Heads, HostBuffer, Pool, Product,
};

const TOKENS: usize = 2048;
const D_MODEL: usize = 256;
const QKV: usize = 512;
const SEQUENCE: usize = 256;
const EXPERTS: usize = 16;
const TOP_K: usize = 2;
const FFN: usize = 256;
const VOCAB: usize = 4096;
const ROUNDS: usize = 40;

/// The buffers of all kernels: as the engine's, in large pages.
static POOL: LazyLock<Pool> = LazyLock::new(Pool::default);

fn values(len: usize) -> HostBuffer {
    let mut buffer = POOL.take(len);
    for (i, value) in buffer.iter_mut().enumerate() {
        *value = ((i * 2_654_435_761) >> 8 & 0xFFFF) as f32 / 65_536.0 - 0.5;
    }
    buffer
}

fn flops(dims: Dims) -> f64 {
    2.0 * dims.m as f64 * dims.n as f64 * dims.k as f64
}

/// A product of the crate `gemm` on `threads` threads, each with operands of its own.
struct Raw {
    product: Product,
    dims: Dims,
    best: Duration,
}

impl Raw {
    fn new(product: Product, m: usize, n: usize, k: usize) -> Self {
        Self { product, dims: Dims { m, n, k }, best: Duration::MAX }
    }

    /// Keeps the best time of a call while all threads are at work.
    fn measure(&mut self, threads: usize) {
        let barrier = Barrier::new(threads);
        let one = || {
            let Dims { m, n, k } = self.dims;
            let (a, b, mut c) = (values(m * k), values(k * n), values(m * n));
            let calls = (4e8 / flops(self.dims)).ceil() as usize;
            self.call(&a, &b, &mut c);
            barrier.wait();
            (0..calls).map(|_| timed(|| self.call(&a, &b, &mut c))).min().unwrap_or(Duration::MAX)
        };
        let best = std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(one)).collect();
            let mine = one();
            others.into_iter().filter_map(|thread| thread.join().ok()).fold(mine, Duration::max)
        });
        self.best = self.best.min(best);
    }

    fn call(&self, a: &[f32], b: &[f32], c: &mut [f32]) {
        let Dims { m, n, k } = self.dims;
        let (lhs, rhs) = match self.product {
            Product::Plain => ((k, 1), (n, 1)),
            Product::TransposedRight => ((k, 1), (1, k)),
            Product::TransposedLeft => ((1, m), (n, 1)),
        };
        // SAFETY: the operands hold exactly the product's elements.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                c.as_mut_ptr(),
                1,
                n as isize,
                false,
                a.as_ptr(),
                lhs.1 as isize,
                lhs.0 as isize,
                b.as_ptr(),
                rhs.1 as isize,
                rhs.0 as isize,
                0.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

/// One line: the kernel's rate, the raw rate of its products (each counted `count` times), their ratio.
fn report(name: &str, threads: usize, mut raw: Vec<(usize, Raw)>, mut kernel: impl FnMut()) {
    if std::env::args().nth(1).is_some_and(|only| !only.starts_with('-') && !name.contains(&only)) {
        return;
    }
    kernel();
    let mut best = Duration::MAX;
    for _ in 0..ROUNDS {
        best = best.min(timed(&mut kernel));
        raw.iter_mut().for_each(|(_, raw)| raw.measure(threads));
        best = best.min(timed(&mut kernel));
    }
    let work: f64 = raw.iter().map(|(count, raw)| *count as f64 * flops(raw.dims)).sum();
    let alone: f64 = raw.iter().map(|(count, raw)| *count as f64 * raw.best.as_secs_f64()).sum();
    let (ours, raw) = (work / best.as_secs_f64() * 1e-9, work / alone * 1e-9 * threads as f64);
    println!("{name:28} {threads} threads  {ours:7.1} GFLOP/s   raw {raw:7.1}   ratio {:.2}", ours / raw);
}

fn matmuls(cpu: &Cpu) {
    let threads = cpu.threads().count();
    for (name, m, n, k) in [("qkv", TOKENS, QKV, D_MODEL), ("attention out", TOKENS, D_MODEL, D_MODEL)] {
        let (x, w, dy) = (values(m * k), values(k * n), values(m * n));
        let mut y = values(m * n);
        report(name, threads, vec![(1, Raw::new(Product::Plain, m, n, k))], || {
            cpu.matmul(Product::Plain, Dims { m, n, k }, &x, &w, &mut y, false);
        });
        let mut dx = values(m * k);
        let raw = vec![(1, Raw::new(Product::TransposedRight, m, k, n))];
        report(&format!("{name}, dx"), threads, raw, || {
            cpu.matmul(Product::TransposedRight, Dims { m, n: k, k: n }, &dy, &w, &mut dx, false);
        });
        let mut dw = values(k * n);
        let raw = vec![(1, Raw::new(Product::TransposedLeft, k, n, m))];
        report(&format!("{name}, dw"), threads, raw, || {
            cpu.matmul(Product::TransposedLeft, Dims { m: k, n, k: m }, &x, &dy, &mut dw, true);
        });
    }
}

/// Next to the products of whole heads with the half of the keys that a query sees on average.
fn attention(cpu: &Cpu) {
    let (threads, sequences) = (cpu.threads().count(), TOKENS / SEQUENCE);
    let heads = Heads { heads: 4, kv_heads: 2, head_dim: 64 };
    let document_start = vec![0; TOKENS];
    let shape = AttentionShape {
        heads,
        sequences,
        queries: SEQUENCE,
        keys: SEQUENCE,
        document_start: &document_start,
    };
    let (width, hd) = (heads.qkv_width(), heads.head_dim);
    let (qkv, dout) = (values(TOKENS * width), values(TOKENS * heads.q_width()));
    let (mut out, mut lse) = (values(TOKENS * heads.q_width()), values(TOKENS * heads.heads));
    let mut dqkv = values(TOKENS * width);
    let raw = |product, m, n, k| (sequences * heads.heads, Raw::new(product, m, n, k));
    let (plain, seen) = (Product::Plain, SEQUENCE / 2);
    let scores = || raw(Product::TransposedRight, SEQUENCE, seen, hd);
    let forward = vec![scores(), raw(plain, SEQUENCE, hd, seen)];
    report("attention", threads, forward, || {
        let (out, lse) = (&mut out[..], &mut lse[..]);
        cpu.attention(shape, &qkv, width, &qkv[heads.q_width()..], width, out, lse);
    });
    let keys = || raw(Product::TransposedLeft, seen, hd, SEQUENCE);
    let backward = vec![scores(), scores(), keys(), keys(), raw(plain, SEQUENCE, hd, seen)];
    report("attention, backward", threads, backward, || {
        cpu.attention_backward(shape, &dout, &qkv, &out, &lse, &mut dqkv);
    });
}

/// Rows of the experts, as unequal as a router in training makes them.
fn expert_runs() -> Vec<FfnRun> {
    let share = |expert: usize| 1.0 + 0.6 * ((expert * 7 % EXPERTS) as f64 / (EXPERTS - 1) as f64 - 0.5);
    let total: f64 = (0..EXPERTS).map(share).sum();
    let rows = (TOKENS * TOP_K) as f64;
    let bound = |expert: usize| ((0..expert).map(share).sum::<f64>() / total * rows).round() as usize;
    let size = D_MODEL * FFN;
    let run = |expert: usize| {
        let start = expert * 3 * size;
        let rows = bound(expert)..bound(expert + 1);
        FfnRun { out: rows.start, rows, w13: start, w2: start + 2 * size, dw13: start, dw2: start + 2 * size }
    };
    (0..EXPERTS).map(run).collect()
}

fn ffns(cpu: &Cpu) {
    let (threads, runs, d, f) = (cpu.threads().count(), expert_runs(), D_MODEL, FFN);
    let rows = TOKENS * TOP_K;
    let shape = FfnShape { d_model: d, ffn: f, row_block: 512 };
    let (x, dy, row_weight) = (values(rows * d), values(rows * d), values(rows));
    let weights = values(EXPERTS * 3 * d * f);
    let (mut gu, mut y, mut h) = (values(rows * 2 * f), values(rows * d), values(rows * f));
    let (mut dx, mut drow, mut dweights) = (values(rows * d), values(rows), values(EXPERTS * 3 * d * f));
    let mean = rows / EXPERTS;
    let each = |product, m, n, k| (EXPERTS, Raw::new(product, m, n, k));
    let raw = vec![each(Product::Plain, mean, 2 * f, d), each(Product::Plain, mean, d, f)];
    report("experts", threads, raw, || {
        cpu.ffn(shape, &runs, &x, &weights, Some(&row_weight), &mut gu, &mut y);
    });
    let right = Product::TransposedRight;
    report("experts, dx", threads, vec![each(right, mean, f, d), each(right, mean, d, 2 * f)], || {
        let (h, dx) = (&mut h[..], &mut dx[..]);
        cpu.ffn_backward(shape, &runs, &dy, &weights, Some(&row_weight), &mut gu, h, dx, Some(&mut drow));
    });
    let left = Product::TransposedLeft;
    let dgu = values(rows * 2 * f);
    report("experts, dw", threads, vec![each(left, d, 2 * f, mean), each(left, f, d, mean)], || {
        cpu.ffn_weight_grad(shape, &runs, &x, &dgu, &h, &dy, &mut dweights);
    });
}

fn head(cpu: &Cpu) {
    let (threads, d) = (cpu.threads().count(), D_MODEL);
    let (x, table) = (values(TOKENS * d), values(VOCAB * d));
    let targets: Vec<u32> = (0..TOKENS).map(|row| (row * 997 % VOCAB) as u32).collect();
    let (mut dx, mut dtable) = (values(TOKENS * d), values(VOCAB * d));
    let tiles = TOKENS / 256;
    let logits = || (tiles, Raw::new(Product::TransposedRight, 256, VOCAB, d));
    report("head, loss alone", threads, vec![logits()], || {
        black_box(cpu.head_loss(&x, &table, d, &targets, None));
    });
    let dx_raw = (tiles, Raw::new(Product::Plain, 256, d, VOCAB));
    let dtable_raw = (tiles, Raw::new(Product::TransposedLeft, VOCAB, d, 256));
    report("head", threads, vec![logits(), dx_raw, dtable_raw], || {
        let gradients = HeadGradients { scale: 1e-3, dx: Some(&mut dx[..]), dtable: Some(&mut dtable[..]) };
        black_box(cpu.head_loss(&x, &table, d, &targets, Some(gradients)));
    });
}

fn main() {
    keep_freed_memory();
    for threads in [1, 2] {
        let cpu = Cpu::new(threads);
        matmuls(&cpu);
        attention(&cpu);
        ffns(&cpu);
        head(&cpu);
    }
}
