//! What a step of a layout costs: seconds by what they are spent on, bytes by rank, how sure we are.
//!
//! [`Pricer`] holds what does not depend on the layout; [`Pricer::price`] is closed-form arithmetic over the distinct kinds of layers
//! and the ranks of the pipeline, so that a search can afford it for every layout. Nothing is remembered between layouts.

mod links;
mod parts;
mod pipeline;
mod rates;
mod simulated;
mod stages;
mod states;
mod terms;
mod traffic;
mod work;

use crate::architecture::{Architecture, LayerKind};
use crate::calibration::{Calibration, MEMORY_BAND};
use crate::hardware::{Cluster, Gpu};
use crate::kernels::Kernel;
use crate::parallelism::{Parallelism, ParallelismError, Routing, Training};
use crate::ranged::Ranged;
use crate::rank_memory::RankMemory;
use crate::unevenness::{Percentiles, Unevenness};

pub use links::Communication;
pub use parts::PartTerms;
pub use simulated::SimulatedStep;
pub use terms::{BubbleTerms, ExchangeTerms, IntervalTerms, KernelTerms, OverheadTerms};
pub use traffic::{Axis, Traffic};
pub use work::{Passes, Work};

use rates::Rates;
pub(crate) use stages::{MOST_KINDS, Share, Stages};
pub(crate) use states::RankParameters;
use work::Sizes;

/// Standard normal quantile of 90%: an 80% interval lies between the negative and the positive.
pub(crate) const QUANTILE_90: f64 = 1.2816;

/// Seconds of a step on the slowest pipeline rank. They add up to [`Priced::step_s`]; hidden communication does not count.
/// [`Pricer::ranged_parts`] says how sure each is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Breakdown {
    /// Products.
    pub gemm_s: f64,
    /// Products of experts.
    pub grouped_s: f64,
    /// Attention and scans.
    pub attention_s: f64,
    /// Kernels bound by memory.
    pub memory_s: f64,
    /// Waiting for the host to launch kernels.
    pub host_s: f64,
    /// Tensor-parallel communication that nothing hides.
    pub tensor_s: f64,
    /// Context-parallel communication that nothing hides.
    pub context_s: f64,
    /// Dispatch and combine that nothing hides.
    pub expert_s: f64,
    /// Messages between pipeline stages that nothing hides.
    pub pipeline_s: f64,
    /// Waiting for other stages.
    pub bubble_s: f64,
    /// Gradient and parameter traffic that nothing hides.
    pub data_s: f64,
    /// The optimizer.
    pub optimizer_s: f64,
    /// Once a step: data, logging, synchronisation.
    pub overhead_s: f64,
    /// Communication that runs under computation, not part of the sum, in the order of [`Axis::ALL`].
    pub hidden_s: [f64; Axis::ALL.len()],
}

