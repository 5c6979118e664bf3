//! The measured step time of a row, whatever way it is printed.

use crate::architecture::Architecture;
use crate::parallelism::Training;

use super::case::Case;

/// Seconds of a step of `training`, which may have another batch than the row prints: time is proportional to it; or why there are none.
pub(super) fn step_s(
    case: &Case,
    model: &Architecture,
    training: &Training,
    gpus: usize,
) -> Result<f64, &'static str> {
    let tokens = training.sequence as f64 * training.global_batch as f64;
    let placed = case.gpus.or(case.degrees.data).is_some();
    if let (Some(step_s), Some(batch), true) = (case.step_s, case.global_batch, placed) {
        return Ok(step_s * training.global_batch as f64 / batch as f64);
    }
    if let Some(rate) = case.tokens_per_s_per_gpu {
        return Ok(tokens / (rate * gpus as f64));
    }
    let Some(tflops) = case.tflops_per_gpu else {
        return Err(match case.step_s {
            Some(_) if case.global_batch.is_none() => "a step time is printed, but no batch",
            Some(_) => "a step time is printed, but no number of GPUs",
            None => "no step time, throughput or rate is printed",
        });
    };
    Ok(tokens * flops_per_token(case, model, training.sequence) / (tflops * 1e12 * gpus as f64))
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
