//! One test for each failure that users of other systems report and that could happen here. The names say where.
//!
//! Two are elsewhere: `which_rank_did_not_join_nccl_1260` is in `watchdog.rs`, and memory that skewed routing exhausts,
//! `every_token_on_one_expert_trains_within_the_bound_megablocks_154_megatron_716`, in `tests/dispatch.rs`. A loss that differs
//! between tensor-parallel sizes (torchtitan#1750) cannot happen yet: there is no tensor parallelism.

use std::fs;
use std::path::Path;

use unisono_checkpoint::Reader;
use unisono_train::config::{DispatchConfig, LayoutConfig};
use unisono_train::run_folder::CHECKPOINTS;
use unisono_train::{RunConfig, RunOptions, TrainError, train};

use crate::common::{Quiet, Ran, config, run, try_run};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// The same model and batches, experts shared by groups of `expert_group` slots: all sums are cut otherwise, so results
/// differ in their last bits, and in nothing else.
fn in_groups_of(expert_group: usize) -> RunConfig {
    let mut config = config();
    config.grid.expert_group = expert_group;
    config.train.clip_norm = 0.0;
    config.train.steps = 1;
    config.checkpoint.every = 1;
    config
}

/// Gradients, up to one factor, by tensor: first moments after the first step.
pub fn gradients(run: &Path) -> Vec<(String, Vec<f32>)> {
    let reader = Reader::open(&run.join(CHECKPOINTS), 1).expect("a checkpoint");
    let names = reader.tensors().iter().filter_map(|tensor| {
        let name = tensor.name.strip_prefix("optimizer.first.")?;
        let bytes = reader.read(&tensor.name, 0..tensor.len()).expect("a whole tensor");
        let values = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        Some((name.to_string(), values.collect()))
    });
    names.collect()
}

/// Relative distance of two vectors.
pub fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square =
        |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let difference = square(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / square(&mut a.iter().map(|a| f64::from(*a))).max(1e-30)
}

#[test]
fn gradient_norm_depends_on_where_experts_live_megatron_5916_deepspeed_8475_colossalai_2192() {
    let folder = folder();
    let mut config = config();
    // So low that every step is clipped: a norm that is off by a bit would show in all parameters.
    config.train.clip_norm = 0.01;
    let alone = run(&config, &folder.path().join("1"), 1);
    assert!(alone.steps.iter().all(|step| step.grad_norm > config.train.clip_norm));
    for ranks in [2, 4] {
        let ran = run(&config, &folder.path().join(ranks.to_string()), ranks);
        assert_eq!(ran.numbers(), alone.numbers(), "{ranks} ranks");
        assert_eq!(ran.hashes, alone.hashes, "{ranks} ranks");
    }
    // Where every rank has all experts, or only some of them: the same norm but for rounding.
    let norm = |expert_group: usize| {
        let path = folder.path().join(format!("group {expert_group}"));
        run(&in_groups_of(expert_group), &path, 4).steps[0].grad_norm
    };
    let (replicated, spread) = (norm(1), norm(4));
    assert!((replicated / spread - 1.0).abs() < 1e-5, "{replicated} and {spread}");
}

#[test]
fn doubled_gradients_under_expert_parallelism_pytorch_160285_deepspeed_5259() {
    let folder = folder();
    let [replicated, pairs, spread] = [1, 2, 4].map(|expert_group| {
        let path = folder.path().join(format!("group {expert_group}"));
        run(&in_groups_of(expert_group), &path, 4);
        gradients(&path)
    });
    assert!(replicated.iter().any(|(name, _)| name.contains("expert")));
    for other in [pairs, spread] {
        assert_eq!(replicated.len(), other.len());
        for ((name, a), (other_name, b)) in replicated.iter().zip(&other) {
            assert_eq!(name, other_name);
            assert!(distance(a, b) < 1e-4, "{name} is off by {}", distance(a, b));
        }
    }
}

#[test]
fn balance_loss_that_never_flowed_automodel_1408() {
    let folder = folder();
    let with = |name: &str, coefficient: f32, ranks: usize| -> Ran {
        let mut config = config();
        config.model.balance_loss_coef = coefficient;
        // Nothing else may balance.
        config.model.bias_update_rate = 0.0;
        config.train.steps = 40;
        run(&config, &folder.path().join(name), ranks)
    };
    // Of the two the first is only there to be measured.
    let (measured, pulled) = (with("measured", 1e-6, 1), with("pulled", 1.0, 1));
    let unscaled =
        |ran: &Ran, coefficient: f64| ran.steps.last().map_or(0.0, |step| step.balance_loss / coefficient);
    let (before, after) = (unscaled(&measured, 1e-6), unscaled(&pulled, 1.0));
    assert!(after < 0.999 * before, "the pull did not show: {before} without, {after} with");
    let moved = |ran: &Ran| {
        ran.hashes[0].tensors.iter().filter(|(name, _)| name.contains("router")).cloned().collect::<Vec<_>>()
    };
    assert!(!moved(&measured).is_empty());
    assert_ne!(moved(&measured), moved(&pulled), "the first gradient of the router already differs");
    let spread = with("spread", 1.0, 4);
    assert_eq!(spread.numbers(), pulled.numbers());
    assert_eq!(spread.hashes, pulled.hashes);
}

