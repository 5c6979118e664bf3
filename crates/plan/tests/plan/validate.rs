//! Validation reads any table and counts as it says.

use proptest::prelude::*;
use unisono_plan::ParallelismError;
use unisono_plan::validate::{
    MemoryKind, Prediction, PricePath, Validation, check_cases, check_models, validate, validate_with,
};

const HEADER: &str = "id,file,source,kind,model_key,model_as_printed,custom_arch,gpu,n_gpus,precision,seq,gbs,mbs,tp,pp,vpp,cp,ep,etp,dp,\
     sharding,recompute,framework,routing,step_time_s,tokens_per_s_per_gpu,tflops_per_gpu,tflops_convention,mem_max_gib,verified";

/// A row of 30 fields in the order of the header.
fn row(id: usize, model: &str, gpus: &str, micro_batch: &str, step_s: &str) -> String {
    format!(
        "{id},f,,e2e,{model},,,H100,{gpus},BF16,4096,128,{micro_batch},1,1,,1,8,,,,none,NeMo,,{step_s},,,,40,yes"
    )
}

/// A pricing that says 10 s, 100 GiB times the micro-batch, whatever the plan.
fn ten_seconds(rows: &[String]) -> Validation {
    let text = format!("{HEADER}\n{}\n", rows.join("\n"));
    validate_with(&text, None, &|_, _, layout, _, _| {
        let memory_bytes = (layout.micro_batch as f64 * 44.0) * (1u64 << 30) as f64;
        Ok(Prediction { step_s: 10.0, interval_s: [8.0, 12.0], memory_bytes, last_rank_bytes: memory_bytes })
    })
}

fn near(value: Option<f64>, expected: f64) {
    assert!((value.expect("a figure") - expected).abs() < 1e-9, "{value:?} instead of {expected}");
}

#[test]
fn families_weigh_the_same_and_a_complete_row_that_is_skipped_counts_as_wrong() {
    let mut rows: Vec<String> = (0..4).map(|id| row(id, "Qwen3-30B-A3B", "8", "1", "8")).collect();
    rows.push(row(4, "Mixtral-8x7B", "8", "1", "12.5"));
    rows.push(row(5, "A-model-of-tomorrow", "8", "1", "3"));
    let found = ten_seconds(&rows);
    // +25%, -20%, and 100% for what nobody can price.
    near(found.all.plain.map(|figures| figures.mape), (0.25 + 0.20 + 1.0) / 3.0);
    let qwen = found.families.iter().find(|group| group.name.contains("Qwen3")).expect("a family");
    near(qwen.plain.map(|figures| figures.bias), 0.25);
    near(qwen.plain.map(|figures| figures.coverage), 1.0);
    near(qwen.plain.map(|figures| figures.width), 0.4);
    near(qwen.memory.map(|figures| figures.bias), 0.1);
    assert_eq!(found.skipped.len(), 1);
    assert!(found.skipped[0].0.contains("A-model-of-tomorrow"), "{:?}", found.skipped);
}

#[test]
fn a_release_factor_is_the_median_of_the_other_rows_of_at_least_five() {
    let five: Vec<String> = ["20", "20", "20", "20", "40"]
        .iter()
        .enumerate()
        .map(|(id, s)| row(id, "Qwen3-30B-A3B", "8", "1", s))
        .collect();
    let found = ten_seconds(&five);
    assert!(found.rows.iter().all(|row| row.factor == Some(2.0)));
    // Four are right, the fifth is half as fast as the factor says.
    near(found.all.released.map(|figures| figures.mape), 0.5 / 5.0);
    let four = ten_seconds(&five[..4]);
    assert!(four.rows.iter().all(|row| row.factor.is_none()));
    near(four.all.released.map(|figures| figures.mape), 0.5);
}

