//! Validation reads any table and counts as it says.

use proptest::prelude::*;
use unisono_plan::validate::{
    Prediction, PricePath, Validation, check_cases, check_models, validate, validate_with,
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
        Some(Prediction {
            step_s: 10.0,
            interval_s: [8.0, 12.0],
            memory_bytes,
            last_rank_bytes: memory_bytes,
        })
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
    near(qwen.memory_bias, 0.1);
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
        Some(Prediction { step_s, interval_s: [1.0, 20.0], memory_bytes: 1.0, last_rank_bytes: 1.0 })
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
        Some(Prediction { step_s, interval_s: [1.0, 20.0], memory_bytes: 1.0, last_rank_bytes: 1.0 })
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
