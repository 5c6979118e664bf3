//! The architecture of a row: a model of the table or a built-in one, changed by what `custom_arch` says, or made of it.

use crate::architecture::{Architecture, Attention, MoeShape, Pattern, Window};

use super::case::Case;
use super::golden;
use super::names::plain;

/// Vocabulary of GPT-2 padded to a multiple of 1,024, which GPT rows use that print none.
const GPT_VOCAB: usize = 51_200;

/// Width of a head where their number is not printed.
const HEAD_WIDTH: usize = 128;

/// Fine-tuning recipes pack examples of a few hundred tokens into a sequence, and attention stays within each: a token meets half of its
/// example on average.
const PACKED: Window = Window { tokens: 256, first: 0, every: 1 };

/// A number of parameters off its name's by so much, in logarithms, is a misprint: names round, and some leave the embedding out.
const MISPRINT: f64 = 0.2;

/// The architecture, or why there is none.
pub(super) fn architecture(case: &Case, models: &Models) -> Result<Architecture, String> {
    let mut model = match known(case, models).or_else(|| of_same_shape(case, &models.all)) {
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

/// The model that the row's key or, without one, what is printed names.
fn known(case: &Case, models: &Models) -> Option<Architecture> {
    if case.model_key.is_empty() && case.shape.hidden.is_some() {
        return None;
    }
    let printed = || models.find(&case.printed).filter(|_| case.shape.hidden.is_none());
    let found = models.find(&case.model_key).or_else(printed)?.clone();
    // A table may misprint a known model, such as the gate of its networks; the number in its name tells.
    let same = models.all.iter().filter(|model| plain(&model.name) == plain(&found.name));
    let off = |model: &Architecture| {
        billions(&model.name).map_or(0.0, |of| (model.parameters() as f64 / of).ln().abs())
    };
    let misprinted = off(&found) > MISPRINT;
    let right =
        same.min_by(|a, b| off(a).total_cmp(&off(b))).filter(|right| misprinted && off(right) < MISPRINT);
    Some(right.cloned().unwrap_or(found))
}

/// Names that others give to a known model, or to one of the same shape.
const ALIASES: [(&str, &str); 22] = [
    ("Llama-7B", "Llama-2-7B"),
    ("Llama-13B", "Llama-2-13B"),
    ("Llama-8B", "Llama-3.1-8B"),
    ("Llama-3-8B", "Llama-3.1-8B"),
    ("Llama-3-70B", "Llama-3.1-70B"),
    ("Llama-3.3-70B", "Llama-3.1-70B"),
    ("Llama-405B", "Llama-3.1-405B"),
    ("Llama-3-405B", "Llama-3.1-405B"),
    ("DeepSeek-R1", "DeepSeek-V3"),
    ("DeepSeek-V3.1", "DeepSeek-V3"),
    ("DSV3", "DeepSeek-V3"),
    ("DSV2", "DeepSeek-V2"),
    ("GPT-175B", "GPT3-175B"),
    ("Grok1", "Grok-1-314B"),
    ("Qwen3-Coder-30B-A3B", "Qwen3-30B-A3B"),
    ("Qwen2-7B", "Qwen2.5-7B"),
    ("Qwen2-72B", "Qwen2.5-72B"),
    ("Nemotron-4-15B", "Nemotron4-15B"),
    ("Nemotron-4-340B", "Nemotron4-340B"),
    ("Nemotron-340B", "Nemotron4-340B"),
    ("Mistral-7B-v0.1", "Mistral-7B"),
    ("Llama-1-65B", "Llama-65B"),
];

/// Words right behind a model's name that make it another model.
const OTHER_MODELS: [&str; 17] = [
    "lite",
    "mini",
    "small",
    "tiny",
    "nano",
    "micro",
    "air",
    "flash",
    "distill",
    "distilled",
    "vl",
    "vision",
    "omni",
    "next",
    "moe",
    "upcycled",
    "proxy",
];

/// Models known by name.
#[derive(Debug, Default)]
pub(super) struct Models {
    all: Vec<Architecture>,
    /// Every name and alias of `all`, which it is an index of.
    names: Vec<(Name, usize)>,
}

impl Models {
    /// Those of a table with the columns of `models.csv`, then the built-in ones.
    pub(super) fn read(table: Option<&str>) -> Self {
        let mut all = table.map_or_else(Vec::new, Architecture::read_table);
        all.extend(Architecture::all_built_in());
        let own = all.iter().enumerate().map(|(at, model)| (Name::of(&model.name), at));
        let aliases = ALIASES.iter().filter_map(|(alias, name)| {
            Some((Name::of(alias), all.iter().position(|model| model.name == *name)?))
        });
        let names = own.chain(aliases).collect();
        Self { all, names }
    }

    /// The usual name of the model that `key` names, whatever its spelling; `key` where it says more than a name, or names none.
    pub(super) fn canonical(&self, key: &str) -> String {
        let name = Name::of(key);
        let found = self.same(&name).or_else(|| self.begun(&name));
        found.map_or_else(|| key.to_string(), |model| model.name.clone())
    }

    /// The model that `text` names: in full, among other words (`DeepSeek-V4-flash 16L`; the longest name counts), or by the first
    /// words of one model's name only.
    fn find(&self, text: &str) -> Option<&Architecture> {
        let name = Name::of(text);
        self.same(&name).or_else(|| self.within(&name)).or_else(|| self.begun(&name))
    }

    fn same(&self, name: &Name) -> Option<&Architecture> {
        self.named(|of| of.plain == name.plain, name).next().map(|(_, model)| model)
    }

    fn within(&self, name: &Name) -> Option<&Architecture> {
        let mut best: Option<(usize, &Architecture)> = None;
        for (of, model) in self.named(|of| name.holds(of), name) {
            if best.is_none_or(|(length, _)| length < of.plain.len()) {
                best = Some((of.plain.len(), model));
            }
        }
        best.map(|(_, model)| model)
    }

    /// The model one of whose names begins with the words of `name`, if there is but one.
    fn begun(&self, name: &Name) -> Option<&Architecture> {
        let length = name.plain.len();
        let begins = |of: &Name| {
            length >= SHORTEST && of.plain.starts_with(&name.plain) && of.begins.get(length) == Some(&true)
        };
        let mut found = self.named(begins, name).map(|(_, model)| model);
        let first = found.next()?;
        found.all(|other| plain(&other.name) == plain(&first.name)).then_some(first)
    }

    /// Models one of whose names passes `test` and which `name` may mean.
    fn named<'a>(
        &'a self,
        test: impl Fn(&Name) -> bool,
        name: &Name,
    ) -> impl Iterator<Item = (&'a Name, &'a Architecture)> {
        let models = self.names.iter().map(|(of, at)| (of, &self.all[*at]));
        models.filter(move |(of, model)| test(of) && fits(name, of, model))
    }
}

/// Letters and digits at least of a name that is cut short.
const SHORTEST: usize = 4;

/// By how much, in logarithms, a number of parameters may differ from that of a model whose name gives none.
const ANOTHER_SIZE: f64 = 0.4;

/// Whether `name` may mean `model`, one of whose names is `of`, as far as numbers of parameters go: `GPT3-17.5B` is no `GPT3-175B`, and
/// `DeepSeek-V3-16B` no DeepSeek-V3.
fn fits(name: &Name, of: &Name, model: &Architecture) -> bool {
    match (name.parameters, of.parameters) {
        (Some(said), Some(own)) => (said / own - 1.0).abs() < 1e-6,
        (Some(said), None) => (said / model.parameters() as f64).ln().abs() < ANOTHER_SIZE,
        (None, _) => true,
    }
}

/// A name without what separates its words.
#[derive(Debug)]
struct Name {
    plain: String,
    /// Whether a word, or a number within one, begins at a place of `plain`.
    begins: Vec<bool>,
    /// The number of parameters that it gives.
    parameters: Option<f64>,
}

impl Name {
    fn of(text: &str) -> Self {
        let (mut name, mut begins) = (String::new(), Vec::new());
        let mut before = ' ';
        for c in text.chars() {
            if c.is_ascii_alphanumeric() {
                begins.push(!before.is_ascii_alphanumeric() || before.is_ascii_digit() != c.is_ascii_digit());
                name.push(c.to_ascii_lowercase());
            }
            before = c;
        }
        Self { plain: name, begins, parameters: parameters(text) }
    }

    /// Whether the words of `other` are among these, and none follows that makes them another model's.
    fn holds(&self, other: &Self) -> bool {
        self.plain.match_indices(&other.plain).any(|(at, found)| {
            let end = at + found.len();
            let whole = self.begins[at] && self.begins.get(end).is_none_or(|begins| *begins);
            let next = (end + 1..self.begins.len()).find(|at| self.begins[*at]).unwrap_or(self.begins.len());
            !found.is_empty() && whole && !OTHER_MODELS.contains(&self.plain.get(end..next).unwrap_or(""))
        })
    }
}

/// The number of parameters that a model's name gives: the first word like `30B`, `1.5b`, `125m` or `1T`.
fn parameters(name: &str) -> Option<f64> {
    let words = name.split(|c: char| !c.is_ascii_alphanumeric() && c != '.');
    words.map(str::to_ascii_lowercase).find_map(|word| {
        let times = match word.chars().next_back()? {
            'm' => 1e6,
            'b' => 1e9,
            't' => 1e12,
            _ => return None,
        };
        Some(times * word[..word.len() - 1].parse::<f64>().ok()?)
    })
}

/// The number of parameters that a known model's name gives: the first word like `30B` or `1.5B`.
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

/// A GPT, or a mixture of experts, of the printed numbers. What is missing is GPT's custom: a feed-forward network of
/// four times the width without a gate, every head with keys of its own, 128 wide where their number is missing,
/// one choice among the experts.
fn from_shape(case: &Case) -> Result<Architecture, String> {
    let shape = &case.shape;
    let named = || {
        let name = if case.model_key.is_empty() { &case.printed } else { &case.model_key };
        format!("model {name:?} is not known")
    };
    let hidden = shape.hidden.ok_or_else(|| format!("{} and custom_arch gives no width", named()))? as usize;
    let heads = shape.heads.map_or((hidden / HEAD_WIDTH).max(1), |heads| heads as usize);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_found_in_any_spelling_and_not_taken_for_others() {
        let models = Models::read(None);
        let found = |text: &str| models.find(text).map(|model| model.name.as_str());
        let same = [
            ("deepseek_v3", "DeepSeek-V3"),
            ("DeepSeek-R1", "DeepSeek-V3"),
            ("DeepSeek-V3.2-Exp", "DeepSeek-V3"),
            ("DeepSeek-V3-671B", "DeepSeek-V3"),
            ("DeepSeek-V2-Lite", "DeepSeek-V2-Lite"),
            ("DeepSeek-V4-flash 16L", "DeepSeek-V4-Flash"),
            ("Llama-3-8B", "Llama-3.1-8B"),
            ("LLAMA31_8B", "Llama-3.1-8B"),
            ("Meta-Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
            ("llama3 70b", "Llama-3.1-70B"),
            ("Llama-3.3-70B", "Llama-3.1-70B"),
            ("LLaMA 2 70B", "Llama-2-70B"),
            ("Llama3-8x70B", "Llama3-8x70B"),
            ("Moonlight", "Moonlight-16B-A3B"),
            ("Nemotron-3-Nano", "Nemotron-3-Nano-30B"),
            ("Nemotron_3_5_Lightning", "Nemotron-3.5-Lightning"),
            ("Qwen3-235B", "Qwen3-235B-A22B"),
            ("qwen3_30b_a3b", "Qwen3-30B-A3B"),
            ("Qwen3-8B", "Qwen3-8B"),
            ("Qwen2.5-7B", "Qwen2.5-7B"),
            ("Mistral-7B-v0.1", "Mistral-7B"),
            ("Grok-1", "Grok-1-314B"),
            ("Grok1", "Grok-1-314B"),
            ("Mixtral 8x22B", "Mixtral-8x22B"),
            ("Kimi-K2-Instruct", "Kimi-K2"),
            ("GPT-3 175B", "GPT3-175B"),
        ];
        for (text, name) in same {
            assert_eq!(found(text), Some(name), "{text}");
        }
        let others = [
            "DeepSeek-V3-Lite",
            "DeepSeek-V3-16B",
            "DeepSeek-R1-Distill-Qwen-7B",
            "GPT3-17.5B",
            "Qwen2-57",
            "Qwen3-VL-235B",
            "Llama-3.1",
            "Nemotron-3",
            "Nemotron-3-Nano-4B",
            "Mixtral",
            "DeepSeek",
            "",
            "-",
        ];
        for text in others {
            assert_eq!(found(text), None, "{text}");
        }
        assert_eq!(models.canonical("llama 3 70b"), "Llama-3.1-70B");
        assert_eq!(models.canonical("DeepSeek-V4-flash 16L"), "DeepSeek-V4-flash 16L");
    }

    #[test]
    fn every_alias_names_a_known_model() {
        let models = Models::read(None);
        assert_eq!(models.names.len(), models.all.len() + ALIASES.len());
    }

    #[test]
    fn the_names_of_models_give_their_size() {
        // OLMoE's name begins with the parameters that a token meets; names round, small ones most.
        let named = |model: &Architecture| billions(&model.name).filter(|_| !model.name.starts_with("OLMoE"));
        for model in Architecture::all_built_in() {
            let Some(named) = named(&model) else { continue };
            let off = (model.parameters() as f64 / named).ln().abs();
            assert!(off < 0.25, "{}: {} parameters", model.name, model.parameters());
        }
    }
}
