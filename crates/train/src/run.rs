//! A whole run: checks, ranks, steps, validations, checkpoints, summary.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use unisono_checkpoint::{Reader, SaveId, keep_last};
use unisono_comm::watch::{Grace, Identity, forget_messages};
use unisono_comm::{
    Activity, Cause, Communicator, Failure, FlightDeck, Ledger, Place, RunError, ThreadRanks, Watchdog,
};
use unisono_data::{Dataset, Part, Tokenizer, Verify};
use unisono_mesh::Fold;
use unisono_model::{Lane, Profile};
use unisono_plan::engine::CallTraffic;
use unisono_plan::{Layout, MemoryEstimate};
use unisono_tensor::cpu::Crew;
use unisono_tensor::{Backend, Cpu};

use crate::agreement::{StepTimeRecord, compare};
use crate::checkpointing::Extra;
use crate::config::{OnNonFinite, RunConfig};
use crate::crew::lending;
use crate::error::TrainError;
use crate::memory::{check_fits, estimate_all};
use crate::probe::probe;
use crate::rank::{Fault, RankState};
use crate::record::{Event, MemoryRecord, Observer, Started, StepRecord, Summary, ValidationRecord};
use crate::run_folder::{
    CHECKPOINTS, FLIGHT, RunFolder, SUMMARY_FILE, TRACE_FILE, next_identity, read_identity, sees_start,
    write_durably,
};
use crate::start::{Start, find_start};
use crate::survey::{Credentials, WorldRecord, survey};
use crate::system::{build, host_name, peak_rss};
use crate::trace::{TraceWriter, span_value};

/// How a config is run here; nothing of it changes a number.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// The run folder.
    pub folder: PathBuf,
    /// Ranks; divides the grid's slots.
    pub ranks: usize,
    /// Compute threads of each rank.
    pub threads: usize,
    /// Go on from the newest good checkpoint of the folder; from step 0 if the run was never saved.
    pub resume: bool,
    /// Write a Chrome trace.
    pub trace: bool,
    /// Stop after this step, as if the user had asked for it.
    pub stop_after: Option<u64>,
    /// A fault to plant; for tests.
    pub fault: Option<Fault>,
    /// Order in which messages arrive, for tests.
    pub jitter: Option<u64>,
    /// Pretended nodes: how many consecutive ranks are on each. Empty for one node.
    pub nodes: Vec<usize>,
    /// The pretended node of each rank, where ranks of a node are not consecutive; for tests.
    pub placed: Vec<usize>,
    /// The ranks of this process, while the run goes: whoever has a clone can write their flight records.
    pub deck: FlightDeck,
    /// Called when the run has failed because a rank keeps others waiting, and ranks of this process do not come back:
    /// only the end of the process helps then.
    pub abandon: fn(&Failure),
    /// Where the ranks live.
    pub place: Place,
    /// Seconds that a step is predicted to take, for the summary.
    pub predicted_step_s: Option<f64>,
    /// The 80% interval of that, likewise.
    pub predicted_interval_s: Option<[f64; 2]>,
    /// Floating-point operations a second that all ranks together reach at most, for `mfu(%)` in TensorBoard; none leaves
    /// it out.
    pub peak_flops: Option<f64>,
}

impl RunOptions {
    /// The usual options.
    pub fn new(folder: impl Into<PathBuf>, ranks: usize, threads: usize) -> Self {
        Self {
            folder: folder.into(),
            ranks,
            threads,
            resume: false,
            trace: false,
            stop_after: None,
            fault: None,
            jitter: None,
            nodes: Vec::new(),
            placed: Vec::new(),
            deck: FlightDeck::default(),
            abandon: |_| {},
            place: Place::Threads,
            predicted_step_s: None,
            predicted_interval_s: None,
            peak_flops: None,
        }
    }

    /// The ranks, if they are threads.
    fn thread_ranks(&self) -> ThreadRanks {
        ThreadRanks::new(self.ranks).nodes(&self.nodes).placed(&self.placed)
    }

    /// The node of every rank.
    pub(crate) fn node_of(&self) -> Vec<usize> {
        self.place.node_of(&self.thread_ranks())
    }
}

