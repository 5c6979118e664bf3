//! The output head with its loss.

use super::formulas::log_sum_exp;
use super::support::*;
use unisono_tensor::{Backend, Cpu, HeadGradients, IGNORE};

const D: usize = 24;
const VOCAB: usize = 70;
const SCALE: f32 = 0.01;

struct Case {
    x: Vec<f32>,
    table: Vec<f32>,
    targets: Vec<u32>,
}

impl Case {
    fn new(rows: usize) -> Self {
        let mut rng = Rng::new(rows as u64);
        let mut target = |row: usize| if row % 7 == 3 { IGNORE } else { rng.below(VOCAB) as u32 };
        let targets = (0..rows).map(&mut target).collect();
        Self { x: rng.values(rows * D), table: rng.values(VOCAB * D), targets }
    }

    fn rows(&self, rows: std::ops::Range<usize>) -> Self {
        Self {
            x: self.x[rows.start * D..rows.end * D].to_vec(),
            table: self.table.clone(),
            targets: self.targets[rows].to_vec(),
        }
    }

    /// Loss and gradients; the table's gradient is added to `dtable`.
    fn run(&self, cpu: &Cpu, dtable: &mut [f32]) -> (f64, Vec<f32>) {
        let mut dx = poison(self.x.len());
        let gradients = HeadGradients { scale: SCALE, dx: Some(&mut dx[..]), dtable: Some(dtable) };
        let loss = cpu.head_loss(&self.x, &self.table, D, &self.targets, Some(gradients));
        assert_eq!(
            loss.to_bits(),
            cpu.head_loss(&self.x, &self.table, D, &self.targets, None).to_bits(),
            "gradients must not change the loss"
        );
        (loss, dx)
    }

    fn loss(&self, x: &[f64], table: &[f64]) -> f64 {
        let row = |(row, target): (usize, &u32)| {
            if *target == IGNORE {
                return 0.0;
            }
            let x = &x[row * D..(row + 1) * D];
            let logits: Vec<f64> = table.chunks(D).map(|entry| dot(x, entry)).collect();
            log_sum_exp(&logits) - logits[*target as usize]
        };
        self.targets.iter().enumerate().map(row).sum()
    }
}

#[test]
fn loss_and_gradients_follow_the_formulas() {
    let case = Case::new(40);
    let (x, table) = (widen(&case.x), widen(&case.table));
    let initial = Rng::new(5).values(VOCAB * D);
    let mut dtable = initial.clone();
    let (loss, dx) = case.run(&Cpu::new(2), &mut dtable);
    let exact = case.loss(&x, &table);
    assert!((loss - exact).abs() < 1e-5 * exact, "{loss} and {exact}");
    let scale = f64::from(SCALE);
    let slopes = gradient(&x, |x| scale * case.loss(x, &table));
    assert_close("dx", &dx, &slopes, 1e-5);
    let added: Vec<f32> = dtable.iter().zip(&initial).map(|(a, b)| a - b).collect();
    assert_close("dtable", &added, &gradient(&table, |table| scale * case.loss(&x, table)), 1e-5);
}

#[test]
fn each_gradient_alone_has_the_bits_of_both_together() {
    let (case, cpu) = (Case::new(600), Cpu::new(2));
    let mut together = vec![0.0; VOCAB * D];
    let (_, dx) = case.run(&cpu, &mut together);
    let (mut alone, mut dtable) = (poison(case.x.len()), vec![0.0; VOCAB * D]);
    for gradients in [
        HeadGradients { scale: SCALE, dx: Some(&mut alone[..]), dtable: None },
        HeadGradients { scale: SCALE, dx: None, dtable: Some(&mut dtable[..]) },
    ] {
        cpu.head_loss(&case.x, &case.table, D, &case.targets, Some(gradients));
    }
    assert_eq!((bits(&alone), bits(&dtable)), (bits(&dx), bits(&together)));
}

#[test]
fn threads_change_no_bit() {
    for rows in [1, 63, 600] {
        let case = Case::new(rows);
        on_any_threads(|cpu| {
            let mut dtable = vec![0.0; VOCAB * D];
            let (loss, dx) = case.run(cpu, &mut dtable);
            (loss.to_bits(), bits(&dx), bits(&dtable))
        });
    }
}

#[test]
fn sums_over_rows_go_by_tiles_and_blocks() {
    let (case, cpu) = (Case::new(600), Cpu::new(2));
    let mut dtable = vec![0.0; VOCAB * D];
    let (loss, dx) = case.run(&cpu, &mut dtable);
    let mut tiles = vec![0.0; VOCAB * D];
    let parts = [0..256, 256..512, 512..600].map(|rows| case.rows(rows).run(&cpu, &mut tiles).1);
    assert_eq!(bits(&dtable), bits(&tiles), "dtable is one product for each 256 rows");
    assert_eq!(bits(&dx), bits(&parts.concat()));
    let block = |start: usize| case.rows(start..600.min(start + 64)).run(&cpu, &mut vec![0.0; VOCAB * D]).0;
    let blocks: f64 = (0..600).step_by(64).map(block).fold(0.0, |sum, block| sum + block);
    assert_eq!(loss.to_bits(), blocks.to_bits(), "losses are summed in blocks of 64 rows");
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    let (case, cpu) = (Case::new(300), Cpu::new(2));
    let (_, dx) = case.run(&cpu, &mut vec![0.0; VOCAB * D]);
    for rows in [0..1, 5..7, 100..300, 299..300, 250..260] {
        let (_, some) = case.rows(rows.clone()).run(&cpu, &mut vec![0.0; VOCAB * D]);
        assert_eq!(bits(&some), bits(&dx[rows.start * D..rows.end * D]), "rows {rows:?}");
    }
}

#[test]
fn rows_without_a_target_have_no_loss_and_no_gradient() {
    let mut case = Case::new(30);
    case.targets.fill(IGNORE);
    let mut dtable = vec![0.0; VOCAB * D];
    let (loss, dx) = case.run(&Cpu::new(1), &mut dtable);
    assert_eq!(loss, 0.0);
    assert!(dx.iter().chain(&dtable).all(|value| *value == 0.0));
}

#[test]
fn large_logits_overflow_nothing_and_nan_is_not_hidden() {
    let mut case = Case::new(20);
    case.x.iter_mut().for_each(|x| *x *= 1000.0);
    let (loss, dx) = case.run(&Cpu::new(1), &mut vec![0.0; VOCAB * D]);
    let exact = case.loss(&widen(&case.x).iter().map(|x| x * 1e-3).collect::<Vec<_>>(), &widen(&case.table));
    assert!(loss.is_finite() && loss > exact && dx.iter().all(|x| x.is_finite()));
    case.x[D] = f32::NAN;
    let (loss, _) = case.run(&Cpu::new(1), &mut vec![0.0; VOCAB * D]);
    assert!(loss.is_nan());
}
