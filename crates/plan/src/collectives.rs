//! Seconds and bytes of collectives over a cluster's topology. Within a server the times are measured ones
//! (`scripts/distil-collectives`); across servers NCCL's own model decides: the fastest of its algorithms and protocols.

mod exchange;
mod measured;
mod network;

use crate::hardware::{Cluster, Gpu};
use crate::kernels::sibling;
use measured::Curves;

pub use exchange::{Exchange, Traffic, Way, places_touched};

/// Collective operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Collective {
    /// Every rank ends with the sum.
    AllReduce,
    /// Every rank ends with all parts.
    AllGather,
    /// Every rank ends with its part of the sum.
    ReduceScatter,
    /// Every rank ends with what all others had for it.
    AllToAll,
    /// One rank sends to one other.
    SendRecv,
}

impl Collective {
    /// Bytes that a rank sends for each byte of the buffer, on a ring of `ranks`.
    pub fn wire_share(self, ranks: usize) -> f64 {
        let others = ranks.saturating_sub(1) as f64 / ranks.max(1) as f64;
        match self {
            Self::AllReduce => 2.0 * others,
            Self::AllGather | Self::ReduceScatter | Self::AllToAll => others,
            Self::SendRecv => 1.0,
        }
    }
}

/// Ranks that communicate: `size` of them, `stride` apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Group {
    /// How many.
    pub size: usize,
    /// Distance between neighbours in the numbering of all ranks.
    pub stride: usize,
}

impl Group {
    /// Members that share a group of `width` consecutive ranks.
    fn within(self, width: usize) -> usize {
        (width / self.stride.max(1)).clamp(1, self.size.max(1))
    }
}

/// Share of a network card's rate that NCCL's rings reach: 380 of 400 GB/s on DGX H100, 365 of 400 on p5en with EFA,
/// 382 of 400 on p6 (nccl_multinode.csv).
const NETWORK_EFFICIENCY: f64 = 0.95;

/// What collectives take on one cluster.
#[derive(Debug, Clone)]
pub struct CollectiveModel {
    cluster: Cluster,
    /// The tables of the GPU whose server stands for this one's.
    curves: Option<&'static Curves>,
    exchanges: &'static exchange::Tables,
    /// Time per byte within a server over that of the measured one.
    inner_scale: f64,
}

impl CollectiveModel {
    /// The model of a cluster. Cheap: tables are read once in a process.
    pub fn of(cluster: &Cluster) -> Self {
        let (from, _) = sibling(cluster.gpu.name);
        let curves = measured::curves(from);
        let rate = Gpu::named(from).map_or(cluster.levels[0].bytes_per_s, |gpu| gpu.nvlink_bytes_per_s);
        Self {
            cluster: cluster.clone(),
            curves,
            exchanges: exchange::tables(from),
            inner_scale: rate / cluster.levels[0].bytes_per_s,
        }
    }

    /// Seconds of a collective. `bytes` is the whole buffer of a rank as nccl-tests counts it: the result of an all-gather,
    /// the input of a reduce-scatter, all that a rank sends to all (itself included) in an all-to-all.
    pub fn seconds(&self, collective: Collective, bytes: f64, group: Group) -> f64 {
        if group.size <= 1 || bytes <= 0.0 {
            return 0.0;
        }
        let inner = group.within(self.cluster.levels[0].width);
        if inner == group.size {
            self.inner_s(collective, bytes, inner)
        } else {
            self.outer_s(collective, bytes, group)
        }
    }

    /// Bytes that a rank sends over each level of the network, innermost first.
    pub fn bytes_by_level(&self, collective: Collective, bytes: f64, group: Group) -> Vec<f64> {
        let mut out = vec![0.0; self.cluster.levels.len()];
        if group.size <= 1 {
            return out;
        }
        let all = bytes * collective.wire_share(group.size);
        let mut crossing = all;
        for (level, sent) in self.cluster.levels.iter().zip(&mut out) {
            let within = group.within(level.width);
            let beyond = match collective {
                // Each rank sends to every other.
                Collective::AllToAll => bytes * (group.size - within) as f64 / group.size as f64,
                // One neighbour of so many on a ring lies outside; a pair is inside or outside.
                _ if within == group.size => 0.0,
                _ => all / within as f64,
            };
            *sent = crossing - beyond;
            crossing = beyond;
        }
        out
    }

    /// Within the innermost level.
    fn inner_s(&self, collective: Collective, bytes: f64, ranks: usize) -> f64 {
        if self.is_mesh() {
            return self.mesh_s(collective, bytes, ranks);
        }
        let level = &self.cluster.levels[0];
        if collective == Collective::AllToAll {
            let others = bytes * collective.wire_share(ranks);
            if let Some(seconds) = self.exchanges.all_to_all_s(others, ranks, level.bytes_per_s) {
                return seconds;
            }
        }
        match self.curves.and_then(|curves| curves.seconds(collective, bytes, ranks, self.inner_scale)) {
            Some(seconds) => seconds,
            None => network::seconds(&self.cluster.levels[..1], collective, bytes, ranks, 1),
        }
    }

    /// Whether GPUs of a server are joined pair by pair instead of by a switch.
    fn is_mesh(&self) -> bool {
        self.cluster.gpu.fabric == "xGMI"
    }

