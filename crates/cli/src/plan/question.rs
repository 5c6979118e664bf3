//! What is asked: model, cluster and training, as typed and as values.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use unisono_plan::{
    Architecture, Cluster, DispatchKind, ModelConfig, Optimizer, Precision, Routing, Software, Trainable,
    Training,
};
use unisono_train::run_folder::read_summary;

use crate::error::{BAD_INPUT, CliError};

/// How the model is trained.
#[derive(Debug, Clone, Args)]
pub struct TrainingArgs {
    /// Tokens of the whole run: 14.8T, 300B, 1e12
    #[arg(long, value_name = "N", default_value = "1T", value_parser = quantity)]
    pub tokens: f64,
    /// Tokens of a sequence
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub sequence: u32,
    /// Sequences of an optimizer step [default: 4 M tokens of them, and at least one a GPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub batch: Option<u32>,
    /// Format of products: f32, bf16, fp8, mxfp8, nvfp4
    #[arg(long, value_name = "FORMAT", default_value = "bf16")]
    pub precision: Precision,
    /// Format in which rows travel to experts [default: bf16]
    #[arg(long, value_name = "FORMAT", default_value = "bf16")]
    pub wire: Precision,
    /// Exponent of the power law by which experts are popular; 0 is balanced, published routers are near 1.0 to 1.2
    #[arg(long, value_name = "A", default_value_t = 0.0)]
    pub skew: f64,
    /// Routing as a run of unisono measured it, from its folder
    #[arg(long, value_name = "RUN", conflicts_with = "skew")]
    pub routing: Option<PathBuf>,
    /// Rows go to an expert's rank one by one, not once to a server
    #[arg(long)]
    pub no_deduplication: bool,
    /// Dispatch waits instead of running under another micro-batch's kernels
    #[arg(long)]
    pub no_overlap: bool,
    /// Optimizer: what it keeps of a parameter
    #[arg(long, value_enum, default_value_t = OptimizerKind::Adam)]
    pub optimizer: OptimizerKind,
}

/// Formats of optimizer states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OptimizerKind {
    /// Adam with f32 master parameters, moments and gradients
    Adam,
    /// Adam with moments in bf16, as DeepSeek-V3
    AdamBf16Moments,
}

/// A number with a suffix: `14.8T`.
fn quantity(text: &str) -> Result<f64, String> {
    let trimmed = text.trim();
    let (digits, factor) = match trimmed.chars().last().map(|c| c.to_ascii_uppercase()) {
        Some('K') => (&trimmed[..trimmed.len() - 1], 1e3),
        Some('M') => (&trimmed[..trimmed.len() - 1], 1e6),
        Some('B' | 'G') => (&trimmed[..trimmed.len() - 1], 1e9),
        Some('T') => (&trimmed[..trimmed.len() - 1], 1e12),
        _ => (trimmed, 1.0),
    };
    match digits.parse::<f64>() {
        Ok(number) if number * factor >= 1.0 && number.is_finite() => Ok(number * factor),
        _ => Err("must be a number of at least 1 with K, M, B or T behind it, such as 14.8T".into()),
    }
}

impl TrainingArgs {
    /// The training on this cluster.
    pub fn training(&self, cluster: &Cluster) -> Result<Training, CliError> {
        if !(self.skew >= 0.0 && self.skew <= Routing::STEEPEST) {
            return Err(CliError::usage(format!(
                "--skew {}: must be between 0 (even) and {}; 1.01 and 1.2 were measured",
                self.skew,
                Routing::STEEPEST
            )));
        }
        let has = |format: &Precision| match format {
            Precision::Fp8 => cluster.gpu.fp8_flops > cluster.gpu.bf16_flops,
            Precision::Mxfp8 | Precision::Nvfp4 => cluster.gpu.fp4_flops > cluster.gpu.fp8_flops,
            _ => true,
        };
        if !has(&self.precision) {
            let nearest = [Precision::Fp8, Precision::Bf16].into_iter().find(|format| has(format));
            return Err(CliError::usage(format!(
                "--precision {}: {} has no units for it; nearest: {}",
                self.precision,
                cluster.gpu.name,
                nearest.unwrap_or(Precision::Bf16)
            )));
        }
        let sequence = self.sequence as usize;
        let usual = ((4 << 20) / sequence).next_power_of_two().max(cluster.gpus.next_power_of_two());
        let optimizer = match self.optimizer {
            OptimizerKind::Adam => Optimizer::default(),
            OptimizerKind::AdamBf16Moments => Optimizer { moments: Precision::Bf16, ..Optimizer::default() },
        };
        Ok(Training {
            sequence,
            global_batch: self.batch.map_or(usual, |batch| batch as usize),
            tokens: self.tokens,
            compute: self.precision,
            wire: self.wire,
            optimizer,
            routing: match &self.routing {
                Some(run) => measured_routing(run)?,
                None if self.skew > 0.0 => Routing::PowerLaw { exponent: self.skew },
                None => Routing::Balanced,
            },
            dispatch: DispatchKind { deduplicated: !self.no_deduplication, overlapped: !self.no_overlap },
            trainable: Trainable::All,
            software: Software::default(),
        })
    }
}

