//! Fits the constants of `calibration.rs` to published training runs by coordinate descent on the mean over families of the mean
//! absolute logarithm of predicted over measured step time. The folder holds `end_to_end.csv` and `models.csv`.
//!
//! `calibrate FOLDER show [FAMILY]` prints the figures of every family (and the rows of one), `fit ROUNDS` fits from where the
//! constants are, `folds FOLDS ROUNDS` leaves each fold of families out in turn.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use unisono_plan::validate::{Group, Outcome, Prediction, TimeFigures, Validation, validate_with};
use unisono_plan::{Constants, FITTED, Pricer};

/// A constant by name, how to reach it, and the range that still makes sense.
type Knob = (String, Box<dyn Fn(&mut Constants) -> &mut f64>, [f64; 2]);

const GENERATIONS: [&str; 5] = ["A100", "Hopper", "Blackwell", "Grace", "MI300"];
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
    knobs!(found, GENERATIONS, gpus, gemm [0.8, 2.0], gemm_fp8 [0.4, 2.5], gemm_fp4 [0.4, 3.0], grouped [0.7, 3.0],
        attention [0.6, 3.0], memory [0.4, 4.0], host [0.3, 2.0]);
    knobs!(found, SOFTWARE, software, memory [0.3, 5.0], attention [0.5, 4.0], grouped [0.4, 3.0], dispatch [0.1, 3.0], launch_s [5e-7, 2e-4], moe_launch [0.3, 10.0],
        tensor_exposed [0.05, 1.2], data_exposed [0.0, 1.0]);
    macro_rules! common {
        ($($field:ident $range:expr),*) => {
            $(found.push((stringify!($field).to_string(), Box::new(|c: &mut Constants| &mut c.common.$field), $range));)*
        };
    }
    common!(dispatch [0.25, 4.0], network [0.6, 3.0], expert_exposed [0.0, 1.0], context_exposed [0.0, 1.0],
        message_exposed [0.0, 1.0], straggler [0.001, 0.05], scan [1.0, 10.0], norm [1.3, 6.0], step_s [0.001, 0.2]);
    found.retain(|(name, _, _)| !without_evidence(name));
    found
}

/// Constants that no run could tell apart: older GPUs have no narrow products, software that trains no experts here launches
/// none, and each kind of kernel has one reference software or GPU whose factor is 1.
fn without_evidence(name: &str) -> bool {
    let (owner, field) = name.split_once('.').unwrap_or(("", name));
    let narrow = matches!(owner, "A100" | "MI300") && field.starts_with("gemm_") || name == "Hopper.gemm_fp4";
    let dense_only = matches!(owner, "Megatron2021" | "DeepSpeed2021" | "TorchEager" | "Xla" | "A100")
        && matches!(field, "moe_launch" | "grouped" | "dispatch");
    let reference = owner == "MegatronCore"
        && matches!(field, "memory" | "attention" | "grouped" | "dispatch")
        || matches!(name, "A100.host" | "Hopper.host");
    narrow || dense_only || reference || owner == "DeepSpeed2021" && field != "data_exposed"
}

fn run(cases: &str, models: &str, constants: &Constants) -> Validation {
    validate_with(cases, Some(models), &|model, cluster, layout, training| {
        let calibration = constants.of(&cluster.gpu, training.software);
        Prediction::of(&Pricer::with_calibration(model, cluster, training, calibration), layout)
    })
}

