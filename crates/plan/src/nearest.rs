//! How far layouts are apart, and the layout nearest to one that cannot be.

use crate::architecture::Architecture;
use crate::parallelism::{Parallelism, Training};
use crate::schedule::ScheduleKind;

/// A degree, and what a doubling of it counts.
type Degree = (fn(&mut Parallelism) -> &mut usize, f64);

/// What splits the model and the batch counts most, replicas a little less, what only orders the work of a pipeline half of it. Those
/// that take GPUs come first, then those of experts.
const DEGREES: [Degree; 8] = [
    (|layout| &mut layout.tensor, 1.0),
    (|layout| &mut layout.context, 1.0),
    (|layout| &mut layout.pipeline, 1.0),
    (|layout| &mut layout.data, 0.9),
    (|layout| &mut layout.expert, 1.0),
    (|layout| &mut layout.expert_tensor, 1.0),
    (|layout| &mut layout.micro_batch, 0.5),
    (|layout| &mut layout.virtual_stages, 0.5),
];

/// How many of them take GPUs, and how many those and those of experts are.
const DENSE: usize = 4;
const EXPERTS: usize = 6;

/// What a doubling of the number of GPUs counts: a layout is for GPUs that are there, or were asked for.
const GPUS: f64 = 2.0;

/// What another schedule counts, other states that are sharded, or something else that is computed again: a little more, so that a
/// schedule stays where other stages or micro-batches do.
const OTHER: f64 = 0.55;

/// Doublings between two numbers.
fn doublings(a: usize, b: usize) -> f64 {
    (a.max(1) as f64 / b.max(1) as f64).log2().abs()
}

fn divisors(of: usize) -> Vec<usize> {
    (1..=of).filter(|size| of.is_multiple_of(*size)).collect()
}

impl Parallelism {
    /// How far `other` is from this layout: doublings of every degree, twice those of the number of GPUs, and about half of one
    /// for everything else that differs.
    pub fn distance(&self, other: &Self) -> f64 {
        let (mut a, mut b) = (*self, *other);
        let degrees: f64 =
            DEGREES.iter().map(|(of, weight)| weight * doublings(*of(&mut a), *of(&mut b))).sum();
        let others = [
            self.schedule != other.schedule,
            self.sharding != other.sharding,
            self.recompute != other.recompute,
        ];
        let others = OTHER * others.into_iter().filter(|differ| *differ).count() as f64;
        degrees + GPUS * doublings(self.gpus(), other.gpus()) + others
    }

    /// The layout on at most `gpus` GPUs that can be and is nearest to this one; of equals the one whose matrices are split most as
    /// here.
    pub fn nearest(&self, model: &Architecture, training: &Training, gpus: usize) -> Self {
        let layers = model.layers + model.mtp_layers + 2;
        let (experts, width) = model.moe.as_ref().map_or((1, 1), |moe| (moe.experts, moe.expert_ffn));
        let batch = divisors(training.global_batch);
        let mut values = [
            divisors(model.attention.heads()),
            divisors(training.sequence),
            (1..=layers).collect(),
            batch.clone(),
            divisors(experts),
            divisors(width),
            batch,
            (1..=layers).collect(),
        ];
        let mut asked = *self;
        for (values, (of, _)) in values.iter_mut().zip(DEGREES) {
            let degree = *of(&mut asked);
            values.sort_by(|a, b| doublings(*a, degree).total_cmp(&doublings(*b, degree)));
        }
        // One GPU, which splits nothing, can always be.
        let best = (f64::INFINITY, Self::default());
        let mut near = Near { model, training, gpus, asked, values, best };
        near.search(0, *self, 0.0);
        near.best.1
    }
}

/// A search for the nearest layout, degree by degree; what is already farther than the best is left out.
struct Near<'a> {
    model: &'a Architecture,
    training: &'a Training,
    gpus: usize,
    asked: Parallelism,
    /// `[degree]` what it can be, the nearest first.
    values: [Vec<usize>; DEGREES.len()],
    best: (f64, Parallelism),
}

