//! Which layouts there are, and which are best: an enumeration of everything feasible, pruned by what can be known before a
//! layout is priced, and a Pareto front of time, memory headroom and cost.
//!
//! Results do not depend on how a search is cut into parts: every layout has a number, ties go to the lower one.

mod front;
mod space;

use crate::architecture::Architecture;
use crate::hardware::Cluster;
use crate::parallelism::{Parallelism, Recomputation, Training};
use crate::pricing::{Priced, Pricer};

pub use front::Found;
pub use space::Layouts;

/// A layout with its price.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Its place in the order of all layouts.
    pub number: usize,
    /// The layout.
    pub layout: Parallelism,
    /// What it costs.
    pub priced: Priced,
    /// Bytes that the fullest rank has left.
    pub headroom_bytes: f64,
    /// How likely it is to fit.
    pub fit_probability: f64,
    /// Dollars of the whole run, without failures.
    pub run_usd: f64,
}

/// A plan that fits with this probability can be counted on to: as likely as a figure is to lie in its 80% interval.
pub const SAFE: f64 = 0.8;

/// How many of the fastest plans a search keeps.
const KEPT: usize = 100;

/// A search for the layouts of one training on one cluster.
#[derive(Debug, Clone)]
pub struct Search {
    pricer: Pricer,
    cluster: Cluster,
    training: Training,
    layouts: Layouts,
}

impl Search {
    /// A search over every layout that uses the whole cluster, a half or a quarter of it, or as much as divides well.
    pub fn new(model: &Architecture, cluster: &Cluster, training: &Training) -> Self {
        Self {
            pricer: Pricer::new(model, cluster, training),
            layouts: Layouts::new(model, cluster, training),
            cluster: cluster.clone(),
            training: training.clone(),
        }
    }

    /// The same search, of layouts that compute `recompute` again and nothing else.
    pub fn recomputing(mut self, recompute: Recomputation) -> Self {
        self.layouts = self.layouts.recomputing(recompute);
        self
    }

    /// The layouts that are priced, in order: those whose parameters, gradients and optimizer states alone would fit.
    pub fn layouts(&self) -> impl Iterator<Item = Parallelism> {
        let memory = self.cluster.gpu.memory_bytes;
        self.layouts.clone().flat_map(move |degrees| {
            let fits = self.pricer.least_states(&degrees) <= memory;
            let variants = fits.then(|| self.layouts.variants(degrees));
            variants.into_iter().flatten()
        })
    }

    /// Searches every `parts`-th layout from number `part` on; [`Found::merge`] puts parts together.
    pub fn run(&self, part: usize, parts: usize) -> Found {
        let mut found = Found::new(KEPT);
        for (number, layout) in self.layouts().enumerate().skip(part).step_by(parts.max(1)) {
            let Ok(priced) = self.pricer.price(&layout) else { continue };
            found.priced += 1;
            if priced.fits {
                found.add(self.plan(number, layout, priced));
            }
        }
        found
    }

    /// The plan again, its pipeline simulated op by op.
    pub fn refine(&self, plan: &Plan) -> Plan {
        match self.pricer.price_simulated(&plan.layout) {
            Ok(priced) => self.plan(plan.number, plan.layout, priced),
            Err(_) => plan.clone(),
        }
    }

    /// The layout that comes nearest to fitting when none does: the one whose fullest rank lacks fewest bytes; the fastest of
    /// equals.
    pub fn nearest(&self) -> Option<Plan> {
        let all = self.layouts.clone().flat_map(|degrees| self.layouts.variants(degrees));
        let priced = all.enumerate().filter_map(|(number, layout)| {
            let priced = self.pricer.price(&layout).ok()?;
            Some(self.plan(number, layout, priced))
        });
        priced.max_by(|a, b| {
            let room = a.headroom_bytes.total_cmp(&b.headroom_bytes);
            room.then(b.priced.step_s.total_cmp(&a.priced.step_s)).then(b.number.cmp(&a.number))
        })
    }

    /// Of the layouts that are searched and can be counted on to fit the one nearest to `to`; of equals the first.
    pub fn nearest_that_fits(&self, to: &Parallelism) -> Option<Parallelism> {
        let mut layouts: Vec<(f64, Parallelism)> =
            self.layouts().map(|layout| (to.distance(&layout), layout)).collect();
        layouts.sort_by(|a, b| a.0.total_cmp(&b.0));
        let capacity = self.cluster.gpu.memory_bytes;
        let fits = |layout: &Parallelism| {
            self.pricer.price(layout).is_ok_and(|priced| priced.fit_probability(capacity) >= SAFE)
        };
        layouts.into_iter().map(|(_, layout)| layout).find(fits)
    }

    /// The pricer of this search.
    pub fn pricer(&self) -> &Pricer {
        &self.pricer
    }

    fn plan(&self, number: usize, layout: Parallelism, priced: Priced) -> Plan {
        let tokens_a_step = (self.training.global_batch * self.training.sequence) as f64;
        let hours = self.training.tokens / tokens_a_step * priced.step_s / 3600.0;
        Plan {
            number,
            headroom_bytes: self.cluster.gpu.memory_bytes - priced.memory.total(),
            fit_probability: priced.fit_probability(self.cluster.gpu.memory_bytes),
            run_usd: hours * layout.gpus() as f64 * self.cluster.price_usd_per_gpu_hour,
            layout,
            priced,
        }
    }
}
