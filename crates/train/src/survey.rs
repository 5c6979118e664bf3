//! What a run finds before its first step: nodes, processors, links, and whether all ranks are set up alike.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use unisono_comm::Communicator;

use crate::error::TrainError;
use crate::system::{bound_to, cores, cpu_type, host_name};

/// One node of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    /// The ranks on it.
    pub ranks: Vec<usize>,
    /// Its name.
    pub host: String,
    /// Its processor, as the system names it.
    pub cpu: String,
    /// Cores that its ranks may use together.
    pub cores: usize,
}

/// The machine that a run found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorldRecord {
    /// What carries messages.
    pub transport: String,
    /// The nodes.
    pub nodes: Vec<NodeRecord>,
    /// Pairs of ranks on one node, and on different nodes.
    pub links: (usize, usize),
}

/// What one rank tells the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Told {
    host: String,
    cpu: String,
    cores: usize,
    /// The numbers of cores it is bound to.
    bound_to: Vec<usize>,
    credentials: Credentials,
}

/// What must be the same on all ranks, or their numbers would not be those of one computation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Credentials {
    /// The program's version.
    pub version: String,
    /// What tells builds of one version apart, where ranks may run different ones.
    pub build: Option<String>,
    /// The config.
    pub config: String,
    /// Fingerprint of the data.
    pub data: String,
    /// Hash of the kernels' results on fixed inputs.
    pub probe: String,
    /// Whether it resumes.
    pub resume: bool,
    /// Whether it writes a trace.
    pub trace: bool,
}

impl Credentials {
    /// What differs from rank 0, and what would help.
    fn difference(&self, first: &Self) -> Option<(&'static str, &'static str)> {
        [
            (self.version != first.version, "another version of unisono", "start the same binary everywhere"),
            (self.config != first.config, "another config", "let all ranks read the same config"),
            (self.data != first.data, "other data", "let all ranks read the same dataset"),
            (
                self.probe != first.probe,
                "kernels that give other bits on fixed inputs",
                "run on machines of one kind",
            ),
            (self.resume != first.resume, "another --resume", "start all ranks with it or none"),
            (self.trace != first.trace, "another --trace", "start all ranks with it or none"),
        ]
        .into_iter()
        .find_map(|(differs, what, remedy)| differs.then_some((what, remedy)))
    }
}

/// Gathers what there is; with it a warning if ranks run different builds.
///
/// # Errors
/// If ranks are not set up alike: the ranks that differ from rank 0 are named.
pub(crate) fn survey(
    comm: &Communicator,
    credentials: Credentials,
    transport: String,
) -> Result<(WorldRecord, Option<String>), TrainError> {
    let told = Told { host: host_name(), cpu: cpu_type(), cores: cores(), bound_to: bound_to(), credentials };
    let text = serde_json::to_vec(&told).map_err(|error| TrainError::Refused(error.to_string()))?;
    let all: Vec<Told> = comm
        .all_gather_values(&text)?
        .iter()
        .map(|text| serde_json::from_slice(text))
        .collect::<Result<_, _>>()
        .map_err(|error| TrainError::Refused(format!("a rank's description cannot be read: {error}")))?;
    check_alike(&all)?;
    Ok((describe(comm, &all, transport), different_builds(&all)))
}

fn check_alike(all: &[Told]) -> Result<(), TrainError> {
    let differences: Vec<_> =
        all.iter().map(|told| told.credentials.difference(&all[0].credentials)).collect();
    let Some((what, remedy)) = differences.iter().flatten().next() else { return Ok(()) };
    let ranks: Vec<String> = (0..all.len())
        .filter(|rank| differences[*rank].is_some_and(|(other, _)| other == *what))
        .map(|rank| format!("{rank} ({}, {})", all[rank].host, all[rank].cpu))
        .collect();
    Err(TrainError::Refused(format!(
        "unlike rank 0 ({}, {}), rank(s) {} have {what}: {remedy}",
        all[0].host,
        all[0].cpu,
        ranks.join(", ")
    )))
}

/// What to say if ranks run different builds. Each may be one for its host's processor, so it is no error: the probe has
/// found that their kernels give the same bits.
fn different_builds(all: &[Told]) -> Option<String> {
    let mut builds: Vec<(&str, Vec<String>)> = Vec::new();
    for (rank, told) in all.iter().enumerate() {
        let Some(build) = &told.credentials.build else { continue };
        let named = format!("{rank} ({})", told.host);
        match builds.iter_mut().find(|(other, _)| other == build) {
            Some((_, ranks)) => ranks.push(named),
            None => builds.push((build, vec![named])),
        }
    }
    if builds.len() < 2 {
        return None;
    }
    let lines: Vec<String> = builds
        .iter()
        .map(|(build, ranks)| format!("rank(s) {} run the build {build}...", ranks.join(", ")))
        .collect();
    Some(format!(
        "{} (BLAKE3 of the file): their kernels give the same bits on fixed inputs, so the run goes on; unless each build is \
         meant for its host's processor, start the same binary everywhere",
        lines.join(", ")
    ))
}

