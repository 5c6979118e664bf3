//! What the planner found, as values that every form of output reads.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use unisono_plan::search::{Found, Plan, SAFE, Search};
use unisono_plan::{
    Architecture, Change, Cluster, Communication, Outlook, Parallelism, ParallelismError, Percentiles,
    Priced, Pricer, Ranged, RankMemory, Recomputation, RoutedStep, Routing, SimulatedStep, Traffic, Training,
    best_changes, trials,
};

use super::GIB;
use crate::error::CliError;
use crate::layout::cores;
use crate::screen::Screen;
use crate::style::short;

/// The template of the bar of a search.
pub const BAR: &str = "searching layouts {bar:30} {pos}/{len} parts  {elapsed}";

/// The template of the bar of layouts that are simulated beside the chosen one.
pub const TRIALS_BAR: &str = "trying changes {bar:30} {pos}/{len}  {elapsed}";

/// Changes that are shown.
const SHOWN_CHANGES: usize = 3;

/// Parts that a search is cut into: enough for a bar that moves.
const PARTS: usize = 64;

/// The most micro-batches times stages that are simulated: seconds and a gigabyte.
const MOST_PASSES: usize = 1 << 20;

/// So many take no time that one would notice.
const QUICK_PASSES: usize = 1 << 16;

/// The question with its answer.
#[derive(Debug)]
pub struct Answer {
    /// The model.
    pub model: Architecture,
    /// The cluster.
    pub cluster: Cluster,
    /// The training.
    pub training: Training,
    /// What a search found; `None` when the layout was given.
    pub found: Option<Found>,
    /// The plan that everything below is about.
    pub chosen: Plan,
    /// Of a layout that was given and cannot be counted on to fit, the nearest that can.
    pub nearest_that_fits: Option<Parallelism>,
    /// The whole run.
    pub outlook: Outlook,
    /// Bytes over links.
    pub traffic: Traffic,
    /// `[axis][level]` seconds by the links that exchanges wait for.
    pub communication: Vec<Vec<Communication>>,
    /// `[pipeline rank]` what it holds.
    pub memory: Vec<RankMemory>,
    /// What would help most.
    pub changes: Vec<Change>,
    /// What uneven routing makes of the chosen layout; `None` when it is even.
    pub uneven: Option<Uneven>,
    /// What was asked to be computed again.
    pub recompute: Option<Recomputation>,
}

/// Which layouts come into question.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wanted {
    /// This one alone.
    pub layout: Option<Parallelism>,
    /// Of a search: those that compute this again and nothing else.
    pub recompute: Option<Recomputation>,
}

/// What uneven routing makes of the chosen layout, whose price is of the median step and of the memory in a slow one.
#[derive(Debug, Clone, Copy)]
pub struct Uneven {
    /// Rows of the fullest expert-parallel rank over its even share.
    pub rows: Percentiles,
    /// Seconds of a step of which nineteen of twenty are faster.
    pub slow_step: Ranged,
    /// Seconds of a step if routing were even.
    pub even_step: Ranged,
    /// Bytes on the fullest rank in the median step.
    pub median_bytes: Ranged,
    /// Bytes on the fullest rank if routing were even.
    pub even_bytes: Ranged,
}

impl Answer {
    /// The fastest plan of a search, if it is not the chosen one: it fits, but cannot be counted on to.
    pub fn riskier(&self) -> Option<&Plan> {
        let fastest = self.found.as_ref()?.fastest.first()?;
        (fastest.layout != self.chosen.layout).then_some(fastest)
    }

    /// Prices the layout that is given, or searches for the fastest that fits.
    pub fn to(
        model: Architecture,
        cluster: Cluster,
        training: Training,
        wanted: Wanted,
    ) -> Result<Self, CliError> {
        let search = searching(&model, &cluster, &training, wanted.recompute);
        let (found, chosen) = match wanted.layout {
            Some(layout) => (None, given(&search, &model, &cluster, &training, layout)?),
            None => {
                let found = run(&search);
                let best = found.best().cloned();
                let best = best.ok_or_else(|| nothing_fits(&model, &cluster, &training, wanted.recompute))?;
                (Some(found), best)
            }
        };
        let risky = found.is_none() && chosen.fit_probability < SAFE;
        let nearest_that_fits = if risky { search.nearest_that_fits(&chosen.layout) } else { None };
        let pricer = Pricer::new(&model, &cluster, &training);
        let layout = chosen.layout;
        let (changes, uneven) = tried(&model, &cluster, &training, &chosen);
        Ok(Self {
            outlook: Outlook::of(&chosen.priced, &cluster, &layout, &training),
            traffic: pricer.traffic(&layout),
            communication: pricer.communication(&layout, &chosen.priced.breakdown),
            memory: (0..layout.pipeline).map(|rank| pricer.rank_memory(&layout, rank)).collect(),
            changes,
            uneven,
            model,
            cluster,
            training,
            found,
            chosen,
            nearest_that_fits,
            recompute: wanted.recompute,
        })
    }

