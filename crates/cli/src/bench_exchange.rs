//! `unisono bench exchange`: rows to experts and back in every way a layout may choose, over sizes.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use unisono_comm::bench::Native;
use unisono_comm::{CommError, Communicator, Place, ThreadRanks};
use unisono_mesh::Grid;
use unisono_plan::dispatch::DispatchShape;
use unisono_tensor::Cpu;
use unisono_train::TrainError;
use unisono_train::exchange::{ExchangeBench, ExchangeTimed, time_exchange};

use crate::args::{count, within};
use crate::bench_collectives::{native_of, write_plot};
use crate::error::{CliError, DONE};
use crate::job::Job;
use crate::plot::{Panel, svg};
use crate::screen::say;
use crate::style::table;

/// `unisono bench exchange`
#[derive(Debug, Args)]
pub struct Exchange {
    /// Tokens of a rank, at most 65,536
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [64, 256, 1024, 4096], value_parser = within(1..=65_536))]
    tokens: Vec<usize>,
    /// Values of a row, at most 16,384
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = within(1..=16_384))]
    d_model: usize,
    /// Routed experts
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = within(1..=65_536))]
    experts: usize,
    /// Experts a token visits, drawn at random
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = count())]
    top_k: usize,
    /// Ranks as threads; under mpirun those it has started
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = count())]
    ranks: usize,
    /// Ranks of each pretended node, where ranks are threads
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    nodes: Vec<usize>,
    /// Times that each is measured
    #[arg(long, value_name = "N", default_value_t = 15, value_parser = count())]
    rounds: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Draw the bandwidths into this SVG file
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

/// What was measured of one way with so many tokens.
struct Row {
    way: &'static str,
    tokens: usize,
    timed: ExchangeTimed,
}

impl Row {
    fn gb_per_s(&self, seconds: f64) -> f64 {
        self.timed.bytes as f64 / seconds / 1e9
    }
}

/// `unisono bench exchange`
pub fn run(args: &Exchange) -> Result<u8, CliError> {
    let job = Job::join()?;
    let outcome = measure(args, &job);
    job.end(outcome)
}

fn measure(args: &Exchange, job: &Job) -> Result<u8, CliError> {
    let ranks = job.ranks().unwrap_or(args.ranks);
    if ranks < 2 {
        return Err(CliError::usage("bench exchange: one rank sends nothing; give it at least 2"));
    }
    if !args.experts.is_multiple_of(ranks) {
        return Err(CliError::usage(format!(
            "bench exchange: {ranks} ranks cannot share {} experts evenly; set --experts to a multiple of {ranks}",
            args.experts
        )));
    }
    if args.top_k > args.experts {
        return Err(CliError::usage(format!(
            "bench exchange: a token cannot visit {} of {} experts; lower --top-k",
            args.top_k, args.experts
        )));
    }
    unisono_train::check_nodes(&args.nodes, ranks)?;
    let place = &job.place;
    let body = |comm: Communicator| all_ways(args, &comm, place);
    let timed = place.run(&ThreadRanks::new(ranks).nodes(&args.nodes), body).map_err(TrainError::from)?;
    let rows = timed.into_iter().next().unwrap_or_default();
    if job.leads() {
        show(args, ranks, &rows, native_of(place).map(Native::name).as_deref())?;
    }
    Ok(DONE)
}

/// The ways of `bench dispatch`, and rounds. Through nodes only where there are some.
fn ways(args: &Exchange, tokens: usize, nodes: usize) -> Vec<(&'static str, DispatchShape)> {
    let flat = DispatchShape::default();
    let through = DispatchShape { hierarchical: true, ..flat };
    // Half of the rows that a rank receives on average.
    let bound = DispatchShape { most_rows: (tokens * args.top_k / 2).max(2), row_block: 1, ..flat };
    let mut ways = vec![
        ("flat", flat),
        ("flat, bf16", DispatchShape { half: true, ..flat }),
        ("flat, 4 chunks", DispatchShape { chunks: 4, ..flat }),
        ("flat, in rounds", bound),
    ];
    if nodes > 1 {
        ways.extend([
            ("hierarchical", through),
            ("hierarchical, bf16", DispatchShape { half: true, ..through }),
            ("hierarchical, 4 chunks", DispatchShape { chunks: 4, ..through }),
        ]);
    }
    ways
}

