//! `unisono plan`

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::tempdir;
use unisono_plan::ScoreFunction;
use unisono_train::RunConfig;
use unisono_train::config::{RecomputeConfig, WireConfig};

use crate::common::{TINY, dataset, run, train, write_qwen};

/// DeepSeek-V3 on the cluster it was trained on.
const DEEPSEEK: [&str; 8] = [
    "plan",
    "DeepSeek-V3",
    "h800x2048",
    "--batch",
    "15360",
    "--json",
    "--layout",
    "pp16 vp2 ep64 dp128 dualpipev",
];

#[test]
fn a_plan_is_one_json_object_whose_parts_add_up() {
    let folder = tempdir().unwrap();
    let plan: Value = serde_json::from_str(&run(folder.path(), 0, &DEEPSEEK).out).unwrap();
    let parts = plan["breakdown_s"].as_object().unwrap().values();
    let sum: f64 = parts.filter_map(Value::as_f64).sum();
    let step_s = plan["chosen"]["step_s"].as_f64().unwrap();
    assert!((sum / step_s - 1.0).abs() < 1e-9, "{sum} {step_s}");
    let memory = plan["memory_bytes_by_pipeline_rank"].as_array().unwrap();
    let tensors = plan["tensors_by_pipeline_rank"].as_array().unwrap();
    assert_eq!((memory.len(), tensors.len()), (16, 16));
    for (parts, tensors) in memory.iter().zip(tensors) {
        let [parameters, held] = ["parameters", "held"].map(|list| tensors[list].as_array().unwrap());
        let number = |of: &Value, name: &str| of[name].as_f64().unwrap();
        for (part, bytes) in parts.as_object().unwrap().iter().filter(|(part, _)| *part != "total") {
            let states = parameters.iter().filter_map(|of| Some(of[part].as_f64()? * number(of, "layers")));
            let rest = held.iter().filter(|of| of["part"] == part.as_str());
            let sum: f64 = states.chain(rest.map(|of| number(of, "bytes") * number(of, "count"))).sum();
            let bytes = bytes.as_f64().unwrap();
            assert!((sum - bytes).abs() <= 1e-9 * bytes.abs().max(1.0), "{part}: {sum} for {bytes}");
        }
    }
    for (name, seconds) in plan["breakdown_s"].as_object().unwrap() {
        let ends = |at: usize| plan["breakdown_interval_80_s"][name][at].as_f64().unwrap();
        let seconds = seconds.as_f64().unwrap();
        assert!(
            ends(0) <= seconds && seconds <= ends(1) && (seconds == 0.0) == (ends(0) == ends(1)),
            "{name}"
        );
    }
    for (axis, of) in plan["communication"].as_object().unwrap() {
        for time in ["exposed_s", "hidden_s"] {
            let links = of["by_link"].as_object().unwrap().values();
            let sum: f64 = links.filter_map(|link| link[time].as_f64()).sum();
            let all = of[time].as_f64().unwrap();
            assert!((sum - all).abs() <= 1e-9 * all, "{axis} {time}: {sum} {all}");
        }
    }
    // Experts on 64 GPUs wait for the network; nothing waits for a link that it does not cross.
    let of_experts = &plan["communication"]["expert"]["by_link"];
    assert!(of_experts["network"]["exposed_s"].as_f64().unwrap() > 0.0);
    assert_eq!(plan["communication"]["pipeline"]["by_link"]["NVLink"]["exposed_s"], 0.0);
    let ranks = plan["simulated"]["parts_s_by_pipeline_rank"].as_array().unwrap();
    let simulated_s = plan["simulated"]["step_s"].as_f64().unwrap();
    assert_eq!(ranks.len(), 16);
    for rank in ranks {
        let sum: f64 = rank.as_object().unwrap().values().filter_map(Value::as_f64).sum();
        assert!((sum / simulated_s - 1.0).abs() < 1e-9, "{rank} of {simulated_s}");
    }
    assert_eq!(plan["measured"]["products"], "borrowed from H100 in bf16");
}

