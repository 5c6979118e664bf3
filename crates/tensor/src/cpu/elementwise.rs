//! Kernels that treat every element alone, and the optimizer step.

use std::ops::Range;

use super::parallel::{DisjointMut, Threads};
use super::simd::vectorized;
use crate::backend::{AdamW, NORM_CHUNK};

/// Elements of a task: enough to pay for handing it out.
const CHUNK: usize = 16 * 1024;

pub(super) fn fill(threads: &Threads, dst: &mut [f32], value: f32) {
    threads.chunks_mut(dst, CHUNK, |_, dst| dst.fill(value));
}

pub(super) fn copy(threads: &Threads, src: &[f32], dst: &mut [f32]) {
    assert_eq!(src.len(), dst.len(), "copy: lengths differ");
    threads.chunks_mut(dst, CHUNK, |i, dst| dst.copy_from_slice(&src[i * CHUNK..][..dst.len()]));
}

pub(super) fn add(threads: &Threads, dst: &mut [f32], src: &[f32]) {
    assert_eq!(src.len(), dst.len(), "add: lengths differ");
    threads.chunks_mut(dst, CHUNK, |i, dst| {
        let src = &src[i * CHUNK..][..dst.len()];
        vectorized(
            #[inline(always)]
            || dst.iter_mut().zip(src).for_each(|(d, s)| *d += s),
        );
    });
}

pub(super) fn chunk_squares(threads: &Threads, x: &[f32], out: &mut Vec<f64>) {
    let before = out.len();
    out.resize(before + x.len().div_ceil(NORM_CHUNK), 0.0);
    let per_task = CHUNK / NORM_CHUNK;
    threads.chunks_mut(&mut out[before..], per_task, |i, sums| {
        for (j, sum) in sums.iter_mut().enumerate() {
            let start = (i * per_task + j) * NORM_CHUNK;
            let chunk = &x[start..x.len().min(start + NORM_CHUNK)];
            *sum = vectorized(
                #[inline(always)]
                || squares(chunk),
            );
        }
    });
}

#[inline(always)]
fn squares(x: &[f32]) -> f64 {
    let mut lanes = [0f64; 8];
    let (groups, tail) = x.as_chunks::<8>();
    for group in groups {
        for (lane, &v) in lanes.iter_mut().zip(group) {
            *lane += f64::from(v) * f64::from(v);
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(tail) {
        *lane += f64::from(v) * f64::from(v);
    }
    lanes[1..].iter().fold(lanes[0], |sum, lane| sum + lane)
}

pub(super) fn adamw(
    threads: &Threads,
    step: AdamW,
    runs: &[(Range<usize>, bool)],
    gradient: &[f32],
    parameter: &mut [f32],
    first: &mut [f32],
    second: &mut [f32],
) {
    let len = gradient.len();
    assert_eq!([parameter.len(), first.len(), second.len()], [len; 3], "adamw: lengths differ");
    let mut end = 0;
    for (run, _) in runs {
        assert!(
            end <= run.start && run.start <= run.end,
            "adamw: runs must ascend and not overlap: {runs:?}"
        );
        end = run.end;
    }
    let (parameter, first, second) =
        (DisjointMut::new(parameter), DisjointMut::new(first), DisjointMut::new(second));
    let tasks = runs.iter().map(|(run, _)| run.len().div_ceil(CHUNK)).sum();
    threads.run(tasks, |task| {
        let (range, decay) = part_of_runs(runs, task);
        // SAFETY: runs do not overlap (asserted above), neither do the parts of a run.
        let (p, m, v) = unsafe {
            (parameter.range(range.clone()), first.range(range.clone()), second.range(range.clone()))
        };
        let g = &gradient[range];
        vectorized(
            #[inline(always)]
            || adamw_part(step, decay, g, p, m, v),
        );
    });
}

/// The `task`-th piece of at most [`CHUNK`] elements of all runs, and whether it decays.
fn part_of_runs(runs: &[(Range<usize>, bool)], mut task: usize) -> (Range<usize>, bool) {
    for (run, decay) in runs {
        let parts = run.len().div_ceil(CHUNK);
        if task < parts {
            let start = run.start + task * CHUNK;
            return (start..run.end.min(start + CHUNK), *decay);
        }
        task -= parts;
    }
    (0..0, false)
}

#[inline(always)]
fn adamw_part(step: AdamW, decay: bool, gradient: &[f32], p: &mut [f32], m: &mut [f32], v: &mut [f32]) {
    let (rest1, rest2) = (1.0 - step.beta1, 1.0 - step.beta2);
    let shrink = if decay { step.learning_rate * step.weight_decay } else { 0.0 };
    for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(gradient) {
        let g = g * step.gradient_scale;
        *m = step.beta1 * *m + rest1 * g;
        *v = step.beta2 * *v + rest2 * g * g;
        let decayed = *p - shrink * *p;
        let direction = step.learning_rate * (*m * step.correction1);
        *p = decayed - direction / ((*v * step.correction2).sqrt() + step.epsilon);
    }
}
