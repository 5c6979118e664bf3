//! From the passes of a rank to the seconds of a step.

use crate::parallelism::Parallelism;
use crate::schedule::ScheduleKind;

use super::stages::{MOST_KINDS, Share};
use super::work::{Passes, Work};
use super::{Axis, Breakdown, BubbleTerms, Pricer};

/// Seconds of a micro-batch's passes on one rank, communication that nothing hides included.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RankTime {
    pub passes: Passes,
    pub forward_s: f64,
    pub input_s: f64,
    pub weight_s: f64,
}

/// The pipeline rank that has most to do.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Slowest {
    rank: usize,
    pub time: RankTime,
    pub share: Share,
    /// Seconds of a micro-batch on all ranks together.
    through_s: f64,
}

impl RankTime {
    fn total_s(&self) -> f64 {
        self.forward_s + self.input_s + self.weight_s
    }
}

impl Pricer {
    /// The step of a checked layout.
    pub(super) fn breakdown(&self, layout: &Parallelism) -> Breakdown {
        let kinds = self.kind_passes(layout);
        let Slowest { rank, time, share, through_s } = self.slowest(layout, &kinds);
        let idle_s = through_s - time.total_s();
        let starved_s = match layout.schedule {
            ScheduleKind::Interleaved => self.starved_s(layout, &kinds, rank),
            _ => 0.0,
        };
        self.assemble(layout, &time, &share, idle_s, starved_s)
    }

    /// The pipeline rank that has most to do.
    pub(super) fn slowest(&self, layout: &Parallelism, kinds: &[Passes]) -> Slowest {
        let mut slowest = Slowest::default();
        let mut through_s = 0.0;
        let (mut last, mut time) = (None, RankTime::default());
        for rank in 0..layout.pipeline {
            let share = self.stages.share(layout, rank);
            // Most ranks hold what the one before them does.
            if last.replace(share) != Some(share) {
                time = self.rank_time(layout, kinds, &share);
            }
            through_s += time.total_s();
            if time.total_s() > slowest.time.total_s() {
                slowest = Slowest { rank, time, share, through_s };
            }
        }
        Slowest { through_s, ..slowest }
    }

    /// Seconds of a micro-batch in which rank `slowest` of an interleaved pipeline waits though it has most to do: while each rank
    /// runs a forward of one stage and a backward of another, all wait for the one that takes longest.
    fn starved_s(&self, layout: &Parallelism, kinds: &[Passes], slowest: usize) -> f64 {
        let (ranks, group) = (layout.pipeline, layout.chunks());
        let chunks = self.chunks_s(layout, kinds);
        // `[turn]` the first of the chunks whose turn it is, twice over: turns go round.
        let around: Vec<usize> = (0..2 * group).map(|turn| turn % group / ranks * ranks).collect();
        let last = group - ranks;
        let turn = |turn: usize| {
            // A rank lags one behind the next in backwards and is one ahead of it in forwards.
            let (turns, before) = (&around[turn..turn + ranks], around[turn + group - 1]);
            let of = |rank: usize| {
                let forward = if rank + 1 == ranks { before } else { turns[ranks - 2 - rank] };
                let backward = last - turns[rank];
                chunks[forward + rank][0] + chunks[backward + rank][1]
            };
            (0..ranks).map(of).fold(0.0, f64::max) - of(slowest)
        };
        (0..group).map(turn).sum::<f64>() / ranks as f64
    }

    /// Seconds of a micro-batch in every chunk: forward, and both gradients.
    fn chunks_s(&self, layout: &Parallelism, kinds: &[Passes]) -> Vec<[f64; 2]> {
        let sizes = self.sizes(layout);
        let of = |passes: &Passes| {
            [self.pass_s(&passes.forward), self.pass_s(&passes.input) + self.pass_s(&passes.weight)]
        };
        let mut of_kind = [[0.0; 2]; MOST_KINDS];
        of_kind.iter_mut().zip(kinds).for_each(|(seconds, passes)| *seconds = of(passes));
        let heads = 1.0 + self.model.mtp_layers as f64;
        let (embedding, head) = (of(&sizes.embedding()), of(&sizes.head()).map(|seconds| heads * seconds));
        let chunk = |chunk: usize| {
            let share = self.stages.chunk_share(chunk, layout.chunks());
            std::array::from_fn(|pass| {
                let layers =
                    share.layers.iter().zip(of_kind).map(|(n, seconds)| f64::from(*n) * seconds[pass]);
                let ends = [(share.embedding, embedding[pass]), (share.head, head[pass])];
                let ends = ends.into_iter().filter(|(held, _)| *held).map(|(_, seconds)| seconds);
                layers.chain(ends).sum()
            })
        };
        (0..layout.chunks()).map(chunk).collect()
    }