#[test]
fn the_chosen_layout_can_be_counted_on_to_fit_and_a_faster_one_that_cannot_is_named() {
    let folder = tempdir().unwrap();
    let question = ["plan", "DeepSeek-V3", "h800x2048"];
    let ask = |more: &[&str]| -> Value {
        let all = [&question[..], more, &["--json"]].concat();
        serde_json::from_str(&run(folder.path(), 0, &all).out).unwrap()
    };
    let plan = ask(&[]);
    let of = |plan: &Value, key: &str| plan[key].as_f64().unwrap();
    let (chosen, riskier) = (&plan["chosen"], &plan["riskier"]);
    assert!(
        of(chosen, "fit_probability") >= 0.8 && of(riskier, "fit_probability") < 0.8,
        "{chosen} {riskier}"
    );
    assert!(of(riskier, "step_s") < of(chosen, "step_s"));
    let front = plan["searched"]["front"].as_array().unwrap();
    let safe = |plan: &&Value| of(plan, "fit_probability") >= 0.8;
    assert_eq!(front.iter().find(safe).unwrap()["layout"], chosen["layout"]);
    let layout = riskier["layout"].as_str().unwrap();
    let text = run(folder.path(), 0, &question).out;
    assert!(text.contains(&format!("  the fastest of all, {layout} in ")), "{text}");
    // Asked for, it comes with the nearest that can be counted on.
    let asked = ask(&["--layout", layout]);
    let nearest = asked["nearest_that_fits"].as_str().unwrap();
    assert!(of(&ask(&["--layout", nearest])["chosen"], "fit_probability") >= 0.8, "{nearest}");
    // With memory to spare nothing else is advised.
    let roomy = run(folder.path(), 0, &["plan", "Qwen3-30B-A3B", "b200x64"]).out;
    assert!(!roomy.contains("the fastest of all"), "{roomy}");
}

#[test]
fn lists_are_json_too_and_schedules_are_text_or_drawings() {
    let folder = tempdir().unwrap();
    let models: Value =
        serde_json::from_str(&run(folder.path(), 0, &["plan", "--models", "--json"]).out).unwrap();
    assert!(models.as_array().is_some_and(|models| models.len() >= 40));
    run(folder.path(), 0, &[&DEEPSEEK[..], &["--schedule", "list.txt"]].concat());
    let list = fs::read_to_string(folder.path().join("list.txt")).unwrap();
    assert_eq!(list.lines().count(), 16);
    assert!(list.starts_with("rank 0 stages 0 31: F0@0"), "{}", &list[..80]);
    run(folder.path(), 0, &[&DEEPSEEK[..], &["--schedule", "list.svg"]].concat());
    assert!(fs::read_to_string(folder.path().join("list.svg")).unwrap().starts_with("<svg"));
}

/// Work of more than a moment shows a bar on a terminal, the drawing of a long step its two ends.
#[test]
fn long_steps_are_waited_for_and_drawn_in_part() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    let ask = ["plan", "Llama-3.1-405B", "h100x16128", "--layout", "tp8 pp126 dp16 1f1b", "--batch", "16384"];
    let line = ask.map(|word| format!("'{word}'")).join(" ");
    let shown = Command::new("script")
        .args(["-qec", &format!("{} {line}", env!("CARGO_BIN_EXE_unisono")), "/dev/null"])
        .stdin(Stdio::null())
        .output();
    // Not every system has util-linux.
    if let Ok(shown) = shown {
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        assert!(shown.contains("trying changes"), "{shown}");
    }
    let files = ["--schedule", "long.svg", "--report", "long.html"];
    let said = run(folder, 0, &[&ask[..], &files].concat()).err;
    assert!(
        said.starts_with("note: long.svg: 32,") && said.contains(" boxes, those that begin in the first "),
        "{said}"
    );
    for file in ["long.svg", "long.html"] {
        let text = fs::read_to_string(folder.join(file)).unwrap();
        assert!(text.len() < 8_000_000 && text.contains(" boxes: from "), "{file}: {} bytes", text.len());
    }
}

#[test]
fn what_a_plan_emits_trains_and_what_the_engine_lacks_is_named() {
    let folder = tempdir().unwrap();
    let ask = ["plan", TINY, "h100x2", "--precision", "f32", "--sequence", "32", "--batch", "8"];
    let files =
        ["--layout", "ep2 dp2", "--emit", "plan.toml", "--report", "plan.html", "--trace", "trace.json"];
    run(folder.path(), 0, &[&ask[..], &files].concat());
    let read = |name: &str| fs::read_to_string(folder.path().join(name)).unwrap();
    let page = read("plan.html");
    assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
    assert!(!page.contains("src=") && !page.contains("@import"), "the page needs other files");
    let trace: Value = serde_json::from_str(&read("trace.json")).unwrap();
    assert!(trace["traceEvents"].as_array().is_some_and(|events| events.len() > 4));
    let data = format!("data.path={}", dataset().display());
    let train = ["train", "plan.toml", "--ranks", "2", "--run", "run", "--set", &data];
    run(folder.path(), 0, &[&train[..], &["--set", "train.steps=1", "--set", "sample.tokens=0"]].concat());
    let refused = run(folder.path(), 2, &[&DEEPSEEK[..], &["--emit", "no.toml"]].concat());
    for lacking in ["pipeline parallelism (pp16, dualpipev)", "latent attention (MLA)", "products in bf16"] {
        assert!(refused.err.contains(lacking), "{}", refused.err);
    }
    assert!(!folder.path().join("no.toml").exists());
}

