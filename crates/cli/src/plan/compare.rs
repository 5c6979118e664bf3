//! `unisono plan compare`

use std::collections::HashSet;

use clap::Args;
use serde_json::{Value, json};
use unisono_plan::{Architecture, Cluster, Equal, Ranged, Synchronisation};

use super::GIB;
use super::answer::{Answer, Wanted};
use super::local::LOCAL;
use super::question::{self, Model, TrainingArgs};
use super::{json as as_json, show};
use crate::error::{CliError, DONE};
use crate::screen::{complain, say};
use crate::style::{Paint, Scale, duration, grouped, off, percent, table};

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
    /// Also dense models with all parameters of every sparse one, with those of equal quality by a rule of thumb, and with the active ones
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
            "--cluster local: only `unisono plan MODEL local` prices layouts on this machine, its steps are the engine's own; \
             here a cluster is a GPU and a count or a TOML file",
        ));
    }
    let mut models: Vec<(Model, Option<Equal>)> = Vec::new();
    for name in &args.models {
        let model = question::model(name)?;
        let twins = if args.dense { twins(&model.architecture) } else { Vec::new() };
        let origin = model.origin.clone();
        models.push((model, None));
        let twin = |(equal, architecture)| (Model { architecture, origin: origin.clone() }, Some(equal));
        models.extend(twins.into_iter().map(twin));
    }
    args.training.check_experts(models.iter().map(|(model, _)| model))?;
    let clusters =
        args.clusters.iter().map(|name| question::cluster(name)).collect::<Result<Vec<Cluster>, _>>()?;
    let wanted = Wanted { recompute: args.training.recompute, ..Wanted::default() };
    let (mut rows, mut all) = (Vec::new(), Vec::new());
    for (model, equal) in &models {
        for (cluster, name) in clusters.iter().zip(&args.clusters) {
            let training = args.training.training(model, cluster);
            let answer = training.and_then(|training| {
                Answer::to(model.architecture.clone(), cluster.clone(), training, wanted)
            });
            match answer {
                Ok(answer) => {
                    let row = Row { answer, equal: *equal, cluster: name };
                    all.push(object(&row, args.baselines));
                    rows.push(row);
                }
                Err(error) if models.len() * clusters.len() == 1 => return Err(error),
                // One that cannot be says so; the others are compared.
                Err(error) => {
                    complain("warning", &error.message);
                    all.push(failed(model, *equal, name, &error));
                }
            }
        }
    }
    if rows.is_empty() {
        return Err(CliError::usage("nothing to compare: no model fits any of the clusters"));
    }
    if args.json {
        say(&format!("{}\n", Value::Array(all)));
    } else {
        print(&rows, args.baselines);
    }
    Ok(DONE)
}

/// A model on a cluster.
#[derive(Debug)]
struct Row<'a> {
    answer: Answer,
    /// What the model has in common with the sparse one before it, if it is there for that.
    equal: Option<Equal>,
    /// The cluster, as it was asked for.
    cluster: &'a str,
}

/// Dense models to hold a sparse one against, with what they have in common with it.
pub fn twins(model: &Architecture) -> Vec<(Equal, Architecture)> {
    let twin = |equal: Equal| Some((equal, model.dense_twin(equal.parameters(model))?));
    Equal::ALL.into_iter().filter_map(twin).collect()
}

/// What dense models are for, in lines.
pub const TWINS: [&str; 3] = [
    "dense models keep attention and depth and widen the feed-forward network: to all parameters, to sqrt(all x active),",
    "to the active ones. sqrt(all x active) is a rule of thumb of equal quality from Mixtral's time, not fitted by anyone:",
    "published pairs need 1 to 3 times as many",
];

fn object(row: &Row, baselines: bool) -> Value {
    let mut object = as_json::object(&row.answer);
    object["cluster"]["name"] = json!(row.cluster);
    object["model"]["dense_of_equal"] = json!(row.equal.map(Equal::name));
    if baselines {
        let (of, priced) = (synchronisation(&row.answer), &row.answer.chosen.priced);
        let with = |seconds: f64| of.step_with(priced, seconds);
        let [one, server] = [with(of.merge_at_one_s), with(of.parameter_server_s)];
        object["synchronisation_s"] = json!({
            "ours": of.ours_s,
            "merge_at_one": of.merge_at_one_s,
            "parameter_server": of.parameter_server_s,
        });
        object["step_with_s"] = json!({
            "merge_at_one": one.value,
            "merge_at_one_interval_80": one.interval,
            "parameter_server": server.value,
            "parameter_server_interval_80": server.interval,
        });
    }
    object
}

/// A combination without an answer, its names where those of others are.
fn failed(model: &Model, equal: Option<Equal>, cluster: &str, error: &CliError) -> Value {
    json!({
        "model": {"name": model.architecture.name, "dense_of_equal": equal.map(Equal::name)},
        "cluster": {"name": cluster},
        "error": error.message,
    })
}

fn synchronisation(answer: &Answer) -> Synchronisation {
    Synchronisation::of(&answer.chosen.priced, &answer.chosen.layout, &answer.cluster)
}