    /// A pricer of the question.
    pub fn pricer(&self) -> Pricer {
        Pricer::new(&self.model, &self.cluster, &self.training)
    }

    /// The chosen layout's price in closed form, as the search pruned with it.
    pub fn closed_form(&self) -> Priced {
        self.pricer().price(&self.chosen.layout).unwrap_or_else(|_| self.chosen.priced.clone())
    }

    /// The chosen layout's step, op by op.
    pub fn simulate(&self) -> Result<SimulatedStep, CliError> {
        let layout = &self.chosen.layout;
        let passes = layout.micro_batches(&self.training) * layout.chunks();
        if passes > MOST_PASSES {
            return Err(CliError::usage(format!(
                "{layout}: {passes} micro-batches through stages are too many to simulate, at most {MOST_PASSES} are: smaller --batch \
                 or larger mb"
            )));
        }
        let screen = Screen::new(BAR);
        if passes > QUICK_PASSES {
            screen.wait("simulating the step");
        }
        let step = self.pricer().simulate(&self.chosen.layout, true);
        screen.finish();
        step.map_err(|error| CliError::usage(error.to_string()))
    }

    /// Operations per second of a GPU that the model needs (causal, recomputation not counted), over its peak in bf16.
    pub fn model_flops_share(&self) -> Ranged {
        self.flops_per_s_per_gpu().times(self.cluster.gpu.bf16_flops.recip())
    }

    /// Operations per second of a GPU that the model needs.
    pub fn flops_per_s_per_gpu(&self) -> Ranged {
        let a_token = self.model.train_flops(self.training.sequence, true, true);
        self.outlook.tokens_per_s.times(a_token / self.chosen.layout.gpus() as f64)
    }
}

/// What is tried beside the chosen layout, on every core: the changes that would help most, and other routing.
fn tried(
    model: &Architecture,
    cluster: &Cluster,
    training: &Training,
    chosen: &Plan,
) -> (Vec<Change>, Option<Uneven>) {
    let pricer = Pricer::new(model, cluster, training);
    let trials = trials(cluster, &chosen.layout, training);
    let even = Training { routing: Routing::Balanced, ..training.clone() };
    let routed = [
        Pricer::new(model, cluster, &even),
        pricer.clone().with_memory_of(RoutedStep::Median),
        pricer.clone().of_step(RoutedStep::Slow),
    ];
    let rows = pricer.unevenness(&chosen.layout);
    let routed = if rows == Percentiles::EVEN { &[][..] } else { &routed[..] };
    let screen = Screen::new(TRIALS_BAR);
    let found = spread(&screen, trials.len(), |at| trials[at].price(model, &pricer, &chosen.priced));
    let steps = spread(&screen, routed.len(), |at| routed[at].price_simulated(&chosen.layout).ok());
    screen.finish();
    let uneven = match &steps[..] {
        [Some(even), Some(median), Some(slow)] => Some(Uneven {
            rows,
            slow_step: slow.step(),
            even_step: even.step(),
            median_bytes: median.bytes(),
            even_bytes: even.bytes(),
        }),
        _ => None,
    };
    (best_changes(found.into_iter().flatten().collect(), SHOWN_CHANGES), uneven)
}

/// A given layout, priced; more GPUs than there are is an error, fewer is not.
fn given(
    search: &Search,
    model: &Architecture,
    cluster: &Cluster,
    training: &Training,
    layout: Parallelism,
) -> Result<Plan, CliError> {
    let gpus = layout.gpus();
    let priced = match gpus > cluster.gpus {
        true => Err(format!("takes {gpus} GPUs and the cluster has {}", cluster.gpus)),
        false => search.pricer().price_simulated(&layout).map_err(|error| rule(&error)),
    };
    let priced = priced.map_err(|why| {
        let nearest = layout.nearest(model, training, cluster.gpus);
        let fitting = match search.pricer().price(&nearest).is_ok_and(|priced| priced.fits) {
            true => String::new(),
            false => search.nearest_that_fits(&layout).map_or_else(
                || "; it does not fit, nor does any that a search tries".into(),
                |fitting| format!("; {FITTING}{fitting}"),
            ),
        };
        CliError::usage(format!("--layout {layout}: {why}; nearest: {nearest}{fitting}"))
    })?;
    let outlook = Outlook::of(&priced, cluster, &layout, training);
    Ok(Plan {
        number: 0,
        headroom_bytes: cluster.gpu.memory_bytes - priced.memory.total(),
        fit_probability: priced.fit_probability(cluster.gpu.memory_bytes),
        run_usd: outlook.usd_without_failures.value,
        layout,
        priced,
    })
}

/// What is said before a layout that can be counted on to fit.
pub const FITTING: &str = "nearest that fits the memory: ";

