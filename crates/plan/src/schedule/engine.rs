//! What the engine runs today: data and expert parallel ranks without a pipeline, layer by layer.
//!
//! Parameters and gradients move in *units*: the embedding, each layer, the final norm with the head. An exchange's
//! [`Site`] names the unit as its layer.

use std::collections::VecDeque;

use super::{Exchange, ExchangeKind, Kernel, KernelKind, Op, Pass, Schedule, Site};
use crate::engine::KeptActivations;
use crate::layout::Layout;
use crate::model::ModelConfig;

/// How the engine lays a step out; every rank of a run has the same list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineStep {
    /// Waves of slots that a rank runs one after the other (`Fold::waves`).
    pub waves: usize,
    /// Accumulation turns.
    pub turns: usize,
    /// Which activations are kept.
    pub kept: KeptActivations,
    /// What is in shards: 1 optimizer states, 2 gradients too, 3 parameters too.
    pub zero: usize,
    /// Whether gathers and reductions run ahead while units compute.
    pub overlap: bool,
    /// Whether gradients are joined after every turn instead of once a step.
    pub every_turn: bool,
    /// Exchanges of a reduction that follow each other: 2 where it is hierarchical over several nodes, else 1.
    pub reduce_stages: usize,
}

impl EngineStep {
    /// The ops of the step.
    pub fn schedule(&self, model: &ModelConfig) -> Schedule {
        let layout = Layout::new(model);
        let mut list = List {
            model,
            layout: &layout,
            step: *self,
            site: Site::default(),
            coming: None,
            unreduced: Vec::new(),
            under_way: VecDeque::new(),
            ops: Vec::new(),
        };
        list.exchange(ExchangeKind::Targets);
        for (wave, turn) in self.passes() {
            list.site = Site { layer: 0, wave: wave as u16, turn: turn as u32 };
            let last_wave = wave + 1 == self.waves;
            let completes = self.every_turn || turn + 1 == self.turns;
            list.pass(completes, last_wave);
            if completes && last_wave {
                list.reduce();
            }
        }
        list.site = Site::default();
        list.end();
        Schedule { micro_batches: 0, placement: Vec::new(), ranks: vec![list.ops] }
    }

    /// Which pass of the step, in order, is at `site`.
    pub fn pass_at(&self, site: Site) -> usize {
        let (wave, turn) = (usize::from(site.wave), site.turn as usize);
        if self.every_turn { turn * self.waves + wave } else { wave * self.turns + turn }
    }

    /// The wave that pass `pass` runs.
    pub fn wave_of(&self, pass: usize) -> usize {
        if self.every_turn { pass % self.waves } else { pass / self.turns }
    }

    /// `(wave, turn)` in order: turns run inside waves unless each is joined.
    fn passes(&self) -> Vec<(usize, usize)> {
        let (waves, turns) = (self.waves, self.turns);
        if self.every_turn {
            (0..turns).flat_map(|turn| (0..waves).map(move |wave| (wave, turn))).collect()
        } else {
            (0..waves).flat_map(|wave| (0..turns).map(move |turn| (wave, turn))).collect()
        }
    }
}

