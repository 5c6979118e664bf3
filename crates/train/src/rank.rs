//! One rank's training state and its step.

use std::convert::Infallible;
use std::ops::Range;
use std::rc::Rc;
use std::time::Instant;

use unisono_comm::{CommError, Communicator, Ledger};
use unisono_data::Dataset;
use unisono_mesh::{Fold, tree};
use unisono_model::{
    Lane, LossScale, Profile, Recompute, SlotLosses, Transformer, initialize_expert, initialize_unit,
};
use unisono_plan::dispatch::Census;
use unisono_plan::engine::{Traffic, TrafficPlan};
use unisono_plan::{Layout, SegmentKind, Shards, StepMemory};
use unisono_tensor::{AdamW, Backend, Buffer, Cpu};

use crate::central::Central;
use crate::config::{RecomputeConfig, ReduceEvery, RunConfig};
use crate::engine_layout::{dispatch_shape, engine_layout};
use crate::error::TrainError;
use crate::feed::{Fed, Feed};
use crate::memory::slot_rows;
use crate::optimizer::{ShardedAdamW, adamw_step};
use crate::parameters::ShardedParameters;
use crate::record::{StepRecord, ValidationRecord};
use crate::reduction::{GradientReducer, StepGradients, passes};
use crate::schedule::learning_rate;

/// A rank of a run.
pub struct RankState<'a, B: Backend> {
    pub(crate) config: &'a RunConfig,
    pub(crate) fold: Fold,
    pub(crate) comm: Communicator,
    pub(crate) model: Transformer<B>,
    pub(crate) parameters: ShardedParameters<B>,
    reducer: GradientReducer<B>,
    states_bytes: usize,
    pub(crate) optimizer: ShardedAdamW<B>,
    pub(crate) progress: Progress,
    dataset: &'a Dataset,
    feed: Feed<'a>,
    fault: Option<Fault>,
    traffic: TrafficPlan,
    predicted: Traffic,
    moved: Ledger,
    memory: StepMemory,
    memory_as_routed: u64,
}

/// What changes from step to step besides tensors; the small state of a checkpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// Updates made: steps that were not skipped.
    pub updates: u64,
    /// Tokens read.
    pub tokens: u64,
}

/// Something that goes wrong, for tests of the numerics contract, of non-finite numbers, of skewed routing and of the
/// watchdog.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// One element of the joined gradient moves by one unit in the last place at this step.
    NudgeGradient {
        /// The step.
        step: u64,
        /// Which element of rank 0's shard, counting those that are not zero.
        element: usize,
    },
    /// The balance bias of an expert is raised before the first step so far that every token chooses it.
    CrowdExpert {
        /// The expert.
        expert: usize,
    },
    /// One element of the joined gradient becomes NaN at this step.
    PoisonGradient {
        /// The step.
        step: u64,
    },
    /// The loss of the last rank's first slot becomes infinite at this step; the gradient stays as it is.
    PoisonLoss {
        /// The step.
        step: u64,
    },
    /// A rank does not come to the first call of a kind at this step, nor to anything else until the run has failed.
    Stall {
        /// The step.
        step: u64,
        /// The rank.
        rank: usize,
        /// The call, for example `dispatch`.
        kind: &'static str,
    },
}

/// Sums of one step on one rank, by slot.
#[derive(Default)]
struct Sums {
    /// `(losses, target tokens, bytes of text)` of each slot.
    slots: Vec<(SlotLosses, u64, u64)>,
    /// `[MoE layer][expert]`
    counts: Vec<Vec<u64>>,
    /// `[pass][MoE layer]`
    census: Vec<Vec<Census>>,
    data_s: f64,
}

/// A rank's model with initial parameters, and who owns what of them.
pub(crate) type InitialModel<B> = (Transformer<B>, Rc<Shards>, ShardedParameters<B>);

