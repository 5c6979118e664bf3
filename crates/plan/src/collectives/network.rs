//! NCCL's model of collectives: over its algorithms and protocols, the least of latency plus bytes over bandwidth.
//!
//! Constants and formulas as in NCCL's tuning table (`src/graph/tuning.cc`, 2.2x), in microseconds.

use super::{Collective, NETWORK_EFFICIENCY};
use crate::hardware::{Level, NETWORK_LATENCY_S, NVLINK_LATENCY_S};

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
    /// Share of their bandwidth that trees reach with a message of 64 bytes, 128 and so on.
    tree_ramp: [f64; 24],
}

/// LL, LL128, Simple.
const PROTOCOLS: [Protocol; 3] = [
    Protocol {
        bandwidth: 0.25,
        base_us: [6.8, 6.6],
        inner_us: [0.6, 0.6],
        outer_us: [5.0, 2.7],
        tree_ramp: [
            1.0, 1.0, 1.0, 1.0, 0.9, 0.8, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.4, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9,
            1.0, 1.0, 1.0, 1.0, 1.0,
        ],
    },
    Protocol {
        bandwidth: 0.92,
        base_us: [14.0, 14.0],
        inner_us: [1.25, 1.9],
        outer_us: [8.5, 4.0],
        tree_ramp: [
            1.0, 1.0, 1.0, 1.0, 1.0, 0.9, 0.8, 0.8, 0.8, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.8, 0.9, 0.9,
            0.9, 0.9, 1.0, 1.0, 1.0,
        ],
    },
    Protocol {
        bandwidth: 1.0,
        base_us: [8.4, 8.4],
        inner_us: [4.0, 3.4],
        outer_us: [14.0, 14.0],
        tree_ramp: [
            0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.8, 0.7, 0.6, 0.6, 0.5, 0.5, 0.5, 0.5, 0.6, 0.7, 0.8, 0.7,
            0.7, 0.8, 0.9, 0.9, 0.9,
        ],
    },
];

impl Protocol {
    /// Seconds that `bytes` take on a tree of `bytes_per_s`; between two sizes of the ramp its share lies between theirs.
    fn tree_s(&self, bytes: f64, bytes_per_s: f64) -> f64 {
        let doublings = (bytes / 64.0).log2().max(0.0);
        let at = |index: usize| self.tree_ramp.get(index).copied().unwrap_or(1.0);
        let (below, part) = (doublings as usize, doublings.fract());
        let share = at(below) + part * (at(below + 1) - at(below));
        bytes / (bytes_per_s * self.bandwidth * share)
    }
}

/// Share of a ring's bandwidth that trees reach.
const TREE_BANDWIDTH: f64 = 0.92;

/// A tree over servers whose switches add up: within a server, and a hop on the network.
const SWITCH_TREE_US: [f64; 2] = [25.0, 20.9];

/// Share of its network cards' rate that it reaches: 160 of 200 GB/s over 4 servers of H200 (NVLSTree forced, 310 GB/s of bus
/// bandwidth at 4 GiB), and of the rate within the server: 247 of 270 GB/s over 2 (463 GB/s; nccl_multinode.csv).
const SWITCH_TREE_NETWORK: f64 = 0.8;
const SWITCH_TREE_INNER: f64 = 0.914;

/// Share of NVLink's rate that rings reach within a server: 370 of 450 GB/s on H100, 232 of 300 on A100, 682 of 900 on B200.
const INNER_EFFICIENCY: f64 = 0.8;

/// Share of a network card's rate in an all-to-all; DeepEP's dispatch reaches 47.5 of 50 GB/s with few peers, NCCL's
/// all-to-all opens a channel to each and is not published.
const ALL_TO_ALL_EFFICIENCY: f64 = 0.85;