/// # Errors
/// [`TrainError::Nodes`] unless the pretended nodes, of so many ranks each, hold all ranks.
pub fn check_nodes(nodes: &[usize], ranks: usize) -> Result<(), TrainError> {
    if nodes.is_empty() || (nodes.iter().sum::<usize>() == ranks && !nodes.contains(&0)) {
        return Ok(());
    }
    Err(TrainError::Nodes { nodes: nodes.to_vec(), ranks })
}

/// After so many checkpoints in a row that could not be written the run ends.
const MOST_FAILED_SAVES: u32 = 3;

/// Opens what a config reads.
///
/// # Errors
/// If it cannot be read, or the model's vocabulary is too small for it.
pub fn open_dataset(config: &RunConfig, threads: usize) -> Result<Dataset, TrainError> {
    let dataset = match &config.data.path {
        None => Dataset::builtin(threads)?,
        Some(path) => Dataset::open(path, Verify::OnFirstUse)?,
    };
    check_vocabulary(config, dataset.tokenizer())?;
    Ok(dataset)
}

/// What a validation of a config reads. Of the built-in text the training part is not encoded for it, and empty.
///
/// # Errors
/// As [`open_dataset`].
pub(crate) fn open_validation(config: &RunConfig, threads: usize) -> Result<Dataset, TrainError> {
    if config.data.path.is_some() {
        return open_dataset(config, threads);
    }
    let dataset = Dataset::builtin_validation(threads)?;
    check_vocabulary(config, dataset.tokenizer())?;
    Ok(dataset)
}

/// The tokenizer of what a config reads. The built-in text is not encoded for it.
///
/// # Errors
/// As [`open_dataset`].
pub(crate) fn open_tokenizer(config: &RunConfig) -> Result<Tokenizer, TrainError> {
    let tokenizer = match &config.data.path {
        None => Tokenizer::builtin()?,
        Some(path) => Dataset::open(path, Verify::OnFirstUse)?.into_tokenizer(),
    };
    check_vocabulary(config, &tokenizer)?;
    Ok(tokenizer)
}

fn check_vocabulary(config: &RunConfig, tokenizer: &Tokenizer) -> Result<(), TrainError> {
    let needed = tokenizer.vocab_size() as usize;
    if config.model.vocab_size >= needed {
        return Ok(());
    }
    Err(TrainError::Refused(format!(
        "model.vocab_size = {}: the dataset's tokenizer has {needed} tokens; set model.vocab_size to at least that",
        config.model.vocab_size
    )))
}

fn check_length(config: &RunConfig, dataset: &Dataset) -> Result<(), TrainError> {
    let (length, tokens) = (config.train.sequence_length, dataset.tokens(Part::Train));
    if dataset.sequences(Part::Train, length) > 0 {
        return Ok(());
    }
    Err(TrainError::Refused(format!(
        "train.sequence_length = {length}: the dataset has {tokens} training tokens, too few for one sequence and the token after \
         it; use more text, or set train.sequence_length to at most {}",
        tokens.saturating_sub(1).max(1)
    )))
}

/// Hexadecimal fingerprint of a dataset.
pub fn fingerprint(dataset: &Dataset) -> String {
    dataset.fingerprint().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What every rank of a run shares.
struct Shared<'a> {
    config: &'a RunConfig,
    options: &'a RunOptions,
    dataset: &'a Dataset,
    observer: &'a dyn Observer,
    fold: Fold,
    /// Rank 0's.
    folder: Mutex<Option<RunFolder>>,
    /// Rank 0's.
    trace: Mutex<Option<TraceWriter>>,
    /// `[rank]`, before the first step.
    memory: Vec<MemoryEstimate>,
    /// The ranks of this process.
    crew: Crew,
}

/// What rank 0 decides before the first step.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Orders {
    /// The step to go on from.
    start: Option<u64>,
    /// Checkpoints that were passed over, and why.
    rejected: Vec<String>,
    identity: Identity,
}

/// What a rank contributes to the summary.
#[derive(Debug, Serialize, Deserialize)]
struct Contribution {
    ledger: Ledger,
    /// `(lane, phase, seconds)`
    phases: Vec<(String, String, f64)>,
    memory: MemoryRecord,
    peak_rss: Option<u64>,
    /// Of training steps, as predicted and as counted.
    predicted: Vec<CallTraffic>,
    moved: Ledger,
}

