//! `unisono bench dispatch`, `overlap` and `exactness`: one model trained in several ways, in turn; between threads, or under
//! `mpirun`.

use clap::{Args, ValueEnum};
use serde_json::json;
use unisono_comm::{PretendedLink, kind};
use unisono_plan::dispatch::kind as rows;
use unisono_train::RunConfig;
use unisono_train::config::{DispatchConfig, LayoutConfig, ReduceEvery, WireConfig};
use unisono_train::ways::{Way, WayMeasured, WaysBench, bench_ways};

use crate::args::count;
use crate::bench::{Sizes, check, config, print};
use crate::error::{CliError, DONE};
use crate::job::Job;
use crate::style::{duration, percent, table};

/// How the ways are measured.
#[derive(Debug, Clone, Args)]
pub struct Measuring {
    #[command(flatten)]
    sizes: Sizes,
    /// Ranks as threads, each with one compute thread; under mpirun those it has started
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = count())]
    ranks: usize,
    /// Rounds of all ways in turn
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = count())]
    rounds: usize,
    /// Steps of a way in a round; one more warms up
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = count())]
    steps: usize,
}

/// `unisono bench dispatch`
#[derive(Debug, Args)]
pub struct Dispatch {
    #[command(flatten)]
    measuring: Measuring,
    /// Ranks of each pretended node, where ranks are threads
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    nodes: Vec<usize>,
    /// Nodes of experts: what a token's choices on one of them return is summed before it travels back
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = count())]
    expert_nodes: usize,
    /// Groups of experts
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count())]
    groups: usize,
    /// Groups that a token may choose experts of
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count())]
    top_groups: usize,
    /// Every expert gets as many tokens, and the next tokens in turn go to the next ones
    #[arg(long)]
    force_balance: bool,
}

/// What should hide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Hidden {
    /// Gathers of parameters, ZeRO-3
    Gathers,
    /// Dispatch and combine, beside shared experts and other chunks' products
    Dispatch,
}

/// `unisono bench overlap`
#[derive(Debug, Args)]
pub struct Overlap {
    #[command(flatten)]
    measuring: Measuring,
    /// What should hide
    #[arg(long, value_enum, default_value = "gathers")]
    what: Hidden,
    /// Megabytes a second of each thread rank's pretended link
    #[arg(long, value_name = "N", default_value_t = 200.0, value_parser = rate, allow_hyphen_values = true)]
    link_mb_per_s: f64,
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate: &f64| rate.is_finite() && *rate > 0.0);
    rate.ok_or_else(|| "must be a number above 0".into())
}

/// `unisono bench exactness`
#[derive(Debug, Args)]
pub struct Exactness {
    #[command(flatten)]
    measuring: Measuring,
}

/// Runs the ways; none on a process that does not speak for the job.
fn measure(
    measuring: &Measuring,
    job: &Job,
    nodes: &[usize],
    ways: impl Fn(usize) -> Result<Vec<Way>, CliError>,
) -> Result<Option<Vec<WayMeasured>>, CliError> {
    let ranks = job.ranks().unwrap_or(measuring.ranks);
    let bench = WaysBench {
        ways: ways(ranks)?,
        place: job.place.clone(),
        ranks,
        nodes: nodes.to_vec(),
        rounds: measuring.rounds,
        steps: measuring.steps,
    };
    let measured = bench_ways(&bench)?;
    Ok(job.leads().then_some(measured))
}

/// One replica and one slot of the experts' group a rank: the full unfold.
fn unfolded(measuring: &Measuring, ranks: usize) -> Result<RunConfig, CliError> {
    config(&measuring.sizes, ranks, ranks)
}

fn way(name: &str, config: &RunConfig, layout: LayoutConfig) -> Way {
    let config = RunConfig { layout, ..config.clone() };
    Way { name: name.into(), config, link: None, native_sums: false }
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.1}", seconds * 1e3)
}

/// `unisono bench dispatch`
pub fn dispatch(args: &Dispatch) -> Result<u8, CliError> {
    let job = Job::join()?;
    let outcome = measure_dispatch(args, &job);
    job.end(outcome)
}

