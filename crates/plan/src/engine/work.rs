//! What a rank does in a step, phase by phase of the engine's profile, as counts that a machine's rates turn into seconds.

use std::collections::BTreeMap;

use unisono_mesh::{ExpertPlacement, tree};

use super::EngineLayout;
use super::calls::FixedCalls;
use crate::dispatch::{Census, DispatchGroup, LayerCalls, Volume};
use crate::layout::Layout;
use crate::schedule::{Exchange, ExchangeKind, Kernel, KernelKind, Op, Pass};
use crate::shards::Shards;

/// Rows of a tile of the output head.
const HEAD_TILE: usize = 256;
/// What attention's backward multiplies for each product of its forward: five for two.
const ATTENTION_BACKWARD: f64 = 2.5;
/// Elements that AdamW reads and writes of each parameter: parameter, gradient and two moments, three written back.
const ADAMW_ELEMENTS: f64 = 7.0;

/// Which operands of a product are transposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ProductKind {
    /// Neither: a forward.
    Plain,
    /// The right one: a gradient of an input.
    TransposedRight,
    /// The left one: a gradient of a weight.
    TransposedLeft,
}

impl ProductKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Plain, Self::TransposedRight, Self::TransposedLeft];
}

/// Products of one shape: `[m, k]` times `[k, n]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Products {
    /// Which operands are transposed.
    pub kind: ProductKind,
    /// m, n and k.
    pub dims: [usize; 3],
    /// How many.
    pub count: f64,
}

/// What a phase does in a step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Work {
    /// Products with weights.
    pub products: Vec<Products>,
    /// Elements read and written besides, or received.
    pub elements: f64,
    /// Multiply-adds of attention scores and values.
    pub scores: f64,
    /// Kernels, or calls of collectives.
    pub calls: f64,
}

/// A phase of the engine's profile: whether it communicates, and its name. What no phase covers is `(false, "other")`.
pub type Phase = (bool, &'static str);

/// The phase of what the profile does not name.
pub const OTHER: Phase = (false, "other");

/// What a step works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepRows {
    /// Tokens of a slot in one accumulation turn.
    pub slot: usize,
    /// Tokens of a sequence.
    pub sequence: usize,
}

/// A step of rank 0 by phase, with balanced routing.
pub fn step_work(layout: &EngineLayout, rows: StepRows) -> BTreeMap<Phase, Work> {
    let walk = Walk::new(layout, rows);
    let mut phases: BTreeMap<Phase, Work> = BTreeMap::new();
    for op in layout.step.schedule(&layout.model).ranks.iter().flatten() {
        let (phase, work) = match op {
            Op::Kernel(kernel) => (kernel_phase(kernel.kind), walk.kernel(kernel)),
            Op::Start(exchange) => (exchange_phase(exchange.kind), walk.exchange(exchange)),
            _ => continue,
        };
        let sum = phases.entry(phase).or_default();
        sum.products.extend(work.products);
        sum.elements += work.elements;
        sum.scores += work.scores;
        sum.calls += work.calls;
    }
    let (between, other) = (walk.between_ops(), phases.entry(OTHER).or_default());
    other.elements += between.elements;
    other.calls += between.calls;
    phases
}

/// The phase of a kernel.
pub(super) fn kernel_phase(kind: KernelKind) -> Phase {
    (false, kind.name())
}

/// The engine's profile names fewer phases than the schedule has exchanges.
pub(super) fn exchange_phase(kind: ExchangeKind) -> Phase {
    match kind {
        ExchangeKind::DispatchWeights => (true, ExchangeKind::Dispatch.name()),
        ExchangeKind::CombineWeights => (true, ExchangeKind::Combine.name()),
        ExchangeKind::Times => OTHER,
        kind => (true, kind.name()),
    }
}

