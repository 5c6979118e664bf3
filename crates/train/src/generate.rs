//! Text from a run's checkpoint, and its validation loss.

use std::path::Path;
use std::time::Instant;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use unisono_checkpoint::{Reader, latest};
use unisono_comm::{Communicator, ThreadRanks};
use unisono_data::Tokenizer;
use unisono_mesh::{Fold, Grid};
use unisono_model::{Decoder, Profile};
use unisono_tensor::Cpu;

use crate::checkpointing::{Extra, restore_parameters};
use crate::config::{LayoutConfig, RunConfig, SampleConfig};
use crate::error::TrainError;
use crate::rank::{RankState, initial_model};
use crate::record::ValidationRecord;
use crate::run::{open_tokenizer, open_validation, read_extra};
use crate::run_folder::CHECKPOINTS;

/// How text is drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// What to say, how much, and how boldly.
    pub sample: SampleConfig,
    /// Seed of the draw.
    pub seed: u64,
    /// Compute threads.
    pub threads: usize,
}

/// A run's checkpoint, open.
pub struct Opened {
    reader: Reader,
    extra: Extra,
    /// Newer checkpoints that were passed over, and why.
    pub rejected: Vec<String>,
}

impl Opened {
    /// The checkpoint of `step`, or the newest of the run in `folder` that verifies.
    ///
    /// # Errors
    /// If there is none.
    pub fn new(folder: &Path, step: Option<u64>) -> Result<Self, TrainError> {
        let dir = folder.join(CHECKPOINTS);
        let (step, rejected) = match step {
            Some(step) => (step, Vec::new()),
            None => newest(folder)?,
        };
        let reader = Reader::open(&dir, step)?;
        Ok(Self { extra: read_extra(&reader)?, reader, rejected })
    }

    /// The config that the run was last started with before.
    pub fn config(&self) -> &RunConfig {
        &self.extra.config
    }
}

fn newest(folder: &Path) -> Result<(u64, Vec<String>), TrainError> {
    let found = latest(&folder.join(CHECKPOINTS), &|| ())?;
    let rejected: Vec<String> =
        found.rejected.iter().map(|(step, why)| format!("step {step}: {why}")).collect();
    let step = found.step.ok_or_else(|| {
        let name = folder.display();
        let remedy = match (rejected.as_slice(), folder.is_file()) {
            ([], true) => "it is a file; name the folder of a run".into(),
            ([], false) => format!("train first, with `unisono train --run {name}`"),
            (reasons, _) => format!("{}; train anew with another --run", reasons.join("; ")),
        };
        TrainError::Refused(format!("{name} has no checkpoint that verifies: {remedy}"))
    })?;
    Ok((step, rejected))
}

/// Continues the prompt with text drawn from a checkpoint. `say` is given the prompt once all is open, and each piece as it
/// comes; what is returned begins behind the prompt.
///
/// # Errors
/// If the checkpoint is damaged or the run's data cannot be opened.
pub fn generate(
    opened: &Opened,
    options: &GenerateOptions,
    say: &(dyn Fn(&str) + Sync),
) -> Result<String, TrainError> {
    let mut config = opened.extra.config.clone();
    // One sequence on one rank: whatever the grid was, every expert is here.
    config.grid = Grid { expert_nodes: config.grid.expert_nodes, ..Grid::default() };
    config.layout = LayoutConfig::default();
    let fold = Fold::new(config.grid, 1)?;
    let tokenizer = open_tokenizer(&config)?;
    let body = |comm: Communicator| {
        let profile = Profile::new(Instant::now());
        let (model, _, mut parameters) =
            initial_model(&config, Cpu::new(options.threads), fold, &comm, profile)?;
        restore_parameters(&mut parameters, model.layout(), &opened.reader)?;
        say(&options.sample.prompt);
        let decoder = Decoder::new(&model, &parameters);
        continue_text(&decoder, &tokenizer, config.train.sequence_length, options, say)
    };
    let texts: Vec<String> = ThreadRanks::new(1).run(body).map_err(crate::run::root_cause)?;
    Ok(texts.concat())
}

