//! Fits the constants of `calibration.rs` to published training runs by coordinate descent on the mean over families of the mean
//! absolute logarithm of predicted over measured step time. `calibrate FOLDER [ROUNDS] [FOLDS]`: the folder holds `end_to_end.csv` and
//! `models.csv`; with folds, each fold of families is left out in turn and predicted with constants fitted to the others.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use unisono_plan::validate::{Outcome, Prediction, Validation, validate};
use unisono_plan::{Constants, FITTED, Pricer};

/// A constant by name, how to reach it, and the range that still makes sense.
type Knob = (String, Box<dyn Fn(&mut Constants) -> &mut f64>, [f64; 2]);

const GENERATIONS: [&str; 4] = ["A100", "Hopper", "Blackwell", "MI300"];
const SOFTWARE: [&str; 7] = [
    "MegatronCore",
    "MegatronCoreGraphs",
    "Megatron2021",
    "DeepSpeed2021",
    "TorchEager",
    "TorchCompiled",
    "Xla",
];

macro_rules! knobs {
    ($found:ident, $names:ident, $group:ident, $($field:ident $range:expr),*) => {
        for (at, name) in $names.iter().enumerate() {
            $($found.push((
                format!("{name}.{}", stringify!($field)),
                Box::new(move |c: &mut Constants| &mut c.$group[at].$field),
                $range,
            ));)*
        }
    };
}

fn knobs() -> Vec<Knob> {
    let mut found: Vec<Knob> = Vec::new();
    knobs!(found, GENERATIONS, gpus, gemm [0.8, 2.0], gemm_fp8 [0.8, 2.5], gemm_fp4 [0.8, 3.0], grouped [0.7, 3.0],
        attention [0.6, 3.0], memory [0.4, 4.0], host [0.3, 2.0]);
    knobs!(found, SOFTWARE, software, memory [0.3, 5.0], attention [0.5, 4.0], launch_s [5e-7, 6e-5], moe_launch [0.3, 10.0],
        tensor_exposed [0.05, 1.2], data_exposed [0.0, 1.0]);
    macro_rules! common {
        ($($field:ident $range:expr),*) => {
            $(found.push((stringify!($field).to_string(), Box::new(|c: &mut Constants| &mut c.common.$field), $range));)*
        };
    }
    common!(dispatch [0.5, 4.0], network [0.8, 3.0], expert_exposed [0.0, 1.0], context_exposed [0.0, 1.0],
        message_exposed [0.0, 1.0], straggler [0.001, 0.05], step_s [0.001, 0.2]);
    found
}

fn run(cases: &str, models: &str, constants: &Constants) -> Validation {
    validate(cases, Some(models), &|model, cluster, layout, training| {
        let calibration = constants.of(&cluster.gpu, training.software);
        let priced = Pricer::with_calibration(model, cluster, training, calibration).price(layout).ok()?;
        Some(Prediction {
            step_s: priced.step_s,
            interval_s: priced.interval_s,
            memory_bytes: priced.memory.total(),
        })
    })
}

/// Mean over families of the mean absolute logarithm; `counts` says which families.
fn loss(rows: &[Outcome], counts: &dyn Fn(&str) -> bool) -> f64 {
    let mut families: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for row in rows {
        let family = row.family();
        if let (Some(time), true) = (row.time, counts(&family)) {
            families
                .entry(family)
                .or_default()
                .push((time.predicted_s / time.measured_s).ln().abs().min(1.0));
        }
    }
    families.values().map(|errors| errors.iter().sum::<f64>() / errors.len() as f64).sum::<f64>()
        / families.len() as f64
}

fn fit(
    cases: &str,
    models: &str,
    start: &Constants,
    rounds: usize,
    counts: &dyn Fn(&str) -> bool,
) -> Constants {
    let mut best = start.clone();
    let price_of = |constants: &Constants| {
        let mut moved = 0.0;
        let (mut a, mut b) = (constants.clone(), FITTED.clone());
        for (_, reach, _) in knobs() {
            moved += ((*reach(&mut a) + 1e-9) / (*reach(&mut b) + 1e-9)).ln().abs();
        }
        loss(&run(cases, models, constants).rows, counts) + 2e-4 * moved
    };
    let mut least = price_of(&best);
    let mut factor = 1.3f64;
    for round in 0..rounds {
        for (name, reach, range) in knobs() {
            for step in [factor, 1.0 / factor] {
                loop {
                    let mut tried = best.clone();
                    let value = reach(&mut tried);
                    *value = (value.max(1e-3 * range[1]) * step).clamp(range[0], range[1]);
                    let found = price_of(&tried);
                    if found + 1e-6 >= least {
                        break;
                    }
                    (best, least) = (tried, found);
                    eprintln!("round {round} {name} {least:.5}");
                }
            }
        }
        factor = 1.0 + 0.6 * (factor - 1.0);
    }
    best
}

/// Leaves out all test values (they count for memory only) and most of the 1,260 rows of one source.
fn thinned(cases: &str) -> String {
    let mut seen = 0;
    let keep = |line: &&str| {
        seen += usize::from(line.contains(",vtrain_single_node,"));
        !line.contains(",ci_golden,") && (!line.contains(",vtrain_single_node,") || seen % 16 == 0)
    };
    cases.lines().filter(keep).map(|line| format!("{line}\n")).collect()
}

fn print(validation: &Validation) {
    for group in
        validation.families.iter().chain(&validation.kinds).chain(&validation.gpus).chain([&validation.all])
    {
        let text = |figures: Option<unisono_plan::validate::TimeFigures>| {
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
        let memory = group.memory_mape.map_or(String::new(), |error| {
            format!("memory {:5.1} {:+5.1}", 100.0 * error, 100.0 * group.memory_bias.unwrap_or(0.0))
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
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let folder = Path::new(arguments.first().ok_or("usage: calibrate FOLDER [ROUNDS]")?);
    let cases = std::fs::read_to_string(folder.join("end_to_end.csv"))?;
    let models = std::fs::read_to_string(folder.join("models.csv"))?;
    let rounds = arguments.get(1).map_or(Ok(0), |rounds| rounds.parse())?;
    let mut constants = FITTED.clone();
    if rounds > 0 {
        constants = fit(&thinned(&cases), &models, &FITTED, rounds, &|_| true);
        println!("{constants:#?}");
    }
    let validation = run(&cases, &models, &constants);
    print(&validation);
    if let Some(file) = arguments.get(2) {
        for row in validation.rows.iter().filter(|row| row.family().contains(file)) {
            let time =
                row.time.map(|time| (time.measured_s, time.predicted_s, time.predicted_s / time.measured_s));
            let memory = row.memory.map(|m| (m.measured_gib, m.predicted_gib));
            println!(
                "{} {} {} {} | {} | {time:.3?} {memory:.2?} {:?}",
                row.id, row.framework, row.model, row.gpu, row.plan, row.skipped
            );
        }
    }
    Ok(())
}
