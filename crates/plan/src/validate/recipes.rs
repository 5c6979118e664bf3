//! What Megatron-Bridge's published performance recipes set and its tables of results leave out (the repository's
//! `scripts/performance/configs` and `perf_recipes`, release by release): how tokens are dispatched, whether that overlaps another
//! micro-batch, whether whole iterations are captured in graphs, what is computed again. Releases are numbered as
//! [`Case::release`]; the first is that of 2025.09.

use super::case::Case;

/// Before all and after all releases.
const ALWAYS: [u64; 2] = [0, u64::MAX];

/// A model by a part of its name, GPUs by the beginnings of theirs, releases from the first to before the second.
type Which = (&'static str, &'static [&'static str], [u64; 2]);

/// Recipes without DeepEP or HybridEP. Since 26.06 those in mxfp8 on Grace have it all.
const ALL_TO_ALL: [Which; 9] = [
    ("", &["GB", "B"], [0, 25_11_00]),
    ("gptoss", &["H100", "GB"], ALWAYS),
    ("gptoss", &["B"], [0, 26_02_01]),
    ("gptoss", &["B200"], [26_04_01, u64::MAX]),
    ("qwen3235b", &["H100", "B200"], ALWAYS),
    ("qwen3235b", &["B300"], [0, 26_04_01]),
    ("qwen330b", &["H100", "B"], [0, 26_02_01]),
    ("deepseekv3", &["B"], [0, 26_02_00]),
    ("kimik2", &["H100", "B"], ALWAYS),
];

/// Recipes whose dispatch overlaps another micro-batch's computation.
const OVERLAPPED: [Which; 7] = [
    ("qwen3235b", &["H100"], [25_11_00, u64::MAX]),
    ("qwen3235b", &["B200"], [25_11_00, 26_02_00]),
    ("qwen3235b", &["B300"], [26_02_00, 26_04_00]),
    ("qwen330b", &["H100"], [25_11_00, 26_04_00]),
    ("deepseekv3", &["H100"], [0, 26_02_00]),
    ("deepseekv3", &["B200"], [26_04_01, u64::MAX]),
    ("gptoss", &["GB200"], [26_04_00, 26_06_00]),
];

/// What recipes compute again, of a precision whose name begins so.
const RECOMPUTED: [(&str, Which, &str); 11] = [
    ("", ("gptoss", &["H100", "GB200", "B200"], ALWAYS), "moe_act+layernorm"),
    ("bf16", ("deepseekv3", &["GB300"], ALWAYS), "moe_act"),
    ("", ("deepseekv3", &["GB300"], [26_06_00, u64::MAX]), "none"),
    ("mxfp8", ("deepseekv3", &["GB200"], [26_04_00, 26_06_00]), "mlp"),
    ("", ("deepseekv3", &["H100"], ALWAYS), "mla_up_proj+mlp"),
    ("mxfp8", ("deepseekv3", &["B200"], [26_04_01, u64::MAX]), "mla_up_proj+mlp"),
    ("", ("deepseekv3", &["B", "GB"], ALWAYS), "mla_up_proj"),
    ("", ("kimik2", &["B", "GB"], ALWAYS), "mla_up_proj"),
    ("fp8", ("nemotron3nano", &["H100"], ALWAYS), "moe+layernorm+moe_act"),
    ("bf16", ("nemotron3nano", &["H100"], ALWAYS), "moe+layernorm"),
    ("", ("qwen3", &[""], ALWAYS), "none"),
];

/// Since when recipes in mxfp8 on Grace capture whole iterations, with fused networks of experts, attention in 8 bits and overlapped
/// dispatch: all but those of Kimi and of models with state-space layers.
const WHOLE_ITERATIONS_SINCE: u64 = 26_06_00;

/// Recipes with experts run micro-batches of one on H100 since this release, whose table still prints those of the one before.
const SINGLE_SINCE: u64 = 25_11_00;

/// The micro-batch of recipes that print none, or another one's.
pub(super) fn micro_batch(case: &Case, sparse: bool) -> Option<usize> {
    let recent = case.release.map_or(case.degrees.micro_batch.is_none(), |release| release >= SINGLE_SINCE);
    (sparse && recent && case.gpu == "H100" && case.mentions("megatron-bridge")).then_some(1)
}

/// What the best practices of Megatron's model zoo for Qwen3-235B on Grace set and its table leaves out (the repository's
/// `best_practice/qwen3`): interleaved runs compute the experts' activation and norms again, and move what experts keep to the host,
/// so that they fit; others compute nothing again.
pub(super) fn best_practice(case: &Case) -> Option<&'static str> {
    let stages = case.degrees.virtual_stages.filter(|_| zoo_on_grace(case))?;
    Some(if stages > 1 { "moe_act+layernorm" } else { "none" })
}

/// Whether such a run overlaps its dispatch with another micro-batch: interleaved ones do that do not split the context.
pub(super) fn practises_overlap(case: &Case) -> bool {
    let several = |degree: Option<u64>| degree.is_some_and(|degree| degree > 1);
    zoo_on_grace(case) && several(case.degrees.virtual_stages) && !several(case.degrees.context)
}

fn zoo_on_grace(case: &Case) -> bool {
    case.file.contains("modelzoo")
        && case.gpu.starts_with("GB")
        && case.model_name().starts_with("Qwen3-235B")
}

/// What a recipe says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Recipe {
    /// A token is sent once to a server.
    pub deduplicated: bool,
    /// Dispatch runs under another micro-batch.
    pub overlapped: bool,
    /// Nothing is launched by the host.
    pub whole_iterations: bool,
    /// What is computed again, as a row would print it.
    pub recompute: Option<&'static str>,
}