/// What the ops of a layout's step do on rank 0.
pub(super) struct Walk<'a> {
    engine: &'a EngineLayout,
    layout: Layout,
    shards: Shards,
    fixed: FixedCalls<'a>,
    group: DispatchGroup,
    census: Census,
    /// Rows of a wave, and its slots.
    rows: f64,
    slots: usize,
    /// Instances of a wave on the rank, and rows of each.
    instances: usize,
    instance_rows: usize,
    step: StepRows,
}

impl<'a> Walk<'a> {
    pub fn new(engine: &'a EngineLayout, step: StepRows) -> Self {
        let (model, fold) = (&engine.model, engine.fold);
        let placement = ExpertPlacement::new(fold, model.num_experts);
        let layout = Layout::new(model);
        let slots = fold.wave_slots();
        let has_experts = model.num_experts > 0;
        let group = engine.dispatch_groups(0).swap_remove(0);
        let census = Census::balanced(&group, engine.dispatch.chunks, step.slot, model.top_k);
        let chosen = fold.grid().expert_group * step.slot * model.top_k;
        Self {
            engine,
            shards: Shards::new(&layout, &placement, &fold),
            fixed: FixedCalls::new(engine, 0),
            layout,
            group,
            census,
            rows: (slots * step.slot) as f64,
            slots,
            instances: if has_experts { placement.instances(0..slots).len() } else { 0 },
            instance_rows: if has_experts { (chosen / model.num_experts).max(1) } else { 0 },
            step,
        }
    }

    /// Products of all rows of a wave with a weight `[inputs, outputs]`.
    fn forward(&self, inputs: usize, outputs: usize) -> Products {
        Products { kind: ProductKind::Plain, dims: [self.rows as usize, outputs, inputs], count: 1.0 }
    }

    fn input_gradient(&self, inputs: usize, outputs: usize) -> Products {
        Products {
            kind: ProductKind::TransposedRight,
            dims: [self.rows as usize, inputs, outputs],
            count: 1.0,
        }
    }

    /// One product a slot.
    fn weight_gradient(&self, inputs: usize, outputs: usize) -> Products {
        let dims = [inputs, outputs, self.step.slot];
        Products { kind: ProductKind::TransposedLeft, dims, count: self.slots as f64 }
    }

    pub fn kernel(&self, kernel: &Kernel) -> Work {
        let backward = kernel.pass == Pass::Backward;
        let unit = usize::from(kernel.site.layer);
        match kernel.kind {
            KernelKind::Embedding => self.streamed(2.0 * self.rows * self.d()),
            KernelKind::Attention => self.attention(backward),
            KernelKind::DenseFfn => {
                self.feed_forward(self.rows, self.engine.model.intermediate_size, backward)
            }
            // The schedule names them twice.
            KernelKind::SharedExperts => {
                self.feed_forward(0.5 * self.rows, self.engine.model.shared_width(), backward)
            }
            KernelKind::Router => self.router(backward),
            // The backward's is in the router's phase.
            KernelKind::Permute if backward => Work::default(),
            KernelKind::Permute => {
                self.streamed(0.5 * self.rows * self.d() * (self.engine.model.top_k as f64 + 3.0))
            }
            KernelKind::Experts => self.experts(backward),
            KernelKind::ExpertWeights => self.expert_weights(),
            KernelKind::DenseWeights => self.dense_weights(usize::from(kernel.site.layer)),
            KernelKind::Head => self.head(),
            KernelKind::JoinGradients => self.streamed(self.joined(unit)),
            KernelKind::GradientNorm => self.streamed(self.shards.owned_len(0) as f64),
            KernelKind::Optimizer => {
                self.streamed(ADAMW_ELEMENTS * self.shards.owned_of_unit(0, unit) as f64)
            }
        }
    }

    fn d(&self) -> f64 {
        self.engine.model.hidden_size as f64
    }

    fn streamed(&self, elements: f64) -> Work {
        Work { elements, calls: 1.0, ..Work::default() }
    }