fn print(rows: &[Row], baselines: bool) {
    let paint = Paint::new(&std::io::stdout());
    let title = |text: &str| say(&format!("{}\n", paint.strong(text)));
    let note = |text: &str| say(&format!("  {}\n", paint.faint(text)));
    title("The fastest layout that fits, each");
    say(&format!("{}\n", fastest(rows).join("\n")));
    note("80%: where eight of ten runs lie, for all figures of a row");
    note("hours a T: GPU-hours of training for 10^12 tokens; dollars with failures");
    if rows.iter().any(|row| row.equal.is_some()) {
        TWINS.into_iter().for_each(note);
    }
    title("\nTheir layouts");
    say(&format!("{}\n", table(&layouts(rows), 3).join("\n")));
    let skewed = uneven(rows);
    if skewed.len() > 1 {
        title("\nUneven routing");
        say(&format!("{}\n", table(&skewed, 2).join("\n")));
        note(
            "fullest rank: rows of the fullest expert-parallel rank over an even share, in the median step and in one of twenty",
        );
    }
    if baselines {
        title("\nReplicas agree once a step");
        say(&format!("{}\n", table(&agreeing(rows), 2).join("\n")));
        note(
            "in brackets: where eight of ten steps would lie; what comes in place of ours is bytes over a network card's rate",
        );
    }
}

/// How replicas agree, with its head.
fn agreeing(rows: &[Row]) -> Vec<Vec<String>> {
    let head = ["model", "cluster", "replicas", "ours", "merged at one", "step, s", "servers", "step, s"];
    let mut table = vec![head.map(String::from).to_vec()];
    table.extend(rows.iter().map(|row| {
        let (of, priced) = (synchronisation(&row.answer), &row.answer.chosen.priced);
        let step = |seconds: f64| {
            let step: Ranged = of.step_with(priced, seconds);
            let scale = Scale::seconds(1.0);
            format!("{} ({})", scale.number(step.value, 1), scale.range(step.interval))
        };
        let layout = &row.answer.chosen.layout;
        vec![
            row.answer.model.name.clone(),
            row.cluster.to_string(),
            grouped((layout.data * layout.context) as u64),
            format!("{} ({})", duration(of.ours_s), percent(of.ours_s / priced.step_s)),
            duration(of.merge_at_one_s),
            step(of.merge_at_one_s),
            duration(of.parameter_server_s),
            step(of.parameter_server_s),
        ]
    }));
    table
}

/// What uneven routing makes of each, with its head.
fn uneven(rows: &[Row]) -> Vec<Vec<String>> {
    let head = [
        "model",
        "cluster",
        "fullest rank",
        "even step",
        "median",
        "1 of 20",
        "80%",
        "GiB, even",
        "GiB",
        "free",
    ];
    let mut table = vec![head.map(String::from).to_vec()];
    table.extend(rows.iter().filter_map(|row| {
        let (uneven, priced) = (row.answer.uneven.as_ref()?, &row.answer.chosen.priced);
        Some(vec![
            row.answer.model.name.clone(),
            row.cluster.to_string(),
            format!("{:.2}, {:.2}", uneven.rows.p50, uneven.rows.p95),
            duration(uneven.even_step.value),
            duration(priced.step_s),
            duration(uneven.slow_step.value),
            off(uneven.slow_step),
            format!("{:.1}", uneven.even_bytes.value / GIB),
            show::gib(priced.bytes()),
            format!("{:.1}", row.answer.chosen.headroom_bytes / GIB),
        ])
    }));
    table
}

/// The table, with its head; above it the clusters, and the training if it is that of all, else a column of it.
fn fastest(rows: &[Row]) -> Vec<String> {
    let (days, dollars) = show::scales(rows.iter().map(|row| &row.answer.outlook));
    let head = ["model", "cluster", "step", "tokens/s", "hours a T", days.name, dollars.name, "80%"];
    let mut cells = vec![head.map(String::from).to_vec()];
    for row in rows {
        let (answer, outlook) = (&row.answer, &row.answer.outlook);
        let asked = [answer.model.name.clone(), row.cluster.to_string()];
        let figures = [
            duration(answer.chosen.priced.step_s),
            grouped(outlook.tokens_per_s.value as u64),
            grouped(outlook.gpu_hours_per_trillion(&answer.training).value as u64),
            days.number(outlook.days.value, 1),
            dollars.number(outlook.usd.value, 2),
            off(answer.chosen.priced.step()),
        ];
        cells.push([&asked[..], &figures].concat());
    }
    let mut lines: Vec<String> =
        rows.iter().map(|row| format!("  {}: {}", row.cluster, show::cluster(&row.answer))).collect();
    let mut seen = HashSet::new();
    lines.retain(|line| seen.insert(line.clone()));
    let common = show::training(&rows[0].answer);
    let mut left = 2;
    if rows.iter().all(|row| show::training(&row.answer) == common) {
        lines.push(format!("  {common}"));
    } else {
        cells[0].insert(2, "training".into());
        cells[1..].iter_mut().zip(rows).for_each(|(cell, row)| cell.insert(2, show::batches(&row.answer)));
        left = 3;
    }
    [lines, table(&cells, left)].concat()
}

/// The layouts, with their head.
fn layouts(rows: &[Row]) -> Vec<Vec<String>> {
    let mut table = vec![["model", "cluster", "layout"].map(String::from).to_vec()];
    table.extend(rows.iter().map(|row| {
        let (answer, cluster) = (&row.answer, row.cluster.to_string());
        vec![answer.model.name.clone(), cluster, answer.chosen.layout.to_string()]
    }));
    table
}
