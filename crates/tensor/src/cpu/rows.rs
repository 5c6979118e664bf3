#[allow(unused_imports)]
use super::Cpu;
use super::Threads;
use crate::backend::*;
#[allow(unused_imports)]
use std::ops::Range;

pub(super) fn embedding(threads: &Threads, ids: &[u32], table: &[f32], d: usize, out: &mut [f32]) {
    todo!()
}

pub(super) fn embedding_backward(threads: &Threads, ids: &[u32], dout: &[f32], d: usize, dtable: &mut [f32]) {
    todo!()
}

pub(super) fn gather_rows(threads: &Threads, src: &[f32], d: usize, index: &[u32], dst: &mut [f32]) {
    todo!()
}

pub(super) fn combine_rows(
    threads: &Threads,
    src: &[f32],
    d: usize,
    experts: &[u32],
    index: &[u32],
    top_k: usize,
    node_size: usize,
    shared: Option<&[f32]>,
    base: Option<&[f32]>,
    out: &mut [f32],
) {
    todo!()
}