/// The model of one rank at step 0.
///
/// # Errors
/// If groups cannot be made.
pub(crate) fn initial_model<B: Backend>(
    config: &RunConfig,
    backend: B,
    fold: Fold,
    comm: &Communicator,
    profile: Profile,
) -> Result<InitialModel<B>, TrainError> {
    let members: Vec<usize> = fold.dispatch_ranks(comm.rank()).collect();
    let recompute = match config.train.recompute {
        RecomputeConfig::None => Recompute::None,
        RecomputeConfig::Selective => Recompute::Selective,
        RecomputeConfig::Full => Recompute::Full,
    };
    let model = Transformer::new(
        backend.clone(),
        config.model.clone(),
        fold,
        comm.rank(),
        comm.subgroup("experts", &members)?,
        config.train.sequence_length,
        recompute,
        dispatch_shape(config),
        config.layout.overlap,
        profile.clone(),
    );
    let (layout, held) = (model.layout(), model.held_experts());
    let shards = Rc::new(Shards::new(layout, model.placement(), &fold));
    let mut parameters =
        ShardedParameters::new(backend, layout, &shards, held, &config.layout, comm, profile)?;
    initialize(&mut parameters, layout, config.train.seed);
    Ok((model, shards, parameters))
}

impl<'a, B: Backend> RankState<'a, B> {
    /// A rank at step 0 with initial parameters.
    ///
    /// # Errors
    /// If groups cannot be made.
    pub fn new(
        config: &'a RunConfig,
        dataset: &'a Dataset,
        backend: B,
        fold: Fold,
        comm: Communicator,
        profile: Profile,
    ) -> Result<Self, TrainError> {
        let host = backend.clone();
        comm.set_workers(move |tasks, task| host.on_host(tasks, task));
        let (model, shards, parameters) =
            initial_model(config, backend.clone(), fold, &comm, profile.clone())?;
        let layout = model.layout();
        let reducer = GradientReducer::new(
            backend.clone(),
            layout,
            *model.placement(),
            fold,
            Rc::clone(&shards),
            &config.layout,
            &comm,
            profile,
        )?;
        let optimizer = ShardedAdamW::new(backend, layout, shards, &parameters, comm.clone());
        let feed = Feed::new(dataset, config);
        let layout = engine_layout(config, &fold, |rank| comm.node(rank));
        let memory = StepMemory::of_ranks(&layout, slot_rows(config), comm.rank()..comm.rank() + 1).remove(0);
        let traffic = TrafficPlan::new(layout, comm.rank());
        let progress = Progress::default();
        Ok(Self {
            config,
            fold,
            comm,
            model,
            parameters,
            reducer,
            states_bytes: 0,
            optimizer,
            progress,
            dataset,
            feed,
            fault: None,
            traffic,
            predicted: Traffic::default(),
            moved: Ledger::default(),
            memory,
            memory_as_routed: 0,
        })
    }

    /// Plants a fault; for tests.
    pub fn plant(&mut self, fault: Fault) {
        if let Fault::CrowdExpert { expert } = fault {
            for layer in self.model.layout().moe_layers() {
                let unit = Layout::layer_unit(layer);
                let mut bias = self.parameters.bias(unit).to_vec();
                bias[expert] += 1e3;
                self.parameters.set_bias(unit, bias);
            }
        }
        self.fault = Some(fault);
        if let Fault::Stall { step, rank, kind } = fault
            && rank == self.comm.rank()
        {
            self.comm.plant_stall(step, kind);
        }
    }

    /// Steps done so far, and what goes with them.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// The run's config.
    pub fn config(&self) -> &RunConfig {
        self.config
    }

    /// What it reads.
    pub fn dataset(&self) -> &Dataset {
        self.dataset
    }

    /// The model.
    pub fn model(&self) -> &Transformer<B> {
        &self.model
    }

    /// The parameters.
    pub fn parameters(&self) -> &ShardedParameters<B> {
        &self.parameters
    }

