//! Measures this machine for the planner: rates of products, copies, and steps of the engine itself.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Instant;

use unisono_comm::{Communicator, ThreadRanks};
use unisono_data::Dataset;
use unisono_mesh::{Fold, Grid};
use unisono_model::{Lane, Profile};
use unisono_plan::ModelConfig;
use unisono_plan::engine::{
    LocalMachine, Mode, OTHER, Phase, ProductKind, ProductRates, Samples, StepRows, Work, step_work,
    within_80,
};
use unisono_tensor::{Cpu, Dims, Product};

use crate::bench::{ProductShape, time_product};
use crate::config::{EvaluationConfig, LayoutConfig, ReduceEvery, RunConfig, TrainConfig};
use crate::crew::lending;
use crate::engine_layout::engine_layout;
use crate::error::TrainError;
use crate::rank::RankState;
use crate::run::root_cause;
use crate::system::{cores, cpu_type};

/// Sizes of m, n and k whose products are timed.
const SIZES: [usize; 4] = [16, 64, 256, 1024];
/// Floats of the vectors that are copied: beyond all caches.
const COPIED: usize = 1 << 24;
/// Copies; the fastest counts.
const COPIES: usize = 7;
/// Steps of a probe in a round; the first warms up, the median of the others counts.
const PROBE_STEPS: usize = 4;
/// Rounds through all probes; the one in which a probe was fastest counts, so that what else the machine did in others does not.
const ROUNDS: usize = 3;

/// A small run of the engine.
struct Probe {
    d: usize,
    ffn: usize,
    vocab: usize,
    layers: usize,
    experts: usize,
    sequence: usize,
    micro_batch: usize,
    turns: usize,
    /// Slots of each rank.
    slots: usize,
    /// Whether a rank's slots are groups of their own, waves that run one after the other.
    alone: bool,
    zero: usize,
}

/// Sizes that differ enough to tell apart what a phase's time is made of, in the order of the fields.
const PROBES: [[usize; 11]; 8] = [
    [64, 64, 512, 3, 8, 64, 4, 1, 1, 0, 1],
    [128, 128, 2048, 3, 16, 256, 1, 1, 2, 0, 2],
    [256, 256, 1024, 3, 16, 128, 4, 1, 1, 0, 1],
    [256, 512, 4096, 2, 8, 512, 1, 1, 1, 0, 3],
    [64, 128, 256, 4, 4, 32, 2, 1, 4, 1, 1],
    [128, 128, 512, 2, 8, 128, 4, 2, 1, 0, 3],
    [256, 128, 512, 2, 32, 64, 2, 1, 4, 1, 1],
    [256, 256, 4096, 4, 16, 256, 2, 1, 2, 0, 1],
];

impl Probe {
    fn all() -> impl Iterator<Item = Self> {
        let probe =
            |[d, ffn, vocab, layers, experts, sequence, micro_batch, turns, slots, alone, zero]: [usize;
                 11]| Self {
                d,
                ffn,
                vocab,
                layers,
                experts,
                sequence,
                micro_batch,
                turns,
                slots,
                alone: alone > 0,
                zero,
            };
        PROBES.into_iter().map(probe)
    }

    fn config(&self, ranks: usize) -> RunConfig {
        let replicas = self.slots * ranks;
        let divides = |group: &usize| replicas.is_multiple_of(*group) && self.experts.is_multiple_of(*group);
        let group = if self.alone { 1 } else { (1..=replicas).rev().find(divides).unwrap_or(1) };
        RunConfig {
            grid: Grid { replicas, expert_group: group, ..Grid::default() },
            model: ModelConfig {
                vocab_size: self.vocab,
                hidden_size: self.d,
                num_hidden_layers: self.layers,
                head_dim: self.d / 4,
                intermediate_size: 3 * self.ffn,
                moe_intermediate_size: self.ffn,
                num_experts: self.experts,
                force_balance: true,
                ..ModelConfig::default()
            },
            train: TrainConfig {
                sequence_length: self.sequence,
                micro_batch: self.micro_batch,
                accumulate: self.turns,
                reduce_every: if self.turns > 1 { ReduceEvery::Microbatch } else { ReduceEvery::Step },
                ..TrainConfig::default()
            },
            layout: LayoutConfig { zero: self.zero, ..LayoutConfig::default() },
            evaluation: EvaluationConfig { every: 0, ..EvaluationConfig::default() },
            ..RunConfig::default()
        }
    }
}

