//! What the kernels compute forward, from the formulas, in f64 and plain loops. The tests of layers use them too.

use unisono_tensor::{AttentionShape, Heads, RouterShape};

use super::support::dot;

/// `x w`: `x` `[rows, k]`, `w` `[k, n]`.
pub fn product(x: &[f64], w: &[f64], k: usize) -> Vec<f64> {
    let n = w.len() / k;
    let mut y = vec![0.0; x.len() / k * n];
    for (x, y) in x.chunks_exact(k).zip(y.chunks_exact_mut(n)) {
        for (x, w) in x.iter().zip(w.chunks_exact(n)) {
            y.iter_mut().zip(w).for_each(|(y, w)| *y += x * w);
        }
    }
    y
}

/// RMSNorm of rows as long as `weight`.
pub fn rms_norm(x: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    let d = weight.len();
    let normed = |row: &[f64]| {
        let mean = dot(row, row) / d as f64;
        let rstd = 1.0 / (mean + epsilon).sqrt();
        row.iter().zip(weight).map(|(v, w)| v * rstd * w).collect::<Vec<_>>()
    };
    x.chunks_exact(d).flat_map(normed).collect()
}

/// RMSNorm of each query and key head of `raw` `[rows, qkv_width]`.
pub fn norm_heads(heads: Heads, raw: &[f64], q_weight: &[f64], k_weight: &[f64], epsilon: f64) -> Vec<f64> {
    let row = |row: &[f64]| {
        let (q, rest) = row.split_at(heads.q_width());
        let (k, v) = rest.split_at(heads.kv_width());
        [rms_norm(q, q_weight, epsilon), rms_norm(k, k_weight, epsilon), v.to_vec()].concat()
    };
    assert_eq!(q_weight.len(), heads.head_dim);
    raw.chunks_exact(heads.qkv_width()).flat_map(row).collect()
}

/// Rotary embedding of queries and keys of `qkv` `[rows, qkv_width]`; `table` has cosines, then sines of each position.
pub fn rotate(heads: Heads, qkv: &[f64], positions: &[u32], table: &[f64], inverse: bool) -> Vec<f64> {
    let (width, hd) = (heads.qkv_width(), heads.head_dim);
    let mut out = qkv.to_vec();
    for (row, &position) in positions.iter().enumerate() {
        for head in 0..heads.heads + heads.kv_heads {
            for i in 0..hd / 2 {
                let cos = table[position as usize * hd + i];
                let sin = table[position as usize * hd + hd / 2 + i];
                let sin = if inverse { -sin } else { sin };
                let (a, b) = (row * width + head * hd + i, row * width + head * hd + hd / 2 + i);
                (out[a], out[b]) = (qkv[a] * cos - qkv[b] * sin, qkv[b] * cos + qkv[a] * sin);
            }
        }
    }
    out
}

/// Causal attention within documents, one query at a time: `out`, then `lse`, as [`Backend::attention`] has them.
///
/// [`Backend::attention`]: unisono_tensor::Backend::attention
pub fn attention(
    shape: AttentionShape<'_>,
    q: &[f64],
    q_stride: usize,
    kv: &[f64],
    kv_stride: usize,
) -> [Vec<f64>; 2] {
    let Heads { heads, kv_heads, head_dim: hd } = shape.heads;
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for row in 0..shape.sequences * shape.queries {
        let (sequence, query) = (row / shape.queries, row % shape.queries);
        let seen = shape.document_start[row] as usize..shape.keys - shape.queries + query + 1;
        for head in 0..heads {
            let q = &q[row * q_stride + head * hd..][..hd];
            let kv_head = head / (heads / kv_heads);
            let at = |key: usize, part: usize| {
                &kv[(sequence * shape.keys + key) * kv_stride + (part * kv_heads + kv_head) * hd..][..hd]
            };
            let scores: Vec<f64> = seen.clone().map(|j| dot(q, at(j, 0)) / (hd as f64).sqrt()).collect();
            let log_sum = log_sum_exp(&scores);
            let mut mixed = vec![0.0; hd];
            for (j, s) in seen.clone().zip(&scores) {
                let p = (s - log_sum).exp();
                mixed.iter_mut().zip(at(j, 1)).for_each(|(m, v)| *m += p * v);
            }
            out.extend(mixed);
            lse.push(log_sum);
        }
    }
    [out, lse]
}

