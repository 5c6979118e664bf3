//! NCCL's model of collectives: over its algorithms and protocols, the least of latency plus bytes over bandwidth.
//!
//! Constants and formulas as in NCCL's tuning table (`src/graph/tuning.cc`, 2.2x), in microseconds.

use super::{Collective, NETWORK_EFFICIENCY};
use crate::hardware::Level;

/// How bytes are handed over: flags with every word, flags with every line, or separate synchronisation.
#[derive(Debug, Clone, Copy)]
struct Protocol {
    /// Share of the bandwidth that it reaches.
    bandwidth: f64,
    /// Before the first hop: tree, ring.
    base_us: [f64; 2],
    /// A hop on NVLink: tree, ring.
    inner_us: [f64; 2],
    /// A hop on the network: tree, ring.
    outer_us: [f64; 2],
}

/// LL, LL128, Simple.
const PROTOCOLS: [Protocol; 3] = [
    Protocol { bandwidth: 0.25, base_us: [6.8, 6.6], inner_us: [0.6, 0.6], outer_us: [5.0, 2.7] },
    Protocol { bandwidth: 0.92, base_us: [14.0, 14.0], inner_us: [1.25, 1.9], outer_us: [8.5, 4.0] },
    Protocol { bandwidth: 1.0, base_us: [8.4, 8.4], inner_us: [4.0, 3.4], outer_us: [14.0, 14.0] },
];

/// Share of a ring's bandwidth that trees reach.
const TREE_BANDWIDTH: f64 = 0.92;

/// Share of NVLink's rate that rings reach within a server: 370 of 450 GB/s on H100, 232 of 300 on A100, 682 of 900 on B200.
const INNER_EFFICIENCY: f64 = 0.8;

/// The network latency for which NCCL's constants hold; others scale with it.
const USUAL_LATENCY_S: f64 = 5e-6;

/// Share of a network card's rate in an all-to-all; DeepEP's dispatch reaches 47.5 of 50 GB/s with few peers, NCCL's
/// all-to-all opens a channel to each and is not published.
const ALL_TO_ALL_EFFICIENCY: f64 = 0.85;

/// Seconds over `ranks`, `inner` of them in each innermost group, across all of `levels`.
pub(super) fn seconds(
    levels: &[Level],
    collective: Collective,
    bytes: f64,
    ranks: usize,
    inner: usize,
) -> f64 {
    let path = Path::of(levels, ranks, inner);
    match collective {
        Collective::AllToAll => path.all_to_all_s(bytes),
        Collective::SendRecv => path.send_s(bytes),
        Collective::AllReduce => path.ring_s(collective, bytes).min(path.tree_s(bytes)),
        Collective::AllGather | Collective::ReduceScatter => path.ring_s(collective, bytes),
    }
}

/// What a collective runs over.
struct Path {
    ranks: f64,
    /// Innermost groups.
    nodes: f64,
    /// Bytes per second through the narrowest place of a ring or tree.
    ring_bytes_per_s: f64,
    /// Bytes per second of one rank into the widest level crossed.
    rank_bytes_per_s: f64,
    /// Relative to NCCL's constants.
    latency_scale: f64,
}

impl Path {
    fn of(levels: &[Level], ranks: usize, inner: usize) -> Self {
        let crossed = if ranks > inner && levels.len() > 1 { &levels[1..] } else { &levels[..1] };
        let inside = crossed.len() == levels.len();
        let rank = crossed.iter().map(Level::shared_bytes_per_s).fold(f64::INFINITY, f64::min);
        let latency: f64 = crossed.iter().map(|level| level.latency_s).sum();
        // Every rank of a server brings its network card to the ring.
        let outer = rank * inner.max(1) as f64 * NETWORK_EFFICIENCY;
        let within =
            if inner > 1 || inside { levels[0].bytes_per_s * INNER_EFFICIENCY } else { f64::INFINITY };
        Self {
            ranks: ranks as f64,
            nodes: if inside { 1.0 } else { ranks.div_ceil(inner.max(1)) as f64 },
            ring_bytes_per_s: if inside { within } else { outer.min(within) },
            rank_bytes_per_s: rank,
            latency_scale: if inside { 1.0 } else { latency / USUAL_LATENCY_S },
        }
    }

