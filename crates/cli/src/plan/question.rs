//! What is asked: model, cluster and training, as typed and as values.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use unisono_plan::{
    Architecture, Cluster, ClusterError, DispatchKind, Numerics, Optimizer, Precision, Recomputation,
    Routing, Training,
};
use unisono_train::RunConfig;
use unisono_train::config::WireConfig;
use unisono_train::run_folder::read_summary;

use crate::error::{BAD_INPUT, CliError};

/// The most tokens of a run.
const MOST_TOKENS: f64 = 1e18;
/// The largest description of a model or a cluster that is read.
const LARGEST_FILE_BYTES: u64 = 1 << 20;

/// How the model is trained. What is not given is the model's own where it is a config of unisono.
#[derive(Debug, Clone, Args)]
pub struct TrainingArgs {
    /// Tokens of the whole run: 14.8T, 300B, 1e12 [default: a config's own, else 1T]
    #[arg(long, value_name = "N", value_parser = quantity, allow_negative_numbers = true)]
    tokens: Option<f64>,
    /// Tokens of a sequence [default: a config's own, else 4096 or as many as a config.json has positions]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    sequence: Option<u32>,
    /// Sequences of an optimizer step [default: a config's own, else 4 M tokens of them, and at least one a GPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    batch: Option<u32>,
    /// Format of products: f32, bf16, fp8, mxfp8, nvfp4 [default: f32 of a config of unisono, as it trains, else bf16]
    #[arg(long, value_name = "FORMAT")]
    precision: Option<Precision>,
    /// Format in which rows travel to experts [default: a config's own, else bf16]
    #[arg(long, value_name = "FORMAT")]
    wire: Option<Precision>,
    /// Exponent of the power law by which experts are popular; 0 is balanced, published routers are near 1.0 to 1.2 [default: 0]
    #[arg(long, value_name = "A", allow_negative_numbers = true)]
    skew: Option<f64>,
    /// Routing as a run of unisono measured it, from its folder
    #[arg(long, value_name = "RUN", conflicts_with = "skew")]
    routing: Option<PathBuf>,
    /// Rows go to an expert's rank one by one, not once to a server
    #[arg(long)]
    no_deduplication: bool,
    /// Dispatch waits instead of running under another micro-batch's kernels
    #[arg(long)]
    no_overlap: bool,
    /// Optimizer: what it keeps of a parameter [default: adam]
    #[arg(long, value_enum)]
    optimizer: Option<OptimizerKind>,
    /// What the layouts of a search compute again: none, selective (the core of attention), full, or parts such as moe_act+layernorm
    /// [default: whatever is best]
    #[arg(long, value_name = "PARTS")]
    pub recompute: Option<Recomputation>,
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
        Ok(number) if (1.0..=MOST_TOKENS).contains(&(number * factor)) => Ok(number * factor),
        _ => Err("must be a number from 1 to 1e18, K, M, B or T may stand behind it, such as 14.8T".into()),
    }
}

