//! The trivial baseline: every row runs at the median rate of its GPU, precision and kind of model.

use std::collections::BTreeMap;

use super::Outcome;
use super::score::median;

/// Sets the baseline's step time of every timed row.
pub(super) fn set(outcomes: &mut [Outcome]) {
    let key = |row: &Outcome| (row.gpu.clone(), row.precision.to_uppercase(), row.sparse);
    let mut rates: BTreeMap<_, Vec<f64>> = BTreeMap::new();
    for row in outcomes.iter() {
        if let Some(time) = row.time {
            rates.entry(key(row)).or_default().push(row.flops_per_gpu / time.measured_s);
        }
    }
    let medians: BTreeMap<_, f64> =
        rates.into_iter().filter_map(|(key, rates)| Some((key, median(rates)?))).collect();
    for row in outcomes.iter_mut() {
        let rate = medians.get(&key(row)).copied();
        let flops = row.flops_per_gpu;
        if let Some(time) = &mut row.time {
            time.baseline_s = rate.map(|rate| flops / rate);
        }
    }
}

/// Its mean absolute relative error over all timed rows.
pub(super) fn mape_of_rows(outcomes: &[Outcome]) -> Option<f64> {
    let errors: Vec<f64> = outcomes.iter().filter_map(|row| row.time?.baseline_error()).collect();
    (!errors.is_empty()).then(|| errors.iter().sum::<f64>() / errors.len() as f64)
}
