//! The exact path: a layout's schedule, op by op, with the costs of every stage.

use crate::parallelism::{Parallelism, ParallelismError};
use crate::schedule::{ExchangeKind, Op, Schedule};
use crate::simulate::{
    LinkClass, Replicas, Segment, Simulated, StageCosts, Transfer, UniformCosts, simulate,
};

use super::work::{Passes, Work};
use super::{Priced, Pricer};

/// A step of a layout as it is simulated.
#[derive(Debug, Clone, PartialEq)]
pub struct SimulatedStep {
    /// The ops of every pipeline rank.
    pub schedule: Schedule,
    /// When they run.
    pub simulated: Simulated,
}

/// A pipeline of more micro-batches a rank than this repeats itself: the rest is extrapolated.
const WHOLE_TURNS: usize = 8;

impl Pricer {
    /// [`Pricer::price`] with the schedule run op by op: waiting for other stages, messages, and exchanges that the schedule hides
    /// are what the simulation says instead of their closed form. Milliseconds a layout.
    ///
    /// # Errors
    /// The layout does not fit the model or the batch.
    pub fn price_simulated(&self, layout: &Parallelism) -> Result<Priced, ParallelismError> {
        let priced = self.price(layout)?;
        if layout.pipeline == 1 {
            return Ok(priced);
        }
        let step_s = self.simulated_s(layout)?;
        let times = step_s / priced.step_s;
        let mut breakdown = priced.breakdown;
        breakdown.settle(step_s);
        Ok(Priced { step_s, interval_s: priced.interval_s.map(|s| s * times), breakdown, ..priced })
    }

    /// Seconds of a simulated step of a checked layout.
    fn simulated_s(&self, layout: &Parallelism) -> Result<f64, ParallelismError> {
        let costs = self.costs(layout);
        let micro_batches = layout.micro_batches(&self.training);
        let seconds = |micro_batches| {
            let of = layout.schedule.schedule(layout.pipeline, layout.virtual_stages, micro_batches)?;
            let replicas = Replicas::symmetric(layout.data * layout.context);
            Ok::<f64, ParallelismError>(run(&of.then_update(), &costs, replicas, false).seconds)
        };
        let most = WHOLE_TURNS * layout.pipeline;
        if micro_batches <= most {
            return seconds(micro_batches);
        }
        let (all, fewer) = (seconds(most)?, seconds(most - 2 * layout.pipeline)?);
        let each = (all - fewer) / (2 * layout.pipeline) as f64;
        Ok(all + (micro_batches - most) as f64 * each)
    }

    /// Simulates a step of `layout`, one replica for all, with its spans if they are to be drawn.
    ///
    /// Passes take what [`Pricer::price`] says of them; waiting for other stages and messages, and what overlaps under DualPipeV,
    /// come from the schedule itself. Traffic of gradients and the update follow as in the price.
    ///
    /// # Errors
    /// The layout does not fit the model or the batch.
    pub fn simulate(
        &self,
        layout: &Parallelism,
        keep_spans: bool,
    ) -> Result<SimulatedStep, ParallelismError> {
        layout.check(&self.model, &self.training)?;
        let micro_batches = layout.micro_batches(&self.training);
        let schedule = layout.schedule.schedule(layout.pipeline, layout.virtual_stages, micro_batches)?;
        let mut schedule = schedule.then_update();
        let mut costs = self.costs(layout);
        if layout.state_exchanges(&self.training).weights > 1.0 {
            schedule = schedule.gathering_each_pass();
            // The price's traffic, in as many pieces as the list has.
            for (gather, ops) in costs.gather.iter_mut().zip(&schedule.ranks) {
                let is_one =
                    |op: &&Op| matches!(op, Op::Start(e) if e.kind == ExchangeKind::GatherParameters);
                let pieces = ops.iter().filter(is_one).count().max(1) as f64;
                gather.iter_mut().for_each(|segment| segment.seconds /= pieces);
            }
        }
        let replicas = Replicas::symmetric(layout.data * layout.context);
        let simulated = run(&schedule, &costs, replicas, keep_spans);
        Ok(SimulatedStep { schedule, simulated })
    }

