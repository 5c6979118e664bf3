//! What a row has measured, whatever way it is printed, and whether it can be.

use crate::architecture::Architecture;
use crate::hardware::Gpu;
use crate::parallelism::Training;
use crate::table;

use super::case::Case;
use super::interpret::Setup;

/// The columns of measurements; the last is of memory.
pub(super) const COLUMNS: [&str; 4] =
    ["step_time_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mem_max_gib"];

/// By how much a rate may exceed the GPU's peak: adapters need a third less than is counted, clocks may be above a data sheet's.
const MOST_OF_PEAK: f64 = 1.5;
/// By how much a peak of memory may exceed what the GPU has: cards are sold in two sizes.
const MOST_OF_MEMORY: f64 = 2.0;
/// Less than this share of what a GPU can do or hold is a number of something else.
const LEAST: f64 = 1e-4;

/// Seconds of a step of `training`, which may have another batch than the row prints: time is proportional to it; or why there are
/// none. Of several ways in which they are printed the first that can be.
pub(super) fn step_s(case: &Case, setup: &Setup, training: &Training) -> Result<f64, String> {
    let (model, gpus) = (&setup.architecture, setup.cluster.gpus as f64);
    let tokens = training.sequence as f64 * training.global_batch as f64;
    let placed = case.gpus.or(case.degrees.data).is_some();
    let of_step = case.step_s.zip(case.global_batch.filter(|_| placed));
    let seconds = [
        of_step.map(|(step_s, batch)| step_s * training.global_batch as f64 / batch as f64),
        case.tokens_per_s_per_gpu.map(|rate| tokens / (rate * gpus)),
        case.tflops_per_gpu
            .map(|tflops| tokens * flops_per_token(case, model, training.sequence) / (tflops * 1e12 * gpus)),
    ];
    let (work, peak) = (
        tokens * model.train_flops(training.sequence, true, false) / gpus,
        setup.cluster.gpu.peak_flops(training.compute),
    );
    let mut refused = None;
    for (column, seconds) in seconds.into_iter().enumerate() {
        match (seconds, seconds.map_or_else(|| impossible(case, column), |s| wrong_rate(work / s / peak))) {
            (Some(seconds), None) => return Ok(seconds),
            (_, Some(wrong)) => refused = refused.or_else(|| Some(reason(case, column, wrong))),
            (None, None) => {}
        }
    }
    Err(refused.unwrap_or_else(|| unsaid(case).into()))
}

/// The measured peak of memory in GiB, if there is one and it can be; or why it cannot.
pub(super) fn memory_gib(case: &Case, gpu: &Gpu) -> Result<Option<f64>, String> {
    let column = COLUMNS.len() - 1;
    let share = case.measured_gib().map(|gib| gib * super::GIB / gpu.memory_bytes);
    match share.map_or_else(|| impossible(case, column), wrong_memory) {
        Some(wrong) => Err(reason(case, column, wrong)),
        None => Ok(case.measured_gib()),
    }
}

fn impossible(case: &Case, column: usize) -> Option<&'static str> {
    table::is_impossible(&case.measured[column]).then_some("is no number above 0")
}

/// What is wrong with a rate that is such a share of the peak.
fn wrong_rate(share: f64) -> Option<&'static str> {
    match share {
        _ if share < LEAST => Some("gives less than a 10,000th of the GPU's peak rate"),
        _ if share <= MOST_OF_PEAK => None,
        _ => Some("gives more than 1.5 times the GPU's peak rate"),
    }
}

/// What is wrong with such a share of the memory.
fn wrong_memory(share: f64) -> Option<&'static str> {
    match share {
        _ if share < LEAST => Some("is less than a 10,000th of the GPU's memory"),
        _ if share <= MOST_OF_MEMORY => None,
        _ => Some("is more than twice the GPU's memory"),
    }
}

fn reason(case: &Case, column: usize, wrong: &str) -> String {
    format!("{} {:?} {wrong}", COLUMNS[column], case.measured[column])
}

/// What a row without any time lacks.
fn unsaid(case: &Case) -> &'static str {
    match case.step_s {
        Some(_) if case.global_batch.is_none() => "a step time is printed, but no batch",
        Some(_) => "a step time is printed, but no number of GPUs",
        None => "no step time, throughput or rate is printed",
    }
}

/// Operations that the row's convention counts for a token.
fn flops_per_token(case: &Case, model: &Architecture, sequence: usize) -> f64 {
    let convention = case.convention.to_lowercase();
    let causal = convention.contains("causal") && !convention.contains("non-causal");
    let flops = model.train_flops(sequence, causal, model.mtp_layers > 0);
    if !convention.contains("recompute") {
        return flops;
    }
    // Narayanan et al. (2021): layers are computed forward twice, the head once.
    let head = 6.0 * (model.hidden * model.vocab) as f64;
    (flops - head) * 4.0 / 3.0 + head
}
