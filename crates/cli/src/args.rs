//! The arguments as typed, before anything is checked.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Trains sparse Mixture-of-Experts language models, with the same bits on any number of ranks.
#[derive(Debug, Parser)]
#[command(name = "unisono", version, after_help = EXIT_CODES)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 `diff` or `verify` found a difference or `doctor` a run that has not ended well, 2 usage or
config, 3 bad input file, 17 halted on numbers, 20 stopped by SIGTERM after a checkpoint (start again with --resume),
21 storage, 70 bug.";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train; without CONFIG the built-in model on the built-in text
    Train(Train),
    /// Continue a prompt with text from a run's checkpoint
    Generate(Generate),
    /// Measure a run's validation loss
    Eval(Eval),
    /// Turn text into token shards, and check them
    #[command(subcommand)]
    Data(Data),
    /// List and check a run's checkpoints
    #[command(subcommand)]
    Checkpoint(Checkpoint),
    /// Find the first step and quantity in which two runs differ
    Diff(Diff),
    /// Say from a run's flight records which rank died or was late, and who waited for it
    Doctor(Doctor),
    /// Check before a long run that a layout gives the bits of one rank
    Verify(Verify),
    /// Print the resolved config, or the reference of all keys
    Config(Config),
    /// Train a dense and a sparse model of equal active compute on the same data, side by side
    Compare(crate::compare::Compare),
    /// Price layouts of a model on a cluster before a machine is rented
    Plan(Box<crate::plan::Plan>),
    /// Measure this machine: steps, products, folds, collectives, baselines
    #[command(subcommand)]
    Bench(crate::bench::Bench),
    /// Outlive a rank of an MPI job; started by the rank
    #[cfg(feature = "mpi")]
    #[command(hide = true)]
    Guard(Guard),
}

impl Command {
    /// Whether ranks can be processes that a launcher has started.
    pub fn can_be_one_of_several(&self) -> bool {
        match self {
            Self::Train(_) | Self::Verify(_) => true,
            Self::Bench(bench) => bench.can_be_one_of_several(),
            #[cfg(feature = "mpi")]
            Self::Guard(_) => true,
            _ => false,
        }
    }
}

/// `unisono train`
#[derive(Debug, Args)]
pub struct Train {
    /// TOML file; with --resume the run's own config if absent, otherwise the built-in one
    pub config: Option<PathBuf>,
    /// Ranks in this process; must divide the grid's slots [default: as many as there are cores]
    #[arg(long, value_name = "N", value_parser = count())]
    pub ranks: Option<usize>,
    /// Compute threads of each rank [default: cores / ranks]
    #[arg(long, value_name = "N", value_parser = count())]
    pub threads: Option<usize>,
    /// Pretend that the ranks are on nodes of these sizes, to try a layout: traffic between them counts as a network's
    #[arg(long, value_name = "N,N", value_delimiter = ',', value_parser = count())]
    pub nodes: Vec<usize>,
    /// The same as --set train.steps=N
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// Run folder [default: runs/DATE-TIME; with --resume the newest in runs/]
    #[arg(long, value_name = "DIR")]
    pub run: Option<PathBuf>,
    /// Go on from the newest checkpoint that verifies
    #[arg(long)]
    pub resume: bool,
    /// Write trace.json, which opens in Perfetto
    #[arg(long)]
    pub trace: bool,
    /// File of `unisono bench local`, by which the step is predicted [default: local.toml, if there is one]
    #[arg(long, value_name = "FILE")]
    pub machine: Option<PathBuf>,
    /// File that describes the hosts of an MPI job, by which the step is predicted
    #[arg(long, value_name = "FILE")]
    pub cluster: Option<PathBuf>,
    /// Override one key of the config; may be given again
    #[arg(long, value_name = "a.b=c")]
    pub set: Vec<String>,
}

