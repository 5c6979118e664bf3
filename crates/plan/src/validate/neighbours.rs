//! Blank degrees taken from the nearest row that prints them.

use super::case::Case;
use crate::parallelism::Sharding;

/// Whether a row's parameters are sharded over all replicas (FSDP, ZeRO-3), by what it says.
pub(super) fn fully_sharded(case: &Case) -> bool {
    let words = ["fsdp", "hsdp", "full_shard", "zero-3", "zero3", "maxtext"];
    let sharded = case.sharding == Some(Sharding::Zero3) || words.iter().any(|word| case.mentions(word));
    // Llama 3 shards gradients only within the pipeline and says so.
    sharded && !case.mentions("zero-2")
}

/// The row with its blanks filled from the most similar row of the same model and GPU that prints tensor and pipeline degree:
/// same file, framework, sequence length, precision, then the nearest number of GPUs; another source's fastest plan comes last. Rows that print all, and fully sharded rows
/// without a similar one of their own framework, stay as they are. Neither what rows call themselves nor their order counts.
pub(super) fn filled(at: usize, all: &[Case]) -> Case {
    let mut case = all[at].clone();
    let others = || all.iter().enumerate().filter(|(other, _)| *other != at).map(|(_, other)| other);
    if case.recompute == "final" {
        case.recompute = best_before(&case, others()).unwrap_or_default();
    }
    let blank = case.degrees.tensor.is_none() || case.degrees.pipeline.is_none();
    // A pipeline whose virtual stages are not printed, as opposed to printed as not applicable.
    let stages = case.degrees.pipeline.is_some_and(|stages| stages > 1) && !case.not_interleaved;
    let stages_missing = stages && case.degrees.virtual_stages.is_none();
    if !blank && !stages_missing {
        return case;
    }
    let Some(other) = nearest(&case, others(), blank) else { return case };
    let (own, theirs) = (&mut case.degrees, &other.degrees);
    if blank {
        own.tensor = own.tensor.or(theirs.tensor);
        own.pipeline = own.pipeline.or(theirs.pipeline);
        own.context = own.context.or(theirs.context);
        own.expert = own.expert.or(theirs.expert);
        own.expert_tensor = own.expert_tensor.or(theirs.expert_tensor);
        own.micro_batch = own.micro_batch.or(theirs.micro_batch);
        case.global_batch = case.global_batch.or(other.global_batch);
        case.gpus = case.gpus.or(other.gpus);
    }
    if own.pipeline == theirs.pipeline {
        own.virtual_stages = own.virtual_stages.or(theirs.virtual_stages);
    }
    case
}

/// What the fastest of the other variants of a series says of itself: the last one is called final.
fn best_before<'a>(case: &Case, others: impl Iterator<Item = &'a Case>) -> Option<String> {
    let same = |other: &&Case| {
        let (of, theirs) =
            ((&case.file, case.model_name(), &case.gpu), (&other.file, other.model_name(), &other.gpu));
        of == theirs && other.gpus == case.gpus
    };
    let others = others.filter(same).filter_map(|other| Some((other.step_s?, &other.recompute)));
    others.min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(b.1))).map(|(_, variant)| variant.clone())
}

fn nearest<'a>(case: &Case, others: impl Iterator<Item = &'a Case>, blank: bool) -> Option<&'a Case> {
    let sharded = fully_sharded(case);
    let similar = others.filter(|other| {
        let same = other.model_name() == case.model_name() && other.gpu == case.gpu;
        let degrees = &other.degrees;
        let prints = match blank {
            true => degrees.tensor.is_some() && degrees.pipeline.is_some(),
            false => {
                let same = degrees.pipeline == case.degrees.pipeline && degrees.tensor == case.degrees.tensor;
                same && degrees.virtual_stages.is_some() && other.file == case.file
            }
        };
        let alike = !sharded || other.framework == case.framework;
        same && prints && alike && fully_sharded(other) == sharded
    });
    let distance = |other: &Case| {
        let gpus = |case: &Case| (case.gpus.unwrap_or(1) as f64).log2();
        let distance = (gpus(case) - gpus(other)).abs();
        // Of another source's plans the fastest is the most likely one.
        let slowness =
            if other.file == case.file { 0 } else { u64::MAX - other.tflops_per_gpu.unwrap_or(0.0) as u64 };
        (
            other.file != case.file,
            other.file == case.file && other.framework != case.framework,
            other.sequence != case.sequence,
            other.precision != case.precision,
            slowness,
            (16.0 * distance) as u64,
        )
    };
    similar.min_by(|a, b| distance(a).cmp(&distance(b)).then_with(|| content(a).cmp(&content(b))))
}

/// All that a row says but its name.
fn content(case: &Case) -> String {
    format!("{:?}", Case { id: String::new(), ..case.clone() })
}