#[test]
fn the_nearest_that_the_engine_runs_is_emitted_when_asked_for() {
    let folder = tempdir().unwrap();
    write_qwen(folder.path(), "small-qwen", "");
    // One that fits, though its states do not where only the optimizer's are shared out; a dense one; one with experts.
    let asked = [["Qwen3-30B-A3B", "h100x16"], ["Llama-3.1-8B", "h100x16"], ["small-qwen", "h100x2"]];
    for question in asked {
        let ask = ["plan", question[0], question[1], "--emit", "plan.toml"];
        let refused = run(folder.path(), 2, &ask).err;
        let options = refused.lines().find_map(|line| line.strip_prefix("nearest: ")).unwrap_or_else(|| {
            panic!("{refused}");
        });
        let (formats, layout) = options.split_once(" --layout ").unwrap();
        let nearest: Vec<&str> = formats.split(' ').chain(["--layout", layout.trim_matches('"')]).collect();
        let done = run(folder.path(), 0, &[&ask[..], &nearest].concat());
        assert!(!done.out.contains("GiB more than a GPU has"), "{options}");
    }
}

#[test]
fn the_impossible_names_the_nearest_possible() {
    let folder = tempdir().unwrap();
    let long = ["plan", "Llama-3.1-405B", "h100x8", "--batch", "1", "--sequence", "131072"];
    let cases: [(&[&str], &str); 12] = [
        (&["plan", "deepseek-v4", "h800x8"], "nearest: DeepSeek-V3"),
        (&["plan", "DeepSeek-V3", "mi355x64"], "nearest: mi355xx64"),
        (
            &["plan", "Llama-3.1-8B", "h100x64", "--layout", "pp4 dp16 zb1p vp2"],
            "one stage a rank; nearest: pp4 dp16 mb1 zb1p zero1\n",
        ),
        (&["plan", "DeepSeek-V3", "h900x8"], "nearest: H"),
        (&["plan", "Llama-3.1-8B", "h100x64", "--layout", "tp3 dp16"], "= 32; nearest: tp4 dp16 mb1 zero1\n"),
        (&["plan", "DeepSeek-V3", "h800x8"], "256 GPUs with a batch of"),
        (&long, "GPUs with a batch of 1 sequences would do"),
        (
            &["plan", "Llama-3.1-405B", "h100x64", "--layout", "pp128 dp1"],
            "takes 128 GPUs and the cluster has 64; nearest: pp64 dp1 mb1 1f1b zero1; it does not fit",
        ),
        (
            &["plan", "Llama-3.1-8B", "h100x64", "--layout", "tp4 dp30"],
            "the cluster has 64; nearest: tp4 dp16 mb1 zero1\n",
        ),
        (&["plan", "Llama-3.1-8B", "h100x8", "--layout", "tp8 pp4 dp4"], "nearest: tp8 dp1 mb1 zero1"),
        (&["plan", "Llama-3.1-8B", "a100x8", "--precision", "fp8"], "nearest: bf16"),
        (&["plan", "Llama-3.1-8B", "h100x8", "--precision", "nvfp4"], "nearest: fp8"),
    ];
    for (arguments, expected) in cases {
        let done = run(folder.path(), 2, arguments);
        assert!(done.err.contains(expected), "{arguments:?}: {}", done.err);
    }
    // What is named, pasted back, is accepted, and what is said to fit does.
    let layouts = [
        "tp3 pp16",
        "pp16 ep48 dp128",
        "tp16 pp16 dp16",
        "pp61 vp2 ep64 dp32",
        "dp0",
        "pp16 vp2 dp128 zb1p",
        "mb7 cp3 ep256",
    ];
    for layout in layouts {
        let ask = ["plan", "DeepSeek-V3", "h800x2048", "--json", "--layout"];
        let said = run(folder.path(), 2, &[&ask[..], &[layout]].concat()).err;
        let mut remedies = said.trim().split("; nearest").skip(1).map(|rest| rest.split_once(": ").unwrap());
        let price = |layout: &str| -> Value {
            serde_json::from_str(&run(folder.path(), 0, &[&ask[..], &[layout]].concat()).out).unwrap()
        };
        let (_, nearest) = remedies.next().unwrap_or_else(|| panic!("{said}"));
        let nearest = price(nearest);
        let fitting = remedies.next().map(|(_, fitting)| price(fitting));
        assert_eq!(nearest["chosen"]["fits"] == true, fitting.is_none(), "{said}");
        assert!(fitting.is_none_or(|fitting| fitting["chosen"]["fits"] == true), "{said}");
    }
    let large = ["plan", "DeepSeek-V3", "h800x64", "--layout", "pp4 ep16 dp16"];
    let said = run(folder.path(), 0, &large).out;
    assert!(said.contains("GiB more than a GPU has; without --layout the planner"), "{said}");
    let large = ["plan", "DeepSeek-V3", "h800x2048", "--layout", "pp16 ep16 dp128"];
    let said = run(folder.path(), 0, &large).out;
    let (_, fitting) = said.split_once("GiB more than a GPU has; nearest that fits the memory: ").unwrap();
    let said = run(folder.path(), 0, &[&large[..4], &[fitting.trim()]].concat()).out;
    assert!(!said.contains("more than a GPU has"), "{said}");
    // Without NVLink tensor parallelism is no way out, on the larger cluster neither.
    let plain = |gpus: usize| {
        let level = |name: &str, width: usize| {
            format!("[[level]]\nname = \"{name}\"\nwidth = {width}\ngbyte_per_s = 12.5\nlatency_us = 10\n")
        };
        format!("gpu = \"h100\"\ngpus = {gpus}\n{}{}", level("host", 1), level("Ethernet", gpus))
    };
    let ask = ["plan", "Llama-3.1-405B", "plain.toml"];
    fs::write(folder.path().join("plain.toml"), plain(8)).unwrap();
    let said = run(folder.path(), 2, &ask).err;
    assert!(said.contains("256 GPUs with a batch of 1024 sequences would do"), "{said}");
    fs::write(folder.path().join("plain.toml"), plain(256)).unwrap();
    run(folder.path(), 0, &ask);
}

