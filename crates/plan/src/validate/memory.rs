//! Peak memory: which peak a source gives, and how well each is predicted.

use serde::Serialize;

use super::score::{average, by_key};
use super::{GIB, Outcome, Prediction};
use crate::calibration::{ALLOCATED_BAND, MEMORY_BAND, RESERVED};

/// Which peak of memory a source gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryKind {
    /// What the allocator has allocated on the fullest GPU.
    AllocatedFullest,
    /// What it has allocated on a GPU of the last pipeline rank, which writes Megatron's log.
    AllocatedLast,
    /// What it has reserved on the fullest GPU.
    ReservedFullest,
}

impl MemoryKind {
    /// The same in words.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllocatedFullest => "allocated on the fullest GPU",
            Self::AllocatedLast => "allocated on the last pipeline rank",
            Self::ReservedFullest => "reserved on the fullest GPU",
        }
    }

    /// Half the width of its 80% interval, in logarithms.
    fn band(self) -> f64 {
        if self == Self::ReservedFullest { MEMORY_BAND } else { ALLOCATED_BAND }
    }

    /// This peak, in bytes.
    fn of(self, priced: &Prediction) -> f64 {
        match self {
            Self::AllocatedFullest => priced.memory_bytes,
            Self::AllocatedLast => priced.last_rank_bytes,
            Self::ReservedFullest => RESERVED * priced.memory_bytes,
        }
    }
}

/// A peak of memory and its prediction, GiB.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Memory {
    /// Which peak.
    pub kind: MemoryKind,
    /// As measured.
    pub measured_gib: f64,
    /// As predicted.
    pub predicted_gib: f64,
    /// The 80% interval of the prediction.
    pub interval_gib: [f64; 2],
}

impl Memory {
    pub(super) fn new(kind: MemoryKind, measured_gib: f64, priced: &Prediction) -> Self {
        let predicted_gib = kind.of(priced) / GIB;
        let interval_gib = [-kind.band(), kind.band()].map(|log| predicted_gib * log.exp());
        Self { kind, measured_gib, predicted_gib, interval_gib }
    }
}

/// How well peaks of memory are predicted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct MemoryFigures {
    /// Mean absolute error relative to the measurement.
    pub mape: f64,
    /// Mean signed error relative to the measurement.
    pub bias: f64,
    /// Share of measurements inside the 80% interval.
    pub coverage: f64,
    /// Mean width of the interval relative to the prediction.
    pub width: f64,
}

impl MemoryFigures {
    /// Means over rows; `None` without any.
    pub(super) fn of_rows<'a>(rows: impl Iterator<Item = &'a Memory>) -> Option<Self> {
        Self::mean(rows.map(|row| {
            let [low, high] = row.interval_gib;
            let error = row.predicted_gib / row.measured_gib - 1.0;
            let inside = (low..=high).contains(&row.measured_gib);
            Self {
                mape: error.abs(),
                bias: error,
                coverage: f64::from(u8::from(inside)),
                width: (high - low) / row.predicted_gib,
            }
        }))
    }

    /// The mean of several; `None` of none.
    pub(super) fn mean(figures: impl Iterator<Item = Self>) -> Option<Self> {
        let all: Vec<Self> = figures.collect();
        let over = |pick: fn(&Self) -> f64| average(&all.iter().map(pick).collect::<Vec<_>>());
        Some(Self {
            mape: over(|of| of.mape)?,
            bias: over(|of| of.bias)?,
            coverage: over(|of| of.coverage)?,
            width: over(|of| of.width)?,
        })
    }
}

/// Rows that give one kind of peak.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MemoryGroup {
    /// Which.
    pub kind: MemoryKind,
    /// Families in it.
    pub families: usize,
    /// Rows in it.
    pub rows: usize,
    /// Means over families.
    pub figures: MemoryFigures,
}

/// The figures of each kind of peak that some row gives.
pub(super) fn by_kind(outcomes: &[Outcome]) -> Vec<MemoryGroup> {
    let kinds = [MemoryKind::AllocatedFullest, MemoryKind::AllocatedLast, MemoryKind::ReservedFullest];
    let of = |kind| {
        let own = outcomes.iter().filter(|row| row.memory.is_some_and(|memory| memory.kind == kind));
        let families = by_key(own, Outcome::family);
        let figures = families
            .values()
            .filter_map(|rows| MemoryFigures::of_rows(rows.iter().filter_map(|row| row.memory.as_ref())));
        Some(MemoryGroup {
            kind,
            families: families.len(),
            rows: families.values().map(Vec::len).sum(),
            figures: MemoryFigures::mean(figures)?,
        })
    };
    kinds.into_iter().filter_map(of).collect()
}
