#[allow(unused_imports)]
use super::Cpu;
use super::Threads;
use crate::backend::*;
#[allow(unused_imports)]
use std::ops::Range;

pub(super) fn attention(
    threads: &Threads,
    shape: AttentionShape<'_>,
    q: &[f32],
    q_stride: usize,
    kv: &[f32],
    kv_stride: usize,
    out: &mut [f32],
    lse: &mut [f32],
) {
    todo!()
}

pub(super) fn attention_backward(
    threads: &Threads,
    shape: AttentionShape<'_>,
    dout: &[f32],
    qkv: &[f32],
    out: &[f32],
    lse: &[f32],
    dqkv: &mut [f32],
) {
    todo!()
}