/// Measures the machine; `say` is told what comes next.
///
/// # Errors
/// If a run of the engine fails.
pub fn measure_machine(say: &dyn Fn(&str)) -> Result<LocalMachine, TrainError> {
    let cores = cores();
    say("rates of products");
    let products = measure_products()?;
    say("copies in memory");
    let copy_bytes_per_s = measure_copies();
    let (mut mode, mut ratios) = (Vec::new(), Vec::new());
    for (ranks, threads) in modes(cores) {
        say(&format!("steps of {ranks} ranks with {threads} threads each"));
        let steps = measure_steps(ranks, threads)?;
        let filled =
            mode.iter().find(|mode: &&Mode| ranks > cores && (mode.ranks, mode.threads) == (cores, 1));
        let fit = |steps: &[Step]| match filled {
            Some(filled) => filled.in_turns(&products, ranks, &whole_steps(steps)),
            None => {
                let mut samples = Samples::default();
                for (work, seconds) in steps {
                    samples.add(&products, work, |phase| seconds.get(&phase).copied().unwrap_or(0.0));
                }
                Mode { ranks, threads, phase: samples.fit(copy_bytes_per_s) }
            }
        };
        for (index, (work, seconds)) in steps.iter().enumerate() {
            let others = [&steps[..index], &steps[index + 1..]].concat();
            ratios.push(fit(&others).step_s(&products, work) / whole(seconds));
        }
        let measured = fit(&steps);
        mode.push(measured);
    }
    let within_80 = within_80(&ratios);
    Ok(LocalMachine { cpu: cpu_type(), cores, copy_bytes_per_s, within_80, products, mode })
}

/// A measured step: what each phase does, and its seconds.
type Step = (BTreeMap<Phase, Work>, BTreeMap<Phase, f64>);

/// The fastest round of every probe.
fn measure_steps(ranks: usize, threads: usize) -> Result<Vec<Step>, TrainError> {
    let configs: Vec<RunConfig> = Probe::all().map(|probe| probe.config(ranks)).collect();
    let mut fastest: Vec<BTreeMap<Phase, f64>> = Vec::new();
    for _ in 0..ROUNDS {
        for (index, config) in configs.iter().enumerate() {
            let phases = measure_phases(config, Fold::new(config.grid, ranks)?, threads)?;
            match fastest.get_mut(index) {
                None => fastest.push(phases),
                Some(best) if whole(&phases) < whole(best) => *best = phases,
                Some(_) => {}
            }
        }
    }
    let step = |(config, seconds): (&RunConfig, BTreeMap<Phase, f64>)| {
        let layout = engine_layout(config, &Fold::new(config.grid, ranks)?, |_| 0);
        Ok((step_work(&layout, step_rows(config)), seconds))
    };
    configs.iter().zip(fastest).map(step).collect()
}

fn whole_steps(steps: &[Step]) -> Vec<(BTreeMap<Phase, Work>, f64)> {
    steps.iter().map(|(work, seconds)| (work.clone(), whole(seconds))).collect()
}

/// What a step of a config works on.
pub fn step_rows(config: &RunConfig) -> StepRows {
    let sequence = config.train.sequence_length;
    StepRows { slot: config.train.micro_batch * sequence, sequence }
}

