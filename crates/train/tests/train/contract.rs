//! The numerics contract on real text: one logical computation, any layout, the same bits.

use std::env;
use std::fs;
use std::panic::catch_unwind;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::UNIX_EPOCH;

use unisono_mesh::Grid;
use unisono_plan::ModelConfig;
use unisono_train::config::{LayoutConfig, RecomputeConfig, ReduceEvery, TrainConfig};
use unisono_train::{Event, Fault, Observer, RunConfig, RunOptions, StepHashes, run_folder, train_on};

use crate::common::{BYTES, Quiet, bytes, every_grid};

const STEPS: u64 = 20;

fn config(replicas: usize, expert_group: usize, num_experts: usize) -> RunConfig {
    let mut config = RunConfig {
        grid: Grid { replicas, expert_group, expert_nodes: 2, ..Grid::default() },
        model: ModelConfig {
            vocab_size: BYTES,
            hidden_size: 32,
            num_hidden_layers: 3,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 8,
            intermediate_size: 48,
            moe_intermediate_size: 24,
            num_experts,
            num_groups: 4,
            top_groups: 2,
            z_loss_coef: 1e-3,
            balance_loss_coef: 1e-2,
            routed_scaling_factor: 1.5,
            ..ModelConfig::default()
        },
        train: TrainConfig {
            steps: STEPS,
            sequence_length: 24,
            micro_batch: 1,
            accumulate: 2,
            expert_row_block: 8,
            ..TrainConfig::default()
        },
        ..RunConfig::default()
    };
    config.schedule.warmup_steps = 4;
    config.evaluation.every = 10;
    config.evaluation.sequences = 16;
    (config.checkpoint.every, config.sample.tokens) = (0, 0);
    config.log.hashes_every = 1;
    config
}

/// What a run must agree on: every step's numbers, the hashes of all tensors after some, validation losses.
#[derive(Debug, PartialEq)]
struct Outcome {
    steps: Vec<Vec<(&'static str, String)>>,
    hashes: Vec<StepHashes>,
    validation: u64,
}

fn run(config: &RunConfig, options: &RunOptions) -> Outcome {
    run_watched(config, options, &Quiet)
}

fn run_watched(config: &RunConfig, options: &RunOptions, observer: &dyn Observer) -> Outcome {
    let summary = train_on(config, options, bytes(), observer).expect("the run succeeds");
    let folder = &options.folder;
    let steps = run_folder::read_steps(folder).expect("the run wrote its metrics");
    Outcome {
        steps: steps.iter().map(|step| step.numbers()).collect(),
        hashes: run_folder::read_hashes(folder).expect("the run wrote its hashes"),
        validation: summary.validation.map_or(0, |record| record.loss.to_bits()),
    }
}

fn assert_same(what: &str, outcome: &Outcome, reference: &Outcome) {
    for (index, (ours, theirs)) in outcome.steps.iter().zip(&reference.steps).enumerate() {
        assert_eq!(ours, theirs, "{what}: step {}", index + 1);
    }
    assert_eq!(outcome, reference, "{what}");
}

fn reference(config: &RunConfig, folder: &Path) -> Outcome {
    let outcome = run(config, &RunOptions::new(folder.join("reference"), 1, 1));
    assert_eq!(outcome.steps.len() as u64, STEPS);
    assert_eq!(outcome.hashes.len() as u64, STEPS);
    outcome
}

fn with_recompute(config: &RunConfig, recompute: RecomputeConfig) -> RunConfig {
    let mut config = config.clone();
    config.train.recompute = recompute;
    config
}

/// Counts the steps that a run trains.
#[derive(Default)]
struct Trained(AtomicU64);

impl Observer for Trained {
    fn event(&self, event: Event) {
        if matches!(event, Event::Step(_)) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A copy of a run's folder as a crash would have left it before any checkpoint but that of `step` was saved.
fn copy_run(from: &Path, to: &Path, step: u64) {
    fs::create_dir(to).expect("a new folder");
    for entry in fs::read_dir(from).expect("the run's folder") {
        let (path, name) = entry.map(|entry| (entry.path(), entry.file_name())).expect("an entry");
        if path.is_file() {
            fs::copy(&path, to.join(name)).expect("a copy");
        }
    }
    let kept = format!("{}/step-{step:06}", run_folder::CHECKPOINTS);
    fs::create_dir_all(to.join(&kept)).expect("a new folder");
    for entry in fs::read_dir(from.join(&kept)).expect("the checkpoint") {
        let entry = entry.expect("an entry");
        fs::copy(entry.path(), to.join(&kept).join(entry.file_name())).expect("a copy");
    }
}

/// The variable that repeats the steps of a failed test.
const SEED_VARIABLE: &str = "UNISONO_TEST_SEED";

/// What steps are drawn from: the environment's seed, otherwise the clock's.
fn seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| match env::var(SEED_VARIABLE) {
        Ok(given) => {
            given.parse().unwrap_or_else(|_| panic!("{SEED_VARIABLE} = {given:?} is no whole number"))
        }
        Err(_) => UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos() as u64),
    })
}