impl TrainingArgs {
    /// The options that were given, by name.
    pub fn given(&self) -> Vec<&'static str> {
        let all = [
            ("--tokens", self.tokens.is_some()),
            ("--sequence", self.sequence.is_some()),
            ("--batch", self.batch.is_some()),
            ("--precision", self.precision.is_some()),
            ("--optimizer", self.optimizer.is_some()),
            ("--recompute", self.recompute.is_some()),
        ];
        let general = all.into_iter().filter(|(_, given)| *given).map(|(name, _)| name);
        general.chain(self.given_of_experts()).collect()
    }

    /// The options that were given and say how rows travel to experts.
    fn given_of_experts(&self) -> impl Iterator<Item = &'static str> {
        let all = [
            ("--wire", self.wire.is_some()),
            ("--skew", self.skew.is_some()),
            ("--routing", self.routing.is_some()),
            ("--no-deduplication", self.no_deduplication),
            ("--no-overlap", self.no_overlap),
        ];
        all.into_iter().filter(|(_, given)| *given).map(|(name, _)| name)
    }

    /// Refuses what says how rows travel to experts where none of the models has any.
    pub fn check_experts<'a>(&self, models: impl Iterator<Item = &'a Model>) -> Result<(), CliError> {
        let models: Vec<&Model> = models.collect();
        let sparse = models.iter().any(|model| model.architecture.moe.is_some());
        match self.given_of_experts().next().filter(|_| !sparse) {
            None => Ok(()),
            Some(option) => {
                let names: Vec<&str> = models.iter().map(|model| model.architecture.name.as_str()).collect();
                Err(CliError::usage(format!(
                    "{option} is about experts, and {} has none: leave it out",
                    names.join(", ")
                )))
            }
        }
    }

    /// The training of a model on this cluster.
    pub fn training(&self, model: &Model, cluster: &Cluster) -> Result<Training, CliError> {
        let (config, default) = (model.config(), Training::default());
        // What unisono's engine trains in.
        let usual = if config.is_some() { Precision::F32 } else { Precision::Bf16 };
        let precision = self.precision.unwrap_or(usual);
        check_units(precision, cluster)?;
        self.check_wire(precision, cluster)?;
        let sequence = match (self.sequence, config) {
            (Some(sequence), _) => sequence as usize,
            (None, Some(config)) => config.train.sequence_length,
            (None, None) => model.positions().map_or(default.sequence, |most| most.min(default.sequence)),
        };
        let usual = ((4 << 20) / sequence).next_power_of_two().max(cluster.gpus.next_power_of_two());
        let batch = config.map_or(usual, RunConfig::global_batch);
        let tokens = config.map(|config| config.train.steps as f64 * config.tokens_per_step() as f64);
        let tokens = tokens.filter(|tokens| (1.0..=MOST_TOKENS).contains(tokens)).unwrap_or(default.tokens);
        let wire = match config.map(|config| config.train.dispatch_wire) {
            Some(WireConfig::F32) => Precision::F32,
            _ => Precision::Bf16,
        };
        let optimizer = match self.optimizer.unwrap_or(OptimizerKind::Adam) {
            OptimizerKind::Adam => Optimizer::default(),
            OptimizerKind::AdamBf16Moments => Optimizer { moments: Precision::Bf16, ..Optimizer::default() },
        };
        let overlapped = !self.no_overlap && config.is_none_or(|config| config.layout.overlap);
        Ok(Training {
            sequence,
            global_batch: self.batch.map_or(batch, |batch| batch as usize),
            tokens: self.tokens.unwrap_or(tokens),
            compute: precision,
            wire: self.wire.unwrap_or(wire),
            optimizer,
            routing: self.routing()?,
            dispatch: DispatchKind { deduplicated: !self.no_deduplication, overlapped, padded: false },
            ..default
        })
    }

    /// Refuses a wire that rows cannot or would not travel in.
    fn check_wire(&self, precision: Precision, cluster: &Cluster) -> Result<(), CliError> {
        match self.wire {
            Some(Precision::F32) if precision != Precision::F32 => Err(CliError::usage(format!(
                "--wire f32: rows are no wider than the results of products in {precision}, which have 16 bits: leave it out for bf16, or add --precision f32"
            ))),
            Some(wire @ (Precision::Mxfp8 | Precision::Nvfp4)) if !has_units(wire, cluster) => {
                let gpu = cluster.gpu.label();
                Err(CliError::usage(format!("--wire {wire}: {gpu} has no units for it; nearest: fp8")))
            }
            _ => Ok(()),
        }
    }

    fn routing(&self) -> Result<Routing, CliError> {
        let skew = self.skew.unwrap_or(0.0);
        if !(0.0..=Routing::STEEPEST).contains(&skew) {
            let most = Routing::STEEPEST;
            return Err(CliError::usage(format!(
                "--skew {skew}: must be between 0 (even) and {most}; kernels were measured at 1.01 and 1.2"
            )));
        }
        match &self.routing {
            Some(run) => measured_routing(run),
            None if skew > 0.0 => Ok(Routing::PowerLaw { exponent: skew }),
            None => Ok(Routing::Balanced),
        }
    }
}

fn has_units(precision: Precision, cluster: &Cluster) -> bool {
    match precision {
        Precision::Fp8 => cluster.gpu.fp8_flops > cluster.gpu.bf16_flops,
        Precision::Mxfp8 | Precision::Nvfp4 => cluster.gpu.fp4_flops > cluster.gpu.fp8_flops,
        _ => true,
    }
}

