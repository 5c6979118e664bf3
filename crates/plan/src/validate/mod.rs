//! The planner held to published measurements: every row of a table is read as generously as it can be, priced, and compared.
//! The columns are those of `end_to_end.csv`; no content of a row can make this fail.

mod baseline;
mod case;
mod golden;
mod interpret;
mod measured;
mod memory;
mod model;
mod names;
mod neighbours;
mod recipes;
mod release;
mod score;

use serde::Serialize;

use crate::architecture::Architecture;
use crate::calibration::{BORROWED_SPREAD, RELEASED_SPREAD};
use crate::hardware::{Cluster, Gpu};
use crate::parallelism::{Parallelism, ParallelismError, Training};
use crate::pricing::{Pricer, QUANTILE_90};
use crate::software::Software;
use crate::table::Table;

use case::{Case, Kind};
use interpret::Setup;
use model::Models;

pub use baseline::PUBLISHED_BASELINE;
pub use memory::{Memory, MemoryFigures, MemoryGroup, MemoryKind};
pub use score::{Group, TimeFigures};

const GIB: f64 = (1u64 << 30) as f64;

/// By how much a layout may exceed a GPU's memory and still be believed: predictions of memory are off by a few percent, and
/// layouts that are published did run.
const MEMORY_TOLERANCE: f64 = 1.1;

/// What pricing says of a plan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Seconds of a step.
    pub step_s: f64,
    /// The 80% interval of it.
    pub interval_s: [f64; 2],
    /// Peak of allocated memory on the fullest GPU, bytes.
    pub memory_bytes: f64,
    /// The same on a GPU of the last pipeline rank.
    pub last_rank_bytes: f64,
}

impl Prediction {
    /// What `pricer` says of `layout`.
    ///
    /// # Errors
    /// The layout cannot be.
    pub fn of(pricer: &Pricer, layout: &Parallelism, path: PricePath) -> Result<Self, ParallelismError> {
        let priced = match path {
            PricePath::Closed => pricer.price(layout),
            PricePath::Simulated => pricer.price_simulated(layout),
        }?;
        Ok(Self {
            step_s: priced.step_s,
            interval_s: priced.interval_s,
            memory_bytes: priced.memory.allocated(),
            last_rank_bytes: pricer.rank_memory(layout, layout.pipeline - 1).allocated(),
        })
    }

    /// With the interval that independent errors of a standard deviation of `spread`, in logarithms, add to.
    fn widened(self, spread: f64) -> Self {
        let end = |end: f64| {
            let log = (end / self.step_s).ln();
            self.step_s * log.hypot(QUANTILE_90 * spread).copysign(log).exp()
        };
        Self { interval_s: self.interval_s.map(end), ..self }
    }
}

/// How a step is priced, as in a search: what is left blank is chosen in closed form, what is chosen is simulated op by op.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PricePath {
    /// [`Pricer::price`].
    Closed,
    /// [`Pricer::price_simulated`].
    Simulated,
}

/// What a plan is predicted to take, or why it cannot be.
pub type Predicted = Result<Prediction, ParallelismError>;

/// What prices a plan.
pub type Pricing<'a> = &'a dyn Fn(&Architecture, &Cluster, &Parallelism, &Training, PricePath) -> Predicted;

/// A step time and its prediction.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Time {
    /// Seconds as measured; where the source prints throughput, of the batch that is predicted.
    pub measured_s: f64,
    /// Seconds as predicted.
    pub predicted_s: f64,
    /// The 80% interval of the prediction without knowledge of the software.
    pub interval_s: [f64; 2],
    /// The 80% interval around the prediction times the release factor.
    pub released_interval_s: [f64; 2],
    /// Tokens of the step.
    pub tokens: f64,
    /// Seconds by the trivial baseline: the median rate of the same GPU, precision and kind of model.
    pub baseline_s: Option<f64>,
}

impl Time {
    fn new(measured_s: f64, priced: &Prediction, tokens: f64) -> Self {
        Self {
            measured_s,
            predicted_s: priced.step_s,
            interval_s: priced.interval_s,
            released_interval_s: priced.interval_s,
            tokens,
            baseline_s: None,
        }
    }

    /// Moves the released interval around the prediction times `factor`.
    fn release(&mut self, factor: f64) {
        let narrowed = |end: f64| factor * self.predicted_s * (end / self.predicted_s).powf(RELEASED_SPREAD);
        self.released_interval_s = self.interval_s.map(narrowed);
    }