#[test]
fn uneven_routing_costs_time_and_memory() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    let price = |more: &[&str]| -> Value {
        let layout = ["plan", "qwen3-30b-a3b", "h100x64", "--layout", "ep8 dp64 mb2 zero2", "--json"];
        serde_json::from_str(&run(folder, 0, &[&layout[..], more].concat()).out).unwrap()
    };
    let (even, skewed) = (price(&[]), price(&["--skew", "1.2"]));
    let of = |plan: &Value, key: &str| plan["chosen"][key].as_f64().unwrap();
    assert!(even["routing"].is_null());
    let routing = |key: &str| skewed["routing"][key].as_f64().unwrap();
    assert_eq!(of(&skewed, "step_s"), routing("step_p50_s"));
    assert!(
        of(&skewed, "step_s") > 1.05 * of(&even, "step_s") && routing("step_p95_s") > routing("step_p50_s")
    );
    assert!(of(&skewed, "memory_bytes") > 1.05 * of(&even, "memory_bytes"));
    assert_eq!(routing("step_even_s"), of(&even, "step_s"));
    assert_eq!(routing("memory_even_bytes"), of(&even, "memory_bytes"));
    let memory = ["memory_even_bytes", "memory_p50_bytes", "memory_p95_bytes"].map(routing);
    assert!(memory.is_sorted_by(|less, more| less < more), "{memory:?}");

    train(folder, "run", &["--steps", "3", "--ranks", "1"]);
    let ask =
        ["plan", "compare", "--model", "qwen3-30b-a3b", "--cluster", "h100x64", "--skew", "1.2", "--dense"];
    let compared = run(folder, 0, &ask).out;
    let lines = compared.lines().skip_while(|line| *line != "Uneven routing").skip(2);
    // The usual batch has a sequence for every GPU at least.
    let sizes =
        ["plan", "compare", "--model", "Llama-3.1-8B", "--cluster", "h100x64", "--cluster", "h100x2048"];
    let sizes = run(folder, 0, &sizes).out;
    for batch in ["1 T tokens, 1,024 x 4,096 a step  ", "1 T tokens, 2,048 x 4,096 a step  "] {
        assert!(sizes.contains(batch), "{sizes}");
    }
    assert_eq!(
        lines.filter(|line| line.contains("h100x64")).count(),
        1,
        "dense models route nothing: {compared}"
    );
    let measured = price(&["--routing", "run"]);
    assert!(measured["routing"]["fullest_rank_p50"].as_f64().unwrap() > 1.0);
    let said = run(folder, 2, &["plan", "qwen3-30b-a3b", "h100x64", "--routing", "nowhere"]).err;
    assert!(said.contains("nowhere") && said.contains("no run that has ended"), "{said}");
}

/// What `--emit` writes of a layout on two GPUs.
fn emitted(folder: &Path, model: &str, layout: &str, more: &[&str]) -> RunConfig {
    let ask = ["plan", model, "h100x2", "--precision", "f32", "--layout", layout, "--emit", "emitted.toml"];
    run(folder, 0, &[&ask[..], more].concat());
    RunConfig::load(&fs::read_to_string(folder.join("emitted.toml")).unwrap(), &[]).unwrap()
}

