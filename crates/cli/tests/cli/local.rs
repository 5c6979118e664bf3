//! `unisono bench local` and what uses its file: this machine for the planner.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use unisono_mesh::Fold;
use unisono_plan::engine::{LocalMachine, Mode, PhaseRates, ProductRates, step_work};
use unisono_train::system::{cores, cpu_type};
use unisono_train::{RunConfig, engine_layout, step_rows};

use crate::common::{TINY, run, train, write_qwen};

/// This machine with rates that nothing was measured for, in `folder`.
fn write_machine(folder: &Path) {
    let config = RunConfig::load(&std::fs::read_to_string(TINY).unwrap(), &[]).unwrap();
    let mut mode = Vec::new();
    for (ranks, threads) in [(1, 1), (1, 2)] {
        let layout = engine_layout(&config, &Fold::new(config.grid, ranks).unwrap(), |_| 0);
        let rates = |(communicates, name): (bool, &str)| PhaseRates {
            name: name.into(),
            communicates,
            of_products: 1.0,
            element_s: 1e-9,
            score_s: 1e-9,
            call_s: 1e-6,
        };
        let phase = step_work(&layout, step_rows(&config)).into_keys().map(rates).collect();
        mode.push(Mode { ranks, threads, phase });
    }
    let table = || vec![10.0; 8];
    let products = ProductRates {
        sizes: vec![16, 256],
        plain: table(),
        transposed_right: table(),
        transposed_left: table(),
    };
    let machine = LocalMachine {
        cpu: cpu_type(),
        cores: cores(),
        copy_bytes_per_s: 1e10,
        within_80: Some(1.25),
        products,
        mode,
    };
    std::fs::write(folder.join("local.toml"), machine.to_toml().unwrap()).unwrap();
}

/// `[name]` predicted seconds of every layout of the smallest example.
fn predicted(folder: &Path) -> BTreeMap<String, f64> {
    let done = run(folder, 0, &["plan", TINY, "local", "--json"]);
    let plan: Value = serde_json::from_str(&done.out).unwrap();
    let layouts = plan["layouts"].as_array().unwrap().iter();
    let name = |layout: &Value| {
        let [low, high] = [0, 1].map(|end| layout["step_interval_80_s"][end].as_f64().unwrap());
        assert!((high / low - 1.25 * 1.25).abs() < 1e-9, "{layout}");
        format!("{} x {} {} {}", layout["ranks"], layout["threads"], layout["zero"], layout["recompute"])
    };
    layouts.map(|layout| (name(layout), layout["step_s"].as_f64().unwrap())).collect()
}

#[test]
fn a_run_recalibrates_the_machine_for_as_many_ranks_and_threads() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_machine(folder);
    let before = predicted(folder);
    train(folder, "run", &["--steps", "6", "--ranks", "1", "--threads", "1", "--trace"]);
    let summary: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("run/summary.json")).unwrap()).unwrap();
    let said = run(folder, 0, &["bench", "local", "--from", "run"]).out;
    assert!(said.contains("1 ranks x 1 threads") && said.contains("over 5 steps"), "{said}");
    let again = run(folder, 0, &["bench", "local", "--from", "run", "--json"]).out;
    let again: Value = serde_json::from_str(&again).unwrap();
    assert_eq!((&again["file"], &again["from"]["steps"]), (&"local.toml".into(), &5.into()));
    assert_eq!(again["machine"]["mode"].as_array().unwrap().len(), 2);
    let [predicted_s, measured_s] =
        ["predicted_s", "measured_s"].map(|key| again["from"][key].as_f64().unwrap());
    assert!((predicted_s / measured_s - 1.0).abs() < 0.02, "{again}");

    let machine =
        LocalMachine::from_toml(&std::fs::read_to_string(folder.join("local.toml")).unwrap()).unwrap();
    let config =
        RunConfig::load(&std::fs::read_to_string(folder.join("run/config.toml")).unwrap(), &[]).unwrap();
    let fold = Fold::new(config.grid, 1).unwrap();
    let now = machine.price(&engine_layout(&config, &fold, |_| 0), step_rows(&config), 1).step_s;
    let measured = summary["step_time"]["measured_s"].as_f64().unwrap();
    let said = &summary["step_time"];
    let [step_s, low, high] = [&said["predicted_s"], &said["interval_80_s"][0], &said["interval_80_s"][1]]
        .map(|one| one.as_f64().unwrap());
    assert!((step_s / low - 1.25).abs() < 1e-9 && (high / step_s - 1.25).abs() < 1e-9, "{said}");
    assert!((now / measured - 1.0).abs() < 0.02, "{now} s predicted, {measured} s measured");
    // One core has another number of threads; what was not run keeps its price.
    if cores() > 1 {
        let kept = format!("1 x {} 1 \"none\"", cores());
        assert_eq!(predicted(folder)[&kept], before[&kept]);
    }
}

