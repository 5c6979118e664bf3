//! GPUs and clusters.

mod gpu;
mod toml_file;

use crate::architecture::distance;

pub use gpu::Gpu;
pub(crate) use toml_file::{FileLevel, levels, positive};

/// One level of the network, from the innermost outwards.
#[derive(Debug, Clone, PartialEq)]
pub struct Level {
    /// What it is called, such as `NVLink` or `InfiniBand`.
    pub name: String,
    /// GPUs that a group of this level spans.
    pub width: usize,
    /// Bytes per second that a GPU can send into this level (and receive from it), without oversubscription.
    pub bytes_per_s: f64,
    /// Seconds until the first byte arrives.
    pub latency_s: f64,
    /// By how much the links above are too narrow for all at once; 1 for a full fat tree.
    pub oversubscription: f64,
}

impl Level {
    /// Bytes per second of a GPU when all send at once.
    pub fn shared_bytes_per_s(&self) -> f64 {
        self.bytes_per_s / self.oversubscription
    }
}

/// GPUs of one type and the network between them.
#[derive(Debug, Clone, PartialEq)]
pub struct Cluster {
    /// The GPU.
    pub gpu: Gpu,
    /// How many.
    pub gpus: usize,
    /// GPUs of a server.
    pub per_server: usize,
    /// Levels of the network, from the innermost outwards; the last spans all GPUs.
    pub levels: Vec<Level>,
    /// Price.
    pub price_usd_per_gpu_hour: f64,
    /// Failures that end a step, a GPU and hour; 0 for none.
    pub failures_per_gpu_hour: f64,
}

/// Llama 3 (2024): 419 unexpected interruptions of 16,384 H100 in 54 days.
const OBSERVED_FAILURES: f64 = 419.0;
const FAILURES_PER_GPU_HOUR: f64 = OBSERVED_FAILURES / (16_384.0 * 54.0 * 24.0);

/// Price where nobody has published one.
const FALLBACK_USD_PER_GPU_HOUR: f64 = 5.0;

/// Time until the first byte, within NVLink and through one network adapter.
pub(crate) const NVLINK_LATENCY_S: f64 = 2e-6;
pub(crate) const NETWORK_LATENCY_S: f64 = 5e-6;

/// Networks known by name, with the time until the first byte. EFA's is fitted to all-reduces of 1, 4, 16 MiB and so on over
/// four servers of B200 (p6-b200, nccl_multinode.csv; `tests/plan/collectives.rs` fits it again). AWS's plugin itself tells NCCL
/// 35 to 75 us a hop.
const NETWORKS: [(&str, f64); 2] = [("InfiniBand", NETWORK_LATENCY_S), ("EFA", 84e-6)];

/// The largest cluster that is planned for.
const LARGEST_CLUSTER: usize = 1 << 20;

/// A cluster that cannot be.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ClusterError {
    /// No such GPU.
    #[error("GPU {name:?} is not known; nearest: {nearest}")]
    UnknownGpu {
        /// The name.
        name: String,
        /// The most similar known name.
        nearest: String,
    },
    /// A field has an impossible value.
    #[error("cluster {field} = {value}: {rule}")]
    Field {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What would be right.
        rule: String,
    },
    /// Not the expected TOML.
    #[error("cluster file: {0}")]
    Toml(String),
}

impl ClusterError {
    /// The same where so many were asked for: of a GPU that ends in an x both are needed, `mi355xx64`.
    fn of_count(self, count: &str) -> Self {
        match self {
            Self::UnknownGpu { name, nearest } if nearest.to_ascii_lowercase() == format!("{name}x") => {
                Self::UnknownGpu { nearest: format!("{name}xx{count}"), name }
            }
            other => other,
        }
    }
}

impl Cluster {
    /// Standard deviation of the logarithm of the rate of failures: of the usual one that of a count of so many events, which come
    /// as Poisson's do; how far clusters differ is not published often enough. A rate that is given is taken as it is.
    pub(crate) fn failure_spread(&self) -> f64 {
        if self.failures_per_gpu_hour == FAILURES_PER_GPU_HOUR {
            OBSERVED_FAILURES.sqrt().recip()
        } else {
            0.0
        }
    }

    /// So many GPUs in their usual servers on their usual network.
    ///
    /// # Errors
    /// No GPUs, or more than a million.
    pub fn of(gpu: Gpu, gpus: usize) -> Result<Self, ClusterError> {
        check((1..=LARGEST_CLUSTER).contains(&gpus), "gpus", gpus, || {
            format!("must be between 1 and {LARGEST_CLUSTER}")
        })?;
        let inner = Level {
            name: gpu.fabric.into(),
            width: gpu.nvlink_domain.min(gpus),
            bytes_per_s: gpu.nvlink_bytes_per_s,
            latency_s: NVLINK_LATENCY_S,
            oversubscription: 1.0,
        };
        let outer = Level {
            name: "network".into(),
            width: gpus,
            bytes_per_s: gpu.nic_bytes_per_s,
            latency_s: NETWORK_LATENCY_S,
            oversubscription: 1.0,
        };
        let levels = if inner.width == gpus { vec![inner] } else { vec![inner, outer] };
        Ok(Self {
            gpus,
            per_server: gpu.per_server.min(gpus),
            levels,
            price_usd_per_gpu_hour: gpu.price_usd_per_hour.unwrap_or(FALLBACK_USD_PER_GPU_HOUR),
            failures_per_gpu_hour: FAILURES_PER_GPU_HOUR,
            gpu,
        })
    }

