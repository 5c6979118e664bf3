//! Dispatch of rows to experts and the way back: how many copies leave a rank when a row goes only once to each server and
//! rank, and how long that takes with kernels like DeepEP's.

use std::sync::LazyLock;

use super::Group;
use crate::hardware::{Cluster, Gpu};

/// To the experts or back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Way {
    /// Rows go to their experts.
    Dispatch,
    /// Results come back and are added up.
    Combine,
}

/// An exchange of one MoE layer over an expert-parallel group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Exchange {
    /// Rows of a rank.
    pub tokens: f64,
    /// Bytes of a row, scales included.
    pub row_bytes: f64,
    /// Experts that a row visits.
    pub top_k: usize,
    /// Experts in all.
    pub experts: usize,
    /// The ranks that hold them.
    pub group: Group,
    /// Servers that a row may visit at most, by group-limited routing.
    pub max_servers: Option<usize>,
    /// Multiprocessors that the kernels take from computing; DeepSeek-V3 gave them 20 of 132.
    pub multiprocessors: usize,
}

/// What leaves a rank in an exchange.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Traffic {
    /// Servers other than its own that a row visits, on average.
    pub servers: f64,
    /// Ranks that a row visits, its own included.
    pub ranks_touched: f64,
    /// Bytes over the network: one copy a server.
    pub network_bytes: f64,
    /// Bytes within servers: one copy a rank, passed on by the rank of the same place in the server.
    pub inner_bytes: f64,
}

/// Places of `places` equal ones that at least one of `chosen` experts lies on, when they are drawn uniformly from
/// `experts` without repetition: `R (1 - C(E - E/R, k) / C(E, k))`.
pub fn places_touched(experts: usize, chosen: usize, places: usize) -> f64 {
    let (all, places) = (experts as f64, places.max(1) as f64);
    let outside = all - all / places;
    let missed: f64 =
        (0..chosen.min(experts)).map(|i| ((outside - i as f64) / (all - i as f64)).max(0.0)).product();
    places * (1.0 - missed)
}

impl Exchange {
    /// Bytes of a rank's rows with a copy for each expert.
    pub fn copied(&self) -> f64 {
        self.tokens * self.top_k as f64 * self.row_bytes
    }

    /// What leaves a rank on this cluster.
    pub(super) fn traffic(&self, cluster: &Cluster) -> Traffic {
        let ranks = self.group.size;
        if ranks <= 1 {
            return Traffic::default();
        }
        let inner = self.group.within(cluster.levels[0].width);
        let servers = ranks.div_ceil(inner);
        let visited = self.max_servers.unwrap_or(servers).clamp(1, servers);
        // Group-limited routing draws all experts from `visited` servers.
        let experts = self.experts * visited / servers;
        let touched = places_touched(experts, self.top_k, visited);
        let ranks_touched = places_touched(experts, self.top_k, visited * inner);
        let away = touched * (servers - 1) as f64 / servers as f64;
        let moved = self.tokens * self.row_bytes;
        // Copies for the rank itself, and one a server for the rank that receives from the network, do not cross NVLink.
        let own = ranks_touched / ranks as f64;
        let passed_on = (ranks_touched - own) * (inner - 1) as f64 / inner as f64;
        let inner_bytes = moved * if servers == 1 { ranks_touched - own } else { passed_on };
        Traffic { servers: away, ranks_touched, network_bytes: moved * away, inner_bytes }
    }
}

/// Measured exchanges of one GPU; see `data/dispatch.txt`.
#[derive(Debug)]
pub(super) struct Tables {
    gpu: String,
    /// GPUs of the server on which `within` was measured.
    server: usize,
    within: Vec<Within>,
    domain: Vec<Domain>,
    across: Vec<Across>,
}

/// Coefficients of 1, tokens, tokens x row bytes, tokens x ranks, tokens x ranks x row bytes.
#[derive(Debug)]
struct Coefficients([f64; 5]);

/// Within a server.
#[derive(Debug)]
struct Within {
    way: Way,
    multiprocessors: usize,
    seconds: Coefficients,
}

/// Over an NVLink domain of many servers, by the number of ranks: coefficients as within a server.
#[derive(Debug)]
struct Domain {
    way: Way,
    ranks: usize,
    seconds: Coefficients,
}

/// Across servers: bytes over a network card and seconds, ascending.
#[derive(Debug)]
struct Across {
    way: Way,
    servers: usize,
    multiprocessors: usize,
    points: Vec<(f64, f64)>,
}