#[test]
fn of_a_config_only_what_the_plan_decides_changes() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    let text = fs::read_to_string(TINY).unwrap() + "\n[optimizer]\nlearning_rate = 0.00125\n";
    fs::write(folder.join("mine.toml"), &text).unwrap();
    let mine = RunConfig::load(&text, &[]).unwrap();
    let mut expected = mine.clone();
    expected.grid.replicas = 2;
    // The batch is still of four sequences of 64 tokens, over two replicas.
    expected.train.accumulate = 2;
    assert_eq!(emitted(folder, "mine.toml", "ep2 dp2 recompute=selective", &[]), expected);
    let asked =
        emitted(folder, "mine.toml", "dp2 ep2", &["--wire", "bf16", "--batch", "8", "--sequence", "32"]);
    assert_eq!((asked.train.dispatch_wire, asked.train.accumulate), (WireConfig::Bf16, 4));
    assert_eq!((asked.train.sequence_length, asked.train.recompute), (32, RecomputeConfig::None));
    assert_eq!((asked.optimizer, asked.log), (mine.optimizer, mine.log));
}

#[test]
fn of_a_hugging_face_model_what_changes_numbers_is_emitted_too() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    write_qwen(folder, "small-qwen", "");
    let ask = ["--batch", "4", "--sequence", "64"];
    let config = emitted(folder, "small-qwen", "ep2 dp2 recompute=moe_act+layernorm", &ask);
    let model = &config.model;
    assert_eq!((model.rope_theta, model.rms_norm_eps, model.normalize_top_k), (1e6, 1e-6, false));
    assert_eq!((model.score_function, model.num_shared_experts), (ScoreFunction::Softmax, 0));
    assert_eq!(config.train.recompute, RecomputeConfig::Selective);
    let head = fs::read_to_string(folder.join("emitted.toml")).unwrap();
    assert!(head.starts_with("# unisono plan: small-qwen on 2 H100"), "{}", &head[..80]);
}

#[test]
fn what_the_engine_lacks_is_named_and_nothing_is_written() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    write_qwen(folder, "shared", r#","shared_expert_intermediate_size":48"#);
    write_qwen(folder, "scaled", r#","rope_scaling":{"type":"yarn","factor":4.0}"#);
    let cases: [(&str, &[&str], &str); 5] = [
        (TINY, &["--optimizer", "adam-bf16-moments"], "moments in bf16"),
        (TINY, &["--layout", "ep2 dp2 recompute=mlp"], "recompute=mlp"),
        (TINY, &["--layout", "ep2 dp2 recompute=moe+layernorm"], "none, selective and full"),
        ("shared", &[], "shared experts of width 48, no multiple of the routed experts' 32"),
        ("scaled", &[], "rope_scaling"),
    ];
    for (model, more, expected) in cases {
        let layout: &[&str] = if more.contains(&"--layout") { &[] } else { &["--layout", "ep2 dp2"] };
        let ask = ["plan", model, "h100x2", "--precision", "f32", "--batch", "4", "--emit", "no.toml"];
        let done = run(folder, 2, &[&ask[..], layout, more].concat());
        assert!(done.err.contains(expected), "{model} {more:?}: {}", done.err);
        assert!(!folder.join("no.toml").exists());
    }
}

#[test]
fn clusters_that_differ_in_their_network_are_told_apart() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    fs::write(folder.join("narrow.toml"), "gpu = \"gb200\"\ngpus = 144\nnvlink_domain = 8\n").unwrap();
    let ask =
        ["plan", "compare", "--model", "Qwen3-30B-A3B", "--cluster", "gb200x144", "--cluster", "narrow.toml"];
    let more = ["--dense", "--baselines", "--recompute", "full"];
    let text = run(folder, 0, &[&ask[..], &more].concat()).out;
    for line in [
        "gb200x144: 144 GB200, 900 GB/s NVLink within 72, ",
        "narrow.toml: 144 GB200, 900 GB/s NVLink within 8, ",
    ] {
        assert!(text.contains(line), "{text}");
    }
    assert!(text.contains("rule of thumb"), "{text}");
    let json: Value =
        serde_json::from_str(&run(folder, 0, &[&ask[..], &more, &["--json"]].concat()).out).unwrap();
    let rows = json.as_array().unwrap();
    let of = |row: &Value| (row["model"]["dense_of_equal"].clone(), row["cluster"]["nvlink_domain"].clone());
    let kinds: Vec<(Value, Value)> = rows.iter().map(of).collect();
    let equal = [Value::Null, "total".into(), "quality".into(), "active".into()];
    let expected = equal.into_iter().flat_map(|equal| [72, 8].map(|domain| (equal.clone(), domain.into())));
    assert_eq!(kinds, expected.collect::<Vec<_>>());
    let number = |value: &Value| value.as_f64().unwrap();
    let parameters = |row: usize| number(&rows[row]["model"]["parameters"]);
    assert!((parameters(4).powi(2) / (parameters(2) * parameters(6)) - 1.0).abs() < 0.05);
    for row in rows {
        let layout = row["chosen"]["layout"].as_str().unwrap();
        assert!(layout.ends_with("recompute=full"), "{layout}");
        let step = number(&row["chosen"]["step_s"]);
        let high =
            |name: &str| number(&row["run"][format!("{name}_interval_80")][1]) / number(&row["run"][name]);
        let relative = number(&row["chosen"]["interval_80_s"][1]) / step;
        for name in ["gpu_hours", "gpu_hours_per_trillion_tokens"] {
            assert!((high(name) / relative - 1.0).abs() < 1e-9, "{name}");
        }
        // How many failures come adds a little.
        for name in ["days", "usd", "usd_per_trillion_tokens"] {
            assert!((1.0..1.01).contains(&(high(name) / relative)), "{name}");
        }
        // Our exchange gives way to theirs, and is no longer uncertain.
        let theirs = number(&row["synchronisation_s"]["merge_at_one"]);
        let with = number(&row["step_with_s"]["merge_at_one"]);
        assert!((with - theirs + number(&row["synchronisation_s"]["ours"]) - step).abs() < 1e-9 * with);
        assert!(number(&row["step_with_s"]["merge_at_one_interval_80"][1]) < relative * with);
    }
}