/// `silu(gate) * up` of rows of `ffn` gates, then `ffn` ups.
pub fn silu_product(gate_up: &[f64], ffn: usize) -> Vec<f64> {
    let row = |row: &[f64]| {
        let (gate, up) = row.split_at(ffn);
        gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect::<Vec<_>>()
    };
    gate_up.chunks_exact(2 * ffn).flat_map(row).collect()
}

/// Scores `[experts]` of one token.
pub fn scores(shape: RouterShape, logits: &[f64]) -> Vec<f64> {
    if shape.sigmoid {
        return logits.iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect();
    }
    let lse = log_sum_exp(logits);
    logits.iter().map(|l| (l - lse).exp()).collect()
}

/// `log(sum(exp(logits)))`.
pub fn log_sum_exp(logits: &[f64]) -> f64 {
    let max = logits.iter().fold(f64::NEG_INFINITY, |m, l| m.max(*l));
    max + logits.iter().map(|l| (l - max).exp()).sum::<f64>().ln()
}

/// The first `n` of `candidates` by descending key, ties to the lower index, in ascending order.
fn best(key: impl Fn(usize) -> f64, candidates: Vec<usize>, n: usize) -> Vec<usize> {
    let mut order = candidates;
    order.sort_by(|&a, &b| key(b).total_cmp(&key(a)).then(a.cmp(&b)));
    order.truncate(n);
    order.sort_unstable();
    order
}

/// The experts of the `token`-th token of its sequence, ascending, by `key`: its scores plus the bias (DeepSeek-V3,
/// section 2.1.2).
pub fn choose(shape: RouterShape, key: &[f64], token: usize) -> Vec<usize> {
    if shape.force_balance {
        let forced = (0..shape.top_k).map(|c| (token * shape.top_k + c) % shape.experts);
        return best(|_| 0.0, forced.collect(), shape.top_k);
    }
    let size = shape.experts / shape.groups;
    let group = |g: usize| {
        let mut keys = key[g * size..(g + 1) * size].to_vec();
        keys.sort_by(|a, b| b.total_cmp(a));
        keys.iter().take(2).sum::<f64>()
    };
    let groups = best(group, (0..shape.groups).collect(), shape.top_groups);
    let experts = groups.iter().flat_map(|g| g * size..(g + 1) * size).collect();
    best(|e| key[e], experts, shape.top_k)
}

/// Weights `[top_k]` of the chosen experts.
pub fn weights(shape: RouterShape, scores: &[f64], chosen: &[u32]) -> Vec<f64> {
    let picked: Vec<f64> = chosen.iter().map(|&e| scores[e as usize]).collect();
    let divisor = if shape.normalize { picked.iter().sum() } else { 1.0 };
    picked.iter().map(|s| f64::from(shape.scaling) * s / divisor).collect()
}

/// Balance loss, z-loss and entropy of one sequence with `logits` `[tokens, experts]` and routing counts `[experts]`, as
/// [`Routing`](unisono_tensor::Routing) has them.
pub fn balance_z_entropy(shape: RouterShape, logits: &[f64], counts: &[u32]) -> [f64; 3] {
    let (experts, tokens) = (shape.experts as f64, shape.sequence as f64);
    let mut mean = vec![0.0; shape.experts];
    let (mut z, mut entropy) = (0.0, 0.0);
    for row in logits.chunks_exact(shape.experts) {
        let s = scores(shape, row);
        let sum: f64 = s.iter().sum();
        for (mean, s) in mean.iter_mut().zip(&s) {
            *mean += s / sum / tokens;
            entropy -= s / sum * (s / sum).ln();
        }
        z += log_sum_exp(row).powi(2);
    }
    let f = counts.iter().map(|&c| experts / (shape.top_k as f64 * tokens) * f64::from(c));
    [f.zip(&mean).map(|(f, p)| f * p).sum(), z, entropy]
}