    fn baseline_error(&self) -> Option<f64> {
        self.baseline_s.map(|seconds| (seconds / self.measured_s - 1.0).abs())
    }
}

/// What became of a row.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// The row's `id`.
    pub id: String,
    /// Its source.
    pub file: String,
    /// The model, or its shape.
    pub model: String,
    /// The GPU, in its usual spelling.
    pub gpu: String,
    /// How many.
    pub gpus: u64,
    /// The precision, in its usual spelling; empty when none is printed.
    pub precision: String,
    /// The framework as printed.
    pub framework: String,
    /// Whether the model has experts.
    pub sparse: bool,
    /// The layout that was priced.
    pub plan: String,
    /// Whether the row has everything that a prediction of its step time needs.
    pub complete: bool,
    /// Step time, where it was compared.
    pub time: Option<Time>,
    /// Peak memory, where it was compared.
    pub memory: Option<Memory>,
    /// By how much the software differs from the model, seen from other rows; 1 when there are too few.
    pub factor: Option<f64>,
    /// Whether it is a test's golden value, which counts for memory, not for time.
    pub golden: bool,
    /// Why no step time was compared of a row that is no golden value, or why nothing was priced.
    pub skipped: Option<String>,
    /// Why a peak that is printed was not compared.
    pub memory_skipped: Option<String>,
    /// Operations of the step for one GPU, all keys of attention counted; 0 where no step time was compared.
    pub flops_per_gpu: f64,
}

impl Outcome {
    fn of(case: &Case) -> Self {
        Self {
            id: case.id.clone(),
            file: case.file.clone(),
            model: case.model_name().to_string(),
            gpu: case.gpu.clone(),
            gpus: case.gpus.unwrap_or(0),
            precision: case.precision.clone(),
            framework: case.framework.clone(),
            sparse: case.shape.experts.is_some() || !case.routing.is_empty(),
            plan: String::new(),
            complete: false,
            time: None,
            memory: None,
            factor: None,
            golden: case.kind == Kind::Golden,
            skipped: None,
            memory_skipped: None,
            flops_per_gpu: 0.0,
        }
    }

    /// File, model and GPU.
    pub fn family(&self) -> String {
        format!("{} / {} / {}", self.file, self.model, self.gpu)
    }

    fn factor(&self) -> f64 {
        self.factor.unwrap_or(1.0)
    }

    fn ratio(&self) -> Option<f64> {
        self.time.map(|time| time.measured_s / time.predicted_s)
    }
}

/// All rows and their figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Validation {
    /// Every row, in the order of the table.
    pub rows: Vec<Outcome>,
    /// Figures of each family.
    pub families: Vec<Group>,
    /// Means over families of dense models and of models with experts.
    pub kinds: Vec<Group>,
    /// Means over families by GPU.
    pub gpus: Vec<Group>,
    /// Means over families by precision.
    pub precisions: Vec<Group>,
    /// Mean over all families.
    pub all: Group,
    /// Figures of each kind of peak memory, means over families.
    pub memory_kinds: Vec<MemoryGroup>,
    /// Golden values, which count for memory, not for time.
    pub golden: usize,
    /// Reasons for which no step time of other rows was compared, with the number of rows.
    pub skipped: Vec<(String, usize)>,
    /// Reasons for which a printed peak of memory was not compared, with the number of rows.
    pub memory_skipped: Vec<(String, usize)>,
    /// The trivial baseline's mean absolute relative error over rows, not families, each predicted from the others.
    pub baseline_mape_of_rows: Option<f64>,
    /// The same as published with the measurements.
    pub published_baseline_mape: f64,
}

/// Prices every row of `cases` as [`PricePath`] says and compares. Models are those of `models`, a table with the columns of
/// `models.csv`, and the built-in ones.
pub fn validate(cases: &str, models: Option<&str>) -> Validation {
    let cases = Cases::read(cases, models);
    cases.judge((0..cases.len()).map(|row| cases.predict(row)).collect())
}

/// The same with another pricing.
pub fn validate_with(cases: &str, models: Option<&str>, price: Pricing<'_>) -> Validation {
    let cases = Cases::read(cases, models);
    cases.judge((0..cases.len()).map(|row| cases.outcome(row, price)).collect())
}