/// How to draw the same steps again: shown by every test that fails.
fn seeded() -> String {
    format!("{SEED_VARIABLE}={}", seed())
}

/// A step with others before and after it, drawn from the seed and the case alone: whichever tests run and in which order,
/// a seed gives a case the same step.
fn random_step(config: &RunConfig, case: &str) -> u64 {
    let named = format!("{} {:?} {case}", seed(), config.grid);
    let hash = blake3::hash(named.as_bytes());
    let (bits, _) = hash.as_bytes().split_first_chunk().expect("a hash has 32 bytes");
    1 + u64::from_le_bytes(*bits) % (STEPS - 1)
}

/// Every rank count x 1 and 2 compute threads x every recompute mode, messages in shuffled order; and from a checkpoint of
/// each of them, at a random step, on every rank count to the end, on another one with other threads and recomputation too.
fn check_layouts(config: &RunConfig, all_ranks: &[usize], folder: &Path, reference: &Outcome) {
    let modes = [RecomputeConfig::None, RecomputeConfig::Selective, RecomputeConfig::Full];
    for &ranks in all_ranks {
        for threads in [1, 2] {
            for (mode, &recompute) in modes.iter().enumerate() {
                let what = format!("{ranks} ranks x {threads} threads, {recompute:?}");
                let mut config = with_recompute(config, recompute);
                let stop = random_step(&config, &what);
                (config.checkpoint.every, config.checkpoint.keep_last) = (stop, 0);
                let mut options = RunOptions::new(folder.join(&what), ranks, threads);
                options.jitter = (threads == 2).then_some(ranks as u64);
                assert_same(&what, &run(&config, &options), reference);
                for &after in all_ranks {
                    let other = usize::from(after != ranks);
                    let recompute = modes[(mode + other) % modes.len()];
                    let threads = if other == 1 { 3 - threads } else { threads };
                    let seeded = seeded();
                    let resumed = format!(
                        "{what} until step {stop} ({seeded}), then {after} x {threads}, {recompute:?}"
                    );
                    let mut options = RunOptions::new(folder.join(&resumed), after, threads);
                    options.resume = true;
                    copy_run(&folder.join(&what), &options.folder, stop);
                    let trained = Trained::default();
                    let mut config = with_recompute(&config, recompute);
                    config.checkpoint.every = 0;
                    let outcome = run_watched(&config, &options, &trained);
                    assert_same(&resumed, &outcome, reference);
                    assert_eq!(trained.0.into_inner(), STEPS - stop, "{resumed}: steps trained");
                    fs::remove_dir_all(&options.folder).expect("the folder goes");
                }
            }
        }
    }
}

fn check_grid(replicas: usize, expert_group: usize, num_experts: usize) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let ranks: Vec<usize> = (1..=replicas).filter(|ranks| replicas.is_multiple_of(*ranks)).collect();
    let config = config(replicas, expert_group, num_experts);
    let reference = reference(&config, folder.path());
    eprintln!("{}", seeded());
    check_layouts(&config, &ranks, folder.path(), &reference);
}

every_grid!(check_grid);

