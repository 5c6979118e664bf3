//! What a rank needs of memory, tensor by tensor.

use std::ops::Range;

use unisono_mesh::{ExpertPlacement, Fold, tree};

use crate::layout::Layout;
use crate::model::ModelConfig;

/// Standard deviations above the mean that a normal variable exceeds once in a hundred.
const PERCENTILE_99: f64 = 2.326;

/// Which activations are kept; see the engine's option of the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeptActivations {
    /// All.
    All,
    /// Those that cost a product.
    Products,
    /// Each layer's input.
    LayerInputs,
}

/// What a step works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepShape {
    /// Rows of one slot in one accumulation step.
    pub slot_rows: usize,
    /// Which activations are kept.
    pub kept: KeptActivations,
    /// The most rows that a rank's experts receive in a layer; what early routing sends them if there is no bound.
    pub most_rows: Option<usize>,
    /// Whether received rows wait in a buffer of arrival before they stand where experts read them.
    pub staged: bool,
}

/// What a rank keeps of parameters, gradients and moments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateShape {
    /// 1: moments in shards; 2: gradients too; 3: parameters too.
    pub zero: usize,
    /// Accumulation steps.
    pub turns: usize,
    /// Whether gradients are joined after every accumulation step.
    pub every_turn: bool,
    /// Units whose reduction runs while others compute.
    pub under_way: usize,
    /// Whether the next unit's parameters are on their way while one computes.
    pub ahead: bool,
    /// `[unit]` elements whose states the rank owns.
    pub owned: Vec<usize>,
    /// Elements of updated parameters that leave the rank at once.
    pub sent: usize,
}

/// Memory of one rank at its peak, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Parameters that the rank computes with; with ZeRO-3 its shards, and the units that are gathered at once.
    pub parameters: u64,
    /// Moments of the rank's shard.
    pub optimizer: u64,
    /// Gradient accumulators of the slots that run together, and partial sums that wait in the tree.
    pub gradients: u64,
    /// Activations kept for the backward, and the largest set of temporary ones.
    pub activations: u64,
    /// The reduced gradient, and parameters under way to other ranks.
    pub exchange: u64,
}

impl MemoryEstimate {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.parameters + self.optimizer + self.gradients + self.activations + self.exchange
    }

    /// By name.
    pub fn parts(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("parameters", self.parameters),
            ("optimizer", self.optimizer),
            ("gradients", self.gradients),
            ("activations", self.activations),
            ("exchange", self.exchange),
        ]
    }

    /// The estimate for `rank`, with the uneven routing of a new router. Buffers are rounded up to an eighth of a power of
    /// two, which is a twentieth on average.
    pub fn new(model: &ModelConfig, fold: &Fold, rank: usize, step: StepShape, states: &StateShape) -> Self {
        let walk = Walk::new(model, fold, rank, step, states);
        let owned: usize = states.owned.iter().sum();
        let floats = |elements: usize| (elements as u64 * 4) / 20 * 21;
        let peak = walk.moments().into_iter().max_by_key(Moment::total).unwrap_or_default();
        Self {
            parameters: floats(walk.parameters(owned)),
            optimizer: floats(2 * owned),
            gradients: floats(peak.gradients),
            activations: floats(peak.activations),
            exchange: floats(peak.exchange),
        }
    }
}

/// What is there at one moment of a step besides parameters and moments, in elements.
#[derive(Debug, Clone, Copy, Default)]
struct Moment {
    gradients: usize,
    activations: usize,
    exchange: usize,
}

impl Moment {
    fn total(&self) -> usize {
        self.gradients + self.activations + self.exchange
    }
}

/// A step's moments, unit by unit through the backward of every wave.
struct Walk<'a> {
    model: &'a ModelConfig,
    layout: Layout,
    fold: &'a Fold,
    placement: ExpertPlacement,
    rank: usize,
    step: StepShape,
    states: &'a StateShape,
}

impl<'a> Walk<'a> {
    fn new(
        model: &'a ModelConfig,
        fold: &'a Fold,
        rank: usize,
        step: StepShape,
        states: &'a StateShape,
    ) -> Self {
        let placement = ExpertPlacement::new(*fold, model.num_experts);
        Self { model, layout: Layout::new(model), fold, placement, rank, step, states }
    }

    /// Dense elements of a unit, once for each of `dense`, and expert blocks of an MoE layer.
    fn unit(&self, unit: usize, dense: usize, blocks: usize) -> usize {
        let experts = self.layout.moe_layer_of(unit).map_or(0, |_| blocks * self.layout.expert_len());
        dense * self.layout.unit_len(unit) + experts
    }

