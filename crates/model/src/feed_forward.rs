//! The feed-forward network that every token goes through: dense layers, and the shared experts of MoE layers.

use unisono_plan::TensorSpec;
use unisono_tensor::{Backend, Buffer, FfnRun, FfnShape};

use crate::batch::Batch;
use crate::parameters::{UnitGradients, UnitParameters};
use crate::transformer::Transformer;

/// A dense weight gradient is one product over a slot's rows, whatever `expert_row_block` says.
const WHOLE_RUN: usize = 1 << 40;

/// What the weight-gradient step needs: gradient of the hidden products, hidden values, gradient of the result.
pub(crate) struct FeedForwardWeights<B: Backend> {
    dgu: B::Buf,
    hidden: B::Buf,
}

impl<B: Backend> Transformer<B> {
    fn feed_forward_shape(&self, ffn: &[TensorSpec; 2]) -> FfnShape {
        FfnShape { d_model: self.model.hidden_size, ffn: ffn[1].shape[0], row_block: WHOLE_RUN }
    }

    /// One run a slot: same weights, its own gradient, which starts at `slot(index)`.
    fn feed_forward_runs(
        &self,
        ffn: &[TensorSpec; 2],
        batch: &Batch,
        slot: impl Fn(usize) -> usize,
    ) -> Vec<FfnRun> {
        (0..batch.slots.len())
            .map(|index| FfnRun {
                rows: batch.rows_of(index),
                w13: ffn[0].offset,
                w2: ffn[1].offset,
                dw13: slot(index) + ffn[0].offset,
                dw2: slot(index) + ffn[1].offset,
            })
            .collect()
    }

    /// `(y, gu)`: the network's result `[rows, d]`, and what its backward needs.
    pub(crate) fn feed_forward(
        &self,
        ffn: &[TensorSpec; 2],
        parameters: &UnitParameters<B>,
        batch: &Batch,
        x: &B::Buf,
    ) -> (B::Buf, B::Buf) {
        let shape = self.feed_forward_shape(ffn);
        let mut gu = self.backend.alloc(batch.rows() * 2 * shape.ffn);
        let mut y = self.backend.alloc(x.len());
        let runs = self.feed_forward_runs(ffn, batch, |_| 0);
        self.backend.ffn(shape, &runs, x.all(), parameters.values.all(), None, gu.all_mut(), y.all_mut());
        (y, gu)
    }

    /// Gradient of `x`; consumes what the forward kept.
    pub(crate) fn feed_forward_backward(
        &self,
        ffn: &[TensorSpec; 2],
        parameters: &UnitParameters<B>,
        batch: &Batch,
        dy: &B::Buf,
        mut gu: B::Buf,
    ) -> (B::Buf, FeedForwardWeights<B>) {
        let shape = self.feed_forward_shape(ffn);
        let mut hidden = self.backend.alloc(batch.rows() * shape.ffn);
        let mut dx = self.backend.alloc(dy.len());
        let runs = self.feed_forward_runs(ffn, batch, |_| 0);
        let weights = parameters.values.all();
        let (gu_mut, hidden_mut) = (gu.all_mut(), hidden.all_mut());
        self.backend.ffn_backward(
            shape,
            &runs,
            dy.all(),
            weights,
            None,
            gu_mut,
            hidden_mut,
            dx.all_mut(),
            None,
        );
        (dx, FeedForwardWeights { dgu: gu, hidden })
    }

    /// Adds the weight gradients, each slot's to its own accumulator.
    pub(crate) fn feed_forward_weight_grad(
        &self,
        ffn: &[TensorSpec; 2],
        batch: &Batch,
        x: &B::Buf,
        dy: &B::Buf,
        work: &FeedForwardWeights<B>,
        gradients: &mut UnitGradients<B>,
    ) {
        let runs = self.feed_forward_runs(ffn, batch, |index| gradients.slot(index));
        let (dgu, hidden) = (work.dgu.all(), work.hidden.all());
        let shape = self.feed_forward_shape(ffn);
        self.backend.ffn_weight_grad(shape, &runs, x.all(), dgu, hidden, dy.all(), gradients.dense.all_mut());
    }
}
