use unisono_tensor::{Backend, Cpu, Heads};

use crate::formulas::rotate;
use crate::support::*;

/// Cosines then sines for every position.
fn table(positions: usize, head_dim: usize) -> Vec<f32> {
    let half = head_dim / 2;
    let angle = |p: usize, i: usize| p as f64 * 10_000f64.powf(-(i as f64) / half as f64);
    (0..positions)
        .flat_map(|p| {
            let cosines = (0..half).map(move |i| angle(p, i).cos() as f32);
            cosines.chain((0..half).map(move |i| angle(p, i).sin() as f32))
        })
        .collect()
}

#[test]
fn rope_is_the_reference_both_ways() {
    for (rows, h, kv, head_dim) in [(1, 1, 1, 16), (70, 4, 2, 24), (5, 2, 2, 128), (9, 3, 1, 2)] {
        let heads = Heads { heads: h, kv_heads: kv, head_dim };
        let mut rng = Rng::new(rows as u64);
        let qkv = rng.values(rows * heads.qkv_width());
        let positions: Vec<u32> = (0..rows).map(|_| rng.below(40) as u32).collect();
        let table = table(40, head_dim);
        for inverse in [false, true] {
            let got = on_any_threads(|cpu| {
                let mut qkv = qkv.clone();
                cpu.rope(heads, &mut qkv, &positions, &table, inverse);
                qkv
            });
            let want = rotate(heads, &widen(&qkv), &positions, &widen(&table), inverse);
            assert_close("qkv", &got, &want, 1e-6);
        }
    }
}

#[test]
fn turning_back_is_the_transpose() {
    let heads = Heads { heads: 2, kv_heads: 1, head_dim: 16 };
    let mut rng = Rng::new(5);
    let qkv = rng.values(6 * heads.qkv_width());
    let dout = rng.values(qkv.len());
    let positions = [0, 7, 3, 1, 19, 2];
    let table = table(20, 16);
    let mut turned = dout.clone();
    Cpu::new(2).rope(heads, &mut turned, &positions, &table, true);
    let dout = widen(&dout);
    let table = widen(&table);
    let want = gradient(&widen(&qkv), |x| dot(&rotate(heads, x, &positions, &table, false), &dout));
    assert_close("dqkv", &turned, &want, 1e-6);
}

#[test]
fn a_row_turns_alike_beside_other_rows() {
    let heads = Heads { heads: 3, kv_heads: 1, head_dim: 36 };
    let mut rng = Rng::new(6);
    let width = heads.qkv_width();
    let qkv = rng.values(150 * width);
    let positions: Vec<u32> = (0..150).collect();
    let table = table(150, 36);
    let mut whole = qkv.clone();
    Cpu::new(2).rope(heads, &mut whole, &positions, &table, false);
    let mut part = qkv[77 * width..79 * width].to_vec();
    Cpu::new(1).rope(heads, &mut part, &positions[77..79], &table, false);
    assert_eq!(bits(&part), bits(&whole[77 * width..79 * width]));
}
