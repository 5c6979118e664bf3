#[allow(unused_imports)]
use super::Cpu;
use super::Threads;
use crate::backend::*;
#[allow(unused_imports)]
use std::ops::Range;

pub(super) fn ffn(
    threads: &Threads,
    shape: FfnShape,
    runs: &[FfnRun],
    x: &[f32],
    weights: &[f32],
    row_weight: Option<&[f32]>,
    gu: &mut [f32],
    y: &mut [f32],
) {
    todo!()
}

pub(super) fn ffn_backward(
    threads: &Threads,
    shape: FfnShape,
    runs: &[FfnRun],
    dy: &[f32],
    weights: &[f32],
    row_weight: Option<&[f32]>,
    gu: &mut [f32],
    h: &mut [f32],
    dx: &mut [f32],
    drow_weight: Option<&mut [f32]>,
) {
    todo!()
}

pub(super) fn ffn_weight_grad(
    threads: &Threads,
    shape: FfnShape,
    runs: &[FfnRun],
    x: &[f32],
    dgu: &[f32],
    h: &[f32],
    dy: &[f32],
    dweights: &mut [f32],
) {
    todo!()
}