    /// Bytes in use before the last update: parameters, moments, the reduced gradient, the rotary table.
    pub fn states_bytes(&self) -> usize {
        self.states_bytes
    }

    /// Bytes that the steps so far needed by the estimate, given the rows that this rank's experts received.
    pub fn memory_as_routed(&self) -> u64 {
        self.memory_as_routed
    }

    /// What this rank's steps moved so far, as the planner says from the layout and the routing counts, and as the ledger
    /// counts it.
    pub fn traffic(&self) -> (&Traffic, &Ledger) {
        (&self.predicted, &self.moved)
    }

    /// Runs the next step on all ranks. Every rank returns the same record but for times.
    ///
    /// # Errors
    /// If data cannot be read, an exchange fails, or a number is not finite and the policy is to halt.
    pub fn step(&mut self) -> Result<StepRecord, TrainError> {
        let begin = Instant::now();
        let step = self.progress.step + 1;
        self.comm.set_step(step);
        let traffic = self.comm.ledger();
        let busy = self.model.profile().total(Lane::Communication);
        let (gradients, mut sums) = self.accumulate(step, |gradients| gradients.reduce())?;
        let mut gradients = gradients.into_shards();
        self.plant_fault(step, &mut gradients, &mut sums);
        let totals = self.join(&sums)?;
        let profile = self.model.profile().clone();
        let norm = self.optimizer.norm(&gradients, &profile)?;
        self.states_bytes = self.model.backend().memory().0;
        let (rate, scalars) = self.scalars(step, norm, totals.loss);
        if let Some(scalars) = scalars {
            let (optimizer, parameters) = (&mut self.optimizer, &mut self.parameters);
            optimizer.update(&gradients, scalars, parameters, &profile)?;
        }
        let finite = scalars.is_some();
        self.advance(finite, &totals.counts);
        let busy = self.model.profile().total(Lane::Communication) - busy;
        let moved = self.comm.ledger().since(&traffic);
        let seconds = begin.elapsed().as_secs_f64();
        let times = self.times(&moved, busy.as_secs_f64(), seconds)?;
        self.traffic.step(&sums.census, finite, &mut self.predicted);
        let received =
            sums.census.iter().enumerate().map(|(pass, layers)| self.traffic.received(pass, layers));
        let needed = received.map(|rows| self.memory.with_rows(&rows)).max().unwrap_or(0);
        self.memory_as_routed = self.memory_as_routed.max(needed);
        self.moved.merge(&self.comm.ledger().since(&traffic));
        Ok(self.record(step, totals, norm, rate, !finite, seconds, times, sums.data_s))
    }

