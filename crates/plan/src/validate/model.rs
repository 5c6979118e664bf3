//! The architecture of a row: a model of the table or a built-in one, changed by what `custom_arch` says, or made of it.

use crate::architecture::{Architecture, Attention, MoeShape, Pattern, Window};

use super::case::Case;
use super::golden;

/// Vocabulary of GPT-2 padded to a multiple of 1,024, which GPT rows use that print none.
const GPT_VOCAB: usize = 51_200;

/// Fine-tuning recipes pack examples of a few hundred tokens into a sequence, and attention stays within each: a token meets half of its
/// example on average.
const PACKED: Window = Window { tokens: 256, first: 0, every: 1 };

/// A number of parameters off its name's by so much, in logarithms, is a misprint: names round, and some leave the embedding out.
const MISPRINT: f64 = 0.2;

/// The architecture, or why there is none.
pub(super) fn architecture(case: &Case, models: &[Architecture]) -> Result<Architecture, String> {
    let mut model = match known(case, models).or_else(|| of_same_shape(case, models)) {
        Some(model) => model,
        None => from_shape(case)?,
    };
    if let Some(layers) = case.shape.layers {
        truncate(&mut model, layers as usize, case);
    }
    if ["finetuning", "sft", "lora"].iter().any(|word| case.mentions(word)) {
        model.window = Some(PACKED);
    }
    if golden::is_latent(case) {
        golden::make_latent(&mut model);
    }
    if golden::is_lightning(case) {
        golden::make_lightning(&mut model);
    }
    model.mtp_layers = model.mtp_layers.max(golden::mtp_layers(case));
    if case.mentions("w/o mtp") {
        model.mtp_layers = 0;
    }
    model.check_size().map_err(|error| error.to_string())?;
    Ok(model)
}

/// The model whose name the row's key is, begins or is begun by, such as `DeepSeek-V4-flash 16L`.
fn known(case: &Case, models: &[Architecture]) -> Option<Architecture> {
    let key = plain(&case.model_key);
    if key.is_empty() && case.shape.hidden.is_some() {
        return None;
    }
    let wanted = if key.is_empty() { plain(&case.printed) } else { key };
    if wanted.is_empty() {
        return None;
    }
    let named = |exact: bool| {
        let mut best: Option<&Architecture> = None;
        for model in models {
            let name = plain(&model.name);
            let fits = if exact { name == wanted } else { wanted.contains(&name) };
            if fits && best.is_none_or(|best| best.name.len() < model.name.len()) {
                best = Some(model);
            }
        }
        best.cloned()
    };
    let found = named(true).or_else(|| named(false))?;
    // A table may misprint a known model, such as the gate of its networks; the number in its name tells.
    let same = models.iter().filter(|model| plain(&model.name) == plain(&found.name));
    let off = |model: &Architecture| {
        billions(&model.name).map_or(0.0, |of| (model.parameters() as f64 / of).ln().abs())
    };
    let misprinted = off(&found) > MISPRINT;
    let right =
        same.min_by(|a, b| off(a).total_cmp(&off(b))).filter(|right| misprinted && off(right) < MISPRINT);
    Some(right.cloned().unwrap_or(found))
}

/// The number of parameters that a model's name gives: the first word like `30B` or `1.5B`.
fn billions(name: &str) -> Option<f64> {
    name.split('-')
        .find_map(|word| word.strip_suffix('B')?.parse::<f64>().ok())
        .map(|billions| 1e9 * billions)
}

/// The known model with experts of exactly the printed numbers, which say less than its name.
fn of_same_shape(case: &Case, models: &[Architecture]) -> Option<Architecture> {
    let shape = &case.shape;
    let printed = (shape.layers?, shape.hidden?, shape.heads?, shape.experts?, shape.top_k?);
    let same = |model: &&Architecture| {
        model.moe.is_some_and(|moe| {
            let sizes = [model.layers, model.hidden, model.attention.heads(), moe.experts, moe.top_k];
            let [layers, hidden, heads, experts, top_k] = sizes.map(|size| size as u64);
            (layers, hidden, heads, experts, top_k) == printed
        })
    };
    models.iter().find(same).cloned()
}

fn plain(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
}

/// A GPT, or a mixture of experts, of the printed numbers. What is missing is GPT's custom: a feed-forward network of
/// four times the width without a gate, every head with keys of its own, one choice among the experts.
fn from_shape(case: &Case) -> Result<Architecture, String> {
    let shape = &case.shape;
    let named = || {
        let name = if case.model_key.is_empty() { &case.printed } else { &case.model_key };
        format!("model {name:?} is not known")
    };
    let hidden = shape.hidden.ok_or_else(|| format!("{} and custom_arch gives no width", named()))? as usize;
    let heads = shape.heads.ok_or_else(|| format!("{} and custom_arch gives no heads", named()))? as usize;
    let layers = shape.layers.ok_or_else(|| format!("{} and custom_arch gives no layers", named()))? as usize;
    // Networks of 8/3 of the width have a gate and as many parameters as GPT's.
    let narrow = shape.ffn.is_some_and(|width| (2 * hidden..4 * hidden).contains(&(width as usize)));
    let gated = case.mentions("swiglu") || narrow;
    // Megatron keeps the number of parameters when it adds a gate.
    let usual = if gated { 8 * hidden / 3 / 64 * 64 } else { 4 * hidden };
    let ffn = shape.ffn.map_or(usual, |width| width as usize);
    let moe = shape.experts.map(|experts| MoeShape {
        experts: experts as usize,
        top_k: shape.top_k.unwrap_or(1) as usize,
        expert_ffn: shape.expert_ffn.map_or(ffn, |width| width as usize),
        shared_ffn: 0,
        groups: 1,
        top_groups: 1,
        latent: None,
    });
    Ok(Architecture {
        name: case.model_name().to_string(),
        layers,
        hidden,
        vocab: shape.vocab.map_or(golden::vocab(case).unwrap_or(GPT_VOCAB), |vocab| vocab as usize),
        tied_embeddings: !case.mentions("untie") && !golden::names_size(case),
        gated,
        attention: Attention::Grouped {
            heads,
            kv_heads: shape.kv_heads.map_or(heads, |kv| kv as usize),
            head_dim: (hidden / heads).max(1),
        },
        qk_norm: case.mentions("qk_layernorm"),
        window: None,
        ffn_dense: ffn,
        moe,
        state_space: None,
        pattern: Pattern::Uniform { first_dense: 0, moe_every: 1 },
        parallel_blocks: false,
        mtp_layers: 0,
        expert_biases: false,
    })
}

/// Gives the model `layers` layers; the dense ones at the front shrink in proportion, to one at least. A count that does not
/// fit the row's virtual stages, where the model's own does, is a misprint and stays out.
fn truncate(model: &mut Architecture, layers: usize, case: &Case) {
    let chunks = case.degrees.pipeline.unwrap_or(1) * case.degrees.virtual_stages.unwrap_or(1);
    let fits = |layers: usize| (layers as u64).is_multiple_of(chunks);
    if layers == model.layers || (!fits(layers) && fits(model.layers)) {
        return;
    }
    if let Pattern::Uniform { first_dense, .. } = &mut model.pattern {
        *first_dense = (*first_dense * layers).div_ceil(model.layers.max(1));
    }
    model.layers = layers;
    model.mtp_layers = 0;
}