    /// The costs of every stage of a checked layout.
    fn costs(&self, layout: &Parallelism) -> UniformCosts {
        let kinds = self.kind_passes(layout);
        let chunks = layout.chunks();
        let stages = (0..chunks).map(|chunk| {
            let share = self.stages.chunk_share(chunk, chunks);
            let passes = self.rank_time(layout, &kinds, &share).passes;
            self.stage_costs(layout, &passes, self.stages.chunk(chunk, chunks).len())
        });
        let step = self.breakdown(layout);
        let update = Segment::compute("optimizer", step.optimizer_s);
        let overhead = Segment::compute("overhead", step.overhead_s);
        let states = Segment::exchange("gradients and parameters", step.data_s);
        UniformCosts {
            stages: stages.collect(),
            transfer: Transfer {
                seconds: self.message_s(layout),
                link: self.adapter(layout.stage_gpus(), layout.pipeline),
            },
            update: vec![vec![update, overhead]; layout.pipeline],
            gather: vec![vec![states]; layout.pipeline],
            links: vec![LinkClass { name: "network adapter", ranks: 1, capacity: 1.0 }],
            slowdown: self.slowdown(layout),
        }
    }

    /// The link of a group of `size` ranks, `stride` apart: each rank's network adapter, if the group crosses servers.
    fn adapter(&self, stride: usize, size: usize) -> Option<u8> {
        (self.rates.cluster.level_of(size, stride) > 0).then_some(0)
    }

    /// The slowdown that leaves of an exchange under kernels the share that the calibration says is not hidden.
    fn slowdown(&self, layout: &Parallelism) -> f64 {
        let exposed = self.rates.calibration.common.expert_exposed;
        if self.is_paired(layout) { exposed / (1.0 - exposed).max(f64::MIN_POSITIVE) } else { 0.0 }
    }

    fn stage_costs(&self, layout: &Parallelism, passes: &Passes, layers: usize) -> StageCosts {
        // Only overlapped pairs show in the list what hides an exchange; elsewhere the price's share of it counts.
        let whole = self.is_paired(layout);
        let link = self.adapter(layout.expert_tensor, layout.expert);
        let pass = |works: &[&Work]| {
            let kernels_s = works.iter().map(|work| self.kernels_s(work)).sum::<f64>();
            let others_s = works.iter().map(|work| self.exposed_dense_s(work)).sum::<f64>();
            let expert = |work: &&Work| if whole { work.expert_s } else { self.exposed_expert_s(work) };
            let expert = Segment { link, ..Segment::exchange("dispatch", works.iter().map(expert).sum()) };
            alternate(kernels_s, others_s, expert, layers.max(1))
        };
        StageCosts {
            forward: pass(&[&passes.forward]),
            input: pass(&[&passes.input]),
            weights: pass(&[&passes.weight]),
            backward: pass(&[&passes.input, &passes.weight]),
            reduce: Vec::new(),
        }
    }
}

fn run(schedule: &Schedule, costs: &UniformCosts, replicas: Replicas, keep_spans: bool) -> Simulated {
    simulate(schedule, costs, replicas, keep_spans)
        .expect("schedules are free of deadlock and one replica waits for no other")
}

/// A pass layer by layer: attention, dispatch, experts, combine, each half of a layer's kernels and of its exchanges.
fn alternate(kernels_s: f64, others_s: f64, expert: Segment, layers: usize) -> Vec<Segment> {
    let halves = 2 * layers;
    let each = 1.0 / halves as f64;
    let half = |index: usize| {
        let name = if index.is_multiple_of(2) { "dispatch" } else { "combine" };
        [
            Segment::compute("kernels", kernels_s * each),
            // What nothing hides keeps the compute lane waiting.
            Segment::compute("tensor and context", others_s * each),
            Segment { name, seconds: expert.seconds * each, ..expert },
        ]
    };
    (0..halves).flat_map(half).filter(|segment| segment.seconds > 0.0).collect()
}