/// `room` is the longest sequence that the model was trained on.
fn continue_text(
    decoder: &Decoder<'_, Cpu>,
    tokenizer: &Tokenizer,
    room: usize,
    options: &GenerateOptions,
    say: &(dyn Fn(&str) + Sync),
) -> Result<String, TrainError> {
    let mut tokens = tokenizer.encode(&options.sample.prompt)?;
    if tokens.is_empty() {
        tokens.push(tokenizer.eot_id());
    }
    let half = (room / 2).max(1);
    let mut generator = ChaCha8Rng::seed_from_u64(options.seed);
    let mut stream = tokenizer.decode_stream();
    let mut text = String::new();
    let mut cache = decoder.cache(room);
    let mut next: Vec<u32> = tokens[tokens.len().saturating_sub(half)..].to_vec();
    for _ in 0..options.sample.tokens {
        if cache.len() + next.len() > cache.capacity() {
            // The window is full: begin again with its newer half.
            cache = decoder.cache(room);
            next = tokens[tokens.len().saturating_sub(half)..].to_vec();
        }
        let logits = decoder.advance(&mut cache, &next)?;
        let logits = &logits[..tokenizer.vocab_size() as usize];
        let token = draw(logits, options.sample.temperature, options.sample.top_p, &mut generator);
        if token == tokenizer.eot_id() {
            break;
        }
        tokens.push(token);
        next = vec![token];
        let piece = stream.push(token)?;
        say(&piece);
        text.push_str(&piece);
    }
    let rest = stream.finish()?;
    say(&rest);
    Ok(text + &rest)
}

/// One token from `logits`: the likeliest at temperature 0, otherwise from the least set of likeliest tokens whose
/// probability reaches `top_p` (Holtzman et al., 2020).
fn draw(logits: &[f32], temperature: f32, top_p: f32, generator: &mut ChaCha8Rng) -> u32 {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
    if temperature == 0.0 {
        return order[0];
    }
    let largest = f64::from(logits[order[0] as usize]);
    let weight = |id: u32| libm::exp((f64::from(logits[id as usize]) - largest) / f64::from(temperature));
    let weights: Vec<f64> = order.iter().map(|id| weight(*id)).collect();
    let total: f64 = weights.iter().sum();
    let mut reached = 0.0;
    let kept = weights.iter().position(|w| {
        reached += w;
        reached >= f64::from(top_p) * total
    });
    let kept = kept.map_or(weights.len(), |last| last + 1);
    let uniform = (generator.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let mut left = uniform * weights[..kept].iter().sum::<f64>();
    for (id, weight) in order[..kept].iter().zip(&weights) {
        left -= weight;
        if left < 0.0 {
            return *id;
        }
    }
    order[kept - 1]
}

/// Validation loss of a checkpoint, on `ranks` ranks (which must divide the run's slots).
///
/// # Errors
/// If the checkpoint is damaged, the run's data cannot be opened, or the ranks do not divide its slots.
pub fn evaluate(
    opened: &Opened,
    ranks: usize,
    threads: usize,
    sequences: usize,
) -> Result<Option<ValidationRecord>, TrainError> {
    let mut config = opened.extra.config.clone();
    config.layout = LayoutConfig::default();
    let fold = Fold::new(config.grid, ranks)?;
    let dataset = open_validation(&config, ranks * threads)?;
    let body = |comm: Communicator| {
        let (backend, profile) = (Cpu::new(threads), Profile::new(Instant::now()));
        let mut state = RankState::new(&config, &dataset, backend, fold, comm, profile)?;
        state.restore(&opened.reader, &opened.extra)?;
        state.validate(sequences)
    };
    let records = ThreadRanks::new(ranks).run(body).map_err(crate::run::root_cause)?;
    Ok(records.into_iter().next().flatten())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_only_from_the_likeliest_tokens() {
        let mut generator = ChaCha8Rng::seed_from_u64(1);
        let logits = [0.0, 3.0, 2.0, -1.0];
        let mut seen = [0; 4];
        for _ in 0..1000 {
            seen[draw(&logits, 1.0, 0.9, &mut generator) as usize] += 1;
        }
        assert!(seen[1] > seen[2] && seen[2] > 100, "{seen:?}");
        assert_eq!((seen[0], seen[3]), (0, 0));
        assert_eq!(draw(&logits, 0.0, 1.0, &mut generator), 1);
    }
}
