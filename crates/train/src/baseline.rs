//! One training step synchronised three ways: whole gradients to one reducer, tensor by tensor over parameter servers,
//! and the engine's own.
//!
//! The first two replicate every expert on every rank, as data parallelism in the MapReduce and parameter-server
//! tradition does; the third shards experts, dispatches tokens and shards the optimizer. All make the same update: same
//! batches, schedule, clipping, decay and moments, so that parameters differ by the order of sums alone.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use unisono_comm::{Communicator, Ledger, ThreadRanks};
use unisono_data::Dataset;
use unisono_mesh::{Fold, Grid};
use unisono_model::{Lane, Profile};
use unisono_tensor::Cpu;

use crate::central::Central;
use crate::config::{ReduceEvery, RunConfig};
use crate::crew::lending;
use crate::error::TrainError;
use crate::rank::RankState;
use crate::run::root_cause;
use crate::ways::DISPATCH_CALLS;

/// How gradients and parameters are synchronised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Synchronisation {
    /// Every rank sends its whole gradient to rank 0, which sums, updates and broadcasts.
    MapReduce,
    /// Each tensor has a server among the ranks, the one that has the least so far; every rank pushes its gradient and
    /// pulls the parameters.
    ParameterServer,
    /// Experts sharded with all-to-all dispatch; reduce-scatter, sharded update, all-gather.
    Unisono,
}

/// What one way took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BaselineMeasured {
    /// The way.
    pub synchronisation: Synchronisation,
    /// Ranks.
    pub ranks: usize,
    /// Bytes that the busiest rank sends and receives in a step.
    pub busiest_rank_bytes: u64,
    /// Bytes that all ranks send in a step.
    pub total_bytes: u64,
    /// Those of them that bring rows to experts and back, which only the third way has.
    pub dispatched_bytes: u64,
    /// Median seconds of a step.
    pub step_s: f64,
    /// Median seconds of it that rank 0 spent in calls that move data, for the third way dispatch too: copies, waits for
    /// other ranks and sums of gradients are in it, allocation of moments and AdamW are not.
    pub communication_s: f64,
}

/// Measures one way at `ranks` ranks, one replica a rank, over `steps` steps after one to warm up.
///
/// # Errors
/// If the config cannot be run with that many replicas.
pub fn bench_baseline(
    config: &RunConfig,
    dataset: &Dataset,
    synchronisation: Synchronisation,
    ranks: usize,
    steps: usize,
) -> Result<BaselineMeasured, TrainError> {
    let config = config_of(config, synchronisation, ranks);
    config.validate()?;
    let fold = Fold::new(config.grid, ranks)?;
    let (threads, crew) = lending(ThreadRanks::new(ranks), ranks);
    let body = |comm: Communicator| {
        let backend = Cpu::in_crew(1, &crew, comm.rank());
        run_rank(&config, dataset, backend, synchronisation, fold, steps, comm)
    };
    let outcomes = threads.run(body).map_err(root_cause)?;
    let mut ledger = Ledger::default();
    outcomes.iter().for_each(|outcome| ledger.merge(&outcome.ledger));
    let per_step = |bytes: u64| bytes / steps as u64;
    let busiest = ledger.busiest_rank().map_or(0, |rank| rank.bytes_sent + rank.bytes_received);
    let total = ledger.ranks.iter().map(|rank| rank.bytes_sent).sum();
    Ok(BaselineMeasured {
        synchronisation,
        ranks,
        busiest_rank_bytes: per_step(busiest),
        total_bytes: per_step(total),
        dispatched_bytes: per_step(ledger.sent_in(&DISPATCH_CALLS)),
        step_s: median(&outcomes[0].steps),
        communication_s: median(&outcomes[0].communication),
    })
}

/// The config with one replica a rank; central ways need every gradient whole, joined once a step.
fn config_of(config: &RunConfig, synchronisation: Synchronisation, ranks: usize) -> RunConfig {
    let mut config = config.clone();
    let central = synchronisation != Synchronisation::Unisono;
    config.grid = Grid { replicas: ranks, expert_group: if central { 1 } else { ranks }, ..Grid::default() };
    if central {
        (config.layout.zero, config.train.reduce_every) = (1, ReduceEvery::Step);
    }
    config
}

/// A rank that trains one way.
struct Trainer<'a> {
    state: RankState<'a, Cpu>,
    /// None for our way.
    central: Option<Central>,
}

