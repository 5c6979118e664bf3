//! The release factor: software moves more than plans, so where at least five rows share a framework, a GPU and a
//! precision, the other four or more say how that software differs from the model.

use std::collections::BTreeMap;

use super::Outcome;
use super::score::median;

/// Rows that must share a framework, a GPU and a precision.
const FEWEST_ROWS: usize = 5;

/// Sets the factor of every timed row to the median of measured over predicted of the *other* rows of its group.
pub(super) fn set_factors(outcomes: &mut [Outcome]) {
    let mut groups: BTreeMap<[String; 3], Vec<usize>> = BTreeMap::new();
    for (at, row) in outcomes.iter().enumerate().filter(|(_, row)| row.time.is_some()) {
        let key = [row.framework.to_lowercase(), row.gpu.clone(), row.precision.clone()];
        groups.entry(key).or_default().push(at);
    }
    for members in groups.values().filter(|members| members.len() >= FEWEST_ROWS) {
        let ratios: Vec<f64> = members.iter().filter_map(|at| outcomes[*at].ratio()).collect();
        for (place, at) in members.iter().enumerate() {
            let others = ratios.iter().enumerate().filter(|(other, _)| *other != place);
            let factor = median(others.map(|(_, ratio)| *ratio).collect());
            let row = &mut outcomes[*at];
            row.factor = factor;
            if let (Some(factor), Some(time)) = (factor, &mut row.time) {
                time.release(factor);
            }
        }
    }
}