#[test]
fn formulas_are_data_too_and_none_is_empty() {
    let folder = tempdir().unwrap();
    let explain = |model: &str, layout: &str| -> Value {
        let ask = ["plan", model, "h100x64", "--layout", layout, "--explain", "--json"];
        let plan: Value = serde_json::from_str(&run(folder.path(), 0, &ask).out).unwrap();
        plan["explain"].clone()
    };
    let lines = |of: &Value, heading: &str| of[heading].as_array().map_or(0, Vec::len);
    let sparse = explain("Qwen3-30B-A3B", "ep8 dp64 mb2 zero1");
    assert_eq!((lines(&sparse, "dispatch"), lines(&sparse, "pipeline")), (1, 0));
    let kept = sparse["what layers keep tensor by tensor, MiB of one; by pipeline rank layers x micro-batches that hold it"]
        .to_string();
    assert!(kept.contains("dispatch     Attention + Moe  rows dispatched to experts"), "{kept}");
    let dense = explain("Llama-3.1-8B", "dp64");
    for heading in
        ["parameters", "operations", "a kernel", "overhead", "interval", "memory of the fullest rank, GiB"]
    {
        assert!(lines(&dense, heading) > 0 && lines(&sparse, heading) > 0, "{heading}: {dense}");
    }
    let text = dense.to_string();
    for empty in
        ["expert", "multi-token", "dispatch", " 0.000 ms", "GFLOP a token, forward and backward: causal 0.0,"]
    {
        assert!(!text.contains(empty), "{empty}: {text}");
    }
    let tiny = explain(TINY, "dp4");
    assert!(!tiny["operations"].to_string().contains(" = 0.0\""), "{tiny}");
    let shown =
        run(folder.path(), 0, &["plan", "Llama-3.1-8B", "h100x64", "--layout", "dp64", "--explain"]).out;
    assert!(shown.contains(dense["interval"][0].as_str().unwrap()), "{shown}");
}

#[test]
fn a_config_is_planned_in_what_it_trains_in() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    let ask = ["plan", TINY, "h100x2", "--layout", "ep2 dp2"];
    run(folder, 0, &[&ask[..], &["--emit", "plan.toml"]].concat());
    let said = run(folder, 2, &[&ask[..], &["--precision", "bf16", "--emit", "no.toml"]].concat()).err;
    assert!(said.contains("products in bf16"), "{said}");
    let said = run(folder, 2, &[&ask[..], &["--recompute", "full"]].concat()).err;
    assert!(said.contains("--recompute is for a search"), "{said}");
    let said = run(folder, 2, &["plan", TINY, "h100x2", "--recompute", "mlp+nothing"]).err;
    assert!(said.contains("must be none, selective, full or parts of core_attn+"), "{said}");
}

#[test]
fn a_vocabulary_that_the_built_in_text_exceeds_needs_other_data() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    write_qwen(folder, "small-qwen", "");
    let ask =
        ["plan", "small-qwen", "h100x2", "--precision", "f32", "--layout", "ep2 dp2", "--emit", "plan.toml"];
    let said = run(folder, 0, &ask).err;
    assert!(
        said.contains("data.path must name a dataset") && said.contains("model.vocab_size = 512"),
        "{said}"
    );
    let text = fs::read_to_string(folder.join("plan.toml")).unwrap();
    assert!(text.contains("--set data.path=DATASET") && text.contains("the built-in one has 4096"), "{text}");
    // With data of its own nothing is said; nor where the vocabulary is large enough.
    write_qwen(folder, "large-qwen", r#","vocab_size":4096"#);
    let ask = [&["plan", "large-qwen"], &ask[2..]].concat();
    assert_eq!(run(folder, 0, &ask).err, "");
}