/// Columns without which no row can be priced or compared; of several names one is enough.
const NEEDED: [&[&str]; 4] = [
    &["gpu"],
    &["n_gpus"],
    &["model_key", "model_as_printed", "custom_arch"],
    &["step_time_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mem_max_gib"],
];

/// A table that is none of measurements, or none of models.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// There is no row below the header.
    #[error("has no rows; the first line must name the columns, a row of them follow")]
    Empty,
    /// Columns that nothing can be done without.
    #[error("lacks the columns {}", .0.join("; "))]
    Columns(Vec<String>),
}

/// Checks that `cases` has rows and the columns that every prediction needs.
///
/// # Errors
/// Names all columns that are missing.
pub fn check_cases(cases: &str) -> Result<(), TableError> {
    check_table(cases, &NEEDED)
}

/// The same of a table of models.
///
/// # Errors
/// Names all columns that are missing.
pub fn check_models(models: &str) -> Result<(), TableError> {
    check_table(models, &[&["model_key"], &["layers"], &["hidden"], &["heads"]])
}

fn check_table(text: &str, needed: &[&[&str]]) -> Result<(), TableError> {
    let table = Table::parse(text);
    let missing = needed.iter().filter(|names| !names.iter().any(|name| table.has(name)));
    let missing: Vec<String> = missing.map(|names| names.join(" or ")).collect();
    match (missing.is_empty(), table.rows().next()) {
        (false, _) => Err(TableError::Columns(missing)),
        (true, None) => Err(TableError::Empty),
        (true, Some(_)) => Ok(()),
    }
}

/// A table that was read and interpreted once, to be priced many times.
#[derive(Debug)]
pub struct Cases {
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    printed: Case,
    /// With its blanks filled.
    case: Case,
    /// What is known before any price is.
    blank: Outcome,
    setup: Option<Setup>,
}

impl Cases {
    /// Reads a table of measurements. Models are those of `models` and the built-in ones.
    pub fn read(cases: &str, models: Option<&str>) -> Self {
        let known = Models::read(models);
        let table = Table::parse(cases);
        let cases: Vec<Case> = table.rows().map(|row| Case::read(row, &known)).collect();
        Self { rows: (0..cases.len()).map(|at| Row::of(at, &cases, &known)).collect() }
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The GPU and the software of a row; `None` when it cannot be interpreted.
    pub fn runs_on(&self, row: usize) -> Option<(&Gpu, Software)> {
        let setup = self.rows[row].setup.as_ref()?;
        Some((&setup.cluster.gpu, setup.candidates.first()?.1.software))
    }

    /// What the planner makes of a row.
    pub fn predict(&self, row: usize) -> Outcome {
        self.outcome(row, &|model, cluster, layout, training, path| {
            Prediction::of(&Pricer::new(model, cluster, training), layout, path)
        })
    }

    /// What `price` makes of a row: the fastest of its layouts that fits, in closed form, simulated; if none fits, the one that comes
    /// nearest.
    pub fn outcome(&self, row: usize, price: Pricing<'_>) -> Outcome {
        self.rows[row].outcome(price)
    }

    /// The figures of `rows`, whose release factors come from each other.
    pub fn judge(&self, mut rows: Vec<Outcome>) -> Validation {
        release::set_factors(&mut rows);
        self.judge_with_factors(rows)
    }

    /// The figures of rows that have their release factors.
    pub fn judge_with_factors(&self, mut rows: Vec<Outcome>) -> Validation {
        baseline::set(&mut rows);
        Validation {
            families: score::families(&rows),
            kinds: score::grouped(&rows, |row| if row.sparse { "MoE".into() } else { "dense".into() }),
            gpus: score::grouped(&rows, |row| row.gpu.clone()),
            precisions: score::grouped(&rows, |row| row.precision.clone()),
            all: score::grouped(&rows, |_| "all".into()).pop().unwrap_or_else(|| Group::empty("all")),
            memory_kinds: memory::by_kind(&rows),
            golden: rows.iter().filter(|row| row.golden && row.skipped.is_none()).count(),
            skipped: score::reasons(rows.iter().map(|row| row.skipped.as_deref()), str::to_string),
            memory_skipped: score::reasons(
                rows.iter().map(|row| row.memory_skipped.as_deref()),
                str::to_string,
            ),
            baseline_mape_of_rows: baseline::mape_of_rows(&rows),
            published_baseline_mape: PUBLISHED_BASELINE,
            rows,
        }
    }
}

impl Row {
    fn of(at: usize, all: &[Case], models: &Models) -> Self {
        let (case, filled) = (&all[at], neighbours::filled(at, all));
        let mut blank = Outcome::of(case);
        let setup = match interpret::interpret(&filled, models) {
            Ok(setup) => {
                blank.sparse = setup.architecture.moe.is_some();
                blank.gpus = setup.cluster.gpus as u64;
                Some(setup)
            }
            Err(reason) => {
                blank.complete = case.kind == Kind::Run && case.is_complete();
                blank.skipped = Some(reason);
                None
            }
        };
        Self { printed: case.clone(), case: filled, blank, setup }
    }

