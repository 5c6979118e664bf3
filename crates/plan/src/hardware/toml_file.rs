//! A cluster as a TOML file describes it.

use serde::Deserialize;

use super::{Cluster, ClusterError, Gpu, Level, NETWORKS, check};
use crate::engine::HostCluster;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    gpu: Option<String>,
    gpu_like: Option<String>,
    bf16_tflops: Option<f64>,
    fp8_tflops: Option<f64>,
    fp4_tflops: Option<f64>,
    memory_gib: Option<f64>,
    memory_tbyte_per_s: Option<f64>,
    nvlink_gbyte_per_s: Option<f64>,
    gpus: usize,
    per_server: Option<usize>,
    nvlink_domain: Option<usize>,
    nic_gbyte_per_s: Option<f64>,
    network: Option<String>,
    price_usd_per_gpu_hour: Option<f64>,
    failures_per_gpu_hour: Option<f64>,
    #[serde(default)]
    level: Vec<FileLevel>,
}

/// A `[[level]]`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileLevel {
    name: String,
    width: Option<usize>,
    gbyte_per_s: f64,
    latency_us: f64,
    #[serde(default = "one")]
    oversubscription: f64,
}

fn one() -> f64 {
    1.0
}

impl Cluster {
    /// A cluster from TOML: `gpu` and `gpus`, and whatever differs from their usual servers: `per_server`, `nvlink_domain`,
    /// `nic_gbyte_per_s`, `network` (`InfiniBand` or `EFA`), `price_usd_per_gpu_hour`, `failures_per_gpu_hour`, and `[[level]]`
    /// tables (`name`, `width`, `gbyte_per_s`, `latency_us`, `oversubscription`) that replace all levels of the network. A GPU that is not
    /// known is described by `gpu_like` instead of `gpu`, and by what differs: `bf16_tflops`, `fp8_tflops`, `fp4_tflops`, `memory_gib`,
    /// `memory_tbyte_per_s`, `nvlink_gbyte_per_s`.
    ///
    /// # Errors
    /// Unknown keys, GPUs and networks, impossible values, and keys without effect, by name.
    pub fn from_toml(text: &str) -> Result<Self, ClusterError> {
        if HostCluster::is_meant(text) {
            let rule = "it describes hosts that were measured, which only `unisono plan CONFIG FILE` prices";
            return Err(ClusterError::Toml(rule.into()));
        }
        let file: File = toml::from_str(text).map_err(|error| ClusterError::Toml(error.to_string()))?;
        file.check_effect()?;
        let mut gpu = file.gpu()?;
        gpu.per_server = file.per_server.unwrap_or(gpu.per_server);
        gpu.nvlink_domain = file.nvlink_domain.unwrap_or(gpu.nvlink_domain);
        check(gpu.per_server >= 1, "per_server", gpu.per_server, || "must be at least 1".into())?;
        check(gpu.nvlink_domain >= 1, "nvlink_domain", gpu.nvlink_domain, || "must be at least 1".into())?;
        if let Some(rate) = file.nic_gbyte_per_s {
            positive("nic_gbyte_per_s", rate)?;
            gpu.nic_bytes_per_s = rate * 1e9;
        }
        let mut cluster = Self::of(gpu, file.gpus)?;
        if let Some(price) = file.price_usd_per_gpu_hour {
            cluster.price_usd_per_gpu_hour = at_least_zero("price_usd_per_gpu_hour", price)?;
        }
        if let Some(rate) = file.failures_per_gpu_hour {
            cluster.failures_per_gpu_hour = at_least_zero("failures_per_gpu_hour", rate)?;
        }
        if let Some(name) = file.network {
            cluster.be_joined_by(&name)?;
        }
        if !file.level.is_empty() {
            cluster.levels = levels(file.level, file.gpus, "GPUs")?;
        }
        Ok(cluster)
    }

    /// Names the network between servers, which gives its latency.
    fn be_joined_by(&mut self, network: &str) -> Result<(), ClusterError> {
        let known = NETWORKS.iter().find(|(name, _)| name.eq_ignore_ascii_case(network));
        check(known.is_some(), "network", network, || {
            let names = NETWORKS.map(|(name, _)| name).join(" or ");
            format!("must be {names}; say others by [[level]]")
        })?;
        check(self.levels.len() > 1, "network", network, || {
            format!("has no effect where {} joins all GPUs: leave it out", self.levels[0].name)
        })?;
        if let (Some((name, latency_s)), [_, outer]) = (known, &mut self.levels[..]) {
            (outer.name, outer.latency_s) = (name.to_string(), *latency_s);
        }
        Ok(())
    }
}

