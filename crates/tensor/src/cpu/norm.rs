#[allow(unused_imports)]
use super::Cpu;
use super::Threads;
use crate::backend::*;
#[allow(unused_imports)]
use std::ops::Range;

pub(super) fn rms_norm(
    threads: &Threads,
    x: &[f32],
    weight: &[f32],
    epsilon: f32,
    y: &mut [f32],
    rstd: &mut [f32],
) {
    todo!()
}

pub(super) fn rms_norm_backward(
    threads: &Threads,
    dy: &[f32],
    x: &[f32],
    weight: &[f32],
    rstd: &[f32],
    dx: &mut [f32],
) {
    todo!()
}

pub(super) fn rms_norm_weight_grad(
    threads: &Threads,
    dy: &[f32],
    x: &[f32],
    rstd: &[f32],
    d: usize,
    dweight: &mut [f32],
) {
    todo!()
}

pub(super) fn head_norm(
    threads: &Threads,
    heads: Heads,
    raw: &[f32],
    q_weight: &[f32],
    k_weight: &[f32],
    epsilon: f32,
    out: &mut [f32],
    rstd: &mut [f32],
) {
    todo!()
}

pub(super) fn head_norm_backward(
    threads: &Threads,
    heads: Heads,
    d: &mut [f32],
    raw: &[f32],
    q_weight: &[f32],
    k_weight: &[f32],
    rstd: &[f32],
) {
    todo!()
}

pub(super) fn head_norm_weight_grad(
    threads: &Threads,
    heads: Heads,
    dout: &[f32],
    raw: &[f32],
    rstd: &[f32],
    dq_weight: &mut [f32],
    dk_weight: &mut [f32],
) {
    todo!()
}
