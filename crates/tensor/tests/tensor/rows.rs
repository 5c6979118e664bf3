use unisono_tensor::{Backend, Cpu, NO_ROW, Wire};

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
fn gathering_copies_rows_and_leaves_those_that_have_no_source() {
    let mut rng = Rng::new(1);
    let (d, index) = (19, [3u32, 0, NO_ROW, 3, 69, 2, NO_ROW]);
    let src = rng.values(70 * d);
    let got = on_any_threads(|cpu| {
        let mut dst = vec![7.5; index.len() * d];
        cpu.gather_rows(&src, d, &index, &mut dst);
        dst.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
    });
    let row = |&i: &u32| if i == NO_ROW { vec![7.5; d] } else { src[i as usize * d..][..d].to_vec() };
    assert_eq!(got, bits(&index.iter().flat_map(row).collect::<Vec<_>>()));
}

/// The nearest bfloat16, found among its neighbours.
fn nearest_bf16(value: f32) -> f32 {
    let below = f32::from_bits(value.to_bits() & 0xFFFF_0000);
    let above = f32::from_bits((value.to_bits() & 0xFFFF_0000) + 0x1_0000);
    let (low, high) =
        ((f64::from(value) - f64::from(below)).abs(), (f64::from(above) - f64::from(value)).abs());
    let even = (below.to_bits() >> 16) & 1 == 0;
    if below == value || low < high || (low == high && even) { below } else { above }
}

fn rounded(wire: Wire, value: f32) -> f32 {
    if wire == Wire::Bf16 { nearest_bf16(value) } else { value }
}

#[test]
fn bf16_rounds_to_nearest_and_packs_two_values_in_one_element() {
    for d in [1, 2, 7, 64, 129] {
        let mut rng = Rng::new(d as u64);
        let rows = 300;
        let mut src = rng.values(rows * d);
        let special =
            [0.0, -0.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::INFINITY, 3e-39, f32::MIN_POSITIVE];
        src.iter_mut().zip(special).for_each(|(value, special)| *value = special);
        let out = on_any_threads(|cpu| {
            let mut packed = poison(rows * Wire::Bf16.width(d));
            cpu.pack_bf16(&src, d, &mut packed);
            let mut out = poison(rows * d);
            cpu.unpack_bf16(&packed, d, &mut out);
            bits(&out)
        });
        let want: Vec<f32> = src.iter().map(|&value| nearest_bf16(value)).collect();
        assert_eq!(out, bits(&want), "rows of {d}");
    }
    let cpu = Cpu::new(1);
    let (mut packed, mut out) = (vec![0.0], vec![0.0; 2]);
    cpu.pack_bf16(&[f32::NAN, -f32::NAN], 2, &mut packed);
    cpu.unpack_bf16(&packed, 2, &mut out);
    assert!(out.iter().all(|value| value.is_nan()));
}

/// One element of the combine, in the order that the contract names.
fn combined(
    values: &[(u32, f32)],
    node_size: u32,
    wire: Wire,
    shared: Option<f32>,
    base: Option<f32>,
) -> f32 {
    let mut nodes: Vec<(u32, f32)> = Vec::new();
    for &(expert, value) in values {
        match nodes.last_mut() {
            Some((node, sum)) if *node == expert / node_size => *sum += value,
            _ => nodes.push((expert / node_size, value)),
        }
    }
    nodes.iter_mut().for_each(|(_, sum)| *sum = rounded(wire, *sum));
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
        for (wire, shared, base) in [
            (Wire::F32, None, None),
            (Wire::F32, Some(&shared), None),
            (Wire::Bf16, None, Some(&base)),
            (Wire::F32, Some(&shared), Some(&base)),
            (Wire::Bf16, Some(&shared), Some(&base)),
        ] {
            let (shared, base) = (shared.map(Vec::as_slice), base.map(Vec::as_slice));
            let out = on_any_threads(|cpu| {
                let mut out = poison(rows * d);
                cpu.combine_rows(&src, d, &chosen, &index, top_k, node_size, wire, shared, base, &mut out);
                out
            });
            for (at, got) in out.iter().enumerate() {
                let (row, i) = (at / d, at % d);
                let choices = row * top_k..(row + 1) * top_k;
                let values: Vec<(u32, f32)> =
                    choices.map(|c| (chosen[c], src[index[c] as usize * d + i])).collect();
                let (shared, base) = (shared.map(|s| s[at]), base.map(|b| b[at]));
                let want = combined(&values, node_size as u32, wire, shared, base);
                assert_eq!(got.to_bits(), want.to_bits(), "row {row}, column {i}");
            }
        }
    }
}

#[test]
fn a_choice_without_a_row_is_part_of_an_earlier_one() {
    let src = [1.0, 2.0, 10.0, 20.0, 100.0, 200.0];
    let mut out = [0.0; 2];
    let (experts, index) = ([0, 1, 4], [2, NO_ROW, 0]);
    Cpu::new(1).combine_rows(&src, 2, &experts, &index, 3, 2, Wire::F32, None, None, &mut out);
    assert_eq!(out, [101.0, 202.0]);
}

#[test]
#[should_panic(expected = "row 9 of a table of 4 rows")]
fn an_id_outside_of_the_table_is_named() {
    Cpu::new(1).embedding(&[9], &[0.0; 8], 2, &mut [0.0; 2]);
}