/// `unisono generate`
#[derive(Debug, Args)]
pub struct Generate {
    /// Run folder
    #[arg(long, value_name = "DIR")]
    pub run: PathBuf,
    /// Step of the checkpoint [default: the newest that verifies]
    #[arg(long, value_name = "N")]
    pub step: Option<u64>,
    /// How the text begins [default: the run's sample.prompt]
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Tokens to generate [default: the run's sample.tokens]
    #[arg(long, value_name = "N")]
    pub tokens: Option<usize>,
    /// Divides the logits; 0 takes the likeliest token [default: the run's sample.temperature]
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Sample from the least set of tokens with this probability [default: the run's sample.top_p]
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Seed of the draw
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Compute threads [default: the cores]
    #[arg(long, value_name = "N", value_parser = count())]
    pub threads: Option<usize>,
}

/// `unisono eval`
#[derive(Debug, Args)]
pub struct Eval {
    /// Run folder
    #[arg(long, value_name = "DIR")]
    pub run: PathBuf,
    /// Step of the checkpoint [default: the newest that verifies]
    #[arg(long, value_name = "N")]
    pub step: Option<u64>,
    /// Ranks; the loss does not depend on them [default: as many as there are cores]
    #[arg(long, value_name = "N", value_parser = count())]
    pub ranks: Option<usize>,
    /// Compute threads of each rank [default: cores / ranks]
    #[arg(long, value_name = "N", value_parser = count())]
    pub threads: Option<usize>,
    /// Sequences to measure [default: the run's evaluation.sequences]
    #[arg(long, value_name = "N", value_parser = count())]
    pub sequences: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `unisono data`
#[derive(Debug, Subcommand)]
pub enum Data {
    /// Turn text files or JSON lines into a folder of token shards
    Prepare(Prepare),
    /// Read every byte of a dataset and compare it with its checksums
    Verify {
        /// Folder that `unisono data prepare` wrote
        folder: PathBuf,
    },
}

/// `unisono data prepare`
#[derive(Debug, Args)]
pub struct Prepare {
    /// Text files, or JSON lines with a "text" field
    #[arg(required = true, value_name = "INPUT")]
    pub inputs: Vec<PathBuf>,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// A Hugging Face tokenizer.json [default: the built-in tokenizer of 4,096 tokens]
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// The tokenizer's end-of-text token [default: found by the usual names]
    #[arg(long, value_name = "TOKEN", requires = "tokenizer")]
    pub end_of_text: Option<String>,
    /// What the inputs hold [default: by name, .jsonl, .ndjson and .json are JSON lines]
    #[arg(long, value_enum)]
    pub format: Option<Format>,
    /// What stands between the documents of a text file [default: one document a file]
    #[arg(long, value_name = "TEXT")]
    pub separator: Option<String>,
    /// Share of the text that is held back for validation; 0 for none
    #[arg(long, value_name = "SHARE", default_value_t = 0.05, allow_negative_numbers = true)]
    pub validation: f64,
    /// Hold back whole documents rather than chunks of them
    #[arg(long)]
    pub by_document: bool,
    /// Tokens of a full shard
    #[arg(long, value_name = "N", default_value_t = 100_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub shard_tokens: u64,
    /// Threads that encode; the result does not depend on them [default: the cores]
    #[arg(long, value_name = "N", value_parser = count())]
    pub threads: Option<usize>,
}

/// What input files hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// UTF-8 text
    Text,
    /// One JSON object a line, with a "text" field
    Jsonl,
}

/// `unisono checkpoint`
#[derive(Debug, Subcommand)]
pub enum Checkpoint {
    /// List a run's checkpoints
    Ls {
        /// Run folder
        run: PathBuf,
    },
    /// Read every byte of a run's checkpoints and compare it with the hashes
    Verify {
        /// Run folder
        run: PathBuf,
        /// Only this step
        #[arg(long, value_name = "N")]
        step: Option<u64>,
    },
}

/// `unisono diff`
#[derive(Debug, Args)]
pub struct Diff {
    /// One run folder
    pub first: PathBuf,
    /// The other
    pub second: PathBuf,
}

/// `unisono doctor`
#[derive(Debug, Args)]
pub struct Doctor {
    /// Run folder
    pub run: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// `unisono guard`
#[cfg(feature = "mpi")]
#[derive(Debug, Args)]
pub struct Guard {
    /// The rank
    pub rank: usize,
    /// The process of Open MPI that has started the rank, if one has
    #[arg(long)]
    pub daemon: Option<i32>,
    /// Run folder, if the job has one
    #[arg(long)]
    pub folder: Option<PathBuf>,
}

/// `unisono verify`
#[derive(Debug, Args)]
pub struct Verify {
    /// TOML file [default: the built-in config]
    pub config: Option<PathBuf>,
    /// Ranks to check against one; must divide the grid's slots [default: as many as there are cores, or as a launcher
    /// has started]
    #[arg(long, value_name = "N", value_parser = count())]
    pub ranks: Option<usize>,
    /// Compute threads of each rank [default: cores / ranks]
    #[arg(long, value_name = "N", value_parser = count())]
    pub threads: Option<usize>,
    /// Pretend that the ranks are on nodes of these sizes
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    pub nodes: Vec<usize>,
    /// Steps to train, with one rank and with N
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: u64,
    /// Folder for both runs, seen by all ranks, kept afterwards [default: a temporary one, kept if they differ]
    #[arg(long, value_name = "DIR")]
    pub run: Option<PathBuf>,
    /// Override one key of the config; may be given again
    #[arg(long, value_name = "a.b=c")]
    pub set: Vec<String>,
}

/// `unisono config`
#[derive(Debug, Args)]
pub struct Config {
    /// Print every field of the config, defaults and overrides included
    #[arg(long, required_unless_present = "reference")]
    pub print: bool,
    /// Print what every key means
    #[arg(long, conflicts_with_all = ["print", "config", "set"])]
    pub reference: bool,
    /// TOML file [default: the built-in config]
    pub config: Option<PathBuf>,
    /// Override one key of the config; may be given again
    #[arg(long, value_name = "a.b=c")]
    pub set: Vec<String>,
}

/// A number of ranks, threads or sequences: at least 1, and no more than any machine has.
pub fn count() -> impl clap::builder::TypedValueParser<Value = usize> {
    within(1..=65_536)
}

/// A number in a range.
pub fn within(range: std::ops::RangeInclusive<u64>) -> impl clap::builder::TypedValueParser<Value = usize> {
    use clap::builder::TypedValueParser;
    clap::builder::RangedU64ValueParser::<u64>::new().range(range).map(|number| number as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }
}