/// Trains `config` as `options` say.
///
/// # Errors
/// See [`TrainError`]; what was checkpointed stays.
pub fn train(
    config: &RunConfig,
    options: &RunOptions,
    observer: &dyn Observer,
) -> Result<Summary, TrainError> {
    config.validate()?;
    let fold = Fold::new(config.grid, options.ranks)?;
    check_fits(config, &fold, &options.node_of(), &options.place)?;
    let dataset = open_dataset(config, options.ranks * options.threads)?;
    train_on(config, options, &dataset, observer)
}

/// [`train`] on a dataset that is open already.
///
/// # Errors
/// As [`train`].
pub fn train_on(
    config: &RunConfig,
    options: &RunOptions,
    dataset: &Dataset,
    observer: &dyn Observer,
) -> Result<Summary, TrainError> {
    let fold = Fold::new(config.grid, options.ranks)?;
    check_nodes(&options.nodes, options.ranks)?;
    check_length(config, dataset)?;
    let memory = estimate_all(config, &fold, &options.node_of());
    let (folder, trace) = (Mutex::default(), Mutex::default());
    let place = &options.place;
    let here = place.ranks_here(options.ranks) / place.processes_here();
    let (mut ranks, crew) = lending(options.thread_ranks(), here);
    let shared = Shared { config, options, dataset, observer, fold, folder, trace, memory, crew };
    if let Some(seed) = options.jitter {
        ranks = ranks.jitter(seed);
    }
    let watchdog = watch(config, options)?;
    let summaries = place.run(&ranks, |comm| run_rank(&shared, comm));
    drop(watchdog);
    if let Err(error) = &summaries {
        leave_records(options, error, observer);
    }
    options.deck.clear();
    let summaries = summaries.map_err(root_cause)?;
    summaries.into_iter().next().ok_or_else(|| TrainError::Refused("no rank ran here".into()))
}

fn watch(config: &RunConfig, options: &RunOptions) -> Result<Option<Watchdog>, TrainError> {
    let Some(limits) = config.watchdog.limits() else { return Ok(None) };
    let watchdog = Watchdog::start(options.deck.clone(), limits, Grace::default(), options.abandon);
    watchdog.map(Some).map_err(TrainError::io("start the watchdog of", &options.folder))
}

/// After a failure every rank of this process leaves its flight record. The watchdog has written them already.
fn leave_records(options: &RunOptions, error: &RunError, observer: &dyn Observer) {
    if matches!(error.failure.cause, Cause::Stalled { .. }) {
        return;
    }
    if let Err(error) = options.deck.write_failure(&error.failure) {
        observer.event(Event::Warning(format!("no flight record: {error}")));
    }
}

/// The error of the rank that failed first, itself where possible.
pub(crate) fn root_cause(error: unisono_comm::RunError) -> TrainError {
    let unisono_comm::RunError { failure, source } = error;
    match source.map(|source| source.downcast::<TrainError>()) {
        Some(Ok(inner)) => *inner,
        Some(Err(source)) => TrainError::Ranks(unisono_comm::RunError { failure, source: Some(source) }),
        None => TrainError::Ranks(unisono_comm::RunError { failure, source: None }),
    }
}

fn new_trace(folder: &Path, ranks: usize) -> Result<TraceWriter, TrainError> {
    let path = folder.join(TRACE_FILE);
    TraceWriter::create(&path, ranks).map_err(TrainError::io("write", path))
}

/// The small state of a checkpoint.
///
/// # Errors
/// If it is not that of a run.
pub fn read_extra(reader: &Reader) -> Result<Extra, TrainError> {
    serde_json::from_value(reader.extra().clone()).map_err(|error| {
        TrainError::Refused(format!("checkpoint step {} has no state of a run: {error}", reader.step()))
    })
}

