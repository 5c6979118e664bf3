#[allow(unused_imports)]
use super::Cpu;
use super::Threads;
use crate::backend::*;
#[allow(unused_imports)]
use std::ops::Range;

pub(super) fn head_loss(
    threads: &Threads,
    x: &[f32],
    table: &[f32],
    d: usize,
    targets: &[u32],
    gradients: Option<HeadGradients<'_, Cpu>>,
) -> f64 {
    todo!()
}