impl<'a> Trainer<'a> {
    fn new(
        config: &'a RunConfig,
        dataset: &'a Dataset,
        backend: Cpu,
        synchronisation: Synchronisation,
        fold: Fold,
        comm: Communicator,
    ) -> Result<Self, TrainError> {
        let profile = Profile::new(Instant::now());
        let state = RankState::new(config, dataset, backend.clone(), fold, comm.clone(), profile.clone())?;
        let central = |one| Central::new(state.model().layout(), backend, comm, profile, one);
        let central = match synchronisation {
            Synchronisation::MapReduce => Some(central(true)),
            Synchronisation::ParameterServer => Some(central(false)),
            Synchronisation::Unisono => None,
        };
        Ok(Self { state, central })
    }

    fn step(&mut self) -> Result<(), TrainError> {
        match &mut self.central {
            Some(central) => self.state.step_centrally(central),
            None => self.state.step().map(|_| ()),
        }
    }

    /// Seconds in calls that move data so far.
    fn communication_s(&self) -> f64 {
        self.state.model().profile().total(Lane::Communication).as_secs_f64()
    }
}

struct Outcome {
    ledger: Ledger,
    steps: Vec<f64>,
    communication: Vec<f64>,
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn run_rank(
    config: &RunConfig,
    dataset: &Dataset,
    backend: Cpu,
    synchronisation: Synchronisation,
    fold: Fold,
    steps: usize,
    comm: Communicator,
) -> Result<Outcome, TrainError> {
    let mut trainer = Trainer::new(config, dataset, backend, synchronisation, fold, comm.clone())?;
    let mut outcome = Outcome { ledger: Ledger::default(), steps: Vec::new(), communication: Vec::new() };
    trainer.step()?;
    let before = comm.ledger();
    for _ in 0..steps {
        let (begin, busy) = (Instant::now(), trainer.communication_s());
        trainer.step()?;
        outcome.steps.push(begin.elapsed().as_secs_f64());
        outcome.communication.push(trainer.communication_s() - busy);
    }
    outcome.ledger = comm.ledger().since(&before);
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::central::served_bytes;
    use crate::rank::Progress;
    use std::collections::BTreeMap;
    use unisono_comm::kind;
    use unisono_mesh::LinkClass;
    use unisono_plan::{Layout, ModelConfig};

    const STEPS: usize = 3;
    /// Largest distance of parameters, relative to how far the steps moved them: sums are in another order.
    const TOLERANCE: f64 = 3e-5;
    const CENTRAL: [Synchronisation; 2] = [Synchronisation::MapReduce, Synchronisation::ParameterServer];

    fn config() -> RunConfig {
        let mut config = RunConfig {
            model: ModelConfig {
                vocab_size: 64,
                hidden_size: 32,
                num_hidden_layers: 2,
                num_attention_heads: 2,
                num_key_value_heads: 1,
                head_dim: 8,
                intermediate_size: 48,
                moe_intermediate_size: 24,
                num_experts: 8,
                top_k: 2,
                ..ModelConfig::default()
            },
            ..RunConfig::default()
        };
        (config.train.sequence_length, config.train.clip_norm) = (16, 0.5);
        (config.schedule.warmup_steps, config.train.steps) = (2, 4);
        config
    }
    /// By name, of all ranks; those that hold the same have the same bits.
    type Parameters = BTreeMap<String, Vec<f32>>;

    fn parameters_of(state: &RankState<'_, Cpu>) -> Parameters {
        let (layout, parameters) = (state.model().layout(), state.parameters());
        let mut all = Parameters::new();
        for unit in 0..layout.units() {
            for spec in layout.unit_tensors(unit) {
                all.insert(spec.name.clone(), parameters.read(unit, spec.range()));
            }
        }
        for layer in layout.moe_layers() {
            let unit = Layout::layer_unit(layer);
            for (index, expert) in state.model().held_experts().iter().enumerate() {
                let start = layout.unit_len(unit) + index * layout.expert_len();
                for (which, spec) in layout.expert.iter().enumerate() {
                    let range = start + spec.range().start..start + spec.range().end;
                    let name = layout.expert_tensor_name(layer, *expert, which);
                    all.insert(name, parameters.read(unit, range));
                }
            }
        }
        all
    }

    /// Parameters after so many steps, and each rank's ledger of the last.
    fn train(config: &RunConfig, way: Synchronisation, steps: usize) -> (Parameters, Vec<Ledger>) {
        config.validate().expect("the test's config is valid");
        let dataset = Dataset::random(1, 4096, 64).expect("random tokens");
        let ranks = config.grid.replicas;
        let fold = Fold::new(config.grid, ranks).expect("one replica a rank");
        let body = |comm: Communicator| {
            let mut trainer = Trainer::new(config, &dataset, Cpu::new(1), way, fold, comm.clone())?;
            let mut before = comm.ledger();
            for _ in 0..steps {
                before = comm.ledger();
                trainer.step()?;
            }
            let Progress { step, updates, .. } = trainer.state.progress();
            assert_eq!([step, updates], [steps as u64; 2]);
            Ok::<_, TrainError>((parameters_of(&trainer.state), comm.ledger().since(&before)))
        };
        let outcomes = ThreadRanks::new(ranks).run(body).expect("the steps succeed");
        let (mut all, mut ledgers) = (Parameters::new(), Vec::new());
        for (parameters, ledger) in outcomes {
            for (name, values) in parameters {
                if let Some(others) = all.insert(name.clone(), values) {
                    assert!(others == all[&name], "{way:?}: ranks differ in {name}");
                }
            }
            ledgers.push(ledger);
        }
        (all, ledgers)
    }

    fn distance(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(a - b) * f64::from(a - b)).sum::<f64>().sqrt()
    }