#[test]
fn a_run_that_cannot_recalibrate_says_what_it_lacks() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let from = ["bench", "local", "--from", "run"];
    let said = run(folder, 3, &from).err;
    assert!(said.contains("local.toml") && said.contains("bench local --out"), "{said}");
    write_machine(folder);
    train(folder, "run", &["--steps", "2", "--ranks", "1"]);
    let said = run(folder, 2, &from).err;
    assert!(said.contains("no trace") && said.contains("--trace"), "{said}");
}

#[test]
fn a_run_on_a_measured_machine_shows_predicted_next_to_measured() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_machine(folder);
    let said = train(folder, "run", &["--steps", "3", "--ranks", "1"]).out;
    assert!(said.contains("predicted"), "{said}");
    let other = std::fs::read_to_string(folder.join("local.toml")).unwrap().replace("cores = ", "cores = 1");
    std::fs::write(folder.join("local.toml"), other).unwrap();
    let said = run(folder, 3, &["plan", TINY, "local", "--machine", "local.toml"]).err;
    assert!(said.contains("measured on") && said.contains("unisono bench local"), "{said}");
}

#[test]
fn the_fastest_layout_is_emitted_as_a_config_that_trains() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_machine(folder);
    run(folder, 0, &["plan", TINY, "local", "--emit", "local-plan.toml"]);
    let plan: Value = serde_json::from_str(&run(folder, 0, &["plan", TINY, "local", "--json"]).out).unwrap();
    let chosen = &plan["layouts"][0];
    assert_eq!(&plan["chosen"], chosen);
    let shown = run(folder, 0, &["plan", TINY, "local"]).out;
    assert!(shown.contains(&format!("Chosen: {}\n", plan["chosen"]["name"].as_str().unwrap())), "{shown}");
    let text = std::fs::read_to_string(folder.join("local-plan.toml")).unwrap();
    let ranks = format!("--ranks {} --threads {}", chosen["ranks"], chosen["threads"]);
    assert!(text.starts_with("# unisono plan: ") && text.contains(&ranks), "{text}");
    let emitted = RunConfig::load(&text, &[]).unwrap();
    let mut expected = RunConfig::load(&std::fs::read_to_string(TINY).unwrap(), &[]).unwrap();
    assert_eq!(serde_json::json!(emitted.train.recompute), chosen["recompute"]);
    assert_eq!(serde_json::json!(emitted.layout.zero), chosen["zero"]);
    (expected.train.recompute, expected.layout.zero) = (emitted.train.recompute, emitted.layout.zero);
    assert_eq!(emitted, expected);
}

