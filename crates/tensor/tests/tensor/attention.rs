use unisono_tensor::{AttentionShape, Backend, Cpu, Heads};

use crate::formulas::attention;
use crate::support::*;

struct Case {
    heads: Heads,
    sequences: usize,
    length: usize,
    starts: Vec<u32>,
    qkv: Vec<f32>,
    dout: Vec<f32>,
}

impl Case {
    /// Documents begin at the positions `documents` of every sequence (and at 0).
    fn new(heads: [usize; 3], sequences: usize, length: usize, documents: &[usize]) -> Self {
        let [heads, kv_heads, head_dim] = heads;
        let heads = Heads { heads, kv_heads, head_dim };
        let start = |p: usize| documents.iter().filter(|&&s| s <= p).max().map_or(0, |&s| s as u32);
        let starts = (0..sequences * length).map(|row| start(row % length)).collect();
        let mut rng = Rng::new((length * 7 + head_dim) as u64);
        let qkv = rng.values(sequences * length * heads.qkv_width()).iter().map(|v| 2.0 * v).collect();
        let dout = rng.values(sequences * length * heads.q_width());
        Self { heads, sequences, length, starts, qkv, dout }
    }

    fn shape(&self) -> AttentionShape<'_> {
        let (sequences, queries, keys) = (self.sequences, self.length, self.length);
        AttentionShape { heads: self.heads, sequences, queries, keys, document_start: &self.starts }
    }

    fn reference(&self, qkv: &[f64]) -> [Vec<f64>; 2] {
        let width = self.heads.qkv_width();
        attention(self.shape(), qkv, width, &qkv[self.heads.q_width()..], width)
    }

    fn forward(&self, cpu: &Cpu) -> [Vec<f32>; 2] {
        let (rows, width) = (self.sequences * self.length, self.heads.qkv_width());
        let (mut out, mut lse) = (poison(rows * self.heads.q_width()), poison(rows * self.heads.heads));
        let kv = &self.qkv[self.heads.q_width()..];
        cpu.attention(self.shape(), &self.qkv, width, kv, width, &mut out, &mut lse);
        [out, lse]
    }

    fn backward(&self, cpu: &Cpu, [out, lse]: &[Vec<f32>; 2]) -> Vec<f32> {
        let mut dqkv = poison(self.qkv.len());
        cpu.attention_backward(self.shape(), &self.dout, &self.qkv, out, lse, &mut dqkv);
        dqkv
    }
}

fn cases() -> Vec<Case> {
    vec![
        Case::new([1, 1, 16], 1, 1, &[]),
        Case::new([2, 1, 16], 2, 7, &[3]),
        Case::new([4, 2, 64], 2, 64, &[]),
        Case::new([4, 2, 64], 1, 150, &[40, 64, 129]),
        Case::new([2, 2, 32], 3, 65, &[64]),
        Case::new([3, 1, 128], 1, 100, &[99]),
        Case::new([3, 3, 18], 1, 200, &[70, 71, 180]),
        Case::new([6, 2, 80], 1, 257, &[]),
    ]
}

#[test]
fn attention_is_the_reference_and_its_gradient_is_its_slope() {
    for case in cases() {
        let name = |what: &str| format!("{what} of {:?} x {}", case.heads, case.length);
        let (forward, dqkv) = on_any_threads(|cpu| {
            let forward = case.forward(cpu);
            let dqkv = case.backward(cpu, &forward);
            (forward, dqkv)
        });
        let qkv = widen(&case.qkv);
        let want = case.reference(&qkv);
        assert_close(&name("out"), &forward[0], &want[0], 2e-6);
        assert_close(&name("lse"), &forward[1], &want[1], 1e-6);
        let mut rng = Rng::new(11);
        let sampled: Vec<usize> = (0..48).map(|_| rng.below(qkv.len())).collect();
        let dout = widen(&case.dout);
        let want = differences(&qkv, &sampled, |qkv| dot(&case.reference(qkv)[0], &dout));
        let got: Vec<f32> = sampled.iter().map(|&i| dqkv[i]).collect();
        assert_close(&name("dqkv"), &got, &want, 2e-5);
        assert!(dqkv.iter().all(|v| v.is_finite()), "written whole");
    }
}

#[test]
fn every_gradient_of_a_small_case_is_its_slope() {
    let case = Case::new([4, 2, 16], 2, 5, &[2]);
    let cpu = Cpu::new(2);
    let dqkv = case.backward(&cpu, &case.forward(&cpu));
    let dout = widen(&case.dout);
    let want = gradient(&widen(&case.qkv), |qkv| dot(&case.reference(qkv)[0], &dout));
    assert_close("dqkv", &dqkv, &want, 1e-5);
}