/// Cores of the ranks of a node: those that all of them are bound to, or what each may use if that is the same.
fn cores_of<'a>(ranks: impl Iterator<Item = &'a Told> + Clone) -> usize {
    let most = ranks.clone().map(|told| told.cores).max().unwrap_or(0);
    let all: BTreeSet<&Vec<usize>> = ranks.clone().map(|told| &told.bound_to).collect();
    match all.len() {
        0 | 1 => most,
        _ => most.max(all.into_iter().flatten().collect::<BTreeSet<_>>().len()),
    }
}

fn describe(comm: &Communicator, all: &[Told], transport: String) -> WorldRecord {
    let mut nodes: Vec<(usize, NodeRecord)> = Vec::new();
    for (rank, told) in all.iter().enumerate() {
        let number = comm.node(rank);
        match nodes.iter_mut().find(|(node, _)| *node == number) {
            Some((_, node)) => node.ranks.push(rank),
            None => {
                let (ranks, host, cpu) = (vec![rank], told.host.clone(), told.cpu.clone());
                nodes.push((number, NodeRecord { ranks, host, cpu, cores: 0 }));
            }
        }
    }
    let together = |(_, node): (usize, NodeRecord)| {
        let cores = cores_of(node.ranks.iter().map(|rank| &all[*rank]));
        NodeRecord { cores, ..node }
    };
    let nodes: Vec<NodeRecord> = nodes.into_iter().map(together).collect();
    let pairs = |ranks: usize| ranks * ranks.saturating_sub(1) / 2;
    let inside = nodes.iter().map(|node| pairs(node.ranks.len())).sum();
    WorldRecord { transport, links: (inside, pairs(all.len()) - inside), nodes }
}

#[cfg(test)]
mod tests {
    use unisono_comm::{CommError, ThreadRanks};

    use super::*;

    fn credentials(probe: &str) -> Credentials {
        let text = String::from;
        let (resume, trace) = (false, false);
        Credentials {
            version: text("1"),
            build: None,
            config: text("c"),
            data: text("d"),
            probe: text(probe),
            resume,
            trace,
        }
    }

    #[test]
    fn ranks_that_are_bound_apart_have_their_cores_together() {
        let told = |cores: usize, bound_to: &[usize]| Told {
            host: "h".into(),
            cpu: "c".into(),
            cores,
            bound_to: bound_to.into(),
            credentials: credentials("p"),
        };
        let cores = |ranks: &[Told]| cores_of(ranks.iter());
        assert_eq!(cores(&[told(1, &[0]), told(1, &[1])]), 2);
        assert_eq!(cores(&[told(2, &[0, 1]), told(2, &[1, 2])]), 3);
        assert_eq!(cores(&[told(2, &[0, 1, 2, 3]), told(2, &[0, 1, 2, 3])]), 2, "a container grants two");
        assert_eq!(cores(&[told(4, &[]), told(4, &[])]), 4);
    }

    #[test]
    fn ranks_with_other_arguments_are_named() {
        let verdicts = ThreadRanks::new(2).run(|comm| {
            let given = Credentials { trace: comm.rank() == 0, ..credentials("p") };
            Ok::<_, CommError>(survey(&comm, given, "x".into()).unwrap_err().to_string())
        });
        for text in verdicts.unwrap() {
            assert!(text.contains("rank(s) 1 (") && text.contains("another --trace: start all"), "{text}");
        }
    }

    #[test]
    fn ranks_with_other_builds_are_a_warning_that_names_both() {
        let warnings = ThreadRanks::new(3).run(|comm| {
            let build = if comm.rank() == 1 { "b0b0" } else { "a0a0" };
            let given = Credentials { build: Some(build.into()), ..credentials("p") };
            survey(&comm, given, "x".into())
        });
        for (_, warning) in warnings.unwrap() {
            let (text, host) = (warning.unwrap(), host_name());
            let one = format!("rank(s) 0 ({host}), 2 ({host}) run the build a0a0..., ");
            assert!(text.starts_with(&one), "{text}");
            assert!(text.contains(&format!("rank(s) 1 ({host}) run the build b0b0...")), "{text}");
        }
    }

    #[test]
    fn nodes_and_links_are_counted() {
        let worlds =
            ThreadRanks::new(5).nodes(&[2, 3]).run(|comm| survey(&comm, credentials("p"), "x".into()));
        for (world, warning) in worlds.unwrap() {
            assert_eq!(warning, None);
            assert_eq!(world.links, (1 + 3, 6));
            assert_eq!(
                world.nodes.iter().map(|node| node.ranks.clone()).collect::<Vec<_>>(),
                [vec![0, 1], vec![2, 3, 4]]
            );
        }
    }

    #[test]
    fn ranks_with_other_kernels_are_named() {
        let verdicts = ThreadRanks::new(4).run(|comm| {
            let probe = if comm.rank() % 2 == 1 { "other" } else { "same" };
            Ok::<_, CommError>(survey(&comm, credentials(probe), "x".into()).unwrap_err().to_string())
        });
        for text in verdicts.unwrap() {
            assert!(
                text.contains("rank(s) 1 (") && text.contains(", 3 (") && !text.contains(", 2 ("),
                "{text}"
            );
            assert!(text.contains("kernels that give other bits"), "{text}");
        }
    }
}
