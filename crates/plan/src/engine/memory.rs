//! What a rank needs of memory in a step, tensor by tensor.

use std::ops::Range;

use unisono_mesh::{ExpertPlacement, tree};

use super::EngineLayout;
use super::calls::FixedCalls;
use crate::layout::Layout;
use crate::model::ModelConfig;
use crate::shards::Shards;

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

/// Memory of one rank at its peak, in bytes: by part with even routing, and what uneven routing may add.
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
    /// The reduced gradient, and parameters and partial sums under way to other ranks.
    pub exchange: u64,
    /// What the rank needs beyond that when a new router sends it more rows than its even share.
    pub imbalance: u64,
}

impl MemoryEstimate {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.even() + self.imbalance
    }

    /// With even routing.
    pub fn even(&self) -> u64 {
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
            ("imbalance", self.imbalance),
        ]
    }
}

/// What one rank holds at every moment of a step.
#[derive(Debug, Clone)]
pub struct StepMemory {
    model: ModelConfig,
    kept: KeptActivations,
    /// Whether received rows wait in a buffer of arrival before they stand where experts read them.
    staged: bool,
    /// The most rows that a rank's experts receive at once, if there is a bound.
    most_rows: Option<usize>,
    /// Rows of the tokens of a wave.
    own: usize,
    /// Ranks that exchange rows.
    ranks: usize,
    /// Elements of moments.
    optimizer: usize,
    moments: Vec<Moment>,
}

/// What is there at one moment of a step besides the optimizer's moments, in elements.
#[derive(Debug, Clone, Copy, Default)]
struct Moment {
    parameters: usize,
    gradients: usize,
    exchange: usize,
    /// The unit whose backward runs, if one does.
    unit: Option<usize>,
}

impl StepMemory {
    /// The memory of each of `ranks`; a slot has `slot_rows` tokens in one accumulation step.
    pub fn of_ranks(layout: &EngineLayout, slot_rows: usize, ranks: Range<usize>) -> Vec<Self> {
        let calls = FixedCalls::new(layout, ranks.start);
        let units = 0..calls.shards().units();
        let gathered: Vec<Vec<usize>> = units.clone().map(|unit| calls.gather_staging(unit)).collect();
        let joined: Vec<Vec<usize>> = units.map(|unit| calls.reduce_staging(unit)).collect();
        let of_rank = |rank: usize| {
            let of = |staging: &[Vec<usize>]| staging.iter().map(|unit| unit[rank]).collect();
            let walk = Walk::new(layout, rank, calls.shards(), [of(&gathered), of(&joined)]);
            let most_rows = layout.dispatch.most_rows;
            Self {
                model: layout.model.clone(),
                kept: layout.step.kept,
                staged: layout.dispatch.staged(),
                most_rows: (most_rows > 0).then_some(most_rows),
                own: layout.fold.wave_slots() * slot_rows,
                ranks: layout.fold.dispatch_ranks(rank).len(),
                optimizer: 2 * walk.owned.iter().sum::<usize>(),
                moments: walk.moments(),
            }
        };
        ranks.map(of_rank).collect()
    }

    /// What is known before the first step.
    pub fn estimate(&self) -> MemoryEstimate {
        let (layers, even) = (self.model.moe_layers(), self.own * self.model.top_k);
        let copies = if self.staged { 2 } else { 1 };
        let fits = self.most_rows.is_none_or(|most| even * copies <= most);
        let even = self.peak(&vec![self.arrival(fits.then_some(even)); layers]);
        let early = self.peak(&vec![self.early_arrival(); layers]);
        MemoryEstimate { imbalance: early.even().saturating_sub(even.even()), ..even }
    }

    /// Bytes if the rank's experts receive `rows`, by MoE layer; none where rows come in rounds.
    pub fn with_rows(&self, rows: &[Option<usize>]) -> u64 {
        self.peak(&rows.iter().map(|rows| self.arrival(*rows)).collect::<Vec<_>>()).even()
    }

    /// The fullest moment.
    fn peak(&self, arrivals: &[Arrival]) -> MemoryEstimate {
        let bytes = |elements: usize| elements as u64 * 4;
        let at = |moment: &Moment| MemoryEstimate {
            parameters: bytes(moment.parameters),
            optimizer: bytes(self.optimizer),
            gradients: bytes(moment.gradients),
            activations: bytes(moment.unit.map_or(0, |unit| self.activations(unit, arrivals))),
            exchange: bytes(moment.exchange),
            imbalance: 0,
        };
        self.moments.iter().map(at).max_by_key(MemoryEstimate::even).unwrap_or_default()
    }

    /// `rows` received in a layer; none if they come in rounds, which keep none of them.
    fn arrival(&self, rows: Option<usize>) -> Arrival {
        match rows {
            Some(rows) => Arrival { kept: rows, at_once: rows, in_rounds: false },
            None => Arrival { kept: 0, at_once: self.most_rows.unwrap_or(0), in_rounds: true },
        }
    }