    /// All waves and accumulation steps: gradients of the step, given to `reduce` whenever those of all waves are there.
    fn accumulate(
        &self,
        step: u64,
        reduce: impl Fn(&mut StepGradients<'_, B>) -> Result<(), CommError>,
    ) -> Result<(StepGradients<'_, B>, Sums), TrainError> {
        let own = self.fold.slots_of(self.comm.rank());
        let mut sums = Sums { slots: vec![Default::default(); own.len()], ..Sums::default() };
        let scale = self.loss_scale(step, &mut sums)?;
        let mut gradients = self.reducer.begin();
        let every_turn = self.config.train.reduce_every == ReduceEvery::Microbatch;
        for pass in passes(&self.fold.waves(self.comm.rank()), self.feed.turns(), every_turn) {
            let fed = self.feed_train(step, pass.turn, &pass.wave, &mut sums)?;
            gradients.enter(pass.clone());
            let outcome =
                self.model.forward_backward(&self.parameters, &fed.batch, &scale, &mut gradients)?;
            let slots = &mut sums.slots[pass.wave.start - own.start..];
            for (index, (slot, losses)) in slots.iter_mut().zip(&outcome.losses).enumerate() {
                slot.0 += *losses;
                slot.1 += fed.targets[index];
                slot.2 += fed.target_bytes[index];
            }
            add_counts(&mut sums.counts, &outcome.counts);
            sums.census.push(outcome.census);
            if pass.completes && pass.last_wave {
                reduce(&mut gradients)?;
            }
        }
        Ok((gradients, sums))
    }

    /// The learning rate of a step, and the scalars of its update unless a number is not finite.
    fn scalars(&self, step: u64, norm: f64, loss: f64) -> (f64, Option<AdamW>) {
        let RunConfig { schedule, optimizer, train, .. } = self.config;
        let rate = learning_rate(schedule, optimizer.learning_rate, step, train.steps);
        let scalars = adamw_step(optimizer, rate, self.progress.updates + 1, norm, train.clip_norm);
        (rate, (norm.is_finite() && loss.is_finite()).then_some(scalars))
    }

    /// Ends a step: moves the balance bias if it has `updated` parameters, and counts it.
    fn advance(&mut self, updated: bool, counts: &[Vec<u64>]) {
        if updated {
            self.update_bias(counts);
            self.progress.updates += 1;
        }
        self.progress.step += 1;
        self.progress.tokens += self.config.tokens_per_step() as u64;
    }

    fn feed_train(
        &self,
        step: u64,
        turn: usize,
        slots: &Range<usize>,
        sums: &mut Sums,
    ) -> Result<Fed, TrainError> {
        let begin = Instant::now();
        let fed = self.feed.train(step - 1, turn, slots.clone())?;
        sums.data_s += begin.elapsed().as_secs_f64();
        Ok(fed)
    }

    /// The divisors of the losses, known before the first forward: target tokens over all slots and turns.
    fn loss_scale(&self, step: u64, sums: &mut Sums) -> Result<LossScale, TrainError> {
        let slots = self.fold.slots_of(self.comm.rank());
        let mut targets = 0;
        for turn in 0..self.feed.turns() {
            targets += self.feed_train(step, turn, &slots, sums)?.targets.iter().sum::<u64>();
        }
        let targets =
            self.model.profile().communicate("targets", || self.comm.all_reduce_u64(&[targets]))?[0];
        Ok(LossScale {
            targets,
            sequences: self.config.global_batch() as u64,
            sequence_length: self.config.train.sequence_length,
        })
    }

    /// Joins losses over slots by the tree, and counts over ranks.
    fn join(&self, sums: &Sums) -> Result<Totals, TrainError> {
        let profile = self.model.profile();
        let values: Vec<f64> = sums
            .slots
            .iter()
            .flat_map(|(losses, targets, bytes)| {
                let SlotLosses { cross_entropy, balance, z, entropy } = *losses;
                [cross_entropy, balance, z, entropy, *targets as f64, *bytes as f64]
            })
            .collect();
        let flat: Vec<u64> = sums.counts.iter().flatten().copied().collect();
        let (all, counts) = profile.communicate("losses", || {
            Ok::<_, TrainError>((
                self.comm.all_gather_values(&values)?.concat(),
                self.comm.all_reduce_u64(&flat)?,
            ))
        })?;
        let column = |which: usize| all.iter().skip(which).step_by(6).copied().collect::<Vec<f64>>();
        let [cross_entropy, balance, z, entropy, targets, bytes] =
            std::array::from_fn(|which| tree::sum(&column(which)));
        let means = column(0).into_iter().zip(column(4)).map(|(sum, n)| if n > 0.0 { sum / n } else { 0.0 });
        let model = &self.config.model;
        let sequences = self.config.global_batch() as f64;
        let tokens = sequences * self.config.train.sequence_length as f64;
        let layers = model.moe_layers().max(1) as f64;
        Ok(Totals {
            loss: cross_entropy / targets.max(1.0),
            max_loss: means.fold(f64::NEG_INFINITY, f64::max),
            bits_per_byte: cross_entropy / std::f64::consts::LN_2 / bytes.max(1.0),
            targets: targets as u64,
            balance: f64::from(model.balance_loss_coef) * balance / sequences,
            z: f64::from(model.z_loss_coef) * z / tokens,
            entropy: entropy / tokens / layers,
            counts: counts.chunks(model.num_experts.max(1)).map(<[u64]>::to_vec).collect(),
        })
    }

    /// Auxiliary-loss-free balancing (Wang et al., 2024): a step up for experts below the mean load, down for those above.
    fn update_bias(&mut self, counts: &[Vec<u64>]) {
        let rate = self.config.model.bias_update_rate;
        for (layer, counts) in self.model.layout().moe_layers().zip(counts) {
            let unit = Layout::layer_unit(layer);
            let total: u64 = counts.iter().sum();
            let mut moved = self.parameters.bias(unit).to_vec();
            for (bias, count) in moved.iter_mut().zip(counts) {
                match (count * counts.len() as u64).cmp(&total) {
                    std::cmp::Ordering::Less => *bias += rate,
                    std::cmp::Ordering::Equal => {}
                    std::cmp::Ordering::Greater => *bias -= rate,
                }
            }
            self.parameters.set_bias(unit, moved);
        }
    }

    /// Means and sums over ranks of what only the layout decides.
    fn times(&self, moved: &Ledger, busy_s: f64, seconds: f64) -> Result<(f64, u64), TrainError> {
        let sent: u64 = moved.ranks.iter().map(|rank| rank.bytes_sent).sum();
        let all = self.comm.all_gather_values(&[busy_s / seconds.max(1e-9), sent as f64])?;
        let share = all.iter().map(|values| values[0]).sum::<f64>() / all.len() as f64;
        Ok((share.clamp(0.0, 1.0), all.iter().map(|values| values[1] as u64).sum()))
    }

    fn record(
        &self,
        step: u64,
        totals: Totals,
        grad_norm: f64,
        learning_rate: f64,
        skipped: bool,
        step_s: f64,
        (communication_share, bytes_moved): (f64, u64),
        data_s: f64,
    ) -> StepRecord {
        let tokens_per_s = self.config.tokens_per_step() as f64 / step_s;
        let flops = self.config.model.train_flops(self.config.train.sequence_length);
        StepRecord {
            step,
            loss: totals.loss,
            max_loss: totals.max_loss,
            bits_per_byte: totals.bits_per_byte,
            balance_loss: totals.balance,
            z_loss: totals.z,
            grad_norm,
            learning_rate,
            skipped,
            tokens: self.progress.tokens,
            expert_load_max_over_mean: max_over_mean(&totals.counts),
            router_entropy: totals.entropy,
            expert_load: totals.counts,
            step_s,
            tokens_per_s,
            tflops: flops * tokens_per_s / 1e12,
            communication_share,
            bytes_moved,
            data_s,
        }
    }

    /// Validates on about `sequences` sequences of the validation part.
    ///
    /// # Errors
    /// If data cannot be read or an exchange fails.
    pub fn validate(&self, sequences: usize) -> Result<Option<ValidationRecord>, TrainError> {
        let turns = self.feed.validation_turns(sequences);
        if turns == 0 {
            return Ok(None);
        }
        let mut sums = Sums::default();
        for wave in self.fold.waves(self.comm.rank()) {
            let first = sums.slots.len();
            sums.slots.resize_with(first + wave.len(), Default::default);
            for turn in 0..turns {
                let fed = self.feed.validation(turn, turns, wave.clone())?;
                let outcome = self.model.evaluate(&self.parameters, &fed.batch)?;
                for (index, losses) in outcome.losses.iter().enumerate() {
                    let slot = &mut sums.slots[first + index];
                    slot.0 += *losses;
                    slot.1 += fed.targets[index];
                    slot.2 += fed.target_bytes[index];
                }
                add_counts(&mut sums.counts, &outcome.counts);
            }
        }
        let totals = self.join(&sums)?;
        Ok(Some(ValidationRecord {
            validation_step: self.progress.step,
            loss: totals.loss,
            bits_per_byte: totals.bits_per_byte,
            tokens: totals.targets,
        }))
    }

    /// Changes one element of rank 0's shard of the reduced gradient, or a loss, if a fault is planted for this step.
    fn plant_fault(&self, step: u64, gradients: &mut [B::Buf], sums: &mut Sums) {
        let (mut element, change): (usize, fn(f32) -> f32) = match self.fault {
            Some(Fault::NudgeGradient { step: when, element }) if when == step => {
                (element, |value| f32::from_bits(value.to_bits() + 1))
            }
            Some(Fault::PoisonGradient { step: when }) if when == step => (0, |_| f32::NAN),
            Some(Fault::PoisonLoss { step: when }) if when == step => {
                if self.comm.rank() + 1 == self.comm.size() {
                    sums.slots[0].0.cross_entropy = f64::INFINITY;
                }
                return;
            }
            _ => return,
        };
        if self.comm.rank() != 0 {
            return;
        }
        for shard in gradients {
            let mut values = vec![0.0; shard.len()];
            self.model.backend().download(shard.all(), &mut values);
            let mut moved = values.iter_mut().filter(|value| **value != 0.0);
            if let Some(value) = moved.by_ref().nth(element) {
                *value = change(*value);
                self.model.backend().upload(&values, shard.all_mut());
                return;
            }
            element -= values.iter().filter(|value| **value != 0.0).count();
        }
    }
}

impl RankState<'_, Cpu> {
    /// The next step with gradients and parameters by way of servers; for the baselines.
    pub(crate) fn step_centrally(&mut self, central: &mut Central) -> Result<(), TrainError> {
        let step = self.progress.step + 1;
        self.comm.set_step(step);
        let (gradients, sums) = self.accumulate(step, |_| Ok(()))?;
        let pushed = central.push(&gradients.into_roots())?;
        let totals = self.join(&sums)?;
        let norm = central.norm(&pushed)?;
        let (_, scalars) = self.scalars(step, norm, totals.loss);
        if let Some(scalars) = scalars {
            central.update(&pushed, scalars, &mut self.parameters)?;
        }
        self.advance(scalars.is_some(), &totals.counts);
        Ok(())
    }
}

