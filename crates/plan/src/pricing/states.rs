//! Gradients, parameters and the optimizer, once a step.

use crate::parallelism::{Parallelism, Sharding};
use crate::software::Trainable;

use super::stages::Share;
use super::{Axis, Breakdown, Pricer};

/// Parameters that one rank holds, before any sharding over replicas.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct RankParameters {
    /// All but routed experts.
    pub dense: f64,
    /// Routed experts.
    pub experts: f64,
}

impl Pricer {
    /// Parameters of a rank that holds `share`.
    pub(crate) fn rank_parameters(&self, layout: &Parallelism, share: &Share) -> RankParameters {
        let t = layout.tensor as f64;
        let mut held = RankParameters::default();
        for (of, layers) in self.stages.parameters().iter().zip(share.layers) {
            let split = (of.mixer + of.ffn) as f64 / t;
            let whole = (of.mixer_replicated + of.router + of.norms) as f64;
            held.dense += f64::from(layers) * (split + whole);
            let experts = of.experts as f64 / (layout.expert * layout.expert_tensor) as f64;
            held.experts += f64::from(layers) * experts;
        }
        held.dense += self.tables(layout, share);
        if share.head {
            let d = self.model.hidden as f64;
            held.dense += d + self.model.mtp_layers as f64 * (2.0 * d * d + 3.0 * d);
        }
        held
    }

    /// Parameters of embedding and head that a rank holds.
    pub(crate) fn tables(&self, layout: &Parallelism, share: &Share) -> f64 {
        let both = share.embedding && share.head && self.model.tied_embeddings;
        let tables = u8::from(share.embedding) + u8::from(share.head) - u8::from(both);
        f64::from(tables) * self.model.embedding_parameters() as f64 / layout.tensor as f64
    }

    /// Traffic of gradients and parameters, and the update. `micro_batch_s` is what one micro-batch takes on this rank.
    pub(super) fn states(
        &self,
        layout: &Parallelism,
        share: &Share,
        micro_batch_s: f64,
        step: &mut Breakdown,
    ) {
        if self.training.trainable == Trainable::Adapters {
            return;
        }
        let held = self.rank_parameters(layout, share);
        let dense_ranks = layout.data * layout.context;
        let expert_ranks = layout.expert_data();
        let stride = (layout.tensor, layout.expert * layout.expert_tensor);
        let gather = |bytes: f64| {
            self.rates.gather(bytes * held.dense, dense_ranks, stride.0)
                + self.rates.gather(bytes * held.experts, expert_ranks, stride.1)
        };
        let gradients = self.training.optimizer.gradients.bytes();
        let weights = self.training.compute.bytes().clamp(2.0, 4.0);
        let micro_batches = layout.micro_batches(&self.training) as f64;
        let exposed = self.rates.calibration.software.data_exposed;
        let times = layout.state_exchanges(&self.training);
        let traffic = times.weights * gather(weights) + times.gradients * gather(gradients);
        // What happens once hides under the first or the last micro-batch.
        let under = if times.gradients > 1.0 { micro_batches * micro_batch_s } else { micro_batch_s };
        step.data_s = (exposed * traffic).max(traffic - under);
        step.hidden_s[Axis::Data as usize] = traffic - step.data_s;
        step.optimizer_s = self.optimizer_s(layout, held.dense, held.experts);
    }

    /// Reads and writes of the update, and of the gradient norm before it.
    fn optimizer_s(&self, layout: &Parallelism, dense: f64, experts: f64) -> f64 {
        let optimizer = &self.training.optimizer;
        let gradients = optimizer.gradients.bytes();
        let states = 2.0 * optimizer.moments.bytes() + self.training.master_bytes();
        let owned = match layout.sharding {
            Sharding::None => dense + experts,
            _ => dense / (layout.data * layout.context) as f64 + experts / layout.expert_data().max(1) as f64,
        };
        self.rates.stream((2.0 * states + 2.0 * gradients + 2.0) * owned + gradients * (dense + experts))
    }
}
