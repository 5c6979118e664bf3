//! How much of the gathers of ZeRO-3 hides behind computation: steps with overlap, without, and without a link.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use unisono_comm::{Communicator, PretendedLink, ThreadRanks, kind};
use unisono_data::Dataset;
use unisono_mesh::Fold;
use unisono_model::Profile;
use unisono_tensor::Cpu;

use crate::config::RunConfig;
use crate::error::TrainError;
use crate::rank::RankState;
use crate::run::root_cause;

/// What is measured.
#[derive(Debug, Clone)]
pub struct OverlapBench {
    /// The computation; every rank is a node of its own.
    pub config: RunConfig,
    /// Ranks, one thread each.
    pub ranks: usize,
    /// Bytes a second of each rank's pretended link, which gathers take.
    pub bytes_per_s: f64,
    /// Rounds of the three ways, one after the other.
    pub rounds: usize,
    /// Steps of a round; the first warms up.
    pub steps: usize,
}

/// Median seconds of a step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct OverlapMeasured {
    /// Gathers run ahead while units compute.
    pub overlapped_s: f64,
    /// Every gather is waited for where it is needed.
    pub serial_s: f64,
    /// Gathers arrive at once; what is left of them are memory copies.
    pub without_s: f64,
}

impl OverlapMeasured {
    /// The share of the link's time that is hidden.
    pub fn hidden(&self) -> f64 {
        1.0 - (self.overlapped_s - self.without_s) / (self.serial_s - self.without_s)
    }
}

/// Runs the three ways in turn and takes the median step of each.
///
/// # Errors
/// If the config cannot be run on so many ranks.
pub fn bench_overlap(bench: &OverlapBench) -> Result<OverlapMeasured, TrainError> {
    bench.config.validate()?;
    let tokens = bench.config.tokens_per_step() * 4 + 1;
    let dataset = Dataset::random(1, tokens, bench.config.model.vocab_size.min(4096) as u32)?;
    let link = PretendedLink { bytes_per_s: bench.bytes_per_s, kind: kind::ALL_GATHER };
    let ways = [(true, Some(link)), (false, Some(link)), (true, None)];
    let mut times: [Vec<f64>; 3] = Default::default();
    for _ in 0..bench.rounds {
        for ((overlap, link), times) in ways.into_iter().zip(&mut times) {
            times.extend(steps(bench, &dataset, overlap, link)?);
        }
    }
    let [overlapped_s, serial_s, without_s] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
    });
    Ok(OverlapMeasured { overlapped_s, serial_s, without_s })
}

/// Seconds of every step but the first, on rank 0.
fn steps(
    bench: &OverlapBench,
    dataset: &Dataset,
    overlap: bool,
    link: Option<PretendedLink>,
) -> Result<Vec<f64>, TrainError> {
    let mut config = bench.config.clone();
    config.layout.overlap = overlap;
    let fold = Fold::new(config.grid, bench.ranks)?;
    let body = |comm: Communicator| {
        let profile = Profile::new(Instant::now());
        let mut state = RankState::new(&config, dataset, Cpu::new(1), fold, comm, profile)?;
        let mut times = Vec::with_capacity(bench.steps);
        for _ in 0..bench.steps {
            times.push(state.step()?.step_s);
        }
        Ok::<_, TrainError>(times.split_off(1.min(times.len())))
    };
    let ranks = ThreadRanks::new(bench.ranks).nodes(&vec![1; bench.ranks]).link(link);
    let times = ranks.run(body).map_err(root_cause)?;
    Ok(times.into_iter().next().unwrap_or_default())
}
