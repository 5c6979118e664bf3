//! What Megatron's functional tests leave out of their names. Their configurations are public and follow customs, which this file
//! states as rules: none is about one test.

use crate::architecture::{Architecture, Attention, Pattern, StateSpace};

use super::case::{Case, Kind};

/// No head of ordinary attention is narrower. Tests that name narrower ones, without groups of keys, are small copies of DeepSeek-V3
/// whose heads have its widths.
const NARROWEST_HEAD: u64 = 64;

/// Layers of a stage where a pipeline is laid out by hand.
const LAYERS_A_STAGE: u64 = 2;

/// BERT's vocabulary of 30,522 words, padded.
const BERT_VOCAB: usize = 30_592;

/// The vocabulary of tests of models whose size they name: 131,073 numbers without words, padded.
const SIZED_VOCAB: usize = 131_200;

/// The vocabulary of a test, where it is not GPT-2's.
pub(super) fn vocab(case: &Case) -> Option<usize> {
    match () {
        () if case.kind != Kind::Golden => None,
        () if case.printed.starts_with("bert") => Some(BERT_VOCAB),
        () if names_size(case) => Some(SIZED_VOCAB),
        () => None,
    }
}

/// Whether the row is a test of a model that it names by its size, not by its parts; its head is not its embedding.
pub(super) fn names_size(case: &Case) -> bool {
    case.kind == Kind::Golden && case.printed.starts_with("gpt3_7b")
}

/// Whether a test runs experts one after the other: Megatron's default, which the older ones of those that tell how many experts lie
/// on how many ranks keep unless their name says otherwise.
pub(super) fn experts_in_turn(case: &Case) -> bool {
    let newer = ["groupedGEMM", "top2router", "ddp_average"];
    case.kind == Kind::Golden
        && case.printed.contains("experts2parallel")
        && !newer.iter().any(|word| case.printed.contains(word))
}

/// Whether a test runs fused attention. The small ones and those with latent attention ask for the unfused kernel, and without
/// Transformer Engine there is no other; those that resume (on all of their clusters but one, and with experts under the newer of
/// two releases only), split the context or fuse a layer's operations have the fused one.
pub(super) fn fused_attention(case: &Case) -> bool {
    let small = case.sequence.is_some_and(|sequence| sequence <= 1024);
    let engine = case.printed.contains("_te_");
    let newer = case.source.contains("dev_dgx") && !case.source.contains("dracooci");
    let fused = if case.shape.experts.is_some() { newer } else { !case.source.contains("dracooci") };
    let split = case.degrees.context.is_some_and(|degree| degree > 1);
    let operations = case.printed.contains("op_fuser");
    !is_latent(case) && (!small || split || operations || engine && case.mentions("resume") && fused)
}

/// Whether the row is a test with the latent attention of DeepSeek-V3.
pub(super) fn is_latent(case: &Case) -> bool {
    let shape = &case.shape;
    let narrow = shape.hidden.zip(shape.heads).is_some_and(|(hidden, heads)| hidden / heads < NARROWEST_HEAD);
    case.kind == Kind::Golden && shape.experts.is_some() && shape.kv_heads.is_none() && narrow
}

/// Makes a small copy of DeepSeek-V3 of a mixture of experts with the printed widths: latent attention, gates, one shared expert and a
/// dense layer at the front.
pub(super) fn make_latent(model: &mut Architecture) {
    let heads = model.attention.heads();
    model.attention = Attention::Latent {
        heads,
        q_lora_rank: Some(1536),
        kv_lora_rank: 512,
        nope: 128,
        rope: 64,
        value: 128,
    };
    if let Some(moe) = &mut model.moe {
        moe.shared_ffn = moe.expert_ffn;
    }
    (model.gated, model.tied_embeddings) = (true, false);
    model.pattern = Pattern::Uniform { first_dense: 1, moe_every: 1 };
}

/// The layers of Nemotron 3.5 Lightning, whose 52 are 23 of state space, 23 of experts and 6 of attention, as its small copies
/// repeat them.
const LIGHTNING: &str = "MEMEM*E";

/// Whether the row is a test of a small copy of Nemotron 3.5 Lightning.
pub(super) fn is_lightning(case: &Case) -> bool {
    case.kind == Kind::Golden && case.printed.contains("nemotron3_5_lightning")
}

/// Makes a small copy of Nemotron 3.5 Lightning of a mixture of experts with the printed widths: state-space layers of 16 heads,
/// a shared expert of twice an expert's width, and two layers of multi-token prediction that share their parameters.
pub(super) fn make_lightning(model: &mut Architecture) {
    model.pattern = Pattern::Letters(LIGHTNING.into());
    model.state_space = Some(StateSpace { heads: 16, head_dim: 64, state: 128, groups: 8 });
    if let Some(moe) = &mut model.moe {
        moe.shared_ffn = 2 * moe.expert_ffn;
    }
    model.tied_embeddings = false;
}

/// Layers of multi-token prediction. Small copies of DeepSeek-V3 have one, but for resumed ones that do not name it and those under
/// Megatron-FSDP; so have models with experts whose odd number of layers leaves it a place, and small copies of Nemotron 3.5
/// Lightning have two.
pub(super) fn mtp_layers(case: &Case) -> usize {
    let odd = case.shape.layers.is_some_and(|layers| !layers.is_multiple_of(2));
    let plain = ["resume", "fsdp"].iter().any(|word| case.mentions(word)) && !case.mentions("mtp");
    let copies = is_latent(case) && !plain;
    let predicts = case.kind == Kind::Golden && case.shape.experts.is_some() && (odd || copies);
    if is_lightning(case) { 2 } else { usize::from(predicts && !case.mentions("no_mtp")) }
}

/// Stages a rank. A number in the name counts the layers of a stage, or the stages where it does not divide the layers. Layers
/// that the ranks do not divide are laid out by hand: two a stage, the loss alone on the last. So do tests of speed, evenly.
pub(super) fn virtual_stages(case: &Case, named: Option<u64>) -> Option<u64> {
    let layers = case.shape.layers?;
    let ranks = case.degrees.pipeline.filter(|ranks| *ranks > 1)?;
    let stages = match named {
        Some(of) if layers.is_multiple_of(of * ranks) => layers / (of * ranks),
        Some(of) => of,
        None if !layers.is_multiple_of(ranks) => layers.div_ceil(LAYERS_A_STAGE) / ranks + 1,
        None if case.mentions("speed") || is_latent(case) => layers / (LAYERS_A_STAGE * ranks),
        None => 1,
    };
    (stages > 1).then_some(stages)
}

/// Replicas that a test keeps busy: its batch may have fewer micro-batches than its server has room for replicas.
pub(super) fn most_replicas(case: &Case) -> Option<u64> {
    let batches = case.global_batch? / case.degrees.micro_batch?;
    (case.kind == Kind::Golden).then_some(batches.max(1))
}
