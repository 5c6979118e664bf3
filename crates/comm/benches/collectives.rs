//! Reduce-scatter + all-gather between thread ranks, next to plain memory copies of the same volume.

use unisono_comm::bench::{cores, reduce_gather};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("reduce-scatter + all-gather between thread ranks, {} cores", cores());
    println!("ranks  vector MiB  received MiB  collectives ms  copies ms   GB/s  speed / copies");
    for ranks in [2, 4] {
        for mib in [1, 4, 16, 64] {
            let repeats = if mib >= 16 { 15 } else { 60 };
            let measured = reduce_gather(ranks, mib << 20, repeats)?;
            println!(
                "{ranks:5}  {mib:10}  {:12.1}  {:14.3}  {:9.3}  {:5.2}  {:14.2}",
                measured.volume_bytes as f64 / f64::from(1 << 20),
                measured.collective_seconds * 1e3,
                measured.copy_seconds * 1e3,
                measured.bytes_per_s() / 1e9,
                measured.ratio(),
            );
        }
    }
    Ok(())
}
