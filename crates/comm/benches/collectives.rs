//! Collectives between thread ranks, next to plain memory copies of the same volume.

use unisono_comm::bench::{Collective, Sampling, time_collective};
use unisono_comm::run_ranks;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("collective      ranks     KiB  bus GB/s  of memory copies");
    for ranks in [2, 4] {
        for collective in Collective::ALL {
            for kib in [64, 1024, 16 << 10, 64 << 10] {
                let rounds = if kib >= 16 << 10 { 15 } else { 60 };
                let sampling = Sampling { rounds, cached: false };
                let timed =
                    run_ranks(ranks, |comm| time_collective(&comm, None, collective, kib << 10, sampling))?;
                let timed = &timed[0];
                println!(
                    "{:14}  {ranks:5}  {kib:6}  {:8.2}  {:16.2}",
                    collective.name(),
                    timed.bus_bytes_per_s(timed.ours_s) / 1e9,
                    timed.copy_s / timed.ours_s,
                );
            }
        }
    }
    Ok(())
}
