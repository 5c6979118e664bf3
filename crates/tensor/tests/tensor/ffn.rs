//! Feed-forward networks over runs of rows.

use std::ops::Range;

use super::formulas::{product, silu_product};
use super::support::*;
use unisono_tensor::{Backend, Cpu, Dims, FfnRun, FfnShape, Product};

const SHAPE: FfnShape = FfnShape { d_model: 24, ffn: 20, row_block: 64 };
const WEIGHTS: usize = SHAPE.d_model * SHAPE.ffn;
const RUNS: usize = 4;

/// Inputs of all kernels of one network.
struct Case {
    runs: Vec<FfnRun>,
    rows: usize,
    x: Vec<f32>,
    dy: Vec<f32>,
    weights: Vec<f32>,
    row_weight: Vec<f32>,
}

/// What the kernels computed.
#[derive(Debug, PartialEq)]
struct Results {
    gu: Vec<u32>,
    y: Vec<f32>,
    dgu: Vec<f32>,
    h: Vec<f32>,
    dx: Vec<f32>,
    drow_weight: Vec<f32>,
    dweights: Vec<f32>,
}

impl Case {
    fn new(rows: [Range<usize>; RUNS]) -> Self {
        let mut rng = Rng::new(7);
        let count = rows[RUNS - 1].end;
        // Gradients in another order than weights, with gaps: offsets must be taken from the run.
        let run = |(i, rows): (usize, Range<usize>)| FfnRun {
            out: rows.start,
            rows,
            w13: i * 3 * WEIGHTS + 5,
            w2: i * 3 * WEIGHTS + 5 + 2 * WEIGHTS,
            dw13: (RUNS - 1 - i) * (3 * WEIGHTS + 3) + WEIGHTS,
            dw2: (RUNS - 1 - i) * (3 * WEIGHTS + 3),
        };
        Self {
            runs: rows.into_iter().enumerate().map(run).collect(),
            rows: count,
            x: rng.values(count * SHAPE.d_model),
            dy: rng.values(count * SHAPE.d_model),
            weights: rng.values(RUNS * 3 * WEIGHTS + 5).iter().map(|w| 0.5 * w).collect(),
            row_weight: rng.values(count),
        }
    }

    fn run(&self, cpu: &Cpu, weighted: bool) -> Results {
        let row_weight = weighted.then_some(&self.row_weight[..]);
        let (mut gu, mut y) = (poison(self.rows * 2 * SHAPE.ffn), poison(self.rows * SHAPE.d_model));
        cpu.ffn(SHAPE, &self.runs, &self.x, &self.weights, row_weight, &mut gu, &mut y);
        let (mut dgu, mut h, mut dx) =
            (gu.clone(), poison(self.rows * SHAPE.ffn), poison(self.rows * SHAPE.d_model));
        let mut drow_weight = poison(self.rows);
        cpu.ffn_backward(
            SHAPE,
            &self.runs,
            &self.dy,
            &self.weights,
            row_weight,
            &mut dgu,
            &mut h,
            &mut dx,
            Some(&mut drow_weight),
        );
        let mut dweights = initial_gradient();
        cpu.ffn_weight_grad(SHAPE, &self.runs, &self.x, &dgu, &h, &self.dy, &mut dweights);
        // Rows outside all runs are not written: they would not compare as NaN.
        [&mut y, &mut dgu, &mut h, &mut dx, &mut drow_weight].into_iter().for_each(|x| forget_nan(x));
        Results { gu: bits(&gu), y, dgu, h, dx, drow_weight, dweights }
    }

    /// `sum over rows of dy . y` in f64, by the formulas.
    fn objective(&self, x: &[f64], weights: &[f64], row_weight: &[f64]) -> f64 {
        let (d, f) = (SHAPE.d_model, SHAPE.ffn);
        let mut total = 0.0;
        for run in &self.runs {
            for row in run.rows.clone() {
                let (x, dy) = (&x[row * d..(row + 1) * d], widen(&self.dy[row * d..(row + 1) * d]));
                let gate_up = product(x, &weights[run.w13..run.w13 + 2 * WEIGHTS], d);
                let y = product(&silu_product(&gate_up, f), &weights[run.w2..run.w2 + WEIGHTS], f);
                total += row_weight[row] * dot(&y, &dy);
            }
        }
        total
    }
}

fn initial_gradient() -> Vec<f32> {
    Rng::new(3).values(RUNS * (3 * WEIGHTS + 3))
}

fn forget_nan(x: &mut [f32]) {
    x.iter_mut().filter(|v| v.is_nan()).for_each(|v| *v = -77.0);
}

/// Long and short runs, an empty one, rows between runs that belong to none.
fn uneven() -> Case {
    Case::new([0..7, 9..150, 150..150, 151..300])
}

