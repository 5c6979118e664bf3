//! How sure the parts of a step are.
//!
//! A part errs by what its tables and fitted constants do ([`PART_SPREADS`]), by borrowed efficiencies, and by what all parts err by
//! together: software releases, clocks, hosts. Of the latter the step's spread s says how much there is: with shares w of the step and
//! own spreads o, which err independently, s^2 = c^2 + sum (w o)^2 is solved for c.

use crate::calibration::PART_SPREADS;
use crate::kernels::Kernel;
use crate::ranged::Ranged;

use super::{Axis, Breakdown, Pricer, QUANTILE_90};

/// Parts of a step.
pub(super) const PARTS: usize = PART_SPREADS.len();

/// Where the parts are that an axis' communication makes, in the order of [`Axis::ALL`].
const OF_AXES: [usize; Axis::ALL.len()] = [5, 6, 7, 8, 10];

/// Where the interval of a part comes from: standard deviations of the logarithm of measured over predicted seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PartTerms {
    /// Of tables of kernels or collectives.
    pub table: f64,
    /// Of fitted constants.
    pub constants: f64,
    /// Because kernels have borrowed efficiencies.
    pub borrowed: f64,
    /// Of all parts together.
    pub common: f64,
}

impl PartTerms {
    /// The end of the interval over its middle.
    pub fn spread(&self) -> f64 {
        let squares = [self.table, self.constants, self.borrowed, self.common].map(|of| of * of);
        (QUANTILE_90 * squares.iter().sum::<f64>().sqrt()).exp()
    }
}

impl Pricer {
    /// Where the intervals of a step's parts come from, in the order of [`Breakdown::parts`].
    pub fn part_terms(&self, step: &Breakdown) -> [PartTerms; PARTS] {
        let step_s = step.total_s();
        let own = |of: f64, share: f64| (of * share).powi(2);
        let explained: f64 = step
            .parts()
            .iter()
            .zip(PART_SPREADS)
            .map(|((_, seconds), of)| own(of.table.hypot(of.constants), seconds / step_s))
            .sum();
        let common = (self.interval_terms(step).fit.powi(2) - explained).max(0.0).sqrt();
        let (compute, wide) = (self.training.compute, self.training.compute.wide());
        let kernels = [(Kernel::Gemm, compute), (Kernel::GroupedGemm, compute), (Kernel::Attention, wide)];
        std::array::from_fn(|part| PartTerms {
            table: PART_SPREADS[part].table,
            constants: PART_SPREADS[part].constants,
            borrowed: kernels
                .get(part)
                .map_or(0.0, |(kernel, precision)| self.rates.kernels.borrowed_spread(*kernel, *precision)),
            common,
        })
    }

    /// The names of a step's parts and their seconds with intervals.
    pub fn ranged_parts(&self, step: &Breakdown) -> [(&'static str, Ranged); PARTS] {
        let terms = self.part_terms(step);
        let parts = step.parts();
        std::array::from_fn(|part| (parts[part].0, Ranged::around(parts[part].1, terms[part].spread())))
    }

    /// The end of the interval of an axis' communication over its middle, of all that nothing hides and of all that kernels hide, in the
    /// order of [`Axis::ALL`].
    pub fn axis_spreads(&self, step: &Breakdown) -> [f64; Axis::ALL.len()] {
        let terms = self.part_terms(step);
        OF_AXES.map(|part| terms[part].spread())
    }
}
