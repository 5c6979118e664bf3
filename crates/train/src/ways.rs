//! One model trained in several ways, in turn: what a step takes, what of it is dispatch, what crosses between nodes.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use unisono_comm::{Communicator, Place, PretendedLink, ThreadRanks};
use unisono_data::Dataset;
use unisono_mesh::{Fold, LinkClass};
use unisono_model::Profile;
use unisono_plan::dispatch::kind;
use unisono_tensor::Cpu;

use crate::config::{RunConfig, WireConfig};
use crate::error::TrainError;
use crate::rank::RankState;
use crate::run::{check_nodes, root_cause};

/// Calls that bring rows to experts and back, with the counts and choices they need.
pub const DISPATCH_CALLS: [&str; 7] = [
    kind::DISPATCH,
    kind::DISPATCH_INSIDE,
    kind::COMBINE,
    kind::COMBINE_INSIDE,
    kind::COUNTS,
    kind::CHOICES,
    kind::WEIGHTS,
];

/// One way to train the model.
#[derive(Debug, Clone)]
pub struct Way {
    /// For people.
    pub name: String,
    /// The model and its layout.
    pub config: RunConfig,
    /// A pretended link between thread ranks.
    pub link: Option<PretendedLink>,
    /// Sums are those of the MPI library, see [`Place::sum_natively`].
    pub native_sums: bool,
}

/// What is measured.
#[derive(Debug, Clone)]
pub struct WaysBench {
    /// The ways, measured one after the other in each round.
    pub ways: Vec<Way>,
    /// Where the ranks are.
    pub place: Place,
    /// How many there are, one compute thread each.
    pub ranks: usize,
    /// Ranks of each pretended node, for thread ranks; empty for one node.
    pub nodes: Vec<usize>,
    /// Rounds.
    pub rounds: usize,
    /// Steps of a way in a round; one more before them warms up.
    pub steps: usize,
}

/// What was measured of one way: medians over steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WayMeasured {
    /// Its name.
    pub name: String,
    /// Seconds of a step on the slowest rank.
    pub step_s: f64,
    /// Seconds of a step that the rank which waited least spent in calls.
    pub communication_s: f64,
    /// Seconds of a step that ranks spent in calls of dispatch and combine, on average.
    pub dispatch_s: f64,
    /// Bytes of a step that went from node to node in such calls.
    pub crossing_bytes: f64,
    /// Rows that crossed to another node on the way to or from the experts, a token and layer and direction.
    pub copies: f64,
}

/// Numbers of one step: seconds, seconds of communication, seconds of dispatch, bytes between nodes in all calls of dispatch,
/// those of rows alone.
type Numbers = [f64; 5];

/// Trains in all ways, and returns what each took, on every rank the same.
///
/// # Errors
/// If a config cannot be run on so many ranks, the nodes do not share them out, or a way needs what its place has not.
pub fn bench_ways(bench: &WaysBench) -> Result<Vec<WayMeasured>, TrainError> {
    check_nodes(&bench.nodes, bench.ranks)?;
    let mut measured: Vec<Vec<Numbers>> = vec![Vec::new(); bench.ways.len()];
    for _ in 0..bench.rounds.max(1) {
        for (way, numbers) in bench.ways.iter().zip(&mut measured) {
            numbers.extend(steps(bench, way)?);
        }
    }
    Ok(bench.ways.iter().zip(measured).map(|(way, numbers)| summary(way, &numbers)).collect())
}

fn summary(way: &Way, numbers: &[Numbers]) -> WayMeasured {
    let median = |which: usize| {
        let mut list: Vec<f64> = numbers.iter().map(|step| step[which]).collect();
        list.sort_unstable_by(f64::total_cmp);
        list.get(list.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let config = &way.config;
    let bytes = match config.train.dispatch_wire {
        WireConfig::F32 => 4,
        WireConfig::Bf16 => 2,
    };
    let layers = (0..config.model.num_hidden_layers).filter(|&layer| config.model.is_moe(layer)).count();
    // To the experts and back, forward and backward.
    let chances = (4 * layers * config.tokens_per_step() * config.model.hidden_size * bytes) as f64;
    let mean = numbers.iter().map(|step| step[4]).sum::<f64>() / numbers.len() as f64;
    WayMeasured {
        name: way.name.clone(),
        step_s: median(0),
        communication_s: median(1),
        dispatch_s: median(2),
        crossing_bytes: median(3),
        copies: mean / chances,
    }
}

/// The numbers of every step but the first, joined over ranks.
fn steps(bench: &WaysBench, way: &Way) -> Result<Vec<Numbers>, TrainError> {
    let config = &way.config;
    config.validate()?;
    let tokens = config.tokens_per_step() * (bench.steps + 1) + 1;
    let dataset = Dataset::random(1, tokens, config.model.vocab_size.min(4096) as u32)?;
    let fold = Fold::new(config.grid, bench.ranks)?;
    let body = |comm: Communicator| {
        let profile = Profile::new(Instant::now());
        let mut state = RankState::new(config, &dataset, Cpu::new(1), fold, comm.clone(), profile)?;
        let mut own: Vec<f64> = Vec::new();
        for step in 0..=bench.steps {
            comm.barrier()?;
            let (begin, before) = (Instant::now(), comm.ledger());
            state.step()?;
            if step > 0 {
                let moved = comm.ledger().since(&before);
                let dispatch = || moved.rows.iter().filter(|row| DISPATCH_CALLS.contains(&&*row.kind));
                let crossing = || dispatch().filter(|row| row.link == LinkClass::OtherNode);
                let rows = crossing().filter(|row| [kind::DISPATCH, kind::COMBINE].contains(&&*row.kind));
                own.extend([
                    begin.elapsed().as_secs_f64(),
                    moved.rows.iter().map(|row| row.wait_seconds + row.move_seconds).sum(),
                    dispatch().map(|row| row.wait_seconds + row.move_seconds).sum(),
                    crossing().map(|row| row.bytes_sent).sum::<u64>() as f64,
                    rows.map(|row| row.bytes_sent).sum::<u64>() as f64,
                ]);
            }
        }
        let all = comm.all_gather_values(&own)?;
        let of = |step: usize, which: usize| all.iter().map(move |rank| rank[5 * step + which]);
        let join = |step: usize| {
            let dispatch = of(step, 2).sum::<f64>() / all.len() as f64;
            let (longest, least) =
                (of(step, 0).fold(0.0, f64::max), of(step, 1).fold(f64::INFINITY, f64::min));
            [longest, least, dispatch, of(step, 3).sum(), of(step, 4).sum()]
        };
        Ok::<_, TrainError>((0..bench.steps).map(join).collect::<Vec<Numbers>>())
    };
    if !bench.place.sum_natively(way.native_sums) {
        return Err(TrainError::Refused("the MPI library's sums are there under mpirun only".into()));
    }
    let ranks = ThreadRanks::new(bench.ranks).nodes(&bench.nodes).link(way.link);
    let ranks = bench.place.run(&ranks, body).map_err(root_cause);
    bench.place.sum_natively(false);
    Ok(ranks?.into_iter().next().unwrap_or_default())
}