fn measure_dispatch(args: &Dispatch, job: &Job) -> Result<u8, CliError> {
    let ways = |ranks: usize| {
        let mut f32 = unfolded(&args.measuring, ranks)?;
        f32.grid.expert_nodes = args.expert_nodes;
        (f32.model.num_groups, f32.model.top_groups) = (args.groups, args.top_groups);
        f32.model.force_balance = args.force_balance;
        check(&f32)?;
        let mut bf16 = f32.clone();
        bf16.train.dispatch_wire = WireConfig::Bf16;
        let alone = LayoutConfig { overlap: false, ..LayoutConfig::default() };
        let through = LayoutConfig { dispatch: DispatchConfig::Hierarchical, ..alone };
        let chunked = LayoutConfig { overlap: true, dispatch_chunks: 4, ..alone };
        let both = LayoutConfig { dispatch: DispatchConfig::Hierarchical, ..chunked };
        Ok(vec![
            way("flat", &f32, alone),
            way("flat, bf16", &bf16, alone),
            way("flat, 4 chunks", &f32, chunked),
            way("hierarchical", &f32, through),
            way("hierarchical, bf16", &bf16, through),
            way("hierarchical, 4 chunks", &f32, both),
        ])
    };
    let Some(measured) = measure(&args.measuring, job, &args.nodes, ways)? else { return Ok(DONE) };
    let sizes = &args.measuring.sizes;
    let nodes = args.expert_nodes;
    let expected = copies(sizes.experts, sizes.top_k, nodes, args.groups, args.top_groups);
    let header = ["way", "ms a step", "in dispatch and combine", "MiB between nodes", "copies a token"];
    let mut lines = vec![header.map(String::from).to_vec()];
    lines.extend(measured.iter().map(|way| {
        let mib = way.crossing_bytes / f64::from(1 << 20);
        let times = [way.step_s, way.dispatch_s].map(milliseconds);
        let [step, dispatch] = times;
        vec![way.name.clone(), step, dispatch, format!("{mib:.2}"), format!("{:.4}", way.copies)]
    }));
    let mut lines = table(&lines, 1);
    // Of ranks on one node nothing crosses.
    let crosses = measured.iter().any(|way| way.crossing_bytes > 0.0);
    let expected = crosses.then_some(expected);
    lines.extend(expected.map(|copies| {
        format!(
            "Uniform routing to {nodes} nodes: {copies:.4} copies a token if each node gets one, whatever experts it has chosen there."
        )
    }));
    let find = |name: &str| measured.iter().find(|way| way.name == name);
    let mut ratios = None;
    if let (Some(flat), Some(through)) = (find("flat"), find("hierarchical"))
        && flat.crossing_bytes > 0.0
    {
        let bytes = through.crossing_bytes / flat.crossing_bytes;
        let time = through.dispatch_s / flat.dispatch_s;
        let goal = 1.0 - 0.5 * (1.0 - bytes);
        ratios = Some(json!({ "bytes": bytes, "time": time, "goal": goal }));
        lines.push(format!(
            "Hierarchical next to flat: {bytes:.2} times the bytes between nodes, {time:.2} times the time of dispatch and combine \
             (goal: {goal:.2} or less)."
        ));
    }
    print(sizes.json, &json!({"ways": measured, "expected_copies": expected, "hierarchical": ratios}), lines)
}

/// Copies of a token that cross to other nodes, on average, where each node it has chosen experts on gets one: `top_k` of
/// `experts` at random, out of `top_groups` of `groups` at random, which `nodes` share out evenly.
fn copies(experts: usize, top_k: usize, nodes: usize, groups: usize, top_groups: usize) -> f64 {
    // Without limit every expert is a group of its own that may be chosen from.
    let (groups, top_groups) = if groups <= 1 { (experts, experts) } else { (groups, top_groups) };
    let (here, size) = (groups / nodes, experts / groups);
    // The ways to choose `few` of `many` over those to choose them of `all`.
    let share = |many: usize, all: usize, few: usize| {
        (0..few).map(|i| many.saturating_sub(i) as f64 / (all - i) as f64).product::<f64>()
    };
    let choose = |of: usize, few: usize| -> f64 {
        if few > of { 0.0 } else { (0..few).map(|i| (of - i) as f64 / (i + 1) as f64).product() }
    };
    let none = |chosen: usize| {
        let ways =
            choose(here, chosen) * choose(groups - here, top_groups - chosen) / choose(groups, top_groups);
        ways * share((top_groups - chosen) * size, top_groups * size, top_k)
    };
    (nodes as f64 - 1.0) * (1.0 - (0..=here.min(top_groups)).map(none).sum::<f64>())
}

/// `unisono bench overlap`
pub fn overlap(args: &Overlap) -> Result<u8, CliError> {
    let job = Job::join()?;
    let outcome = measure_overlap(args, &job);
    job.end(outcome)
}