#[test]
fn a_model_that_no_config_is_of_is_laid_out_and_trains() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_machine(folder);
    write_qwen(folder, "qwen", r#","vocab_size":4096,"num_experts":12,"max_position_embeddings":64"#);
    let shown = run(folder, 0, &["plan", "qwen", "local"]).out;
    // The two commands that are shown, without the program.
    let arguments = |wanted: &str| -> Vec<&str> {
        let found = shown.lines().find_map(|line| Some(&line[line.find(wanted)?..]));
        found.unwrap_or_else(|| panic!("{shown}")).split_whitespace().collect()
    };
    run(folder, 0, &arguments(" plan qwen local --emit plan.toml"));
    let config = RunConfig::load(&std::fs::read_to_string(folder.join("plan.toml")).unwrap(), &[]).unwrap();
    // Of the built-in 8 the widest group that divides 12 experts; no longer sequences than the model has positions.
    assert_eq!((config.grid.replicas, config.grid.expert_group, config.train.sequence_length), (8, 4, 64));
    assert_eq!((config.model.num_experts, config.model.rope_theta), (12, 1e6));
    let few = ["--run", "run", "--steps", "2", "--set", "evaluation.sequences=8"];
    run(folder, 0, &[&arguments(" train plan.toml --ranks "), &few[..]].concat());
    // One that the engine does not have names what it lacks, one that is too large that it does not fit.
    let said = run(folder, 2, &["plan", "DeepSeek-V3", "local"]).err;
    assert!(said.contains("latent attention (MLA)") && said.contains("DeepSeek-V3"), "{said}");
    let said = run(folder, 2, &["plan", "qwen3-30b-a3b", "local", "--emit", "no.toml"]).err;
    assert!(said.contains("no layout of qwen3-30b-a3b fits"), "{said}");
    let said = run(folder, 0, &["plan", "qwen3-30b-a3b", "local"]).out;
    assert!(said.contains("None fits: this machine has ") && !said.contains("Train it"), "{said}");
    let plan: Value =
        serde_json::from_str(&run(folder, 0, &["plan", "qwen3-30b-a3b", "local", "--json"]).out).unwrap();
    assert_eq!((&plan["chosen"], &plan["layouts"][0]["fits"]), (&Value::Null, &Value::Bool(false)));
    let needed = |layout: &Value| layout["memory_bytes"].as_u64().unwrap();
    assert!(plan["layouts"].as_array().unwrap().is_sorted_by_key(needed), "the nearest comes first");
}

/// Describes two of this machine, with a link of `gbyte_per_s`.
fn write_hosts(folder: &Path, gbyte_per_s: f64) {
    let text = format!(
        "host = \"local\"\nhosts = 2\n[[level]]\nname = \"Ethernet\"\ngbyte_per_s = {gbyte_per_s:?}\nlatency_us = 50"
    );
    std::fs::write(folder.join("hosts.toml"), text).unwrap();
}

#[test]
fn layouts_on_hosts_are_priced_with_what_lies_between_them() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_hosts(folder, 0.1);
    let said = run(folder, 2, &["plan", TINY, "hosts.toml"]).err;
    assert!(said.contains("unisono bench local"), "{said}");
    write_machine(folder);
    let ask = |rate: f64| -> Value {
        write_hosts(folder, rate);
        serde_json::from_str(&run(folder, 0, &["plan", TINY, "hosts.toml", "--json"]).out).unwrap()
    };
    let of = |plan: &Value, key: &str| plan["layouts"][0][key].as_f64().unwrap();
    let (fast, slow) = (ask(0.1), ask(0.001));
    for layout in fast["layouts"].as_array().unwrap() {
        assert!(layout["hosts"] == 2 && layout["ranks"].as_u64().unwrap() % 2 == 0, "{layout}");
        assert!(layout["network_s"].as_f64() >= layout["waited_s"].as_f64(), "{layout}");
    }
    assert!(of(&slow, "step_s") > 2.0 * of(&fast, "step_s"));
    let said = run(folder, 0, &["plan", TINY, "hosts.toml", "--emit", "plan.toml"]).out;
    assert!(said.contains("Ethernet over 2: 0.001 GB/s") && said.contains("--cluster hosts.toml"), "{said}");
    let emitted = std::fs::read_to_string(folder.join("plan.toml")).unwrap();
    let ranks = of(&slow, "ranks") as usize;
    let command = format!("# mpirun -n {ranks} --map-by ppr:{}:node unisono train THIS_FILE", ranks / 2);
    assert!(emitted.contains(&command), "{command}: {emitted}");
    let said = run(folder, 2, &["plan", TINY, "hosts.toml", "--layout", "dp2"]).err;
    assert!(said.starts_with("error: --layout is for clusters of GPUs"), "{said}");
    let said = run(folder, 2, &["train", TINY, "--cluster", "hosts.toml"]).err;
    assert!(said.contains("these ranks are on one host"), "{said}");
}