    pub(super) fn rank_time(&self, layout: &Parallelism, kinds: &[Passes], share: &Share) -> RankTime {
        let sizes = self.sizes(layout);
        let mut passes = Passes::default();
        for (kind, layers) in kinds.iter().zip(share.layers) {
            passes.add(kind, f64::from(layers));
        }
        if share.embedding {
            passes.add(&sizes.embedding(), 1.0);
        }
        if share.head {
            passes.add(&sizes.head(), 1.0 + self.model.mtp_layers as f64);
        }
        let seconds = |work: &Work| self.pass_s(work);
        RankTime {
            forward_s: seconds(&passes.forward),
            input_s: seconds(&passes.input),
            weight_s: seconds(&passes.weight),
            passes,
        }
    }

    /// Seconds of a pass: kernels, or their launches where these take longer, and communication that nothing hides.
    fn pass_s(&self, work: &Work) -> f64 {
        self.kernels_s(work) + self.exposed_dense_s(work) + self.exposed_expert_s(work)
    }

    /// Seconds of kernels, or of their launches where these take longer.
    pub(super) fn kernels_s(&self, work: &Work) -> f64 {
        let (device, host) = (work.compute_s(), work.kernels * self.rates.calibration.launch_s());
        let norm = self.rates.calibration.common.norm;
        let awaited_s = work.awaited * self.rates.calibration.launch_s();
        (device.powf(norm) + host.powf(norm)).powf(norm.recip()) + awaited_s
    }

    /// Seconds of tensor and context-parallel communication that nothing hides.
    pub(super) fn exposed_dense_s(&self, work: &Work) -> f64 {
        let of = &self.rates.calibration;
        of.software.tensor_exposed * work.tensor_s + of.common.context_exposed * work.context_s
    }

    /// Seconds of dispatch and combine that no other micro-batch's kernels hide.
    pub(super) fn exposed_expert_s(&self, work: &Work) -> f64 {
        match self.training.dispatch.overlapped {
            true => (self.rates.calibration.common.expert_exposed * work.expert_s)
                .max(work.expert_s - work.compute_s()),
            false => work.expert_s,
        }
    }

    /// Whether dispatch and combine run under another micro-batch's kernels because the schedule pairs them.
    pub(super) fn is_paired(&self, layout: &Parallelism) -> bool {
        layout.schedule == ScheduleKind::DualPipeV && self.training.dispatch.overlapped
    }

    /// Seconds of dispatch and combine of one micro-batch, all passes, that nothing hides. Of paired ones: what a pair leaves,
    /// and all of them in the turns that fill and drain the pipeline, which have no partner.
    fn exposed_experts_s(&self, layout: &Parallelism, passes: &Passes) -> f64 {
        if !self.is_paired(layout) {
            return [&passes.forward, &passes.input, &passes.weight]
                .map(|work| self.exposed_expert_s(work))
                .iter()
                .sum();
        }
        let paired = self.exposed_expert_s(&passes.all());
        let alone = (layout.pipeline as f64 + 0.5) / layout.micro_batches(&self.training) as f64;
        paired + alone.min(1.0) * (passes.all().expert_s - paired)
    }

    fn assemble(
        &self,
        layout: &Parallelism,
        rank: &RankTime,
        share: &Share,
        idle_s: f64,
        starved_s: f64,
    ) -> Breakdown {
        let of = &self.rates.calibration;
        let micro_batches = layout.micro_batches(&self.training) as f64;
        let all = rank.passes.all();
        let expert_s = self.exposed_experts_s(layout, &rank.passes);
        let mut step = Breakdown {
            gemm_s: micro_batches * all.gemm_s,
            grouped_s: micro_batches * all.grouped_s,
            attention_s: micro_batches * all.attention_s,
            memory_s: micro_batches * all.memory_s,
            tensor_s: micro_batches * of.software.tensor_exposed * all.tensor_s,
            context_s: micro_batches * of.common.context_exposed * all.context_s,
            expert_s: micro_batches * expert_s,
            ..Breakdown::default()
        };
        step.host_s = micro_batches * (self.rank_kernels_s(rank) - all.compute_s());
        step.hidden_s[Axis::Tensor as usize] = micro_batches * all.tensor_s - step.tensor_s;
        step.hidden_s[Axis::Context as usize] = micro_batches * all.context_s - step.context_s;
        step.hidden_s[Axis::Expert as usize] = micro_batches * all.expert_s - step.expert_s;
        self.pipeline(layout, rank, idle_s, starved_s, &mut step);
        self.states(layout, share, rank.total_s(), &mut step);
        step.overhead_s =
            of.common.step_s + of.common.straggler * self.servers(layout).log2() * step.total_s();
        step
    }

