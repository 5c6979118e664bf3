//! How many rows the fullest expert-parallel rank receives, over its even share.
//!
//! A step waits, in every MoE layer, for the rank whose experts are most popular. Which those are differs from layer to layer and
//! from step to step; what a plan can know is a distribution of popularity. Steps are drawn from it, always the same ones.

use crate::parallelism::Routing;
use crate::pricing::RoutedStep;

/// Steps that are drawn.
const STEPS: usize = 100;
/// Points of a distribution, of equal probability.
const POINTS: usize = 1024;
/// The most popular expert over the least at exponent 1: with it the fullest of 64 to 256 ranks lies where the slowest one's
/// kernels were measured (`kernels::imbalance`, a test).
const RANGE: f64 = 256.0;

/// Rows of the fullest rank over the even share, in the median step and in one of twenty.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Percentiles {
    /// The median.
    pub p50: f64,
    /// The 95th percentile.
    pub p95: f64,
}

impl Percentiles {
    /// Every rank gets the same.
    pub const EVEN: Self = Self { p50: 1.0, p95: 1.0 };

    /// That of a step.
    pub fn of(self, step: RoutedStep) -> f64 {
        match step {
            RoutedStep::Median => self.p50,
            RoutedStep::Slow => self.p95,
        }
    }
}

/// [`Percentiles`] for every number of ranks that divides the experts.
#[derive(Debug, Clone, PartialEq)]
pub struct Unevenness(Vec<(usize, Percentiles)>);

impl Unevenness {
    /// Of a model with `layers` MoE layers of `experts` experts, of which a token visits `top_k`. A step's rows are the mean
    /// over its layers.
    pub fn new(routing: &Routing, experts: usize, top_k: usize, layers: usize) -> Self {
        let Some(points) = points(routing) else { return Self(Vec::new()) };
        let degrees: Vec<usize> = (2..=experts).filter(|ranks| experts.is_multiple_of(*ranks)).collect();
        let mut random = SplitMix(experts as u64);
        let mut steps = vec![Vec::with_capacity(STEPS); degrees.len()];
        let mut loads = vec![0.0; experts];
        for _ in 0..STEPS {
            let mut sums = vec![0.0; degrees.len()];
            for _ in 0..layers {
                loads.fill_with(|| points[random.next() as usize % points.len()]);
                cap(&mut loads, top_k);
                let mean = loads.iter().sum::<f64>() / experts as f64;
                for (sum, ranks) in sums.iter_mut().zip(&degrees) {
                    let held = experts / ranks;
                    let fullest = loads.chunks(held).map(|of| of.iter().sum::<f64>()).fold(0.0, f64::max);
                    *sum += fullest / (held as f64 * mean).max(f64::MIN_POSITIVE);
                }
            }
            for (all, sum) in steps.iter_mut().zip(sums) {
                all.push(sum / layers.max(1) as f64);
            }
        }
        let percentiles = |mut all: Vec<f64>| {
            all.sort_by(f64::total_cmp);
            Percentiles { p50: all[STEPS / 2], p95: all[STEPS * 95 / 100] }
        };
        Self(degrees.into_iter().zip(steps.into_iter().map(percentiles)).collect())
    }

    /// With the experts spread over `ranks` ranks.
    pub fn over(&self, ranks: usize) -> Percentiles {
        let known = self.0.binary_search_by_key(&ranks, |(degree, _)| *degree);
        known.map_or(Percentiles::EVEN, |at| self.0[at].1)
    }
}

/// Lets no expert have more than all tokens, each of which visits `top_k` different ones: what is above goes to the others, in
/// proportion to what they have.
fn cap(loads: &mut [f64], top_k: usize) {
    let mut rest: f64 = loads.iter().sum();
    if loads.iter().all(|load| load * top_k as f64 <= rest) {
        return;
    }
    let mut order: Vec<usize> = (0..loads.len()).collect();
    order.sort_by(|a, b| loads[*b].total_cmp(&loads[*a]));
    for full in 0..top_k.min(loads.len()) {
        // The load of an expert that every token visits, if the first `full` are such.
        let all = rest / (top_k - full) as f64;
        if loads[order[full]] <= all {
            order[..full].iter().for_each(|at| loads[*at] = all);
            return;
        }
        rest -= loads[order[full]];
    }
}

