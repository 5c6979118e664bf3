//! `unisono diff`: the first step, and the quantity or tensor, in which two runs differ.

use std::collections::BTreeMap;
use std::path::Path;

use unisono_checkpoint::{Reader, compare, list};
use unisono_train::run_folder::{CHECKPOINTS, METRICS_FILE, read_config, read_hashes, read_steps};
use unisono_train::{StepHashes, StepRecord};

use crate::args::Diff;
use crate::error::{CliError, DIFFERENT, DONE};
use crate::screen::say;

/// A difference after a step.
struct Found {
    step: u64,
    text: String,
}

/// What was compared, and the first difference of each kind.
struct Comparison {
    steps: usize,
    lengths: [u64; 2],
    quantity: Option<Found>,
    hashed: usize,
    hash: Option<Found>,
    checkpoints: Vec<u64>,
    tensor: Option<Found>,
}

/// `unisono diff`
pub fn run(args: &Diff) -> Result<u8, CliError> {
    for folder in [&args.first, &args.second] {
        if !folder.join(METRICS_FILE).is_file() {
            return Err(CliError::usage(format!("{} is not the folder of a run", folder.display())));
        }
    }
    let comparison = Comparison::new(&args.first, &args.second)?;
    if comparison.steps == 0 && comparison.checkpoints.is_empty() {
        return Err(CliError::usage("the runs have no step in common: nothing to compare"));
    }
    say(&comparison.render());
    if comparison.is_equal() {
        return Ok(DONE);
    }
    for line in config_differences(&args.first, &args.second)? {
        say(&format!("  config: {line}\n"));
    }
    Ok(DIFFERENT)
}

impl Comparison {
    fn new(first: &Path, second: &Path) -> Result<Self, CliError> {
        let [a, b] = [by_step(read_steps(first)?), by_step(read_steps(second)?)];
        let [a_hashes, b_hashes] =
            [hashes_by_step(read_hashes(first)?), hashes_by_step(read_hashes(second)?)];
        let (checkpoints, tensor) = compare_checkpoints(first, second)?;
        Ok(Self {
            steps: common(&a, &b).count(),
            lengths: [&a, &b].map(|steps| steps.keys().next_back().copied().unwrap_or(0)),
            quantity: common(&a, &b).find_map(|(step, a, b)| Some(Found { step, text: quantity(a, b)? })),
            hashed: common(&a_hashes, &b_hashes).count(),
            hash: common(&a_hashes, &b_hashes)
                .find_map(|(step, a, b)| Some(Found { step, text: hashed_tensor(a, b)? })),
            checkpoints,
            tensor,
        })
    }

    fn is_equal(&self) -> bool {
        self.quantity.is_none() && self.hash.is_none() && self.tensor.is_none()
    }

    fn render(&self) -> String {
        let [a, b] = self.lengths;
        let mut lines = Vec::new();
        let found = [&self.quantity, &self.hash, &self.tensor];
        match found.iter().filter_map(|found| found.as_ref()).map(|found| found.step).min() {
            None => lines.push("identical".to_string()),
            Some(step) => lines.push(format!("different from step {step} on")),
        }
        if let Some(found) = &self.quantity {
            lines.push(format!("  step {}: {}", found.step, found.text));
        }
        // The hashes name the tensor, a checkpoint its element, too.
        if let Some(found) = &self.hash {
            lines.push(format!("  after step {}: {}", found.step, found.text));
        }
        if let Some(found) = &self.tensor {
            lines.push(format!("  checkpoint of step {}: {}", found.step, found.text));
        }
        lines.push(format!(
            "  compared: {} steps of metrics, {} of hashes, {} checkpoint(s){}",
            self.steps,
            self.hashed,
            self.checkpoints.len(),
            self.checkpoints.last().map(|step| format!(", the last of step {step}")).unwrap_or_default(),
        ));
        if a != b {
            lines.push(format!(
                "  the runs have other lengths: the first ends at step {a}, the second at {b}"
            ));
        }
        lines.push(String::new());
        lines.join("\n")
    }
}

/// Records by step; of records of one step the last counts.
fn by_step(records: Vec<StepRecord>) -> BTreeMap<u64, StepRecord> {
    records.into_iter().map(|record| (record.step, record)).collect()
}