#[test]
fn tau_compares_distinct_plans_on_as_many_gpus() {
    let text = format!(
        "{HEADER}\n{}\n{}\n{}\n{}\n",
        row(0, "Qwen3-30B-A3B", "8", "1", "10"),
        row(1, "Qwen3-30B-A3B", "8", "2", "8"),
        row(2, "Qwen3-30B-A3B", "8", "4", "9"),
        row(3, "Qwen3-30B-A3B", "16", "2", "1"),
    );
    let found = validate_with(&text, None, &|_, _, layout, _, _| {
        let step_s = 10.0 - layout.micro_batch as f64;
        Ok(Prediction { step_s, interval_s: [1.0, 20.0], memory_bytes: 1.0, last_rank_bytes: 1.0 })
    });
    // Pairs on 8 GPUs: two agree, one does not.
    near(found.all.tau, 1.0 / 3.0);
}

#[test]
fn what_is_left_open_is_chosen_in_closed_form_and_simulated() {
    let text = format!("{HEADER}\n{}\n", row(0, "Qwen3-30B-A3B", "8", "", "10"));
    let found = validate_with(&text, None, &|_, _, layout, _, path| {
        let simulated = path == PricePath::Simulated;
        let step_s = layout.micro_batch as f64 + if simulated { 4.0 } else { 0.0 };
        Ok(Prediction { step_s, interval_s: [1.0, 20.0], memory_bytes: 1.0, last_rank_bytes: 1.0 })
    });
    let row = &found.rows[0];
    assert!(row.plan.contains("mbs1 "), "{}", row.plan);
    assert_eq!(row.time.expect("a time").predicted_s, 5.0);
}

#[test]
fn the_planner_prices_what_sources_leave_open() {
    let rows = [
        // Blank degrees, virtual stages in brackets, a typing error, a throughput instead of a time.
        "1,a,,e2e,Llama-3.1-70B,LLAMA3_70B,,GB200,64,,8192,128,2,1 (2),1 (4),1 (5),1,1,,,FSDP,,Megatron-Bridge,,4.1,,,,,yes",
        "2,a,,e2e,Llama-3.1-8B,SFT (TP=1 PP=41),,H100,8,BF16,4096,32,,1,41,NA,1,NA,,,,,NeMo v25.02,,1.32,,,,,yes",
        "3,a,,e2e,Mixtral-8x22B,,,MI355X,64,BF16,,,,,,,,,,,,,Primus TP1 PP4 VPP2 EP8 mbs2 seq8192,,,3534,,,,yes",
        "4,a,,e2e,,3.6B GPT,L30 h3072 a32 v51200,A100,64,FP16,2048,512,16,2,1,1,1,1,,32,DDP,full,Megatron-LM,,,,138,counts recompute,,yes",
        "5,a,,e2e,DeepSeek-V3,,,H800,2048,FP8,4096,15360,1,1,16,,1,64,,128,ZeRO-1,,HAI-LLM DualPipe,,19.907,,,,,yes",
    ];
    let found = validate(&format!("{HEADER}\n{}\n", rows.join("\n")), None);
    for row in &found.rows {
        assert!(row.time.is_some(), "{} {:?}", row.id, row.skipped);
    }
    assert!(found.rows[0].plan.starts_with("tp1 pp1x1"), "{}", found.rows[0].plan);
    assert!(found.rows[2].plan.starts_with("tp1 pp4x2 cp1 ep8x1"), "{}", found.rows[2].plan);
}

/// The fields of a row that a source may spell as it likes: file, model, GPU, precision, sharding, framework.
fn spelt(id: usize, [model, gpu, precision, sharding, framework]: [&str; 5]) -> String {
    format!(
        "{id},f{id},,e2e,{model},,,{gpu},64,{precision},4096,256,1,2,2,2,1,8,,,{sharding},none,{framework},,9,,,,40,yes"
    )
}