/// GPUs of a server where its GPU is not known.
const USUAL_SERVER: usize = 8;

/// The GPU whose NVLink domain of many servers was measured, and what a GPU sends into it.
const MEASURED_DOMAIN: &str = "GB200";
const MEASURED_DOMAIN_BYTES_PER_S: f64 = 900e9;

/// Network cards of the measured servers.
const MEASURED_NETWORK_BYTES_PER_S: f64 = 50e9;
/// The measured exchange across servers: rows of 7,168 elements, fp8 with scales out and bf16 back, to 8 of 256 experts.
const MEASURED_HIDDEN: f64 = 7168.0;
const MEASURED_EXPERTS: usize = 256;
const MEASURED_TOP_K: usize = 8;

static TABLES: LazyLock<Vec<Tables>> = LazyLock::new(|| parse(include_str!("../../data/dispatch.txt")));

/// The tables of a GPU, else of H100.
pub(super) fn tables(gpu: &str) -> &'static Tables {
    let named = |name: &str| TABLES.iter().find(|tables| tables.gpu == name);
    named(gpu).or_else(|| named("H100")).unwrap_or(&TABLES[0])
}

fn parse(text: &str) -> Vec<Tables> {
    let mut out: Vec<Tables> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let words: Vec<&str> = line.split(' ').collect();
        let [kind, gpu, way, rest @ ..] = &words[..] else { continue };
        let at = out.iter().position(|tables| tables.gpu == *gpu).unwrap_or_else(|| {
            let server = Gpu::named(gpu).map_or(USUAL_SERVER, |gpu| gpu.per_server);
            let (within, domain, across) = (Vec::new(), Vec::new(), Vec::new());
            out.push(Tables { gpu: gpu.to_string(), server, within, domain, across });
            out.len() - 1
        });
        let way = if *way == "dispatch" { Way::Dispatch } else { Way::Combine };
        match *kind {
            "within" => {
                out[at].within.extend(Coefficients::parse(rest).map(|(multiprocessors, seconds)| Within {
                    way,
                    multiprocessors,
                    seconds,
                }))
            }
            "domain" => out[at].domain.extend(Coefficients::parse(rest).map(|(ranks, seconds)| Domain {
                way,
                ranks,
                seconds,
            })),
            _ => out[at].across.extend(Across::parse(way, rest)),
        }
    }
    out
}

impl Coefficients {
    /// What they are for, multiprocessors or ranks, and they.
    fn parse(words: &[&str]) -> Option<(usize, Self)> {
        let numbers: Vec<f64> = words.iter().filter_map(|word| word.parse().ok()).collect();
        let [of, coefficients @ ..] = &numbers[..] else { return None };
        let us: [f64; 5] = coefficients.try_into().ok()?;
        Some((*of as usize, Self(us.map(|c| c * 1e-6))))
    }

    fn at(&self, tokens: f64, row_bytes: f64, ranks: f64, scale: f64) -> f64 {
        let [fixed, token, byte, rank, rank_byte] = self.0;
        fixed + tokens * (token + byte * row_bytes + ranks * (rank + rank_byte * row_bytes * scale))
    }
}

impl Across {
    fn parse(way: Way, words: &[&str]) -> Option<Self> {
        let [servers, multiprocessors, points @ ..] = words else { return None };
        let (servers, multiprocessors) = (servers.parse().ok()?, multiprocessors.parse().ok()?);
        let away =
            places_touched(MEASURED_EXPERTS, MEASURED_TOP_K, servers) * (servers - 1) as f64 / servers as f64;
        let width = if way == Way::Dispatch { 1.0 + 4.0 / 128.0 } else { 2.0 };
        let row = MEASURED_HIDDEN * width * away;
        let points = points.iter().filter_map(|point| {
            let (tokens, us) = point.split_once(':')?;
            Some((tokens.parse::<f64>().ok()? * row, us.parse::<f64>().ok()? * 1e-6))
        });
        Some(Self { way, servers, multiprocessors, points: points.collect() })
    }

    /// Linear in bytes between points and beyond them.
    fn at(&self, bytes: f64, scale: f64) -> f64 {
        let above = self.points.partition_point(|point| point.0 < bytes).clamp(1, self.points.len() - 1);
        let ((x0, y0), (x1, y1)) = (self.points[above - 1], self.points[above]);
        let fixed = self.points[0].1
            - self.points[0].0 * (self.points[1].1 - self.points[0].1)
                / (self.points[1].0 - self.points[0].0);
        let time = y0 + (y1 - y0) * (bytes - x0) / (x1 - x0);
        fixed + (time - fixed) * scale
    }
}

