//! From the passes of a rank to the seconds of a step.

use crate::parallelism::Parallelism;
use crate::schedule::ScheduleKind;

use super::stages::Share;
use super::work::{Passes, Work};
use super::{Breakdown, Pricer};

/// Seconds of a micro-batch's passes on one rank, communication that nothing hides included.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RankTime {
    pub passes: Passes,
    pub forward_s: f64,
    pub input_s: f64,
    pub weight_s: f64,
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
        let mut slowest = RankTime::default();
        let mut slowest_share = Share::default();
        let mut through_s = 0.0;
        for rank in 0..layout.pipeline {
            let share = self.stages.share(layout, rank);
            let time = self.rank_time(layout, &kinds, &share);
            through_s += time.total_s();
            if time.total_s() > slowest.total_s() {
                (slowest, slowest_share) = (time, share);
            }
        }
        self.assemble(layout, &slowest, &slowest_share, through_s)
    }

    fn rank_time(&self, layout: &Parallelism, kinds: &[Passes], share: &Share) -> RankTime {
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
        let of = &self.rates.calibration;
        let (device, host) = (work.compute_s(), work.kernels * of.launch_s());
        let kernels = (device.powi(4) + host.powi(4)).sqrt().sqrt();
        kernels
            + of.software.tensor_exposed * work.tensor_s
            + of.common.context_exposed * work.context_s
            + self.exposed_expert_s(work)
    }

    /// Seconds of dispatch and combine that no other micro-batch's kernels hide.
    fn exposed_expert_s(&self, work: &Work) -> f64 {
        match self.training.dispatch.overlapped {
            true => (self.rates.calibration.common.expert_exposed * work.expert_s)
                .max(work.expert_s - work.compute_s()),
            false => work.expert_s,
        }
    }

    fn assemble(&self, layout: &Parallelism, rank: &RankTime, share: &Share, through_s: f64) -> Breakdown {
        let of = &self.rates.calibration;
        let micro_batches = layout.micro_batches(&self.training) as f64;
        let mut all = rank.passes.forward;
        all += rank.passes.input;
        all += rank.passes.weight;
        let passes = [&rank.passes.forward, &rank.passes.input, &rank.passes.weight];
        let expert_s: f64 = passes.iter().map(|work| self.exposed_expert_s(work)).sum();
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
        let exposed =
            of.software.tensor_exposed * all.tensor_s + of.common.context_exposed * all.context_s + expert_s;
        step.host_s = micro_batches * (rank.total_s() - exposed - all.compute_s());
        step.hidden_s = micro_batches * (all.tensor_s + all.context_s + all.expert_s - exposed);
        self.pipeline(layout, rank, through_s, &mut step);
        self.states(layout, share, rank.total_s(), &mut step);
        let servers = (layout.gpus() as f64 / self.rates.cluster.per_server as f64).max(1.0);
        step.overhead_s = of.common.step_s + of.common.straggler * servers.log2() * step.total_s();
        step
    }

    /// Messages between stages, and waiting for them: a micro-batch passes all ranks once while each rank does all its own.
    fn pipeline(&self, layout: &Parallelism, rank: &RankTime, through_s: f64, step: &mut Breakdown) {
        if layout.pipeline == 1 {
            return;
        }
        let ranks = layout.pipeline as f64;
        let stages = layout.virtual_stages as f64;
        let stride = layout.tensor * layout.context * layout.data;
        let bytes = 2.0 * self.sizes(layout).split_tokens() * self.model.hidden as f64;
        let message_s = self.rates.message(bytes, stride);
        let exposed = self.rates.calibration.common.message_exposed;
        let micro_batches = layout.micro_batches(&self.training) as f64;
        step.pipeline_s = (2.0 * (ranks - 1.0) + 2.0 * exposed * stages * micro_batches) * message_s;
        let idle = through_s - rank.total_s();
        // Uneven ranks keep the formulas' form: what all other ranks take, less what the schedule fills.
        step.bubble_s = match layout.schedule {
            ScheduleKind::OneForwardOneBackward => idle,
            ScheduleKind::Interleaved => idle / stages,
            ScheduleKind::ZeroBubble | ScheduleKind::DualPipeV => {
                let even = layout.schedule.bubble_s(
                    layout.pipeline,
                    layout.virtual_stages,
                    rank.forward_s,
                    rank.input_s,
                    rank.weight_s,
                    rank.total_s(),
                );
                even.max(0.0)
            }
        };
    }
}
