//! The trivial baseline: every row runs at the median rate of the other rows of its GPU, precision and kind of model.

use std::collections::BTreeMap;

use super::Outcome;
use super::score::median;

/// Its mean absolute relative error as published with the measurements, over 1,050 of their rows.
pub const PUBLISHED_BASELINE: f64 = 0.24;

/// Sets the baseline's step time of every timed row that is not alone of its kind.
pub(super) fn set(outcomes: &mut [Outcome]) {
    let mut groups: BTreeMap<(String, String, bool), Vec<usize>> = BTreeMap::new();
    for (at, row) in outcomes.iter().enumerate().filter(|(_, row)| row.time.is_some()) {
        groups.entry((row.gpu.clone(), row.precision.clone(), row.sparse)).or_default().push(at);
    }
    let rate = |row: &Outcome| row.time.map_or(0.0, |time| row.flops_per_gpu / time.measured_s);
    for members in groups.values() {
        let rates: Vec<f64> = members.iter().map(|at| rate(&outcomes[*at])).collect();
        for (place, at) in members.iter().enumerate() {
            let others = rates.iter().enumerate().filter(|(other, _)| *other != place);
            let rate = median(others.map(|(_, rate)| *rate).collect());
            let flops = outcomes[*at].flops_per_gpu;
            if let Some(time) = &mut outcomes[*at].time {
                time.baseline_s = rate.map(|rate| flops / rate);
            }
        }
    }
}

/// Its mean absolute relative error over all timed rows.
pub(super) fn mape_of_rows(outcomes: &[Outcome]) -> Option<f64> {
    let errors: Vec<f64> = outcomes.iter().filter_map(|row| row.time?.baseline_error()).collect();
    (!errors.is_empty()).then(|| errors.iter().sum::<f64>() / errors.len() as f64)
}