    #[test]
    fn central_ways_make_our_steps() {
        for ranks in [2, 4] {
            let replicated = config_of(&config(), Synchronisation::MapReduce, ranks);
            let sharded = config_of(&config(), Synchronisation::Unisono, ranks);
            let (start, _) = train(&replicated, Synchronisation::Unisono, 0);
            let ours = [&replicated, &sharded].map(|config| train(config, Synchronisation::Unisono, STEPS).0);
            for way in CENTRAL {
                let (theirs, _) = train(&replicated, way, STEPS);
                for ours in &ours {
                    assert_eq!(ours.len(), theirs.len());
                    for (name, values) in ours {
                        let moved = distance(values, &start[name]);
                        let apart = distance(values, &theirs[name]);
                        assert!(moved > 0.0, "{name} did not move");
                        assert!(
                            apart <= TOLERANCE * moved,
                            "{way:?} at {ranks} ranks: {name} is {apart} from ours, which moved by {moved}"
                        );
                    }
                }
            }
        }
    }

    /// S bytes of parameters, n ranks. The one reducer takes S from n - 1 ranks and gives S to them. A server of P bytes does
    /// so with P, and gives and takes the other S - P once.
    #[test]
    fn bytes_are_those_of_closed_formulas() {
        for ranks in [2, 4, 8] {
            let config = config_of(&config(), Synchronisation::MapReduce, ranks);
            let layout = Layout::new(&config.model);
            let all = 4 * layout.parameters(config.model.top_k).0 as u64;
            let others = ranks as u64 - 1;
            for way in CENTRAL {
                let one = way == Synchronisation::MapReduce;
                let served = served_bytes(&layout, if one { 1 } else { ranks });
                assert_eq!(served.iter().sum::<u64>(), all);
                let (_, ledgers) = train(&config, way, 1);
                let mut through = Vec::new();
                for (rank, ledger) in ledgers.iter().enumerate() {
                    let own = served.get(rank).copied().unwrap_or(0);
                    let rows = ledger.rows.iter().filter(|row| row.link != LinkClass::SameRank);
                    let rows = rows.filter(|row| [kind::SEND, kind::BROADCAST].contains(&row.kind.as_str()));
                    let moved = rows.map(|row| [row.bytes_sent, row.bytes_received]);
                    let moved = moved.fold([0; 2], |sum, row| [sum[0] + row[0], sum[1] + row[1]]);
                    assert_eq!(moved, [others * own + all - own; 2], "{way:?}, rank {rank} of {ranks}");
                    through.push(moved[0] + moved[1]);
                }
                let busiest = through.into_iter().max().unwrap_or(0);
                let largest = served.iter().max().copied().unwrap_or(0);
                match one {
                    true => assert_eq!(busiest, 2 * others * all),
                    false => assert_eq!(busiest, 2 * all + 2 * (others - 1) * largest),
                }
                assert!(largest < all / served.len() as u64 + all / 10, "servers are even");

                let dataset = Dataset::random(1, 4096, 64).expect("random tokens");
                let measured = bench_baseline(&config, &dataset, way, ranks, 1).expect("it runs");
                let control = measured.busiest_rank_bytes - busiest;
                assert!(control < 8192, "{control} bytes of losses, counts and the norm");
                assert!(measured.communication_s > 0.0 && measured.communication_s <= measured.step_s);
            }
        }
    }
}
