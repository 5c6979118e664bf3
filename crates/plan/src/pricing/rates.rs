//! Seconds of kernels and exchanges on one cluster, calibrated.

use crate::architecture::MoeShape;
use crate::calibration::Calibration;
use crate::collectives::{Collective, CollectiveModel, Exchange, Group, Way};
use crate::hardware::Cluster;
use crate::kernels::{AttentionShape, KernelModel, Pass};
use crate::parallelism::Parallelism;
use crate::precision::Precision;

/// Kernels and links of a cluster.
#[derive(Debug, Clone)]
pub(super) struct Rates {
    pub cluster: Cluster,
    pub kernels: KernelModel,
    pub collectives: CollectiveModel,
    pub calibration: Calibration,
}

impl Rates {
    pub fn new(cluster: &Cluster, calibration: Calibration) -> Self {
        Self {
            cluster: cluster.clone(),
            kernels: KernelModel::of(&cluster.gpu),
            collectives: CollectiveModel::of(cluster),
            calibration,
        }
    }

    /// A product `[m, k] x [k, n]`.
    pub fn gemm(&self, m: f64, n: f64, k: f64, precision: Precision) -> f64 {
        let seconds = self.kernels.gemm(m as usize, n as usize, k as usize, precision);
        seconds * self.calibration.product(precision)
    }

    /// `rows` spread over the products of `here` experts.
    pub fn grouped(&self, rows: f64, here: f64, n: f64, k: f64, precision: Precision) -> f64 {
        let seconds = self.kernels.grouped_gemm(rows, here as usize, n as usize, k as usize, precision);
        seconds * self.calibration.grouped(precision)
    }

    /// Fused attention, forward and backward.
    pub fn attention(&self, shape: &AttentionShape, precision: Precision) -> [f64; 2] {
        let of = |pass| self.kernels.attention(pass, shape, precision) * self.calibration.attention();
        [of(Pass::Forward), of(Pass::Backward)]
    }

    /// A scan of states, which keeps tensor cores a fifth busy.
    pub fn scan(&self, operations: f64) -> f64 {
        operations / (0.2 * self.cluster.gpu.bf16_flops) * self.calibration.common.scan
    }

    /// A kernel that moves so many bytes.
    pub fn stream(&self, bytes: f64) -> f64 {
        self.kernels.memory_bound(bytes) * self.calibration.stream()
    }

    /// An all-gather or reduce-scatter of `bytes` in all over `size` ranks, `stride` apart.
    pub fn gather(&self, bytes: f64, size: usize, stride: usize) -> f64 {
        let group = Group { size, stride };
        self.collectives.seconds(Collective::AllGather, bytes, group) * self.distance(size, stride)
    }

    /// Bytes that a rank sends in it over each level.
    pub fn gathered_bytes(&self, bytes: f64, size: usize, stride: usize) -> Vec<f64> {
        self.collectives.bytes_by_level(Collective::AllGather, bytes, Group { size, stride })
    }

    /// The slowest message between neighbours of `ranks` ranks, `stride` apart.
    pub fn message(&self, bytes: f64, ranks: usize, stride: usize) -> f64 {
        // Where some neighbours lie in different groups of a level, those set the pace.
        let outermost = self.cluster.level_of(ranks, stride);
        let beyond = outermost.checked_sub(1).map_or(0, |inside| self.cluster.levels[inside].width);
        let stride = stride.max(beyond);
        let seconds = self.collectives.seconds(Collective::SendRecv, bytes, Group { size: 2, stride });
        seconds * self.distance(2, stride)
    }

    /// The factor on what crosses servers.
    fn distance(&self, size: usize, stride: usize) -> f64 {
        if self.cluster.level_of(size, stride) == 0 { 1.0 } else { self.calibration.common.network }
    }

    /// Rows of `tokens` tokens to their experts (or back), `bytes` each. `once` sends one copy to a server and rank.
    pub fn dispatch(
        &self,
        way: Way,
        tokens: f64,
        bytes: f64,
        moe: &MoeShape,
        layout: &Parallelism,
        once: bool,
    ) -> f64 {
        let group = Group { size: layout.expert, stride: layout.expert_tensor };
        let seconds = if once {
            self.collectives.exchange_s(
                way,
                &Exchange {
                    tokens,
                    row_bytes: bytes,
                    top_k: moe.top_k,
                    experts: moe.experts,
                    group,
                    max_servers: (moe.groups > 1).then_some(moe.top_groups),
                    multiprocessors: DISPATCH_MULTIPROCESSORS,
                },
            )
        } else {
            self.collectives.seconds(Collective::AllToAll, tokens * moe.top_k as f64 * bytes, group)
        };
        seconds * self.calibration.dispatch(once)
    }
}

/// Multiprocessors that dispatch and combine take from computing: DeepSeek-V3's 20 of 132.
const DISPATCH_MULTIPROCESSORS: usize = 20;