fn run_rank(shared: &Shared<'_>, comm: Communicator) -> Result<Summary, TrainError> {
    let traffic = comm.ledger();
    let crew = &shared.crew;
    let backend = Cpu::in_crew(shared.options.threads, crew, comm.rank() % crew.ranks());
    let credentials = Credentials {
        version: env!("CARGO_PKG_VERSION").into(),
        // Threads cannot differ.
        build: if matches!(shared.options.place, Place::Threads) { None } else { build() },
        config: shared.config.to_toml()?,
        data: fingerprint(shared.dataset),
        probe: probe(&backend),
        resume: shared.options.resume,
        trace: shared.options.trace,
    };
    let probe = credentials.probe.clone();
    let deck = &shared.options.deck;
    deck.join(&comm);
    let (world, warning) = survey(&comm, credentials, shared.options.place.transport())?;
    if let Some(warning) = warning.filter(|_| comm.rank() == 0) {
        shared.observer.event(Event::Warning(warning));
    }
    let orders = shared.orders(&comm, &probe)?;
    if !sees_start(&shared.options.folder, &orders.identity) {
        return Err(TrainError::NotShared {
            rank: comm.rank(),
            host: host_name(),
            folder: shared.options.folder.clone(),
        });
    }
    deck.keep_in(&shared.options.folder.join(FLIGHT), &orders.identity);
    // From here on the ranks' clocks count from the same moment.
    comm.barrier()?;
    let began = Instant::now();
    let profile = Profile::new(began);
    profile.keep_spans(shared.options.trace);
    let mut state = RankState::new(
        shared.config,
        shared.dataset,
        backend.clone(),
        shared.fold,
        comm.clone(),
        profile.clone(),
    )?;
    if let Some(step) = orders.start {
        let reader = Reader::open(&shared.options.folder.join(CHECKPOINTS), step)?;
        let extra = read_extra(&reader)?;
        state.restore(&reader, &extra)?;
    }
    if let Some(fault) = shared.options.fault {
        state.plant(fault);
    }
    if comm.rank() == 0 {
        shared.observer.event(Event::Started(Box::new(shared.started(probe, world, &orders))));
    }
    let mut run = RankRun {
        shared,
        comm,
        state,
        saved: orders.start,
        orders,
        failed_saves: 0,
        unwritten: false,
        save_now: false,
        validation: None,
        last: None,
        expert_load: Vec::new(),
        step_s: Vec::new(),
        skipped: 0,
    };
    let stopped = run.steps()?;
    let estimate = shared.memory[run.comm.rank()];
    let memory = MemoryRecord {
        estimated: estimate.total(),
        even: estimate.even(),
        as_routed: run.state.memory_as_routed(),
        measured: backend.memory().1 as u64,
        states: run.state.states_bytes() as u64,
    };
    let phase = |(lane, name, time): (Lane, &str, Duration)| {
        (lane.name().to_string(), name.to_string(), time.as_secs_f64())
    };
    let (predicted, moved) = run.state.traffic();
    let contribution = Contribution {
        predicted: predicted.rows(),
        moved: moved.clone(),
        ledger: run.comm.ledger().since(&traffic),
        phases: profile.phases().into_iter().map(phase).collect(),
        memory,
        peak_rss: peak_rss(),
    };
    run.summarize(stopped, began.elapsed().as_secs_f64(), &contribution)
}

impl Shared<'_> {
    /// What rank 0 finds and decides; it opens the run folder.
    fn orders(&self, comm: &Communicator, probe: &str) -> Result<Orders, TrainError> {
        let mut message = Vec::new();
        if comm.rank() == 0 {
            let start = find_start(self.config, self.options, self.dataset, &|| comm.beat())?;
            let identity = self.open_folder(&start, comm.size(), probe)?;
            forget_messages(&self.options.folder.join(FLIGHT));
            let orders = Orders { start: start.checkpoint, rejected: start.rejected, identity };
            message = serde_json::to_vec(&orders).map_err(|error| TrainError::Refused(error.to_string()))?;
        }
        let all = comm.all_gather_values(&message)?;
        serde_json::from_slice(&all[0])
            .map_err(|error| TrainError::Refused(format!("rank 0 sent no orders that can be read: {error}")))
    }

    /// Whether a run that goes on from `start` has no step left. Then nothing in its folder changes.
    fn is_over(&self, start: Option<u64>) -> bool {
        start.is_some_and(|step| step >= self.config.train.steps)
    }

    /// Opens what is written to, and counts this start.
    fn open_folder(&self, start: &Start, ranks: usize, probe: &str) -> Result<Identity, TrainError> {
        let folder = &self.options.folder;
        let identity = if self.is_over(start.checkpoint) {
            read_identity(folder)?
        } else {
            if start.again {
                self.observer.event(Event::Warning(format!(
                    "{} has no checkpoint yet: the run begins again at step 0",
                    folder.display()
                )));
            }
            *lock(&self.folder) = Some(RunFolder::open(folder, self.config, start.keep_until())?);
            if self.options.trace {
                *lock(&self.trace) = Some(new_trace(folder, ranks)?);
            }
            Some(next_identity(folder, probe, self.config.train.seed)?)
        };
        let identity = identity.map(|found| Identity { run_id: found.run_id, epoch: found.epoch });
        Ok(identity.unwrap_or_default())
    }

    fn started(&self, probe: String, world: WorldRecord, orders: &Orders) -> Started {
        let layout = Layout::new(&self.config.model);
        Started {
            folder: self.options.folder.clone(),
            from_step: orders.start.unwrap_or(0),
            steps: self.config.train.steps,
            ranks: self.options.ranks,
            threads: self.options.threads,
            parameters: layout.parameters(self.config.model.top_k),
            tokens_per_step: self.config.tokens_per_step(),
            train_tokens: self.dataset.tokens(Part::Train),
            predicted_step_s: self.options.predicted_step_s,
            predicted_interval_s: self.options.predicted_interval_s,
            memory: self.memory.clone(),
            probe,
            world,
            rejected: orders.rejected.clone(),
        }
    }

    /// Runs `write` on the run folder where it is open: with rank 0.
    fn with_folder(
        &self,
        write: impl FnOnce(&mut RunFolder) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        lock(&self.folder).as_mut().map_or(Ok(()), write)
    }
}