struct List<'a> {
    model: &'a ModelConfig,
    layout: &'a Layout,
    step: EngineStep,
    site: Site,
    /// The unit whose parameters are on their way.
    coming: Option<usize>,
    /// Units whose gradients are joined and not yet on their way.
    unreduced: Vec<usize>,
    /// Reductions that are.
    under_way: VecDeque<Exchange>,
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

    fn of_unit(&self, kind: ExchangeKind, unit: usize) -> Exchange {
        Exchange { kind, site: Site { layer: unit as u16, ..self.site } }
    }

    /// Gets the parameters of a unit and, where gathers run ahead, asks for those of `next`.
    fn unit(&mut self, unit: usize, next: Option<usize>) {
        if self.step.zero < 3 {
            return;
        }
        let gather = self.of_unit(ExchangeKind::GatherParameters, unit);
        if self.coming.take() != Some(unit) {
            self.ops.push(Op::Start(gather));
        }
        self.ops.push(Op::Finish(gather));
        if let Some(next) = next.filter(|_| self.step.overlap) {
            self.ops.push(Op::Start(self.of_unit(ExchangeKind::GatherParameters, next)));
            self.coming = Some(next);
        }
    }

    /// A unit has all gradients of the pass.
    fn ready(&mut self, unit: usize, completes: bool, last_wave: bool) {
        if !completes {
            return;
        }
        let site = Site { layer: unit as u16, ..self.site };
        let join = Kernel { kind: KernelKind::JoinGradients, pass: Pass::Weights, site };
        self.ops.push(Op::Kernel(join));
        self.unreduced.push(unit);
        if self.step.zero < 2 || !last_wave {
            return;
        }
        let most = if self.step.overlap { self.step.reduce_stages } else { 0 };
        while self.under_way.len() >= most.max(1) {
            self.finish_oldest();
        }
        self.start_reduction(unit);
        if most == 0 {
            self.finish_oldest();
        }
    }

    fn start_reduction(&mut self, unit: usize) {
        let reduce = self.of_unit(ExchangeKind::ReduceGradients, unit);
        self.unreduced.retain(|other| *other != unit);
        self.under_way.push_back(reduce);
        self.ops.push(Op::Start(reduce));
    }

    fn finish_oldest(&mut self) {
        self.ops.extend(self.under_way.pop_front().map(Op::Finish));
    }

    /// Reduces what is not on its way yet, and waits for all.
    fn reduce(&mut self) {
        self.unreduced.sort_unstable();
        self.unreduced.dedup();
        for unit in self.unreduced.clone() {
            self.start_reduction(unit);
        }
        while !self.under_way.is_empty() {
            self.finish_oldest();
        }
    }

    /// Losses, the norm, the update, and the new parameters where every rank keeps them whole.
    fn end(&mut self) {
        self.exchange(ExchangeKind::Losses);
        self.kernel(KernelKind::GradientNorm, Pass::Update);
        self.exchange(ExchangeKind::GradientNorm);
        let gathers = (0..self.layout.units()).map(|unit| self.of_unit(ExchangeKind::GatherParameters, unit));
        let gathers: Vec<Exchange> = gathers.collect();
        for gather in &gathers {
            let update = Kernel { kind: KernelKind::Optimizer, pass: Pass::Update, site: gather.site };
            self.ops.push(Op::Kernel(update));
            if self.step.zero < 3 {
                self.ops.push(Op::Start(*gather));
            }
        }
        if self.step.zero < 3 {
            self.ops.extend(gathers.into_iter().map(Op::Finish));
        }
        self.exchange(ExchangeKind::Times);
    }

    /// Forward and backward of one wave in one accumulation turn.
    fn pass(&mut self, completes: bool, last_wave: bool) {
        let layers = self.model.num_hidden_layers;
        let (head, table) = (self.layout.head_unit(), self.layout.table_unit());
        self.unit(Layout::EMBED, Some(1));
        self.kernel(KernelKind::Embedding, Pass::Forward);
        for layer in 0..layers {
            let unit = Layout::layer_unit(layer);
            self.unit(unit, Some(unit + 1));
            self.site.layer = layer as u16;
            self.forward(Pass::Forward);
        }
        if head != table {
            self.unit(head, Some(table));
        }
        self.unit(table, Some(head - 1));
        self.kernel(KernelKind::Head, Pass::Backward);
        self.ready(head, completes, last_wave);
        for layer in (0..layers).rev() {
            let unit = Layout::layer_unit(layer);
            self.unit(unit, (layer > 0).then(|| unit - 1));
            self.site.layer = layer as u16;
            if self.step.kept == KeptActivations::LayerInputs {
                self.forward(Pass::Again);
            }
            self.backward();
            self.ready(unit, completes, last_wave);
        }
        self.site.layer = 0;
        self.kernel(KernelKind::Embedding, Pass::Weights);
        self.ready(Layout::EMBED, completes, last_wave);
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
        self.experts(pass);
        self.kernel(KernelKind::Permute, pass);
    }

    fn backward(&mut self) {
        let pass = Pass::Backward;
        if self.model.is_moe(usize::from(self.site.layer)) {
            self.kernel(KernelKind::Permute, pass);
            self.experts(pass);
            self.kernel(KernelKind::Router, pass);
            self.kernel(KernelKind::ExpertWeights, Pass::Weights);
        } else {
            self.kernel(KernelKind::DenseFfn, pass);
        }
        self.kernel(KernelKind::DenseWeights, Pass::Weights);
        self.kernel(KernelKind::Attention, pass);
        self.kernel(KernelKind::DenseWeights, Pass::Weights);
    }

    /// Rows to their experts and results back; half of the shared experts runs beside either way, if exchanges run ahead. Rows that
    /// travel in rounds, under a bound, are waited for.
    fn experts(&mut self, pass: Pass) {
        let ahead = self.step.overlap;
        let forward = pass != Pass::Backward;
        if ahead {
            self.start(ExchangeKind::Dispatch);
        }
        if forward {
            self.start(ExchangeKind::DispatchWeights);
        }
        self.half_of_shared_experts(pass);
        if forward {
            self.finish(ExchangeKind::DispatchWeights);
        }
        if !ahead {
            self.start(ExchangeKind::Dispatch);
        }
        self.finish(ExchangeKind::Dispatch);
        self.kernel(KernelKind::Experts, pass);
        self.start(ExchangeKind::Combine);
        if !ahead {
            self.finish(ExchangeKind::Combine);
        }
        if !forward {
            self.start(ExchangeKind::CombineWeights);
        }
        self.half_of_shared_experts(pass);
        if ahead {
            self.finish(ExchangeKind::Combine);
        }
        if !forward {
            self.finish(ExchangeKind::CombineWeights);
        }
    }

    fn half_of_shared_experts(&mut self, pass: Pass) {
        if self.model.num_shared_experts > 0 {
            self.kernel(KernelKind::SharedExperts, pass);
        }
    }
}