/// Mean over families of the mean absolute logarithm; `counts` says which families.
fn loss(rows: &[Outcome], counts: &dyn Fn(&str) -> bool) -> f64 {
    let mut families: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for row in rows {
        let family = row.family();
        if let (Some(time), true) = (row.time, counts(&family)) {
            let error = (time.predicted_s / time.measured_s).ln().abs().min(1.0);
            // Smooth near zero, so that one constant at a time finds its way.
            families.entry(family).or_default().push(error.hypot(0.05));
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
        let (mut a, mut b) = (constants.clone(), start.clone());
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

/// Leaves each fold of families out in turn, fits to the others from neutral constants, and predicts what was left out.
fn cross_validate(cases: &str, models: &str, folds: usize, rounds: usize) {
    let thinned = thinned(cases);
    let all = run(cases, models, &FITTED);
    let fold_of: BTreeMap<String, usize> =
        all.families.iter().enumerate().map(|(at, group)| (group.name.clone(), at % folds)).collect();
    let sparse: BTreeMap<String, bool> = all.rows.iter().map(|row| (row.family(), row.sparse)).collect();
    let mut left_out: Vec<Group> = Vec::new();
    for fold in 0..folds {
        let constants =
            fit(&thinned, models, &neutral(), rounds, &|family| fold_of.get(family) != Some(&fold));
        let validation = run(cases, models, &constants);
        left_out
            .extend(validation.families.into_iter().filter(|group| fold_of.get(&group.name) == Some(&fold)));
    }
    for (name, wanted) in [("dense", false), ("MoE", true)] {
        let of_kind = left_out.iter().filter(|group| sparse.get(&group.name) == Some(&wanted));
        let groups: Vec<&Group> = of_kind.collect();
        let mean = |of: &dyn Fn(&Group) -> Option<f64>| {
            let found: Vec<f64> = groups.iter().filter_map(|group| of(group)).collect();
            100.0 * found.iter().sum::<f64>() / found.len().max(1) as f64
        };
        type Figures = fn(&Group) -> Option<TimeFigures>;
        for (what, figures) in [("plain", (|g| g.plain) as Figures), ("released", |g| g.released)] {
            println!(
                "{name} {what}: MAPE {:.1}% bias {:+.1}% coverage {:.0}% width {:.2}",
                mean(&|g| figures(g).map(|f| f.mape)),
                mean(&|g| figures(g).map(|f| f.bias)),
                mean(&|g| figures(g).map(|f| f.coverage)),
                mean(&|g| figures(g).map(|f| f.width)) / 100.0,
            );
        }
        println!("{name} tau {:.2}", mean(&|g| g.tau) / 100.0);
    }
}

/// Where a fit starts that must not know the fitted values: kernels and links as measured, nothing hidden.
fn neutral() -> Constants {
    let mut constants = FITTED.clone();
    for (name, reach, _) in knobs() {
        *reach(&mut constants) = match name.rsplit('.').next() {
            Some("launch_s") => 2e-5,
            Some("moe_launch") => 2.0,
            Some(field) if field.ends_with("_exposed") => 0.5,
            Some("straggler" | "step_s") => 0.01,
            _ => 1.0,
        };
    }
    constants
}

fn show(cases: &str, models: &str, constants: &Constants, family: Option<&String>) {
    let validation = run(cases, models, constants);
    print(&validation);
    let Some(part) = family else { return };
    for row in validation.rows.iter().filter(|row| row.family().contains(part)) {
        let time = row.time.map(|t| {
            format!(
                "{:.3} s, {:.3} predicted, ratio {:.3}",
                t.measured_s,
                t.predicted_s,
                t.predicted_s / t.measured_s
            )
        });
        let memory =
            row.memory.map(|m| format!("{:.2} GiB, {:.2} predicted", m.measured_gib, m.predicted_gib));
        let said = [time, memory, row.skipped.clone()].into_iter().flatten().collect::<Vec<_>>().join("; ");
        println!("{} {} {} {} | {} | {said}", row.id, row.framework, row.model, row.gpu, row.plan);
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let usage = "usage: calibrate FOLDER [show FAMILY | fit ROUNDS | folds FOLDS ROUNDS]";
    let folder = Path::new(arguments.first().ok_or(usage)?);
    let cases = std::fs::read_to_string(folder.join("end_to_end.csv"))?;
    let models = std::fs::read_to_string(folder.join("models.csv"))?;
    let number =
        |at: usize| -> Result<usize, Box<dyn Error>> { Ok(arguments.get(at).ok_or(usage)?.parse()?) };
    match arguments.get(1).map(String::as_str) {
        None | Some("show") => show(&cases, &models, &FITTED, arguments.get(2)),
        Some("fit") => {
            let constants = fit(&thinned(&cases), &models, &FITTED, number(2)?, &|_| true);
            println!("{constants:#?}");
            show(&cases, &models, &constants, None);
        }
        Some("folds") => cross_validate(&cases, &models, number(2)?, number(3)?),
        Some(_) => return Err(usage.into()),
    }
    Ok(())
}
