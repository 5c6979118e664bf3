//! Hugging Face's `config.json`: llama, mixtral, qwen3_moe, olmoe, deepseek_v3, GPT-2 style and their kin.

mod defaults;
mod fields;
mod numerics;

use serde_json::{Map, Value};

use super::limits::{LARGEST_SIZE, MOST_LAYERS};
use super::{Architecture, Attention, MoeShape, Pattern, SizeError, Window, distance};

pub use numerics::Numerics;

/// A `config.json` that cannot be read as an architecture.
#[derive(Debug, thiserror::Error)]
pub enum HuggingFaceError {
    /// Not the expected JSON.
    #[error("config.json: {0}")]
    Json(#[from] serde_json::Error),
    /// A family of models whose fields are not known to mean what those of the others do.
    #[error(
        "config.json: model_type {0:?} is not known; known: {known}; nearest: {nearest}. Without model_type a file is read as llama",
        known = KNOWN.join(", "),
        nearest = nearest(.0)
    )]
    ModelType(String),
    /// A field is missing or has an impossible value.
    #[error("config.json: {field}: {rule}")]
    Field {
        /// The field.
        field: &'static str,
        /// What would be right.
        rule: String,
    },
    /// Two names of one field with different values.
    #[error("config.json: {} = {} and {} = {} are two names of one field: leave out one", .0[0].0, .0[0].1, .0[1].0, .0[1].1)]
    Twice(Box<[(&'static str, Value); 2]>),
    /// More than is planned.
    #[error("config.json: {0}")]
    Size(#[from] SizeError),
}

/// Families whose files were read and compared.
const KNOWN: [&str; 21] = [
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "olmo",
    "olmo2",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "kimi_k2",
    "gpt_oss",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gpt_bigcode",
    "gptj",
    "openai-gpt",
    "opt",
];

/// The known family whose name is most like this one.
fn nearest(kind: &str) -> &'static str {
    let kind = kind.to_ascii_lowercase();
    KNOWN.into_iter().min_by_key(|known| distance(known, &kind)).unwrap_or("llama")
}

/// Families without gates, most of whose heads are their embeddings.
const CLASSIC: &[&str] = &["gpt2", "gpt_neo", "gpt_neox", "gpt_bigcode", "gptj", "openai-gpt", "opt"];

/// Families whose windows are off unless a file turns them on.
const WINDOWLESS: &[&str] = &["qwen2", "qwen2_moe", "qwen3", "qwen3_moe"];

/// The first layer with a window in qwen2 and qwen3 where the file does not say.
const FIRST_WINDOW: usize = 28;

/// The window of gpt_neo's local layers where the file does not say.
const NEO_WINDOW: usize = 256;

/// Fields by their names in all families; messages use the first.
const LAYERS: &[&str] = &["num_hidden_layers", "n_layer", "num_layers"];
const HIDDEN: &[&str] = &["hidden_size", "n_embd"];
const HEADS: &[&str] = &["num_attention_heads", "n_head", "num_heads"];
const WIDTH: &[&str] = &["intermediate_size", "n_inner", "ffn_dim"];
const EXPERTS: &[&str] = &["num_experts", "num_local_experts", "n_routed_experts"];

/// A file's fields, and the family that says what they mean.
struct Config {
    kind: String,
    fields: Map<String, Value>,
}

impl Architecture {
    /// The architecture that a Hugging Face `config.json` describes.
    ///
    /// # Errors
    /// Text that is no JSON, and fields that are missing, out of range or contradict each other, by name.
    pub fn from_hugging_face(json: &str) -> Result<Self, HuggingFaceError> {
        let architecture = Config::read(json)?.architecture()?;
        architecture.check_size()?;
        Ok(architecture)
    }
}

impl Config {
    fn read(json: &str) -> Result<Self, HuggingFaceError> {
        let mut fields: Map<String, Value> = serde_json::from_str(json)?;
        let kind = match fields.get("model_type") {
            None | Some(Value::Null) => "llama".to_string(),
            Some(Value::String(kind)) => kind.clone(),
            Some(_) => return Err(field("model_type", "must be a string")),
        };
        if !KNOWN.contains(&kind.as_str()) {
            return Err(HuggingFaceError::ModelType(kind));
        }
        defaults::set(&kind, &mut fields);
        Ok(Self { kind, fields })
    }

    fn is(&self, kinds: &[&str]) -> bool {
        kinds.contains(&self.kind.as_str())
    }

    fn architecture(&self) -> Result<Architecture, HuggingFaceError> {
        let classic = self.is(CLASSIC);
        let hidden = self.required(HIDDEN)?;
        self.check_embedding(hidden)?;
        let layers = self.layers()?;
        Ok(Architecture {
            layers,
            hidden,
            vocab: self.required(&["vocab_size"])?,
            tied_embeddings: self
                .flag("tie_word_embeddings")?
                .unwrap_or(classic && !self.is(&["gptj", "gpt_neox"])),
            gated: !classic,
            attention: self.attention(hidden)?,
            qk_norm: self.is(&["qwen3", "qwen3_moe", "olmoe"]),
            window: self.window(layers)?,
            ffn_dense: self.at_least_one(WIDTH)?.unwrap_or(4 * hidden),
            moe: self.moe()?,
            state_space: None,
            pattern: self.pattern(layers)?,
            parallel_blocks: self.has_parallel_blocks()?,
            mtp_layers: self.count(&["num_nextn_predict_layers"])?.unwrap_or(0),
            expert_biases: self.kind == "gpt_oss",
            name: self.kind.clone(),
        })
    }

    fn has_parallel_blocks(&self) -> Result<bool, HuggingFaceError> {
        let neox = self.kind == "gpt_neox" && self.flag("use_parallel_residual")? != Some(false);
        Ok(neox || self.kind == "gptj")
    }

    /// Embeddings of another width than the layers' (OPT-350m) are projected, which nothing here has.
    fn check_embedding(&self, hidden: usize) -> Result<(), HuggingFaceError> {
        const NAME: &str = "word_embed_proj_dim";
        match self.at_least_one(&[NAME])?.filter(|width| *width != hidden) {
            Some(width) => Err(field(NAME, format!("is {width}; must be hidden_size = {hidden}"))),
            None => Ok(()),
        }
    }

    fn layers(&self) -> Result<usize, HuggingFaceError> {
        let layers = self.required(LAYERS)?;
        match layers <= MOST_LAYERS {
            true => Ok(layers),
            false => Err(field(LAYERS[0], format!("is {layers}; must be between 1 and {MOST_LAYERS}"))),
        }
    }

    fn attention(&self, hidden: usize) -> Result<Attention, HuggingFaceError> {
        let heads = self.required(HEADS)?;
        if let Some(kv_lora_rank) = self.at_least_one(&["kv_lora_rank"])? {
            return Ok(Attention::Latent {
                heads,
                q_lora_rank: self.at_least_one(&["q_lora_rank"])?,
                kv_lora_rank,
                nope: self.required(&["qk_nope_head_dim"])?,
                rope: self.required(&["qk_rope_head_dim"])?,
                value: self.required(&["v_head_dim"])?,
            });
        }
        let kv_heads = self.kv_heads()?.unwrap_or(heads);
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(field("num_key_value_heads", format!("must divide num_attention_heads = {heads}")));
        }
        let head_dim = match self.at_least_one(&["head_dim"])? {
            Some(head_dim) => head_dim,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let rule = format!("is {heads}; must divide hidden_size = {hidden}, or head_dim be given");
                return Err(field(HEADS[0], rule));
            }
        };
        Ok(Attention::Grouped { heads, kv_heads, head_dim })
    }

    /// Key and value heads; one where all queries share it (gpt_bigcode).
    fn kv_heads(&self) -> Result<Option<usize>, HuggingFaceError> {
        if self.kind == "gpt_bigcode" && self.flag("multi_query")? != Some(false) {
            return Ok(Some(1));
        }
        self.count(&["num_key_value_heads"])
    }

    fn moe(&self) -> Result<Option<MoeShape>, HuggingFaceError> {
        let Some(experts) = self.count(EXPERTS)?.filter(|experts| *experts > 0) else { return Ok(None) };
        let top_k = self.required(&["num_experts_per_tok"])?;
        if top_k > experts {
            return Err(field(
                "num_experts_per_tok",
                format!("is {top_k}; must be at most the {experts} experts"),
            ));
        }
        let expert_ffn = match self.at_least_one(&["moe_intermediate_size"])? {
            Some(width) => width,
            None => {
                let width = self.at_least_one(WIDTH)?;
                width.ok_or_else(|| field("moe_intermediate_size or intermediate_size", MISSING))?
            }
        };
        let shared = self.count(&["n_shared_experts"])?.unwrap_or(0) * expert_ffn;
        let groups = self.count(&["n_group"])?.unwrap_or(1).max(1);
        Ok(Some(MoeShape {
            experts,
            top_k,
            expert_ffn,
            shared_ffn: self.count(&["shared_expert_intermediate_size"])?.unwrap_or(shared),
            groups,
            top_groups: self.count(&["topk_group"])?.unwrap_or(1).clamp(1, groups),
            latent: None,
        }))
    }

    /// The first layer with a window, and of how many one has it, where the file lists no layers.
    fn usual_windows(&self) -> Result<(usize, usize), HuggingFaceError> {
        match self.kind.as_str() {
            "qwen2" | "qwen3" => Ok((self.count(&["max_window_layers"])?.unwrap_or(FIRST_WINDOW), 1)),
            "qwen2_moe" => {
                Err(field("layer_types", "is missing; must say which layers have the sliding_window"))
            }
            "gpt_oss" => Ok((0, 2)),
            _ => Ok((0, 1)),
        }
    }

    /// Which layers see only a window: all, or every so many from one on.
    fn window(&self, layers: usize) -> Result<Option<Window>, HuggingFaceError> {
        let neo = self.kind == "gpt_neo";
        let off = !self.flag("use_sliding_window")?.unwrap_or(!self.is(WINDOWLESS));
        let tokens = match neo {
            true => Some(self.at_least_one(&["window_size"])?.unwrap_or(NEO_WINDOW)),
            false => self.at_least_one(&["sliding_window"])?.filter(|_| !off),
        };
        let Some(tokens) = tokens else { return Ok(None) };
        let (name, slides): (_, Vec<bool>) = match neo {
            true => ("attention_types", self.local_layers()?),
            false => {
                ("layer_types", self.layer_types()?.iter().map(|kind| *kind == "sliding_attention").collect())
            }
        };
        if slides.is_empty() && !neo {
            let (first, every) = self.usual_windows()?;
            return Ok(Some(Window { tokens, first, every }).filter(|_| first < layers));
        }
        let Some(first) = slides.iter().position(|slides| *slides) else { return Ok(None) };
        let next = slides.iter().skip(first + 1).position(|slides| *slides);
        let window = Window { tokens, first, every: next.map_or(slides.len(), |at| at + 1) };
        match slides.iter().enumerate().all(|(layer, slides)| *slides == window.includes(layer)) {
            true => Ok(Some(window)),
            false => Err(field(name, "windows must be in every so many layers from one on")),
        }
    }

    fn pattern(&self, layers: usize) -> Result<Pattern, HuggingFaceError> {
        let (name, sparse) = self.sparse_layers(layers)?;
        let Some(first) = sparse.iter().position(|sparse| *sparse) else {
            return Ok(Pattern::Uniform { first_dense: layers, moe_every: 1 });
        };
        let next = sparse.iter().skip(first + 1).position(|sparse| *sparse);
        let moe_every = next.map_or(layers - first, |at| at + 1);
        let fits = |layer: usize| layer >= first && (layer - first).is_multiple_of(moe_every);
        if moe_every > first + 1 || !sparse.iter().enumerate().all(|(layer, sparse)| *sparse == fits(layer)) {
            let rule = "layers with experts must be n apart, the first of them the n-th or a later one; others cannot be planned";
            return Err(field(name, rule));
        }
        Ok(Pattern::Uniform { first_dense: first + 1 - moe_every, moe_every })
    }

    /// The layers that have experts, where the model has any, and the field that says most of it.
    fn sparse_layers(&self, layers: usize) -> Result<(&'static str, Vec<bool>), HuggingFaceError> {
        const FREQUENCY: &str = "moe_layer_freq";
        if let Some(listed) = self.listed(FREQUENCY, layers)? {
            return Ok((FREQUENCY, listed));
        }
        let first_dense = self.count(&["first_k_dense_replace"])?.unwrap_or(0);
        if first_dense > layers {
            let rule = format!("{first_dense} dense layers; there are {layers}");
            return Err(field("first_k_dense_replace", rule));
        }
        let dense = self.dense_layers()?;
        // DeepSeek counts layers from 0, Qwen from 1.
        let [of, step] = [FREQUENCY, "decoder_sparse_step"].map(|name| self.at_least_one(&[name]));
        let (of, step) = (of?.unwrap_or(1), step?.unwrap_or(1));
        let has = |layer: usize| {
            let turn = layer.is_multiple_of(of) && (layer + 1).is_multiple_of(step);
            turn && layer >= first_dense && !dense.contains(&layer)
        };
        let name = if of > 1 { FREQUENCY } else { "decoder_sparse_step or mlp_only_layers" };
        Ok((name, (0..layers).map(has).collect()))
    }
}

