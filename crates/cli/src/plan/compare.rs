//! `unisono plan compare`

use clap::Args;
use serde_json::{Value, json};
use unisono_plan::{Architecture, Cluster, Synchronisation};

use super::GIB;
use super::answer::Answer;
use super::local::LOCAL;
use super::question::{self, Model, TrainingArgs};
use super::{json as as_json, show};
use crate::error::{CliError, DONE};
use crate::screen::{complain, say};
use crate::style::{Paint, duration, grouped, percent, table};

/// `unisono plan compare`
#[derive(Debug, Args)]
pub struct Compare {
    /// A model; may be given again
    #[arg(long = "model", value_name = "MODEL", required = true)]
    models: Vec<String>,
    /// A cluster; may be given again
    #[arg(long = "cluster", value_name = "CLUSTER", required = true)]
    clusters: Vec<String>,
    #[command(flatten)]
    training: TrainingArgs,
    /// Also dense models with all, and with the active, parameters of every sparse one
    #[arg(long)]
    dense: bool,
    /// Also how long replicas would take to agree at one place, or through parameter servers
    #[arg(long)]
    baselines: bool,
    /// Print one JSON array
    #[arg(long)]
    json: bool,
}

/// Answers every model on every cluster.
pub fn run(args: &Compare) -> Result<u8, CliError> {
    if args.clusters.iter().any(|name| name == LOCAL) {
        return Err(CliError::usage(
            "--cluster local: only `unisono plan CONFIG local` prices layouts on this machine, its steps are the engine's own; \
             here a cluster is a GPU and a count or a TOML file",
        ));
    }
    let mut models: Vec<Model> = Vec::new();
    for name in &args.models {
        let model = question::model(name)?;
        let twins = if args.dense { twins(&model.architecture) } else { Vec::new() };
        let origin = model.origin.clone();
        models.push(model);
        models.extend(twins.into_iter().map(|architecture| Model { architecture, origin: origin.clone() }));
    }
    args.training.check_experts(&models)?;
    let clusters =
        args.clusters.iter().map(|name| question::cluster(name)).collect::<Result<Vec<Cluster>, _>>()?;
    let mut answers = Vec::new();
    for model in &models {
        for cluster in &clusters {
            let training = args.training.training(model, cluster);
            match training
                .and_then(|training| Answer::to(model.architecture.clone(), cluster.clone(), training, None))
            {
                Ok(answer) => answers.push(answer),
                Err(error) if models.len() * clusters.len() == 1 => return Err(error),
                // One that cannot be says so; the others are compared.
                Err(error) => complain("warning", &error.message),
            }
        }
    }
    if answers.is_empty() {
        return Err(CliError::usage("nothing to compare: no model fits any of the clusters"));
    }
    if args.json {
        let all: Vec<Value> = answers.iter().map(|answer| object(answer, args.baselines)).collect();
        say(&format!("{}\n", Value::Array(all)));
    } else {
        print(&answers, args.baselines);
    }
    Ok(DONE)
}

/// Dense models with all and with the active parameters.
pub fn twins(model: &Architecture) -> Vec<Architecture> {
    let sizes = [model.parameters() as f64, model.active_parameters() as f64];
    sizes.into_iter().filter_map(|parameters| model.dense_twin(parameters)).collect()
}

fn object(answer: &Answer, baselines: bool) -> Value {
    let mut object = as_json::object(answer);
    if baselines {
        let of = synchronisation(answer);
        object["synchronisation_s"] = json!({
            "ours": of.ours_s,
            "merge_at_one": of.merge_at_one_s,
            "parameter_server": of.parameter_server_s,
        });
    }
    object
}

fn synchronisation(answer: &Answer) -> Synchronisation {
    Synchronisation::of(&answer.chosen.priced, &answer.chosen.layout, &answer.cluster)
}