/// What a rank was told before a step; of what several were told the last of these counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    GoOn,
    /// Go on after a checkpoint.
    Save,
    /// End after a checkpoint.
    Stop,
}

/// One rank's run.
struct RankRun<'a, 'b> {
    shared: &'a Shared<'b>,
    comm: Communicator,
    state: RankState<'a, Cpu>,
    orders: Orders,
    failed_saves: u32,
    saved: Option<u64>,
    /// Whether a record could not be written, which is said once.
    unwritten: bool,
    save_now: bool,
    validation: Option<ValidationRecord>,
    last: Option<StepRecord>,
    expert_load: Vec<Vec<u64>>,
    step_s: Vec<f64>,
    skipped: u64,
}

impl RankRun<'_, '_> {
    fn leads(&self) -> bool {
        self.comm.rank() == 0
    }

    /// All steps; true if stopped before the last.
    fn steps(&mut self) -> Result<bool, TrainError> {
        let config = self.shared.config;
        while self.state.progress().step < config.train.steps {
            let told = self.told()?;
            if told != Told::GoOn {
                self.during(Activity::Checkpoint, Self::save)?;
            }
            if told == Told::Stop {
                return Ok(true);
            }
            self.one_step()?;
            let step = self.state.progress().step;
            let is_last = step == config.train.steps;
            let due = |every: u64| is_last || (every > 0 && step.is_multiple_of(every));
            if config.evaluation.every > 0 && due(config.evaluation.every) {
                self.during(Activity::Validation, Self::validate)?;
            }
            if due(config.checkpoint.every) {
                self.during(Activity::Checkpoint, Self::save)?;
            }
        }
        Ok(false)
    }

    /// Does `work` and says what it is, for those who watch.
    fn during<T>(
        &mut self,
        activity: Activity,
        work: impl FnOnce(&mut Self) -> Result<T, TrainError>,
    ) -> Result<T, TrainError> {
        self.comm.enter(activity);
        let outcome = work(self);
        if outcome.is_ok() {
            self.comm.enter(Activity::Between);
        }
        outcome
    }

    /// What follows from what any rank was told, the same on all: a signal may reach one process alone.
    fn told(&mut self) -> Result<Told, TrainError> {
        let options = self.shared.options;
        let reached = options.stop_after.is_some_and(|step| self.state.progress().step >= step);
        let told = match reached || self.shared.observer.stop() {
            true => Told::Stop,
            false if std::mem::take(&mut self.save_now) => Told::Save,
            false => Told::GoOn,
        };
        let all = self.comm.all_gather_values(&[told as u64])?;
        let most = all.into_iter().flatten().max().unwrap_or_default();
        Ok([Told::GoOn, Told::Save, Told::Stop][most as usize])
    }

