//! Saves and checks a small checkpoint; `scripts/crash-test` stops it at every system call.
//!
//! ```text
//! save save DIR STEP VERSION    saves VERSION of STEP; exit 21 if the storage failed
//! save check DIR STEP:VERSION   the latest step verifies and is one of these; no other is damaged
//! ```

use std::path::Path;
use std::process::ExitCode;

use unisono_checkpoint::{Dtype, Error, Piece, Reader, SaveId, Writer, latest, list};

const ELEMENTS: u64 = 4096;

/// The elements of a version, so that a check needs no second copy.
fn contents(version: u64) -> Vec<u8> {
    (0..ELEMENTS).flat_map(|element| (element * 2_654_435_761 + version).to_le_bytes()).collect()
}

fn save(dir: &Path, step: u64, version: u64) -> Result<(), Error> {
    let writer = Writer::begin(dir, SaveId { run_id: "crash-test".into(), epoch: version, step })?;
    let bytes = contents(version);
    let (tensor, shape) = ("w", &[ELEMENTS][..]);
    let mut reports = Vec::new();
    for (rank, half) in bytes.chunks(bytes.len() / 2).enumerate() {
        let start = rank as u64 * ELEMENTS / 2;
        let piece =
            Piece { tensor, dtype: Dtype::U64, shape, range: start..start + ELEMENTS / 2, bytes: half };
        reports.push(writer.shards().write_shard(&format!("dense-{rank:02}-of-02"), &[piece])?);
    }
    writer.commit(reports, serde_json::json!({ "version": version })).map(drop)
}

fn check(dir: &Path, allowed: &[String]) -> Result<(), Box<dyn std::error::Error>> {
    let found = latest(dir, &|| ())?;
    if let Some((step, error)) = found.rejected.first() {
        return Err(format!("step {step} is damaged: {error}").into());
    }
    for listed in list(dir)? {
        listed.state?;
    }
    let reader = Reader::open(dir, found.step.ok_or("no checkpoint is left")?)?;
    let version = reader.extra()["version"].as_u64().ok_or("no version")?;
    let name = format!("{}:{version}", reader.step());
    if !allowed.contains(&name) {
        return Err(format!("the latest is {name}, expected one of {allowed:?}").into());
    }
    if reader.read("w", 0..ELEMENTS)? != contents(version) {
        return Err(format!("{name} has other contents than were saved").into());
    }
    println!("{name}");
    Ok(())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let numbers: Vec<u64> = arguments.iter().skip(2).flat_map(|number| number.parse()).collect();
    let result = match (arguments.first().map(String::as_str), arguments.get(1), &numbers[..]) {
        (Some("save"), Some(dir), &[step, version]) => match save(Path::new(dir), step, version) {
            Err(error) if error.is_storage() => {
                eprintln!("{error}");
                return ExitCode::from(21);
            }
            result => result.map_err(Into::into),
        },
        (Some("check"), Some(dir), _) => check(Path::new(dir), &arguments[2..]),
        _ => Err("usage: save save DIR STEP VERSION | save check DIR STEP:VERSION...".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