fn hashes_by_step(hashes: Vec<StepHashes>) -> BTreeMap<u64, StepHashes> {
    hashes.into_iter().map(|hashes| (hashes.step, hashes)).collect()
}

/// What both have, ascending.
fn common<'a, T>(
    a: &'a BTreeMap<u64, T>,
    b: &'a BTreeMap<u64, T>,
) -> impl Iterator<Item = (u64, &'a T, &'a T)> {
    a.iter().filter_map(|(step, a)| Some((*step, a, b.get(step)?)))
}

/// The first quantity in which two records of a step differ.
fn quantity(a: &StepRecord, b: &StepRecord) -> Option<String> {
    let (a, b) = (a.numbers(), b.numbers());
    let ((name, a), (_, b)) = a.into_iter().zip(b).find(|(a, b)| a != b)?;
    Some(match name {
        "expert_load" => "expert_load: tokens were routed otherwise".into(),
        _ => format!("{name}: {a} and {b}"),
    })
}

/// The first tensor in which two lines of hashes differ.
fn hashed_tensor(a: &StepHashes, b: &StepHashes) -> Option<String> {
    let differing = |((name, a), other): (&(String, String), Option<&(String, String)>)| match other {
        Some((other, b)) if name == other && a == b => None,
        Some((other, _)) if name == other => Some(format!("tensor {name}")),
        _ => Some(format!("tensor {name} is only in one of them")),
    };
    let others = b.tensors.iter().map(Some).chain(std::iter::repeat(None));
    let first = a.tensors.iter().zip(others).find_map(differing);
    first.or_else(|| {
        let (name, _) = b.tensors.get(a.tensors.len())?;
        Some(format!("tensor {name} is only in one of them"))
    })
}

/// The steps of which both have a checkpoint, and the first difference in those.
fn compare_checkpoints(first: &Path, second: &Path) -> Result<(Vec<u64>, Option<Found>), CliError> {
    let [first, second] = [first, second].map(|folder| folder.join(CHECKPOINTS));
    let theirs: Vec<u64> = list(&second)?.into_iter().map(|listed| listed.step).collect();
    let mut steps: Vec<u64> = list(&first)?.into_iter().map(|listed| listed.step).collect();
    steps.retain(|step| theirs.contains(step));
    for step in &steps {
        let (a, b) = (Reader::open(&first, *step)?, Reader::open(&second, *step)?);
        if let Some(difference) = compare(&a, &b)? {
            return Ok((steps.clone(), Some(Found { step: *step, text: difference.to_string() })));
        }
    }
    Ok((steps, None))
}

/// Keys in which the configs differ, as `train.seed = 1 and 2`.
fn config_differences(first: &Path, second: &Path) -> Result<Vec<String>, CliError> {
    let unwritable = |error: unisono_train::ConfigError| CliError::usage(error.to_string());
    let table = |folder: &Path| -> Result<toml::Table, CliError> {
        let text = read_config(folder)?.to_toml().map_err(unwritable)?;
        text.parse().map_err(|error: toml::de::Error| CliError::usage(error.to_string()))
    };
    let [a, b] = [table(first)?, table(second)?];
    let mut lines = Vec::new();
    for (section, a) in &a {
        let b = b.get(section);
        for (key, value) in a.as_table().into_iter().flatten() {
            let other = b.and_then(|section| section.get(key));
            if other != Some(value) {
                let other = other.map_or_else(|| "nothing".into(), toml::Value::to_string);
                lines.push(format!("{section}.{key} = {value} and {other}"));
            }
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(tensors: &[(&str, &str)]) -> StepHashes {
        let own = |(name, hash): &(&str, &str)| (name.to_string(), hash.to_string());
        StepHashes { step: 1, tensors: tensors.iter().map(own).collect() }
    }

    #[test]
    fn the_first_differing_tensor_is_named() {
        let a = hashes(&[("embedding", "1"), ("head", "2")]);
        let check = |b: &[(&str, &str)], expect: Option<&str>| {
            assert_eq!(hashed_tensor(&a, &hashes(b)).as_deref(), expect);
        };
        check(&[("embedding", "1"), ("head", "2")], None);
        check(&[("embedding", "1"), ("head", "3")], Some("tensor head"));
        check(&[("embedding", "1")], Some("tensor head is only in one of them"));
        check(
            &[("embedding", "1"), ("head", "2"), ("norm", "3")],
            Some("tensor norm is only in one of them"),
        );
    }
}
