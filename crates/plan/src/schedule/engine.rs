//! What the engine runs today: data and expert parallel ranks without a pipeline, layer by layer.

use super::{Exchange, ExchangeKind, Kernel, KernelKind, Op, Pass, Schedule, Site};
use crate::memory::KeptActivations;
use crate::model::ModelConfig;

/// The step that the engine runs; every rank of a run has the same list.
///
/// A rank runs its `waves` of slots (`Fold::waves`) one after the other, `turns` accumulation turns each, then all ranks
/// join losses, reduce gradients to the shards, update and gather parameters.
pub fn engine_step(model: &ModelConfig, waves: usize, turns: usize, kept: KeptActivations) -> Schedule {
    let mut list = List { model, site: Site::default(), ops: Vec::new() };
    list.exchange(ExchangeKind::Targets);
    for wave in 0..waves {
        for turn in 0..turns {
            list.site = Site { layer: 0, wave: wave as u16, turn: turn as u32 };
            list.turn(kept);
        }
        list.kernel(KernelKind::JoinGradients, Pass::Update);
    }
    list.site = Site::default();
    list.exchange(ExchangeKind::Losses);
    list.exchange(ExchangeKind::ReduceGradients);
    list.kernel(KernelKind::GradientNorm, Pass::Update);
    list.exchange(ExchangeKind::GradientNorm);
    list.kernel(KernelKind::Optimizer, Pass::Update);
    list.exchange(ExchangeKind::GatherParameters);
    if model.moe_layers() > 0 {
        list.exchange(ExchangeKind::GatherExperts);
    }
    list.exchange(ExchangeKind::Times);
    Schedule { micro_batches: 0, placement: Vec::new(), ranks: vec![list.ops] }
}

struct List<'a> {
    model: &'a ModelConfig,
    site: Site,
    ops: Vec<Op>,
}

impl List<'_> {
    fn kernel(&mut self, kind: KernelKind, pass: Pass) {
        self.ops.push(Op::Kernel(Kernel { kind, pass, site: self.site }));
    }

    fn start(&mut self, kind: ExchangeKind) {
        self.ops.push(Op::Start(Exchange { kind, site: self.site }));
    }

    fn finish(&mut self, kind: ExchangeKind) {
        self.ops.push(Op::Finish(Exchange { kind, site: self.site }));
    }

    fn exchange(&mut self, kind: ExchangeKind) {
        self.start(kind);
        self.finish(kind);
    }

    /// Forward and backward of one wave in one accumulation turn.
    fn turn(&mut self, kept: KeptActivations) {
        self.kernel(KernelKind::Embedding, Pass::Forward);
        let layers = self.model.num_hidden_layers;
        for layer in 0..layers {
            self.site.layer = layer as u16;
            self.forward(Pass::Forward);
        }
        self.kernel(KernelKind::Head, Pass::Backward);
        for layer in (0..layers).rev() {
            self.site.layer = layer as u16;
            if kept == KeptActivations::LayerInputs {
                self.forward(Pass::Again);
            }
            self.backward();
        }
        self.kernel(KernelKind::Embedding, Pass::Weights);
    }

    fn forward(&mut self, pass: Pass) {
        self.kernel(KernelKind::Attention, pass);
        if !self.model.is_moe(usize::from(self.site.layer)) {
            self.kernel(KernelKind::DenseFfn, pass);
            return;
        }
        self.kernel(KernelKind::Router, pass);
        self.exchange(ExchangeKind::DispatchCounts);
        self.kernel(KernelKind::Permute, pass);
        self.start(ExchangeKind::Dispatch);
        self.start(ExchangeKind::DispatchWeights);
        self.shared_experts(pass);
        self.finish(ExchangeKind::DispatchWeights);
        self.finish(ExchangeKind::Dispatch);
        self.kernel(KernelKind::Experts, pass);
        self.exchange(ExchangeKind::Combine);
        self.kernel(KernelKind::Permute, pass);
    }

    fn backward(&mut self) {
        let pass = Pass::Backward;
        if self.model.is_moe(usize::from(self.site.layer)) {
            self.kernel(KernelKind::Permute, pass);
            self.start(ExchangeKind::Dispatch);
            self.shared_experts(pass);
            self.finish(ExchangeKind::Dispatch);
            self.kernel(KernelKind::Experts, pass);
            self.start(ExchangeKind::Combine);
            self.exchange(ExchangeKind::CombineWeights);
            self.finish(ExchangeKind::Combine);
            self.kernel(KernelKind::Router, pass);
            self.kernel(KernelKind::ExpertWeights, Pass::Weights);
        } else {
            self.kernel(KernelKind::DenseFfn, pass);
        }
        self.kernel(KernelKind::DenseWeights, Pass::Weights);
        self.kernel(KernelKind::Attention, pass);
        self.kernel(KernelKind::DenseWeights, Pass::Weights);
    }

    fn shared_experts(&mut self, pass: Pass) {
        if self.model.num_shared_experts > 0 {
            self.kernel(KernelKind::SharedExperts, pass);
        }
    }
}