/// Seconds over `ranks`, `inner` of them in each innermost group, across all of `levels`. An all-to-all sends what leaves the server
/// at `outward_bytes_per_s`.
pub(super) fn seconds(
    levels: &[Level],
    collective: Collective,
    bytes: f64,
    ranks: usize,
    inner: usize,
    outward_bytes_per_s: f64,
) -> f64 {
    let path = Path::of(levels, ranks, inner);
    match collective {
        Collective::AllToAll => {
            path.hop_s(bytes * path.outside(), outward_bytes_per_s * ALL_TO_ALL_EFFICIENCY)
        }
        Collective::SendRecv => path.hop_s(bytes, path.rank_bytes_per_s * NETWORK_EFFICIENCY),
        Collective::AllReduce => path.ring_s(collective, bytes).min(path.tree_s(bytes)),
        Collective::AllGather | Collective::ReduceScatter => path.ring_s(collective, bytes),
    }
}

/// The narrowest place of a ring over all of `levels`, with `inner` ranks in each innermost group: as [`Path::of`] takes it.
pub(super) fn narrowest(levels: &[Level], inner: usize) -> usize {
    let rate = |at: &usize| levels[*at].shared_bytes_per_s();
    let Some(outer) = (1..levels.len()).min_by(|a, b| rate(a).total_cmp(&rate(b))) else { return 0 };
    let ring = rate(&outer) * inner.max(1) as f64 * NETWORK_EFFICIENCY;
    if inner > 1 && levels[0].bytes_per_s * INNER_EFFICIENCY < ring { 0 } else { outer }
}

/// Seconds of an all-reduce that each of several servers adds up in its switches, `inner_s` alone, and a tree between them.
pub(super) fn switch_tree_s(levels: &[Level], bytes: f64, ranks: usize, inner: usize, inner_s: f64) -> f64 {
    let path = Path::of(levels, ranks, inner);
    // Of two servers each is the root of one of the two trees; of more, half of them pass everything on.
    let passes = if path.nodes > 2.0 { 2.0 } else { 1.0 };
    let network = passes * bytes / (path.ranks / path.nodes * path.rank_bytes_per_s * SWITCH_TREE_NETWORK);
    let hops = 2.0 * path.nodes.log2().ceil();
    let us = SWITCH_TREE_US[0] + hops * (SWITCH_TREE_US[1] + path.extra_us[1]).max(0.0);
    us * 1e-6 + network.max(inner_s / SWITCH_TREE_INNER)
}

/// What hops take beyond what NCCL's constants hold for: within the innermost level and across all others, microseconds.
pub(super) fn extra_us(levels: &[Level]) -> [f64; 2] {
    let beyond = |levels: &[Level], usual: f64| {
        let latency_s: f64 = levels.iter().map(|level| level.latency_s).sum();
        if levels.is_empty() { 0.0 } else { (latency_s - usual) * 1e6 }
    };
    [beyond(&levels[..1], NVLINK_LATENCY_S), beyond(&levels[1..], NETWORK_LATENCY_S)]
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
    /// Microseconds that a hop takes beyond NCCL's constants: within the innermost level, across others.
    extra_us: [f64; 2],
}

impl Path {
    fn of(levels: &[Level], ranks: usize, inner: usize) -> Self {
        let crossed = if ranks > inner && levels.len() > 1 { &levels[1..] } else { &levels[..1] };
        let inside = crossed.len() == levels.len();
        let rank = crossed.iter().map(Level::shared_bytes_per_s).fold(f64::INFINITY, f64::min);
        // Every rank of a server brings its network card to the ring.
        let outer = rank * inner.max(1) as f64 * NETWORK_EFFICIENCY;
        let within =
            if inner > 1 || inside { levels[0].bytes_per_s * INNER_EFFICIENCY } else { f64::INFINITY };
        Self {
            ranks: ranks as f64,
            nodes: if inside { 1.0 } else { ranks.div_ceil(inner.max(1)) as f64 },
            ring_bytes_per_s: if inside { within } else { outer.min(within) },
            rank_bytes_per_s: rank,
            extra_us: extra_us(levels),
        }
    }