#[test]
fn a_host_that_was_measured_elsewhere_is_named_by_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_machine(folder);
    write_hosts(folder, 0.1);
    let machine = std::fs::read_to_string(folder.join("local.toml")).unwrap();
    std::fs::remove_file(folder.join("local.toml")).unwrap();
    std::fs::write(folder.join("other.toml"), machine.replace(&cpu_type(), "another processor")).unwrap();
    let hosts = std::fs::read_to_string(folder.join("hosts.toml")).unwrap();
    let hosts = hosts.replace("\"local\"", "\"other.toml\"").replace("hosts = 2", "hosts = 3");
    std::fs::write(folder.join("hosts.toml"), &hosts).unwrap();
    let said = run(folder, 2, &["plan", TINY, "hosts.toml"]).err;
    assert!(said.contains("do not divide the grid's 4 slots") && said.contains("are 2 hosts"), "{said}");
    std::fs::write(folder.join("hosts.toml"), hosts.replace("hosts = 3", "hosts = 4\nmemory_gbyte = 1e-6"))
        .unwrap();
    let said = run(folder, 0, &["plan", TINY, "hosts.toml"]).out;
    assert!(said.contains("another processor") && said.contains("does not fit"), "{said}");
}

#[test]
fn the_engines_list_prints_and_draws_with_its_times() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    write_machine(folder);
    write_hosts(folder, 0.1);
    let files = ["--trace", "trace.json", "--schedule"];
    let here = ["plan", TINY, "local"].into_iter().chain(files).chain(["list.txt"]).collect::<Vec<_>>();
    run(folder, 0, &here);
    let list = std::fs::read_to_string(folder.join("list.txt")).unwrap();
    assert!(list.starts_with("rank 0 stages: start:targets@0 finish:targets@0 "), "{list}");
    let trace = || -> Vec<Value> {
        let text = std::fs::read_to_string(folder.join("trace.json")).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["traceEvents"].as_array().unwrap().clone()
    };
    let on = |events: &[Value], lane: &str| events.iter().filter(|event| event["cat"] == lane).count();
    let events = trace();
    let kernels = list
        .split(' ')
        .filter(|op| {
            ["forward", "again", "backward", "weights", "update"]
                .iter()
                .any(|pass| op.contains(&format!(":{pass}@")))
        })
        .count();
    assert_eq!((on(&events, "compute"), on(&events, "network")), (kernels, 0));
    let plan: Value = serde_json::from_str(&run(folder, 0, &["plan", TINY, "local", "--json"]).out).unwrap();
    let (simulated, fitted) =
        (plan["simulated_s"].as_f64().unwrap(), plan["layouts"][0]["step_s"].as_f64().unwrap());
    assert!(simulated < fitted && simulated > 0.8 * fitted, "{simulated} and {fitted}");
    let last = events
        .iter()
        .filter(|event| event["ph"] == "X")
        .map(|event| event["ts"].as_f64().unwrap() + event["dur"].as_f64().unwrap());
    assert!((last.fold(0.0, f64::max) / 1e6 / simulated - 1.0).abs() < 1e-9);

    run(folder, 0, &["plan", TINY, "hosts.toml", "--trace", "trace.json", "--schedule", "list.svg"]);
    assert!(on(&trace(), "network") > 0);
    let drawn = std::fs::read_to_string(folder.join("list.svg")).unwrap();
    assert!(
        drawn.contains("<title>attention:forward@0</title>")
            && drawn.contains("<title>start:reduce gradients@1</title>")
    );
}