    /// What a new router may send. Under a bound some layers may keep as much as it allows while others take rounds.
    fn early_arrival(&self) -> Arrival {
        let own = self.own * self.model.top_k;
        match self.most_rows {
            Some(most) => {
                let most = most.min(own * self.ranks);
                Arrival { kept: most, at_once: most, in_rounds: true }
            }
            None => self.arrival(Some((own as f64 * early_imbalance(&self.model, self.ranks)) as usize)),
        }
    }

    /// Activations while the backward of `unit` runs.
    fn activations(&self, unit: usize, arrivals: &[Arrival]) -> usize {
        let Self { model, kept, .. } = self;
        let dense_layers = model.num_hidden_layers - arrivals.len();
        let arrival =
            |layer: usize| layer.checked_sub(dense_layers).map_or(Arrival::default(), |at| arrivals[at]);
        let keep = |layer: usize, kept| {
            let routed = match kept {
                KeptActivations::LayerInputs => 0,
                _ => arrival(layer).kept * (model.hidden_size + 2 * model.moe_intermediate_size),
            };
            self.own * kept_width(model, layer, kept) + routed
        };
        let sum: usize = (0..unit.min(model.num_hidden_layers)).map(|layer| keep(layer, *kept)).sum();
        if unit > model.num_hidden_layers {
            return sum + self.own * 4 * model.hidden_size;
        }
        let again = match kept {
            KeptActivations::LayerInputs => keep(unit - 1, KeptActivations::All),
            _ => 0,
        };
        sum + again + self.temporary(unit - 1, arrival(unit - 1))
    }

    /// Elements of the largest set of temporary tensors in the backward of layer `layer`.
    fn temporary(&self, layer: usize, arrival: Arrival) -> usize {
        let (model, own) = (&self.model, self.own);
        let (d, qkv) = (model.hidden_size, model.qkv_width());
        let query_width = model.num_attention_heads * model.head_dim;
        let attention = own * (4 * d + 3 * qkv + query_width);
        if !model.is_moe(layer) {
            return attention.max(own * (4 * d + model.intermediate_size));
        }
        let width = model.top_k * d + 5 * d + model.shared_width() + model.num_experts;
        let staged = if self.staged { d } else { 0 };
        let routed = arrival.at_once * (2 * d + model.moe_intermediate_size + staged);
        // Rounds keep nothing, so they bring inputs and gradients, and compute hidden products again.
        let rounds = match arrival.in_rounds {
            false => 0,
            true => {
                let again = 2 * d + 2 * model.moe_intermediate_size;
                own * 2 * model.top_k * d + arrival.at_once * again
            }
        };
        attention.max(own * width + routed + rounds)
    }
}

/// Rows that a rank's experts receive in a layer.
#[derive(Debug, Clone, Copy, Default)]
struct Arrival {
    /// Those that are kept for the backward.
    kept: usize,
    /// Those that are there at the same time.
    at_once: usize,
    in_rounds: bool,
}

/// A step's moments, unit by unit through the backward of every wave.
struct Walk<'a> {
    layout: &'a EngineLayout,
    units: Layout,
    placement: ExpertPlacement,
    rank: usize,
    /// `[unit]` elements whose states the rank owns.
    owned: Vec<usize>,
    /// `[unit]` elements that the rank passes on inside its node while the unit is gathered.
    gathered: Vec<usize>,
    /// `[unit]` elements that the rank joins for other nodes while the unit's gradients are reduced.
    joined: Vec<usize>,
    /// Elements of updated parameters that leave the rank at once.
    sent: usize,
}

impl<'a> Walk<'a> {
    fn new(layout: &'a EngineLayout, rank: usize, shards: &Shards, staging: [Vec<usize>; 2]) -> Self {
        let [gathered, joined] = staging;
        let shared = shards.segments.iter().filter(|segment| segment.is_shared());
        Self {
            layout,
            units: Layout::new(&layout.model),
            placement: ExpertPlacement::new(layout.fold, layout.model.num_experts),
            rank,
            owned: (0..shards.units()).map(|unit| shards.owned_of_unit(rank, unit)).collect(),
            gathered,
            joined,
            sent: shared.map(|segment| segment.shards[rank].len()).sum(),
        }
    }

    /// Dense elements of a unit, once for each of `dense`, and expert blocks of an MoE layer.
    fn unit(&self, unit: usize, dense: usize, blocks: usize) -> usize {
        let experts = self.units.moe_layer_of(unit).map_or(0, |_| blocks * self.units.expert_len());
        dense * self.units.unit_len(unit) + experts
    }