/// How the router of a finished run spread rows over experts, each layer relative to its mean.
fn measured_routing(run: &Path) -> Result<Routing, CliError> {
    let summary = read_summary(run)?.ok_or_else(|| {
        CliError::usage(format!("--routing {}: holds no run that has ended (no summary.json)", run.display()))
    })?;
    let of_mean = |layer: &Vec<u64>| {
        let mean = layer.iter().sum::<u64>() as f64 / layer.len().max(1) as f64;
        layer.iter().map(|rows| *rows as f64 / mean.max(1.0)).collect::<Vec<f64>>()
    };
    let loads: Vec<f64> = summary.expert_load.iter().flat_map(of_mean).collect();
    if loads.is_empty() {
        return Err(CliError::usage(format!("--routing {}: its model has no experts", run.display())));
    }
    Ok(Routing::Measured { loads })
}

/// A model: a built-in name, a Hugging Face `config.json` or the folder that has one, or a config of ours.
pub fn model(text: &str) -> Result<(Architecture, Option<ModelConfig>), CliError> {
    let path = Path::new(text);
    if path.is_dir() {
        return hugging_face(&path.join("config.json"));
    }
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("json") => hugging_face(path),
        Some("toml") => {
            let config = crate::config::load(Some(path), &[])?;
            Ok((Architecture::from(&config.model), Some(config.model)))
        }
        _ => match Architecture::built_in(text) {
            Ok(model) => Ok((model, None)),
            Err(error) => Err(CliError::usage(format!(
                "{error}; a model is one of `unisono plan --models`, a Hugging Face config.json or its folder, or a config of \
                 unisono (.toml)"
            ))),
        },
    }
}

fn hugging_face(path: &Path) -> Result<(Architecture, Option<ModelConfig>), CliError> {
    let text = read(path)?;
    let model = Architecture::from_hugging_face(&text);
    model
        .map(|model| (model, None))
        .map_err(|error| CliError { code: BAD_INPUT, message: format!("{}: {error}", path.display()) })
}

/// A cluster: `h800x2048`, or a TOML file.
pub fn cluster(text: &str) -> Result<Cluster, CliError> {
    let path = Path::new(text);
    if path.extension().is_some_and(|extension| extension == "toml") {
        let cluster = Cluster::from_toml(&read(path)?);
        return cluster
            .map_err(|error| CliError { code: BAD_INPUT, message: format!("{}: {error}", path.display()) });
    }
    Cluster::parse(text).map_err(|error| CliError::usage(format!("cluster {text:?}: {error}")))
}

fn read(path: &Path) -> Result<String, CliError> {
    std::fs::read_to_string(path)
        .map_err(|error| CliError { code: BAD_INPUT, message: format!("{}: {error}", path.display()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_have_suffixes() {
        for (text, expected) in [("14.8T", 14.8e12), ("300b", 300e9), ("1e12", 1e12), ("4096", 4096.0)] {
            assert_eq!(quantity(text), Ok(expected), "{text}");
        }
        for text in ["", "T", "-1B", "many", "0"] {
            assert!(quantity(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn what_is_unknown_names_what_is_nearest() {
        let said = model("deepseek-v4").unwrap_err().message;
        assert!(said.contains("nearest: DeepSeek-V"), "{said}");
        let said = cluster("h900x64").unwrap_err().message;
        assert!(said.contains("nearest: H"), "{said}");
        assert_eq!(cluster("nowhere.toml").unwrap_err().code, BAD_INPUT);
    }
}