#[test]
fn a_config_brings_its_own_sequence_batch_and_tokens() {
    let folder = tempdir().unwrap();
    let ask = ["plan", TINY, "h100x2", "--layout", "dp2", "--json"];
    let plan: Value = serde_json::from_str(&run(folder.path(), 0, &ask).out).unwrap();
    let training = &plan["training"];
    assert_eq!((&training["sequence"], &training["global_batch"]), (&64.into(), &4.into()));
    assert_eq!((&training["tokens"], &training["wire"]), (&(20.0 * 256.0).into(), &"f32".into()));
    assert_eq!(plan["model"]["name"], "tiny");
}

#[test]
fn a_sequence_is_no_longer_than_a_file_has_positions_unless_asked_for() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    write_qwen(folder, "short", r#","max_position_embeddings":1024"#);
    write_qwen(folder, "long", r#","max_position_embeddings":40960"#);
    let sequence = |model: &str, more: &[&str]| {
        let ask = ["plan", model, "h100x2", "--layout", "ep2 dp2", "--json"];
        let plan: Value = serde_json::from_str(&run(folder, 0, &[&ask[..], more].concat()).out).unwrap();
        plan["training"]["sequence"].clone()
    };
    assert_eq!([sequence("short", &[]), sequence("long", &[])], [1024, 4096]);
    assert_eq!(sequence("short", &["--sequence", "2048"]), 2048);
}

#[test]
fn what_would_have_no_effect_is_refused() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    let dense = ["plan", "Llama-3.1-8B", "h100x8"];
    let about_experts: [&[&str]; 4] =
        [&["--skew", "1"], &["--wire", "fp8"], &["--no-overlap"], &["--no-deduplication"]];
    for option in about_experts {
        let said = run(folder, 2, &[&dense[..], option].concat()).err;
        assert!(
            said.contains(&format!("{} is about experts, and Llama-3.1-8B has none", option[0])),
            "{said}"
        );
    }
    for (more, expected) in [
        (["h100x8", "--wire", "f32"], "or add --precision f32"),
        (["h100x8", "--wire", "mxfp8"], "--wire mxfp8: H100 has no units for it; nearest: fp8"),
        (["a100x8", "--wire", "nvfp4"], "--wire nvfp4: A100 has no units for it; nearest: fp8"),
    ] {
        let said = run(folder, 2, &[&["plan", "Qwen3-30B-A3B"][..], &more].concat()).err;
        assert!(said.contains(expected), "{said}");
    }
    let wide = ["plan", "Qwen3-30B-A3B", "h100x64", "--layout", "ep8 dp64 zero3", "--wire", "f32"];
    run(folder, 0, &[&wide[..], &["--precision", "f32"]].concat());
    let compare = ["plan", "compare", "--model", "Llama-3.1-8B", "--cluster"];
    let said = run(folder, 2, &[&compare[..], &["h100x8", "--skew", "1"]].concat()).err;
    assert!(said.contains("--skew is about experts"), "{said}");
    // A cluster that cannot do what is asked is passed over.
    let both =
        run(folder, 0, &[&compare[..], &["h100x8", "--cluster", "a100x8", "--precision", "fp8"]].concat());
    assert!(
        both.err.contains("A100 has no units")
            && both.out.contains("  h100x8: 8 H100, 450 GB/s NVLink within 8\n"),
        "{}{}",
        both.err,
        both.out
    );
    // As data it is an entry in its place.
    let ask = ["a100x8", "--cluster", "h100x8", "--precision", "fp8", "--json"];
    let rows: Value = serde_json::from_str(&run(folder, 0, &[&compare[..], &ask].concat()).out).unwrap();
    assert_eq!(rows.as_array().map(Vec::len), Some(2));
    assert_eq!(
        (&rows[0]["model"]["name"], &rows[0]["cluster"]["name"]),
        (&"Llama-3.1-8B".into(), &"a100x8".into())
    );
    assert!(rows[0]["error"].as_str().unwrap().contains("A100 has no units"), "{}", rows[0]);
    assert!(rows[1]["error"].is_null() && rows[1]["chosen"].is_object());
    let said = run(folder, 2, &[&compare[..], &["local"]].concat()).err;
    assert!(said.contains("--cluster local: only `unisono plan MODEL local`"), "{said}");
    let said = run(folder, 2, &[&dense[..], &["--machine", "local.toml"]].concat()).err;
    assert!(said.contains("--machine is for `local`"), "{said}");
    let said = run(folder, 2, &[&dense[..], &["--tokens", "1e300T"]].concat()).err;
    assert!(said.contains("from 1 to 1e18"), "{said}");
    let said = run(folder, 2, &[&dense[..], &["--layout", "dp8 dp4"]].concat()).err;
    assert!(said.contains("both say dp"), "{said}");
}