/// A step's sums over all ranks.
struct Totals {
    loss: f64,
    max_loss: f64,
    bits_per_byte: f64,
    targets: u64,
    balance: f64,
    z: f64,
    entropy: f64,
    counts: Vec<Vec<u64>>,
}

fn add_counts(sums: &mut Vec<Vec<u64>>, counts: &[Vec<u64>]) {
    if sums.is_empty() {
        sums.extend_from_slice(counts);
        return;
    }
    for (sum, count) in sums.iter_mut().flatten().zip(counts.iter().flatten()) {
        *sum += count;
    }
}

/// Largest over mean load of an expert, averaged over layers.
pub fn max_over_mean(counts: &[Vec<u64>]) -> f64 {
    let ratio = |layer: &Vec<u64>| {
        let total: u64 = layer.iter().sum();
        let largest = layer.iter().copied().max().unwrap_or(0);
        largest as f64 * layer.len() as f64 / total.max(1) as f64
    };
    if counts.is_empty() { 0.0 } else { counts.iter().map(ratio).sum::<f64>() / counts.len() as f64 }
}

fn initialize<B: Backend>(parameters: &mut ShardedParameters<B>, layout: &Layout, seed: u64) {
    let initial = |kind, range: Range<usize>| {
        let whole = match kind {
            SegmentKind::Dense { unit } => initialize_unit(layout, unit, seed),
            SegmentKind::Expert { moe_layer, expert } => {
                initialize_expert(layout, layout.moe_layers().start + moe_layer, expert, seed)
            }
        };
        Ok::<_, Infallible>(whole[range].to_vec())
    };
    let Ok(()) = parameters.fill(initial);
}
