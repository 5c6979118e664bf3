//! What a `config.json` says that changes numbers, not sizes.

use super::{Config, HuggingFaceError, field, fields};
use crate::model::{ModelConfig, ScoreFunction};

/// What a run needs to know of a `config.json` beside the architecture. What the file leaves out is its family's default.
#[derive(Debug, Clone, PartialEq)]
pub struct Numerics {
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Added under the root of every norm.
    pub rms_norm_eps: f32,
    /// Whether the chosen scores are divided by their sum.
    pub normalize_top_k: bool,
    /// How router logits become scores.
    pub score_function: ScoreFunction,
    /// Factor on the chosen weights.
    pub routed_scaling_factor: f32,
    /// Tokens of the longest sequence that the model is made for, where the file says.
    pub positions: Option<usize>,
    /// What the file's model computes that ours does not.
    pub lacking: Vec<&'static str>,
}

impl Numerics {
    /// Those of a `config.json`.
    ///
    /// # Errors
    /// Fields that are out of range, by name.
    pub fn from_hugging_face(json: &str) -> Result<Self, HuggingFaceError> {
        Config::read(json)?.numerics()
    }

    /// Sets them in a model's config.
    pub fn apply(&self, model: &mut ModelConfig) {
        model.rope_theta = self.rope_theta;
        model.rms_norm_eps = self.rms_norm_eps;
        model.normalize_top_k = self.normalize_top_k;
        model.score_function = self.score_function;
        model.routed_scaling_factor = self.routed_scaling_factor;
    }
}

impl Config {
    fn numerics(&self) -> Result<Numerics, HuggingFaceError> {
        let epsilon = if self.is(&["mixtral", "olmo", "olmo2", "olmoe", "gpt_oss"]) { 1e-5 } else { 1e-6 };
        let always = self.is(&["mixtral", "gpt_oss"]);
        let scaling = if self.is(&["deepseek_v3", "kimi_k2"]) { 2.5 } else { 1.0 };
        let usually = always || self.is(&["deepseek_v3", "kimi_k2"]);
        Ok(Numerics {
            rope_theta: self.rope_theta()? as f32,
            rms_norm_eps: self.positive("rms_norm_eps")?.unwrap_or(epsilon) as f32,
            normalize_top_k: always || self.flag("norm_topk_prob")?.unwrap_or(usually),
            score_function: self.score_function()?,
            routed_scaling_factor: self.positive("routed_scaling_factor")?.unwrap_or(scaling) as f32,
            positions: self.at_least_one(&["max_position_embeddings", "n_positions"])?,
            lacking: self.lacking()?,
        })
    }

    /// Newer files have it among `rope_parameters`.
    fn rope_theta(&self) -> Result<f64, HuggingFaceError> {
        let nested = self.fields.get("rope_parameters").and_then(|of| of.get("rope_theta"));
        if let Some(value) = nested {
            return fields::positive("rope_parameters.rope_theta", value);
        }
        let usual = match self.kind.as_str() {
            "mixtral" => 1e6,
            "gpt_oss" => 150_000.0,
            _ => 10_000.0,
        };
        Ok(self.positive("rope_theta")?.unwrap_or(usual))
    }

    fn score_function(&self) -> Result<ScoreFunction, HuggingFaceError> {
        match self.fields.get("scoring_func").and_then(|name| name.as_str()) {
            Some("sigmoid") => Ok(ScoreFunction::Sigmoid),
            Some("softmax") => Ok(ScoreFunction::Softmax),
            Some(_) => Err(field("scoring_func", "must be sigmoid or softmax")),
            None if self.is(&["deepseek_v3", "kimi_k2"]) => Ok(ScoreFunction::Sigmoid),
            None => Ok(ScoreFunction::Softmax),
        }
    }

    fn lacking(&self) -> Result<Vec<&'static str>, HuggingFaceError> {
        let on = |name| self.flag(name).map(|flag| flag == Some(true));
        let biased = self.is(&["qwen2", "qwen2_moe", "gpt_oss"]) || on("attention_bias")? || on("mlp_bias")?;
        let all = [
            (self.scales_rotation(), "scaled rotary frequencies (rope_scaling)"),
            (biased, "biases"),
            (self.is(&["qwen2_moe"]), "a gate on the shared expert"),
            (self.is(&["gpt_oss"]), "attention sinks"),
            (self.is(&["olmo"]), "norms without weights"),
            (self.is(&["olmo2"]), "norms after attention and feed-forward networks"),
            (self.is(&["olmo2", "olmoe"]), "norms over all query and key heads together"),
            (
                self.fields.get("clip_qkv").is_some_and(|clip| clip.is_number()),
                "clipped queries, keys and values",
            ),
        ];
        Ok(all.into_iter().filter(|(lacks, _)| *lacks).map(|(_, what)| what).collect())
    }

    fn scales_rotation(&self) -> bool {
        let of = |name: &str| self.fields.get(name).filter(|of| of.is_object());
        [of("rope_scaling"), of("rope_parameters")].into_iter().flatten().any(|of| {
            let kind = of.get("rope_type").or_else(|| of.get("type")).and_then(|kind| kind.as_str());
            kind != Some("default")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_says_is_kept_and_what_it_leaves_out_is_its_familys() {
        let read = |json: &str| Numerics::from_hugging_face(json).unwrap();
        let qwen = read(
            r#"{"model_type":"qwen3_moe","rope_theta":1000000.0,"rms_norm_eps":1e-06,"norm_topk_prob":true,
            "rope_scaling":null,"attention_bias":false}"#,
        );
        assert_eq!((qwen.rope_theta, qwen.rms_norm_eps, qwen.normalize_top_k), (1e6, 1e-6, true));
        assert_eq!((qwen.score_function, &qwen.lacking), (ScoreFunction::Softmax, &Vec::new()));
        assert!(!read(r#"{"model_type":"qwen3_moe"}"#).normalize_top_k);
        let mixtral = read(r#"{"model_type":"mixtral"}"#);
        assert_eq!((mixtral.rope_theta, mixtral.rms_norm_eps, mixtral.normalize_top_k), (1e6, 1e-5, true));
        let deepseek = read(r#"{"model_type":"deepseek_v3","routed_scaling_factor":2.5}"#);
        assert_eq!((deepseek.score_function, deepseek.routed_scaling_factor), (ScoreFunction::Sigmoid, 2.5));
        assert_eq!(read(r#"{"model_type":"deepseek_v3"}"#).routed_scaling_factor, 2.5);
        let newer = read(r#"{"rope_parameters":{"rope_theta":500000.0,"rope_type":"llama3"}}"#);
        assert_eq!(newer.rope_theta, 5e5);
        assert_eq!(newer.lacking, ["scaled rotary frequencies (rope_scaling)"]);
    }

    #[test]
    fn values_out_of_range_are_named() {
        let said = |json: &str| Numerics::from_hugging_face(json).unwrap_err().to_string();
        assert_eq!(said(r#"{"rope_theta":-1}"#), "config.json: rope_theta: is -1; must be a number above 0");
        assert_eq!(
            said(r#"{"scoring_func":"tanh"}"#),
            "config.json: scoring_func: must be sigmoid or softmax"
        );
    }
}