    fn attention(&self, backward: bool) -> Work {
        let model = &self.engine.model;
        let (d, qkv) = (model.hidden_size, model.qkv_width());
        let heads = model.num_attention_heads * model.head_dim;
        let scores = self.rows * heads as f64 * (self.step.sequence + 1) as f64;
        let elements = |of_d: f64, of_qkv: f64| self.rows * (of_d * self.d() + of_qkv * qkv as f64);
        match backward {
            false => Work {
                products: vec![self.forward(d, qkv), self.forward(heads, d)],
                elements: elements(4.0, 4.0),
                scores,
                calls: 6.0,
            },
            true => Work {
                products: vec![self.input_gradient(heads, d), self.input_gradient(d, qkv)],
                elements: elements(6.0, 6.0),
                scores: ATTENTION_BACKWARD * scores,
                calls: 8.0,
            },
        }
    }

    /// A network over `rows` with `width` hidden values.
    fn feed_forward(&self, rows: f64, width: usize, backward: bool) -> Work {
        let d = self.engine.model.hidden_size;
        let of_rows = |products: Products| {
            let [_, n, k] = products.dims;
            Products { dims: [(rows as usize).max(1), n, k], ..products }
        };
        let elements = |of_width: f64| rows * (4.0 * self.d() + of_width * width as f64);
        match backward {
            false => Work {
                products: vec![of_rows(self.forward(d, 2 * width)), of_rows(self.forward(width, d))],
                elements: elements(3.0),
                scores: 0.0,
                calls: 2.0,
            },
            true => Work {
                products: vec![
                    of_rows(self.input_gradient(width, d)),
                    of_rows(self.input_gradient(d, 2 * width)),
                ],
                elements: elements(6.0),
                scores: 0.0,
                calls: 2.0,
            },
        }
    }

    fn router(&self, backward: bool) -> Work {
        let (d, experts) = (self.engine.model.hidden_size, self.engine.model.num_experts);
        let of = |elements: f64| self.rows * (elements * self.d() + 6.0 * experts as f64);
        match backward {
            false => {
                Work { products: vec![self.forward(d, experts)], elements: of(3.0), scores: 0.0, calls: 3.0 }
            }
            true => Work {
                products: vec![self.input_gradient(d, experts)],
                elements: of(8.0 + self.engine.model.top_k as f64),
                scores: 0.0,
                calls: 5.0,
            },
        }
    }

    fn experts(&self, backward: bool) -> Work {
        let (d, width) = (self.engine.model.hidden_size, self.engine.model.moe_intermediate_size);
        let (rows, count) = (self.instance_rows, self.instances as f64);
        let product = |kind, n, k| Products { kind, dims: [rows, n, k], count };
        let products = match backward {
            false => vec![product(ProductKind::Plain, 2 * width, d), product(ProductKind::Plain, d, width)],
            true => vec![
                product(ProductKind::TransposedRight, width, d),
                product(ProductKind::TransposedRight, d, 2 * width),
            ],
        };
        let of_width = if backward { 6.0 } else { 3.0 };
        let elements = rows as f64 * count * (2.0 * self.d() + of_width * width as f64);
        Work { products, elements, scores: 0.0, calls: count }
    }

    fn expert_weights(&self) -> Work {
        let (d, width) = (self.engine.model.hidden_size, self.engine.model.moe_intermediate_size);
        let block = self.engine.dispatch.row_block.min(self.instance_rows);
        let count = self.instances as f64 * self.instance_rows.div_ceil(block.max(1)) as f64;
        let product = |m, n| Products { kind: ProductKind::TransposedLeft, dims: [m, n, block], count };
        Work {
            products: vec![product(d, 2 * width), product(width, d)],
            elements: 2.0 * count * (3 * d * width) as f64,
            scores: 0.0,
            calls: count,
        }
    }

