#[allow(unused_imports)]
use super::Cpu;
use super::Threads;
use crate::backend::*;
#[allow(unused_imports)]
use std::ops::Range;

pub(super) fn router(threads: &Threads, shape: RouterShape, logits: &[f32], bias: &[f32]) -> Routing {
    todo!()
}

pub(super) fn router_backward(
    threads: &Threads,
    shape: RouterShape,
    logits: &[f32],
    routing: &Routing,
    dweights: &[f32],
    balance: f32,
    z: f32,
    dlogits: &mut [f32],
) {
    todo!()
}
