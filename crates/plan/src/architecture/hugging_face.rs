//! Hugging Face's `config.json`: llama, mixtral, qwen3_moe, olmoe, deepseek_v3, GPT-2 style and their kin.

mod fields;
mod numerics;

use serde_json::{Map, Value};

use super::limits::{LARGEST_SIZE, MOST_LAYERS};
use super::{Architecture, Attention, MoeShape, Pattern, SizeError, Window};

pub use numerics::Numerics;

/// A `config.json` that cannot be read as an architecture.
#[derive(Debug, thiserror::Error)]
pub enum HuggingFaceError {
    /// Not the expected JSON.
    #[error("config.json: {0}")]
    Json(#[from] serde_json::Error),
    /// A family of models whose fields are not known to mean what those of the others do.
    #[error(
        "config.json: model_type {0:?} is not known; known: {known}. Without model_type a file is read as llama",
        known = KNOWN.join(", ")
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

/// Families without gates, most of whose heads are their embeddings.
const CLASSIC: &[&str] = &["gpt2", "gpt_neo", "gpt_neox", "gpt_bigcode", "gptj", "openai-gpt", "opt"];

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
        let fields: Map<String, Value> = serde_json::from_str(json)?;
        let kind = match fields.get("model_type") {
            None | Some(Value::Null) => "llama".to_string(),
            Some(Value::String(kind)) => kind.clone(),
            Some(_) => return Err(field("model_type", "must be a string")),
        };
        if !KNOWN.contains(&kind.as_str()) {
            return Err(HuggingFaceError::ModelType(kind));
        }
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
            tied_embeddings: self.flag("tie_word_embeddings")?.unwrap_or(classic && self.kind != "gptj"),
            gated: !classic,
            attention: self.attention(hidden)?,
            qk_norm: self.is(&["qwen3", "qwen3_moe", "olmoe"]),
            window: self.window()?,
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

    /// Which layers see only a window: all, or every so many from one on.
    fn window(&self) -> Result<Option<Window>, HuggingFaceError> {
        let neo = self.kind == "gpt_neo";
        let off = self.flag("use_sliding_window")? == Some(false);
        let tokens = match neo {
            true => Some(self.at_least_one(&["window_size"])?.unwrap_or(NEO_WINDOW)),
            false => self.at_least_one(&["sliding_window"])?.filter(|_| !off),
        };
        let Some(tokens) = tokens else { return Ok(None) };
        let (name, slides) = match neo {
            true => ("attention_types", self.local_layers()?),
            false => {
                ("layer_types", self.layer_types()?.iter().map(|kind| *kind == "sliding_attention").collect())
            }
        };
        if slides.is_empty() && !neo {
            return Ok(Some(Window { tokens, first: 0, every: 1 }));
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
        let listed = self.dense_layers()?;
        if !listed.iter().enumerate().all(|(at, layer)| at == *layer) {
            return Err(field("mlp_only_layers", "must be the first layers"));
        }
        let first_dense = self.count(&["first_k_dense_replace"])?.unwrap_or(listed.len());
        if first_dense > layers {
            let rule = format!("or mlp_only_layers: {first_dense} dense layers; there are {layers}");
            return Err(field("first_k_dense_replace", rule));
        }
        let moe_every = self.count(&["decoder_sparse_step"])?.unwrap_or(1).max(1);
        Ok(Pattern::Uniform { first_dense, moe_every })
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