#[test]
fn every_spelling_of_a_name_is_priced_alike() {
    let same: [&[[&str; 5]]; 6] = [
        &[
            ["Qwen3-30B-A3B", "H100", "BF16", "ZeRO-1", "Megatron-Bridge"],
            ["qwen3_30b_a3b", "h100", "bf16", "zero 1", "megatron-bridge"],
            ["Qwen3-30B", "H100-80GB SXM", "bfloat16", "dist-opt", "Megatron-Bridge"],
            ["Qwen3 30B A3B", "NVIDIA H100", "amp_bf16", "ZeRO-1", "Megatron-Bridge"],
            ["Qwen3-30B-A3B", "DGX H100", "bf16-mixed", "ZeRO-1", "Megatron-Bridge"],
            ["Qwen3-30B-A3B", "H100_80GB", "Bf16", "distributed optimizer", "Megatron-Bridge"],
            ["Qwen3-30B-A3B", "H100SXM", "BF16", "ZeRO-1", "Megatron-Bridge"],
        ],
        &[
            ["DeepSeek-V3", "GB300", "MXFP8", "", "Megatron-Bridge"],
            ["DeepSeek-R1", "GB300NVL72", "FP8-MX", "", "Megatron-Bridge"],
            ["deepseekv3", "gb300 (NVL72)", "mx-fp8", "", "Megatron-Bridge"],
        ],
        &[
            ["Llama-3.1-8B", "A100", "FP16", "ZeRO-1", "Megatron-LM"],
            ["Llama-3-8B", "A100/80GB", "float16", "zero1", "Megatron-LM"],
            ["llama3 8b", "A100(40GB)", "half", "ZeRO stage 1", "megatron-lm"],
        ],
        &[
            ["Llama-3.1-70B", "H200", "FP8", "FSDP", "x"],
            ["Llama-3.3-70B", "H200-141GB SXM", "float8", "HSDP", "x"],
            ["llama-3-70b", "hgx h200", "E4M3", "zero3", "x"],
        ],
        &[
            ["Moonlight-16B-A3B", "MI325X", "BF16", "DDP", "x"],
            ["Moonlight", "AMD MI325", "bf16", "no_shard", "x"],
        ],
        &[
            ["Nemotron-3-Nano-30B", "B200", "NVFP4", "", "NeMo"],
            ["Nemotron-3-Nano", "HGX B200", "fp4", "", "NEMO"],
        ],
    ];
    for rows in same {
        let rows: Vec<String> = rows.iter().enumerate().map(|(id, names)| spelt(id, *names)).collect();
        let found = validate(&format!("{HEADER}\n{}\n", rows.join("\n")), None).rows;
        let priced = found[0].time.expect("a time").predicted_s;
        for row in &found {
            assert_eq!(row.time.map(|time| time.predicted_s), Some(priced), "{row:?}");
            assert_eq!((&row.plan, row.memory), (&found[0].plan, found[0].memory));
            assert_eq!(
                (&row.model, &row.gpu, &row.precision),
                (&found[0].model, &found[0].gpu, &found[0].precision)
            );
        }
    }
}

#[test]
fn the_nearest_gpu_stands_in_with_a_wider_interval_and_none_is_made_up() {
    let row = |id: usize, gpu: &str| spelt(id, ["Llama-3.1-8B", gpu, "BF16", "", "Megatron-LM"]);
    let rows = [row(0, "A100"), row(1, "A800"), row(2, "V100"), row(3, "L40S"), row(4, "GH200")];
    let found = validate(&format!("{HEADER}\n{}\n", rows.join("\n")), None).rows;
    let width = |at: usize| {
        let [low, high] = found[at].time.expect("a time").interval_s;
        high / low
    };
    assert!(width(1) > 1.2 * width(0) && width(4) > 1.2 * width(0), "{} {}", width(1), width(0));
    let times = [0, 1].map(|at| found[at].time.expect("a time").predicted_s);
    assert!(times[0] < times[1], "less NVLink is not faster: {times:?}");
    assert_eq!(found[1].gpu, "A800");
    for at in [2, 3] {
        assert!(found[at].skipped.as_ref().is_some_and(|reason| reason.contains("is not known")));
        assert!(found[at].complete);
    }
}