    fn outcome(&self, price: Pricing<'_>) -> Outcome {
        let (case, mut outcome) = (&self.case, self.blank.clone());
        let Some(setup) = &self.setup else { return outcome };
        let (layout, training, priced) = match best(setup, price) {
            Ok(best) => best,
            Err(error) => {
                outcome.complete = case.kind == Kind::Run && self.printed.is_complete();
                outcome.skipped = Some(format!("the plan cannot be priced: {error}"));
                return outcome;
            }
        };
        outcome.plan = plan_text(layout, training);
        if case.kind != Kind::OutOfMemory {
            let measured = match self.printed.incomparable_memory(layout) {
                Some(reason) => case.measured_gib().map_or(Ok(None), |_| Err(reason.into())),
                None => measured::memory_gib(case, &setup.cluster.gpu),
            };
            match measured {
                Ok(gib) => outcome.memory = gib.map(|gib| Memory::new(case.memory_kind(), gib, &priced)),
                Err(reason) => outcome.memory_skipped = Some(reason),
            }
        }
        match case.kind {
            Kind::Golden => return outcome,
            Kind::OutOfMemory => outcome.skipped = Some("ran out of memory: no step time".into()),
            Kind::Run => {}
        }
        if outcome.skipped.is_some() {
            return outcome;
        }
        match measured::step_s(case, setup, training) {
            Err(reason) => outcome.skipped = Some(reason),
            Ok(measured_s) => {
                let tokens = training.sequence as f64 * training.global_batch as f64;
                let flops = setup.architecture.train_flops(training.sequence, false, false) * tokens;
                outcome.flops_per_gpu = flops / setup.cluster.gpus as f64;
                let spread = if setup.nearest_gpu { BORROWED_SPREAD[1] } else { 0.0 };
                outcome.time = Some(Time::new(measured_s, &priced.widened(spread), tokens));
            }
        }
        outcome
    }
}

/// A layout with its training and what it is predicted to take.
type Best<'a> = (&'a Parallelism, &'a Training, Prediction);

/// The fastest candidate that fits, simulated; or why none can be priced.
fn best<'a>(setup: &'a Setup, price: Pricing<'_>) -> Result<Best<'a>, String> {
    let capacity = setup.cluster.gpu.memory_bytes * MEMORY_TOLERANCE;
    let (mut best, mut refused): (Option<Best<'_>>, _) = (None, String::new());
    for (layout, training) in &setup.candidates {
        let priced = price(&setup.architecture, &setup.cluster, layout, training, PricePath::Closed);
        let priced = match priced {
            Ok(priced) => priced,
            Err(error) => {
                refused = error.to_string();
                continue;
            }
        };
        // Batches of candidates differ where none is printed: what counts is the time of a sequence.
        let rank = |priced: &Prediction, training: &Training| {
            let over = (priced.memory_bytes / capacity).max(1.0);
            (over, priced.step_s / training.global_batch as f64)
        };
        if best.as_ref().is_none_or(|(_, of, kept)| rank(&priced, training) < rank(kept, of)) {
            best = Some((layout, training, priced));
        }
    }
    let (layout, training, _) = best.ok_or(refused)?;
    let priced = price(&setup.architecture, &setup.cluster, layout, training, PricePath::Simulated);
    Ok((layout, training, priced.map_err(|error| error.to_string())?))
}

fn plan_text(layout: &Parallelism, training: &Training) -> String {
    format!(
        "tp{} pp{}x{} cp{} ep{}x{} dp{} mbs{} gbs{} seq{} {:?} {:?} {}",
        layout.tensor,
        layout.pipeline,
        layout.virtual_stages,
        layout.context,
        layout.expert,
        layout.expert_tensor,
        layout.data,
        layout.micro_batch,
        training.global_batch,
        training.sequence,
        layout.sharding,
        layout.recompute,
        training.compute,
    )
}