#[test]
fn hang_when_an_expert_gets_no_tokens_deepspeed_4808() {
    let folder = folder();
    let mut config = config();
    (config.model.num_experts, config.model.top_k) = (64, 1);
    (config.train.sequence_length, config.train.expert_row_block) = (2, 1);
    let alone = run(&config, &folder.path().join("1"), 1);
    let hierarchical = DispatchConfig::Hierarchical;
    for (nodes, dispatch, dispatch_chunks, dispatch_rows) in [
        (vec![2], DispatchConfig::Flat, 1, 0),
        (vec![4], DispatchConfig::Flat, 1, 0),
        (vec![4], DispatchConfig::Flat, 2, 0),
        (vec![4], DispatchConfig::Flat, 1, 1),
        (vec![1, 3], hierarchical, 1, 0),
        (vec![2, 2], hierarchical, 2, 0),
        (vec![1, 3], hierarchical, 1, 1),
    ] {
        config.layout = LayoutConfig { dispatch, dispatch_chunks, dispatch_rows, ..LayoutConfig::default() };
        let what = format!("nodes of {nodes:?}, {:?}", config.layout);
        let mut options = RunOptions::new(folder.path().join(&what), nodes.iter().sum(), 1);
        options.nodes = nodes;
        let ran = try_run(&config, &options).expect("the run succeeds");
        assert_eq!(ran.numbers(), alone.numbers(), "{what}");
        assert_eq!(ran.hashes, alone.hashes, "{what}");
    }
    let layers = || alone.steps.iter().flat_map(|step| &step.expert_load);
    assert!(layers().all(|layer| layer.iter().filter(|count| **count == 0).count() >= 56));
    // In some layer of some step a rank of the four had nothing to do.
    assert!(layers().any(|layer| layer.chunks(16).any(|rank| rank.iter().sum::<u64>() == 0)));
}

#[test]
fn resume_refused_or_drifting_at_another_width_torchtitan_816_megatron_bridge_5637_5257() {
    let folder = folder();
    let whole = run(&config(), &folder.path().join("whole"), 1);
    for (before, after) in [(4, 1), (1, 4), (2, 4)] {
        let path = folder.path().join(format!("{before} then {after}"));
        let mut options = RunOptions::new(&path, before, 1);
        options.stop_after = Some(3);
        try_run(&config(), &options).expect("the first part succeeds");
        let mut options = RunOptions::new(&path, after, 1);
        options.resume = true;
        let ran = try_run(&config(), &options).expect("the second part succeeds");
        assert_eq!(ran.numbers(), whole.numbers(), "{before} ranks, then {after}");
        assert_eq!(ran.hashes, whole.hashes, "{before} ranks, then {after}");
        // A width that cannot be is refused before any rank starts.
        options.ranks = 3;
        let refused = try_run(&config(), &options).err().expect("3 does not divide 4").to_string();
        assert!(refused.contains('3') && refused.contains('4'), "{refused}");
    }
}

#[test]
fn partial_checkpoint_folder_hangs_all_ranks_automodel_3254() {
    let folder = folder();
    let mut config = config();
    (config.checkpoint.every, config.checkpoint.keep_last) = (2, 0);
    let whole = run(&config, &folder.path().join("whole"), 4);
    // What a save that was cut short may leave: no manifest, or a shard that is missing or cut.
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 3] = [
        ("no manifest", |path| {
            for file in fs::read_dir(path).expect("a checkpoint").flatten() {
                if file.path().extension().is_some_and(|extension| extension == "json") {
                    fs::remove_file(file.path()).expect("removed");
                }
            }
        }),
        ("a shard is missing", |path| fs::remove_file(a_shard(path)).expect("removed")),
        ("a shard is cut", |path| {
            let shard = fs::OpenOptions::new().write(true).open(a_shard(path)).expect("opened");
            shard.set_len(100).expect("cut");
        }),
    ];
    for (name, damage) in damages {
        let path = folder.path().join(name);
        let mut options = RunOptions::new(&path, 4, 1);
        options.stop_after = Some(4);
        try_run(&config, &options).expect("the first part succeeds");
        damage(&path.join(CHECKPOINTS).join("step-000004"));
        (options.stop_after, options.resume) = (None, true);
        let ran = try_run(&config, &options).expect("it goes on from step 2");
        assert_eq!(ran.hashes, whole.hashes, "{name}");
    }
}

fn a_shard(checkpoint: &Path) -> std::path::PathBuf {
    let files = fs::read_dir(checkpoint).expect("a checkpoint").map(|entry| entry.expect("an entry").path());
    let shards = files.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    shards.min().expect("shards")
}

#[test]
fn the_only_way_is_to_run_it_and_see_if_it_runs_out_of_memory_automodel_1592() {
    let folder = folder();
    let ran = run(&config(), &folder.path().join("fits"), 2);
    for memory in &ran.summary.memory {
        // Of 4 MiB, where every rounded size of a buffer counts.
        assert!(memory.measured as f64 <= 1.1 * memory.estimated as f64, "{memory:?}");
    }
    let mut config = config();
    (config.model.hidden_size, config.model.num_hidden_layers) = (1 << 16, 200);
    let path = folder.path().join("does not fit");
    let refused =
        train(&config, &RunOptions::new(&path, 2, 1), &Quiet).expect_err("no machine has that much");
    let TrainError::Memory { needed, remedy, .. } = refused else { panic!("{refused}") };
    assert!(needed.contains("iB") && remedy.contains("lower "), "{needed}: {remedy}");
    assert!(!path.exists(), "nothing was started");
}
