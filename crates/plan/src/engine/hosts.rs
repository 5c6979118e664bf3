//! A cluster of hosts that were measured, as a TOML file describes it.

use serde::Deserialize;

use crate::hardware::{ClusterError, FileLevel, Level, check, levels, positive};

/// Hosts that are planned for at most.
const MOST_HOSTS: usize = 4096;

/// Hosts of one kind and the network between them.
#[derive(Debug, Clone, PartialEq)]
pub struct HostCluster {
    /// What a host is: `local`, or a file of `unisono bench local`.
    pub host: String,
    /// How many.
    pub hosts: usize,
    /// Ranks of each; none if that is to be found out.
    pub ranks_per_host: Option<usize>,
    /// Threads of a rank; none for a host's cores shared out among its ranks.
    pub threads: Option<usize>,
    /// Bytes of memory of a host that ranks may use; none if not known.
    pub memory_bytes: Option<u64>,
    /// Levels of the network, from the innermost outwards; widths are in hosts, rates those of a host.
    pub levels: Vec<Level>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    host: String,
    hosts: usize,
    ranks_per_host: Option<usize>,
    threads: Option<usize>,
    memory_gbyte: Option<f64>,
    #[serde(default)]
    level: Vec<FileLevel>,
}

impl HostCluster {
    /// Whether a file is meant to describe hosts, not GPUs.
    pub fn is_meant(text: &str) -> bool {
        let table = toml::from_str::<toml::Table>(text);
        table
            .is_ok_and(|table| ["host", "hosts", "ranks_per_host"].iter().any(|key| table.contains_key(*key)))
    }

    /// A cluster from TOML: `host` (`local`, or a file of `unisono bench local`) and `hosts`, and whatever is to be fixed:
    /// `ranks_per_host`, `threads` of a rank, `memory_gbyte` of a host. Between hosts lie `[[level]]` tables as a cluster of GPUs
    /// has them, with widths in hosts and rates of a host; one at least if there are several hosts.
    ///
    /// # Errors
    /// Unknown keys and impossible values, by name.
    pub fn from_toml(text: &str) -> Result<Self, ClusterError> {
        let file: File = toml::from_str(text).map_err(|error| ClusterError::Toml(error.to_string()))?;
        check((1..=MOST_HOSTS).contains(&file.hosts), "hosts", file.hosts, || {
            format!("must be between 1 and {MOST_HOSTS}")
        })?;
        check(!file.host.is_empty(), "host", "\"\"", || {
            "must be \"local\" or a file of `unisono bench local`".into()
        })?;
        for (field, value) in [("ranks_per_host", file.ranks_per_host), ("threads", file.threads)] {
            check(value != Some(0), field, 0, || "must be at least 1".into())?;
        }
        let memory = file.memory_gbyte.map(|memory| positive("memory_gbyte", memory)).transpose()?;
        check(file.hosts == 1 || !file.level.is_empty(), "level", "none", || {
            "must say what lies between hosts: [[level]] with name, gbyte_per_s and latency_us".into()
        })?;
        check(file.hosts > 1 || file.level.is_empty(), "level", file.level.len(), || {
            "has no effect with one host: leave it out".into()
        })?;
        let levels = if file.hosts == 1 { Vec::new() } else { levels(file.level, file.hosts, "hosts")? };
        Ok(Self {
            host: file.host,
            hosts: file.hosts,
            ranks_per_host: file.ranks_per_host,
            threads: file.threads,
            memory_bytes: memory.map(|memory| (memory * 1e9) as u64),
            levels,
        })
    }

    /// The innermost level that two hosts share.
    pub(super) fn level_between(&self, a: usize, b: usize) -> usize {
        let shared = self.levels.iter().position(|level| a / level.width == b / level.width);
        shared.unwrap_or(self.levels.len().saturating_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: &str = "[[level]]\nname = \"Ethernet\"\ngbyte_per_s = 0.05\nlatency_us = 60\n";

    #[test]
    fn a_file_says_hosts_and_what_lies_between_them() {
        let rack = "[[level]]\nname = \"rack\"\nwidth = 2\ngbyte_per_s = 1\nlatency_us = 20\n";
        let text = format!("host = \"local\"\nhosts = 4\nranks_per_host = 2\n{rack}{LINK}");
        assert!(HostCluster::is_meant(&text) && !HostCluster::is_meant("gpu = \"h100\"\ngpus = 8"));
        let cluster = HostCluster::from_toml(&text).unwrap();
        assert_eq!((cluster.hosts, cluster.ranks_per_host, cluster.threads), (4, Some(2), None));
        let widths: Vec<usize> = cluster.levels.iter().map(|level| level.width).collect();
        assert_eq!((widths, cluster.levels[1].bytes_per_s), (vec![2, 4], 5e7));
        assert_eq!([(0, 1), (0, 2), (3, 2)].map(|(a, b)| cluster.level_between(a, b)), [0, 1, 0]);
    }

    #[test]
    fn impossible_files_are_refused_by_name() {
        let said = |text: &str| HostCluster::from_toml(text).unwrap_err().to_string();
        let two = "host = \"local\"\nhosts = 2\n";
        assert!(said(two).starts_with("cluster level = none: must say what lies between hosts"));
        assert!(
            said(&format!("{two}threads = 0\n{LINK}")).starts_with("cluster threads = 0: must be at least 1")
        );
        assert!(said(&format!("{two}gpus = 8\n{LINK}")).contains("unknown field `gpus`"));
        assert!(
            said(&format!("host = \"local\"\nhosts = 1\n{LINK}")).contains("has no effect with one host")
        );
        assert!(said(&format!("host = \"local\"\nhosts = 0\n{LINK}")).contains("between 1 and 4096"));
        let narrow = format!("{two}{}", LINK.replace("latency", "width = 1\nlatency"));
        assert_eq!(said(&narrow), "cluster level.width = 1: the outermost must span all 2 hosts");
    }
}
