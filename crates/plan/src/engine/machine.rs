//! A measured machine, and what a step of the engine takes on it.
//!
//! Ranks of a host share its memory, so that a rank's own cores move its bytes: nothing is hidden behind anything, and a
//! step is the sum of its phases; what travels between hosts besides, `on_hosts.rs` adds. A phase takes a share of what its products take alone, and a time for each element,
//! each multiply-add of attention and each call besides; these are fitted to steps of the engine itself. Where ranks outnumber
//! cores, which phase a rank waits in is the scheduler's choice: only whole steps are fitted there ([`Mode::in_turns`]).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::EngineLayout;
use super::work::{Phase, ProductKind, Products, StepRows, Work, step_work};

/// A machine as `unisono bench local` measures it; a TOML file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalMachine {
    /// Its processor, as the system names it.
    pub cpu: String,
    /// Cores.
    pub cores: usize,
    /// Bytes a second that one core copies.
    pub copy_bytes_per_s: f64,
    /// The factor within which the machine's fit predicts 80% of the measured steps that it leaves out; none in older files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within_80: Option<f64>,
    /// Rates of products.
    pub products: ProductRates,
    /// What phases take, by how many ranks and threads run.
    pub mode: Vec<Mode>,
}

/// Rates of products of one thread, over sizes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProductRates {
    /// Sizes of m, n and k that were measured, ascending.
    pub sizes: Vec<usize>,
    /// `[m][n][k]` 10^9 floating-point operations a second.
    pub plain: Vec<f64>,
    /// The same, the right operand transposed.
    pub transposed_right: Vec<f64>,
    /// The same, the left operand transposed.
    pub transposed_left: Vec<f64>,
}

/// What phases take while so many ranks run with so many threads each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mode {
    /// Ranks.
    pub ranks: usize,
    /// Threads of each.
    pub threads: usize,
    /// By phase.
    pub phase: Vec<PhaseRates>,
}

/// What one phase takes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PhaseRates {
    /// Its name in the engine's profile.
    pub name: String,
    /// Whether it communicates.
    pub communicates: bool,
    /// Seconds for each second that its products take alone.
    pub of_products: f64,
    /// Seconds for each element that it reads, writes or receives besides.
    pub element_s: f64,
    /// Seconds for each multiply-add of attention.
    pub score_s: f64,
    /// Seconds for each kernel or call.
    pub call_s: f64,
}

impl PhaseRates {
    fn scale(&mut self, factor: f64) {
        for rate in [&mut self.of_products, &mut self.element_s, &mut self.score_s, &mut self.call_s] {
            *rate *= factor;
        }
    }
}

impl Mode {
    /// What phases take while `ranks` ranks of one thread take turns on the cores that this mode's ranks fill: as many times as
    /// long as there are turns, times the median share by which `steps` took longer than that (work, and seconds of the whole).
    pub fn in_turns(
        &self,
        rates: &ProductRates,
        ranks: usize,
        steps: &[(BTreeMap<Phase, Work>, f64)],
    ) -> Self {
        let turns = ranks as f64 / self.ranks as f64;
        let longer = steps.iter().map(|(work, seconds)| seconds / (turns * self.step_s(rates, work)));
        let mut longer: Vec<f64> = longer.filter(|ratio| ratio.is_finite()).collect();
        longer.sort_by(f64::total_cmp);
        let median = longer.get(longer.len() / 2).copied().unwrap_or(1.0);
        let mut mode = Self { ranks, threads: 1, phase: self.phase.clone() };
        // All cores together do not work faster for being shared.
        mode.phase.iter_mut().for_each(|rates| rates.scale(turns * median.max(1.0)));
        mode
    }

    /// Seconds of a step that does `work`.
    pub fn step_s(&self, rates: &ProductRates, work: &BTreeMap<Phase, Work>) -> f64 {
        work.iter().map(|(phase, work)| self.phase_s(rates, *phase, work)).sum()
    }