/// Refuses a format that the GPU has no units for.
fn check_units(precision: Precision, cluster: &Cluster) -> Result<(), CliError> {
    if has_units(precision, cluster) {
        return Ok(());
    }
    let nearest = if has_units(Precision::Fp8, cluster) { Precision::Fp8 } else { Precision::Bf16 };
    let gpu = cluster.gpu.label();
    Err(CliError::usage(format!("--precision {precision}: {gpu} has no units for it; nearest: {nearest}")))
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

/// A model and what its description says beside the architecture.
#[derive(Debug, Clone)]
pub struct Model {
    /// What is planned.
    pub architecture: Architecture,
    /// Where it is from.
    pub origin: Origin,
}

/// Where a model is from.
#[derive(Debug, Clone)]
pub enum Origin {
    /// Known by name.
    BuiltIn,
    /// A Hugging Face `config.json`.
    HuggingFace(Numerics),
    /// A config of unisono.
    Config(Box<RunConfig>),
}

impl Model {
    /// Tokens of its longest sequence, where a `config.json` says.
    fn positions(&self) -> Option<usize> {
        match &self.origin {
            Origin::HuggingFace(numerics) => numerics.positions,
            Origin::BuiltIn | Origin::Config(_) => None,
        }
    }

    /// The config of unisono that the model is from.
    pub fn config(&self) -> Option<&RunConfig> {
        match &self.origin {
            Origin::Config(config) => Some(config),
            Origin::BuiltIn | Origin::HuggingFace(_) => None,
        }
    }
}

/// A model: a built-in name, a Hugging Face `config.json` or the folder that has one, or a config of ours.
pub fn model(text: &str) -> Result<Model, CliError> {
    let path = Path::new(text);
    if path.is_dir() {
        return hugging_face(&path.join("config.json"));
    }
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("json") => hugging_face(path),
        Some("toml") => {
            let config = crate::config::load(Some(path), &[])?;
            let architecture = Architecture { name: name_of(path), ..Architecture::from(&config.model) };
            let too_large = architecture.check_size();
            too_large.map_err(|error| CliError::usage(format!("{}: {error}", path.display())))?;
            Ok(Model { architecture, origin: Origin::Config(Box::new(config)) })
        }
        _ => match Architecture::built_in(text) {
            Ok(architecture) => Ok(Model { architecture, origin: Origin::BuiltIn }),
            Err(error) => Err(CliError::usage(format!(
                "{error}; a model is one of `unisono plan --models`, a Hugging Face config.json or its folder, or a config of \
                 unisono (.toml)"
            ))),
        },
    }
}

fn hugging_face(path: &Path) -> Result<Model, CliError> {
    let text = read(path, "name a Hugging Face config.json or its folder")?;
    let bad = |error| CliError::bad_input(format!("{}: {error}", path.display()));
    let architecture = Architecture::from_hugging_face(&text).map_err(bad)?;
    let numerics = Numerics::from_hugging_face(&text).map_err(bad)?;
    Ok(Model {
        architecture: Architecture { name: name_of(path), ..architecture },
        origin: Origin::HuggingFace(numerics),
    })
}

/// What a file's model is called: the file, or its folder where every model's file is called the same.
fn name_of(path: &Path) -> String {
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let stem = |path: &Path| path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let folder = whole.parent().and_then(|folder| Some(folder.file_name()?.to_string_lossy().into_owned()));
    match stem(&whole) {
        Some(name) if name != "config" => name,
        name => folder.or(name).unwrap_or_default(),
    }
}

/// A cluster: `h800x2048`, or a TOML file.
pub fn cluster(text: &str) -> Result<Cluster, CliError> {
    if let Some(file) = cluster_text(text)? {
        return Cluster::from_toml(&file)
            .map_err(|error| CliError { code: BAD_INPUT, message: format!("{text}: {error}") });
    }
    Cluster::parse(text).map_err(|error| {
        let remedy = match error {
            ClusterError::UnknownGpu { .. } => "; `unisono plan --gpus` lists the GPUs",
            _ => "",
        };
        CliError::usage(format!("cluster {text:?}: {error}{remedy}"))
    })
}

/// The file that describes a cluster, if it is one.
pub fn cluster_text(text: &str) -> Result<Option<String>, CliError> {
    let path = Path::new(text);
    let right = "docs/plan.md shows such a file; a GPU and a count, such as h800x2048, needs none";
    let is_file = path.extension().is_some_and(|extension| extension == "toml");
    is_file.then(|| read(path, right)).transpose()
}

/// `right` says what would be.
fn read(path: &Path, right: &str) -> Result<String, CliError> {
    let bad = |error: String| CliError::bad_input(format!("{}: {error}", path.display()));
    let refused = |error: std::io::Error| bad(format!("{error}; {right}"));
    let file = File::open(path).map_err(refused)?;
    let mut text = String::new();
    let read = file.take(LARGEST_FILE_BYTES + 1).read_to_string(&mut text);
    read.map_err(refused)?;
    match text.len() as u64 > LARGEST_FILE_BYTES {
        true => {
            Err(bad(format!("is larger than the {LARGEST_FILE_BYTES} bytes that are read of a description")))
        }
        false => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_have_suffixes() {
        for (text, expected) in [("14.8T", 14.8e12), ("300b", 300e9), ("1e12", 1e12), ("4096", 4096.0)] {
            assert_eq!(quantity(text), Ok(expected), "{text}");
        }
        for text in ["", "T", "-1B", "many", "0", "1e300T", "1e400", "1e19", "NaN"] {
            assert!(quantity(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_file_names_its_model_or_its_folder_does() {
        for (path, name) in
            [("a/Qwen3-30B/config.json", "Qwen3-30B"), ("a/small.json", "small"), ("b/c.d.toml", "c.d")]
        {
            assert_eq!(name_of(Path::new(path)), name);
        }
        let here = std::env::current_dir().unwrap();
        assert_eq!(name_of(Path::new("config.json")), here.file_name().unwrap().to_str().unwrap());
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