fn print(answers: &[Answer], baselines: bool) {
    let paint = Paint::new(&std::io::stdout());
    say(&format!("{}\n", paint.strong("The fastest layout that fits, each")));
    say(&format!("{}\n", rows(answers).join("\n")));
    say(&format!(
        "{}\n",
        paint.faint("hours a T: GPU-hours of training for 10^12 tokens; dollars with failures")
    ));
    let rows = uneven(answers);
    if rows.len() > 1 {
        say(&format!("\n{}\n", paint.strong("Uneven routing")));
        say(&format!("{}\n", table(&rows, 2).join("\n")));
        let note = "fullest rank: rows of the fullest expert-parallel rank over an even share, in the median step and in one of twenty";
        say(&format!("{}\n", paint.faint(note)));
    }
    if !baselines {
        return;
    }
    say(&format!("\n{}\n", paint.strong("Replicas agree once a step")));
    let head = ["model", "cluster", "replicas", "ours", "merged at one place", "parameter servers"];
    let mut rows = vec![head.map(String::from).to_vec()];
    rows.extend(answers.iter().map(|answer| {
        let of = synchronisation(answer);
        let step = answer.chosen.priced.step_s;
        let against = |seconds: f64| format!("{} ({:.1} steps)", duration(seconds), seconds / step);
        let layout = &answer.chosen.layout;
        vec![
            answer.model.name.clone(),
            cluster(answer),
            grouped((layout.data * layout.context) as u64),
            format!("{} ({} of a step)", duration(of.ours_s), percent(of.ours_s / step)),
            against(of.merge_at_one_s),
            against(of.parameter_server_s),
        ]
    }));
    say(&format!("{}\n", table(&rows, 2).join("\n")));
}

/// What uneven routing makes of each, with its head.
fn uneven(answers: &[Answer]) -> Vec<Vec<String>> {
    let head = [
        "model",
        "cluster",
        "fullest rank",
        "even step",
        "median",
        "one of twenty",
        "GiB, even",
        "GiB",
        "free",
    ];
    let mut rows = vec![head.map(String::from).to_vec()];
    rows.extend(answers.iter().filter_map(|answer| {
        let (uneven, priced) = (answer.uneven()?, &answer.chosen.priced);
        Some(vec![
            answer.model.name.clone(),
            cluster(answer),
            format!("{:.2}, {:.2}", uneven.rows.p50, uneven.rows.p95),
            duration(uneven.even_step_s),
            duration(priced.step_s),
            duration(uneven.slow_step_s),
            format!("{:.1}", uneven.even_bytes / GIB),
            format!("{:.1}", priced.memory.total() / GIB),
            format!("{:.1}", answer.chosen.headroom_bytes / GIB),
        ])
    }));
    rows
}

/// GPUs and what their network gives each when all send.
fn cluster(answer: &Answer) -> String {
    let cluster = &answer.cluster;
    let network = cluster.levels[cluster.levels.len() - 1].shared_bytes_per_s() / 1e9;
    format!("{} x {}, {network} GB/s", grouped(cluster.gpus as u64), cluster.gpu.name)
}

/// The table, with its head; above it the training if it is that of all, else a column of it.
fn rows(answers: &[Answer]) -> Vec<String> {
    let (days, dollars) = show::scales(answers.iter().map(|answer| &answer.outlook));
    let head = ["model", "cluster", "layout", "step", "tokens/s", "hours a T", days.name, dollars.name];
    let mut rows = vec![head.map(String::from).to_vec()];
    rows.extend(answers.iter().map(|answer| {
        vec![
            answer.model.name.clone(),
            cluster(answer),
            answer.chosen.layout.to_string(),
            duration(answer.chosen.priced.step_s),
            grouped(answer.outlook.tokens_per_s as u64),
            grouped(answer.outlook.gpu_hours_per_trillion(&answer.training) as u64),
            days.number(answer.outlook.days, 1),
            dollars.number(answer.outlook.usd, 2),
        ]
    }));
    let common = show::training(&answers[0]);
    if answers.iter().all(|answer| show::training(answer) == common) {
        return [vec![format!("  {common}")], table(&rows, 3)].concat();
    }
    rows[0].insert(2, "training".into());
    rows[1..].iter_mut().zip(answers).for_each(|(row, answer)| row.insert(2, show::batches(answer)));
    table(&rows, 4)
}
