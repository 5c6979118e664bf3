//! Which class of links takes the seconds of each axis.
//!
//! An exchange may fill links of several classes at the same time. Its seconds then belong to the class that it waits for, the
//! narrowest place of a ring or the one that takes longest, so that seconds by link add up to those of the axis.

use std::ops::Add;

use crate::parallelism::{Parallelism, Recomputation};

use super::rates::Wait;
use super::{Axis, Breakdown, Pricer};

/// Seconds of communication in a step on the slowest pipeline rank.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Communication {
    /// That nothing hides.
    pub exposed_s: f64,
    /// Under kernels.
    pub hidden_s: f64,
}

impl Add for Communication {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { exposed_s: self.exposed_s + other.exposed_s, hidden_s: self.hidden_s + other.hidden_s }
    }
}

impl Pricer {
    /// `[axis][level]` seconds of `step`, a checked layout's, by the links that exchanges wait for. What is hidden and what is not is known
    /// of axes only: both are split as their sum is.
    pub fn communication(&self, layout: &Parallelism, step: &Breakdown) -> Vec<Vec<Communication>> {
        let of_axis = |((by_level, exposed_s), hidden_s): ((Vec<f64>, f64), f64)| -> Vec<Communication> {
            let all: f64 = by_level.iter().sum();
            let share = |seconds: &f64| if all > 0.0 { seconds / all } else { 0.0 };
            let split =
                |share: f64| Communication { exposed_s: share * exposed_s, hidden_s: share * hidden_s };
            by_level.iter().map(share).map(split).collect()
        };
        let seconds = self.seconds_by_link(layout);
        seconds.into_iter().zip(step.exposed_s()).zip(step.hidden_s).map(of_axis).collect()
    }

    /// `[axis][level]` seconds as if nothing hid them, of a micro-batch, of states those of a step.
    fn seconds_by_link(&self, layout: &Parallelism) -> Vec<Vec<f64>> {
        let (sizes, rates) = (self.sizes(layout), &self.rates);
        let slowest = self.slowest(layout, &self.kind_passes(layout));
        let work = slowest.time.passes.all();
        let mut seconds = vec![vec![0.0; rates.cluster.levels.len()]; Axis::ALL.len()];
        let mut add = |axis: Axis, wait: Wait, s: f64| seconds[axis as usize][wait.level] += s;
        let width = self.training.element_bytes();
        let mut tensor_s = work.tensor_s;
        if let Some(moe) = &self.model.moe {
            let again = match layout.recompute {
                Recomputation::Full => 1.0,
                other => f64::from(u8::from(other.modules().moe)),
            };
            let ([there, home], [to, from]) = (sizes.exchange_s(moe), sizes.exchange_wait(moe));
            // There and back; both gradients go as results do.
            add(Axis::Expert, to, (1.0 + again) * there);
            add(Axis::Expert, from, (3.0 + again) * home);
            if layout.expert_tensor > 1 {
                let (bytes, ranks) = (sizes.expert_gather_bytes(moe), layout.expert_tensor);
                let layers = self.stages.moe_layers_of(&slowest.share);
                let within_s = layers * (4.0 + 2.0 * again) * rates.gather(bytes, ranks, 1);
                add(Axis::Tensor, rates.gather_wait(bytes, ranks, 1), within_s);
                tensor_s = (tensor_s - within_s).max(0.0);
            }
        }
        let bytes = width * sizes.tokens() * self.model.hidden as f64;
        add(Axis::Tensor, rates.gather_wait(bytes, layout.tensor, 1), tensor_s);
        let keys = rates.gather_wait(sizes.key_bytes(), layout.context, layout.tensor);
        add(Axis::Context, keys, work.context_s);
        let message = rates.message_wait(self.message_bytes(layout), layout.pipeline, layout.stage_gpus());
        add(Axis::Pipeline, message, self.message_s(layout));
        let held = self.rank_parameters(layout, &slowest.share);
        let times = layout.state_exchanges(&self.training);
        let widths = [
            (times.gradients, self.training.optimizer.gradients.bytes()),
            (times.weights, self.training.compute.bytes().clamp(2.0, 4.0)),
        ];
        let dense = (held.dense, layout.data * layout.context, layout.tensor);
        let experts = (held.experts, layout.expert_data(), layout.expert * layout.expert_tensor);
        for (parameters, ranks, stride) in [dense, experts] {
            for (times, width) in widths {
                let bytes = width * parameters;
                let wait = rates.gather_wait(bytes, ranks, stride);
                add(Axis::Data, wait, times * rates.gather(bytes, ranks, stride));
            }
        }
        seconds
    }
}
