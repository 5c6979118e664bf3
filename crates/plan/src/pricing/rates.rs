//! Seconds of kernels and exchanges on one cluster, calibrated.

use crate::architecture::MoeShape;
use crate::calibration::Calibration;
use crate::hardware::Cluster;
use crate::parallelism::Parallelism;
use crate::precision::Precision;

/// Kernels and links of a cluster.
#[derive(Debug, Clone)]
pub(super) struct Rates {
    pub cluster: Cluster,
    pub calibration: Calibration,
}

impl Rates {
    pub fn gemm(&self, m: f64, n: f64, k: f64, precision: Precision) -> f64 {
        let peak = self.cluster.gpu.peak_flops(precision);
        let efficiency = 0.8 * m / (m + 256.0) * n / (n + 256.0) * k / (k + 256.0);
        let bytes = precision.bytes() * (m * k + n * k) + 2.0 * m * n;
        let products =
            (2.0 * m * n * k / (peak * efficiency)).max(bytes / self.cluster.gpu.memory_bytes_per_s);
        products * self.calibration.product(precision)
    }

    pub fn grouped(&self, rows: f64, here: f64, n: f64, k: f64, precision: Precision) -> f64 {
        here * self.gemm(rows / here, n, k, precision) / self.calibration.product(precision)
            * self.calibration.grouped
    }

    pub fn attention(&self, operations: f64, sequence: f64, _dims: [f64; 2]) -> [f64; 2] {
        let rate = self.cluster.gpu.bf16_flops * 0.6 * sequence / (sequence + 2048.0);
        let forward = operations / rate * self.calibration.attention;
        [forward, 3.2 * forward]
    }

    pub fn scan(&self, operations: f64) -> f64 {
        operations / (0.2 * self.cluster.gpu.bf16_flops) * self.calibration.attention
    }

    pub fn stream(&self, bytes: f64) -> f64 {
        bytes / (0.85 * self.cluster.gpu.memory_bytes_per_s) * self.calibration.memory
    }

    pub fn gather(&self, bytes: f64, size: usize, stride: usize) -> f64 {
        if size <= 1 {
            return 0.0;
        }
        let level = self.cluster.level_of(size, stride);
        let inner = &self.cluster.levels[0];
        let n = size as f64;
        if level == 0 {
            return bytes * (n - 1.0) / n / (0.8 * inner.bytes_per_s) + (n - 1.0) * inner.latency_s;
        }
        let outer = &self.cluster.levels[level];
        let local = (inner.width / stride).clamp(1, size) as f64;
        let nodes = (n / local).max(1.0);
        let wide = bytes * (nodes - 1.0) / nodes / (local * 0.85 * outer.shared_bytes_per_s());
        let near = bytes * (n - 1.0) / n / (0.8 * inner.bytes_per_s);
        (wide.max(near) + (nodes - 1.0) * outer.latency_s) * self.calibration.network
    }

    pub fn message(&self, bytes: f64, stride: usize) -> f64 {
        let level = self.cluster.level_of(2, stride);
        let link = &self.cluster.levels[level];
        let factor = if level == 0 { 1.0 } else { self.calibration.network };
        (bytes / (0.85 * link.shared_bytes_per_s()) + link.latency_s) * factor
    }

    pub fn dispatch(&self, tokens: f64, bytes: f64, moe: &MoeShape, layout: &Parallelism) -> f64 {
        let (ranks, stride) = (layout.expert, layout.expert_tensor);
        let level = self.cluster.level_of(ranks, stride);
        let inner = &self.cluster.levels[0];
        let near = copies(moe.top_k as f64, ranks as f64, moe.experts as f64);
        let near_s = tokens * near * bytes / (0.7 * inner.bytes_per_s);
        if level == 0 {
            return near_s * self.calibration.dispatch;
        }
        let outer = &self.cluster.levels[level];
        let nodes = (ranks * stride) as f64 / inner.width as f64;
        let far = copies(moe.top_k as f64, nodes, moe.experts as f64)
            .min(moe.top_groups as f64 * if moe.groups > 1 { 1.0 } else { f64::INFINITY });
        let far_s = tokens * far * bytes / (0.85 * outer.shared_bytes_per_s());
        near_s.max(far_s) * self.calibration.dispatch
    }
}

/// Copies of a token that leave its rank, without duplicates: (R-1)(1 - C(E-E/R,k)/C(E,k)).
fn copies(k: f64, ranks: f64, experts: f64) -> f64 {
    let here = experts / ranks;
    let missed: f64 =
        (0..k as usize).map(|i| (experts - here - i as f64).max(0.0) / (experts - i as f64)).product();
    (ranks - 1.0) * (1.0 - missed)
}