    /// Whole units, or this rank's shards with the unit in use and the one that is on its way.
    fn parameters(&self, owned: usize) -> usize {
        let held = if self.model.num_experts == 0 { 0 } else { self.placement.experts_of(self.rank).len() };
        let whole: Vec<usize> = (0..self.layout.units()).map(|unit| self.unit(unit, 1, held)).collect();
        if self.states.zero < 3 {
            return whole.iter().sum();
        }
        let at_once = if self.states.ahead { 2 } else { 1 };
        owned + whole.windows(at_once).map(|units| units.iter().sum()).max().unwrap_or(0)
    }

    fn moments(&self) -> Vec<Moment> {
        let waves = self.fold.waves(self.rank);
        let owned: usize = self.states.owned.iter().sum();
        let summed = if self.states.every_turn && self.states.turns > 1 { owned } else { 0 };
        let mut moments = Vec::new();
        for (index, wave) in waves.iter().enumerate() {
            let last = index + 1 == waves.len();
            for unit in (1..self.layout.units()).rev() {
                moments.push(self.backward(waves[0].start, wave, last, unit, summed));
            }
        }
        let all_roots: usize = match (self.states.zero, waves.last()) {
            (1, Some(wave)) => (0..self.layout.units()).map(|u| self.joined(waves[0].start, wave, u)).sum(),
            _ => 0,
        };
        moments.push(Moment { gradients: all_roots, activations: 0, exchange: owned + summed });
        moments.push(Moment { gradients: 0, activations: 0, exchange: owned + self.states.sent });
        moments
    }

    /// While the backward of `unit` runs in `wave`.
    fn backward(&self, first: usize, wave: &Range<usize>, last: bool, unit: usize, summed: usize) -> Moment {
        let StateShape { zero, turns, every_turn, under_way, owned, .. } = self.states;
        let units = self.layout.units();
        let accumulators = |u: usize| self.unit(u, wave.len(), self.instances(wave));
        // Units behind this one are joined; those before it wait with what earlier waves left.
        let sharded = *zero >= 2 && last;
        let kept = if sharded { (unit + 1 + under_way).min(units) } else { units };
        let mut gradients: usize = (unit + 1..kept).map(|u| self.joined(first, wave, u)).sum();
        gradients += (0..=unit).map(|u| self.left_before(first, wave, u)).sum::<usize>();
        let waits_for_turns = *turns > 1 && !every_turn;
        gradients += match waits_for_turns {
            true => (0..=unit).map(accumulators).sum(),
            false => accumulators(unit),
        };
        let early_table = self.layout.table_unit();
        if early_table < unit && !waits_for_turns {
            gradients += accumulators(early_table);
        }
        let moving = if !sharded {
            0..0
        } else if summed > 0 {
            unit..kept
        } else {
            unit..units
        };
        let exchange = summed + owned[moving].iter().sum::<usize>();
        Moment { gradients, activations: self.activations(wave.len() * self.step.slot_rows, unit), exchange }
    }

    fn instances(&self, wave: &Range<usize>) -> usize {
        if self.model.num_experts == 0 { 0 } else { self.placement.instances(wave.clone()).len() }
    }

    /// What a unit's gradients of the waves up to `wave` are once they are joined.
    fn joined(&self, first: usize, wave: &Range<usize>, unit: usize) -> usize {
        if wave.len() == self.fold.slots_per_rank() {
            return self.unit(unit, wave.len(), self.instances(wave));
        }
        self.roots(first..wave.end, unit)
    }

    /// What earlier waves left of a unit.
    fn left_before(&self, first: usize, wave: &Range<usize>, unit: usize) -> usize {
        self.roots(first..wave.start, unit)
    }

    fn roots(&self, slots: Range<usize>, unit: usize) -> usize {
        let (grid, width) = (self.fold.grid(), self.fold.grid().expert_group);
        let groups = tree::roots(slots.start / width..slots.end / width, grid.groups()).len();
        self.unit(unit, tree::roots(slots, grid.slots()).len(), groups * self.model.num_experts)
    }