#[test]
fn forward_and_backward_follow_the_formulas() {
    let case = Case::new([0..3, 4..9, 9..9, 9..12]);
    let (x, weights) = (widen(&case.x), widen(&case.weights));
    for weighted in [true, false] {
        let results = case.run(&Cpu::new(2), weighted);
        let row_weight = if weighted { widen(&case.row_weight) } else { vec![1.0; case.rows] };
        let d = SHAPE.d_model;
        let total: f64 = case
            .runs
            .iter()
            .flat_map(|run| run.rows.start * d..run.rows.end * d)
            .map(|at| f64::from(results.y[at]) * f64::from(case.dy[at]))
            .sum();
        assert!((total - case.objective(&x, &weights, &row_weight)).abs() < 1e-4);

        let inside: Vec<usize> = case.runs.iter().flat_map(|run| run.rows.clone()).collect();
        let which: Vec<usize> = inside.iter().flat_map(|row| row * d..(row + 1) * d).collect();
        let dx = differences(&x, &which, |x| case.objective(x, &weights, &row_weight));
        assert_close("dx", &which.iter().map(|&at| results.dx[at]).collect::<Vec<_>>(), &dx, 1e-5);
        let drow = differences(&row_weight, &inside, |w| case.objective(&x, &weights, w));
        let got: Vec<f32> = inside.iter().map(|&row| results.drow_weight[row]).collect();
        assert_close("drow_weight", &got, &drow, 1e-5);
        assert_weight_gradients(&case, &results, &x, &weights, &row_weight);
    }
}

fn assert_weight_gradients(case: &Case, results: &Results, x: &[f64], weights: &[f64], row_weight: &[f64]) {
    let initial = initial_gradient();
    for (index, run) in case.runs.iter().enumerate() {
        let parts = [(run.w13, run.dw13, 2 * WEIGHTS, "dw13"), (run.w2, run.dw2, WEIGHTS, "dw2")];
        for (weight, gradient, len, name) in parts {
            let which: Vec<usize> = (0..len).step_by(11).collect();
            let at: Vec<usize> = which.iter().map(|i| weight + i).collect();
            let slopes = differences(weights, &at, |w| case.objective(x, w, row_weight));
            let got: Vec<f32> =
                which.iter().map(|i| results.dweights[gradient + i] - initial[gradient + i]).collect();
            assert_close(&format!("{name} of run {index}"), &got, &slopes, 1e-4);
            if run.rows.is_empty() {
                assert_eq!(results.dweights[gradient..gradient + len], initial[gradient..gradient + len]);
            }
        }
    }
}

#[test]
fn threads_change_no_bit() {
    on_any_threads(|cpu| uneven().run(cpu, true));
    on_any_threads(|cpu| uneven().run(cpu, false));
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    let whole = uneven();
    let cpu = Cpu::new(2);
    let all = whole.run(&cpu, true);
    // The same rows and weights, fewer rows at a time.
    for cut in [1, 2, 50, 133] {
        let mut part = uneven();
        for run in &mut part.runs {
            run.rows.end = run.rows.end.min(run.rows.start + cut);
        }
        let some = part.run(&cpu, true);
        for row in part.runs.iter().flat_map(|run| run.rows.clone()) {
            let same = |a: &[f32], b: &[f32]| {
                let width = a.len() / part.rows;
                let row = row * width..(row + 1) * width;
                bits(&a[row.clone()]) == bits(&b[row])
            };
            let (f, d) = (2 * SHAPE.ffn, SHAPE.d_model);
            assert_eq!(some.gu[row * f..(row + 1) * f], all.gu[row * f..(row + 1) * f]);
            assert!(same(&some.y, &all.y) && same(&some.dx, &all.dx), "row {row} of {cut}, width {d}");
            assert!(same(&some.dgu, &all.dgu) && same(&some.h, &all.h));
            assert!(same(&some.drow_weight, &all.drow_weight));
        }
    }
}

#[test]
fn weight_gradients_are_one_product_a_block_of_rows() {
    let (d, f) = (SHAPE.d_model, SHAPE.ffn);
    let cpu = Cpu::new(3);
    let mut rng = Rng::new(11);
    let runs = uneven().runs;
    let (x, dgu) = (rng.values(300 * d), rng.values(300 * 2 * f));
    let (h, dy) = (rng.values(300 * f), rng.values(300 * d));
    for row_block in [1, 64, 100, 512] {
        let shape = FfnShape { row_block, ..SHAPE };
        let mut dweights = initial_gradient();
        cpu.ffn_weight_grad(shape, &runs, &x, &dgu, &h, &dy, &mut dweights);
        let mut expected = initial_gradient();
        for run in &runs {
            for start in run.rows.clone().step_by(row_block) {
                let rows = start..run.rows.end.min(start + row_block);
                let part = |all: &'static str, width: usize| {
                    let from = match all {
                        "x" => &x,
                        "dgu" => &dgu,
                        "h" => &h,
                        _ => &dy,
                    };
                    from[rows.start * width..rows.end * width].to_vec()
                };
                let mut add = |m: usize, n: usize, at: usize, left: Vec<f32>, right: Vec<f32>| {
                    let dims = Dims { m, n, k: rows.len() };
                    let c = &mut expected[at..at + m * n];
                    cpu.matmul(Product::TransposedLeft, dims, &left, &right, c, true);
                };
                add(d, 2 * f, run.dw13, part("x", d), part("dgu", 2 * f));
                add(f, d, run.dw2, part("h", f), part("dy", d));
            }
        }
        assert_eq!(bits(&dweights), bits(&expected), "blocks of {row_block} rows");
    }
}

#[test]
#[should_panic(expected = "must ascend and not overlap")]
fn runs_that_share_rows_are_refused() {
    Case::new([0..7, 6..9, 9..9, 9..12]).run(&Cpu::new(1), true);
}

#[test]
#[should_panic(expected = "overlap others")]
fn runs_that_share_gradients_are_refused() {
    let mut case = uneven();
    case.runs[3].dw2 = case.runs[0].dw13 + 1;
    case.run(&Cpu::new(1), true);
}