    /// Half of what a layer has: the schedule names them twice, for both halves of the layer.
    fn dense_weights(&self, layer: usize) -> Work {
        let model = &self.engine.model;
        let (d, heads) = (model.hidden_size, model.num_attention_heads * model.head_dim);
        let mut shapes = vec![(d, model.qkv_width()), (heads, d)];
        let width = if model.is_moe(layer) { model.shared_width() } else { model.intermediate_size };
        if width > 0 {
            shapes.extend([(d, 2 * width), (width, d)]);
        }
        if model.is_moe(layer) {
            shapes.push((d, model.num_experts));
        }
        let weights: usize = shapes.iter().map(|(inputs, outputs)| inputs * outputs).sum();
        let half = |(inputs, outputs)| Products {
            count: 0.5 * self.slots as f64,
            ..self.weight_gradient(inputs, outputs)
        };
        Work {
            elements: 2.0 * self.rows * self.d() + (weights * self.slots) as f64,
            calls: 0.5 * (self.slots * (shapes.len() + 2)) as f64,
            products: shapes.into_iter().map(half).collect(),
            scores: 0.0,
        }
    }

    fn head(&self) -> Work {
        let (d, vocab) = (self.engine.model.hidden_size, self.engine.model.vocab_size);
        let tile = HEAD_TILE.min(self.step.slot);
        let count = self.slots as f64 * self.step.slot as f64 / tile as f64;
        let product = |kind, dims| Products { kind, dims, count };
        Work {
            products: vec![
                product(ProductKind::TransposedRight, [tile, vocab, d]),
                product(ProductKind::Plain, [tile, d, vocab]),
                product(ProductKind::TransposedLeft, [vocab, d, tile]),
            ],
            elements: self.rows * (5 * vocab) as f64 + 8.0 * self.rows * self.d(),
            scores: 0.0,
            calls: count,
        }
    }

    /// Elements of a unit's sums over the slots and groups of a wave.
    fn joined(&self, unit: usize) -> f64 {
        let fold = &self.engine.fold;
        let dense = self.layout.unit_len(unit);
        let experts = self.layout.moe_layer_of(unit).map_or(0, |_| self.layout.expert_len());
        let (slots, groups) = (fold.slots_per_rank(), fold.slots_per_rank() / fold.grid().expert_group);
        let roots = tree::roots(fold.slots_of(0), fold.grid().slots()).len();
        let waves = self.engine.step.waves as f64;
        let sums = (slots - roots) as f64 * dense as f64 / waves;
        let of_experts = match groups {
            0 | 1 => 0.0,
            groups => ((groups - 1) * self.engine.model.num_experts * experts) as f64 / waves,
        };
        3.0 * (sums + of_experts)
    }

    /// What a step does that no op stands for.
    pub fn between_ops(&self) -> Work {
        let calls = (self.engine.step.waves * self.engine.step.turns * self.layout.units()) as f64;
        Work { elements: self.zeroed(), calls, ..Work::default() }
    }

    /// Elements of accumulators that a step begins with zeros.
    fn zeroed(&self) -> f64 {
        let experts =
            self.layout.expert_blocks() * self.layout.expert_len() / self.engine.model.num_experts.max(1);
        let a_wave = self.slots * self.layout.dense_len() + self.instances * experts;
        let turns = if self.engine.step.every_turn { self.engine.step.turns } else { 1 };
        (a_wave * self.engine.step.waves * turns) as f64
    }

    /// What the rank's own cores do in an exchange.
    pub fn exchange(&self, exchange: &Exchange) -> Work {
        let model = &self.engine.model;
        let of_layer = || {
            LayerCalls::new(&self.group, &self.census, &self.engine.dispatch, model.hidden_size, model.top_k)
        };
        let calls = match exchange.kind {
            ExchangeKind::DispatchCounts
            | ExchangeKind::Dispatch
            | ExchangeKind::DispatchWeights
            | ExchangeKind::Combine
            | ExchangeKind::CombineWeights => of_layer().of(exchange.kind),
            kind => self.fixed.of(kind, usize::from(exchange.site.layer)),
        };
        let received = |(_, volume): &(&str, Volume)| volume.received.iter().sum::<u64>() as f64 / 4.0;
        Work { elements: calls.iter().map(received).sum(), calls: calls.len() as f64, ..Work::default() }
    }
}
