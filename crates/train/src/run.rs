//! A whole run: checks, ranks, steps, validations, checkpoints, summary.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use unisono_checkpoint::{Reader, SaveId, keep_last, latest};
use unisono_comm::watch::{Grace, Identity};
use unisono_comm::{
    Activity, Cause, Communicator, Failure, FlightDeck, Ledger, RunError, ThreadRanks, Watchdog,
};
use unisono_data::{Dataset, Part, Verify};
use unisono_mesh::Fold;
use unisono_model::{Lane, Profile};
use unisono_plan::Layout;
use unisono_tensor::{Backend, Cpu};

use crate::checkpointing::Extra;
use crate::config::{OnNonFinite, RunConfig};
use crate::error::TrainError;
use crate::memory::{check_fits, estimate};
use crate::probe::probe;
use crate::rank::{Fault, RankState};
use crate::record::{Event, MemoryRecord, Observer, Started, StepRecord, Summary, ValidationRecord};
use crate::run_folder::{
    CHECKPOINTS, FLIGHT, RunFolder, SUMMARY_FILE, TRACE_FILE, holds_a_run, next_identity, write_durably,
};
use crate::system::peak_rss;
use crate::trace::TraceWriter;

/// How a config is run here; nothing of it changes a number.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// The run folder.
    pub folder: PathBuf,
    /// Ranks; divides the grid's slots.
    pub ranks: usize,
    /// Compute threads of each rank.
    pub threads: usize,
    /// Go on from the newest good checkpoint of the folder.
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
    /// The ranks of this process, while the run goes: whoever has a clone can write their flight records.
    pub deck: FlightDeck,
    /// Called when the run has failed because a rank keeps others waiting, and ranks of this process do not come back:
    /// only the end of the process helps then.
    pub abandon: fn(&Failure),
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
            deck: FlightDeck::default(),
            abandon: |_| {},
        }
    }

    /// # Errors
    /// [`TrainError::Nodes`] unless the pretended nodes hold all ranks.
    fn check_nodes(&self) -> Result<(), TrainError> {
        let (nodes, ranks) = (self.nodes.clone(), self.ranks);
        if nodes.is_empty() || (nodes.iter().sum::<usize>() == ranks && !nodes.contains(&0)) {
            return Ok(());
        }
        Err(TrainError::Nodes { nodes, ranks })
    }
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
    let needed = dataset.tokenizer().vocab_size() as usize;
    if config.model.vocab_size < needed {
        return Err(TrainError::Resume(format!(
            "model.vocab_size = {}: the dataset's tokenizer has {needed} tokens; set model.vocab_size to at least that",
            config.model.vocab_size
        )));
    }
    Ok(dataset)
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
    start: Option<u64>,
    rejected: Vec<String>,
    folder: Mutex<Option<RunFolder>>,
    trace: Option<Mutex<TraceWriter>>,
    began: Instant,
    memory: Vec<(&'static str, u64)>,
}

