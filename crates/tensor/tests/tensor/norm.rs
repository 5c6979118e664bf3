use unisono_tensor::{Backend, Cpu, Heads, TOKEN_BLOCK};

use crate::formulas::{norm_heads, rms_norm};
use crate::support::*;

const EPSILON: f32 = 1e-5;

fn forward(cpu: &Cpu, x: &[f32], weight: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (mut y, mut rstd) = (poison(x.len()), poison(x.len() / weight.len()));
    cpu.rms_norm(x, weight, EPSILON, &mut y, &mut rstd);
    (y, rstd)
}

#[test]
fn rms_norm_is_the_reference_and_its_gradients_are_its_differences() {
    for (rows, d) in [(1, 8), (3, 20), (TOKEN_BLOCK + 5, 33), (2, 256), (130, 64), (1, 1)] {
        let mut rng = Rng::new(rows as u64);
        let (x, weight) = (rng.values(rows * d), rng.values(d));
        let (dy, before) = (rng.values(rows * d), rng.values(rows * d));
        let (y, dx, dweight) = on_any_threads(|cpu| {
            let (y, rstd) = forward(cpu, &x, &weight);
            let (mut dx, mut dweight) = (poison(x.len()), weight.clone());
            cpu.rms_norm_backward(&dy, &x, &weight, &rstd, Some(&before), &mut dx);
            cpu.rms_norm_weight_grad(&dy, &x, &rstd, d, &mut dweight);
            (y, dx, dweight)
        });
        let (x, weight, dy) = (widen(&x), widen(&weight), widen(&dy));
        assert_close("y", &y, &rms_norm(&x, &weight, f64::from(EPSILON)), 1e-6);
        let sampled: Vec<usize> = (0..(rows * d).min(150)).map(|_| rng.below(rows * d)).collect();
        let slopes = differences(&x, &sampled, |x| dot(&rms_norm(x, &weight, f64::from(EPSILON)), &dy));
        let want: Vec<f64> = sampled.iter().zip(slopes).map(|(&i, s)| s + f64::from(before[i])).collect();
        let got: Vec<f32> = sampled.iter().map(|&i| dx[i]).collect();
        assert_close("dx", &got, &want, 2e-5);
        let slopes = gradient(&weight, |weight| dot(&rms_norm(&x, weight, f64::from(EPSILON)), &dy));
        let want: Vec<f64> = slopes.iter().zip(&weight).map(|(s, w)| s + w).collect();
        assert_close("dweight", &dweight, &want, 1e-5);
    }
}

#[test]
fn a_row_is_normed_alike_wherever_it_stands() {
    let mut rng = Rng::new(3);
    let (rows, d) = (200, 72);
    let (x, weight, dy) = (rng.values(rows * d), rng.values(d), rng.values(rows * d));
    let cpu = Cpu::new(2);
    let (y, rstd) = forward(&cpu, &x, &weight);
    let mut dx = poison(rows * d);
    cpu.rms_norm_backward(&dy, &x, &weight, &rstd, None, &mut dx);
    for (first, last) in [(0, 1), (199, 200), (63, 66), (17, 150)] {
        let part = first * d..last * d;
        let (y_part, rstd_part) = forward(&cpu, &x[part.clone()], &weight);
        assert_eq!(bits(&y_part), bits(&y[part.clone()]));
        let mut dx_part = poison(part.len());
        cpu.rms_norm_backward(&dy[part.clone()], &x[part.clone()], &weight, &rstd_part, None, &mut dx_part);
        assert_eq!(bits(&dx_part), bits(&dx[part]));
    }
}

#[test]
fn weight_gradients_join_blocks_of_rows_in_order() {
    let mut rng = Rng::new(4);
    let (rows, d) = (2 * TOKEN_BLOCK + 7, 40);
    let (x, dy, rstd) = (rng.values(rows * d), rng.values(rows * d), rng.values(rows));
    let mut whole = vec![0.0; d];
    Cpu::new(2).rms_norm_weight_grad(&dy, &x, &rstd, d, &mut whole);
    let mut by_block = vec![0.0; d];
    for block in 0..rows.div_ceil(TOKEN_BLOCK) {
        let part = block * TOKEN_BLOCK..((block + 1) * TOKEN_BLOCK).min(rows);
        let elements = part.start * d..part.end * d;
        Cpu::new(1).rms_norm_weight_grad(&dy[elements.clone()], &x[elements], &rstd[part], d, &mut by_block);
    }
    assert_eq!(bits(&whole), bits(&by_block));
}

