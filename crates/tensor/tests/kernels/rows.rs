use unisono_tensor::{Backend, Cpu};

use crate::support::*;

#[test]
fn embedding_looks_up_and_its_gradient_scatters_in_token_order() {
    for (rows, vocab, d) in [(1, 1, 1), (130, 7, 33), (20, 50, 256), (0, 3, 8)] {
        let mut rng = Rng::new(d as u64);
        let ids: Vec<u32> = (0..rows).map(|_| rng.below(vocab) as u32).collect();
        let (table, dout) = (rng.values(vocab * d), rng.values(rows * d));
        let (out, dtable) = on_any_threads(|cpu| {
            let (mut out, mut dtable) = (poison(rows * d), table.clone());
            cpu.embedding(&ids, &table, d, &mut out);
            cpu.embedding_backward(&ids, &dout, d, &mut dtable);
            (out, dtable)
        });
        let mut want = table.clone();
        for (row, &id) in ids.iter().enumerate() {
            for i in 0..d {
                assert_eq!(out[row * d + i].to_bits(), table[id as usize * d + i].to_bits());
                want[id as usize * d + i] += dout[row * d + i];
            }
        }
        assert_eq!(bits(&dtable), bits(&want), "plain additions, tokens ascending");
    }
}

#[test]
fn gathering_copies_rows() {
    let mut rng = Rng::new(1);
    let (d, index) = (19, [3u32, 0, 3, 69, 2]);
    let src = rng.values(70 * d);
    let got = on_any_threads(|cpu| {
        let mut dst = poison(index.len() * d);
        cpu.gather_rows(&src, d, &index, &mut dst);
        dst.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
    });
    let want: Vec<f32> = index.iter().flat_map(|&i| src[i as usize * d..][..d].iter().copied()).collect();
    assert_eq!(got, bits(&want));
}

/// One element of the combine, in the order that the contract names.
fn combined(values: &[(u32, f32)], node_size: u32, shared: Option<f32>, base: Option<f32>) -> f32 {
    let mut nodes: Vec<(u32, f32)> = Vec::new();
    for &(expert, value) in values {
        match nodes.last_mut() {
            Some((node, sum)) if *node == expert / node_size => *sum += value,
            _ => nodes.push((expert / node_size, value)),
        }
    }
    let routed = nodes.iter().skip(1).fold(nodes[0].1, |sum, (_, value)| sum + value);
    let inner = shared.map_or(routed, |shared| shared + routed);
    base.map_or(inner, |base| base + inner)
}

#[test]
fn the_combine_sums_by_expert_node() {
    for (rows, d, experts, top_k, node_size) in
        [(1, 1, 1, 1, 1), (70, 72, 8, 3, 2), (5, 256, 16, 4, 4), (9, 65, 4, 4, 4), (7, 100, 6, 6, 1)]
    {
        let mut rng = Rng::new(rows as u64);
        let src = rng.values(rows * top_k * d);
        let (shared, base) = (rng.values(rows * d), rng.values(rows * d));
        let chosen: Vec<u32> = (0..rows)
            .flat_map(|_| {
                let mut all: Vec<u32> = (0..experts as u32).collect();
                while all.len() > top_k {
                    all.remove(rng.below(all.len()));
                }
                all
            })
            .collect();
        let index: Vec<u32> = (0..rows * top_k).map(|_| rng.below(rows * top_k) as u32).collect();
        for (shared, base) in
            [(None, None), (Some(&shared), None), (None, Some(&base)), (Some(&shared), Some(&base))]
        {
            let (shared, base) = (shared.map(Vec::as_slice), base.map(Vec::as_slice));
            let out = on_any_threads(|cpu| {
                let mut out = poison(rows * d);
                cpu.combine_rows(&src, d, &chosen, &index, top_k, node_size, shared, base, &mut out);
                out
            });
            for (at, got) in out.iter().enumerate() {
                let (row, i) = (at / d, at % d);
                let choices = row * top_k..(row + 1) * top_k;
                let values: Vec<(u32, f32)> =
                    choices.map(|c| (chosen[c], src[index[c] as usize * d + i])).collect();
                let want = combined(&values, node_size as u32, shared.map(|s| s[at]), base.map(|b| b[at]));
                assert_eq!(got.to_bits(), want.to_bits(), "row {row}, column {i}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "row 9 of a table of 4 rows")]
fn an_id_outside_of_the_table_is_named() {
    Cpu::new(1).embedding(&[9], &[0.0; 8], 2, &mut [0.0; 2]);
}