/// The recipe of a row, if it is one of Megatron-Bridge's releases.
pub(super) fn recipe(case: &Case) -> Option<Recipe> {
    let release = case.release.filter(|_| case.mentions("megatron-bridge"))?;
    let model: String = case.model_name().chars().filter(char::is_ascii_alphanumeric).collect();
    let model = model.to_lowercase();
    let grace = case.gpu.starts_with("GB");
    let of = |(name, gpus, [since, until]): &Which| {
        model.contains(name)
            && gpus.iter().any(|gpu| case.gpu.starts_with(gpu))
            && (*since..*until).contains(&release)
    };
    let new = release >= WHOLE_ITERATIONS_SINCE && case.precision.to_lowercase().starts_with("mxfp8");
    let whole_iterations = new
        && (grace || case.gpu == "B300" && model.contains("qwen330b"))
        && !["kimi", "nemotron", "llama"].iter().any(|name| model.contains(name));
    Some(Recipe {
        deduplicated: whole_iterations || !ALL_TO_ALL.iter().any(of),
        overlapped: whole_iterations || OVERLAPPED.iter().any(of),
        whole_iterations,
        recompute: RECOMPUTED
            .iter()
            .find(|(precision, which, _)| case.precision.to_lowercase().starts_with(precision) && of(which))
            .map(|(_, _, modules)| *modules),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Table;
    use crate::validate::model::Models;

    fn said(model: &str, gpu: &str, precision: &str, release: &str) -> Option<Recipe> {
        let text = format!(
            "model_key,gpu,precision,framework,source\n{model},{gpu},{precision},Megatron-Bridge,x {release} NeMo\n"
        );
        recipe(&Case::read(Table::parse(&text).rows().next().expect("one row"), &Models::default()))
    }

    #[test]
    fn recipes_differ_by_model_gpu_format_and_release() {
        let of = |model: &str, gpu: &str, precision: &str, release: &str| {
            let recipe = said(model, gpu, precision, release).expect("a release");
            (recipe.deduplicated, recipe.overlapped, recipe.whole_iterations)
        };
        assert_eq!(of("Qwen3-30B-A3B", "GB200", "MXFP8", "26.04.01"), (true, false, false));
        assert_eq!(of("Qwen3-30B-A3B", "GB200", "MXFP8", "26.06"), (true, true, true));
        assert_eq!(of("Qwen3-235B-A22B", "B300", "MXFP8", "26.04"), (false, false, false));
        assert_eq!(of("Qwen3-235B-A22B", "B300", "MXFP8", "26.04.01"), (true, false, false));
        assert_eq!(of("GPT-OSS-120B", "GB300", "BF16", "26.04"), (false, false, false));
        assert_eq!(of("Nemotron-3-Nano-30B", "GB200", "MXFP8", "26.06"), (true, false, false));
        assert_eq!(said("Kimi-K2", "GB300", "MXFP8", "26.06").unwrap().recompute, Some("mla_up_proj"));
        assert_eq!(said("Qwen3-30B-A3B", "GB200", "MXFP8", "of no number"), None);
    }
}
