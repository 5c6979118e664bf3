//! The fit: the mean over families of the absolute logarithm of predicted over measured step time, half of it after the release
//! factor, plus what pulls every constant to its neutral value and to the same constant of other GPUs and software. Iteratively
//! reweighted least squares in the logarithms of the constants.

use std::collections::BTreeMap;

use unisono_plan::validate::{Cases, Outcome, Prediction, PricePath};
use unisono_plan::{Constants, Pricer};

use crate::knobs::{Knob, knobs};

/// Below this logarithm errors count as squares.
const SMALL: f64 = 0.05;
/// Errors beyond this logarithm have another cause than constants.
const OUTLIER: f64 = 1.0;
/// What a constant pays for a distance of its spread from the neutral value, and from the mean of its like.
const PULL: [f64; 2] = [1e-4, 2e-4];
/// About so many rows of a family are enough.
const MOST_ROWS: usize = 24;
/// Step of the derivatives, in logarithms.
const STEP: f64 = 0.02;

/// Prices row `row` with `constants`.
pub fn outcome(cases: &Cases, row: usize, constants: &Constants) -> Outcome {
    priced(cases, row, constants, |path| path)
}

/// The same in closed form, thousands of times faster.
fn quick(cases: &Cases, row: usize, constants: &Constants) -> Outcome {
    priced(cases, row, constants, |_| PricePath::Closed)
}

fn priced(cases: &Cases, row: usize, constants: &Constants, path_of: fn(PricePath) -> PricePath) -> Outcome {
    cases.outcome(row, &|model, cluster, layout, training, path| {
        let calibration = constants.of(&cluster.gpu, training.software);
        Prediction::of(
            &Pricer::with_calibration(model, cluster, training, calibration),
            layout,
            path_of(path),
        )
    })
}

/// A row that is fitted to.
struct Sample {
    row: usize,
    generation: usize,
    software: usize,
    /// One over its family's rows and the number of families.
    weight: f64,
    /// Rows with the same framework, GPU and precision.
    release: usize,
}

/// Rows to fit to.
pub struct Fit<'a> {
    cases: &'a Cases,
    samples: Vec<Sample>,
    knobs: Vec<Knob>,
    releases: usize,
}

impl<'a> Fit<'a> {
    /// Fits to the timed rows of families that count.
    pub fn new(cases: &'a Cases, timed: &[Outcome], counts: &dyn Fn(&str) -> bool) -> Self {
        let rows = || timed.iter().enumerate().filter(|(_, row)| row.time.is_some() && counts(&row.family()));
        let mut families: BTreeMap<String, f64> = BTreeMap::new();
        rows().for_each(|(_, row)| *families.entry(row.family()).or_default() += 1.0);
        let mut releases: BTreeMap<[&str; 3], usize> = BTreeMap::new();
        let mut samples = Vec::new();
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        for (at, row) in rows() {
            // Odd, so that it does not beat with the grid of plans.
            let every = (families[&row.family()] as usize).div_ceil(MOST_ROWS) | 1;
            let seen = seen.entry(row.family()).or_default();
            *seen += 1;
            if !seen.is_multiple_of(every) {
                continue;
            }
            let Some((gpu, software)) = cases.runs_on(at) else { continue };
            let next = releases.len();
            let release = *releases.entry([&row.framework, &row.gpu, &row.precision]).or_insert(next);
            samples.push(Sample {
                row: at,
                generation: Constants::generation(gpu),
                software: software as usize,
                weight: every as f64 / (families[&row.family()] * families.len() as f64),
                release,
            });
        }
        let releases = releases.len();
        Self { cases, samples, knobs: knobs(), releases }
    }

    /// Logarithms of predicted over measured time of the samples that `touched` names; `None` where there is none.
    fn errors(&self, constants: &Constants, touched: &(dyn Fn(&Sample) -> bool + Sync)) -> Vec<Option<f64>> {
        let half = self.samples.len().div_ceil(2).max(1);
        let error = |sample: &Sample| {
            if !touched(sample) {
                return None;
            }
            let time = quick(self.cases, sample.row, constants).time?;
            Some((time.predicted_s / time.measured_s).ln())
        };
        std::thread::scope(|scope| {
            let parts: Vec<_> = self
                .samples
                .chunks(half)
                .map(|part| scope.spawn(move || part.iter().map(error).collect::<Vec<_>>()))
                .collect();
            parts.into_iter().flat_map(|part| part.join().expect("pricing does not panic")).collect()
        })
    }