    /// A ring passes every part from rank to rank.
    fn ring_s(&self, collective: Collective, bytes: f64) -> f64 {
        let rounds = if collective == Collective::AllReduce { 2.0 } else { 1.0 };
        let outer = if self.nodes > 1.0 { rounds * (self.nodes - 1.0) } else { 0.0 };
        let inner = rounds * (self.ranks - 1.0) - outer;
        let wire = bytes * rounds * (self.ranks - 1.0) / self.ranks;
        self.least(|p| {
            let us = p.base_us[1] + inner * p.inner_us[1] + outer * p.outer_us[1] * self.latency_scale;
            us * 1e-6 + wire / (self.ring_bytes_per_s * p.bandwidth)
        })
    }

    /// Two trees over servers, chains within them; everything goes up and down.
    fn tree_s(&self, bytes: f64) -> f64 {
        let inner = 2.0 * (self.ranks / self.nodes - 1.0);
        let outer = 2.0 * self.nodes.log2().ceil();
        self.least(|p| {
            let us = p.base_us[0] + inner * p.inner_us[0] + outer * p.outer_us[0] * self.latency_scale;
            us * 1e-6 + 2.0 * bytes / (self.ring_bytes_per_s * TREE_BANDWIDTH * p.bandwidth)
        })
    }

    /// Each rank sends to all others at once; most of it leaves the server.
    fn all_to_all_s(&self, bytes: f64) -> f64 {
        let outside = (self.ranks - self.ranks / self.nodes) / self.ranks;
        let share = if self.nodes > 1.0 { outside } else { (self.ranks - 1.0) / self.ranks };
        self.hop_s(bytes * share, ALL_TO_ALL_EFFICIENCY)
    }

    fn send_s(&self, bytes: f64) -> f64 {
        self.hop_s(bytes, NETWORK_EFFICIENCY)
    }

    fn hop_s(&self, bytes: f64, efficiency: f64) -> f64 {
        self.least(|p| {
            let hop = if self.nodes > 1.0 { p.outer_us[1] * self.latency_scale } else { p.inner_us[1] };
            (p.base_us[1] + hop) * 1e-6 + bytes / (self.rank_bytes_per_s * efficiency * p.bandwidth)
        })
    }

    fn least(&self, seconds: impl Fn(&Protocol) -> f64) -> f64 {
        PROTOCOLS.iter().map(seconds).fold(f64::INFINITY, f64::min)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn levels(latency_s: f64) -> Vec<Level> {
        let level = |name: &str, width, bytes_per_s, latency_s| Level {
            name: name.into(),
            width,
            bytes_per_s,
            latency_s,
            oversubscription: 1.0,
        };
        vec![level("NVLink", 8, 450e9, 2e-6), level("network", 4096, 50e9, latency_s)]
    }

    #[test]
    fn small_all_reduces_over_many_servers_take_a_tree_and_large_ones_a_ring() {
        let path = Path::of(&levels(5e-6), 1024, 8);
        assert!(path.tree_s(1e4) < path.ring_s(Collective::AllReduce, 1e4));
        assert!(path.tree_s(1e12) > path.ring_s(Collective::AllReduce, 1e12));
        // 127 servers on a ring are 254 hops of at least 2.7 us, and 10 levels of a tree 20 of at least 5.
        assert!(path.ring_s(Collective::AllReduce, 8.0) > 254.0 * 2.7e-6);
        assert!(path.tree_s(8.0) < 200e-6);
    }

    #[test]
    fn a_slow_network_scales_latency_and_bandwidth() {
        let fast = seconds(&levels(5e-6), Collective::AllGather, 1e3, 64, 8);
        assert!(seconds(&levels(50e-6), Collective::AllGather, 1e3, 64, 8) > 1.5 * fast);
        let mut narrow = levels(5e-6);
        narrow[1].oversubscription = 4.0;
        let large = |levels: &[Level]| seconds(levels, Collective::AllToAll, 1e9, 64, 8);
        assert!(large(&narrow) > 3.9 * large(&levels(5e-6)));
    }
}