    /// Activations of `own` rows while the backward of `unit` runs.
    fn activations(&self, own: usize, unit: usize) -> usize {
        let (model, step) = (self.model, self.step);
        let everybody = own * self.fold.dispatch_ranks(self.rank).len() * model.top_k;
        let imbalance = early_imbalance(model, self.fold.dispatch_ranks(self.rank).len());
        let received = match step.most_rows {
            Some(most) => most.min(everybody),
            None => ((own * model.top_k) as f64 * imbalance) as usize,
        };
        let rows = Rows { own, received };
        let behind = unit.min(model.num_hidden_layers);
        let sum: usize = (0..behind).map(|layer| kept(model, layer, rows, step.kept)).sum();
        if unit > model.num_hidden_layers {
            return sum + own * 4 * model.hidden_size;
        }
        let again = match step.kept {
            KeptActivations::LayerInputs => kept(model, unit - 1, rows, KeptActivations::All),
            _ => 0,
        };
        sum + again + temporary(model, unit - 1, rows, step)
    }
}

/// How many times the even share of rows a rank of `ranks` receives while a new router finds its balance: in some of the first
/// hundred steps nearly all tokens agree on few experts. Where those are `2 top_k` of `E`, an expert's load has the relative
/// variance `E / (2 top_k) - 1`, the mean over the `E / ranks` experts of a rank about `(ranks - 1) / E` of it. This is the 99th
/// percentile of that, as befits the fullest of a hundred steps, and at most all rows there are.
fn early_imbalance(model: &ModelConfig, ranks: usize) -> f64 {
    if model.force_balance || model.num_experts == 0 || ranks < 2 {
        return 1.0;
    }
    let [experts, top_k, ranks] = [model.num_experts, model.top_k, ranks].map(|count| count as f64);
    let variance = (experts / (2.0 * top_k) - 1.0).max(0.0);
    (1.0 + PERCENTILE_99 * (variance * (ranks - 1.0) / experts).sqrt()).min(ranks)
}

/// Rows of a wave on one rank: its own tokens, and what its experts receive in a layer.
#[derive(Clone, Copy)]
struct Rows {
    own: usize,
    received: usize,
}

/// Elements that layer `layer` keeps for its backward.
fn kept(model: &ModelConfig, layer: usize, rows: Rows, kept: KeptActivations) -> usize {
    let routed = match kept {
        KeptActivations::LayerInputs => 0,
        _ if !model.is_moe(layer) => 0,
        _ => rows.received * (model.hidden_size + 2 * model.moe_intermediate_size),
    };
    rows.own * kept_width(model, layer, kept) + routed
}

/// Elements a row of its own that layer `layer` keeps for its backward.
fn kept_width(model: &ModelConfig, layer: usize, kept: KeptActivations) -> usize {
    let (d, qkv) = (model.hidden_size, model.qkv_width());
    if kept == KeptActivations::LayerInputs {
        return d;
    }
    let all = kept == KeptActivations::All;
    let heads = model.num_attention_heads;
    let query_width = heads * model.head_dim;
    let head_norm = if model.qk_norm { qkv + heads + model.num_key_value_heads } else { 0 };
    let placed = if all || !model.qk_norm { qkv } else { 0 };
    let normed = if all { 2 * d } else { 0 };
    let attention = d + 1 + head_norm + placed + query_width + heads;
    let ffn = match model.is_moe(layer) {
        false => 2 * model.intermediate_size,
        true => {
            // Routing tables and row weights are words of the same size as an element.
            let tables = 5 * model.top_k + model.num_experts;
            2 * model.shared_width() + tables
        }
    };
    attention + d + 1 + normed + ffn
}

/// Elements of the largest set of temporary tensors in the backward of layer `layer`.
fn temporary(model: &ModelConfig, layer: usize, rows: Rows, step: StepShape) -> usize {
    let (d, qkv) = (model.hidden_size, model.qkv_width());
    let query_width = model.num_attention_heads * model.head_dim;
    let attention = rows.own * (4 * d + 3 * qkv + query_width);
    let ffn = match model.is_moe(layer) {
        false => rows.own * (4 * d + model.intermediate_size),
        true => {
            let own = model.top_k * d + 5 * d + model.shared_width() + model.num_experts;
            let staged = if step.staged { d } else { 0 };
            let routed = rows.received * (2 * d + model.moe_intermediate_size + staged);
            // Rounds keep nothing, so they bring inputs and gradients, and compute hidden products again.
            let rounds = match step.most_rows {
                None => 0,
                Some(_) => {
                    let again = 2 * d + 2 * model.moe_intermediate_size;
                    rows.own * 2 * model.top_k * d + rows.received * again
                }
            };
            rows.own * own + routed + rounds
        }
    };
    attention.max(ffn)
}