    /// On a mesh a pair has one link of so many, so that small groups use few, each as well as the measured server's GPUs use
    /// theirs together; and no switch adds up. Measured on MI300X: all-reduce at 47.7 GB/s over 2 GPUs and at 313 over 8
    /// (RCCL, stas00/ml-engineering).
    fn mesh_s(&self, collective: Collective, bytes: f64, ranks: usize) -> f64 {
        let width = self.cluster.levels[0].width.max(2);
        let scale = self.inner_scale * (width - 1) as f64 / (ranks - 1).max(1) as f64;
        let one = |collective: Collective| {
            let as_many = bytes * collective.wire_share(ranks) / collective.wire_share(width);
            let curve = self.curves.and_then(|curves| curves.seconds(collective, as_many, width, scale));
            curve.unwrap_or_else(|| network::seconds(&self.cluster.levels[..1], collective, bytes, ranks, 1))
        };
        match collective {
            Collective::AllReduce => one(Collective::ReduceScatter) + one(Collective::AllGather),
            other => one(other),
        }
    }

    /// Across servers.
    fn outer_s(&self, collective: Collective, bytes: f64, group: Group) -> f64 {
        let levels = &self.cluster.levels;
        let last = levels.iter().position(|level| group.within(level.width) == group.size);
        let crossed = &levels[..=last.unwrap_or(levels.len() - 1)];
        let inner = group.within(levels[0].width);
        if collective == Collective::AllToAll && inner > 1 {
            // What stays within the server goes at the same time.
            let inside = self.inner_s(collective, bytes * inner as f64 / group.size as f64, inner);
            return network::seconds(crossed, collective, bytes, group.size, inner).max(inside);
        }
        network::seconds(crossed, collective, bytes, group.size, inner)
    }

    /// Seconds to send rows to their experts, or to bring results back.
    pub fn exchange_s(&self, way: Way, exchange: &Exchange) -> f64 {
        let traffic = exchange.traffic(&self.cluster);
        if traffic.ranks_touched <= 0.0 || exchange.group.size <= 1 {
            return 0.0;
        }
        let levels = &self.cluster.levels;
        let network = &levels[levels.len().min(2) - 1];
        let rates = [levels[0].bytes_per_s, network.shared_bytes_per_s()];
        let inner = exchange.group.within(levels[0].width);
        self.exchanges.seconds(way, exchange, &traffic, self.inner_scale, rates, inner)
    }

    /// Bytes that a rank sends in an exchange, by kind of link.
    pub fn exchange_bytes(&self, exchange: &Exchange) -> Traffic {
        exchange.traffic(&self.cluster)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: f64 = (1u64 << 20) as f64;

    fn seconds(cluster: &str, collective: Collective, mib: f64, size: usize, stride: usize) -> f64 {
        let cluster = Cluster::parse(cluster).unwrap();
        CollectiveModel::of(&cluster).seconds(collective, mib * MIB, Group { size, stride })
    }

    /// Bus bandwidth of a large all-reduce, GB/s.
    fn bus_gb_per_s(cluster: &str, size: usize) -> f64 {
        let bytes = 4096.0 * MIB;
        let seconds = seconds(cluster, Collective::AllReduce, 4096.0, size, 1);
        Collective::AllReduce.wire_share(size) * bytes / seconds / 1e9
    }

    #[test]
    fn large_all_reduces_reach_published_rates() {
        // Cluster, GPUs, GB/s (nccl_multinode.csv), tolerance.
        let cases = [
            ("h100x8", 8, 475.0, 0.1),
            ("h100x32", 32, 380.0, 0.1),
            ("h200x32", 32, 364.9, 0.1),
            ("b200x32", 32, 377.3, 0.1),
            ("a100x32", 32, 192.0, 0.1),
            ("gb200x72", 72, 680.0, 0.1),
            ("mi300xx8", 8, 312.9, 0.1),
            ("mi300xx8", 2, 47.7, 0.1),
        ];
        for (cluster, size, published, tolerance) in cases {
            let found = bus_gb_per_s(cluster, size);
            assert!(
                (found / published - 1.0).abs() <= tolerance,
                "{cluster} {size}: {found:.0} GB/s, {published}"
            );
        }
    }

    #[test]
    fn a_group_that_leaves_the_server_or_a_slower_link_takes_longer() {
        let inside = seconds("h800x64", Collective::AllGather, 64.0, 8, 1);
        assert!(seconds("h800x64", Collective::AllGather, 64.0, 8, 8) > 2.0 * inside);
        assert!(seconds("h100x64", Collective::AllGather, 64.0, 8, 1) < inside);
        assert_eq!(seconds("h800x64", Collective::AllGather, 64.0, 1, 1), 0.0);
        assert!(seconds("h800x64", Collective::SendRecv, 64.0, 2, 8) > 64.0 * MIB / 50e9);
    }

    #[test]
    fn bytes_of_a_ring_are_split_by_the_links_they_cross() {
        let model = CollectiveModel::of(&Cluster::parse("h800x64").unwrap());
        let bytes = |collective, size, stride| model.bytes_by_level(collective, 64.0, Group { size, stride });
        assert_eq!(bytes(Collective::AllGather, 8, 1), [56.0, 0.0]);
        assert_eq!(bytes(Collective::AllGather, 8, 8), [0.0, 56.0]);
        assert_eq!(bytes(Collective::AllReduce, 64, 1), [126.0 * 7.0 / 8.0, 126.0 / 8.0]);
        assert_eq!(bytes(Collective::AllToAll, 64, 1), [7.0, 56.0]);
        assert_eq!(bytes(Collective::SendRecv, 2, 8), [0.0, 64.0]);
    }
}