fn all_ways(args: &Exchange, comm: &Communicator, place: &Place) -> Result<Vec<Row>, CommError> {
    let ranks = comm.size();
    let nodes = 1 + (0..ranks).map(|rank| comm.node(rank)).max().unwrap_or(0);
    // Results are summed by node where experts divide among nodes.
    let expert_nodes = if ranks.is_multiple_of(nodes) { nodes } else { 1 };
    let grid = Grid { replicas: ranks, expert_group: ranks, expert_nodes, ..Grid::default() };
    let mut rows = Vec::new();
    for &tokens in &args.tokens {
        for (way, shape) in ways(args, tokens, nodes) {
            let bench = ExchangeBench {
                grid,
                experts: args.experts,
                top_k: args.top_k,
                tokens,
                width: args.d_model,
                shape,
                rounds: args.rounds,
            };
            rows.push(Row {
                way,
                tokens,
                timed: time_exchange(comm, &Cpu::new(1), native_of(place), &bench)?,
            });
        }
    }
    Ok(rows)
}

fn show(args: &Exchange, ranks: usize, rows: &[Row], native: Option<&str>) -> Result<(), CliError> {
    if let Some(path) = &args.plot {
        write_plot(path, &plot(rows, native))?;
    }
    if args.json {
        let entry = |row: &Row| {
            json!({
                "way": row.way, "tokens": row.tokens, "bytes": row.timed.bytes,
                "gb_per_s": row.gb_per_s(row.timed.ours_s), "copy_gb_per_s": row.gb_per_s(row.timed.copy_s),
                "native_gb_per_s": row.timed.native_s.map(|seconds| row.gb_per_s(seconds)),
                "of_native": row.timed.native_s.map(|seconds| seconds / row.timed.ours_s),
            })
        };
        let ways = rows.iter().map(entry).collect::<Vec<_>>();
        say(&format!("{}\n", json!({ "native": native, "ranks": ranks, "exchanges": ways })));
        return Ok(());
    }
    let mut header = vec!["way", "tokens a rank", "MiB", "GB/s", "of memory copies"];
    header.extend(native.map(|_| ["MPI_Alltoallv GB/s", "ours / MPI's"]).into_iter().flatten());
    let mut lines: Vec<Vec<String>> = vec![header.into_iter().map(String::from).collect()];
    for row in rows {
        let mut line = vec![
            row.way.to_string(),
            row.tokens.to_string(),
            format!("{:.2}", row.timed.bytes as f64 / f64::from(1 << 20)),
            format!("{:.2}", row.gb_per_s(row.timed.ours_s)),
            format!("{:.0}%", 100.0 * row.timed.copy_s / row.timed.ours_s),
        ];
        if let Some(seconds) = row.timed.native_s {
            line.extend([
                format!("{:.2}", row.gb_per_s(seconds)),
                format!("{:.2}", seconds / row.timed.ours_s),
            ]);
        }
        lines.push(line);
    }
    let mut lines = table(&lines, 1);
    lines.push(
        "Rows there and back, packing included, of the volume that flat dispatch sends in f32 from the busiest rank to others."
            .into(),
    );
    say(&(lines.join("\n") + "\n"));
    Ok(())
}

fn plot(rows: &[Row], native: Option<&str>) -> String {
    let mut panels: Vec<Panel> = Vec::new();
    for row in rows {
        let title = row.way.to_string();
        let at = panels.iter().position(|panel| panel.title == title).unwrap_or_else(|| {
            let names = ["unisono".to_string(), "memory copies".to_string()];
            let names = names.into_iter().chain(native.map(|name| format!("{name}'s all-to-all")));
            panels.push(Panel { title, lines: names.map(|name| (name, Vec::new())).collect() });
            panels.len() - 1
        });
        let times = [Some(row.timed.ours_s), Some(row.timed.copy_s), row.timed.native_s];
        for ((_, points), seconds) in panels[at].lines.iter_mut().zip(times.into_iter().flatten()) {
            points.push((row.tokens as f64, row.gb_per_s(seconds)));
        }
    }
    svg(&panels, "GB/s by tokens", |tokens| format!("{tokens:.0}"))
}
