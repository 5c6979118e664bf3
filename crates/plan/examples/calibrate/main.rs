//! Fits the constants of `calibration.rs` to published training runs. The folder holds `end_to_end.csv` and `models.csv`.
//!
//! `calibrate FOLDER show [FAMILY]` prints the figures of every family (and the rows of one), `fit ROUNDS` fits from where the
//! constants are, `folds FOLDS ROUNDS [FAMILY]` leaves each fold of families out in turn (and prints the rows of one as they are then),
//! `parts FOLDS ROUNDS` says how far the parts of a step move with what is left out.

mod fit;
mod knobs;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use unisono_plan::validate::{Cases, MemoryKind, Outcome, Prediction, PricePath, TimeFigures, Validation};
use unisono_plan::{Breakdown, Constants, FITTED, Pricer};

use fit::Fit;
use knobs::neutral;

/// Standard normal quantile of 90%: the end of an 80% interval.
const QUANTILE_90: f64 = 1.2816;

fn run(cases: &Cases, constants: &Constants) -> Validation {
    cases.judge((0..cases.len()).map(|row| fit::outcome(cases, row, constants)).collect())
}

fn print(validation: &Validation) {
    for group in
        validation.families.iter().chain(&validation.kinds).chain(&validation.gpus).chain([&validation.all])
    {
        let text = |figures: Option<TimeFigures>| {
            figures.map_or(String::new(), |f| {
                format!(
                    "{:6.1} {:+6.1} cover {:3.0} width {:.2}",
                    100.0 * f.mape,
                    100.0 * f.bias,
                    100.0 * f.coverage,
                    f.width
                )
            })
        };
        let memory = group.memory.map_or(String::new(), |of| {
            let [error, bias, inside] = [of.mape, of.bias, of.coverage].map(|share| 100.0 * share);
            format!("memory {error:5.1} {bias:+5.1} cover {inside:3.0} width {:.2}", of.width)
        });
        let tau = group.tau.map_or(String::new(), |tau| format!("tau {tau:.2}"));
        println!(
            "{:60} {:4} | {} | {} | {memory} {tau}",
            group.name,
            group.timed,
            text(group.plain),
            text(group.released)
        );
    }
    for group in &validation.memory_kinds {
        let [error, inside] = [group.figures.mape, group.figures.coverage].map(|share| 100.0 * share);
        println!(
            "memory {}: {} rows of {} families, error {error:.1}, cover {inside:.0}",
            group.kind.name(),
            group.rows,
            group.families
        );
    }
}

/// Constants fitted from neutral ones with each fold of families left out in turn.
fn fits(cases: &Cases, all: &Validation, folds: usize, rounds: usize) -> Vec<Constants> {
    let fit = |fold: usize| {
        let fold_of = fold_of(all, folds);
        Fit::new(cases, &all.rows, &|family| fold_of.get(family) != Some(&fold)).run(&neutral(), rounds)
    };
    (0..folds).map(fit).collect()
}

fn fold_of(all: &Validation, folds: usize) -> BTreeMap<&str, usize> {
    all.families.iter().enumerate().map(|(at, group)| (group.name.as_str(), at % folds)).collect()
}

/// Leaves each fold of families out in turn, fits to the others from neutral constants, and predicts what was left out. Release
/// factors come from the rows that were left out alone.
fn cross_validate(cases: &Cases, folds: usize, rounds: usize, shown: Option<&String>) {
    let all = run(cases, &FITTED);
    let fold_of = fold_of(&all, folds);
    let mut left_out: Vec<Outcome> = Vec::new();
    let mut places: Vec<(usize, Constants)> = Vec::new();
    for (fold, constants) in fits(cases, &all, folds, rounds).into_iter().enumerate() {
        let own = |row: &usize| fold_of.get(all.rows[*row].family().as_str()) == Some(&fold);
        let own: Vec<usize> = (0..cases.len()).filter(own).collect();
        let rows = own.iter().map(|row| fit::outcome(cases, *row, &constants)).collect();
        places.extend(own.into_iter().map(|row| (row, constants.clone())));
        left_out.extend(cases.judge(rows).rows);
    }
    let validation = cases.judge_with_factors(left_out);
    print(&validation);
    for (row, (at, constants)) in validation.rows.iter().zip(&places) {
        if shown.is_some_and(|part| row.family().contains(part)) {
            show_row(cases, *at, row, constants);
        }
    }
    for (name, sparse) in [("dense", false), ("MoE", true)] {
        for (what, released) in [("without", false), ("with", true)] {
            let spread = covering(&validation.rows, sparse, released);
            println!("{name} {what} release factor: a spread of {spread:.3} covers 80%");
        }
    }
    let of = |which: &dyn Fn(&Outcome) -> bool| memory_band(validation.rows.iter().filter(|row| which(row)));
    println!("memory: a band of {:.3} covers 80%", of(&|_| true));
    println!(
        "memory of tests: a band of {:.3} covers 80%, of runs {:.3}",
        of(&|row| row.golden),
        of(&|row| !row.golden)
    );
    let [allocated, reserved] = [false, true].map(|reserved| {
        of(&|row| row.memory.is_some_and(|of| (of.kind == MemoryKind::ReservedFullest) == reserved))
    });
    println!("memory allocated: a band of {allocated:.3} covers 80%, reserved {reserved:.3}");
}