impl Breakdown {
    /// The names and seconds of all parts of the sum, in the order in which they are printed.
    pub fn parts(&self) -> [(&'static str, f64); 13] {
        [
            ("products", self.gemm_s),
            ("expert products", self.grouped_s),
            ("attention", self.attention_s),
            ("memory-bound kernels", self.memory_s),
            ("launches", self.host_s),
            ("tensor-parallel communication", self.tensor_s),
            ("context-parallel communication", self.context_s),
            ("dispatch and combine", self.expert_s),
            ("pipeline messages", self.pipeline_s),
            ("bubble", self.bubble_s),
            ("gradients and parameters", self.data_s),
            ("optimizer", self.optimizer_s),
            ("overhead", self.overhead_s),
        ]
    }

    /// Seconds of the step.
    pub fn total_s(&self) -> f64 {
        self.parts().iter().map(|(_, seconds)| seconds).sum()
    }

    /// Communication that nothing hides, in the order of [`Axis::ALL`].
    pub fn exposed_s(&self) -> [f64; Axis::ALL.len()] {
        [self.tensor_s, self.context_s, self.expert_s, self.pipeline_s, self.data_s]
    }

    /// Communication that runs under computation, of all axes.
    pub fn all_hidden_s(&self) -> f64 {
        self.hidden_s.iter().sum()
    }

    /// Makes the parts add up to a step of `step_s`: waiting takes what lacks, and gives what is too much before what the
    /// schedule may hide, and then does.
    fn settle(&mut self, step_s: f64) {
        let mut lack = step_s - self.total_s();
        let exposed_s = self.exposed_s();
        for part in [&mut self.bubble_s, &mut self.pipeline_s, &mut self.expert_s, &mut self.host_s] {
            let settled = (*part + lack).max(0.0);
            // Only waiting takes more.
            lack = (lack - (settled - *part)).min(0.0);
            *part = settled;
        }
        let settled_s = self.exposed_s();
        for (axis, hidden_s) in self.hidden_s.iter_mut().enumerate() {
            *hidden_s += exposed_s[axis] - settled_s[axis];
        }
    }
}

/// The price of a layout.
#[derive(Debug, Clone, PartialEq)]
pub struct Priced {
    /// Seconds of an optimizer step.
    pub step_s: f64,
    /// Where eight of ten measurements lie.
    pub interval_s: [f64; 2],
    /// What the slowest rank spends them on.
    pub breakdown: Breakdown,
    /// The pipeline rank that needs most memory.
    pub worst_rank: usize,
    /// What it holds at its peak.
    pub memory: RankMemory,
    /// Whether that fits.
    pub fits: bool,
}

impl Priced {
    /// Seconds of the step.
    pub fn step(&self) -> Ranged {
        Ranged { value: self.step_s, interval: self.interval_s }
    }

    /// Bytes on the fullest rank.
    pub fn bytes(&self) -> Ranged {
        let value = self.memory.total();
        Ranged { value, interval: [-MEMORY_BAND, MEMORY_BAND].map(|log| value * log.exp()) }
    }

    /// How likely it is that the bytes on the fullest rank are at most `capacity`: logarithms of measured over predicted peaks as
    /// a normal distribution, of which four fifths lie within the 80% interval.
    pub fn fit_probability(&self, capacity: f64) -> f64 {
        let deviations = QUANTILE_90 * (capacity / self.memory.total()).ln() / MEMORY_BAND;
        0.5 * libm::erfc(-deviations / std::f64::consts::SQRT_2)
    }
}

/// Prices layouts of one model on one cluster.
#[derive(Debug, Clone)]
pub struct Pricer {
    pub(crate) model: Architecture,
    pub(crate) training: Training,
    pub(crate) stages: Stages,
    rates: Rates,
    /// How uneven routing is over ranks.
    uneven: Unevenness,
    /// Which step of it is priced.
    step: RoutedStep,
    /// Which step's memory.
    pub(crate) memory: RoutedStep,
}

/// A step among those that differ in how tokens spread over experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoutedStep {
    /// The median.
    Median,
    /// One that nineteen of twenty are faster than.
    Slow,
}

/// Prices one layout; [`Pricer`] prices many.
///
/// # Errors
/// The layout does not fit the model or the batch.
pub fn price(
    model: &Architecture,
    cluster: &Cluster,
    layout: &Parallelism,
    training: &Training,
) -> Result<Priced, ParallelismError> {
    Pricer::new(model, cluster, training).price(layout)
}

impl Pricer {
    /// A pricer with the constants that are calibrated for the cluster's GPU.
    pub fn new(model: &Architecture, cluster: &Cluster, training: &Training) -> Self {
        Self::with_calibration(model, cluster, training, Calibration::of(&cluster.gpu, training.software))
    }