impl Tables {
    /// Seconds to bring `(tokens, row bytes, ranks a row goes to)` to `inner` ranks that NVLink joins beyond the server that
    /// [`Tables::within`] knows; `None` within that.
    fn domain_s(
        &self,
        way: Way,
        (tokens, row_bytes, ranks): (f64, f64, f64),
        inner: usize,
        bytes_per_s: f64,
    ) -> Option<f64> {
        if inner <= self.server {
            return None;
        }
        let lines = tables(MEASURED_DOMAIN).domain.iter().filter(|line| line.way == way);
        let line = lines.min_by_key(|line| line.ranks.abs_diff(inner))?;
        let scale = MEASURED_DOMAIN_BYTES_PER_S / bytes_per_s;
        Some(line.seconds.at(tokens, row_bytes, ranks, scale))
    }

    /// Seconds of an all-to-all of `bytes` that a rank sends to the others of `inner`: the rows of the measured exchange, as
    /// many as amount to that.
    pub(super) fn all_to_all_s(&self, bytes: f64, inner: usize, bytes_per_s: f64) -> Option<f64> {
        let ranks = places_touched(MEASURED_EXPERTS, MEASURED_TOP_K, inner);
        let row_bytes = 2.0 * MEASURED_HIDDEN;
        let tokens = bytes / (row_bytes * ranks * (1.0 - 1.0 / inner as f64));
        self.domain_s(Way::Dispatch, (tokens, row_bytes, ranks), inner, bytes_per_s)
    }

    /// Seconds on NVLink and, across servers, on the network; both work at the same time, so that the longer decides.
    /// `inner_scale` is the time of a byte on NVLink over that of the measured server, `inner` the ranks of the group that
    /// NVLink joins at `inner_bytes_per_s`.
    pub(super) fn seconds(
        &self,
        way: Way,
        exchange: &Exchange,
        traffic: &Traffic,
        inner_scale: f64,
        [inner_bytes_per_s, network_bytes_per_s]: [f64; 2],
        inner: usize,
    ) -> [f64; 2] {
        let units = exchange.multiprocessors;
        let nearest = |have: usize| have.abs_diff(units);
        let of_row = (exchange.tokens, exchange.row_bytes, traffic.ranks_touched);
        let inside = self.domain_s(way, of_row, inner, inner_bytes_per_s).unwrap_or_else(|| {
            let (tokens, row_bytes, ranks) = of_row;
            let lines = self.within.iter().filter(|line| line.way == way);
            let line = lines.min_by_key(|line| nearest(line.multiprocessors));
            line.map_or(0.0, |line| line.seconds.at(tokens, row_bytes, ranks, inner_scale))
        });
        if traffic.servers == 0.0 {
            return [inside, 0.0];
        }
        // Only H100 and H200 were measured across servers.
        let across = if self.across.is_empty() { &tables("H100").across } else { &self.across };
        let servers = if traffic.servers > 1.5 { 4 } else { 2 };
        let line = across
            .iter()
            .filter(|line| line.way == way && line.servers == servers)
            .min_by_key(|line| nearest(line.multiprocessors));
        let scale = MEASURED_NETWORK_BYTES_PER_S / network_bytes_per_s;
        [inside, line.map_or(0.0, |line| line.at(traffic.network_bytes, scale))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_follow_the_formula_and_the_node_limit() {
        assert_eq!(places_touched(256, 1, 8), 1.0);
        assert!((places_touched(256, 8, 8) - 5.2947).abs() < 1e-4);
        assert_eq!(places_touched(8, 8, 8), 8.0);
        let cluster = Cluster::parse("h800x2048").unwrap();
        let mut exchange = Exchange {
            tokens: 4096.0,
            row_bytes: 7168.0,
            top_k: 8,
            experts: 256,
            group: Group { size: 64, stride: 1 },
            max_servers: None,
            multiprocessors: 20,
        };
        let free = exchange.traffic(&cluster);
        exchange.max_servers = Some(4);
        let limited = exchange.traffic(&cluster);
        assert!((free.servers - places_touched(256, 8, 8) * 7.0 / 8.0).abs() < 1e-12);
        assert!(limited.servers <= 4.0 && limited.servers < 0.75 * free.servers);
        assert_eq!(limited.network_bytes, 4096.0 * 7168.0 * limited.servers);
    }
}