/// The standard deviation of logarithms whose 80% interval holds that share of rows, every family weighing the same.
fn covering(rows: &[Outcome], sparse: bool, released: bool) -> f64 {
    let rows = rows.iter().filter(|row| row.sparse == sparse);
    band(rows.filter_map(|row| {
        let time = row.time?;
        let factor = if released { row.factor.unwrap_or(1.0) } else { 1.0 };
        Some((row.family(), factor * time.predicted_s / time.measured_s))
    })) / QUANTILE_90
}

/// The logarithm within which four of five measured peaks lie.
fn memory_band<'a>(rows: impl Iterator<Item = &'a Outcome>) -> f64 {
    band(rows.filter_map(|row| Some((row.family(), row.memory?.predicted_gib / row.memory?.measured_gib))))
}

/// The absolute logarithm that holds 80% of ratios, every family weighing the same, rounded up to three digits.
fn band(ratios: impl Iterator<Item = (String, f64)>) -> f64 {
    let mut families: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    ratios.for_each(|(family, ratio)| families.entry(family).or_default().push(ratio.ln().abs()));
    let mut errors: Vec<(f64, f64)> = Vec::new();
    for family in families.values() {
        errors.extend(family.iter().map(|error| (*error, 1.0 / (family.len() * families.len()) as f64)));
    }
    errors.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut below = 0.0;
    for (error, weight) in errors {
        below += weight;
        if below >= 0.8 {
            return (1e3 * error).ceil() / 1e3;
        }
    }
    f64::NAN
}

fn show(cases: &Cases, constants: &Constants, family: Option<&String>) {
    let validation = run(cases, constants);
    print(&validation);
    let Some(part) = family else { return };
    for (at, row) in validation.rows.iter().enumerate().filter(|(_, row)| row.family().contains(part)) {
        show_row(cases, at, row, constants);
    }
}

/// A row, what its step is spent on and what its first and last pipeline rank hold.
fn show_row(cases: &Cases, at: usize, row: &Outcome, constants: &Constants) {
    let time = row.time.map(|t| {
        format!(
            "{:.3} s, {:.3} predicted, ratio {:.3}",
            t.measured_s,
            t.predicted_s,
            t.predicted_s / t.measured_s
        )
    });
    let memory = row.memory.map(|m| format!("{:.2} GiB, {:.2} predicted", m.measured_gib, m.predicted_gib));
    let said = [time, memory, row.skipped.clone()].into_iter().flatten().collect::<Vec<_>>().join("; ");
    println!("{} {} {} {} | {} | {said}", row.id, row.framework, row.model, row.gpu, row.plan);
    if let Some(time) = row.time {
        println!("    {}", parts(cases, at, constants, time.predicted_s));
    }
    if row.memory.is_some() {
        println!("    {}", held(cases, at, constants));
    }
}

