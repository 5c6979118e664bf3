//! Statistics of predictions against measurements. A family is one (file, model, GPU); figures of many rows are
//! means over families of the families' own means, so that no source decides by its number of rows.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Outcome;
use super::memory::MemoryFigures;

/// How well step times are predicted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct TimeFigures {
    /// Mean absolute error relative to the measurement; a complete row that was skipped counts 1.
    pub mape: f64,
    /// Mean signed error relative to the measurement.
    pub bias: f64,
    /// Share of measurements inside the 80% interval.
    pub coverage: f64,
    /// Mean width of the interval relative to the prediction.
    pub width: f64,
}

/// Rows of one family or the mean over the families of one kind.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Group {
    /// What the rows share.
    pub name: String,
    /// Families in it.
    pub families: usize,
    /// Rows whose step time was compared.
    pub timed: usize,
    /// Rows whose step time does not count because a test holds them; they count for memory.
    pub golden: usize,
    /// Other rows without a compared step time.
    pub skipped: usize,
    /// Those of them that are complete and count as an error of 100%.
    pub lost: usize,
    /// Why rows were skipped, without the names of rows, and how many.
    pub reasons: Vec<(String, usize)>,
    /// Without knowledge of the software.
    pub plain: Option<TimeFigures>,
    /// With the release factor.
    pub released: Option<TimeFigures>,
    /// The trivial baseline's mean absolute relative error.
    pub baseline_mape: Option<f64>,
    /// Rows whose peak memory was compared.
    pub weighed: usize,
    /// Of peak memory.
    pub memory: Option<MemoryFigures>,
    /// Kendall's tau among plans of the same model, GPU and count.
    pub tau: Option<f64>,
}

impl Group {
    /// A group without rows.
    pub(super) fn empty(name: &str) -> Self {
        mean(name.to_string(), &[])
    }
}

/// The figures of each family, in order of its name.
pub fn families(outcomes: &[Outcome]) -> Vec<Group> {
    by_key(outcomes, Outcome::family).into_iter().map(|(name, rows)| family(name, &rows)).collect()
}

/// Means over families, for every value of `key`.
pub fn grouped(outcomes: &[Outcome], key: impl Fn(&Outcome) -> String) -> Vec<Group> {
    by_key(outcomes, key)
        .into_iter()
        .map(|(name, rows)| {
            let families = by_key(rows.iter().copied(), Outcome::family);
            let families: Vec<Group> = families.into_iter().map(|(name, rows)| family(name, &rows)).collect();
            Group { reasons: reasons_of(&rows), ..mean(name, &families) }
        })
        .collect()
}

/// Why rows were skipped as `of` puts it, and how many; the most frequent reason first.
pub(super) fn reasons<'a>(
    said: impl Iterator<Item = Option<&'a str>>,
    of: fn(&str) -> String,
) -> Vec<(String, usize)> {
    let mut counts = BTreeMap::new();
    for reason in said.flatten() {
        *counts.entry(of(reason)).or_insert(0) += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(_, rows)| std::cmp::Reverse(*rows));
    counts
}

fn reasons_of(rows: &[&Outcome]) -> Vec<(String, usize)> {
    reasons(rows.iter().map(|row| row.skipped.as_deref()), general)
}

/// A reason without what it quotes, which differs from row to row.
fn general(reason: &str) -> String {
    let parts = reason.split('"').enumerate().filter(|(at, _)| at % 2 == 0).map(|(_, part)| part);
    parts.collect::<Vec<_>>().join("...")
}

pub(super) fn by_key<'a, I>(
    outcomes: I,
    key: impl Fn(&Outcome) -> String,
) -> BTreeMap<String, Vec<&'a Outcome>>
where
    I: IntoIterator<Item = &'a Outcome>,
{
    let mut groups: BTreeMap<String, Vec<&Outcome>> = BTreeMap::new();
    for outcome in outcomes {
        groups.entry(key(outcome)).or_default().push(outcome);
    }
    groups
}