#[test]
fn models_of_impossible_sizes_are_refused_at_once() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    write_qwen(folder, "deep", r#","num_hidden_layers":1000000000"#);
    write_qwen(folder, "many", r#","num_experts":16777216"#);
    for (model, expected) in [("deep", "num_hidden_layers: is 1000000000"), ("many", "experts in all layers")]
    {
        let said = run(folder, 3, &["plan", model, "h100x8", "--skew", "1"]).err;
        assert!(said.contains(expected) && said.contains(&format!("{model}/config.json")), "{said}");
    }
    let batch = ["plan", "Llama-3.1-8B", "h100x8", "--layout", "pp8", "--batch", "16777216"];
    let plan: Value = serde_json::from_str(&run(folder, 0, &[&batch[..], &["--json"]].concat()).out).unwrap();
    assert!(plan["simulated"].is_null());
    let said = run(folder, 2, &[&batch[..], &["--trace", "trace.json"]].concat()).err;
    assert!(said.contains("134217728 micro-batches through stages are too many to simulate"), "{said}");
    let config = "[model]\nhidden_size = 16777216\nintermediate_size = 16777216\nvocab_size = 16777216\n";
    fs::write(folder.join("wide.toml"), config).unwrap();
    let said = run(folder, 2, &["plan", "wide.toml", "h100x8"]).err;
    assert!(said.contains("wide.toml: the model has") && said.contains("parameters; at most"), "{said}");
    fs::write(folder.join("deep.toml"), "[model]\nnum_hidden_layers = 10001\n").unwrap();
    let said = run(folder, 2, &["plan", "deep.toml", "h100x8"]).err;
    assert!(said.contains("model.num_hidden_layers = 10001: must be between 1 and 10000"), "{said}");
}

#[test]
fn owned_and_failing_machines_are_planned_for() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    let cluster = "gpu = \"h100\"\ngpus = 8\nprice_usd_per_gpu_hour = 0\nfailures_per_gpu_hour = 1\n";
    fs::write(folder.join("owned.toml"), cluster).unwrap();
    let done = run(folder, 0, &["plan", "Llama-3.1-8B", "owned.toml", "--report", "plan.html"]);
    assert!(
        done.out.contains("0.00 $ (0.00 to 0.00) at $0.00 a GPU-hour")
            && done.out.contains("Young's formula does not hold"),
        "{}",
        done.out
    );
    let page = fs::read_to_string(folder.join("plan.html")).unwrap();
    assert!(!page.contains("NaN"));
    let front =
        page.split("<h2>Pareto front</h2>").nth(1).and_then(|rest| rest.split("</svg>").next()).unwrap();
    let number = |tag: &str, name: &str| -> f64 {
        let from = tag.split(&format!(" {name}=\"")).nth(1).unwrap();
        from.split('"').next().unwrap().parse().unwrap()
    };
    let label =
        front.split("<text").find(|tag| tag.contains("chosen: ")).map(|tag| number(tag, "y")).unwrap();
    let highest = front.split("<circle").skip(1).map(|tag| number(tag, "cy") - number(tag, "r"));
    assert!(highest.reduce(f64::min).unwrap() > label + 3.0, "a dot is under the label at {label}");
}

#[test]
fn a_gpu_that_is_not_known_is_planned_with_a_wider_interval() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    fs::write(folder.join("like.toml"), "gpu_like = \"h100\"\ngpus = 8\nmemory_gib = 140\n").unwrap();
    let plan = |cluster: &str| -> Value {
        let ask = ["plan", "Llama-3.1-8B", cluster, "--layout", "tp2 dp4", "--json"];
        serde_json::from_str(&run(folder, 0, &ask).out).unwrap()
    };
    let (known, like) = (plan("h100x8"), plan("like.toml"));
    assert_eq!(like["chosen"]["step_s"], known["chosen"]["step_s"]);
    assert_eq!(
        (&like["cluster"]["gpu"], &like["measured"]["products"]),
        (&"H100-like".into(), &"borrowed from H100 in bf16".into())
    );
    let high = |plan: &Value| plan["chosen"]["interval_80_s"][1].as_f64().unwrap();
    assert!(high(&like) > 1.05 * high(&known), "{} {}", high(&like), high(&known));
    let free = |plan: &Value| plan["chosen"]["free_bytes"].as_f64().unwrap();
    assert!(free(&like) > free(&known) + 60e9);
}

#[test]
fn a_table_that_is_none_is_refused() {
    let folder = tempdir().unwrap();
    let folder = folder.path();
    fs::write(folder.join("empty.csv"), "").unwrap();
    fs::write(folder.join("other.csv"), "gpu,model_key,step_time_s\nH100,x,1\n").unwrap();
    let said = run(folder, 3, &["plan", "validate", "empty.csv"]).err;
    assert!(said.contains("empty.csv: lacks the columns gpu; n_gpus; model_key or"), "{said}");
    let said = run(folder, 3, &["plan", "validate", "other.csv"]).err;
    assert!(said.contains("other.csv: lacks the columns n_gpus"), "{said}");
}
