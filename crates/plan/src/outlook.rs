//! What a whole run takes: steps, days, checkpoints, failures, money.

use crate::hardware::Cluster;
use crate::parallelism::{Parallelism, Training};
use crate::pricing::{Priced, QUANTILE_90};
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

/// A run of so many tokens, at the predicted seconds of a step. What follows from these has their interval; what follows from the
/// rate of failures that of its estimate; goodput, of which days and dollars take both, also that of how many come in a run of this
/// length. Bytes and tokens are known; what a snapshot and a restart take is assumed.
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
    pub checkpoint_every_s: Ranged,
    /// Time between failures of any GPU; without end where there are none, as is then the interval between checkpoints.
    pub failure_every_s: Ranged,
    /// Whether failures are so rare that the interval and what follows mean anything: Young's formula takes at most one failure
    /// between two checkpoints for granted, and a restart that is short beside the time between failures.
    pub failures_are_rare: bool,
    /// Share of the time that trains: the rest goes to checkpoints, work that is lost, and restarts.
    pub goodput: Ranged,
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
        let rate_spread = cluster.failure_spread();
        let failure_every_s = Ranged::around(
            HOUR_S / (cluster.failures_per_gpu_hour * gpus),
            (QUANTILE_90 * rate_spread).exp(),
        );
        let young = |failure_every_s: f64| (2.0 * checkpoint_s * failure_every_s).sqrt();
        let checkpoint_every_s =
            Ranged { value: young(failure_every_s.value), interval: failure_every_s.interval.map(young) };
        let lost_s = checkpoint_every_s.value / 2.0 + RESTART_S;
        // Failures that come over those that are expected: a Poisson count's deviation beside that of the rate, both as normal.
        let failures = train_s / failure_every_s.value;
        let deviation = QUANTILE_90 * failures.recip().sqrt().hypot(rate_spread);
        let goodput = |come: f64| {
            let saved = checkpoint_s / checkpoint_every_s.value;
            1.0 / (1.0 + saved + come * lost_s / failure_every_s.value)
        };
        let goodput = match cluster.failures_per_gpu_hour > 0.0 {
            true => {
                let interval = [goodput(1.0 + deviation), goodput((1.0 - deviation).max(0.0))];
                Ranged { value: goodput(1.0), interval }
            }
            false => Ranged::known(1.0),
        };
        let gpu_hours = gpus * train_s / HOUR_S;
        let usd_without_failures = gpu_hours * cluster.price_usd_per_gpu_hour;
        let step = priced.step();
        let all_s = step.growing(train_s).over(&goodput);
        Self {
            steps,
            tokens_per_s: step.falling(tokens / priced.step_s),
            gpu_hours: step.growing(gpu_hours),
            checkpoint_s,
            checkpoint_every_s,
            failure_every_s,
            failures_are_rare: checkpoint_every_s.value.max(lost_s)
                <= MOST_OF_FAILURES * failure_every_s.value,
            goodput,
            days: all_s.times((24.0 * HOUR_S).recip()),
            usd: all_s.growing(usd_without_failures / goodput.value),
            usd_without_failures: step.growing(usd_without_failures),
        }
    }

    /// Whether there are failures, hence checkpoints.
    pub fn fails(&self) -> bool {
        self.failure_every_s.value.is_finite()
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
