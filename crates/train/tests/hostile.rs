//! Damaged files of runs, of machines and of models: an error or a value. Never a panic, a hang, or memory beyond what the
//! file's size explains.

#[path = "../../data/tests/data/common/damage.rs"]
mod damage;
#[path = "../../data/tests/data/common/held.rs"]
mod held;

use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use damage::Random;
use held::held;
use unisono_data::Dataset;
use unisono_mesh::{Fold, Grid};
use unisono_plan::engine::{LocalMachine, Mode, PhaseRates, ProductRates, step_work};
use unisono_plan::{Architecture, Cluster, ModelConfig, Numerics};
use unisono_train::run_folder::{
    CONFIG_FILE, HASHES_FILE, METRICS_FILE, RUN_FILE, SUMMARY_FILE, TRACE_FILE, read_config, read_hashes,
    read_identity, read_last_step, read_steps, read_summary,
};
use unisono_train::{
    Event, Observer, RunConfig, RunOptions, engine_layout, recalibrate, step_rows, train_on,
};

/// Longer than any reading takes on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(20);
/// What a reading may hold at once besides its file: for the parser's tree, and for what it makes of short words.
const ROOM: usize = 4 << 20;

/// Runs `read` and holds it to time and memory; what it gives is an error that says something, or a value.
fn bounded<T, E: Display>(what: &str, bytes: usize, read: impl FnOnce() -> Result<T, E>) -> bool {
    let begin = Instant::now();
    let (result, held) = held(read);
    let took = begin.elapsed();
    assert!(took < PATIENCE, "{what}: {took:?}");
    assert!(held < ROOM + 64 * bytes, "{what}: {held} bytes for a file of {bytes}");
    if let Err(error) = &result {
        assert!(!error.to_string().is_empty(), "{what}");
    }
    result.is_ok()
}

/// Reads a text whole, then damaged in as many ways; most damage is an error, and not all of it.
fn check_text<T, E: Display>(what: &str, text: &str, cases: u64, read: impl Fn(&str) -> Result<T, E>) {
    assert!(bounded(what, text.len(), || read(text)), "{what}: {}", read(text).err().expect("an error"));
    let mut refused = 0;
    for seed in 0..cases {
        let damaged = Random(seed).damage(text.as_bytes());
        let damaged = String::from_utf8_lossy(&damaged);
        refused += u64::from(!bounded(&format!("{what}, damage {seed}"), damaged.len(), || read(&damaged)));
    }
    assert!(refused > cases / 20 && refused < cases, "{what}: {refused} of {cases} refused");
}

/// The same of a file that is read where it lies; what refuses it names it.
fn check_file<T, E: Display>(path: &Path, cases: u64, read: impl Fn() -> Result<T, E>) {
    let whole = fs::read(path).expect("the run wrote it");
    let name = path.file_name().expect("a name").to_string_lossy().into_owned();
    let named = || {
        read().map_err(|error| {
            let said = error.to_string();
            assert!(said.contains(&name) || said.contains("recalibrate"), "{said}");
            said
        })
    };
    assert!(bounded(&name, whole.len(), named), "{name}");
    for seed in 0..cases {
        let damaged = Random(seed).damage(&whole);
        fs::write(path, &damaged).expect("written");
        bounded(&format!("{name}, damage {seed}"), damaged.len(), named);
    }
    fs::write(path, &whole).expect("written");
}

struct Quiet;

impl Observer for Quiet {
    fn event(&self, _: Event) {}
}

fn config() -> RunConfig {
    let mut config = RunConfig {
        grid: Grid { replicas: 2, expert_group: 2, ..Grid::default() },
        model: ModelConfig {
            hidden_size: 16,
            num_hidden_layers: 2,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 8,
            intermediate_size: 16,
            moe_intermediate_size: 16,
            num_experts: 4,
            ..ModelConfig::default()
        },
        ..RunConfig::default()
    };
    config.train.steps = 4;
    (config.train.sequence_length, config.train.micro_batch) = (16, 1);
    (config.schedule.warmup_steps, config.evaluation.every, config.log.hashes_every) = (1, 2, 1);
    config
}

/// A run that leaves every kind of file.
fn run(folder: &Path) -> PathBuf {
    let dataset = Dataset::random(1, 1 << 14, 4096).expect("random tokens");
    let mut options = RunOptions::new(folder.join("run"), 2, 1);
    options.trace = true;
    train_on(&config(), &options, &dataset, &Quiet).expect("the run succeeds");
    options.folder
}

