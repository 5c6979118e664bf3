#[allow(unused_imports)]
use super::Cpu;
use super::Threads;
use crate::backend::*;
#[allow(unused_imports)]
use std::ops::Range;

pub(super) fn fill(threads: &Threads, dst: &mut [f32], value: f32) {
    todo!()
}

pub(super) fn copy(threads: &Threads, src: &[f32], dst: &mut [f32]) {
    todo!()
}

pub(super) fn add(threads: &Threads, dst: &mut [f32], src: &[f32]) {
    todo!()
}

pub(super) fn chunk_squares(threads: &Threads, x: &[f32], out: &mut Vec<f64>) {
    todo!()
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
    todo!()
}
