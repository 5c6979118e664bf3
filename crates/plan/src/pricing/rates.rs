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

    /// What it waits for.
    pub fn gather_wait(&self, bytes: f64, size: usize, stride: usize) -> Wait {
        let group = Group { size, stride };
        Wait {
            level: self.collectives.bottleneck(Collective::AllGather, bytes, group),
            latency_s: self.collectives.seconds(Collective::AllGather, 1.0, group),
            factor: self.distance(size, stride),
        }
    }

    /// Bytes that a rank sends in it over each level.
    pub fn gathered_bytes(&self, bytes: f64, size: usize, stride: usize) -> Vec<f64> {
        self.collectives.bytes_by_level(Collective::AllGather, bytes, Group { size, stride })
    }

    /// The slowest message between neighbours of `ranks` ranks, `stride` apart.
    pub fn message(&self, bytes: f64, ranks: usize, stride: usize) -> f64 {
        let pair = self.farthest(ranks, stride);
        self.collectives.seconds(Collective::SendRecv, bytes, pair) * self.distance(pair.size, pair.stride)
    }

    /// What it waits for.
    pub fn message_wait(&self, bytes: f64, ranks: usize, stride: usize) -> Wait {
        let pair = self.farthest(ranks, stride);
        Wait {
            level: self.collectives.bottleneck(Collective::SendRecv, bytes, pair),
            latency_s: self.collectives.seconds(Collective::SendRecv, 1.0, pair),
            factor: self.distance(pair.size, pair.stride),
        }
    }

    /// Two neighbours of `ranks` ranks, `stride` apart: where some lie in different groups of a level, those set the pace.
    fn farthest(&self, ranks: usize, stride: usize) -> Group {
        let outermost = self.cluster.level_of(ranks, stride);
        let beyond = outermost.checked_sub(1).map_or(0, |inside| self.cluster.levels[inside].width);
        Group { size: 2, stride: stride.max(beyond) }
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
        let exchange = exchange(tokens, bytes, moe, layout);
        let seconds = match once {
            true => self.collectives.exchange_s(way, &exchange),
            false => self.collectives.seconds(Collective::AllToAll, exchange.copied(), exchange.group),
        };
        seconds * self.calibration.dispatch(once)
    }

    /// What it waits for.
    pub fn dispatch_wait(
        &self,
        way: Way,
        tokens: f64,
        bytes: f64,
        moe: &MoeShape,
        layout: &Parallelism,
        once: bool,
    ) -> Wait {
        let (all, none) = (exchange(tokens, bytes, moe, layout), exchange(0.0, bytes, moe, layout));
        let factor = self.calibration.dispatch(once);
        match once {
            true => Wait {
                level: self.collectives.exchange_bottleneck(way, &all),
                latency_s: self.collectives.exchange_s(way, &none),
                factor,
            },
            false => Wait {
                level: self.collectives.bottleneck(Collective::AllToAll, all.copied(), all.group),
                latency_s: self.collectives.seconds(Collective::AllToAll, 1.0, all.group),
                factor,
            },
        }
    }
}

/// What an exchange waits for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Wait {
    /// The level of the network whose links carry it longest.
    pub level: usize,
    /// Seconds before the first byte, as the smallest message takes.
    pub latency_s: f64,
    /// The calibrated factor on all of its seconds.
    pub factor: f64,
}

fn exchange(tokens: f64, row_bytes: f64, moe: &MoeShape, layout: &Parallelism) -> Exchange {
    Exchange {
        tokens,
        row_bytes,
        top_k: moe.top_k,
        experts: moe.experts,
        group: Group { size: layout.expert, stride: layout.expert_tensor },
        max_servers: (moe.groups > 1).then_some(moe.top_groups),
        multiprocessors: DISPATCH_MULTIPROCESSORS,
    }
}

/// Multiprocessors that dispatch and combine take from computing: DeepSeek-V3's 20 of 132.
const DISPATCH_MULTIPROCESSORS: usize = 20;