fn measure_overlap(args: &Overlap, job: &Job) -> Result<u8, CliError> {
    if job.ranks().unwrap_or(args.measuring.ranks) < 2 {
        return Err(CliError::usage(
            "bench overlap: one rank sends nothing that could hide; give it at least 2",
        ));
    }
    let threads = job.ranks().is_none();
    let kinds: &[&str] = match args.what {
        Hidden::Gathers => &[kind::ALL_GATHER],
        Hidden::Dispatch => &[rows::DISPATCH, rows::COMBINE],
    };
    let link = threads.then_some(PretendedLink { bytes_per_s: args.link_mb_per_s * 1e6, kinds });
    let ways = |ranks: usize| {
        // Experts that every rank holds are gathered, too, and no row travels.
        let expert_group = if matches!(args.what, Hidden::Gathers) { 1 } else { ranks };
        let mut config = config(&args.measuring.sizes, ranks, expert_group)?;
        // Waiting for a rank with more rows is no communication.
        config.model.force_balance = true;
        let overlapped = match args.what {
            Hidden::Gathers => {
                config.train.reduce_every = ReduceEvery::Microbatch;
                LayoutConfig { zero: 3, ..LayoutConfig::default() }
            }
            Hidden::Dispatch => LayoutConfig { dispatch_chunks: 4, ..LayoutConfig::default() },
        };
        let serial = LayoutConfig { overlap: false, ..overlapped };
        Ok(vec![
            Way { link, ..way("beside computation", &config, overlapped) },
            Way { link, ..way("waited for", &config, serial) },
        ])
    };
    let nodes = vec![1; if threads { args.measuring.ranks } else { 0 }];
    let Some(measured) = measure(&args.measuring, job, &nodes, ways)? else { return Ok(DONE) };
    let (overlapped, serial) = (&measured[0], &measured[1]);
    // Beside dispatch, a step gathers parameters and reduces gradients, which nothing hides here.
    let (what, seconds): (_, fn(&WayMeasured) -> f64) = match args.what {
        Hidden::Gathers => ("communication", |way| way.communication_s),
        Hidden::Dispatch => ("dispatch and combine", |way| way.dispatch_s),
    };
    let without_s = serial.step_s - seconds(serial);
    let hidden = 1.0 - (overlapped.step_s - without_s) / seconds(serial);
    let mut lines = vec![vec!["exchanges".into(), "ms a step".into(), format!("in {what}")]];
    let row =
        |way: &WayMeasured| vec![way.name.clone(), milliseconds(way.step_s), milliseconds(seconds(way))];
    lines.extend(measured.iter().map(row));
    let mut lines = table(&lines, 1);
    lines.push(format!("{} of {what} hides behind computation.", percent(hidden)));
    print(args.measuring.sizes.json, &json!({"ways": measured, "hidden": hidden}), lines)
}

/// `unisono bench exactness`
pub fn exactness(args: &Exactness) -> Result<u8, CliError> {
    let job = Job::join()?;
    let outcome = measure_exactness(args, &job);
    job.end(outcome)
}

fn measure_exactness(args: &Exactness, job: &Job) -> Result<u8, CliError> {
    if job.ranks().is_none() {
        return Err(CliError::usage(
            "bench exactness compares with the MPI library's sums: start it with mpirun",
        ));
    }
    let ways = |ranks: usize| {
        let config = unfolded(&args.measuring, ranks)?;
        let serial = LayoutConfig { overlap: false, ..LayoutConfig::default() };
        Ok(vec![
            way("exact", &config, serial),
            Way { native_sums: true, ..way("the library's", &config, serial) },
            way("exact, beside computation", &config, LayoutConfig::default()),
        ])
    };
    let Some(measured) = measure(&args.measuring, job, &[], ways)? else { return Ok(DONE) };
    let cost = measured[0].step_s / measured[1].step_s - 1.0;
    let mut lines = vec![["sums", "a step"].map(String::from).to_vec()];
    lines.extend(measured.iter().map(|way| vec![way.name.clone(), duration(way.step_s)]));
    let mut lines = table(&lines, 1);
    lines.push(format!("Exactness costs {:+.1}% of a step.", 100.0 * cost));
    print(args.measuring.sizes.json, &json!({"ways": measured, "cost": cost}), lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_those_of_the_formula() {
        // Without groups: (R-1)[1 - C(E-E/R,k)/C(E,k)]; 1 - C(8,2)/C(16,2) = 1 - 28/120.
        assert!((copies(16, 2, 2, 1, 1) - (1.0 - 28.0 / 120.0)).abs() < 1e-12);
        assert!((copies(256, 8, 4, 1, 1) - 3.0 * (1.0 - 0.75f64.powi(8))).abs() < 0.02);
        // One group of two, each on a node: half of the tokens cross.
        assert!((copies(16, 4, 2, 2, 1) - 0.5).abs() < 1e-12);
        // All groups may be chosen from: as without.
        assert!((copies(16, 4, 2, 4, 4) - copies(16, 4, 2, 1, 1)).abs() < 1e-12);
    }
}
