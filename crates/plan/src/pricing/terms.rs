//! The terms of a price, for people who want to follow it.

use crate::collectives::CollectiveModel;
use crate::kernels::Product;
use crate::parallelism::Parallelism;

use super::rates::Rates;
use super::traffic::Axis;
use super::{Breakdown, Pricer, QUANTILE_90};

/// What a product costs: the roofline's time over the efficiency of the tables, times what training does to it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KernelTerms {
    /// Which product.
    pub name: &'static str,
    /// Its sizes, operations and bytes.
    pub product: Product,
    /// Operations a second at best.
    pub peak_flops: f64,
    /// Bytes a second at best.
    pub peak_bytes_per_s: f64,
    /// The roofline's time over that of the tables.
    pub efficiency: f64,
    /// The calibrated factor.
    pub factor: f64,
    /// Seconds.
    pub seconds: f64,
}

impl KernelTerms {
    /// Seconds at best.
    pub fn roofline_s(&self) -> f64 {
        (self.product.flops / self.peak_flops).max(self.product.bytes / self.peak_bytes_per_s)
    }
}

/// One exchange of an axis, as if nothing hid it.
#[derive(Debug, Clone, PartialEq)]
pub struct ExchangeTerms {
    /// The axis.
    pub axis: Axis,
    /// What is exchanged.
    pub what: &'static str,
    /// Ranks that take part.
    pub ranks: usize,
    /// Ranks from one to the next.
    pub stride: usize,
    /// `[level]` bytes that a rank sends.
    pub bytes: Vec<f64>,
    /// The level whose links it waits for.
    pub level: usize,
    /// Seconds before the first byte, as the smallest message takes.
    pub latency_s: f64,
    /// The calibrated factor on all of its seconds.
    pub factor: f64,
    /// Seconds: latency and bytes over bandwidth, times the factor.
    pub seconds: f64,
}

impl ExchangeTerms {
    /// Bytes that a rank sends through the links that it waits for: what goes farther goes through them, too.
    pub fn waited_bytes(&self) -> f64 {
        match self.level {
            0 => self.bytes[0],
            level => self.bytes[level..].iter().sum(),
        }
    }

    /// Bytes a second of those links once the first has come.
    pub fn bytes_per_s(&self) -> f64 {
        self.waited_bytes() / (self.seconds / self.factor - self.latency_s)
    }
}

/// What the formula of a schedule's bubble takes: seconds of a micro-batch on the pipeline rank that has most to do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BubbleTerms {
    /// Forward of all stages of the rank.
    pub forward_s: f64,
    /// Gradient of the input, with what is computed again.
    pub input_s: f64,
    /// Gradient of the weights.
    pub weight_s: f64,
    /// A forward and a backward at once.
    pub overlapped_s: f64,
    /// The bubble of a step if all ranks were as this one.
    pub even_s: f64,
}

/// What a step takes once, and for its slowest server.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OverheadTerms {
    /// Seconds once a step.
    pub once_s: f64,
    /// Share of the rest for each doubling of servers.
    pub straggler: f64,
    /// Servers, at least 1.
    pub servers: f64,
    /// Seconds of the rest of the step.
    pub rest_s: f64,
}

/// Where the interval of a step comes from: standard deviations of the logarithm of measured over predicted seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct IntervalTerms {
    /// Of families that were left out of the fit.
    pub fit: f64,
    /// Because kernels have borrowed efficiencies.
    pub borrowed: f64,
}

impl IntervalTerms {
    /// Deviations from the middle to the end of the interval.
    pub const QUANTILE: f64 = QUANTILE_90;

    /// The end of the interval over its middle.
    pub fn spread(&self) -> f64 {
        (Self::QUANTILE * self.fit.hypot(self.borrowed)).exp()
    }
}

impl Pricer {
    /// The forward's first product of the feed-forward network: of the experts, where there are any.
    pub fn kernel_terms(&self, layout: &Parallelism) -> KernelTerms {
        let sizes = self.sizes(layout);
        let (rates, precision) = (&self.rates, self.training.compute);
        let gates = self.model.ffn_matrices() as f64 - 1.0;
        let d = self.model.hidden as f64;
        let (name, product, table_s, factor) = match &self.model.moe {
            Some(moe) => {
                let (rows, here) = (sizes.expert_rows(moe), (moe.experts / layout.expert) as f64);
                let n = gates * (moe.expert_ffn / layout.expert_tensor) as f64;
                let k = self.model.dispatch_width() as f64;
                let product = Product::grouped(rows, here, n, k, precision);
                let table_s =
                    rates.kernels.grouped_gemm(rows, here as usize, n as usize, k as usize, precision);
                ("experts' first product", product, table_s, rates.calibration.grouped(precision))
            }
            None => {
                let (m, n) = (sizes.tokens(), gates * (self.model.ffn_dense / layout.tensor) as f64);
                let product = Product::single(m, n, d, precision);
                let table_s = rates.kernels.gemm(m as usize, n as usize, d as usize, precision);
                (
                    "feed-forward network's first product",
                    product,
                    table_s,
                    rates.calibration.product(precision),
                )
            }
        };
        let gpu = &rates.cluster.gpu;
        let mut terms = KernelTerms {
            name,
            product,
            peak_flops: gpu.peak_flops(precision),
            peak_bytes_per_s: gpu.memory_bytes_per_s,
            efficiency: 1.0,
            factor,
            seconds: factor * table_s,
        };
        terms.efficiency = terms.roofline_s() / table_s;
        terms
    }