    pub(super) fn servers(&self, layout: &Parallelism) -> f64 {
        (layout.gpus() as f64 / self.rates.cluster.per_server as f64).max(1.0)
    }

    fn rank_kernels_s(&self, rank: &RankTime) -> f64 {
        let RankTime { passes, .. } = rank;
        [&passes.forward, &passes.input, &passes.weight].map(|work| self.kernels_s(work)).iter().sum()
    }

    /// Messages between stages, and waiting for them: a micro-batch passes all ranks once while each rank does all its own.
    fn pipeline(
        &self,
        layout: &Parallelism,
        rank: &RankTime,
        idle_s: f64,
        starved_s: f64,
        step: &mut Breakdown,
    ) {
        if layout.pipeline == 1 {
            return;
        }
        let ranks = layout.pipeline as f64;
        let stages = layout.virtual_stages as f64;
        let message_s = self.message_s(layout);
        let exposed = self.rates.calibration.common.message_exposed;
        let micro_batches = layout.micro_batches(&self.training) as f64;
        let messages = 2.0 * stages * micro_batches;
        step.pipeline_s = (2.0 * (ranks - 1.0) + exposed * messages) * message_s;
        step.hidden_s[Axis::Pipeline as usize] = (1.0 - exposed) * messages * message_s;
        // Uneven ranks keep the formulas' form: what all other ranks take, less what the schedule fills.
        step.bubble_s = match layout.schedule {
            ScheduleKind::OneForwardOneBackward => idle_s,
            ScheduleKind::Interleaved => idle_s / stages + micro_batches * starved_s,
            // Those of other ranks are as much shorter as their work.
            ScheduleKind::ZeroBubble => {
                self.bubble_terms_of(layout, rank).even_s * idle_s / ((ranks - 1.0) * rank.total_s())
            }
            ScheduleKind::DualPipeV => self.bubble_terms_of(layout, rank).even_s,
        };
    }

    /// The bubble of a checked layout, and what its formula takes.
    pub fn bubble_terms(&self, layout: &Parallelism) -> BubbleTerms {
        self.bubble_terms_of(layout, &self.slowest(layout, &self.kind_passes(layout)).time)
    }

    /// The bubble of a pipeline whose ranks are all as `rank`.
    fn bubble_terms_of(&self, layout: &Parallelism, rank: &RankTime) -> BubbleTerms {
        let (mut forward_s, mut input_s, mut overlapped_s) = (rank.forward_s, rank.input_s, rank.total_s());
        if self.is_paired(layout) {
            let alone = |work: &Work| work.expert_s - self.exposed_expert_s(work);
            forward_s += alone(&rank.passes.forward);
            input_s += alone(&rank.passes.input);
            let all = rank.passes.all();
            overlapped_s =
                self.rank_kernels_s(rank) + self.exposed_dense_s(&all) + self.exposed_expert_s(&all);
        }
        let Parallelism { schedule, pipeline, virtual_stages, .. } = *layout;
        let weight_s = rank.weight_s;
        let even_s = schedule.bubble_s(pipeline, virtual_stages, forward_s, input_s, weight_s, overlapped_s);
        BubbleTerms { forward_s, input_s, weight_s, overlapped_s, even_s: even_s.max(0.0) }
    }

    /// Seconds of a message from a stage to the next, the slowest of them.
    pub(super) fn message_s(&self, layout: &Parallelism) -> f64 {
        self.rates.message(self.message_bytes(layout), layout.pipeline, layout.stage_gpus())
    }

    /// Bytes of a message from a GPU to its peer of the next stage.
    pub(crate) fn message_bytes(&self, layout: &Parallelism) -> f64 {
        self.training.element_bytes() * self.sizes(layout).split_tokens() * self.model.hidden as f64
    }
}