impl File {
    /// The GPU, by its name or as it is described.
    fn gpu(&self) -> Result<Gpu, ClusterError> {
        let described = [
            ("bf16_tflops", self.bf16_tflops),
            ("fp8_tflops", self.fp8_tflops),
            ("fp4_tflops", self.fp4_tflops),
            ("memory_gib", self.memory_gib),
            ("memory_tbyte_per_s", self.memory_tbyte_per_s),
            ("nvlink_gbyte_per_s", self.nvlink_gbyte_per_s),
        ];
        for (field, value) in described.into_iter().filter_map(|(field, value)| Some((field, value?))) {
            positive(field, value)?;
            check(self.gpu_like.is_some(), field, value, || {
                "describes a GPU that is not known: say gpu_like instead of gpu".into()
            })?;
        }
        match (&self.gpu, &self.gpu_like) {
            (Some(name), None) => Gpu::named(name),
            (None, Some(name)) => self.described(Gpu::named(name)?),
            _ => {
                let rule = "must say gpu, such as \"h100\", or gpu_like and what differs from that GPU";
                Err(ClusterError::Toml(rule.into()))
            }
        }
    }

    /// A GPU that differs from `like`. Peaks that are not said keep their ratio to that of 16 bits.
    fn described(&self, like: Gpu) -> Result<Gpu, ClusterError> {
        let of = |said: Option<f64>, unit: f64, usual: f64| said.map_or(usual, |said| said * unit);
        let bf16_flops = of(self.bf16_tflops, 1e12, like.bf16_flops);
        let usual = |flops: f64| bf16_flops * (flops / like.bf16_flops);
        let fp8_flops = of(self.fp8_tflops, 1e12, usual(like.fp8_flops));
        let gpu = Gpu {
            described: true,
            bf16_flops,
            fp8_flops,
            // Who has units of 8 bits only runs 4 bits on them.
            fp4_flops: of(self.fp4_tflops, 1e12, usual(like.fp4_flops).max(fp8_flops)),
            memory_bytes: of(self.memory_gib, (1u64 << 30) as f64, like.memory_bytes),
            memory_bytes_per_s: of(self.memory_tbyte_per_s, 1e12, like.memory_bytes_per_s),
            nvlink_bytes_per_s: of(self.nvlink_gbyte_per_s, 1e9, like.nvlink_bytes_per_s),
            ..like
        };
        let [bf16, fp8, fp4] = [gpu.bf16_flops, gpu.fp8_flops, gpu.fp4_flops].map(|flops| flops / 1e12);
        check(fp8 >= bf16, "fp8_tflops", fp8, || format!("must be at least bf16_tflops, {bf16}"))?;
        check(fp4 >= fp8, "fp4_tflops", fp4, || format!("must be at least fp8_tflops, {fp8}"))?;
        Ok(gpu)
    }

    /// Levels replace the usual network, so that nothing else may describe it.
    fn check_effect(&self) -> Result<(), ClusterError> {
        let replaced = [
            ("nvlink_domain", self.nvlink_domain.map(|domain| domain.to_string())),
            ("nic_gbyte_per_s", self.nic_gbyte_per_s.map(|rate| rate.to_string())),
            ("network", self.network.clone()),
            ("nvlink_gbyte_per_s", self.nvlink_gbyte_per_s.map(|rate| rate.to_string())),
        ];
        for (field, value) in replaced {
            let value = value.filter(|_| !self.level.is_empty());
            check(value.is_none(), field, value.unwrap_or_default(), || {
                "has no effect beside [[level]], which says all of the network: leave it out".into()
            })?;
        }
        Ok(())
    }
}

/// Levels over `all` of `what`.
pub(crate) fn levels(from: Vec<FileLevel>, all: usize, what: &str) -> Result<Vec<Level>, ClusterError> {
    let mut levels: Vec<Level> = Vec::with_capacity(from.len());
    for level in from {
        let inner = levels.last().map_or(0, |level| level.width);
        let width = level.width.unwrap_or(all);
        check(width > inner, "level.width", width, || {
            format!("must be more than the {inner} of the level within")
        })?;
        check(width >= all || width.is_multiple_of(inner.max(1)), "level.width", width, || {
            format!("must be a multiple of the {inner} of the level within")
        })?;
        check(levels.iter().all(|other| other.name != level.name), "level.name", &level.name, || {
            "must differ from the other levels'".into()
        })?;
        check(level.oversubscription >= 1.0, "level.oversubscription", level.oversubscription, || {
            "must be at least 1".into()
        })?;
        levels.push(Level {
            name: level.name,
            width: width.min(all),
            bytes_per_s: positive("level.gbyte_per_s", level.gbyte_per_s)? * 1e9,
            latency_s: positive("level.latency_us", level.latency_us)? * 1e-6,
            oversubscription: level.oversubscription,
        });
        if width >= all {
            return Ok(levels);
        }
    }
    let reach = levels.last().map_or(0, |level| level.width);
    check(false, "level.width", reach, || format!("the outermost must span all {all} {what}"))?;
    Ok(levels)
}