/// A machine that nothing was measured on.
fn machine() -> LocalMachine {
    let config = config();
    let layout = engine_layout(&config, &Fold::new(config.grid, 2).expect("two ranks"), |_| 0);
    let rates = |(communicates, name): (bool, &str)| PhaseRates {
        name: name.into(),
        communicates,
        of_products: 1.0,
        element_s: 1e-9,
        score_s: 1e-9,
        call_s: 1e-6,
    };
    let phase = step_work(&layout, step_rows(&config)).into_keys().map(rates).collect();
    let table = || vec![10.0; 8];
    LocalMachine {
        cpu: "some".into(),
        cores: 2,
        copy_bytes_per_s: 1e10,
        within_80: None,
        products: ProductRates {
            sizes: vec![16, 256],
            plain: table(),
            transposed_right: table(),
            transposed_left: table(),
        },
        mode: vec![Mode { ranks: 2, threads: 1, phase }],
    }
}

#[test]
fn files_of_a_run() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = run(folder.path());
    check_file(&run.join(CONFIG_FILE), 500, || read_config(&run));
    check_file(&run.join(RUN_FILE), 500, || read_identity(&run));
    check_file(&run.join(SUMMARY_FILE), 500, || read_summary(&run));
    check_file(&run.join(METRICS_FILE), 500, || read_steps(&run));
    check_file(&run.join(METRICS_FILE), 500, || read_last_step(&run));
    check_file(&run.join(HASHES_FILE), 500, || read_hashes(&run));
    for name in [TRACE_FILE, SUMMARY_FILE, METRICS_FILE] {
        check_file(&run.join(name), 200, || recalibrate(&mut machine(), &run));
    }
}

#[test]
fn configs_and_overrides() {
    let text = config().to_toml().expect("it has a TOML form");
    check_text("config", &text, 1_000, |text| RunConfig::load(text, &[]));
    for text in
        ["model.num_experts=8", "grid = { replicas = 4 }", "sample.prompt=\"To be\"", "schedule.kind=wsd"]
    {
        check_text(text, text, 500, |text| RunConfig::load("", &[text.into()]));
    }
}

#[test]
fn machines() {
    let text = machine().to_toml().expect("it has a TOML form");
    let config = config();
    let layout = engine_layout(&config, &Fold::new(config.grid, 2).expect("two ranks"), |_| 0);
    check_text("local.toml", &text, 1_000, |text| {
        LocalMachine::from_toml(text).map(|machine| machine.price(&layout, step_rows(&config), 1))
    });
}

#[test]
fn clusters() {
    let text = "gpu = \"h100\"\ngpus = 64\nper_server = 8\nprice_usd_per_gpu_hour = 1.5\nfailures_per_gpu_hour = 1e-5\n\n\
        [[level]]\nname = \"NVLink\"\nwidth = 8\ngbyte_per_s = 450\nlatency_us = 2\n\n\
        [[level]]\nname = \"leaf\"\ngbyte_per_s = 50\nlatency_us = 8\noversubscription = 1.5\n";
    check_text("cluster", text, 3_000, Cluster::from_toml);
}

#[test]
fn hugging_face_configs() {
    let deepseek = r#"{"model_type":"deepseek_v3","num_hidden_layers":61,"hidden_size":7168,"vocab_size":129280,
        "num_attention_heads":128,"num_key_value_heads":128,"intermediate_size":18432,"moe_intermediate_size":2048,
        "n_routed_experts":256,"n_shared_experts":1,"num_experts_per_tok":8,"n_group":8,"topk_group":4,
        "first_k_dense_replace":3,"q_lora_rank":1536,"kv_lora_rank":512,"qk_nope_head_dim":128,"qk_rope_head_dim":64,
        "v_head_dim":128,"num_nextn_predict_layers":1,"scoring_func":"sigmoid","norm_topk_prob":true,
        "routed_scaling_factor":2.5,"rope_theta":10000,"rms_norm_eps":1e-6}"#;
    let windows = r#"{"model_type":"gpt_oss","num_hidden_layers":4,"hidden_size":2880,"vocab_size":201088,
        "num_attention_heads":64,"num_key_value_heads":8,"head_dim":64,"intermediate_size":2880,"num_local_experts":32,
        "num_experts_per_tok":4,"sliding_window":128,"tie_word_embeddings":false,
        "layer_types":["sliding_attention","full_attention","sliding_attention","full_attention"]}"#;
    for text in [deepseek, windows] {
        check_text("config.json", text, 3_000, Architecture::from_hugging_face);
        check_text("config.json for numbers", text, 1_000, Numerics::from_hugging_face);
    }
}