#[test]
fn impossible_stages_and_micro_batches_are_left_out_before_the_row_is() {
    let text = [
        "1,a,,e2e,Llama-3.1-8B,,,H100,16,BF16,4096,32,1,1,2,33,1,1,,,,none,x,,9,,,,,yes",
        "2,a,,e2e,Llama-3.1-8B,,,H100,16,BF16,4096,32,1000,1,2,,1,1,,,,none,x,,9,,,,,yes",
        "3,a,,e2e,Llama-3.1-8B,,,H100,16,BF16,4096,,1,1,2,,1,1,,,,none,x,,9,,,,,yes",
        "4,a,,e2e,,mine,L32 h4096,H100,16,BF16,4096,32,1,1,2,,1,1,,,,none,x,,9,,,,,yes",
        "5,a,,e2e,Llama-3.1-8B,,,H100,16 nodes,BF16,4096,32,1,1,2,,1,1,,,,none,x,,9,,,,,yes",
        "6,b,,e2e,Llama-3.1-8B,,,H100,,BF16,4096,32,1,1,2,,1,1,,16,,none,x,,9,,,,,yes",
    ];
    let found = validate(&format!("{HEADER}\n{}\n", text.join("\n")), None).rows;
    assert!(found[0].time.is_some() && found[1].time.is_some(), "{found:?}");
    assert_eq!(found[2].skipped.as_deref(), Some("a step time is printed, but no batch"));
    assert_eq!(found[4].skipped.as_deref(), Some("a step time is printed, but no number of GPUs"));
    assert_eq!((found[5].gpus, found[5].time.is_some()), (32, true));
    assert!(found[3].time.is_some(), "heads of 128: {:?}", found[3].skipped);
}

#[test]
fn a_row_without_a_layout_says_why() {
    let of = |gpus: &str, tensor: usize, heads: &str| {
        format!(
            "1,a,,e2e,Llama-3.1-8B,,{heads},H100,{gpus},BF16,4096,56,1,{tensor},1,,1,1,,,,none,x,,9,,,,,yes"
        )
    };
    let text = [of("56", 7, ""), of("64", 7, "")];
    let found = validate(&format!("{HEADER}\n{}\n", text.join("\n")), None).rows;
    let said = |at: usize| found[at].skipped.clone().unwrap_or_default();
    assert!(said(0).ends_with("tensor = 7: must divide attention heads = 32; nearest: 8"), "{}", said(0));
    assert!(said(1).ends_with("on 64 GPUs: they are no multiple of tp x pp x cp"), "{}", said(1));
    assert!(found.iter().all(|row| row.complete));
    let text = format!("{HEADER}\n{}\n", row(0, "Qwen3-30B-A3B", "8", "1", "9"));
    let refused =
        ParallelismError::Degree { field: "tensor", value: 1, rule: "must be 2".into(), nearest: None };
    let found = validate_with(&text, None, &|_, _, _, _, _| Err(refused.clone())).rows;
    assert_eq!(found[0].skipped.as_deref(), Some("the plan cannot be priced: tensor = 1: must be 2"));
}

/// The figures that a table's other rows have.
fn priced_alike(found: &Validation, without: &Validation) {
    assert_eq!(found.all.plain, without.all.plain);
    assert_eq!(found.all.released, without.all.released);
    assert_eq!((found.all.memory, found.all.tau), (without.all.memory, without.all.tau));
    assert_eq!(found.all.baseline_mape, without.all.baseline_mape);
}

