//! `unisono bench collectives`: between threads, or under `mpirun` next to the MPI library's own.

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde_json::json;
use unisono_comm::bench::{Collective, Native, Sampling, Timed, time_collective};
use unisono_comm::{CommError, Communicator, ThreadRanks};
use unisono_tensor::cpu::prepare_thread;
use unisono_train::TrainError;

use crate::args::{count, within};
use crate::error::{CliError, DONE};
use crate::job::Job;
use crate::rates::{Output, Rate, Sheet, native_of};

/// A vector of more, once for each rank and then some, is more memory than anyone means: 1 GiB.
const LARGEST_KIB: u64 = 1 << 20;

/// `unisono bench collectives`
#[derive(Debug, Args)]
pub struct Collectives {
    /// Sizes of the vector in KiB, at most 1,048,576
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [64, 256, 1024, 4096, 16384, 65536], value_parser = within(1..=LARGEST_KIB))]
    kib: Vec<usize>,
    /// Which collectives [default: all]
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',', value_parser = known())]
    only: Vec<Collective>,
    /// Times that each is measured
    #[arg(long, value_name = "N", default_value_t = 15, value_parser = count())]
    rounds: usize,
    /// Vectors lie in caches where they fit; otherwise they come from memory each time, as in a step, which comes to each once
    #[arg(long)]
    cached: bool,
    #[command(flatten)]
    output: Output,
}

/// A collective by its name.
fn known() -> impl TypedValueParser<Value = Collective> {
    let of = |name: String| Collective::ALL.into_iter().find(|known| known.name() == name);
    PossibleValuesParser::new(Collective::ALL.map(Collective::name))
        .try_map(move |name| of(name).ok_or("no collective has this name"))
}

/// `unisono bench collectives`
pub fn run(args: &Collectives) -> Result<u8, CliError> {
    let job = Job::join()?;
    let outcome = measure(args, &job);
    job.end(outcome)
}

fn measure(args: &Collectives, job: &Job) -> Result<u8, CliError> {
    let worlds: Vec<usize> = job.ranks().map_or_else(|| vec![2, 4], |ranks| vec![ranks]);
    let place = &job.place;
    let mut all = Vec::new();
    for ranks in worlds {
        let body = |comm: Communicator| all_sizes(args, &comm, native_of(place));
        let timed = place.run(&ThreadRanks::new(ranks), body).map_err(TrainError::from)?;
        all.extend(timed.into_iter().next().unwrap_or_default());
    }
    if job.leads() {
        show(args, &all, native_of(place).map(Native::name))?;
    }
    Ok(DONE)
}

fn all_sizes(
    args: &Collectives,
    comm: &Communicator,
    native: Option<&dyn Native>,
) -> Result<Vec<Timed>, CommError> {
    let all = Collective::ALL.into_iter().filter(|what| args.only.is_empty() || args.only.contains(what));
    let cases = all.flat_map(|what| args.kib.iter().map(move |kib| (what, kib << 10)));
    // Vectors in large pages, as a rank's buffers are.
    prepare_thread();
    let sampling = Sampling { rounds: args.rounds, cached: args.cached };
    cases.map(|(what, bytes)| time_collective(comm, native, what, bytes, sampling)).collect()
}

fn show(args: &Collectives, all: &[Timed], native: Option<String>) -> Result<(), CliError> {
    let rate = |timed: &Timed| Rate {
        panel: (format!("{}, {} ranks", timed.collective.name(), timed.ranks), timed.bytes as f64),
        cells: [timed.collective.name().into(), timed.ranks.to_string()],
        entry: json!({"collective": timed.collective.name(), "ranks": timed.ranks}),
        bytes: timed.bytes,
        moved: timed.collective.bus_bytes(timed.bytes, timed.ranks),
        ours_s: timed.ours_s,
        copy_s: timed.copy_s,
        native_s: timed.native_s,
    };
    let sheet = Sheet {
        heads: ["collective", "ranks", "bus GB/s"],
        native_head: "MPI's own GB/s",
        native_line: format!("{}'s own", native.as_deref().unwrap_or_default()),
        title: "bus GB/s",
        label: |bytes| match bytes / f64::from(1 << 20) {
            mib if mib < 1.0 => format!("{:.0}K", bytes / 1024.0),
            mib => format!("{mib:.0}M"),
        },
        object: json!({"native": native, "cached": args.cached}),
        list: "collectives",
        note: None,
    };
    sheet.show(&args.output, &all.iter().map(rate).collect::<Vec<_>>())
}