/// One core, all of them shared out over 1, 2, 4, ... ranks, and two and four times as many ranks as there are cores.
fn modes(cores: usize) -> Vec<(usize, usize)> {
    let shared =
        (0..).map(|i| 1 << i).take_while(|ranks| *ranks <= cores).map(|ranks| (ranks, cores / ranks));
    let mut all: Vec<(usize, usize)> =
        std::iter::once((1, 1)).chain(shared).chain([1, 2, 4].map(|turns| (turns * cores, 1))).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Operations a second of one thread in a product of 256 x 256 x 256, the fastest of a few: near the most that it reaches.
///
/// # Errors
/// If a rank of the engine cannot be started.
pub fn fast_product() -> Result<f64, TrainError> {
    let shape = ProductShape { product: Product::Plain, dims: Dims { m: 256, n: 256, k: 256 }, count: 1 };
    let times = ThreadRanks::new(1).run(|comm| time_product(&shape, &comm)).map_err(root_cause)?;
    Ok(shape.flops() / times[0].into_iter().fold(f64::INFINITY, f64::min))
}

fn measure_products() -> Result<ProductRates, TrainError> {
    let mut tables: Vec<Vec<f64>> = Vec::new();
    for kind in ProductKind::ALL {
        let product = match kind {
            ProductKind::Plain => Product::Plain,
            ProductKind::TransposedRight => Product::TransposedRight,
            ProductKind::TransposedLeft => Product::TransposedLeft,
        };
        let mut table = Vec::with_capacity(SIZES.len().pow(3));
        for (m, n, k) in
            SIZES.iter().flat_map(|m| SIZES.iter().flat_map(move |n| SIZES.iter().map(move |k| (*m, *n, *k))))
        {
            let shape = ProductShape { product, dims: Dims { m, n, k }, count: 1 };
            let times = ThreadRanks::new(1).run(|comm| time_product(&shape, &comm)).map_err(root_cause)?;
            let best = times[0].into_iter().fold(f64::INFINITY, f64::min);
            table.push(shape.flops() / best / 1e9);
        }
        tables.push(table);
    }
    let mut next = tables.into_iter();
    let mut table = || next.next().unwrap_or_default();
    Ok(ProductRates {
        sizes: SIZES.to_vec(),
        plain: table(),
        transposed_right: table(),
        transposed_left: table(),
    })
}

/// Bytes a second that one core copies.
fn measure_copies() -> f64 {
    let (from, mut to) = (vec![1f32; COPIED], vec![0f32; COPIED]);
    let mut best = f64::INFINITY;
    for _ in 0..COPIES {
        let begin = Instant::now();
        to.copy_from_slice(black_box(&from));
        black_box(&mut to);
        best = best.min(begin.elapsed().as_secs_f64());
    }
    (COPIED * size_of::<f32>()) as f64 / best
}

fn whole(phases: &BTreeMap<Phase, f64>) -> f64 {
    phases.values().sum()
}

/// Seconds of every phase of the median step: the mean rank's.
fn measure_phases(
    config: &RunConfig,
    fold: Fold,
    threads: usize,
) -> Result<BTreeMap<Phase, f64>, TrainError> {
    let tokens = config.tokens_per_step() * PROBE_STEPS + config.train.sequence_length + 1;
    let dataset = Dataset::random(1, tokens, config.model.vocab_size as u32)?;
    let (ranks, crew) = lending(ThreadRanks::new(fold.ranks()), fold.ranks());
    let body = |comm: Communicator| {
        let backend = Cpu::in_crew(threads, &crew, comm.rank());
        probe_rank(config, &dataset, backend, fold, comm)
    };
    let ranks = ranks.run(body).map_err(root_cause)?;
    let mut steps: Vec<BTreeMap<Phase, f64>> = vec![BTreeMap::new(); PROBE_STEPS - 1];
    for rank in &ranks {
        for (step, phases) in steps.iter_mut().zip(rank) {
            for (phase, seconds) in phases {
                *step.entry(*phase).or_default() += seconds / ranks.len() as f64;
            }
        }
    }
    steps.sort_by(|a, b| whole(a).total_cmp(&whole(b)));
    Ok(steps.swap_remove(steps.len() / 2))
}

/// `[step]` seconds of every phase on this rank, the first step left out.
fn probe_rank(
    config: &RunConfig,
    dataset: &Dataset,
    backend: Cpu,
    fold: Fold,
    comm: Communicator,
) -> Result<Vec<BTreeMap<Phase, f64>>, TrainError> {
    let profile = Profile::new(Instant::now());
    let mut state = RankState::new(config, dataset, backend, fold, comm, profile.clone())?;
    let mut steps = Vec::with_capacity(PROBE_STEPS);
    for _ in 0..PROBE_STEPS {
        let before = profile.phases();
        let begin = Instant::now();
        state.step()?;
        let whole = begin.elapsed().as_secs_f64();
        let mut phases = BTreeMap::new();
        for (lane, name, time) in profile.phases() {
            let spent = before.iter().find(|p| (p.0, p.1) == (lane, name)).map_or(0.0, |p| p.2.as_secs_f64());
            phases.insert((lane == Lane::Communication, name), time.as_secs_f64() - spent);
        }
        let named: f64 = phases.values().sum();
        phases.insert(OTHER, (whole - named).max(0.0));
        steps.push(phases);
    }
    Ok(steps.split_off(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_shared_out_over_ranks() {
        assert_eq!(modes(1), [(1, 1), (2, 1), (4, 1)]);
        assert_eq!(modes(2), [(1, 1), (1, 2), (2, 1), (4, 1), (8, 1)]);
        assert_eq!(modes(6), [(1, 1), (1, 6), (2, 3), (4, 1), (6, 1), (12, 1), (24, 1)]);
    }

    #[test]
    fn probes_can_be_run_on_any_number_of_ranks() {
        for ranks in [1, 2, 3, 4, 6, 8] {
            for probe in Probe::all() {
                probe.config(ranks).validate().expect("a probe's config is valid");
            }
        }
    }
}
