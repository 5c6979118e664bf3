//! The learning rate over time.

use crate::config::{ScheduleConfig, ScheduleKind};

/// The learning rate of step `step` (the first is 1) of `steps`, in f64 with portable functions.
///
/// Warm-up is linear from 0 and reaches `largest` at step `warmup_steps`. Then either half a cosine down to
/// `min_ratio * largest` at the last step, or constant until the last `decay_steps` steps, which go down linearly.
pub fn learning_rate(schedule: &ScheduleConfig, largest: f64, step: u64, steps: u64) -> f64 {
    if step < schedule.warmup_steps {
        return largest * step as f64 / schedule.warmup_steps as f64;
    }
    let least = largest * schedule.min_ratio;
    let share_left = match schedule.kind {
        ScheduleKind::Cosine => {
            let length = steps.saturating_sub(schedule.warmup_steps).max(1);
            let done = (step - schedule.warmup_steps).min(length) as f64 / length as f64;
            0.5 * (1.0 + libm::cos(std::f64::consts::PI * done))
        }
        ScheduleKind::Wsd => match schedule.decay_steps {
            0 => 1.0,
            decay => (steps.saturating_sub(step) as f64 / decay as f64).min(1.0),
        },
    };
    least + (largest - least) * share_left
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind) -> ScheduleConfig {
        ScheduleConfig { kind, warmup_steps: 10, decay_steps: 20, min_ratio: 0.1 }
    }

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12, "{a} and {b}");
    }

    #[test]
    fn cosine_warms_up_and_ends_at_the_least_rate() {
        let rate = |step| learning_rate(&schedule(ScheduleKind::Cosine), 2.0, step, 110);
        close(rate(1), 0.2);
        close(rate(10), 2.0);
        close(rate(60), 0.2 + 0.9);
        close(rate(110), 0.2);
        close(rate(111), 0.2);
    }

    #[test]
    fn wsd_is_flat_until_it_decays() {
        let rate = |step| learning_rate(&schedule(ScheduleKind::Wsd), 2.0, step, 110);
        close(rate(10), 2.0);
        close(rate(90), 2.0);
        close(rate(100), 0.2 + 0.9);
        close(rate(110), 0.2);
    }
}
