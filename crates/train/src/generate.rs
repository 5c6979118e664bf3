//! Text from a run's checkpoint, and its validation loss.

use std::path::Path;
use std::time::Instant;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use unisono_checkpoint::{Reader, latest};
use unisono_comm::{Communicator, ThreadRanks};
use unisono_mesh::{Fold, Grid};
use unisono_model::{Decoder, Profile};
use unisono_tensor::Cpu;

use crate::config::{LayoutConfig, RunConfig, SampleConfig};
use crate::error::TrainError;
use crate::rank::RankState;
use crate::record::ValidationRecord;
use crate::run::{open_dataset, read_extra};
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
    /// The checkpoint's step; the newest good one if absent.
    pub step: Option<u64>,
}

/// The checkpoint to read: that of `step`, or the newest that verifies.
fn open_checkpoint(folder: &Path, step: Option<u64>) -> Result<Reader, TrainError> {
    let dir = folder.join(CHECKPOINTS);
    let step = match step {
        Some(step) => step,
        None => latest(&dir)?.step.ok_or_else(|| {
            TrainError::Resume(format!(
                "{} has no checkpoint that verifies: train first, with `unisono train --run {}`",
                folder.display(),
                folder.display()
            ))
        })?,
    };
    Ok(Reader::open(&dir, step)?)
}

/// Restores a run's newest state on `fold`'s ranks and calls `work` on each.
fn with_state<T: Send>(
    folder: &Path,
    step: Option<u64>,
    ranks: Option<usize>,
    threads: usize,
    work: impl Fn(&mut RankState<'_, Cpu>) -> Result<T, TrainError> + Sync,
) -> Result<Vec<T>, TrainError> {
    let reader = open_checkpoint(folder, step)?;
    let extra = read_extra(&reader)?;
    let mut config = extra.config.clone();
    let ranks = ranks.unwrap_or_else(|| {
        // One sequence on one rank: whatever the grid was, every expert is here.
        config.grid = Grid { expert_nodes: config.grid.expert_nodes, ..Grid::default() };
        1
    });
    config.layout = LayoutConfig::default();
    let fold = Fold::new(config.grid, ranks)?;
    let dataset = open_dataset(&config, ranks * threads)?;
    let body = |comm: Communicator| {
        let backend = Cpu::new(threads);
        let mut state = RankState::new(&config, &dataset, backend, fold, comm, Profile::new(Instant::now()))?;
        state.restore(&Reader::open(&folder.join(CHECKPOINTS), reader.step())?, &extra)?;
        work(&mut state)
    };
    ThreadRanks::new(ranks).run(body).map_err(crate::run::root_cause)
}

/// Continues the prompt with text drawn from a run's checkpoint; `say` is given each piece as it comes.
///
/// # Errors
/// If the run has no good checkpoint or its data cannot be opened.
pub fn generate(
    folder: &Path,
    options: &GenerateOptions,
    say: &(dyn Fn(&str) + Sync),
) -> Result<String, TrainError> {
    let texts =
        with_state(folder, options.step, None, options.threads, |state| continue_text(state, options, say))?;
    Ok(texts.concat())
}

fn continue_text(
    state: &RankState<'_, Cpu>,
    options: &GenerateOptions,
    say: &(dyn Fn(&str) + Sync),
) -> Result<String, TrainError> {
    let tokenizer = state.dataset().tokenizer();
    let mut tokens = tokenizer.encode(&options.sample.prompt)?;
    if tokens.is_empty() {
        tokens.push(tokenizer.eot_id());
    }
    let room = state.config().train.sequence_length;
    let decoder = Decoder::new(state.model(), state.parameters());
    let mut generator = ChaCha8Rng::seed_from_u64(options.seed);
    let mut stream = tokenizer.decode_stream();
    let mut text = String::new();
    let mut cache = decoder.cache(room);
    let mut next: Vec<u32> = tokens[tokens.len().saturating_sub(room / 2)..].to_vec();
    for _ in 0..options.sample.tokens {
        if cache.len() + next.len() > cache.capacity() {
            // The window is full: begin again with its newer half.
            cache = decoder.cache(room);
            next = tokens[tokens.len() - room / 2..].to_vec();
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

/// Validation loss of a run's checkpoint, on `ranks` ranks (which must divide the run's slots).
///
/// # Errors
/// If the run has no good checkpoint, its data cannot be opened, or the ranks do not divide its slots.
pub fn evaluate(
    folder: &Path,
    step: Option<u64>,
    ranks: usize,
    threads: usize,
    sequences: usize,
) -> Result<Option<ValidationRecord>, TrainError> {
    let records = with_state(folder, step, Some(ranks), threads, |state| state.validate(sequences))?;
    Ok(records.into_iter().next().flatten())
}

/// The config a run was started with.
///
/// # Errors
/// If the run has no good checkpoint.
pub fn checkpoint_config(folder: &Path, step: Option<u64>) -> Result<RunConfig, TrainError> {
    Ok(read_extra(&open_checkpoint(folder, step)?)?.config)
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