/// Standard deviations of the logarithm of every part of a step because other runs might have been fitted to: the grouped jackknife
/// over folds of families (Efron, 1982), sqrt((n - 1) / n x sum of squares around the mean) of n fits. The root mean square over rows in
/// which the part takes a hundredth of the step, every family weighing the same.
fn parts_that_move(cases: &Cases, folds: usize, rounds: usize) {
    let all = run(cases, &FITTED);
    let fits = fits(cases, &all, folds, rounds);
    let names = Breakdown::default().parts().map(|(name, _)| name);
    let mut found: Vec<BTreeMap<String, Vec<f64>>> = vec![BTreeMap::new(); names.len()];
    for (at, row) in all.rows.iter().enumerate().filter(|(_, row)| row.time.is_some()) {
        let steps: Vec<Breakdown> = fits.iter().filter_map(|fit| breakdown(cases, at, fit)).collect();
        let step_s = steps.iter().map(Breakdown::total_s).sum::<f64>() / steps.len() as f64;
        for (part, of) in found.iter_mut().enumerate() {
            let seconds: Vec<f64> = steps.iter().map(|step| step.parts()[part].1).collect();
            if seconds.len() == folds && seconds.iter().all(|seconds| *seconds > 0.01 * step_s) {
                of.entry(row.family()).or_default().push(jackknife(&seconds).powi(2));
            }
        }
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    for (name, families) in names.iter().zip(&found) {
        let squares: Vec<f64> = families.values().map(|family| mean(family)).collect();
        println!("{name}: {:.3} over {} families", mean(&squares).sqrt(), squares.len());
    }
}

/// Standard deviation of the logarithm of what is fitted, from fits that each leave a part of the data out.
fn jackknife(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().map(|value| value.ln()).sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value.ln() - mean).powi(2)).sum();
    ((n - 1.0) / n * squares).sqrt()
}

/// What the step of row `row` is spent on.
fn breakdown(cases: &Cases, row: usize, constants: &Constants) -> Option<Breakdown> {
    let found = RefCell::new(None);
    cases.outcome(row, &|model, cluster, layout, training, path| {
        let calibration = constants.of(&cluster.gpu, training.software);
        let pricer = Pricer::with_calibration(model, cluster, training, calibration);
        if path == PricePath::Simulated {
            *found.borrow_mut() = Some(pricer.price_simulated(layout)?.breakdown);
        }
        Prediction::of(&pricer, layout, path)
    });
    found.into_inner()
}

/// What the step of `predicted_s` of row `row` is spent on, in percent.
fn parts(cases: &Cases, row: usize, constants: &Constants, predicted_s: f64) -> String {
    let Some(breakdown) = breakdown(cases, row, constants) else { return String::new() };
    let percent = |(name, seconds): (&str, f64)| format!("{name} {:.0}", 100.0 * seconds / predicted_s);
    let shown = breakdown.parts().into_iter().filter(|(_, seconds)| *seconds > 0.005 * predicted_s);
    shown.map(percent).collect::<Vec<_>>().join(", ")
}

/// What the first and the last pipeline rank of row `row` hold, in GiB.
fn held(cases: &Cases, row: usize, constants: &Constants) -> String {
    let said = RefCell::new(String::new());
    cases.outcome(row, &|model, cluster, layout, training, path| {
        let calibration = constants.of(&cluster.gpu, training.software);
        let pricer = Pricer::with_calibration(model, cluster, training, calibration);
        let of = |rank: usize| {
            let memory = pricer.rank_memory(layout, rank);
            let gib = |bytes: f64| bytes / (1u64 << 30) as f64;
            let parts = memory.parts().map(|(name, bytes)| format!("{name} {:.3}", gib(bytes)));
            format!("rank {rank} {:.2} GiB: {}", gib(memory.allocated()), parts.join(", "))
        };
        if path == PricePath::Simulated {
            *said.borrow_mut() = [0, layout.pipeline - 1].map(of).join("\n    ");
        }
        Prediction::of(&pricer, layout, path)
    });
    said.into_inner()
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let usage = "usage: calibrate FOLDER [show FAMILY | fit ROUNDS | folds FOLDS ROUNDS [FAMILY] | parts FOLDS ROUNDS]";
    let folder = Path::new(arguments.first().ok_or(usage)?);
    let cases = std::fs::read_to_string(folder.join("end_to_end.csv"))?;
    let models = std::fs::read_to_string(folder.join("models.csv"))?;
    let cases = Cases::read(&cases, Some(&models));
    let number =
        |at: usize| -> Result<usize, Box<dyn Error>> { Ok(arguments.get(at).ok_or(usage)?.parse()?) };
    match arguments.get(1).map(String::as_str) {
        None | Some("show") => show(&cases, &FITTED, arguments.get(2)),
        Some("fit") => {
            let timed = run(&cases, &FITTED).rows;
            let constants = Fit::new(&cases, &timed, &|_| true).run(&neutral(), number(2)?);
            println!("{constants:#?}");
            show(&cases, &constants, None);
        }
        Some("folds") => cross_validate(&cases, number(2)?, number(3)?, arguments.get(4)),
        Some("parts") => parts_that_move(&cases, number(2)?, number(3)?),
        Some(_) => return Err(usage.into()),
    }
    Ok(())
}