#[test]
fn what_cannot_be_measured_is_skipped_by_column_and_value() {
    let rows: Vec<String> = ["8", "9", "10", "11", "12"]
        .iter()
        .enumerate()
        .map(|(id, s)| row(id, "Qwen3-30B-A3B", "8", "1", s))
        .collect();
    let without = ten_seconds(&rows);
    let with = |time: &str, tokens: &str, rate: &str| {
        let odd = row(9, "Qwen3-30B-A3B", "8", "1", time);
        let odd = odd.replace(&format!("{time},,,,40"), &format!("{time},{tokens},{rate},,"));
        ten_seconds(&[&rows[..], &[odd]].concat())
    };
    let too_fast = "gives more than 1.5 times the GPU's peak rate";
    let cases = [
        ("1e-310", "", "", format!("step_time_s \"1e-310\" {too_fast}")),
        ("1e-7", "", "", format!("step_time_s \"1e-7\" {too_fast}")),
        ("0.5", "", "", format!("step_time_s \"0.5\" {too_fast}")),
        ("1e300", "", "", "step_time_s \"1e300\" gives less than a 10,000th of the GPU's peak rate".into()),
        ("-5", "", "", "step_time_s \"-5\" is no number above 0".into()),
        ("1e400", "", "", "step_time_s \"1e400\" is no number above 0".into()),
        ("", "1e9", "", format!("tokens_per_s_per_gpu \"1e9\" {too_fast}")),
        ("", "", "4000", format!("tflops_per_gpu \"4000\" {too_fast}")),
        ("", "0", "", "tokens_per_s_per_gpu \"0\" is no number above 0".into()),
    ];
    for (time, tokens, rate, expected) in cases {
        let found = with(time, tokens, rate);
        assert_eq!(found.rows[5].skipped, Some(expected));
        assert!(!found.rows[5].complete);
        priced_alike(&found, &without);
    }
    // What is printed otherwise counts.
    let found = with("-5", "6500", "");
    assert!(found.rows[5].time.is_some(), "{:?}", found.rows[5].skipped);
    let memory = |gib: &str| {
        let odd = row(9, "Qwen3-30B-A3B", "8", "1", "10").replace(",40,yes", &format!(",{gib},yes"));
        ten_seconds(&[&rows[..], &[odd]].concat())
    };
    for (gib, wrong) in [
        ("500", "is more than twice the GPU's memory"),
        ("1e-300", "is less than a 10,000th of the GPU's memory"),
        ("0", "is no number above 0"),
    ] {
        let found = memory(gib);
        assert_eq!(found.rows[5].memory_skipped, Some(format!("mem_max_gib \"{gib}\" {wrong}")));
        assert!(found.rows[5].time.is_some());
        assert_eq!((found.all.memory, found.memory_skipped.len()), (without.all.memory, 1));
    }
}

#[test]
fn neither_names_nor_the_order_of_rows_decide() {
    let blank =
        |id: &str| format!("{id},a,,e2e,Llama-3.1-8B,,,H100,16,BF16,4096,64,1,,,,,,,,,none,NeMo,,2,,,,,yes");
    let said = |id: &str, tensor: usize, step: &str| {
        format!(
            "{id},a,,e2e,Llama-3.1-8B,,,H100,16,BF16,4096,64,1,{tensor},1,,1,1,,,,none,NeMo,,{step},,,,,yes"
        )
    };
    let plan = |rows: &[String]| -> String {
        let found = validate(&format!("{HEADER}\n{}\n", rows.join("\n")), None).rows;
        let blank = rows.iter().position(|row| row.contains(",64,1,,,")).expect("one row");
        found[blank].plan.clone()
    };
    let expected = plan(&[blank("1"), said("2", 8, "3")]);
    assert!(expected.starts_with("tp8 pp1x1"), "{expected}");
    assert_eq!(plan(&[blank("1"), said("1", 8, "3")]), expected, "ids that repeat");
    assert_eq!(plan(&[blank(""), said("", 8, "3")]), expected, "no ids");
    let [first, other] = [said("2", 8, "3"), said("3", 4, "2.5")];
    let tied = plan(&[blank("1"), first.clone(), other.clone()]);
    assert_eq!(plan(&[other, blank("1"), first]), tied, "another order");
}