    /// `errors`, and their differences to the middle one of their release: pairs of samples, with weights.
    fn terms(&self, errors: &[Option<f64>]) -> Vec<(usize, Option<usize>, f64, f64)> {
        let mut groups = vec![Vec::new(); self.releases];
        for (at, sample) in self.samples.iter().enumerate() {
            if let Some(error) = errors[at] {
                groups[sample.release].push((error, at));
            }
        }
        let middles: Vec<Option<usize>> = groups
            .into_iter()
            .map(|mut group| {
                group.sort_by(|a, b| a.0.total_cmp(&b.0));
                (group.len() >= 5).then(|| group[group.len() / 2].1)
            })
            .collect();
        let mut terms = Vec::new();
        for (at, sample) in self.samples.iter().enumerate() {
            let Some(error) = errors[at] else { continue };
            let middle = middles[sample.release];
            let released = middle.and_then(|middle| errors[middle]).map_or(error, |of| error - of);
            terms.push((at, None, error, 0.5 * sample.weight));
            terms.push((at, middle, released, 0.5 * sample.weight));
        }
        terms
    }

    fn pull(&self, logs: &[f64]) -> f64 {
        let (matrix, target) = self.pull_system();
        let mut sum = 0.0;
        for (row, (weight, of)) in matrix.iter().zip(&target) {
            let value: f64 = row.iter().map(|(at, factor)| factor * logs[*at]).sum();
            sum += weight * (value - of).powi(2);
        }
        sum
    }

    /// Rows `sum of factor * log = target` with a weight each.
    #[allow(clippy::type_complexity)]
    fn pull_system(&self) -> (Vec<Vec<(usize, f64)>>, Vec<(f64, f64)>) {
        let (mut rows, mut targets) = (Vec::new(), Vec::new());
        let pull = |knob: &Knob, of: f64| of / knob.spread.powi(2);
        let field = |knob: &Knob| {
            let field = knob.name.rsplit('.').next().unwrap_or_default().to_string();
            (knob.generation.is_some(), knob.software.is_some(), field)
        };
        let mut alike: BTreeMap<_, Vec<usize>> = BTreeMap::new();
        for (at, knob) in self.knobs.iter().enumerate() {
            rows.push(vec![(at, 1.0)]);
            targets.push((pull(knob, PULL[0]), knob.neutral.ln()));
            // Launches differ by design.
            if !knob.name.ends_with("launch_s") {
                alike.entry(field(knob)).or_default().push(at);
            }
        }
        for members in alike.values().filter(|members| members.len() > 1) {
            for at in members {
                let share = |other: usize| f64::from(u8::from(other == *at)) - 1.0 / members.len() as f64;
                rows.push(members.iter().map(|other| (*other, share(*other))).collect());
                targets.push((pull(&self.knobs[*at], PULL[1]), 0.0));
            }
        }
        (rows, targets)
    }

    fn loss(&self, errors: &[Option<f64>], logs: &[f64]) -> f64 {
        let of = |(_, _, error, weight): &(usize, Option<usize>, f64, f64)| {
            weight * error.clamp(-OUTLIER, OUTLIER).hypot(SMALL)
        };
        self.terms(errors).iter().map(of).sum::<f64>() + self.pull(logs)
    }

    fn constants(&self, start: &Constants, logs: &[f64]) -> Constants {
        let mut constants = start.clone();
        for (knob, log) in self.knobs.iter().zip(logs) {
            *(knob.reach)(&mut constants) = log.exp().clamp(knob.range[0], knob.range[1]);
        }
        constants
    }

