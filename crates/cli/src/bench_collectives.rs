//! `unisono bench collectives`: between threads, or under `mpirun` next to the MPI library's own.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use unisono_comm::bench::{Collective, Native, Timed, time_collective};
use unisono_comm::{CommError, Communicator, Place, ThreadRanks};
use unisono_train::TrainError;

use crate::args::{count, within};
use crate::error::{CliError, DONE, STORAGE};
use crate::job::Job;
use crate::plot::{Panel, svg};
use crate::screen::say;
use crate::style::table;

/// A vector of more, once for each rank and then some, is more memory than anyone means: 1 GiB.
const LARGEST_KIB: u64 = 1 << 20;

/// `unisono bench collectives`
#[derive(Debug, Args)]
pub struct Collectives {
    /// Sizes of the vector in KiB, at most 1,048,576
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_values_t = [64, 256, 1024, 4096, 16384, 65536], value_parser = within(1..=LARGEST_KIB))]
    kib: Vec<usize>,
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
        show(args, &all, native_of(place).map(Native::name).as_deref())?;
    }
    Ok(DONE)
}

/// The MPI library's own collectives, where ranks are its processes.
pub fn native_of(place: &Place) -> Option<&dyn Native> {
    match place {
        Place::Threads => None,
        #[cfg(feature = "mpi")]
        Place::Mpi(ranks) => Some(&**ranks),
    }
}

/// Writes a plot.
pub fn write_plot(path: &Path, plot: &str) -> Result<(), CliError> {
    let error =
        |error| CliError { code: STORAGE, message: format!("cannot write {}: {error}", path.display()) };
    std::fs::write(path, plot).map_err(error)
}

fn all_sizes(
    args: &Collectives,
    comm: &Communicator,
    native: Option<&dyn Native>,
) -> Result<Vec<Timed>, CommError> {
    let cases =
        Collective::ALL.into_iter().flat_map(|what| args.kib.iter().map(move |kib| (what, kib << 10)));
    cases.map(|(what, bytes)| time_collective(comm, native, what, bytes, args.rounds)).collect()
}

fn show(args: &Collectives, all: &[Timed], native: Option<&str>) -> Result<(), CliError> {
    if let Some(path) = &args.plot {
        write_plot(path, &plot(all, native))?;
    }
    if args.json {
        let rate = |timed: &Timed, seconds: f64| timed.bus_bytes_per_s(seconds) / 1e9;
        let entry = |timed: &Timed| {
            json!({
                "collective": timed.collective.name(), "ranks": timed.ranks, "bytes": timed.bytes,
                "gb_per_s": rate(timed, timed.ours_s), "copy_gb_per_s": rate(timed, timed.copy_s),
                "native_gb_per_s": timed.native_s.map(|seconds| rate(timed, seconds)),
                "of_native": timed.native_s.map(|seconds| seconds / timed.ours_s),
            })
        };
        let value = json!({ "native": native, "collectives": all.iter().map(entry).collect::<Vec<_>>() });
        say(&format!("{value}\n"));
        return Ok(());
    }
    let mut header = vec!["collective", "ranks", "MiB", "bus GB/s", "of memory copies"];
    header.extend(native.map(|_| ["MPI's own GB/s", "ours / MPI's"]).into_iter().flatten());
    let mut rows: Vec<Vec<String>> = vec![header.into_iter().map(String::from).collect()];
    for timed in all {
        let rate = |seconds: f64| format!("{:.2}", timed.bus_bytes_per_s(seconds) / 1e9);
        let mut row = vec![
            timed.collective.name().to_string(),
            timed.ranks.to_string(),
            format!("{:.2}", timed.bytes as f64 / f64::from(1 << 20)),
            rate(timed.ours_s),
            format!("{:.0}%", 100.0 * timed.copy_s / timed.ours_s),
        ];
        if let Some(seconds) = timed.native_s {
            row.extend([rate(seconds), format!("{:.2}", seconds / timed.ours_s)]);
        }
        rows.push(row);
    }
    say(&(table(&rows, 1).join("\n") + "\n"));
    Ok(())
}

fn plot(all: &[Timed], native: Option<&str>) -> String {
    let mut panels: Vec<Panel> = Vec::new();
    for timed in all {
        let title = format!("{}, {} ranks", timed.collective.name(), timed.ranks);
        if panels.last().is_none_or(|panel| panel.title != title) {
            let names = ["unisono".to_string(), "memory copies".to_string()];
            let names = names.into_iter().chain(native.map(|name| format!("{name}'s own")));
            panels.push(Panel { title, lines: names.map(|name| (name, Vec::new())).collect() });
        }
        let times = [Some(timed.ours_s), Some(timed.copy_s), timed.native_s];
        let Some(panel) = panels.last_mut() else { continue };
        for ((_, points), seconds) in panel.lines.iter_mut().zip(times.into_iter().flatten()) {
            points.push((timed.bytes as f64, timed.bus_bytes_per_s(seconds) / 1e9));
        }
    }
    svg(&panels, "bus GB/s", |bytes| match bytes / f64::from(1 << 20) {
        mib if mib < 1.0 => format!("{:.0}K", bytes / 1024.0),
        mib => format!("{mib:.0}M"),
    })
}
