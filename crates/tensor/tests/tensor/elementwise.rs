use unisono_tensor::{AdamW, Backend, Cpu, NORM_CHUNK};

use crate::support::*;

#[test]
fn fill_copy_and_add_touch_every_element() {
    for len in [0, 1, 7, 1000, 70_001] {
        let mut rng = Rng::new(len as u64);
        let (a, b) = (rng.values(len), rng.values(len));
        let (filled, copied, added) = on_any_threads(|cpu| {
            let (mut filled, mut copied, mut added) = (vec![9.0; len], vec![9.0; len], a.clone());
            cpu.fill(&mut filled, 0.5);
            cpu.copy(&a, &mut copied);
            cpu.add(&mut added, &b);
            (filled, copied, added)
        });
        assert!(filled.iter().all(|&v| v == 0.5));
        assert_eq!(copied, a);
        let want: Vec<f32> = a.iter().zip(&b).map(|(x, y)| x + y).collect();
        assert_eq!(added, want);
    }
}

#[test]
fn a_part_of_a_buffer_is_added_to_another_of_its_parts() {
    let before = Rng::new(2).values(50);
    for (into, from, len) in [(0, 20, 15), (30, 3, 20), (10, 20, 10), (5, 5, 0)] {
        let mut buffer = before.clone();
        Cpu::new(2).add_within(&mut buffer, into, from, len);
        let mut want = before.clone();
        (0..len).for_each(|i| want[into + i] += before[from + i]);
        assert_eq!(buffer, want, "{into} {from} {len}");
    }
}

#[test]
fn chunk_squares_join_eight_lanes_in_order() {
    for len in [0, 1, NORM_CHUNK - 1, NORM_CHUNK, 5 * NORM_CHUNK + 13] {
        let x = Rng::new(len as u64).values(len);
        let got = on_any_threads(|cpu| {
            let mut out = vec![7.0];
            cpu.chunk_squares(&x, &mut out);
            out
        });
        let mut want = vec![7.0];
        for chunk in x.chunks(NORM_CHUNK) {
            let mut lanes = [0f64; 8];
            for (i, &v) in chunk.iter().enumerate() {
                lanes[i % 8] += f64::from(v) * f64::from(v);
            }
            want.push(lanes.iter().skip(1).fold(lanes[0], |a, b| a + b));
        }
        assert_eq!(got, want);
    }
}

const STEP: AdamW = AdamW {
    learning_rate: 0.01,
    beta1: 0.9,
    beta2: 0.99,
    epsilon: 1e-8,
    weight_decay: 0.1,
    correction1: 3.7,
    correction2: 33.0,
    gradient_scale: 0.5,
};

/// One element, in f32, in the order of the kernel's doc.
fn element(step: AdamW, decay: bool, g: f32, p: f32, m: f32, v: f32) -> [f32; 3] {
    let g = g * step.gradient_scale;
    let m = step.beta1 * m + (1.0 - step.beta1) * g;
    let v = step.beta2 * v + (1.0 - step.beta2) * g * g;
    let p = if decay { p - step.learning_rate * step.weight_decay * p } else { p };
    let p = p - step.learning_rate * (m * step.correction1) / ((v * step.correction2).sqrt() + step.epsilon);
    [p, m, v]
}

#[test]
fn adamw_updates_its_runs_and_nothing_else() {
    let len = 50_000;
    let mut rng = Rng::new(8);
    let (gradient, parameter, first) = (rng.values(len), rng.values(len), rng.values(len));
    let second: Vec<f32> = rng.values(len).iter().map(|v| v.abs()).collect();
    let runs = [
        (3..4, true),
        (4..40_007, true),
        (40_007..40_020, false),
        (41_000..41_000, false),
        (42_000..len, true),
    ];
    let got = on_any_threads(|cpu| {
        let mut state = [parameter.clone(), first.clone(), second.clone()];
        let [p, m, v] = &mut state;
        cpu.adamw(STEP, &runs, &gradient, p, m, v);
        state
    });
    for i in 0..len {
        let run = runs.iter().find(|(range, _)| range.contains(&i));
        let want = match run {
            Some((_, decay)) => element(STEP, *decay, gradient[i], parameter[i], first[i], second[i]),
            None => [parameter[i], first[i], second[i]],
        };
        let got = [got[0][i], got[1][i], got[2][i]];
        assert_eq!(got.map(f32::to_bits), want.map(f32::to_bits), "element {i}");
    }
}

#[test]
fn adamw_minimises_a_parabola() {
    let cpu = Cpu::new(2);
    let (mut p, mut m, mut v) = (vec![3.0f32, -2.0], vec![0.0; 2], vec![0.0; 2]);
    for t in 1..=400 {
        let gradient: Vec<f32> = p.iter().map(|x| 2.0 * (x - 1.0)).collect();
        let correction = |beta: f64| (1.0 / (1.0 - beta.powi(t))) as f32;
        let step = AdamW {
            learning_rate: 0.05,
            weight_decay: 0.0,
            gradient_scale: 1.0,
            correction1: correction(0.9),
            correction2: correction(0.99),
            ..STEP
        };
        cpu.adamw(step, &[(0..2, true)], &gradient, &mut p, &mut m, &mut v);
    }
    assert!(p.iter().all(|x| (x - 1.0).abs() < 1e-2), "{p:?}");
}

#[test]
#[should_panic(expected = "runs must ascend")]
fn overlapping_runs_are_refused() {
    let (mut p, mut m, mut v) = (vec![0.0; 8], vec![0.0; 8], vec![0.0; 8]);
    Cpu::new(1).adamw(STEP, &[(0..5, true), (4..8, false)], &[0.0; 8], &mut p, &mut m, &mut v);
}