    /// Fits in `rounds` steps from `start`.
    pub fn run(&self, start: &Constants, rounds: usize) -> Constants {
        let mut now = start.clone();
        let mut logs: Vec<f64> =
            self.knobs.iter().map(|k| (k.reach)(&mut now).clamp(k.range[0], k.range[1]).ln()).collect();
        let mut errors = self.errors(&now, &|_| true);
        let mut loss = self.loss(&errors, &logs);
        for round in 0..rounds {
            let step = self.step(start, &logs, &errors);
            let mut length = 1.0;
            while length > 0.02 {
                let tried: Vec<f64> = logs
                    .iter()
                    .zip(&step)
                    .zip(&self.knobs)
                    .map(|((log, step), k)| (log + length * step).clamp(k.range[0].ln(), k.range[1].ln()))
                    .collect();
                let constants = self.constants(start, &tried);
                let found = self.errors(&constants, &|_| true);
                let price = self.loss(&found, &tried);
                if price < loss {
                    (logs, errors, loss) = (tried, found, price);
                    break;
                }
                length *= 0.5;
            }
            eprintln!("round {round}: {loss:.5}, step {length}");
            if length <= 0.02 {
                break;
            }
        }
        self.constants(start, &logs)
    }

    /// The Gauss-Newton step of the reweighted squares.
    fn step(&self, start: &Constants, logs: &[f64], errors: &[Option<f64>]) -> Vec<f64> {
        let count = self.knobs.len();
        let mut slopes = vec![vec![0.0; count]; self.samples.len()];
        for (at, knob) in self.knobs.iter().enumerate() {
            let mut moved = logs.to_vec();
            // Away from the bound that holds it, if any.
            let step = if logs[at] + STEP > knob.range[1].ln() { -STEP } else { STEP };
            moved[at] += step;
            let touched = |sample: &Sample| {
                knob.generation.is_none_or(|of| of == sample.generation)
                    && knob.software.is_none_or(|of| of == sample.software)
            };
            let found = self.errors(&self.constants(start, &moved), &touched);
            for ((slopes, found), error) in slopes.iter_mut().zip(found).zip(errors) {
                if let (Some(found), Some(error)) = (found, error) {
                    slopes[at] = (found - error) / step;
                }
            }
        }
        let mut matrix = vec![vec![0.0; count]; count];
        let mut right = vec![0.0; count];
        for (at, middle, error, weight) in self.terms(errors) {
            if error.abs() > OUTLIER {
                continue;
            }
            let weight = 0.5 * weight / error.hypot(SMALL);
            let slope: Vec<(usize, f64)> = (0..count)
                .map(|k| (k, slopes[at][k] - middle.map_or(0.0, |middle| slopes[middle][k])))
                .filter(|(_, slope)| *slope != 0.0)
                .collect();
            add(&mut matrix, &mut right, &slope, weight, -error);
        }
        let (rows, targets) = self.pull_system();
        for (row, (weight, target)) in rows.iter().zip(targets) {
            let value: f64 = row.iter().map(|(at, factor)| factor * logs[*at]).sum();
            add(&mut matrix, &mut right, row, weight, target - value);
        }
        solve(matrix, right)
    }
}

/// Adds `weight * (row . x - target)^2` to the normal equations.
fn add(matrix: &mut [Vec<f64>], right: &mut [f64], row: &[(usize, f64)], weight: f64, target: f64) {
    for &(i, a) in row {
        right[i] += weight * a * target;
        for &(j, b) in row {
            matrix[i][j] += weight * a * b;
        }
    }
}

/// Solves a positive definite system.
fn solve(mut matrix: Vec<Vec<f64>>, mut right: Vec<f64>) -> Vec<f64> {
    let n = right.len();
    for pivot in 0..n {
        let (head, tail) = matrix.split_at_mut(pivot + 1);
        let row = &head[pivot];
        for (below, line) in tail.iter_mut().enumerate() {
            let factor = line[pivot] / row[pivot];
            if factor != 0.0 {
                line.iter_mut().zip(row).skip(pivot).for_each(|(a, b)| *a -= factor * b);
                right[pivot + 1 + below] -= factor * right[pivot];
            }
        }
    }
    for at in (0..n).rev() {
        let known: f64 = (at + 1..n).map(|k| matrix[at][k] * right[k]).sum();
        right[at] = (right[at] - known) / matrix[at][at];
    }
    right
}