pub(crate) fn positive(field: &'static str, value: f64) -> Result<f64, ClusterError> {
    check(value.is_finite() && value > 0.0, field, value, || "must be more than 0".into())?;
    Ok(value)
}

fn at_least_zero(field: &'static str, value: f64) -> Result<f64, ClusterError> {
    check(value.is_finite() && value >= 0.0, field, value, || "must be at least 0".into())?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_leaves_out_is_as_usual() {
        let plain = Cluster::from_toml("gpu = \"h100\"\ngpus = 64").unwrap();
        assert_eq!(plain, Cluster::parse("h100x64").unwrap());
        let owned = Cluster::from_toml("gpu = \"h100\"\ngpus = 64\nprice_usd_per_gpu_hour = 0").unwrap();
        assert_eq!(owned.price_usd_per_gpu_hour, 0.0);
        let lasting = Cluster::from_toml("gpu = \"h100\"\ngpus = 64\nfailures_per_gpu_hour = 0").unwrap();
        assert_eq!(lasting.failures_per_gpu_hour, 0.0);
        let network =
            |name: &str| Cluster::from_toml(&format!("gpu = \"h100\"\ngpus = 64\nnetwork = \"{name}\""));
        let latency = |name: &str| network(name).unwrap().levels[1].latency_s;
        assert_eq!(latency("infiniband"), plain.levels[1].latency_s);
        assert!(latency("EFA") > 10.0 * latency("InfiniBand"));
        let text = "gpu = \"h100\"\ngpus = 64\nprice_usd_per_gpu_hour = 1.5\n\
            [[level]]\nname = \"NVLink\"\nwidth = 8\ngbyte_per_s = 450\nlatency_us = 2\n\
            [[level]]\nname = \"Ethernet\"\ngbyte_per_s = 12.5\nlatency_us = 20\noversubscription = 2";
        let cluster = Cluster::from_toml(text).unwrap();
        assert_eq!(cluster.price_usd_per_gpu_hour, 1.5);
        assert_eq!(cluster.levels[1].width, 64);
        assert_eq!(cluster.levels[1].shared_bytes_per_s(), 6.25e9);
    }

    #[test]
    fn a_gpu_that_is_not_known_is_described() {
        let file = |text: &str| Cluster::from_toml(&format!("gpus = 16\n{text}"));
        let said = |text: &str| file(text).unwrap_err().to_string();
        let h100 = Gpu::named("H100").unwrap();
        let gpu = file("gpu_like = \"h100\"\nbf16_tflops = 1978\nmemory_gib = 140\nnvlink_gbyte_per_s = 900")
            .unwrap()
            .gpu;
        assert_eq!(gpu.bf16_flops, 2.0 * h100.bf16_flops);
        assert!((gpu.fp8_flops / h100.fp8_flops - 2.0).abs() < 1e-12);
        assert!(file("gpu_like = \"a100\"\nbf16_tflops = 401.3").is_ok(), "peaks may be equal");
        assert_eq!(
            (gpu.memory_bytes, gpu.memory_bytes_per_s),
            (140.0 * (1u64 << 30) as f64, h100.memory_bytes_per_s)
        );
        assert_eq!((gpu.nvlink_bytes_per_s, gpu.label().as_ref()), (900e9, "H100-like"));
        assert_eq!(
            said("gpu_like = \"h100\"\nfp4_tflops = 1500"),
            "cluster fp4_tflops = 1500: must be at least fp8_tflops, 1979"
        );
        let b200 = Gpu::named("B200").unwrap();
        let wide = file("gpu_like = \"b200\"\nfp8_tflops = 4600").unwrap().gpu;
        assert_eq!(wide.fp4_flops, b200.fp4_flops, "what is not said keeps its ratio");
        let narrow = file("gpu_like = \"a100\"\nfp8_tflops = 624").unwrap().gpu;
        assert_eq!((narrow.fp8_flops, narrow.fp4_flops), (624e12, 624e12));
        assert_eq!(
            said("gpu = \"h100\"\nmemory_gib = 140"),
            "cluster memory_gib = 140: describes a GPU that is not known: say gpu_like instead of gpu"
        );
        let both = "cluster file: must say gpu, such as \"h100\", or gpu_like and what differs from that GPU";
        assert_eq!((said("gpu = \"h100\"\ngpu_like = \"h100\""), said("")), (both.into(), both.into()));
        assert_eq!(
            said("gpu_like = \"h100\"\nfp8_tflops = 500"),
            "cluster fp8_tflops = 500: must be at least bf16_tflops, 989"
        );
        assert_eq!(
            said("gpu_like = \"h100\"\nmemory_gib = 0"),
            "cluster memory_gib = 0: must be more than 0"
        );
    }

    #[test]
    fn an_enlarged_cluster_keeps_its_inner_levels() {
        let widths = |cluster: &Cluster| cluster.levels.iter().map(|level| level.width).collect::<Vec<_>>();
        let file = |levels: &str| Cluster::from_toml(&format!("gpu = \"h100\"\ngpus = 8\n{levels}")).unwrap();
        let level = |name: &str, width: usize| {
            format!("[[level]]\nname = \"{name}\"\nwidth = {width}\ngbyte_per_s = 9\nlatency_us = 2\n")
        };
        let pairs = file(&(level("bridge", 2) + &level("Ethernet", 8))).enlarged(64).unwrap();
        assert_eq!((pairs.gpus, widths(&pairs)), (64, vec![2, 64]));
        assert_eq!(pairs.levels[1].bytes_per_s, 9e9);
        assert_eq!(widths(&file(&level("PCIe", 8)).enlarged(64).unwrap()), [8, 64]);
        assert_eq!(file("").enlarged(64), Cluster::parse("h100x64"));
        assert_eq!(Cluster::parse("gb200x8").unwrap().enlarged(144), Cluster::parse("gb200x144"));
    }

    #[test]
    fn impossible_files_are_refused_by_name() {
        let said = |text: &str| Cluster::from_toml(text).unwrap_err().to_string();
        let level = |width: usize| {
            format!(
                "gpu = \"h100\"\ngpus = 64\n[[level]]\nname = \"a\"\nwidth = {width}\ngbyte_per_s = 1\nlatency_us = 1"
            )
        };
        assert_eq!(said(&level(8)), "cluster level.width = 8: the outermost must span all 64 GPUs");
        assert_eq!(said(&level(0)), "cluster level.width = 0: must be more than the 0 of the level within");
        assert_eq!(
            said("gpu = \"h100\"\ngpus = 64\nnic_gbyte_per_s = 0"),
            "cluster nic_gbyte_per_s = 0: must be more than 0"
        );
        assert_eq!(
            said("gpu = \"h100\"\ngpus = 64\nprice_usd_per_gpu_hour = -1"),
            "cluster price_usd_per_gpu_hour = -1: must be at least 0"
        );
        assert_eq!(
            said("gpu = \"h100\"\ngpus = 64\nfailures_per_gpu_hour = -1"),
            "cluster failures_per_gpu_hour = -1: must be at least 0"
        );
        let more = |name: &str, width: usize| {
            let outer = "\n[[level]]\nname = \"all\"\ngbyte_per_s = 1\nlatency_us = 1";
            format!(
                "{}\n{}{outer}",
                level(8),
                level(width).split_once("64\n").unwrap().1.replace("\"a\"", name)
            )
        };
        assert!(Cluster::from_toml(&more("\"b\"", 16)).is_ok());
        assert_eq!(
            said(&more("\"b\"", 12)),
            "cluster level.width = 12: must be a multiple of the 8 of the level within"
        );
        assert_eq!(said(&more("\"a\"", 16)), "cluster level.name = a: must differ from the other levels'");
        for key in ["nvlink_domain = 8", "nic_gbyte_per_s = 25", "network = \"EFA\""] {
            let text = more("\"b\"", 16).replace("gpus = 64", &format!("gpus = 64\n{key}"));
            let expected = "has no effect beside [[level]], which says all of the network: leave it out";
            assert_eq!(said(&text), format!("cluster {}: {expected}", key.replace('"', "")));
        }
        assert_eq!(
            said("gpu = \"h100\"\ngpus = 64\nnetwork = \"Ethernet\""),
            "cluster network = Ethernet: must be InfiniBand or EFA; say others by [[level]]"
        );
        assert_eq!(
            said("gpu = \"h100\"\ngpus = 8\nnetwork = \"EFA\""),
            "cluster network = EFA: has no effect where NVLink joins all GPUs: leave it out"
        );
        assert!(said("gpu = \"h100\"\nnodes = 3").contains("unknown field `nodes`"));
        assert!(said("host = \"local\"\nhosts = 3").contains("only `unisono plan CONFIG FILE` prices"));
    }
}