#[test]
fn golden_values_are_apart_from_skipped_rows_and_kinds_of_memory_are_named() {
    let golden = "1,f,,ci_golden,,gpt3_mcore tp1_pp2,L12 h512 a8,A100,8,BF16,1024,32,4,1,2,,1,1,,,,,Megatron-Core CI,,,,,,2,yes";
    let titan = "2,f,,e2e,Llama-3.1-8B,,,H100,8,BF16,4096,16,2,1,1,,1,1,,,FSDP,none,torchtitan,,9,,,,40,yes";
    let bare = "3,f,,e2e,Llama-3.1-8B,,,H100,8,BF16,4096,16,2,1,1,,1,1,,,FSDP,none,x,,9,,,,40,yes";
    let lost = row(4, "A-model-of-tomorrow", "8", "1", "3");
    let text = format!("{HEADER}\n{golden}\n{titan}\n{bare}\n{lost}\n");
    let found = validate_with(&text, None, &|_, _, _, _, _| {
        let bytes = 20.0 * (1u64 << 30) as f64;
        Ok(Prediction {
            step_s: 9.0,
            interval_s: [8.0, 10.0],
            memory_bytes: 2.0 * bytes,
            last_rank_bytes: bytes,
        })
    });
    let kinds: Vec<_> = found.rows.iter().map(|row| row.memory.map(|memory| memory.kind)).collect();
    let named = [MemoryKind::AllocatedLast, MemoryKind::ReservedFullest, MemoryKind::AllocatedFullest];
    assert_eq!(kinds, [Some(named[0]), Some(named[1]), Some(named[2]), None]);
    assert_eq!((found.golden, found.all.golden, found.all.skipped, found.all.lost), (1, 1, 1, 1));
    assert_eq!(found.all.reasons[0].0, "model ... is not known and custom_arch gives no width");
    assert_eq!(found.memory_kinds.len(), 3);
    let exact = found.memory_kinds.iter().find(|group| group.kind == MemoryKind::AllocatedFullest);
    let figures = exact.expect("a kind").figures;
    assert!((figures.mape, figures.coverage) == (0.0, 1.0) && figures.width > 0.0);
}

#[test]
fn the_trivial_baseline_does_not_know_the_row_it_predicts() {
    let rows: Vec<String> =
        ["8", "10", "40"].iter().enumerate().map(|(id, s)| row(id, "Qwen3-30B-A3B", "8", "1", s)).collect();
    let found = ten_seconds(&rows);
    // The median rate of the others: of 10 and 40 s, 8 and 40 s, 8 and 10 s.
    let rate = |a: f64, b: f64| 2.0 / (1.0 / a + 1.0 / b);
    for (row, expected) in found.rows.iter().zip([rate(10.0, 40.0), rate(8.0, 40.0), rate(8.0, 10.0)]) {
        near(row.time.and_then(|time| time.baseline_s), expected);
    }
    assert!(ten_seconds(&rows[..1]).rows[0].time.expect("a time").baseline_s.is_none());
    near(Some(found.published_baseline_mape), 0.24);
}

#[test]
fn tables_without_rows_or_needed_columns_are_refused() {
    let said = |text: &str| check_cases(text).unwrap_err().to_string();
    let all = "lacks the columns gpu; n_gpus; model_key or model_as_printed or custom_arch; \
               step_time_s or tokens_per_s_per_gpu or tflops_per_gpu or mem_max_gib";
    assert_eq!(said(""), all);
    assert_eq!(said("a,b\n1,2\n"), all);
    assert_eq!(said("gpu,model_key,step_time_s\nH100,x,1\n"), "lacks the columns n_gpus");
    assert!(said(&format!("{HEADER}\n")).starts_with("has no rows"));
    assert_eq!(check_cases(&format!("{HEADER}\n{}\n", row(1, "x", "8", "1", "8"))), Ok(()));
    assert_eq!(
        check_models("model_key,layers\nx,1\n").unwrap_err().to_string(),
        "lacks the columns hidden; heads"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any field may hold anything.
    #[test]
    fn no_content_makes_it_fail(
        fields in prop::collection::vec((0usize..30, "[ -~]{0,12}|-?[0-9]{1,20}|1 \\(2\\)|n/a|NaN|1e400|\""), 0..12),
    ) {
        let line = row(1, "Qwen3-30B-A3B", "16", "1", "8");
        let mut cells: Vec<String> = line.split(',').map(String::from).collect();
        for (at, text) in fields {
            cells[at] = text;
        }
        let found = validate(&format!("{HEADER}\n{}\n{line}\n", cells.join(",")), None);
        prop_assert!(!found.rows.is_empty());
        prop_assert!(found.all.plain.is_none_or(|figures| figures.mape.is_finite()));
    }
}
