//! GPUs known by name. Peaks are the makers' for dense products; prices are those of spring 2026.

use std::borrow::Cow;

use super::{ClusterError, distance};
use crate::precision::Precision;

/// A GPU with its usual server. All rates are for one GPU and one direction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gpu {
    /// What it is called; of one that a file describes, the GPU that it is like.
    pub name: &'static str,
    /// Whether a file describes it: what its kernels reach of its peaks is then borrowed.
    pub described: bool,
    /// Floating-point operations per second in bf16 or f16.
    pub bf16_flops: f64,
    /// In fp8; that of bf16 where there is no such unit.
    pub fp8_flops: f64,
    /// In fp4; that of fp8 where there is no such unit.
    pub fp4_flops: f64,
    /// Memory that a program can allocate, bytes.
    pub memory_bytes: f64,
    /// Memory bandwidth.
    pub memory_bytes_per_s: f64,
    /// What joins GPUs of a server: `NVLink` or `xGMI`.
    pub fabric: &'static str,
    /// Its bandwidth.
    pub nvlink_bytes_per_s: f64,
    /// GPUs that it joins.
    pub nvlink_domain: usize,
    /// GPUs of a server.
    pub per_server: usize,
    /// Network bandwidth.
    pub nic_bytes_per_s: f64,
    /// Power, watts.
    pub power_w: f64,
    /// Typical price.
    pub price_usd_per_hour: Option<f64>,
}

const GIB: f64 = (1u64 << 30) as f64;

/// Terse constructor: teraflops bf16, fp8, fp4; usable GiB; TB/s of memory.
const fn gpu(name: &'static str, tflops: [f64; 3], usable_gib: f64, memory_tb_per_s: f64) -> Gpu {
    Gpu {
        name,
        described: false,
        bf16_flops: tflops[0] * 1e12,
        fp8_flops: tflops[1] * 1e12,
        fp4_flops: tflops[2] * 1e12,
        memory_bytes: usable_gib * GIB,
        memory_bytes_per_s: memory_tb_per_s * 1e12,
        fabric: "NVLink",
        nvlink_bytes_per_s: 450e9,
        nvlink_domain: 8,
        per_server: 8,
        nic_bytes_per_s: 50e9,
        power_w: 700.0,
        price_usd_per_hour: None,
    }
}

/// Facts of `hardware.csv` of the published measurements: makers' data sheets, nvidia-smi for usable memory.
const GPUS: [Gpu; 12] = [
    Gpu {
        nvlink_bytes_per_s: 300e9,
        nic_bytes_per_s: 25e9,
        power_w: 400.0,
        price_usd_per_hour: Some(1.3),
        ..gpu("A100", [312.0; 3], 79.3, 2.039)
    },
    Gpu { price_usd_per_hour: Some(2.95), ..gpu("H100", [989.0, 1979.0, 1979.0], 79.6, 3.35) },
    Gpu {
        nvlink_bytes_per_s: 200e9,
        price_usd_per_hour: Some(2.0),
        ..gpu("H800", [989.0, 1979.0, 1979.0], 79.6, 3.35)
    },
    Gpu { power_w: 500.0, ..gpu("H20", [148.0, 296.0, 296.0], 95.0, 4.0) },
    Gpu { price_usd_per_hour: Some(4.0), ..gpu("H200", [989.0, 1979.0, 1979.0], 139.5, 4.8) },
    Gpu {
        nvlink_bytes_per_s: 900e9,
        power_w: 1000.0,
        price_usd_per_hour: Some(4.5),
        ..gpu("B200", [2250.0, 4500.0, 9000.0], 179.0, 7.7)
    },
    Gpu {
        nvlink_bytes_per_s: 900e9,
        nic_bytes_per_s: 100e9,
        power_w: 1100.0,
        price_usd_per_hour: Some(6.0),
        ..gpu("B300", [2250.0, 4500.0, 14_000.0], 268.6, 7.75)
    },
    Gpu {
        nvlink_bytes_per_s: 900e9,
        nvlink_domain: 72,
        per_server: 4,
        power_w: 1200.0,
        price_usd_per_hour: Some(4.54),
        ..gpu("GB200", [2500.0, 5000.0, 10_000.0], 185.0, 8.0)
    },
    Gpu {
        nvlink_bytes_per_s: 900e9,
        nvlink_domain: 72,
        per_server: 4,
        nic_bytes_per_s: 100e9,
        power_w: 1400.0,
        ..gpu("GB300", [2500.0, 5000.0, 15_000.0], 277.5, 8.0)
    },
    Gpu {
        fabric: "xGMI",
        nvlink_bytes_per_s: 448e9,
        power_w: 750.0,
        price_usd_per_hour: Some(1.99),
        ..gpu("MI300X", [1307.0, 2614.0, 2614.0], 191.0, 5.3)
    },
    Gpu {
        fabric: "xGMI",
        nvlink_bytes_per_s: 448e9,
        power_w: 1000.0,
        price_usd_per_hour: Some(1.95),
        ..gpu("MI325X", [1307.0, 2614.0, 2614.0], 255.0, 6.0)
    },
    Gpu {
        fabric: "xGMI",
        nvlink_bytes_per_s: 535.5e9,
        power_w: 1400.0,
        ..gpu("MI355X", [2500.0, 5000.0, 10_000.0], 287.0, 8.0)
    },
];

impl Gpu {
    /// Every GPU known by name.
    pub fn all() -> &'static [Self] {
        &GPUS
    }

    /// The GPU of this name; case does not matter and what follows a dash or a space is left out (`A100-80GB`).
    ///
    /// # Errors
    /// Names the most similar known GPU.
    pub fn named(name: &str) -> Result<Self, ClusterError> {
        let plain = |name: &str| name.trim().split(['-', ' ']).next().unwrap_or("").to_ascii_lowercase();
        let wanted = plain(name);
        let exact = GPUS.iter().find(|gpu| plain(gpu.name) == wanted);
        let nearest = GPUS.iter().min_by_key(|gpu| distance(&plain(gpu.name), &wanted));
        exact.copied().ok_or_else(|| ClusterError::UnknownGpu {
            name: name.to_string(),
            nearest: nearest.map_or("", |gpu| gpu.name).to_string(),
        })
    }

    /// What it is called where it is shown.
    pub fn label(&self) -> Cow<'static, str> {
        if self.described { format!("{}-like", self.name).into() } else { self.name.into() }
    }

    /// Peak operations per second of dense products; f32 at the rate of TF32, half of bf16.
    pub fn peak_flops(&self, precision: Precision) -> f64 {
        match precision {
            Precision::F32 => self.bf16_flops / 2.0,
            Precision::F16 | Precision::Bf16 => self.bf16_flops,
            Precision::Fp8 | Precision::Mxfp8 => self.fp8_flops,
            Precision::Nvfp4 => self.fp4_flops,
        }
    }
}