/// What is said of a field that is not there.
const MISSING: &str = "is missing; must be at least 1";

fn field(field: &'static str, rule: impl Into<String>) -> HuggingFaceError {
    HuggingFaceError::Field { field, rule: rule.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architecture::FeedForward;

    #[test]
    fn configs_of_every_style_give_the_known_model() {
        let layer_types = [r#""sliding_attention","full_attention""#; 12].join(",");
        let gpt_oss = format!(
            r#"{{"model_type":"gpt_oss","num_hidden_layers":24,"hidden_size":2880,"vocab_size":201088,
            "num_attention_heads":64,"num_key_value_heads":8,"head_dim":64,"intermediate_size":2880,
            "num_local_experts":32,"num_experts_per_tok":4,"sliding_window":128,"tie_word_embeddings":false,
            "layer_types":[{layer_types}]}}"#
        );
        let cases = [
            (
                "Qwen3-30B-A3B",
                r#"{"model_type":"qwen3_moe","num_hidden_layers":48,"hidden_size":2048,"vocab_size":151936,
                "num_attention_heads":32,"num_key_value_heads":4,"head_dim":128,"intermediate_size":6144,
                "moe_intermediate_size":768,"num_experts":128,"num_experts_per_tok":8,"decoder_sparse_step":1,
                "mlp_only_layers":[],"sliding_window":null,"use_sliding_window":false,"tie_word_embeddings":false}"#,
            ),
            (
                "Mixtral-8x7B",
                r#"{"model_type":"mixtral","num_hidden_layers":32,"hidden_size":4096,"vocab_size":32000,
                "num_attention_heads":32,"num_key_value_heads":8,"intermediate_size":14336,"num_local_experts":8,
                "num_experts_per_tok":2,"sliding_window":null,"tie_word_embeddings":false}"#,
            ),
            (
                "DeepSeek-V3",
                r#"{"model_type":"deepseek_v3","num_hidden_layers":61,"hidden_size":7168,"vocab_size":129280,
                "num_attention_heads":128,"num_key_value_heads":128,"intermediate_size":18432,
                "moe_intermediate_size":2048,"n_routed_experts":256,"n_shared_experts":1,"num_experts_per_tok":8,
                "n_group":8,"topk_group":4,"first_k_dense_replace":3,"q_lora_rank":1536,"kv_lora_rank":512,
                "qk_nope_head_dim":128,"qk_rope_head_dim":64,"v_head_dim":128,"num_nextn_predict_layers":1}"#,
            ),
            (
                "Llama-3.1-8B",
                r#"{"model_type":"llama","num_hidden_layers":32,"hidden_size":4096,"vocab_size":128256,
                "num_attention_heads":32,"num_key_value_heads":8,"intermediate_size":14336}"#,
            ),
            ("GPT-OSS-20B", &gpt_oss),
            (
                "MPT-125m",
                r#"{"model_type":"gpt2","n_layer":12,"n_embd":768,"n_head":12,"vocab_size":50368,"n_inner":null}"#,
            ),
        ];
        for (name, json) in cases {
            let read = Architecture::from_hugging_face(json).unwrap();
            assert_eq!(Architecture { name: name.into(), ..read }, Architecture::built_in(name).unwrap());
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let said = |json: &str| Architecture::from_hugging_face(json).unwrap_err().to_string();
        assert_eq!(
            said(r#"{"hidden_size":8}"#),
            "config.json: num_hidden_layers: is missing; must be at least 1"
        );
        assert!(said("{").starts_with("config.json: EOF"));
        let unknown = said(r#"{"model_type":"t5","hidden_size":8}"#);
        assert!(
            unknown.starts_with("config.json: model_type \"t5\" is not known; known: llama, "),
            "{unknown}"
        );
        let near = said(r#"{"model_type":"Qwen3MoE","hidden_size":8}"#);
        assert!(near.contains("; nearest: qwen3_moe."), "{near}");
        let uneven = r#"{"num_hidden_layers":3,"hidden_size":8,"vocab_size":9,"num_attention_heads":1,"sliding_window":4,
            "layer_types":["sliding_attention","sliding_attention","full_attention"]}"#;
        assert!(said(uneven).contains("layer_types: windows must be in every"));
    }

    /// A llama of small sizes with these fields besides, or instead.
    fn with(fields: &str) -> Result<Architecture, HuggingFaceError> {
        let small = r#"{"num_hidden_layers":2,"hidden_size":64,"vocab_size":100,"num_attention_heads":4"#;
        Architecture::from_hugging_face(&format!("{small},{fields}}}"))
    }

    #[test]
    fn sizes_out_of_range_are_named() {
        let cases = [
            (
                r#""num_hidden_layers":4294967296"#,
                "num_hidden_layers: is 4294967296; must be a whole number up to",
            ),
            (r#""num_hidden_layers":10001"#, "num_hidden_layers: is 10001; must be between 1 and 10000"),
            (r#""vocab_size":1e30"#, "vocab_size: is 1e+30; must be a whole number up to 16777216"),
            (r#""hidden_size":-8"#, "hidden_size: is -8; must be a whole number"),
            (r#""hidden_size":"64""#, "hidden_size: is \"64\"; must be a whole number"),
            (r#""intermediate_size":0"#, "intermediate_size: is 0; must be between 1 and 16777216"),
            (r#""head_dim":0"#, "head_dim: is 0; must be between 1"),
            (r#""num_attention_heads":128"#, "num_attention_heads: is 128; must divide hidden_size = 64"),
            (r#""num_attention_heads":3"#, "num_attention_heads: is 3; must divide hidden_size = 64"),
            (r#""num_key_value_heads":0"#, "num_key_value_heads: must divide num_attention_heads = 4"),
            (
                r#""num_experts":4,"num_experts_per_tok":5"#,
                "num_experts_per_tok: is 5; must be at most the 4 experts",
            ),
            (r#""first_k_dense_replace":3"#, "3 dense layers; there are 2"),
            (r#""tie_word_embeddings":1"#, "tie_word_embeddings: is 1; must be true or false"),
            (
                r#""num_experts":16777216,"num_experts_per_tok":1,"moe_intermediate_size":1"#,
                "experts in all layers",
            ),
            (
                r#""hidden_size":16777216,"intermediate_size":16777216"#,
                "the model has 3.9407e15 parameters; at most 1.0000e15 are planned",
            ),
        ];
        for (fields, expected) in cases {
            let said = with(fields).unwrap_err().to_string();
            assert!(said.starts_with("config.json: ") && said.contains(expected), "{fields}: {said}");
        }
    }

    #[test]
    fn layers_with_experts_are_where_the_file_says() {
        let sparse = |fields: &str| {
            let sizes = r#""num_hidden_layers":6,"hidden_size":64,"vocab_size":100,"num_attention_heads":4"#;
            let model = Architecture::from_hugging_face(&format!("{{{sizes},{fields}}}"))?;
            let has = |layer: usize| u8::from(model.kind(layer).ffn == FeedForward::Moe);
            Ok::<Vec<u8>, HuggingFaceError>((0..6).map(has).collect())
        };
        let cases = [
            (r#""model_type":"deepseek_v3","moe_layer_freq":1"#, [0, 0, 0, 1, 1, 1]),
            (
                r#""model_type":"deepseek_v3","first_k_dense_replace":1,"moe_layer_freq":2"#,
                [0, 0, 1, 0, 1, 0],
            ),
            (r#""model_type":"deepseek_v3","moe_layer_freq":3"#, [0, 0, 0, 1, 0, 0]),
            (r#""model_type":"deepseek_v3","moe_layer_freq":[0,1,1,1,1,1]"#, [0, 1, 1, 1, 1, 1]),
            (r#""model_type":"deepseek_v3","moe_layer_freq":[0,0,0,0,0,0]"#, [0; 6]),
            (r#""model_type":"qwen3_moe","decoder_sparse_step":2"#, [0, 1, 0, 1, 0, 1]),
            (r#""model_type":"qwen3_moe","decoder_sparse_step":2,"mlp_only_layers":[1]"#, [0, 0, 0, 1, 0, 1]),
        ];
        for (fields, expected) in cases {
            assert_eq!(sparse(fields).unwrap(), expected, "{fields}");
        }
        let said = |fields: &str| sparse(fields).unwrap_err().to_string();
        let apart = "config.json: moe_layer_freq: layers with experts must be n apart";
        for frequency in ["2", "[1,0,1,0,1,0]", "[0,1,0,0,1,1]"] {
            let fields =
                format!(r#""model_type":"deepseek_v2","num_experts_per_tok":2,"moe_layer_freq":{frequency}"#);
            assert!(said(&fields).starts_with(apart), "{}", said(&fields));
        }
        let list = r#""model_type":"deepseek_v3","moe_layer_freq":[0,1]"#;
        assert!(
            said(list).ends_with("must be a number or a list of a 0 or 1 for each of 6 layers"),
            "{}",
            said(list)
        );
        let middle = r#""model_type":"qwen3_moe","mlp_only_layers":[2]"#;
        assert!(
            said(middle).contains("mlp_only_layers: layers with experts must be n apart"),
            "{}",
            said(middle)
        );
    }

    #[test]
    fn what_a_file_leaves_out_is_its_familys() {
        let read = |kind: &str, fields: &str| {
            let sizes =
                r#""num_hidden_layers":32,"hidden_size":4096,"vocab_size":32000,"num_attention_heads":32"#;
            Architecture::from_hugging_face(&format!(r#"{{"model_type":"{kind}",{sizes}{fields}}}"#)).unwrap()
        };
        let same = |kind: &str, name: &str| {
            let built_in = Architecture::built_in(name).unwrap();
            assert_eq!(Architecture { name: name.into(), ..read(kind, "") }, built_in);
        };
        same("mixtral", "Mixtral-8x7B");
        assert_eq!(read("mixtral", r#","num_key_value_heads":null"#).attention.kv_heads(), 32);
        let mistral = read("mistral", "");
        assert_eq!((mistral.attention.kv_heads(), mistral.ffn_dense), (8, 14_336));
        assert_eq!(mistral.window.map(|window| window.tokens), Some(4096));
        assert_eq!(read("mistral", r#","sliding_window":null"#).window, None);
        assert_eq!(read("llama", "").ffn_dense, 11_008);
        // A window that is said is off until it is turned on, and then in the last layers.
        assert_eq!(read("qwen2", r#","sliding_window":131072"#).window, None);
        let windowed = read("qwen2", r#","use_sliding_window":true"#);
        assert_eq!(windowed.window, Some(Window { tokens: 4096, first: 28, every: 1 }));
        assert_eq!(read("qwen3", "").attention.qk_dim(), 128);
        let qwen = read("qwen3_moe", "");
        let moe = qwen.moe.unwrap();
        assert_eq!((qwen.attention.kv_heads(), moe.experts, moe.top_k, moe.expert_ffn), (4, 128, 8, 768));
        assert_eq!(read("qwen3_moe", r#","num_local_experts":16"#).moe.unwrap().experts, 16);
        let moe = read("qwen2_moe", "").moe.unwrap();
        assert_eq!((moe.experts, moe.top_k, moe.expert_ffn, moe.shared_ffn), (60, 4, 1408, 5632));
        let moe = read("olmoe", "").moe.unwrap();
        assert_eq!((moe.experts, moe.top_k, moe.expert_ffn), (64, 8, 2048));
        let deepseek = read("deepseek_v3", "");
        let latent = Attention::Latent {
            heads: 32,
            q_lora_rank: Some(1536),
            kv_lora_rank: 512,
            nope: 128,
            rope: 64,
            value: 128,
        };
        assert_eq!(
            (deepseek.attention, deepseek.pattern),
            (latent, Pattern::Uniform { first_dense: 3, moe_every: 1 })
        );
        let moe = deepseek.moe.unwrap();
        assert_eq!((moe.experts, moe.groups, moe.top_groups, moe.shared_ffn), (256, 8, 4, 2048));
        let lite = read("deepseek_v2", r#","num_experts_per_tok":6,"q_lora_rank":null"#);
        assert!(matches!(lite.attention, Attention::Latent { q_lora_rank: None, .. }));
        assert_eq!(lite.moe.map(|moe| (moe.experts, moe.shared_ffn)), Some((64, 2 * 1407)));
        let oss = read("gpt_oss", "");
        assert_eq!((oss.attention.kv_heads(), oss.attention.qk_dim()), (8, 64));
        assert_eq!(oss.window, Some(Window { tokens: 128, first: 0, every: 2 }));
        assert_eq!(oss.moe.map(|moe| (moe.experts, moe.top_k)), Some((128, 4)));
        let neox = read("gpt_neox", "");
        assert_eq!((neox.tied_embeddings, neox.ffn_dense), (false, 24_576));
        assert!(read("gpt_neo", "").tied_embeddings);
    }

    #[test]
    fn two_names_of_one_field_may_agree() {
        let both = |local: usize| {
            let fields = format!(r#""num_experts":8,"num_local_experts":{local},"num_experts_per_tok":2"#);
            with(&format!("{fields},\"intermediate_size\":128"))
        };
        assert_eq!(both(8).unwrap().moe.unwrap().experts, 8);
        assert_eq!(
            both(4).unwrap_err().to_string(),
            "config.json: num_experts = 8 and num_local_experts = 4 are two names of one field: leave out one"
        );
    }

    #[test]
    fn older_families_have_names_and_heads_of_their_own() {
        let neo = r#"{"model_type":"gpt_neo","num_layers":12,"hidden_size":768,"num_heads":12,"vocab_size":50257,
            "intermediate_size":null}"#;
        let neo = Architecture::from_hugging_face(neo).unwrap();
        assert_eq!((neo.layers, neo.attention.heads(), neo.ffn_dense), (12, 12, 3072));
        assert_eq!(neo.window, None);
        let local = |fields: &str| {
            let sizes =
                r#""model_type":"gpt_neo","num_layers":4,"hidden_size":64,"num_heads":4,"vocab_size":9"#;
            Architecture::from_hugging_face(&format!("{{{sizes},{fields}}}"))
        };
        let neo = local(r#""attention_types":[[["global","local"],2]],"window_size":128"#).unwrap();
        assert_eq!(neo.window, Some(Window { tokens: 128, first: 1, every: 2 }));
        assert_eq!([0, 1, 2, 3].map(|layer| neo.is_windowed(layer)), [false, true, false, true]);
        let global = local(r#""attention_layers":["global","global","global","global"]"#).unwrap();
        assert_eq!(global.window, None);
        let said = local(r#""attention_types":[["global",2]]"#).unwrap_err().to_string();
        assert!(said.contains("attention_types: must be a list of pairs"), "{said}");
        let said = local(r#""attention_types":[[["local"],3]]"#).unwrap_err().to_string();
        assert!(said.contains("attention_types: names 3 layers; there are 4"), "{said}");
        let code = |multi_query: &str| {
            let json = format!(
                r#"{{"model_type":"gpt_bigcode","n_layer":40,"n_embd":6144,"n_head":48,"vocab_size":49152,
                "n_inner":24576{multi_query}}}"#
            );
            Architecture::from_hugging_face(&json).unwrap()
        };
        // StarCoder's 15.5 B.
        let shared = code(r#","multi_query":true"#);
        assert_eq!(shared.attention.kv_heads(), 1);
        assert!((shared.parameters() as f64 / 15.5e9 - 1.0).abs() < 0.02, "{}", shared.parameters());
        assert_eq!(code(r#","multi_query":false"#).attention.kv_heads(), 48);
        let j = r#"{"model_type":"gptj","n_layer":28,"n_embd":4096,"n_head":16,"n_inner":null,"vocab_size":50400,"rotary_dim":64,
            "tie_word_embeddings":false}"#;
        let j = Architecture::from_hugging_face(j).unwrap();
        assert!(j.parallel_blocks && !j.gated && !j.tied_embeddings);
        assert!((j.parameters() as f64 / 6.05e9 - 1.0).abs() < 0.01, "{}", j.parameters());
        let opt = |embedding: usize| {
            let json = format!(
                r#"{{"model_type":"opt","num_hidden_layers":32,"hidden_size":4096,"num_attention_heads":32,"ffn_dim":16384,
                "vocab_size":50272,"max_position_embeddings":2048,"word_embed_proj_dim":{embedding}}}"#
            );
            Architecture::from_hugging_face(&json)
        };
        let whole = opt(4096).unwrap();
        assert!(whole.tied_embeddings && !whole.parallel_blocks);
        assert!((whole.parameters() as f64 / 6.66e9 - 1.0).abs() < 0.01, "{}", whole.parameters());
        let said = opt(512).unwrap_err().to_string();
        assert_eq!(said, "config.json: word_embed_proj_dim: is 512; must be hidden_size = 4096");
    }
}