struct HeadNorm {
    out: Vec<f32>,
    draw: Vec<f32>,
    dq_weight: Vec<f32>,
    dk_weight: Vec<f32>,
}

fn head_norm(cpu: &Cpu, heads: Heads, raw: &[f32], weights: [&[f32]; 2], dout: &[f32]) -> HeadNorm {
    let rows = raw.len() / heads.qkv_width();
    let [q_weight, k_weight] = weights;
    let (mut out, mut rstd) = (poison(raw.len()), poison(rows * (heads.heads + heads.kv_heads)));
    cpu.head_norm(heads, raw, q_weight, k_weight, EPSILON, &mut out, &mut rstd);
    let (mut dq_weight, mut dk_weight) = (q_weight.to_vec(), k_weight.to_vec());
    cpu.head_norm_weight_grad(heads, dout, raw, &rstd, &mut dq_weight, &mut dk_weight);
    let mut draw = poison(raw.len());
    cpu.head_norm_backward(heads, dout, raw, q_weight, k_weight, &rstd, &mut draw);
    HeadNorm { out, draw, dq_weight, dk_weight }
}

#[test]
fn head_norm_is_the_reference_and_its_gradients_are_its_differences() {
    for (rows, h, kv, head_dim) in [(1, 1, 1, 16), (3, 4, 2, 24), (TOKEN_BLOCK + 3, 2, 1, 64), (2, 3, 3, 128)]
    {
        let heads = Heads { heads: h, kv_heads: kv, head_dim };
        let mut rng = Rng::new(head_dim as u64);
        let raw = rng.values(rows * heads.qkv_width());
        let (q_weight, k_weight) = (rng.values(head_dim), rng.values(head_dim));
        let dout = rng.values(raw.len());
        let parts = on_any_threads(|cpu| {
            let r = head_norm(cpu, heads, &raw, [&q_weight, &k_weight], &dout);
            [r.out, r.draw, r.dq_weight, r.dk_weight]
        });
        let (raw, q_weight, k_weight) = (widen(&raw), widen(&q_weight), widen(&k_weight));
        let dout = widen(&dout);
        let normed = |raw: &[f64], q_weight: &[f64], k_weight: &[f64]| {
            norm_heads(heads, raw, q_weight, k_weight, f64::from(EPSILON))
        };
        assert_close("out", &parts[0], &normed(&raw, &q_weight, &k_weight), 1e-6);
        let sampled: Vec<usize> = (0..150).map(|_| rng.below(raw.len())).collect();
        let want = differences(&raw, &sampled, |raw| dot(&normed(raw, &q_weight, &k_weight), &dout));
        let got: Vec<f32> = sampled.iter().map(|&i| parts[1][i]).collect();
        assert_close("draw", &got, &want, 2e-5);
        let slopes = gradient(&q_weight, |w| dot(&normed(&raw, w, &k_weight), &dout));
        let want: Vec<f64> = slopes.iter().zip(&q_weight).map(|(s, w)| s + w).collect();
        assert_close("dq_weight", &parts[2], &want, 1e-5);
        let slopes = gradient(&k_weight, |w| dot(&normed(&raw, &q_weight, w), &dout));
        let want: Vec<f64> = slopes.iter().zip(&k_weight).map(|(s, w)| s + w).collect();
        assert_close("dk_weight", &parts[3], &want, 1e-5);
    }
}

#[test]
fn values_pass_through_head_norm_and_heads_do_not_see_each_other() {
    let heads = Heads { heads: 4, kv_heads: 2, head_dim: 32 };
    let mut rng = Rng::new(9);
    let rows = 70;
    let width = heads.qkv_width();
    let (raw, dout) = (rng.values(rows * width), rng.values(rows * width));
    let weights = [rng.values(32), rng.values(32)];
    let run =
        |raw: &[f32], dout: &[f32]| head_norm(&Cpu::new(2), heads, raw, [&weights[0], &weights[1]], dout);
    let whole = run(&raw, &dout);
    let values = heads.q_width() + heads.kv_width();
    for row in 0..rows {
        let v = row * width + values..(row + 1) * width;
        assert_eq!(bits(&whole.out[v.clone()]), bits(&raw[v.clone()]));
        assert_eq!(bits(&whole.draw[v.clone()]), bits(&dout[v]));
    }
    let part = 31 * width..50 * width;
    let alone = run(&raw[part.clone()], &dout[part.clone()]);
    assert_eq!(bits(&alone.out), bits(&whole.out[part.clone()]));
    assert_eq!(bits(&alone.draw), bits(&whole.draw[part]));
}
