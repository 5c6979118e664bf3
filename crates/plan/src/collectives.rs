//! Seconds and bytes of collectives over a cluster's topology. Within a server the times are measured ones
//! (`scripts/distil-collectives`); across servers NCCL's own model decides: the fastest of its algorithms and protocols.

mod exchange;
mod measured;
mod network;

use crate::calibration::Constants;
use crate::hardware::{Cluster, Gpu, Level};
use crate::kernels::sibling;
use measured::Curves;

pub use exchange::{Exchange, Way, places_touched};

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

    /// The levels that its members' messages cross, innermost first.
    fn crossed(self, levels: &[Level]) -> &[Level] {
        let last = levels.iter().position(|level| self.within(level.width) == self.size);
        &levels[..=last.unwrap_or(levels.len() - 1)]
    }

    /// Share of what a rank sends to all others beyond its innermost group that also leaves its group of `width`: each of them
    /// gets as much as any other.
    fn share_beyond(self, inner: usize, width: usize) -> f64 {
        (self.size - self.within(width)) as f64 / (self.size - inner).max(1) as f64
    }

    /// The level that is full first when a rank sends to all, and the bytes per second that it then sends beyond its innermost
    /// group.
    fn outward(self, levels: &[Level]) -> (usize, f64) {
        let inner = self.within(levels[0].width);
        let pairs = self.crossed(levels).windows(2).enumerate();
        let rate = |(at, pair): (usize, &[Level])| {
            (at + 1, pair[1].shared_bytes_per_s() / self.share_beyond(inner, pair[0].width))
        };
        pairs.map(rate).fold((0, f64::INFINITY), |least, next| if next.1 < least.1 { next } else { least })
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
        let level = &self.cluster.levels[..1];
        match self.measured_inner_s(collective, bytes, ranks) {
            Some(seconds) => {
                let hops = match collective {
                    Collective::AllReduce => 2 * (ranks - 1),
                    Collective::AllGather | Collective::ReduceScatter => ranks - 1,
                    Collective::AllToAll | Collective::SendRecv => 1,
                };
                seconds + hops as f64 * (network::extra_us(level)[0] * 1e-6).max(-measured::HOP_S)
            }
            None => network::seconds(level, collective, bytes, ranks, 1, level[0].shared_bytes_per_s()),
        }
    }

    /// On a server like the measured ones.
    fn measured_inner_s(&self, collective: Collective, bytes: f64, ranks: usize) -> Option<f64> {
        if self.is_mesh() {
            return self.mesh_s(collective, bytes, ranks);
        }
        if collective == Collective::AllToAll {
            let others = bytes * collective.wire_share(ranks);
            let rate = self.cluster.levels[0].bytes_per_s;
            if let Some(seconds) = self.exchanges.all_to_all_s(others, ranks, rate) {
                return Some(seconds);
            }
        }
        self.curves?.seconds(collective, bytes, ranks, self.inner_scale)
    }

    /// Whether GPUs of a server are joined pair by pair instead of by a switch.
    fn is_mesh(&self) -> bool {
        self.cluster.gpu.fabric == "xGMI"
    }

    /// Whether switches add up, as those of NVLink do from Hopper on.
    fn switch_adds_up(&self) -> bool {
        !self.is_mesh() && Constants::generation(&self.cluster.gpu) != Constants::AMPERE
    }

    /// On a mesh a pair has one link of so many, so that small groups use few, each as well as the measured server's GPUs use
    /// theirs together; and no switch adds up. Measured on MI300X: all-reduce at 47.7 GB/s over 2 GPUs and at 313 over 8
    /// (RCCL, stas00/ml-engineering).
    fn mesh_s(&self, collective: Collective, bytes: f64, ranks: usize) -> Option<f64> {
        let width = self.cluster.levels[0].width.max(2);
        let scale = self.inner_scale * (width - 1) as f64 / (ranks - 1).max(1) as f64;
        let one = |collective: Collective| {
            let as_many = bytes * collective.wire_share(ranks) / collective.wire_share(width);
            self.curves?.seconds(collective, as_many, width, scale)
        };
        match collective {
            Collective::AllReduce => Some(one(Collective::ReduceScatter)? + one(Collective::AllGather)?),
            other => one(other),
        }
    }

    /// Across servers.
    fn outer_s(&self, collective: Collective, bytes: f64, group: Group) -> f64 {
        let crossed = group.crossed(&self.cluster.levels);
        let inner = group.within(crossed[0].width);
        let (_, rate) = group.outward(crossed);
        let seconds = network::seconds(crossed, collective, bytes, group.size, inner, rate);
        match collective {
            // What stays within the server goes at the same time.
            Collective::AllToAll if inner > 1 => {
                seconds.max(self.inner_s(collective, bytes * inner as f64 / group.size as f64, inner))
            }
            Collective::AllReduce if inner > 1 && self.switch_adds_up() => {
                let inside = self.inner_s(collective, bytes, inner);
                seconds.min(network::switch_tree_s(crossed, bytes, group.size, inner, inside))
            }
            _ => seconds,
        }
    }

    /// The level of the network whose links a collective waits for: of a ring the narrowest place, of an all-to-all, which fills
    /// several at once, the one that takes longest.
    pub fn bottleneck(&self, collective: Collective, bytes: f64, group: Group) -> usize {
        let crossed = group.crossed(&self.cluster.levels);
        let inner = group.within(crossed[0].width);
        if inner == group.size {
            return 0;
        }
        match collective {
            Collective::AllToAll => {
                let inside = self.inner_s(collective, bytes * inner as f64 / group.size as f64, inner);
                let all = self.seconds(collective, bytes, group);
                if inner > 1 && inside >= all { 0 } else { group.outward(crossed).0 }
            }
            _ => network::narrowest(crossed, inner),
        }
    }

    /// Seconds to send rows to their experts, or to bring results back.
    pub fn exchange_s(&self, way: Way, exchange: &Exchange) -> f64 {
        self.exchange_by_link(way, exchange).map_or(0.0, |(_, seconds)| seconds)
    }

    /// The level of the network whose links an exchange waits for: network and NVLink work at the same time.
    pub fn exchange_bottleneck(&self, way: Way, exchange: &Exchange) -> usize {
        self.exchange_by_link(way, exchange).map_or(0, |(level, _)| level)
    }

    /// The level that an exchange waits for, and its seconds; `None` where nothing is sent.
    fn exchange_by_link(&self, way: Way, exchange: &Exchange) -> Option<(usize, f64)> {
        let traffic = exchange.traffic(&self.cluster);
        let group = exchange.group;
        if traffic.ranks_touched <= 0.0 || group.size <= 1 {
            return None;
        }
        let crossed = group.crossed(&self.cluster.levels);
        let inner = group.within(crossed[0].width);
        let (outer, outward) = group.outward(crossed);
        let rates = [crossed[0].bytes_per_s, outward];
        // A row crosses the network once and, where a server holds several ranks, NVLink once.
        let [inside_us, outside_us] = network::extra_us(crossed);
        let extra_us = outside_us + if inner > 1 { inside_us } else { 0.0 };
        let [inside, across] =
            self.exchanges.seconds(way, exchange, &traffic, self.inner_scale, rates, inner);
        let level = if across > inside { outer } else { 0 };
        Some((level, (inside.max(across) + 1e-6 * extra_us).max(0.0)))
    }

    /// Bytes that a rank sends in an exchange over each level of the network, innermost first.
    pub fn exchange_bytes(&self, exchange: &Exchange) -> Vec<f64> {
        let (levels, group) = (&self.cluster.levels, exchange.group);
        let mut out = vec![0.0; levels.len()];
        if group.size <= 1 {
            return out;
        }
        let traffic = exchange.traffic(&self.cluster);
        let inner = group.within(levels[0].width);
        out[0] = traffic.inner_bytes;
        for (pair, sent) in levels.windows(2).zip(&mut out[1..]) {
            let [from, to] = [0, 1].map(|at| group.share_beyond(inner, pair[at].width));
            *sent = traffic.network_bytes * (from - to);
        }
        out
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

    /// 256 H100 in servers of eight, rails of sixteen and a spine.
    fn rails(inner_us: f64, rail_us: f64, spine_us: f64, oversubscription: f64) -> CollectiveModel {
        let level = |name: &str, width: usize, rate: f64, us: f64, over: f64| {
            format!(
                "[[level]]\nname = \"{name}\"\nwidth = {width}\ngbyte_per_s = {rate}\nlatency_us = {us}\noversubscription = {over}\n"
            )
        };
        let text = format!(
            "gpu = \"h100\"\ngpus = 256\n{}{}{}",
            level("NVLink", 8, 450.0, inner_us, 1.0),
            level("rail", 16, 50.0, rail_us, 1.0),
            level("spine", 256, 50.0, spine_us, oversubscription)
        );
        CollectiveModel::of(&Cluster::from_toml(&text).unwrap())
    }

    /// DeepSeek-V3's over so many ranks.
    fn exchange(ranks: usize) -> Exchange {
        Exchange {
            tokens: 4096.0,
            row_bytes: 7168.0,
            top_k: 8,
            experts: 256,
            group: Group { size: ranks, stride: 1 },
            max_servers: Some(4),
            multiprocessors: 20,
        }
    }

    #[test]
    fn a_slow_spine_lengthens_what_leaves_its_rail_and_nothing_else() {
        let [full, narrow] = [1.0, 16.0].map(|over| rails(2.0, 2.5, 2.5, over));
        for way in [Way::Dispatch, Way::Combine] {
            let [here, beyond] =
                [16, 64].map(|ranks| [&full, &narrow].map(|model| model.exchange_s(way, &exchange(ranks))));
            assert_eq!(here[0], here[1]);
            // Of seven other servers one shares the rail.
            assert!((12.0..=16.0 * 6.0 / 7.0).contains(&(beyond[1] / beyond[0])), "{beyond:?}");
        }
        let all_to_all = |model: &CollectiveModel, size| {
            model.seconds(Collective::AllToAll, 1024.0 * MIB, Group { size, stride: 1 })
        };
        assert_eq!(all_to_all(&full, 16), all_to_all(&narrow, 16));
        let slower = all_to_all(&narrow, 64) / all_to_all(&full, 64);
        assert!((slower / (16.0 * 6.0 / 7.0) - 1.0).abs() < 0.01, "{slower}");
    }

    #[test]
    fn bytes_of_an_exchange_are_split_by_the_levels_they_cross() {
        let split = rails(2.0, 2.5, 2.5, 1.0).exchange_bytes(&exchange(64));
        let flat = CollectiveModel::of(&Cluster::parse("h100x256").unwrap()).exchange_bytes(&exchange(64));
        assert_eq!(split[0], flat[0]);
        // One copy for each server visited; of seven others one is in the rail.
        let sent = 4096.0 * 7168.0 * places_touched(128, 8, 4) * 7.0 / 8.0;
        for (found, wanted) in [(flat[1], sent), (split[1], sent / 7.0), (split[2], sent * 6.0 / 7.0)] {
            assert!((found / wanted - 1.0).abs() < 1e-12, "{split:?} {flat:?}");
        }
        assert_eq!(rails(2.0, 2.5, 2.5, 1.0).exchange_bytes(&exchange(16))[2], 0.0);
        assert_eq!(
            CollectiveModel::of(&Cluster::parse("h100x8").unwrap()).exchange_bytes(&exchange(8)).len(),
            1
        );
    }

    #[test]
    fn a_level_as_fast_as_the_one_within_changes_no_time() {
        let (three, two) =
            (rails(2.0, 2.5, 2.5, 1.0), CollectiveModel::of(&Cluster::parse("h100x256").unwrap()));
        let same = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-9, "{a} {b}");
        for (size, stride) in [(16, 1), (64, 1), (16, 16), (4, 2), (32, 8)] {
            let group = Group { size, stride };
            let within_rail = size * stride <= 16;
            for kind in [Collective::AllReduce, Collective::AllGather, Collective::AllToAll] {
                // The rail alone is as near as half of the two.
                let (a, b) = (three.seconds(kind, 64.0 * MIB, group), two.seconds(kind, 64.0 * MIB, group));
                if within_rail { assert!(a <= b) } else { same(a, b) }
            }
        }
        same(three.exchange_s(Way::Dispatch, &exchange(64)), two.exchange_s(Way::Dispatch, &exchange(64)));
    }

    #[test]
    fn the_latency_of_every_level_that_is_crossed_counts() {
        let usual = rails(2.0, 2.5, 2.5, 1.0);
        let times = |model: &CollectiveModel, size: usize| {
            let of = |kind| model.seconds(kind, 1.0 * MIB, Group { size, stride: 1 });
            [
                of(Collective::AllReduce),
                of(Collective::AllGather),
                of(Collective::AllToAll),
                model.exchange_s(Way::Combine, &exchange(size)),
            ]
        };
        let slower = |model: CollectiveModel, size| {
            let pairs = times(&model, size).into_iter().zip(times(&usual, size));
            pairs.map(|(slow, usual)| slow > usual + 15e-6).collect::<Vec<_>>()
        };
        for size in [8, 16, 64] {
            assert_eq!(slower(rails(22.0, 2.5, 2.5, 1.0), size)[1..], [true, size < 16, true], "{size}");
        }
        for size in [16, 64] {
            assert_eq!(slower(rails(2.0, 22.5, 2.5, 1.0), size), [true; 4], "{size}");
        }
        assert_eq!(slower(rails(2.0, 2.5, 22.5, 1.0), 64), [true; 4]);
        assert_eq!(slower(rails(2.0, 2.5, 22.5, 1.0), 16), [false; 4]);
        // However near, nothing takes less than no time.
        assert!(times(&rails(1e-3, 1e-3, 1e-3, 1.0), 64).into_iter().all(|seconds| seconds > 0.0));
    }

    #[test]
    fn two_servers_whose_switches_add_up_exceed_the_rings_rate() {
        // 463 GB/s over two servers of H200, 365 over four (nccl_multinode.csv); A100's switches do not add.
        assert!((bus_gb_per_s("h200x16", 16) / 463.0 - 1.0).abs() < 0.1);
        assert!(bus_gb_per_s("h200x32", 32) < 0.85 * bus_gb_per_s("h200x16", 16));
        assert!(bus_gb_per_s("a100x16", 16) <= 200.0);
    }
}