    pub(super) fn phase_s(&self, rates: &ProductRates, (communicates, name): Phase, work: &Work) -> f64 {
        let own = self.phase.iter().find(|own| own.communicates == communicates && own.name == name);
        let Some(own) = own else { return 0.0 };
        let factors = [own.of_products, own.element_s, own.score_s, own.call_s];
        features(rates, work).iter().zip(factors).map(|(feature, factor)| feature * factor).sum()
    }
}

/// A layout that a machine's file cannot price.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MachineError {
    /// Not a machine's file.
    #[error("not a file of `unisono bench local`: {0}")]
    Parse(String),
    /// A table has another length than its sizes say, or there are no modes.
    #[error(
        "{what} of a measured machine has {given} entries, not {needed}: measure it again with `unisono bench local`"
    )]
    Shape {
        /// The table.
        what: &'static str,
        /// Its entries.
        given: usize,
        /// What it should have.
        needed: usize,
    },
}

/// A priced step.
#[derive(Debug, Clone, PartialEq)]
pub struct LocalPrice {
    /// Seconds of the step.
    pub step_s: f64,
    /// The 80% interval of the step, where the machine's file tells how well it predicts.
    pub interval_s: Option<[f64; 2]>,
    /// Seconds of each phase: together the step's.
    pub phases: Vec<(Phase, f64)>,
    /// Seconds that exchanges are between hosts; 0 on one.
    pub network_s: f64,
    /// Seconds of these that computation does not hide; phases have them.
    pub waited_s: f64,
}

impl LocalMachine {
    /// Reads a machine's file.
    ///
    /// # Errors
    /// If it is not one.
    pub fn from_toml(text: &str) -> Result<Self, MachineError> {
        let machine: Self = toml::from_str(text)
            .map_err(|error| MachineError::Parse(error.to_string().trim_end().replace('\n', " ")))?;
        let rates = &machine.products;
        let needed = rates.sizes.len().pow(3);
        for (what, table) in [
            ("products.plain", &rates.plain),
            ("products.transposed_right", &rates.transposed_right),
            ("products.transposed_left", &rates.transposed_left),
        ] {
            if table.len() != needed || needed < 8 {
                return Err(MachineError::Shape { what, given: table.len(), needed: needed.max(8) });
            }
        }
        match machine.mode.len() {
            0 => Err(MachineError::Shape { what: "mode", given: 0, needed: 1 }),
            _ => Ok(machine),
        }
    }

    /// As its file has it.
    ///
    /// # Errors
    /// If a number has no form in TOML.
    pub fn to_toml(&self) -> Result<String, MachineError> {
        toml::to_string(self).map_err(|error| MachineError::Parse(error.to_string()))
    }

    /// The step of a layout with `threads` threads a rank, routing balanced.
    pub fn price(&self, layout: &EngineLayout, rows: StepRows, threads: usize) -> LocalPrice {
        let (mode, stretch) = self.mode_for(layout.ranks_per_host(), threads);
        let work = step_work(layout, rows);
        let phases: Vec<(Phase, f64)> = work
            .iter()
            .map(|(phase, work)| (*phase, stretch * mode.phase_s(&self.products, *phase, work)))
            .collect();
        let step_s = phases.iter().map(|(_, seconds)| seconds).sum();
        LocalPrice { step_s, interval_s: self.interval(step_s), phases, network_s: 0.0, waited_s: 0.0 }
    }

    /// The 80% interval of a step that is predicted to take `step_s`, which is what steps differ by that are computed on one
    /// machine; what is not known of networks is not in it.
    pub(super) fn interval(&self, step_s: f64) -> Option<[f64; 2]> {
        self.within_80.map(|factor| [step_s / factor, step_s * factor])
    }