    /// A unit's parameters on this rank.
    fn whole(&self, unit: usize) -> usize {
        let experts =
            if self.units.num_experts() == 0 { 0 } else { self.placement.experts_of(self.rank).len() };
        self.unit(unit, 1, experts)
    }

    /// Whole units, or this rank's shards with the units in use while the backward of `unit` runs and the one that is on its
    /// way.
    fn parameters(&self, unit: Option<usize>) -> usize {
        if self.layout.step.zero < 3 {
            return (0..self.units.units()).map(|unit| self.whole(unit)).sum();
        }
        let shards = self.owned.iter().sum();
        let Some(unit) = unit else { return shards };
        let table =
            Some(self.units.table_unit()).filter(|table| unit == self.units.head_unit() && *table != unit);
        let coming = Some(unit - 1).filter(|coming| self.layout.step.overlap && *coming != Layout::EMBED);
        let staged = coming.map_or(0, |coming| self.gathered[coming]);
        let in_use = [Some(unit), table, coming].into_iter().flatten();
        shards + staged + in_use.map(|unit| self.whole(unit)).sum::<usize>()
    }

    fn moments(&self) -> Vec<Moment> {
        let (step, units) = (&self.layout.step, 0..self.units.units());
        let waves = self.layout.fold.waves(self.rank);
        let owned: usize = self.owned.iter().sum();
        let summed = if step.every_turn && step.turns > 1 { owned } else { 0 };
        let mut moments = Vec::new();
        for (index, wave) in waves.iter().enumerate() {
            let last = index + 1 == waves.len();
            for unit in units.clone().rev() {
                moments.push(self.backward(waves[0].start, wave, last, unit, summed));
            }
        }
        let parameters = self.parameters(None);
        if let (1, Some(wave)) = (step.zero, waves.last()) {
            let gradients = units.map(|unit| self.roots_after(waves[0].start, wave, unit)).sum();
            let exchange = owned + summed + self.joined.iter().sum::<usize>();
            moments.push(Moment { parameters, gradients, exchange, unit: None });
        }
        let gathers = if step.zero < 3 { self.sent + self.gathered.iter().sum::<usize>() } else { 0 };
        moments.push(Moment { parameters, gradients: 0, exchange: owned + summed.max(gathers), unit: None });
        moments
    }

    /// While the backward of `unit` runs in `wave`.
    fn backward(&self, first: usize, wave: &Range<usize>, last: bool, unit: usize, summed: usize) -> Moment {
        let step = &self.layout.step;
        let units = self.units.units();
        let accumulators = |u: usize| self.unit(u, wave.len(), self.instances(wave));
        // Units behind this one are joined, and with ZeRO-2 let go when they are reduced; those before it wait with what
        // earlier waves left.
        let sharded = step.zero >= 2 && last;
        let under_way = if step.overlap { step.reduce_stages } else { 0 };
        let behind = unit + 1..if sharded { (unit + 1 + under_way).min(units) } else { units };
        let mut gradients: usize = behind.clone().map(|u| self.roots_after(first, wave, u)).sum();
        gradients += (0..=unit).map(|u| self.roots(first..wave.start, u)).sum::<usize>();
        let waits_for_turns = step.turns > 1 && !step.every_turn;
        gradients += match waits_for_turns {
            true => (0..=unit).map(accumulators).sum(),
            false => accumulators(unit),
        };
        let early_table = self.units.table_unit();
        if early_table < unit && !waits_for_turns {
            gradients += accumulators(early_table);
        }
        let exchange = match sharded {
            true => {
                let moving = unit..if summed > 0 { behind.end } else { units };
                self.owned[moving].iter().sum::<usize>() + self.joined[behind].iter().sum::<usize>()
            }
            false => 0,
        };
        // The embedding's backward needs no parameters, and nothing is kept any more.
        let unit = Some(unit).filter(|unit| *unit != Layout::EMBED);
        Moment { parameters: self.parameters(unit), gradients, exchange: summed + exchange, unit }
    }

    fn instances(&self, wave: &Range<usize>) -> usize {
        if self.units.num_experts() == 0 { 0 } else { self.placement.instances(wave.clone()).len() }
    }

    /// What a unit's gradients of the waves up to `wave` are once they are joined.
    fn roots_after(&self, first: usize, wave: &Range<usize>, unit: usize) -> usize {
        if wave.len() == self.layout.fold.slots_per_rank() {
            return self.unit(unit, wave.len(), self.instances(wave));
        }
        self.roots(first..wave.end, unit)
    }

    fn roots(&self, slots: Range<usize>, unit: usize) -> usize {
        let grid = self.layout.fold.grid();
        let width = grid.expert_group;
        let groups = tree::roots(slots.start / width..slots.end / width, grid.groups()).len();
        self.unit(unit, tree::roots(slots, grid.slots()).len(), groups * self.units.num_experts())
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