    /// A ring passes every part from rank to rank.
    fn ring_s(&self, collective: Collective, bytes: f64) -> f64 {
        let rounds = if collective == Collective::AllReduce { 2.0 } else { 1.0 };
        let outer = if self.nodes > 1.0 { rounds * (self.nodes - 1.0) } else { 0.0 };
        let inner = rounds * (self.ranks - 1.0) - outer;
        let wire = bytes * rounds * (self.ranks - 1.0) / self.ranks;
        self.least(|p| {
            let us = p.base_us[1] + inner * self.inner_us(p, 1) + outer * self.outer_us(p, 1);
            us * 1e-6 + wire / (self.ring_bytes_per_s * p.bandwidth)
        })
    }

    /// Two trees over servers, chains within them; everything goes up and down.
    fn tree_s(&self, bytes: f64) -> f64 {
        let inner = 2.0 * (self.ranks / self.nodes - 1.0);
        let outer = 2.0 * self.nodes.log2().ceil();
        self.least(|p| {
            let us = p.base_us[0] + inner * self.inner_us(p, 0) + outer * self.outer_us(p, 0);
            us * 1e-6 + 2.0 * p.tree_s(bytes, self.ring_bytes_per_s * TREE_BANDWIDTH)
        })
    }

    /// A hop within the innermost level of a tree (0) or ring (1).
    fn inner_us(&self, protocol: &Protocol, of: usize) -> f64 {
        (protocol.inner_us[of] + self.extra_us[0]).max(0.0)
    }

    /// A hop across servers of a tree (0) or ring (1).
    fn outer_us(&self, protocol: &Protocol, of: usize) -> f64 {
        (protocol.outer_us[of] + self.extra_us[1]).max(0.0)
    }

    /// Share of what each rank sends to all at once that crosses the widest level; most of it leaves the server.
    fn outside(&self) -> f64 {
        let outside = (self.ranks - self.ranks / self.nodes) / self.ranks;
        if self.nodes > 1.0 { outside } else { (self.ranks - 1.0) / self.ranks }
    }

    fn hop_s(&self, bytes: f64, bytes_per_s: f64) -> f64 {
        self.least(|p| {
            let hop = if self.nodes > 1.0 { self.outer_us(p, 1) } else { self.inner_us(p, 1) };
            (p.base_us[1] + hop) * 1e-6 + bytes / (bytes_per_s * p.bandwidth)
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
    fn a_slow_network_adds_latency_and_takes_bandwidth() {
        let all = |levels: &[Level], collective, bytes| {
            seconds(levels, collective, bytes, 64, 8, levels[1].shared_bytes_per_s())
        };
        let fast = all(&levels(5e-6), Collective::AllGather, 1e3);
        assert!(all(&levels(50e-6), Collective::AllGather, 1e3) > 1.5 * fast);
        let mut narrow = levels(5e-6);
        narrow[1].oversubscription = 4.0;
        let large = |levels: &[Level]| all(levels, Collective::AllToAll, 1e9);
        assert!(large(&narrow) > 3.9 * large(&levels(5e-6)));
    }

    #[test]
    fn trees_reach_less_with_some_sizes_than_with_others() {
        let [ll, _, simple] = &PROTOCOLS;
        // What NCCL's table says of 512 KiB, and between that and 1 MiB.
        assert_eq!(ll.tree_s(524_288.0, 1e9), 524_288.0 / (1e9 * 0.25 * 0.4));
        assert!((simple.tree_s(786_432.0, 1e9) * 1e9 / 786_432.0 - 2.0).abs() < 1e-9);
        assert_eq!(simple.tree_s(8.0, 1e9), 8.0 / 0.9e9);
        assert_eq!(simple.tree_s(1e12, 1e9), 1e3);
    }
}