    /// Takes over what a run of a layout took: `seconds` of each phase of a step. Phases of the layout's mode are scaled to that;
    /// a mode that was not measured yet is made of the nearest.
    pub fn recalibrate(
        &mut self,
        layout: &EngineLayout,
        rows: StepRows,
        threads: usize,
        seconds: impl Fn(Phase) -> f64,
    ) {
        let ranks = layout.fold.ranks();
        let (nearest, stretch) = self.mode_for(ranks, threads);
        let mut mode = Mode { ranks, threads, phase: nearest.phase.clone() };
        for (phase, work) in step_work(layout, rows) {
            let predicted = stretch * nearest.phase_s(&self.products, phase, &work);
            let measured = seconds(phase);
            let known =
                mode.phase.iter_mut().find(|rates| (rates.communicates, rates.name.as_str()) == phase);
            match known {
                Some(rates) if predicted > 0.0 => rates.scale(stretch * measured / predicted),
                Some(rates) => rates.call_s = measured / work.calls.max(1.0),
                None => {}
            }
        }
        self.mode.retain(|known| (known.ranks, known.threads) != (ranks, threads));
        self.mode.push(mode);
        self.mode.sort_by_key(|mode| (mode.ranks, mode.threads));
    }

    /// The mode nearest to how a layout runs, and how much longer it takes than that: ranks beyond the cores take turns, and
    /// threads share a rank's work.
    pub(super) fn mode_for(&self, ranks: usize, threads: usize) -> (&Mode, f64) {
        let turns = |ranks: usize, threads: usize| (ranks * threads) as f64 / self.cores as f64;
        let distance = |mode: &&Mode| {
            let off = |a: usize, b: usize| (a as f64 / b as f64).ln().abs();
            off(mode.ranks, ranks) + 1.5 * off(mode.threads, threads)
        };
        let nearest = self.mode.iter().min_by(|a, b| distance(a).total_cmp(&distance(b)));
        let mode = nearest.unwrap_or(&self.mode[0]);
        let waits = turns(ranks, threads).max(1.0) / turns(mode.ranks, mode.threads).max(1.0);
        (mode, waits * mode.threads as f64 / threads as f64)
    }
}

/// What a phase's time is a sum of: seconds of its products alone, elements, multiply-adds, calls.
pub(super) fn features(rates: &ProductRates, work: &Work) -> [f64; 4] {
    let products = work.products.iter().map(|products| rates.seconds(products)).sum();
    [products, work.elements, work.scores, work.calls]
}

impl ProductRates {
    /// Seconds of products on one thread, one after the other.
    pub fn seconds(&self, products: &Products) -> f64 {
        let [m, n, k] = products.dims;
        let operations = 2.0 * m as f64 * n as f64 * k as f64 * products.count;
        operations / self.rate(products.kind, products.dims) / 1e9
    }

    /// 10^9 operations a second: linear between measured sizes in the logarithm of each, the edge outside.
    fn rate(&self, kind: ProductKind, dims: [usize; 3]) -> f64 {
        let table = match kind {
            ProductKind::Plain => &self.plain,
            ProductKind::TransposedRight => &self.transposed_right,
            ProductKind::TransposedLeft => &self.transposed_left,
        };
        let [a, b, c] = dims.map(|size| self.locate(size));
        let nodes = self.sizes.len();
        let mut rate = 0.0;
        for (i, u) in a {
            for (j, v) in b {
                for (l, w) in c {
                    rate += u * v * w * table[(i * nodes + j) * nodes + l];
                }
            }
        }
        rate.max(f64::MIN_POSITIVE)
    }

    /// The two nodes around a size, with their weights.
    fn locate(&self, size: usize) -> [(usize, f64); 2] {
        let high = self.sizes.partition_point(|node| *node < size).clamp(1, self.sizes.len() - 1);
        let [low_size, high_size] = [self.sizes[high - 1], self.sizes[high]].map(|node| (node as f64).ln());
        let at = (((size.max(1) as f64).ln() - low_size) / (high_size - low_size)).clamp(0.0, 1.0);
        [(high - 1, 1.0 - at), (high, at)]
    }
}

