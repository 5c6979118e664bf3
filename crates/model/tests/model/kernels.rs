//! Single kernels against PyTorch's own, over lengths that cross the borders of blocks and tiles; see `fixtures/README.md`.

use std::collections::BTreeMap;

use crate::common::{compare, load_tensors};
use unisono_tensor::{AttentionShape, Backend, Buffer, Cpu, FfnRun, FfnShape, HeadGradients, Heads, IGNORE};

type Buf = <Cpu as Backend>::Buf;

const NORM_EPS: f32 = 1e-5;

/// One kernel's tensors.
struct Kernel {
    name: &'static str,
    backend: Cpu,
    floats: BTreeMap<String, Vec<f32>>,
    words: BTreeMap<String, Vec<u32>>,
}

impl Kernel {
    fn new(name: &'static str) -> Self {
        let (floats, words) = load_tensors("kernels");
        Self { name, backend: Cpu::new(2), floats, words }
    }

    fn theirs(&self, what: &str) -> &[f32] {
        &self.floats[&format!("{}.{what}", self.name)]
    }

    fn words(&self, what: &str) -> &[u32] {
        &self.words[&format!("{}.{what}", self.name)]
    }

    fn buffer(&self, what: &str) -> Buf {
        let values = self.theirs(what);
        let mut buffer = self.backend.alloc(values.len());
        self.backend.upload(values, buffer.all_mut());
        buffer
    }

    fn zeros_like(&self, what: &str) -> Buf {
        self.backend.zeros(self.theirs(what).len())
    }

    fn check(&self, what: &str, ours: &[f32]) {
        compare(&format!("{}.{what}", self.name), ours, self.theirs(what));
    }

    /// The gradient of an input.
    fn check_gradient(&self, what: &str, ours: &[f32]) {
        let name = format!("grad.{}.{what}", self.name);
        compare(&name, ours, &self.floats[&name]);
    }
}

#[test]
fn norms_of_heads_rotation_and_attention() {
    let kernel = Kernel::new("attention");
    let backend = &kernel.backend;
    let heads = Heads { heads: 4, kv_heads: 2, head_dim: 4 };
    let (raw, q_norm, k_norm) = (kernel.buffer("raw"), kernel.buffer("q_norm"), kernel.buffer("k_norm"));
    let document_start = kernel.words("document_start");
    let rows = document_start.len();
    let (mut qkv, mut rstd) =
        (backend.alloc(raw.len()), backend.alloc(rows * (heads.heads + heads.kv_heads)));
    backend.head_norm(heads, raw.all(), q_norm.all(), k_norm.all(), NORM_EPS, qkv.all_mut(), rstd.all_mut());
    let positions: Vec<u32> = (0..rows as u32).collect();
    let angles = positions.iter().map(|p| [f64::from(*p), f64::from(*p) / 100.0]);
    let turns = angles.flat_map(|[a, b]| [a.cos(), b.cos(), a.sin(), b.sin()].map(|v| v as f32));
    let mut table = backend.alloc(rows * heads.head_dim);
    backend.upload(&turns.collect::<Vec<_>>(), table.all_mut());
    backend.rope(heads, qkv.all_mut(), &positions, table.all(), false);

    let shape = AttentionShape { heads, sequences: 1, queries: rows, keys: rows, document_start };
    let (mut out, mut lse) = (kernel.zeros_like("out"), kernel.zeros_like("lse"));
    let (width, kv) = (heads.qkv_width(), qkv.slice(heads.q_width()..qkv.len()));
    backend.attention(shape, qkv.all(), width, kv, width, out.all_mut(), lse.all_mut());
    kernel.check("out", &out);
    kernel.check("lse", &lse);

    let mut dqkv = backend.alloc(qkv.len());
    let dout = kernel.buffer("dout");
    backend.attention_backward(shape, dout.all(), qkv.all(), out.all(), lse.all(), dqkv.all_mut());
    backend.rope(heads, dqkv.all_mut(), &positions, table.all(), true);
    let (mut dq, mut dk) = (kernel.zeros_like("q_norm"), kernel.zeros_like("k_norm"));
    backend.head_norm_weight_grad(heads, dqkv.all(), raw.all(), rstd.all(), dq.all_mut(), dk.all_mut());
    let mut draw = backend.alloc(raw.len());
    let (q_norm, k_norm) = (q_norm.all(), k_norm.all());
    backend.head_norm_backward(heads, dqkv.all(), raw.all(), q_norm, k_norm, rstd.all(), draw.all_mut());
    kernel.check_gradient("raw", &draw);
    kernel.check_gradient("q_norm", &dq);
    kernel.check_gradient("k_norm", &dk);
}