    /// An exchange of each axis that has any: of gradients and rows to experts each kind.
    pub fn exchange_terms(&self, layout: &Parallelism) -> Vec<ExchangeTerms> {
        let (sizes, rates) = (self.sizes(layout), &self.rates);
        let width = self.training.element_bytes();
        let mut terms = Vec::new();
        let activations = width * sizes.tokens() * self.model.hidden as f64;
        terms.push(gather(
            rates,
            Axis::Tensor,
            "activations between halves of a layer",
            activations,
            layout.tensor,
            1,
        ));
        let keys = sizes.key_bytes();
        terms.push(gather(
            rates,
            Axis::Context,
            "keys and values of a layer",
            keys,
            layout.context,
            layout.tensor,
        ));
        if let Some(moe) = &self.model.moe {
            let model = CollectiveModel::of(&rates.cluster);
            let ([there, home], [to, from]) = (sizes.exchange_s(moe), sizes.exchange_wait(moe));
            let [sent, back] = self.training.wire_bytes();
            for (what, element_bytes, seconds, wait) in [
                ("rows to their experts", sent, there, to),
                ("results, or gradients, of experts", back, home, from),
            ] {
                terms.push(ExchangeTerms {
                    axis: Axis::Expert,
                    what,
                    ranks: layout.expert,
                    stride: layout.expert_tensor,
                    bytes: self.expert_bytes(layout, &model, element_bytes),
                    level: wait.level,
                    latency_s: wait.latency_s,
                    factor: wait.factor,
                    seconds,
                });
            }
        }
        let stage = layout.stage_gpus();
        let level = rates.cluster.level_of(layout.pipeline, stage);
        let mut bytes = vec![0.0; rates.cluster.levels.len()];
        bytes[level] = self.message_bytes(layout);
        let wait = rates.message_wait(self.message_bytes(layout), layout.pipeline, stage);
        terms.push(ExchangeTerms {
            axis: Axis::Pipeline,
            what: "a micro-batch to the next stage",
            ranks: layout.pipeline,
            stride: stage,
            bytes,
            level: wait.level,
            latency_s: wait.latency_s,
            factor: wait.factor,
            seconds: self.message_s(layout),
        });
        let held = self.rank_parameters(layout, &self.slowest(layout, &self.kind_passes(layout)).share);
        let gradients = self.training.optimizer.gradients.bytes();
        let (dense, experts) = (gradients * held.dense, gradients * held.experts);
        let rest = if self.model.moe.is_some() { "gradients of all but experts" } else { "gradients" };
        terms.push(gather(rates, Axis::Data, rest, dense, layout.data * layout.context, layout.tensor));
        let apart = layout.expert * layout.expert_tensor;
        terms.push(gather(rates, Axis::Data, "gradients of experts", experts, layout.expert_data(), apart));
        terms.retain(|terms| terms.ranks > 1 && terms.bytes.iter().sum::<f64>() > 0.0);
        terms
    }

    /// What overhead a step of a layout is charged with.
    pub fn overhead_terms(&self, layout: &Parallelism) -> OverheadTerms {
        let common = &self.rates.calibration.common;
        let step = self.breakdown(layout);
        OverheadTerms {
            once_s: common.step_s,
            straggler: common.straggler,
            servers: self.servers(layout),
            rest_s: step.total_s() - step.overhead_s,
        }
    }

    /// Where the interval of a step comes from.
    pub fn interval_terms(&self, step: &Breakdown) -> IntervalTerms {
        let common = &self.rates.calibration.common;
        IntervalTerms {
            fit: if self.model.moe.is_some() { common.spread_moe } else { common.spread },
            borrowed: self.borrowed_spread(step),
        }
    }
}

fn gather(
    rates: &Rates,
    axis: Axis,
    what: &'static str,
    buffer_bytes: f64,
    ranks: usize,
    stride: usize,
) -> ExchangeTerms {
    let seconds = rates.gather(buffer_bytes, ranks, stride);
    let wait = rates.gather_wait(buffer_bytes, ranks, stride);
    ExchangeTerms {
        axis,
        what,
        ranks,
        stride,
        bytes: rates.gathered_bytes(buffer_bytes, ranks, stride),
        level: wait.level,
        latency_s: wait.latency_s,
        factor: wait.factor,
        seconds,
    }
}
