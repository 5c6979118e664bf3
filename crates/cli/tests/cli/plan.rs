//! `unisono plan`

use std::fs;

use serde_json::Value;
use tempfile::tempdir;

use crate::common::{TINY, dataset, run, train};

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
    assert_eq!(plan["memory_bytes_by_pipeline_rank"].as_array().map(Vec::len), Some(16));
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
fn the_impossible_names_the_nearest_possible() {
    let folder = tempdir().unwrap();
    let cases: [(&[&str], &str); 6] = [
        (&["plan", "deepseek-v4", "h800x8"], "nearest: DeepSeek-V3"),
        (&["plan", "DeepSeek-V3", "h900x8"], "nearest: H"),
        (&["plan", "Llama-3.1-8B", "h100x64", "--layout", "tp3 dp16"], "nearest: 2"),
        (&["plan", "DeepSeek-V3", "h800x8"], "256 GPUs with a batch of"),
        (&["plan", "Llama-3.1-8B", "a100x8", "--precision", "fp8"], "nearest: bf16"),
        (&["plan", "Llama-3.1-8B", "h100x8", "--precision", "nvfp4"], "nearest: fp8"),
    ];
    for (arguments, expected) in cases {
        let done = run(folder.path(), 2, arguments);
        assert!(done.err.contains(expected), "{arguments:?}: {}", done.err);
    }
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

    train(folder, "run", &["--steps", "3", "--ranks", "1"]);
    let ask =
        ["plan", "compare", "--model", "qwen3-30b-a3b", "--cluster", "h100x64", "--skew", "1.2", "--dense"];
    let compared = run(folder, 0, &ask).out;
    let lines = compared.lines().skip_while(|line| *line != "Uneven routing").skip(2);
    assert_eq!(
        lines.filter(|line| line.contains("64 x H100")).count(),
        1,
        "dense models route nothing: {compared}"
    );
    let measured = price(&["--routing", "run"]);
    assert!(measured["routing"]["fullest_rank_p50"].as_f64().unwrap() > 1.0);
    let said = run(folder, 2, &["plan", "qwen3-30b-a3b", "h100x64", "--routing", "nowhere"]).err;
    assert!(said.contains("nowhere") && said.contains("no run that has ended"), "{said}");
}