    /// Rank 0 writes into the run folder. The first failure is a warning, and a checkpoint is tried at once.
    fn note(&mut self, write: impl FnOnce(&mut RunFolder) -> Result<(), TrainError>) {
        if !self.leads() {
            return;
        }
        let Err(error) = self.shared.with_folder(write) else { return };
        if std::mem::replace(&mut self.unwritten, true) {
            return;
        }
        self.save_now = true;
        self.shared.observer.event(Event::Warning(format!(
            "{error}; training goes on, records of steps may be missing from here on: make room on the disk"
        )));
    }

    fn one_step(&mut self) -> Result<(), TrainError> {
        let record = self.during(Activity::Step, |run| run.state.step())?;
        self.step_s.push(record.step_s);
        let config = self.shared.config;
        if config.log.hashes_every > 0 && record.step.is_multiple_of(config.log.hashes_every) {
            let hashes = self.state.hashes()?;
            self.note(|folder| folder.hashes(&hashes));
        }
        self.write_spans()?;
        if self.leads() {
            let memory = self.state.model().backend().memory().1 as u64;
            let progress = self.state.progress();
            let effective = progress.updates as f64 / progress.step as f64;
            let mfu = self.shared.options.peak_flops.map(|peak| 100.0 * record.tflops * 1e12 / peak);
            self.note(|folder| folder.step(&record, memory, effective, mfu));
            self.shared.observer.event(Event::Step(Box::new(record.clone())));
        }
        if record.skipped {
            self.on_non_finite(&record)?;
        } else {
            self.add_load(&record);
        }
        self.last = Some(record);
        Ok(())
    }

    fn on_non_finite(&mut self, record: &StepRecord) -> Result<(), TrainError> {
        self.skipped += 1;
        let (step, loss, norm) = (record.step, record.loss, record.grad_norm);
        if self.shared.config.train.on_non_finite == OnNonFinite::Halt {
            // The first to leave ends the run of all: not before rank 0 has written the step. Who leaves has come here.
            let _ = self.state.comm.barrier();
            return Err(TrainError::NonFinite { step, loss, norm, seed: self.shared.config.train.seed });
        }
        if self.leads() {
            self.shared.observer.event(Event::Warning(format!(
                "step {step} skipped: loss {loss}, gradient norm {norm}; no rank updated its parameters"
            )));
        }
        Ok(())
    }

    fn add_load(&mut self, record: &StepRecord) {
        if self.expert_load.is_empty() {
            self.expert_load.clone_from(&record.expert_load);
            return;
        }
        let sums = self.expert_load.iter_mut().flatten();
        sums.zip(record.expert_load.iter().flatten()).for_each(|(sum, count)| *sum += count);
    }

    fn validate(&mut self) -> Result<(), TrainError> {
        let Some(record) = self.state.validate(self.shared.config.evaluation.sequences)? else {
            return Ok(());
        };
        if self.leads() {
            self.note(|folder| folder.validation(&record));
            self.shared.observer.event(Event::Validation(record.clone()));
        }
        self.validation = Some(record);
        Ok(())
    }