impl Near<'_> {
    /// Tries the degrees from number `at` on; those before are set, at a distance of `far`.
    fn search(&mut self, at: usize, layout: Parallelism, far: f64) {
        if self.is_no_nearer(far) || !self.can_go_on(at, &layout) {
            return;
        }
        let Some((of, weight)) = DEGREES.get(at) else { return self.keep(layout, far) };
        let degree = *of(&mut self.asked);
        for value in 0..self.values[at].len() {
            let (value, mut next) = (self.values[at][value], layout);
            *of(&mut next) = value;
            let far = far + weight * doublings(value, degree);
            if self.is_no_nearer(far) {
                // So are all that follow.
                return;
            }
            let more = if at + 1 == DENSE {
                GPUS * doublings(next.gpus(), self.asked.gpus().min(self.gpus))
            } else {
                0.0
            };
            self.search(at + 1, next, far + more);
        }
    }

    fn is_no_nearer(&self, far: f64) -> bool {
        far >= self.best.0
    }

    /// Whether the first `at` degrees agree with each other.
    fn can_go_on(&self, at: usize, layout: &Parallelism) -> bool {
        let ranks = layout.tensor * layout.context * layout.data;
        match at {
            DENSE => layout.gpus() <= self.gpus,
            EXPERTS => ranks.is_multiple_of(layout.expert * layout.expert_tensor),
            _ => true,
        }
    }

    fn keep(&mut self, layout: Parallelism, far: f64) {
        for schedule in [self.asked.schedule].into_iter().chain(ScheduleKind::ALL) {
            let layout = Parallelism { schedule, ..layout };
            let far = far + if schedule == self.asked.schedule { 0.0 } else { OTHER };
            if !self.is_no_nearer(far) && layout.check(self.model, self.training).is_ok() {
                self.best = (far, layout);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DispatchKind;

    fn training(global_batch: usize) -> Training {
        Training { global_batch, dispatch: DispatchKind::default(), ..Training::default() }
    }

    fn nearest(model: &str, text: &str, global_batch: usize, gpus: usize) -> String {
        let model = Architecture::built_in(model).unwrap();
        let layout: Parallelism = text.parse().unwrap();
        layout.nearest(&model, &training(global_batch), gpus).to_string()
    }

    #[test]
    fn of_layouts_that_cannot_be_the_nearest_that_can_keeps_gpus_and_split() {
        let dense = |text, batch| nearest("Llama-3.1-8B", text, batch, 64);
        assert_eq!(dense("pp4 dp16 mb1 zb1p zero1", 512), "pp4 dp16 mb1 zb1p zero1");
        assert_eq!(dense("pp4 dp16 zb1p vp2", 512), "pp4 dp16 mb1 zb1p zero1");
        assert_eq!(dense("pp4 dp16 vp4 dualpipev", 512), "pp4 vp2 dp16 mb1 dualpipev zero1");
        assert_eq!(dense("pp4 dp2 mb4 vp2", 16), "pp4 vp2 dp2 mb2 interleaved zero1");
        assert_eq!(dense("pp4 dp2 vp2", 12), "pp4 dp2 mb1 1f1b zero1");
        assert_eq!(dense("dp3", 16), "dp4 mb1 zero1");
        assert_eq!(dense("tp3 dp16", 512), "tp4 dp16 mb1 zero1");
        assert_eq!(dense("dp0 mb0", 512), "dp1 mb1 zero1");
        let sparse = |text| nearest("Qwen3-30B-A3B", text, 512, 64);
        assert_eq!(sparse("ep48 dp64"), "ep64 dp64 mb1 zero1");
        assert_eq!(sparse("ep32 dp16"), "ep16 dp16 mb1 zero1");
        assert_eq!(sparse("tp3 etp3 ep7 dp16"), "tp4 ep8 etp4 dp16 mb1 zero1");
    }

    #[test]
    fn replicas_give_way_first_where_gpus_lack() {
        let model = "Llama-3.1-8B";
        assert_eq!(nearest(model, "tp4 dp30", 512, 64), "tp4 dp16 mb1 zero1");
        assert_eq!(nearest(model, "tp8 dp64", 512, 64), "tp8 dp8 mb1 zero1");
        assert_eq!(nearest("Llama-3.1-405B", "pp128 dp1", 512, 64), "pp64 dp1 mb1 1f1b zero1");
        assert_eq!(nearest(model, "tp8 pp4 dp4", 512, 8), "tp8 dp1 mb1 zero1");
    }

    /// However far what is asked for is from anything that can be.
    #[test]
    fn the_nearest_can_always_be() {
        let model = Architecture::built_in("DeepSeek-V3").unwrap();
        for text in
            ["tp1000 pp1000", "dp1048576", "pp7 vp1000 ep1000 etp1000 cp77 mb999 dualpipev", "vp64 dp63 zb1p"]
        {
            for (batch, gpus) in [(1, 1), (6, 100), (15_360, 2048)] {
                let layout: Parallelism = text.parse().unwrap();
                let nearest = layout.nearest(&model, &training(batch), gpus);
                assert!(nearest.gpus() <= gpus, "{text}: {nearest}");
                nearest
                    .check(&model, &training(batch))
                    .unwrap_or_else(|error| panic!("{text}: {nearest}: {error}"));
            }
        }
    }
}