fn family(name: String, rows: &[&Outcome]) -> Group {
    let timed: Vec<&Outcome> = rows.iter().copied().filter(|row| row.time.is_some()).collect();
    let lost = rows.iter().filter(|row| row.time.is_none() && row.complete).count();
    let skipped = rows.iter().filter(|row| row.skipped.is_some()).count();
    let memory = || rows.iter().filter_map(|row| row.memory.as_ref());
    let baseline: Vec<f64> = timed.iter().filter_map(|row| row.time?.baseline_error()).collect();
    Group {
        name,
        families: 1,
        timed: timed.len(),
        golden: rows.len() - timed.len() - skipped,
        skipped,
        lost,
        reasons: reasons_of(rows),
        plain: time_figures(&timed, lost, |_| 1.0, |row| row.time.map(|time| time.interval_s)),
        released: time_figures(&timed, lost, Outcome::factor, |row| {
            row.time.map(|time| time.released_interval_s)
        }),
        baseline_mape: average(&baseline),
        weighed: memory().count(),
        memory: MemoryFigures::of_rows(memory()),
        tau: tau(&timed),
    }
}

fn time_figures(
    timed: &[&Outcome],
    lost: usize,
    factor: impl Fn(&Outcome) -> f64,
    interval: impl Fn(&Outcome) -> Option<[f64; 2]>,
) -> Option<TimeFigures> {
    let mut sum = TimeFigures::default();
    for row in timed {
        let (Some(time), Some([low, high])) = (row.time, interval(row)) else { continue };
        let predicted = time.predicted_s * factor(row);
        let error = predicted / time.measured_s - 1.0;
        sum.mape += error.abs();
        sum.bias += error;
        sum.coverage += f64::from(u8::from((low..=high).contains(&time.measured_s)));
        sum.width += (high - low) / predicted;
    }
    let rows = timed.len() as f64;
    (rows > 0.0 || lost > 0).then(|| TimeFigures {
        mape: (sum.mape + lost as f64) / (rows + lost as f64),
        bias: sum.bias / rows.max(1.0),
        coverage: sum.coverage / (rows + lost as f64),
        width: sum.width / rows.max(1.0),
    })
}

fn mean(name: String, families: &[Group]) -> Group {
    let over =
        |pick: &dyn Fn(&Group) -> Option<f64>| average(&families.iter().filter_map(pick).collect::<Vec<_>>());
    let figures = |pick: fn(&Group) -> Option<TimeFigures>| {
        Some(TimeFigures {
            mape: over(&|group| pick(group).map(|figures| figures.mape))?,
            bias: over(&|group| pick(group).map(|figures| figures.bias))?,
            coverage: over(&|group| pick(group).map(|figures| figures.coverage))?,
            width: over(&|group| pick(group).map(|figures| figures.width))?,
        })
    };
    Group {
        name,
        families: families.len(),
        timed: families.iter().map(|group| group.timed).sum(),
        golden: families.iter().map(|group| group.golden).sum(),
        skipped: families.iter().map(|group| group.skipped).sum(),
        lost: families.iter().map(|group| group.lost).sum(),
        reasons: Vec::new(),
        plain: figures(|group| group.plain),
        released: figures(|group| group.released),
        baseline_mape: over(&|group| group.baseline_mape),
        weighed: families.iter().map(|group| group.weighed).sum(),
        memory: MemoryFigures::mean(families.iter().filter_map(|group| group.memory)),
        tau: over(&|group| group.tau),
    }
}

/// Kendall's tau of throughput per GPU over all pairs of distinct plans on the same number of GPUs. Rows that
/// re-measure a plan are one plan with the median of its measurements.
fn tau(timed: &[&Outcome]) -> Option<f64> {
    let mut plans: BTreeMap<(u64, &str), Vec<(f64, f64)>> = BTreeMap::new();
    for row in timed {
        let time = row.time?;
        let per_token = (time.measured_s / time.tokens, time.predicted_s / time.tokens);
        plans.entry((row.gpus, &row.plan)).or_default().push(per_token);
    }
    let plans: Vec<(u64, f64, f64)> = plans
        .into_iter()
        .filter_map(|((gpus, _), rows)| {
            let measured = median(rows.iter().map(|row| row.0).collect())?;
            Some((gpus, measured, median(rows.iter().map(|row| row.1).collect())?))
        })
        .collect();
    let (mut agreement, mut pairs) = (0.0, 0.0);
    for (at, first) in plans.iter().enumerate() {
        for second in plans[at + 1..].iter().filter(|second| second.0 == first.0 && second.1 != first.1) {
            let product = (first.1 - second.1) * (first.2 - second.2);
            agreement += if product > 0.0 {
                1.0
            } else if product < 0.0 {
                -1.0
            } else {
                0.0
            };
            pairs += 1.0;
        }
    }
    (pairs > 0.0).then(|| agreement / pairs)
}

pub(super) fn average(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// The middle value, or the mean of the two in the middle.
pub(super) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}
