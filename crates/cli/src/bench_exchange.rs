//! `unisono bench exchange`: rows to experts and back in every way a layout may choose, over sizes.

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
use crate::error::{CliError, DONE};
use crate::job::Job;
use crate::rates::{Output, Rate, Sheet, native_of};

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
    #[command(flatten)]
    output: Output,
}

/// What was measured of one way with so many tokens.
struct Row {
    way: &'static str,
    tokens: usize,
    timed: ExchangeTimed,
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
        show(args, ranks, &rows, native_of(place).map(Native::name))?;
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

fn show(args: &Exchange, ranks: usize, rows: &[Row], native: Option<String>) -> Result<(), CliError> {
    let rate = |row: &Row| Rate {
        panel: (row.way.into(), row.tokens as f64),
        cells: [row.way.into(), row.tokens.to_string()],
        entry: json!({"way": row.way, "tokens": row.tokens}),
        bytes: row.timed.bytes,
        moved: row.timed.bytes as f64,
        ours_s: row.timed.ours_s,
        copy_s: row.timed.copy_s,
        native_s: row.timed.native_s,
    };
    let sheet = Sheet {
        heads: ["way", "tokens a rank", "GB/s"],
        native_head: "MPI_Alltoallv GB/s",
        native_line: format!("{}'s all-to-all", native.as_deref().unwrap_or_default()),
        title: "GB/s by tokens",
        label: |tokens| format!("{tokens:.0}"),
        object: json!({"native": native, "ranks": ranks}),
        list: "exchanges",
        note: Some(
            "Rows there and back, packing included, of the volume that flat dispatch sends in f32 from the busiest rank to others.",
        ),
    };
    sheet.show(&args.output, &rows.iter().map(rate).collect::<Vec<_>>())
}
