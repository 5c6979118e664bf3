//! The release factor: software moves more than plans, so where at least five rows share a framework, a GPU and a
//! precision, the other four or more say how that software differs from the model.

use std::collections::BTreeMap;

use super::Outcome;
use super::score::median;

/// Rows that must share a framework, a GPU and a precision.
const FEWEST_ROWS: usize = 5;

/// Sets the factor of every timed row to the median of measured over predicted of the *other* rows of its group: of those that
/// also share the release and the kind of model, or the kind, if they are enough.
pub(super) fn set_factors(outcomes: &mut [Outcome]) {
    let kind = |row: &Outcome| if row.sparse { "experts" } else { "dense" }.to_string();
    let release = |row: &Outcome| row.release.map_or(String::new(), |release| release.to_string());
    let same = |row: &Outcome| vec![row.framework.clone(), row.gpu.clone(), row.precision.clone()];
    set_by(outcomes, &same);
    set_by(outcomes, &|row| [same(row), vec![kind(row)]].concat());
    set_by(outcomes, &|row| [same(row), vec![kind(row), release(row)]].concat());
}

/// Sets the factors of groups of enough rows.
fn set_by(outcomes: &mut [Outcome], key: &dyn Fn(&Outcome) -> Vec<String>) {
    let mut groups: BTreeMap<Vec<String>, Vec<usize>> = BTreeMap::new();
    for (at, row) in outcomes.iter().enumerate().filter(|(_, row)| row.time.is_some()) {
        groups.entry(key(row)).or_default().push(at);
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