/// Steps of the engine that were measured in one mode: what each phase did, and its seconds.
#[derive(Debug, Clone, Default)]
pub struct Samples(Vec<BTreeMap<Phase, ([f64; 4], f64)>>);

impl Samples {
    /// Adds a step: `seconds(phase)` of every phase of `work`.
    pub fn add(
        &mut self,
        rates: &ProductRates,
        work: &BTreeMap<Phase, Work>,
        seconds: impl Fn(Phase) -> f64,
    ) {
        let phase = |(phase, work): (&Phase, &Work)| (*phase, (features(rates, work), seconds(*phase)));
        self.0.push(work.iter().map(phase).collect());
    }

    /// The rates that fit best, with weights that make every step count alike. `copy_bytes_per_s` says what an element is
    /// expected to take where steps leave it open.
    pub fn fit(&self, copy_bytes_per_s: f64) -> Vec<PhaseRates> {
        // A share of what the products take alone; a copied word; a tenth of a nanosecond a multiply-add; a microsecond.
        let expected = [1.0, 4.0 / copy_bytes_per_s, 1e-10, 1e-6];
        let mut by_phase: BTreeMap<Phase, Vec<([f64; 4], f64)>> = BTreeMap::new();
        for (phase, sample) in self.0.iter().flatten() {
            by_phase.entry(*phase).or_default().push(*sample);
        }
        let rates = |(phase, samples): (&Phase, &Vec<([f64; 4], f64)>)| {
            let [of_products, element_s, score_s, call_s] = fit_one(samples, expected);
            PhaseRates {
                name: phase.1.into(),
                communicates: phase.0,
                of_products,
                element_s,
                score_s,
                call_s,
            }
        };
        by_phase.iter().map(rates).collect()
    }
}

/// The factor within which 80% of `ratios`, predicted over measured, lie around 1.
pub fn within_80(ratios: &[f64]) -> Option<f64> {
    let mut off: Vec<f64> =
        ratios.iter().map(|ratio| ratio.ln().abs()).filter(|off| off.is_finite()).collect();
    off.sort_by(f64::total_cmp);
    let last = (0.8 * off.len() as f64).ceil() as usize;
    off.get(last.checked_sub(1)?).map(|off| off.exp())
}

/// How much what is expected counts against the steps.
const RIDGE: f64 = 0.003;
/// Rounds of descent, one factor after the other.
const ROUNDS: usize = 2000;