    /// Saves; a failure is a warning until it has happened too often.
    fn save(&mut self) -> Result<(), TrainError> {
        let step = self.state.progress().step;
        if self.saved == Some(step) {
            return Ok(());
        }
        let begin = Instant::now();
        let dir = self.shared.options.folder.join(CHECKPOINTS);
        let Identity { run_id, epoch } = self.orders.identity.clone();
        let id = SaveId { run_id, epoch, step };
        let extra = Extra {
            progress: self.state.progress(),
            config: self.shared.config.clone(),
            data: fingerprint(self.shared.dataset),
        };
        match self.state.save(&dir, &id, &extra) {
            Ok(committed) => {
                self.failed_saves = 0;
                self.saved = Some(step);
                if let Some(committed) = committed {
                    let seconds = begin.elapsed().as_secs_f64();
                    self.shared.observer.event(Event::Checkpoint { step, bytes: committed.bytes, seconds });
                    self.drop_old(&dir)?;
                }
                Ok(())
            }
            Err(error @ (TrainError::Checkpoint(_) | TrainError::Peer { .. })) => {
                self.failed_saves += 1;
                if self.failed_saves >= MOST_FAILED_SAVES {
                    let failures = self.failed_saves;
                    return Err(TrainError::Storage { failures, last: error.to_string() });
                }
                if self.leads() {
                    self.shared
                        .observer
                        .event(Event::Warning(format!("checkpoint of step {step} failed: {error}")));
                }
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn drop_old(&self, dir: &Path) -> Result<(), TrainError> {
        let Some(count) = NonZeroUsize::new(self.shared.config.checkpoint.keep_last) else { return Ok(()) };
        if let Err(error) = keep_last(dir, count, &|| self.comm.beat()) {
            self.shared.observer.event(Event::Warning(format!("old checkpoints were not removed: {error}")));
        }
        Ok(())
    }

    /// Brings the spans of all ranks to rank 0, which writes them.
    fn write_spans(&self) -> Result<(), TrainError> {
        if !self.shared.options.trace {
            return Ok(());
        }
        let own: Vec<Value> = self.state.model().profile().take_spans().iter().map(span_value).collect();
        let text = serde_json::to_vec(&own).map_err(|error| TrainError::Refused(error.to_string()))?;
        let all = self.comm.all_gather_values(&text)?;
        let mut trace = lock(&self.shared.trace);
        let (Some(trace), true) = (trace.as_mut(), self.leads()) else { return Ok(()) };
        let args = serde_json::json!({"step": self.state.progress().step});
        let path = self.shared.options.folder.join(TRACE_FILE);
        let write = |(rank, text): (usize, &Vec<u8>)| trace.spans(rank, text, &args);
        all.iter().enumerate().try_for_each(write).map_err(TrainError::io("write", path))
    }

    /// The summary of all ranks, the same on each; rank 0 writes it.
    fn summarize(
        &self,
        stopped: bool,
        seconds: f64,
        contribution: &Contribution,
    ) -> Result<Summary, TrainError> {
        let unreadable = |error: serde_json::Error| TrainError::Refused(error.to_string());
        let text = serde_json::to_vec(contribution).map_err(unreadable)?;
        let all = self.comm.all_gather_values(&text)?;
        let all: Vec<Contribution> = all
            .iter()
            .map(|text| serde_json::from_slice(text))
            .collect::<Result<_, _>>()
            .map_err(unreadable)?;
        let (mut ledger, mut moved) = (Ledger::default(), Ledger::default());
        let mut phases: Vec<(String, String, f64)> = Vec::new();
        for one in &all {
            ledger.merge(&one.ledger);
            moved.merge(&one.moved);
            for (lane, name, seconds) in &one.phases {
                let seconds = seconds / all.len() as f64;
                match phases.iter_mut().find(|(l, n, _)| (l, n) == (lane, name)) {
                    Some((_, _, sum)) => *sum += seconds,
                    None => phases.push((lane.clone(), name.clone(), seconds)),
                }
            }
        }
        phases.sort_by(|a, b| b.2.total_cmp(&a.2));
        let predicted: Vec<CallTraffic> = all.iter().flat_map(|one| one.predicted.iter().cloned()).collect();
        let progress = self.state.progress();
        let summary = Summary {
            epoch: self.orders.identity.epoch,
            step: progress.step,
            threads: self.shared.options.threads,
            stopped,
            seconds,
            tokens: progress.tokens,
            last_loss: self.last.as_ref().map(|record| record.loss),
            validation: self.validation.clone(),
            ledger,
            step_time: StepTimeRecord::new(
                self.shared.options.predicted_step_s,
                self.shared.options.predicted_interval_s,
                &self.step_s,
            ),
            step_traffic: compare(&predicted, &moved),
            phases,
            expert_load: self.expert_load.clone(),
            memory: all.iter().map(|one| one.memory).collect(),
            peak_rss: all.iter().filter_map(|one| one.peak_rss).max(),
            skipped_steps: self.skipped,
            sample: None,
        };
        if self.leads() && !self.shared.is_over(self.orders.start) {
            let folder = &self.shared.options.folder;
            if let Some(trace) = lock(&self.shared.trace).take() {
                trace.close().map_err(TrainError::io("write", folder.join(TRACE_FILE)))?;
            }
            let text = serde_json::to_vec_pretty(&summary).map_err(unreadable)?;
            write_durably(&folder.join(SUMMARY_FILE), &text)?;
        }
        Ok(summary)
    }
}

/// A rank that panicked while it held a lock has ended the run.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