#[test]
fn norm() {
    let kernel = Kernel::new("norm");
    let backend = &kernel.backend;
    let (x, weight, dy) = (kernel.buffer("x"), kernel.buffer("weight"), kernel.buffer("dy"));
    let (mut y, mut rstd) = (backend.alloc(x.len()), backend.alloc(x.len() / weight.len()));
    backend.rms_norm(x.all(), weight.all(), NORM_EPS, y.all_mut(), rstd.all_mut());
    kernel.check("y", &y);
    let (mut dx, mut dweight) = (kernel.zeros_like("x"), kernel.zeros_like("weight"));
    backend.rms_norm_backward(dy.all(), x.all(), weight.all(), rstd.all(), None, dx.all_mut());
    backend.rms_norm_weight_grad(dy.all(), x.all(), rstd.all(), weight.len(), dweight.all_mut());
    kernel.check_gradient("x", &dx);
    kernel.check_gradient("weight", &dweight);
}

#[test]
fn head_and_its_loss() {
    let kernel = Kernel::new("head");
    let backend = &kernel.backend;
    let (x, table, targets) = (kernel.buffer("x"), kernel.buffer("table"), kernel.words("targets"));
    let counted = targets.iter().filter(|target| **target != IGNORE).count() as f64;
    let (mut dx, mut dtable) = (kernel.zeros_like("x"), kernel.zeros_like("table"));
    let gradients = HeadGradients {
        scale: (1.0 / counted) as f32,
        dx: Some(dx.all_mut()),
        dtable: Some(dtable.all_mut()),
    };
    let d = x.len() / targets.len();
    let loss = backend.head_loss(x.all(), table.all(), d, targets, Some(gradients));
    kernel.check("loss", &[(loss / counted) as f32]);
    kernel.check_gradient("x", &dx);
    kernel.check_gradient("table", &dtable);
}

#[test]
fn experts_with_weights_of_rows() {
    let kernel = Kernel::new("ffn");
    let backend = &kernel.backend;
    let (x, dy, row_weight) = (kernel.buffer("x"), kernel.buffer("dy"), kernel.theirs("row_weight"));
    let (w13, w2) = (kernel.theirs("w13"), kernel.theirs("w2"));
    let mut weights = backend.alloc(w13.len() + w2.len());
    backend.upload(&[w13, w2].concat(), weights.all_mut());
    let (sizes, rows) = (kernel.words("rows"), row_weight.len());
    let d = x.len() / rows;
    let ffn = w2.len() / sizes.len() / d;
    let run = |(expert, size): (usize, &u32)| {
        let first = sizes[..expert].iter().sum::<u32>() as usize;
        let (w13, w2) = (expert * 2 * ffn * d, w13.len() + expert * ffn * d);
        FfnRun { rows: first..first + *size as usize, out: first, w13, w2, dw13: w13, dw2: w2 }
    };
    let runs: Vec<FfnRun> = sizes.iter().enumerate().map(run).collect();
    let shape = FfnShape { d_model: d, ffn, row_block: 64 };
    let (mut gu, mut y) = (backend.alloc(rows * 2 * ffn), kernel.zeros_like("y"));
    backend.ffn(shape, &runs, x.all(), weights.all(), Some(row_weight), gu.all_mut(), y.all_mut());
    kernel.check("y", &y);
    let (mut hidden, mut dx) = (backend.alloc(rows * ffn), kernel.zeros_like("x"));
    let mut drow_weight = vec![0.0; rows];
    backend.ffn_backward(
        shape,
        &runs,
        dy.all(),
        weights.all(),
        Some(row_weight),
        gu.all_mut(),
        hidden.all_mut(),
        dx.all_mut(),
        Some(&mut drow_weight),
    );
    kernel.check_gradient("x", &dx);
    kernel.check_gradient("row_weight", &drow_weight);
    let mut dweights = backend.zeros(weights.len());
    backend.ffn_weight_grad(shape, &runs, x.all(), gu.all(), hidden.all(), dy.all(), dweights.all_mut());
    kernel.check_gradient("w13", &dweights[..w13.len()]);
    kernel.check_gradient("w2", &dweights[w13.len()..]);
}