/// What a rank brings back.
struct RankOutcome {
    last: Option<StepRecord>,
    validation: Option<ValidationRecord>,
    stopped: bool,
    step: u64,
    tokens: u64,
    skipped: u64,
    seconds: f64,
    ledger: Ledger,
    phases: Vec<(Lane, &'static str, f64)>,
    expert_load: Vec<Vec<u64>>,
    memory: MemoryRecord,
    epoch: u64,
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
    check_fits(config, &fold, &estimate(config, &fold))?;
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
    options.check_nodes()?;
    let memory = estimate(config, &fold);
    let (start, rejected) = find_start(config, options, dataset)?;
    let folder = RunFolder::open(&options.folder, config, start)?;
    let trace = options.trace.then(|| new_trace(&options.folder, options.ranks)).transpose()?;
    let shared = Shared {
        config,
        options,
        dataset,
        observer,
        fold,
        start,
        rejected,
        folder: Mutex::new(Some(folder)),
        trace,
        began: Instant::now(),
        memory,
    };
    let mut ranks = ThreadRanks::new(options.ranks).nodes(&options.nodes);
    if let Some(seed) = options.jitter {
        ranks = ranks.jitter(seed);
    }
    let watchdog = watch(config, options)?;
    let outcomes = ranks.run(|comm| run_rank(&shared, comm));
    drop(watchdog);
    if let Err(error) = &outcomes {
        leave_records(options, error, observer);
    }
    options.deck.clear();
    let outcomes = outcomes.map_err(root_cause)?;
    if let Some(trace) = shared.trace {
        let trace = trace.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        trace.close().map_err(TrainError::io("write", options.folder.join(TRACE_FILE)))?;
    }
    let summary = summarize(outcomes);
    let text = serde_json::to_string_pretty(&summary).map_err(|e| TrainError::Resume(e.to_string()))?;
    write_durably(&options.folder.join(SUMMARY_FILE), text.as_bytes())?;
    Ok(summary)
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

fn new_trace(folder: &Path, ranks: usize) -> Result<Mutex<TraceWriter>, TrainError> {
    let path = folder.join(TRACE_FILE);
    let writer = TraceWriter::create(&path, ranks).map_err(TrainError::io("write", path))?;
    Ok(Mutex::new(writer))
}

/// The step to go on from, and which checkpoints were passed over.
fn find_start(
    config: &RunConfig,
    options: &RunOptions,
    dataset: &Dataset,
) -> Result<(Option<u64>, Vec<String>), TrainError> {
    let folder = &options.folder;
    if !options.resume {
        if holds_a_run(folder) {
            return Err(TrainError::Resume(format!(
                "{} already holds a run: add --resume to go on with it, or name another folder with --run",
                folder.display()
            )));
        }
        return Ok((None, Vec::new()));
    }
    let found = latest(&folder.join(CHECKPOINTS))?;
    let rejected: Vec<String> =
        found.rejected.iter().map(|(step, why)| format!("step {step}: {why}")).collect();
    let Some(step) = found.step else {
        let reasons = if rejected.is_empty() { String::new() } else { format!(" ({})", rejected.join("; ")) };
        return Err(TrainError::Resume(format!(
            "{} has no checkpoint that verifies{reasons}: start anew with another --run",
            folder.display()
        )));
    };
    let extra = read_extra(&Reader::open(&folder.join(CHECKPOINTS), step)?)?;
    check_same_computation(config, &extra.config)?;
    if extra.data != fingerprint(dataset) {
        return Err(TrainError::Resume(format!(
            "the data of {} are not the ones the run was started with: resume with the same dataset",
            folder.display()
        )));
    }
    Ok((Some(step), rejected))
}

/// The small state of a checkpoint.
///
/// # Errors
/// If it is not that of a run.
pub fn read_extra(reader: &Reader) -> Result<Extra, TrainError> {
    serde_json::from_value(reader.extra().clone()).map_err(|error| {
        TrainError::Resume(format!("checkpoint step {} has no state of a run: {error}", reader.step()))
    })
}

/// What may not change between start and resume, since later numbers would not be those of one run.
fn check_same_computation(now: &RunConfig, then: &RunConfig) -> Result<(), TrainError> {
    let fixed = |config: &RunConfig| {
        let mut fixed = config.clone();
        fixed.train.steps = 0;
        fixed.train.recompute = crate::config::RecomputeConfig::None;
        fixed.train.on_non_finite = OnNonFinite::Skip;
        let (optimizer, schedule) = Default::default();
        (fixed.optimizer, fixed.schedule) = (optimizer, schedule);
        (fixed.data, fixed.layout) = Default::default();
        (fixed.evaluation, fixed.checkpoint) = (Default::default(), Default::default());
        (fixed.log, fixed.watchdog, fixed.sample) = Default::default();
        fixed
    };
    let (now, then) = (fixed(now).to_toml()?, fixed(then).to_toml()?);
    match now.lines().zip(then.lines()).find(|(now, then)| now != then) {
        None => Ok(()),
        Some((now, then)) => Err(TrainError::Resume(format!(
            "resume asks for {now}, the run was started with {then}: this would be another computation; drop the change or \
             start anew with another --run"
        ))),
    }
}

fn run_rank(shared: &Shared<'_>, comm: Communicator) -> Result<RankOutcome, TrainError> {
    let backend = Cpu::new(shared.options.threads);
    let profile = Profile::new(shared.began);
    profile.keep_spans(shared.trace.is_some());
    let probe = agree_on_probe(&backend, &comm)?;
    let identity = start_identity(shared, &comm, &probe)?;
    shared.options.deck.join(&comm, &shared.options.folder.join(FLIGHT), &identity);
    let mut state = RankState::new(
        shared.config,
        shared.dataset,
        backend.clone(),
        shared.fold,
        comm.clone(),
        profile.clone(),
    )?;
    if let Some(step) = shared.start {
        let reader = Reader::open(&shared.options.folder.join(CHECKPOINTS), step)?;
        let extra = read_extra(&reader)?;
        state.restore(&reader, &extra)?;
    }
    if let Some(fault) = shared.options.fault {
        state.plant(fault);
    }
    if comm.rank() == 0 {
        shared.observer.event(Event::Started(Box::new(shared.started(probe))));
    }
    let mut run = RankRun {
        shared,
        comm,
        state,
        identity,
        failed_saves: 0,
        saved: shared.start,
        validation: None,
        last: None,
        expert_load: Vec::new(),
        skipped: 0,
    };
    let stopped = run.steps()?;
    let memory = MemoryRecord {
        estimated: shared.memory.iter().map(|(_, bytes)| bytes).sum(),
        measured: backend.memory().1 as u64,
        states: run.state.states_bytes() as u64,
    };
    let seconds = shared.began.elapsed().as_secs_f64();
    let progress = run.state.progress();
    Ok(RankOutcome {
        last: run.last,
        validation: run.validation,
        stopped,
        step: progress.step,
        tokens: progress.tokens,
        skipped: run.skipped,
        seconds,
        ledger: run.comm.ledger(),
        phases: profile
            .phases()
            .into_iter()
            .map(|(lane, name, time)| (lane, name, time.as_secs_f64()))
            .collect(),
        expert_load: run.expert_load,
        memory,
        epoch: run.identity.epoch,
    })
}

/// All ranks must give the same answers to the probe.
fn agree_on_probe<B: Backend>(backend: &B, comm: &Communicator) -> Result<String, TrainError> {
    let own = probe(backend);
    let all = comm.all_gather_values(own.as_bytes())?;
    let differing: Vec<String> =
        (0..all.len()).filter(|rank| all[*rank] != all[0]).map(|r| r.to_string()).collect();
    if differing.is_empty() {
        return Ok(own);
    }
    Err(TrainError::Resume(format!(
        "kernels of rank(s) {} give other bits than those of rank 0 on fixed inputs: run on machines of one kind",
        differing.join(", ")
    )))
}

/// Run id and epoch, decided by rank 0.
fn start_identity(shared: &Shared<'_>, comm: &Communicator, probe: &str) -> Result<Identity, TrainError> {
    let mut message = Vec::new();
    if comm.rank() == 0 {
        let identity = next_identity(&shared.options.folder, probe, shared.config.train.seed)?;
        message.extend(identity.epoch.to_le_bytes());
        message.extend(identity.run_id.into_bytes());
    }
    let all = comm.all_gather_values(&message)?;
    let (epoch, run_id) = all[0]
        .split_first_chunk::<8>()
        .ok_or_else(|| TrainError::Resume("rank 0 sent no identity of the run".into()))?;
    Ok(Identity { run_id: String::from_utf8_lossy(run_id).into_owned(), epoch: u64::from_le_bytes(*epoch) })
}

impl Shared<'_> {
    fn started(&self, probe: String) -> Started {
        let layout = Layout::new(&self.config.model);
        Started {
            folder: self.options.folder.clone(),
            from_step: self.start.unwrap_or(0),
            steps: self.config.train.steps,
            ranks: self.options.ranks,
            threads: self.options.threads,
            parameters: layout.parameters(self.config.model.top_k),
            tokens_per_step: self.config.tokens_per_step(),
            train_tokens: self.dataset.tokens(Part::Train),
            memory: self.memory.clone(),
            probe,
            rejected: self.rejected.clone(),
        }
    }

    /// Runs `write` on the run folder; for rank 0.
    fn with_folder(
        &self,
        write: impl FnOnce(&mut RunFolder) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        let mut folder = self.folder.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        folder.as_mut().map_or(Ok(()), write)
    }
}

/// One rank's run.
struct RankRun<'a, 'b> {
    shared: &'a Shared<'b>,
    comm: Communicator,
    state: RankState<'a, Cpu>,
    identity: Identity,
    failed_saves: u32,
    saved: Option<u64>,
    validation: Option<ValidationRecord>,
    last: Option<StepRecord>,
    expert_load: Vec<Vec<u64>>,
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
            if self.told_to_stop()? {
                self.during(Activity::Checkpoint, Self::save)?;
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

    /// Rank 0 decides; all ranks hear it before they go on.
    fn told_to_stop(&self) -> Result<bool, TrainError> {
        let options = self.shared.options;
        let reached = options.stop_after.is_some_and(|step| self.state.progress().step >= step);
        let stop = self.leads() && (reached || self.shared.observer.stop());
        Ok(self.comm.broadcast(0, vec![u64::from(stop)])?[0] == 1)
    }

    fn one_step(&mut self) -> Result<(), TrainError> {
        let record = self.during(Activity::Step, |run| run.state.step())?;
        let config = self.shared.config;
        if config.log.hashes_every > 0 && record.step.is_multiple_of(config.log.hashes_every) {
            let hashes = self.state.hashes()?;
            if self.leads() {
                self.shared.with_folder(|folder| folder.hashes(&hashes))?;
            }
        }
        self.write_spans()?;
        if self.leads() {
            let memory = self.state.model().backend().memory().1 as u64;
            let effective = 1.0 - self.skipped as f64 / record.step as f64;
            self.shared.with_folder(|folder| folder.step(&record, memory, effective))?;
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
            self.shared.with_folder(|folder| folder.validation(&record))?;
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
        let Identity { run_id, epoch } = self.identity.clone();
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
            Err(error @ (TrainError::Checkpoint(_) | TrainError::Storage { .. })) => {
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
        if let Err(error) = keep_last(dir, count) {
            self.shared.observer.event(Event::Warning(format!("old checkpoints were not removed: {error}")));
        }
        Ok(())
    }

    fn write_spans(&self) -> Result<(), TrainError> {
        let Some(trace) = &self.shared.trace else { return Ok(()) };
        let mut trace = trace.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for span in self.state.model().profile().take_spans() {
            let args = serde_json::json!({"step": self.state.progress().step});
            let path = self.shared.options.folder.join(TRACE_FILE);
            trace
                .span(self.comm.rank(), span.lane, span.name, span.start, span.length, &args)
                .map_err(TrainError::io("write", path))?;
        }
        Ok(())
    }
}

fn summarize(outcomes: Vec<RankOutcome>) -> Summary {
    let mut ledger = Ledger::default();
    let mut phases: Vec<(Lane, &'static str, f64)> = Vec::new();
    let ranks = outcomes.len() as f64;
    for outcome in &outcomes {
        ledger.merge(&outcome.ledger);
        for (lane, name, seconds) in &outcome.phases {
            match phases.iter_mut().find(|(l, n, _)| (l, n) == (lane, name)) {
                Some((_, _, sum)) => *sum += seconds / ranks,
                None => phases.push((*lane, name, seconds / ranks)),
            }
        }
    }
    phases.sort_by(|a, b| b.2.total_cmp(&a.2));
    let memory = outcomes.iter().map(|outcome| outcome.memory).collect();
    let first = &outcomes[0];
    Summary {
        epoch: first.epoch,
        step: first.step,
        stopped: first.stopped,
        seconds: first.seconds,
        tokens: first.tokens,
        last_loss: first.last.as_ref().map_or(f64::NAN, |record| record.loss),
        validation: first.validation.clone(),
        ledger,
        phases: phases
            .into_iter()
            .map(|(l, name, seconds)| (l.name().to_string(), name.to_string(), seconds))
            .collect(),
        expert_load: first.expert_load.clone(),
        memory,
        peak_rss: peak_rss(),
        skipped_steps: first.skipped,
        sample: None,
    }
}
