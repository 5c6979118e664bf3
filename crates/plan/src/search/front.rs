//! What a search keeps: the fastest plans and the Pareto front.

use std::collections::BTreeMap;

use super::{Plan, SAFE};

/// Plans found so far.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// Layouts that were priced, those that do not fit included.
    pub priced: usize,
    /// Layouts that fit.
    pub feasible: usize,
    /// The fastest plans, fastest first.
    pub fastest: Vec<Plan>,
    /// The fastest of the plans that can be counted on to fit ([`SAFE`]), fastest first.
    pub safe: Vec<Plan>,
    /// Plans that no other beats in time, headroom and cost at once, fastest first.
    pub front: Vec<Plan>,
    kept: usize,
}

impl Found {
    /// Nothing yet; `kept` of the fastest plans are kept.
    pub(super) fn new(kept: usize) -> Self {
        Self { priced: 0, feasible: 0, fastest: Vec::new(), safe: Vec::new(), front: Vec::new(), kept }
    }

    pub(super) fn add(&mut self, plan: Plan) {
        self.feasible += 1;
        self.keep(plan);
    }

    /// The plans of two parts of one search.
    pub fn merge(mut self, other: Self) -> Self {
        self.priced += other.priced;
        self.feasible += other.feasible;
        other.fastest.iter().for_each(|plan| keep_fast(&mut self.fastest, plan, self.kept));
        other.safe.iter().for_each(|plan| keep_fast(&mut self.safe, plan, self.kept));
        other.front.into_iter().for_each(|plan| self.keep_best(plan));
        self
    }

    /// Every plan that is kept, once.
    pub fn plans(&self) -> Vec<Plan> {
        let all = self.fastest.iter().chain(&self.safe).chain(&self.front);
        let plans: BTreeMap<usize, &Plan> = all.map(|plan| (plan.number, plan)).collect();
        plans.into_values().cloned().collect()
    }

    /// The same counts with these plans in place of those that were kept: [`super::Search::refine`] moves them about.
    pub fn refined(&self, plans: Vec<Plan>) -> Self {
        let mut found = Self { fastest: Vec::new(), safe: Vec::new(), front: Vec::new(), ..*self };
        for plan in plans {
            found.keep(plan);
        }
        found
    }

    /// The plan to take: the fastest that can be counted on to fit, where none can the fastest that fits.
    pub fn best(&self) -> Option<&Plan> {
        self.safe.first().or(self.fastest.first())
    }

    fn keep(&mut self, plan: Plan) {
        keep_fast(&mut self.fastest, &plan, self.kept);
        if plan.fit_probability >= SAFE {
            keep_fast(&mut self.safe, &plan, self.kept);
        }
        self.keep_best(plan);
    }

    /// The front is ordered by time, so that only plans before the new one can beat it, and it can beat only those after.
    fn keep_best(&mut self, plan: Plan) {
        let place = self.front.partition_point(|kept| faster(kept, &plan));
        if self.front[..place].iter().any(|kept| beats(kept, &plan)) {
            return;
        }
        let mut index = 0;
        self.front.retain(|kept| {
            index += 1;
            index <= place || !beats(&plan, kept)
        });
        self.front.insert(place, plan);
    }
}

/// Puts `plan` in its place among at most `most` of the fastest.
fn keep_fast(fastest: &mut Vec<Plan>, plan: &Plan, most: usize) {
    let place = fastest.partition_point(|kept| faster(kept, plan));
    if place < most {
        fastest.insert(place, plan.clone());
        fastest.truncate(most);
    }
}

/// The order of plans: by time, then by headroom, then by number.
fn faster(a: &Plan, b: &Plan) -> bool {
    let time = a.priced.step_s.total_cmp(&b.priced.step_s);
    let room = b.headroom_bytes.total_cmp(&a.headroom_bytes);
    time.then(room).then(a.number.cmp(&b.number)).is_lt()
}

/// Whether `a`, which is not slower, is as good in everything else.
fn beats(a: &Plan, b: &Plan) -> bool {
    a.headroom_bytes >= b.headroom_bytes && a.run_usd <= b.run_usd
}
