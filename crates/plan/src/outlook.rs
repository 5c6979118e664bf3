//! What a whole run takes: steps, days, checkpoints, failures, money.

use crate::hardware::Cluster;
use crate::parallelism::{Parallelism, Training};
use crate::pricing::Priced;
use crate::ranged::Ranged;

/// Bytes per second at which one GPU's share of a checkpoint is set aside while training waits: from its memory over PCIe into
/// the host's. Storage then takes it without the GPUs.
const SNAPSHOT_BYTES_PER_S: f64 = 10e9;

/// From a failure to the first new step: notice, replace, start, read the checkpoint. Llama 3 (2024) reports over 90% of its
/// time as effective with an interruption every three hours, which leaves at most about so much for each.
const RESTART_S: f64 = 600.0;

/// The interval between checkpoints and what a failure loses are at most this share of the time between failures.
const MOST_OF_FAILURES: f64 = 0.25;

const HOUR_S: f64 = 3600.0;

/// A run of so many tokens, at the predicted seconds of a step. What follows from these has their interval; checkpoints,
/// failures and goodput follow from bytes and from a failure rate that is given, not predicted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outlook {
    /// Optimizer steps.
    pub steps: f64,
    /// Tokens per second of all GPUs, while they train.
    pub tokens_per_s: Ranged,
    /// GPU-hours of training alone, without failures and checkpoints.
    pub gpu_hours: Ranged,
    /// Seconds that training waits for a checkpoint.
    pub checkpoint_s: f64,
    /// The interval between checkpoints that loses least (Young, 1974): sqrt(2 x time of one x time between failures).
    pub checkpoint_every_s: f64,
    /// Time between failures of any GPU; without end where there are none, as is then the interval between checkpoints.
    pub failure_every_s: f64,
    /// Whether failures are so rare that the interval and what follows mean anything: Young's formula takes at most one failure
    /// between two checkpoints for granted, and a restart that is short beside the time between failures.
    pub failures_are_rare: bool,
    /// Share of the time that trains: the rest goes to checkpoints, work that is lost, and restarts.
    pub goodput: f64,
    /// Days with all of that.
    pub days: Ranged,
    /// Dollars with all of that.
    pub usd: Ranged,
    /// Dollars of training alone.
    pub usd_without_failures: Ranged,
}

impl Outlook {
    /// The outlook of a priced layout.
    pub fn of(priced: &Priced, cluster: &Cluster, layout: &Parallelism, training: &Training) -> Self {
        let tokens = (training.global_batch * training.sequence) as f64;
        let steps = (training.tokens / tokens).ceil();
        let gpus = layout.gpus() as f64;
        let train_s = steps * priced.step_s;
        // What a resume needs: master weights and moments; gradients and activations are made again.
        let checkpoint_s = (priced.memory.optimizer + priced.memory.weights) / SNAPSHOT_BYTES_PER_S;
        let failure_every_s = HOUR_S / (cluster.failures_per_gpu_hour * gpus);
        let checkpoint_every_s = (2.0 * checkpoint_s * failure_every_s).sqrt();
        let lost_s = checkpoint_every_s / 2.0 + RESTART_S;
        let fails = cluster.failures_per_gpu_hour > 0.0;
        let lost = if fails { checkpoint_s / checkpoint_every_s + lost_s / failure_every_s } else { 0.0 };
        let goodput = 1.0 / (1.0 + lost);
        let gpu_hours = gpus * train_s / HOUR_S;
        let usd_without_failures = gpu_hours * cluster.price_usd_per_gpu_hour;
        let step = priced.step();
        Self {
            steps,
            tokens_per_s: step.falling(tokens / priced.step_s),
            gpu_hours: step.growing(gpu_hours),
            checkpoint_s,
            checkpoint_every_s,
            failure_every_s,
            failures_are_rare: checkpoint_every_s.max(lost_s) <= MOST_OF_FAILURES * failure_every_s,
            goodput,
            days: step.growing(train_s / goodput / (24.0 * HOUR_S)),
            usd: step.growing(usd_without_failures / goodput),
            usd_without_failures: step.growing(usd_without_failures),
        }
    }

    /// Whether there are failures, hence checkpoints.
    pub fn fails(&self) -> bool {
        self.failure_every_s.is_finite()
    }

    /// GPU-hours of training alone for 10^12 tokens.
    pub fn gpu_hours_per_trillion(&self, training: &Training) -> Ranged {
        self.gpu_hours.times(1e12 / training.tokens)
    }

    /// Dollars, failures included, for 10^12 tokens.
    pub fn usd_per_trillion(&self, training: &Training) -> Ranged {
        self.usd.times(1e12 / training.tokens)
    }
}