/// Least squares of relative errors with factors of at least 0, drawn a little to what is expected.
fn fit_one(samples: &[([f64; 4], f64)], expected: [f64; 4]) -> [f64; 4] {
    let longest = samples.iter().map(|(_, seconds)| *seconds).fold(0.0, f64::max);
    // Factors in units of what is expected; a phase's shortest times are not worth more than a tenth of its longest.
    let weighted: Vec<([f64; 4], f64)> = samples
        .iter()
        .map(|(features, seconds)| {
            let weight = 1.0 / seconds.max(0.1 * longest).max(1e-9);
            (std::array::from_fn(|i| features[i] * expected[i] * weight), seconds * weight)
        })
        .collect();
    let mut factors = [1.0; 4];
    for _ in 0..ROUNDS {
        for i in 0..4 {
            let (mut above, mut below) = (RIDGE, RIDGE);
            for (features, target) in &weighted {
                let others: f64 = (0..4).filter(|j| *j != i).map(|j| features[j] * factors[j]).sum();
                above += features[i] * (target - others);
                below += features[i] * features[i];
            }
            factors[i] = (above / below).max(0.0);
        }
    }
    std::array::from_fn(|i| factors[i] * expected[i])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates() -> ProductRates {
        let table = |rate: f64| vec![rate; 8];
        ProductRates {
            sizes: vec![16, 256],
            plain: (0..8).map(|node| 10.0 + node as f64).collect(),
            transposed_right: table(5.0),
            transposed_left: table(4.0),
        }
    }

    #[test]
    fn rates_are_linear_in_the_logarithm_of_sizes() {
        let rates = rates();
        let rate = |m, n, k| rates.rate(ProductKind::Plain, [m, n, k]);
        assert_eq!([rate(16, 16, 16), rate(16, 16, 256), rate(256, 16, 16)], [10.0, 11.0, 14.0]);
        assert!((rate(64, 16, 16) - 12.0).abs() < 1e-12);
        assert_eq!(rate(4096, 4096, 1), rate(256, 256, 16));
    }

    #[test]
    fn a_fit_finds_the_factors_that_made_the_times() {
        let truth = [1.25, 3e-10, 2e-10, 4e-6];
        let samples: Vec<([f64; 4], f64)> = (1..9)
            .map(|i| {
                let i = i as f64;
                let features = [0.01 * i, 1e6 * (i * 1.7).sin().abs(), 1e7 * (i * 0.9).cos().abs(), 40.0 + i];
                (features, features.iter().zip(truth).map(|(f, t)| f * t).sum())
            })
            .collect();
        let found = fit_one(&samples, [1.0, 4e-10, 1e-10, 1e-6]);
        for (features, seconds) in &samples {
            let fitted: f64 = features.iter().zip(found).map(|(f, t)| f * t).sum();
            assert!((fitted / seconds - 1.0).abs() < 0.04, "{fitted} of {seconds}");
        }
    }

    #[test]
    fn ranks_in_turns_take_as_long_as_their_work_and_what_whole_steps_show() {
        let own = |of_products| PhaseRates {
            name: "experts".into(),
            communicates: false,
            of_products,
            element_s: 1e-9,
            score_s: 0.0,
            call_s: 0.0,
        };
        let full = Mode { ranks: 2, threads: 1, phase: vec![own(1.0)] };
        let work = |elements| BTreeMap::from([((false, "experts"), Work { elements, ..Work::default() })]);
        let take = |slower: [f64; 3]| {
            let steps = slower.map(|slower| (work(1e6), slower * 2e-3));
            full.in_turns(&rates(), 4, &steps).phase[0].clone()
        };
        let (alike, slow) = (take([0.5, 0.9, 1.2]), take([1.0, 1.3, 7.0]));
        assert_eq!((alike.of_products, alike.element_s), (2.0, 2e-9));
        assert!((slow.of_products - 2.6).abs() < 1e-12 && (slow.element_s - 2.6e-9).abs() < 1e-20);
    }

    #[test]
    fn an_interval_holds_four_of_five_of_the_steps_left_out() {
        assert_eq!(within_80(&[]), None);
        let factor = within_80(&[1.0, 0.5, 1.25, 0.9, 1.1]).expect("there are ratios");
        assert!((factor - 1.25).abs() < 1e-12, "{factor}");
    }

    #[test]
    fn a_file_that_is_none_says_so() {
        let machine = LocalMachine {
            cpu: "a processor".into(),
            cores: 2,
            copy_bytes_per_s: 1e10,
            within_80: Some(1.25),
            products: rates(),
            mode: vec![Mode { ranks: 1, threads: 2, phase: Vec::new() }],
        };
        let text = machine.to_toml().expect("finite numbers");
        assert_eq!(LocalMachine::from_toml(&text), Ok(machine));
        let short = text.replace("sizes = [16, 256]", "sizes = [16, 64, 256]");
        let said = LocalMachine::from_toml(&short).unwrap_err().to_string();
        assert!(said.contains("products.plain") && said.contains("unisono bench local"), "{said}");
        assert!(matches!(LocalMachine::from_toml("cores = 2"), Err(MachineError::Parse(_))));
    }
}
