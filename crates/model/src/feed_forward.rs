//! The feed-forward network that every token goes through: dense layers, and the shared experts of MoE layers.

use std::ops::Range;

use unisono_plan::TensorSpec;
use unisono_tensor::{Backend, Buffer, FfnRun, FfnShape};

use crate::batch::Batch;
use crate::parameters::{UnitGradients, UnitParameters};
use crate::transformer::Transformer;

/// A dense weight gradient is one product over a slot's rows, whatever `expert_row_block` says.
const WHOLE_RUN: usize = 1 << 40;

/// What the weight-gradient step needs: gradient of the hidden products, hidden values, gradient of the result.
pub(crate) struct FeedForwardWeights<B: Backend> {
    pub dgu: B::Buf,
    hidden: B::Buf,
}

/// A forward under way, some rows at a time.
pub(crate) struct Forward<'a, B: Backend> {
    ffn: &'a [TensorSpec; 2],
    /// `[rows, d]`
    pub result: B::Buf,
    /// `[rows, 2 ffn]`, for the backward.
    pub kept: B::Buf,
}

/// A backward under way, some rows at a time.
pub(crate) struct Backward<'a, B: Backend> {
    ffn: &'a [TensorSpec; 2],
    /// Gradient of the input `[rows, d]`.
    pub result: B::Buf,
    /// For the weight-gradient step.
    pub work: FeedForwardWeights<B>,
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
                out: batch.rows_of(index).start,
                w13: ffn[0].offset,
                w2: ffn[1].offset,
                dw13: slot(index) + ffn[0].offset,
                dw2: slot(index) + ffn[1].offset,
            })
            .collect()
    }

    /// The parts of the runs that lie in `rows`.
    fn feed_forward_runs_in(&self, ffn: &[TensorSpec; 2], batch: &Batch, rows: Range<usize>) -> Vec<FfnRun> {
        let clip = |mut run: FfnRun| {
            run.rows = run.rows.start.max(rows.start)..run.rows.end.min(rows.end);
            run.out = run.rows.start;
            (!run.rows.is_empty()).then_some(run)
        };
        self.feed_forward_runs(ffn, batch, |_| 0).into_iter().filter_map(clip).collect()
    }

    /// Room for the network's forward over all rows, none of them done.
    pub(crate) fn start_feed_forward<'a>(
        &self,
        ffn: &'a [TensorSpec; 2],
        batch: &Batch,
        x: &B::Buf,
    ) -> Forward<'a, B> {
        let kept = self.backend.alloc(batch.rows() * 2 * ffn[1].shape[0]);
        Forward { ffn, result: self.backend.alloc(x.len()), kept }
    }

    /// The forward of `rows`.
    pub(crate) fn feed_forward_rows(
        &self,
        forward: &mut Forward<'_, B>,
        parameters: &UnitParameters<B>,
        batch: &Batch,
        x: &B::Buf,
        rows: Range<usize>,
    ) {
        let Forward { ffn, result, kept } = forward;
        let (shape, runs) = (self.feed_forward_shape(ffn), self.feed_forward_runs_in(ffn, batch, rows));
        let weights = parameters.values.all();
        self.backend.ffn(shape, &runs, x.all(), weights, None, kept.all_mut(), result.all_mut());
    }

    /// Room for the network's backward over all rows; `kept` is what the forward kept.
    pub(crate) fn start_feed_forward_backward<'a>(
        &self,
        ffn: &'a [TensorSpec; 2],
        batch: &Batch,
        dy: &B::Buf,
        kept: B::Buf,
    ) -> Backward<'a, B> {
        let hidden = self.backend.alloc(batch.rows() * ffn[1].shape[0]);
        let result = self.backend.alloc(dy.len());
        Backward { ffn, result, work: FeedForwardWeights { dgu: kept, hidden } }
    }

    /// The backward of `rows`.
    pub(crate) fn feed_forward_rows_backward(
        &self,
        backward: &mut Backward<'_, B>,
        parameters: &UnitParameters<B>,
        batch: &Batch,
        dy: &B::Buf,
        rows: Range<usize>,
    ) {
        let Backward { ffn, result, work } = backward;
        let (shape, runs) = (self.feed_forward_shape(ffn), self.feed_forward_runs_in(ffn, batch, rows));
        let weights = parameters.values.all();
        let (dgu, hidden, dx) = (work.dgu.all_mut(), work.hidden.all_mut(), result.all_mut());
        self.backend.ffn_backward(shape, &runs, dy.all(), weights, None, dgu, hidden, dx, None);
    }

    /// `(y, gu)`: the network's result `[rows, d]`, and what its backward needs.
    pub(crate) fn feed_forward(
        &self,
        ffn: &[TensorSpec; 2],
        parameters: &UnitParameters<B>,
        batch: &Batch,
        x: &B::Buf,
    ) -> (B::Buf, B::Buf) {
        let mut forward = self.start_feed_forward(ffn, batch, x);
        self.feed_forward_rows(&mut forward, parameters, batch, x, 0..batch.rows());
        (forward.result, forward.kept)
    }

    /// Gradient of `x`; consumes what the forward kept.
    pub(crate) fn feed_forward_backward(
        &self,
        ffn: &[TensorSpec; 2],
        parameters: &UnitParameters<B>,
        batch: &Batch,
        dy: &B::Buf,
        kept: B::Buf,
    ) -> (B::Buf, FeedForwardWeights<B>) {
        let mut backward = self.start_feed_forward_backward(ffn, batch, dy, kept);
        self.feed_forward_rows_backward(&mut backward, parameters, batch, dy, 0..batch.rows());
        (backward.result, backward.work)
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