/// Loads of equal probability; none when routing is balanced.
fn points(routing: &Routing) -> Option<Vec<f64>> {
    match routing {
        Routing::Balanced => None,
        Routing::PowerLaw { exponent } if *exponent <= 0.0 => None,
        Routing::PowerLaw { exponent } => {
            // Popularity has the density x^-exponent between 1 and RANGE; below 1 the density 1/x up to RANGE^exponent, which
            // starts at even. This inverts the distributions.
            let power = 1.0 - exponent.max(1.0);
            let quantile = |u: f64| match power > -1e-9 {
                true => RANGE.powf(exponent.min(1.0) * u),
                false => (1.0 + u * (RANGE.powf(power) - 1.0)).powf(1.0 / power),
            };
            Some((0..POINTS).map(|point| quantile((point as f64 + 0.5) / POINTS as f64)).collect())
        }
        Routing::Measured { loads } if loads.iter().any(|load| *load > 0.0) => Some(loads.clone()),
        Routing::Measured { .. } => None,
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word ^ (word >> 31)) >> 11
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::imbalance;

    #[test]
    fn balanced_routing_is_even() {
        for routing in [Routing::Balanced, Routing::PowerLaw { exponent: 0.0 }] {
            assert_eq!(Unevenness::new(&routing, 64, 6, 4).over(8), Percentiles::EVEN);
        }
        let even = Unevenness::new(&Routing::Measured { loads: vec![3.0; 16] }, 16, 2, 4).over(4);
        assert!((even.p95 - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_power_law_lies_near_the_measured_kernels() {
        for exponent in [1.01, 1.2] {
            let law = Unevenness::new(&Routing::PowerLaw { exponent }, 256, 8, 58);
            for ranks in [64, 128, 256] {
                let (said, measured) = (law.over(ranks), imbalance(exponent, ranks, 1024.0));
                let off = said.p50 / measured;
                assert!(
                    (0.7..1.3).contains(&off),
                    "{exponent}, {ranks} ranks: {said:?}, measured {measured}"
                );
                assert!(said.p95 > said.p50);
            }
        }
    }

    #[test]
    fn more_ranks_and_steeper_laws_are_less_even() {
        let of = |exponent| Unevenness::new(&Routing::PowerLaw { exponent }, 128, 8, 8);
        let mut last = 1.0;
        for ranks in [2, 4, 8, 16, 32, 64, 128] {
            let now = of(1.0).over(ranks).p50;
            assert!(
                now > last && of(Routing::STEEPEST).over(ranks).p50 > now,
                "{ranks} ranks: {now} after {last}"
            );
            last = now;
        }
    }

    #[test]
    fn a_law_starts_at_even_and_ends_at_what_a_token_can_visit() {
        let of = |exponent| Unevenness::new(&Routing::PowerLaw { exponent }, 8, 2, 32).over(8);
        let mut last = Percentiles { p50: 1.0, p95: 1.0 };
        for exponent in [1e-4, 0.1, 0.5, 1.0, 1.2, Routing::STEEPEST] {
            let now = of(exponent);
            assert!(now.p50 > last.p50 && now.p95 > last.p95, "{exponent}: {now:?} after {last:?}");
            last = now;
        }
        assert!(of(1e-4).p95 < 1.001 && last.p95 <= 4.0, "{last:?}");
    }

    #[test]
    fn no_expert_gets_more_than_every_token() {
        let mut loads = [10.0, 1.0, 4.0, 1.0, 1.0, 1.0];
        cap(&mut loads, 3);
        // Two experts get every token, the other four share the third visit.
        assert_eq!(loads, [4.0, 1.0, 4.0, 1.0, 1.0, 1.0]);
        cap(&mut loads, 2);
        assert_eq!(loads, [4.0, 1.0, 4.0, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn a_hot_expert_fills_its_rank() {
        let mut loads = vec![0.0; 8];
        loads[3] = 1.0;
        let hot = Unevenness::new(&Routing::Measured { loads }, 8, 1, 1).over(8);
        assert!(hot.p95 >= hot.p50 && hot.p95 > 2.0 && hot.p95 <= 8.0, "{hot:?}");
    }
}