/// Where `ranks` ranks are cut into nodes: 3 + 5 of 8, and as unevenly elsewhere.
fn cut_nodes(ranks: usize) -> Vec<usize> {
    match ranks {
        1 => Vec::new(),
        8 => vec![3, 5],
        ranks => vec![1, ranks - 1],
    }
}

/// Every rank count x what is sharded x communication beside computation or not, with uneven nodes: all as one rank.
fn check_sharding(replicas: usize, expert_group: usize, num_experts: usize) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let ranks: Vec<usize> = (1..=replicas).filter(|ranks| replicas.is_multiple_of(*ranks)).collect();
    let mut config = config(replicas, expert_group, num_experts);
    config.train.reduce_every = ReduceEvery::Microbatch;
    let reference = reference(&config, folder.path());
    for &ranks in &ranks {
        for zero in 1..=3 {
            let overlap = !(ranks + zero).is_multiple_of(3);
            config.layout = LayoutConfig { zero, overlap, ..LayoutConfig::default() };
            let what = format!("ZeRO-{zero} on {ranks} ranks, overlap {overlap}");
            let mut options = RunOptions::new(folder.path().join(&what), ranks, 1);
            options.nodes = cut_nodes(ranks);
            options.jitter = (zero == 3).then_some(ranks as u64);
            assert_same(&what, &run(&config, &options), &reference);
        }
    }
    eprintln!("{}", seeded());
    let (few, many) = (ranks[1], ranks[ranks.len() - 1]);
    for (before, after) in
        [((1, many), (3, few)), ((3, many), (2, few)), ((2, few), (3, 1)), ((3, few), (1, many))]
    {
        let stop = random_step(&config, &format!("{before:?} {after:?}"));
        let what = format!("ZeRO and ranks {before:?} until step {stop} ({}), then {after:?}", seeded());
        config.layout.zero = before.0;
        let mut options = RunOptions::new(folder.path().join(&what), before.1, 1);
        options.stop_after = Some(stop);
        train_on(&config, &options, bytes(), &Quiet).expect("the first part succeeds");
        config.layout.zero = after.0;
        let mut options = RunOptions::new(folder.path().join(&what), after.1, 1);
        (options.resume, options.nodes) = (true, cut_nodes(after.1));
        assert_same(&what, &run(&config, &options), &reference);
    }
}

#[test]
fn shards_of_eight_replicas_in_groups_of_two() {
    check_sharding(8, 2, 8);
}

#[test]
fn shards_of_eight_replicas_in_one_group() {
    check_sharding(8, 8, 8);
}

#[test]
fn shards_of_six_replicas_in_groups_of_three() {
    check_sharding(6, 3, 12);
}

#[test]
fn without_accumulation_both_orders_of_joining_are_one() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut config = config(4, 2, 8);
    config.train.accumulate = 1;
    config.model.tie_embeddings = true;
    let reference = reference(&config, folder.path());
    for (zero, reduce_every) in [(3, ReduceEvery::Step), (2, ReduceEvery::Microbatch)] {
        (config.layout.zero, config.train.reduce_every) = (zero, reduce_every);
        let what = format!("ZeRO-{zero}, {reduce_every:?}");
        assert_same(&what, &run(&config, &RunOptions::new(folder.path().join(&what), 4, 1)), &reference);
    }
}

#[test]
fn one_ulp_in_one_gradient_is_noticed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = config(8, 2, 8);
    let reference = reference(&config, folder.path());
    let outcome = |name: &str, fault: Option<Fault>| {
        let mut options = RunOptions::new(folder.path().join(name), 2, 1);
        options.fault = fault;
        run(&config, &options)
    };
    assert_same("no fault", &outcome("again", None), &reference);
    // Elements that are not far smaller than others: one ulp of a tiny one may be rounded away wherever it goes.
    for (step, element) in [(1, 0), (1, 1000), (5, 0)] {
        let what = format!("element {element} at step {step}");
        let nudged = outcome(&what, Some(Fault::NudgeGradient { step, element }));
        let refused = catch_unwind(|| assert_same(&what, &nudged, &reference)).expect_err(&what);
        let said = refused.downcast_ref::<String>().expect("assertions say why");
        assert!(said.contains(&format!("{what}: step {step}\n")), "{said}");
    }
}