    /// A cluster by name: `h800x2048`.
    ///
    /// # Errors
    /// A name that is not `GPUxCOUNT`, an unknown GPU, an impossible count.
    pub fn parse(name: &str) -> Result<Self, ClusterError> {
        let lower = name.trim().to_ascii_lowercase();
        // MI300X ends in an x of its own: the count follows the last one.
        let (gpu, count) =
            lower.rsplit_once('x').filter(|(_, count)| !count.is_empty()).ok_or_else(|| {
                let rule = "must be a GPU, an x and a count, such as h800x2048".to_string();
                ClusterError::Field { field: "name", value: name.to_string(), rule }
            })?;
        let gpu = Gpu::named(gpu).map_err(|error| error.of_count(count))?;
        let gpus = count.parse().map_err(|_| ClusterError::Field {
            field: "gpus",
            value: count.to_string(),
            rule: "must be a number, such as 2048".into(),
        })?;
        Self::of(gpu, gpus)
    }

    /// So many GPUs of this kind, at least as many as there are: in the same servers, within the same inner levels. What spanned
    /// all of them spans all of these; an innermost level that did stays as wide as the GPU's domain allows.
    ///
    /// # Errors
    /// More than a million GPUs.
    pub fn enlarged(&self, gpus: usize) -> Result<Self, ClusterError> {
        let usual = Self::of(self.gpu, gpus)?;
        let mut levels = self.levels.clone();
        match &mut levels[..] {
            [only] if only.width < gpus => {
                only.width = only.width.max(usual.levels[0].width);
                levels.extend(usual.levels.into_iter().skip(1));
            }
            [.., outer] => outer.width = gpus,
            [] => {}
        }
        Ok(Self { gpus, per_server: usual.per_server, levels, ..self.clone() })
    }

    /// GPUs that reach each other over the innermost level.
    pub fn nvlink_domain(&self) -> usize {
        self.levels[0].width
    }

    /// The innermost level that a group of `size` ranks, `stride` ranks apart, stays within.
    pub fn level_of(&self, size: usize, stride: usize) -> usize {
        let span = size * stride;
        let last = self.levels.len() - 1;
        self.levels.iter().position(|level| span <= level.width).unwrap_or(last)
    }

    /// The innermost level that two ranks share.
    pub fn level_between(&self, a: usize, b: usize) -> usize {
        let last = self.levels.len() - 1;
        self.levels.iter().position(|level| a / level.width == b / level.width).unwrap_or(last)
    }
}

pub(crate) fn check(
    holds: bool,
    field: &'static str,
    value: impl ToString,
    rule: impl FnOnce() -> String,
) -> Result<(), ClusterError> {
    if holds { Ok(()) } else { Err(ClusterError::Field { field, value: value.to_string(), rule: rule() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_gives_the_usual_servers_and_network() {
        let cluster = Cluster::parse("h800x2048").unwrap();
        assert_eq!((cluster.gpus, cluster.per_server, cluster.nvlink_domain()), (2048, 8, 8));
        assert_eq!(cluster.levels[1].bytes_per_s, 50e9);
        assert_eq!(cluster.price_usd_per_gpu_hour, 2.0);
        assert_eq!((cluster.level_of(8, 1), cluster.level_of(8, 2), cluster.level_of(2, 4)), (0, 1, 0));
        assert_eq!(Cluster::parse("mi300xx16").unwrap().gpu.name, "MI300X");
        assert_eq!(Cluster::parse("GB200x72").unwrap().levels.len(), 1);
    }

    #[test]
    fn impossible_clusters_name_the_nearest_possible() {
        let said = |name: &str| Cluster::parse(name).unwrap_err().to_string();
        assert_eq!(said("h900x8"), "GPU \"h900\" is not known; nearest: H100");
        assert_eq!(said("mi355x64"), "GPU \"mi355\" is not known; nearest: mi355xx64");
        assert_eq!(said("h100x0"), "cluster gpus = 0: must be between 1 and 1048576");
        assert_eq!(said("h100"), "cluster name = h100: must be a GPU, an x and a count, such as h800x2048");
        assert_eq!(said("h100xmany"), "cluster gpus = many: must be a number, such as 2048");
    }
}