#[test]
fn a_decoded_row_is_the_row_of_training_to_the_bit() {
    for case in cases().into_iter().filter(|case| case.length > 1) {
        let (width, q_width) = (case.heads.qkv_width(), case.heads.q_width());
        let [out, lse] = case.forward(&Cpu::new(1));
        let rows_of = |row: usize, n: usize| row * q_width..(row + n) * q_width;
        let mut ends: Vec<usize> = vec![1, 2, 3, case.length, case.length / 2, case.length - 1, 64, 65, 66];
        ends.retain(|&end| end <= case.length);
        for (end, queries) in ends.into_iter().flat_map(|end| [(end, 1), (end, 3.min(end)), (end, end)]) {
            // A cache of another stride, and garbage behind the last key.
            let sequence = case.sequences - 1;
            let kv_stride = 2 * case.heads.kv_width() + 5;
            let mut cache = poison((end + 2) * kv_stride);
            for key in 0..end {
                let from = (sequence * case.length + key) * width;
                cache[key * kv_stride..][..2 * case.heads.kv_width()]
                    .copy_from_slice(&case.qkv[from + q_width..from + width]);
            }
            let first = sequence * case.length + end - queries;
            let shape = AttentionShape {
                heads: case.heads,
                sequences: 1,
                queries,
                keys: end,
                document_start: &case.starts[first..first + queries],
            };
            let mut part = [poison(queries * q_width), poison(queries * case.heads.heads)];
            let [part_out, part_lse] = &mut part;
            let q = &case.qkv[first * width..(first + queries) * width];
            Cpu::new(2).attention(shape, q, width, &cache, kv_stride, part_out, part_lse);
            assert_eq!(bits(part_out), bits(&out[rows_of(first, queries)]), "{queries} of {end}");
            let h = case.heads.heads;
            assert_eq!(bits(part_lse), bits(&lse[first * h..(first + queries) * h]), "{queries} of {end}");
        }
    }
}

#[test]
fn a_sequence_attends_alike_beside_others() {
    let case = Case::new([4, 2, 32], 3, 90, &[17, 64]);
    let cpu = Cpu::new(2);
    let forward = case.forward(&cpu);
    let dqkv = case.backward(&cpu, &forward);
    let (elements, q_elements) = (90 * case.heads.qkv_width(), 90 * case.heads.q_width());
    let alone = Case {
        heads: case.heads,
        sequences: 1,
        length: 90,
        starts: case.starts[90..180].to_vec(),
        qkv: case.qkv[elements..2 * elements].to_vec(),
        dout: case.dout[q_elements..2 * q_elements].to_vec(),
    };
    let alone_forward = alone.forward(&cpu);
    assert_eq!(bits(&alone_forward[0]), bits(&forward[0][q_elements..2 * q_elements]));
    assert_eq!(bits(&alone.backward(&cpu, &alone_forward)), bits(&dqkv[elements..2 * elements]));
}

#[test]
fn a_document_does_not_see_what_stands_before_it() {
    let boundary = 100;
    let case = Case::new([2, 1, 32], 1, 180, &[boundary]);
    let cpu = Cpu::new(2);
    let forward = case.forward(&cpu);
    let dqkv = case.backward(&cpu, &forward);
    let (width, q_width) = (case.heads.qkv_width(), case.heads.q_width());
    let mut other = Case::new([2, 1, 32], 1, 180, &[boundary]);
    other.qkv[..boundary * width].iter_mut().for_each(|v| *v = 5.0 - *v);
    let other_forward = other.forward(&cpu);
    assert_eq!(bits(&other_forward[0][boundary * q_width..]), bits(&forward[0][boundary * q_width..]));
    assert_ne!(bits(&other_forward[0][..boundary * q_width]), bits(&forward[0][..boundary * q_width]));
    let other_dqkv = other.backward(&cpu, &other_forward);
    assert_eq!(bits(&other_dqkv[boundary * width..]), bits(&dqkv[boundary * width..]));
}

#[test]
fn scores_far_apart_neither_overflow_nor_vanish() {
    let mut case = Case::new([2, 1, 16], 1, 130, &[]);
    case.qkv.iter_mut().for_each(|v| *v *= 40.0);
    let cpu = Cpu::new(1);
    let forward = case.forward(&cpu);
    let want = case.reference(&widen(&case.qkv));
    assert_close("out", &forward[0], &want[0], 1e-3);
    assert_close("lse", &forward[1], &want[1], 1e-6);
    assert!(case.backward(&cpu, &forward).iter().all(|v| v.is_finite()));
}

#[test]
fn a_query_that_is_not_a_number_stays_visible() {
    let mut case = Case::new([2, 1, 16], 1, 70, &[]);
    let width = case.heads.qkv_width();
    case.qkv[66 * width] = f32::NAN;
    let [out, _] = case.forward(&Cpu::new(1));
    let hd = 16;
    assert!(out[66 * 2 * hd..66 * 2 * hd + hd].iter().all(|v| v.is_nan()));
    assert!(out[..66 * 2 * hd].iter().all(|v| v.is_finite()));
    assert!(out[67 * 2 * hd..].iter().all(|v| v.is_finite()));
}