/// The rule that a layout breaks, without the nearest value of one degree: the nearest layout follows.
fn rule(error: &ParallelismError) -> String {
    match error {
        ParallelismError::Degree { field, value, rule, .. } => format!("{field} = {value}: {rule}"),
        ParallelismError::Schedule(error) => error.to_string(),
    }
}

/// The search that is asked for.
fn searching(
    model: &Architecture,
    cluster: &Cluster,
    training: &Training,
    recompute: Option<Recomputation>,
) -> Search {
    let search = Search::new(model, cluster, training);
    match recompute {
        Some(recompute) => search.recomputing(recompute),
        None => search,
    }
}

/// Searches on every core, then simulates what it found. The result does not depend on the cores.
fn run(search: &Search) -> Found {
    let screen = Screen::new(BAR);
    let parts = spread(&screen, PARTS, |part| search.run(part, PARTS));
    let found = parts.into_iter().reduce(Found::merge).unwrap_or_else(|| search.run(0, 1));
    let plans = found.plans();
    let refined = spread(&screen, plans.len(), |at| search.refine(&plans[at]));
    screen.finish();
    found.refined(refined)
}

/// `work` of every number below `parts`, in order, on every core, with a bar if it takes longer than a moment.
pub fn spread<T: Send>(screen: &Screen, parts: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let mut results: Vec<(usize, T)> = std::thread::scope(|scope| {
        let share = || {
            let mut results = Vec::new();
            loop {
                let part = next.fetch_add(1, Ordering::Relaxed);
                if part >= parts {
                    return results;
                }
                results.push((part, work(part)));
                done.fetch_add(1, Ordering::Relaxed);
            }
        };
        let workers: Vec<_> = (0..cores()).map(|_| scope.spawn(share)).collect();
        let finished = || workers.iter().all(std::thread::ScopedJoinHandle::is_finished);
        watch(screen, &done, parts as u64, finished);
        // A worker that panicked has said so; its parts are missed.
        workers.into_iter().filter_map(|worker| worker.join().ok()).flatten().collect()
    });
    results.sort_by_key(|(part, _)| *part);
    results.into_iter().map(|(_, result)| result).collect()
}

/// Moves the bar of work that takes longer than a moment.
fn watch(screen: &Screen, done: &AtomicUsize, parts: u64, finished: impl Fn() -> bool) {
    let mut waited = 0u32;
    while !finished() {
        std::thread::sleep(Duration::from_millis(20));
        waited += 1;
        match waited {
            0..25 => {}
            25 => screen.start(done.load(Ordering::Relaxed) as u64, parts),
            _ => screen.advance(done.load(Ordering::Relaxed) as u64, parts, String::new()),
        }
    }
}

/// No layout fits: says which comes nearest and by how much, and how many GPUs would do.
fn nothing_fits(
    model: &Architecture,
    cluster: &Cluster,
    training: &Training,
    recompute: Option<Recomputation>,
) -> CliError {
    let closest = searching(model, cluster, training, recompute).nearest().map_or_else(
        || "none divides it over all, a half or a quarter of the GPUs".to_string(),
        |plan| {
            format!("the nearest, {}, needs {:.1} GiB more a GPU", plan.layout, -plan.headroom_bytes / GIB)
        },
    );
    let asked = training.global_batch;
    let larger = if asked < cluster.gpus { 0 } else { 1 };
    let search = |cluster: &Cluster, training: &Training| searching(model, cluster, training, recompute);
    let enough = wider(search, cluster, training, 1, |_| asked)
        .or_else(|| wider(search, cluster, training, larger, |gpus| asked.max(gpus)))
        .map(|(gpus, batch)| format!("{gpus} GPUs with a batch of {batch} sequences would do"));
    CliError::usage(format!(
        "no layout of {} ({} parameters) fits {} {} with a batch of {} sequences: {closest}; {}",
        model.name,
        short(model.parameters() as u64),
        cluster.gpus,
        cluster.gpu.label(),
        training.global_batch,
        enough.unwrap_or_else(|| "nor would a thousand times as many".into())
    ))
}

/// The fewest GPUs, of those there are doubled `first` to ten times, on which a batch that may depend on them fits; with the batch.
fn wider(
    search: impl Fn(&Cluster, &Training) -> Search,
    cluster: &Cluster,
    training: &Training,
    first: u32,
    batch: impl Fn(usize) -> usize,
) -> Option<(usize, usize)> {
    let counts = (first..=10).map(|doublings| cluster.gpus << doublings);
    counts.filter_map(|gpus| cluster.enlarged(gpus).ok()).find_map(|wider| {
        let batch = batch(wider.gpus);
        let training = Training { global_batch: batch, ..training.clone() };
        let fits = search(&wider, &training).run(0, 1).feasible > 0;
        fits.then_some((wider.gpus, batch))
    })
}