    /// A pricer with other constants: those of a run's trace, or while they are fitted.
    pub fn with_calibration(
        model: &Architecture,
        cluster: &Cluster,
        training: &Training,
        calibration: Calibration,
    ) -> Self {
        let stages = Stages::of(model);
        let uneven = match &model.moe {
            Some(moe) => Unevenness::new(&training.routing, moe.experts, moe.top_k, stages.moe_layers()),
            None => Unevenness::new(&Routing::Balanced, 0, 0, 0),
        };
        Self {
            stages,
            model: model.clone(),
            training: training.clone(),
            rates: Rates::new(cluster, calibration),
            uneven,
            step: RoutedStep::Median,
            memory: RoutedStep::Slow,
        }
    }

    /// The same for another step; a new pricer prices the median.
    pub fn of_step(mut self, step: RoutedStep) -> Self {
        self.step = step;
        self
    }

    /// The same with another step's memory; a new pricer's is of a slow one, since that has to fit, too.
    pub fn with_memory_of(mut self, step: RoutedStep) -> Self {
        self.memory = step;
        self
    }

    /// The GPU that layouts are priced on.
    pub(crate) fn gpu(&self) -> &Gpu {
        &self.rates.cluster.gpu
    }

    /// Rows of the fullest expert-parallel rank over its even share, in the median step and in one of twenty.
    pub fn unevenness(&self, layout: &Parallelism) -> Percentiles {
        self.uneven.over(layout.expert)
    }

    /// The price of `layout`.
    ///
    /// # Errors
    /// The layout does not fit the model or the batch.
    pub fn price(&self, layout: &Parallelism) -> Result<Priced, ParallelismError> {
        layout.check(&self.model, &self.training)?;
        let breakdown = self.breakdown(layout);
        let step_s = breakdown.total_s();
        let spread = self.interval_terms(&breakdown).spread();
        let (worst_rank, memory) = self.worst_rank(layout);
        Ok(Priced {
            step_s,
            interval_s: [step_s / spread, step_s * spread],
            breakdown,
            worst_rank,
            fits: memory.total() <= self.rates.cluster.gpu.memory_bytes,
            memory,
        })
    }

    /// Standard deviation of the logarithm of the step because kernels have borrowed efficiencies: each kind's by its share of the step;
    /// they err alike.
    fn borrowed_spread(&self, step: &Breakdown) -> f64 {
        let (compute, wide) = (self.training.compute, self.training.compute.wide());
        let of = |kernel, precision| self.rates.kernels.borrowed_spread(kernel, precision);
        let seconds = step.gemm_s * of(Kernel::Gemm, compute)
            + step.grouped_s * of(Kernel::GroupedGemm, compute)
            + step.attention_s * of(Kernel::Attention, wide);
        seconds / step.total_s()
    }

    fn sizes<'a>(&'a self, layout: &'a Parallelism) -> Sizes<'a> {
        let uneven = self.unevenness(layout).of(self.step);
        Sizes { model: &self.model, layout, training: &self.training, rates: &self.rates, uneven }
    }

    /// The passes of every distinct kind of layer.
    fn kind_passes(&self, layout: &Parallelism) -> Vec<Passes> {
        let sizes = self.sizes(layout);
        let kinds = self.stages.kinds();
        let mut mixers: Vec<Passes> = Vec::with_capacity(kinds.len());
        let of = |(at, &(kind, windowed)): (usize, &(LayerKind, bool))| {
            // Kinds of layers that differ in their networks mix alike.
            let alike = |(other, its): &(LayerKind, bool)| (other.mixer, *its) == (kind.mixer, windowed);
            let known = kinds[..at].iter().position(alike).map(|alike| mixers[alike]);
            let mixer = known.unwrap_or_else(|| sizes.mixer(kind.mixer, windowed));
            mixers.push(mixer);
            sizes.layer(mixer, kind, windowed)
        };
        kinds.iter().enumerate().map(of).collect()
    }

    /// The distinct kinds of layers, and whether attention is windowed.
    pub fn kinds(&self) -> &[(LayerKind, bool)] {
        self.stages.kinds()
    }
}
