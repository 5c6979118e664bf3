#[allow(unused_imports)]
use super::Cpu;
use super::Threads;
use crate::backend::*;
#[allow(unused_imports)]
use std::ops::Range;

pub(super) fn rope(
    threads: &Threads,
    heads: Heads,
    qkv: &mut [f32],
    positions: &[u32],
    table: &[f32],
    inverse: bool,
) {
    todo!()
}
