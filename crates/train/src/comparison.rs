//! Two runs compared: the first step, and the quantity or tensor, in which they differ.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use unisono_checkpoint::{Reader, compare, list};

use crate::error::TrainError;
use crate::hashes::StepHashes;
use crate::record::StepRecord;
use crate::run_folder::{CHECKPOINTS, read_hashes, read_steps};

/// A difference after a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The step.
    pub step: u64,
    /// What differs, and how.
    pub text: String,
}

/// What was compared, and the first difference of each kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comparison {
    /// Steps of which both have numbers.
    pub steps: usize,
    /// The last step of each.
    pub lengths: [u64; 2],
    /// The first loss, norm or routing count that differs, or step that one of them lacks.
    pub quantity: Option<Found>,
    /// Steps of which both have hashes.
    pub hashed: usize,
    /// The first tensor whose hash differs.
    pub hash: Option<Found>,
    /// Steps of which both have a checkpoint.
    pub checkpoints: Vec<u64>,
    /// The first tensor of these checkpoints that differs, with its element.
    pub tensor: Option<Found>,
}

impl Comparison {
    /// Compares the runs in two folders.
    ///
    /// # Errors
    /// If a file cannot be read, or a checkpoint is damaged.
    pub fn new(first: &Path, second: &Path) -> Result<Self, TrainError> {
        let [a, b] = [by_step(read_steps(first)?), by_step(read_steps(second)?)];
        let [a_hashes, b_hashes] =
            [hashes_by_step(read_hashes(first)?), hashes_by_step(read_hashes(second)?)];
        let (checkpoints, tensor) = compare_checkpoints(first, second)?;
        Ok(Self {
            steps: common(&a, &b).count(),
            lengths: [&a, &b].map(|steps| steps.keys().next_back().copied().unwrap_or(0)),
            quantity: first_difference(&a, &b, quantity),
            hashed: common(&a_hashes, &b_hashes).count(),
            hash: hash_difference(&a_hashes, &b_hashes),
            checkpoints,
            tensor,
        })
    }

    /// Whether nothing differs in what both have.
    pub fn is_equal(&self) -> bool {
        self.quantity.is_none() && self.hash.is_none() && self.tensor.is_none()
    }

    /// The first step that differs.
    pub fn first_step(&self) -> Option<u64> {
        self.differences().first().map(|(_, found)| found.step)
    }

    /// When and what, in the order in which a run comes to it: a step's numbers, its tensors, the checkpoint after it. The
    /// hashes name the tensor, a checkpoint its element, too.
    fn differences(&self) -> Vec<(&'static str, &Found)> {
        let all = [("in", &self.quantity), ("after", &self.hash), ("in the checkpoint of", &self.tensor)];
        let mut found: Vec<_> =
            all.into_iter().filter_map(|(when, found)| Some((when, found.as_ref()?))).collect();
        found.sort_by_key(|(_, found)| found.step);
        found
    }

    /// In words, a line each, what differs first before what follows from it.
    pub fn render(&self) -> String {
        let [a, b] = self.lengths;
        let mut lines = Vec::new();
        match self.first_step() {
            None if a != b => lines.push(format!("identical as far as both go, to step {}", a.min(b))),
            None => lines.push("identical".to_string()),
            Some(step) => lines.push(format!("different from step {step} on")),
        }
        let order = std::iter::once("first").chain(std::iter::repeat("then"));
        for ((when, found), order) in self.differences().into_iter().zip(order) {
            lines.push(format!("  {order} {when} step {}: {}", found.step, found.text));
        }
        lines.push(format!(
            "  compared: steps with metrics: {}, with hashes: {}; checkpoints: {}{}",
            self.steps,
            self.hashed,
            self.checkpoints.len(),
            self.checkpoints.last().map(|step| format!(", the last of step {step}")).unwrap_or_default(),
        ));
        if self.hashed == 0 {
            lines.push(
                "  tensors are known only at checkpoints; runs with log.hashes_every=N know them after every N steps"
                    .into(),
            );
        }
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

/// The first step in which `differ` finds something, or that is in one of them only, up to where the shorter one ends.
fn first_difference<T>(
    a: &BTreeMap<u64, T>,
    b: &BTreeMap<u64, T>,
    differ: impl Fn(&T, &T) -> Option<String>,
) -> Option<Found> {
    let end = a.keys().next_back()?.min(b.keys().next_back()?);
    let steps: BTreeSet<u64> = a.keys().chain(b.keys()).filter(|step| *step <= end).copied().collect();
    steps.into_iter().find_map(|step| {
        let text = match (a.get(&step), b.get(&step)) {
            (Some(a), Some(b)) => differ(a, b)?,
            (Some(_), None) => "the second run has no record of it".into(),
            (None, _) => "the first run has no record of it".into(),
        };
        Some(Found { step, text })
    })
}

/// Hashes may be of every so many steps, and of others in each run.
fn hash_difference(a: &BTreeMap<u64, StepHashes>, b: &BTreeMap<u64, StepHashes>) -> Option<Found> {
    common(a, b).find_map(|(step, a, b)| Some(Found { step, text: hashed_tensor(a, b)? }))
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
fn compare_checkpoints(first: &Path, second: &Path) -> Result<(Vec<u64>, Option<Found>), TrainError> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_told_in_the_order_in_which_a_run_comes_to_it() {
        let lines = |steps: [u64; 3]| {
            let [quantity, hash, tensor] = steps.map(|step| Some(Found { step, text: "x".into() }));
            let comparison = Comparison {
                steps: 9,
                lengths: [9, 9],
                quantity,
                hashed: 9,
                hash,
                checkpoints: vec![2, 4, 6],
                tensor,
            };
            let text = comparison.render();
            assert!(text.starts_with(&format!("different from step {} on\n", steps.iter().min().unwrap())));
            text.lines().skip(1).take(3).map(|line| line.trim().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(
            lines([2, 2, 2]),
            ["first in step 2: x", "then after step 2: x", "then in the checkpoint of step 2: x"]
        );
        // An update that went wrong shows in the tensors, and only then in the next step's numbers.
        assert_eq!(
            lines([3, 2, 4]),
            ["first after step 2: x", "then in step 3: x", "then in the checkpoint of step 4: x"]
        );
        assert_eq!(
            lines([5, 6, 4]),
            ["first in the checkpoint of step 4: x", "then in step 5: x", "then after step 6: x"]
        );
    }

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

    #[test]
    fn without_hashes_it_says_how_tensors_become_known() {
        let mut comparison = Comparison {
            steps: 5,
            lengths: [5, 5],
            quantity: None,
            hashed: 0,
            hash: None,
            checkpoints: vec![5],
            tensor: None,
        };
        let says = |comparison: &Comparison| comparison.render().contains("log.hashes_every=N");
        assert!(says(&comparison) && comparison.render().starts_with("identical\n"));
        comparison.hashed = 1;
        assert!(!says(&comparison));
    }
}
