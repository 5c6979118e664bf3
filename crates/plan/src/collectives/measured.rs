//! Measured times within a server.

use std::sync::LazyLock;

use super::Collective;

/// Times of every measured collective on the server of one GPU.
#[derive(Debug)]
pub(super) struct Curves {
    /// The GPU.
    pub(super) gpu: String,
    sizes: Vec<f64>,
    /// By collective and ranks, ascending: seconds at each size.
    lines: Vec<(Collective, usize, Vec<f64>)>,
}

static CURVES: LazyLock<Vec<Curves>> = LazyLock::new(|| parse(include_str!("../../data/nccl.txt")));

/// The curves of a GPU.
pub(super) fn curves(gpu: &str) -> Option<&'static Curves> {
    CURVES.iter().find(|curves| curves.gpu == gpu)
}

fn parse(text: &str) -> Vec<Curves> {
    let numbers =
        |words: std::str::Split<'_, char>| words.filter_map(|w| w.parse::<f64>().ok()).collect::<Vec<_>>();
    let mut sizes = Vec::new();
    let mut out: Vec<Curves> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let mut words = line.split(' ');
        let (Some(gpu), rest) = (words.next(), words.clone()) else { continue };
        if gpu == "sizes" {
            sizes = numbers(rest);
            continue;
        }
        let (Some(name), Some(ranks)) = (words.next(), words.next()) else { continue };
        let collective = match name {
            "all-reduce" => Collective::AllReduce,
            "all-gather" => Collective::AllGather,
            "reduce-scatter" => Collective::ReduceScatter,
            _ => Collective::AllToAll,
        };
        if out.last().is_none_or(|curves| curves.gpu != gpu) {
            out.push(Curves { gpu: gpu.to_string(), sizes: sizes.clone(), lines: Vec::new() });
        }
        let seconds = numbers(words).into_iter().map(|us| us * 1e-6).collect();
        if let (Some(curves), Ok(ranks)) = (out.last_mut(), ranks.parse()) {
            curves.lines.push((collective, ranks, seconds));
        }
    }
    out
}

/// Seconds that one more hop adds on NVLink when messages are small (NCCL's ring with protocol LL).
pub(super) const HOP_S: f64 = 0.6e-6;

impl Curves {
    /// Seconds over `ranks`; what exceeds the time of the smallest message is multiplied by `scale`. Between measured
    /// numbers of ranks the same bytes on the wire are compared; beyond the largest one, bandwidth stays and hops are added.
    pub(super) fn seconds(
        &self,
        collective: Collective,
        bytes: f64,
        ranks: usize,
        scale: f64,
    ) -> Option<f64> {
        if collective == Collective::SendRecv {
            // In an all-to-all of two, half of the buffer moves.
            return self.seconds(Collective::AllToAll, 2.0 * bytes, 2, scale);
        }
        let wire = bytes * collective.wire_share(ranks);
        let mut below: Option<(usize, f64)> = None;
        for (_, measured, seconds) in self.lines.iter().filter(|line| line.0 == collective) {
            let time = self.at(seconds, wire / collective.wire_share(*measured), scale);
            if *measured >= ranks {
                let (low, before) = below.unwrap_or((*measured, time));
                if low == *measured || ranks == *measured {
                    return Some(time);
                }
                let share = (ranks as f64 / low as f64).ln() / (*measured as f64 / low as f64).ln();
                return Some(before + share * (time - before));
            }
            below = Some((*measured, time));
        }
        below.map(|(largest, time)| time + (ranks - largest) as f64 * HOP_S)
    }

    /// Linear in bytes between two sizes, that is latency plus bytes over bandwidth; beyond the largest, its bandwidth.
    fn at(&self, seconds: &[f64], bytes: f64, scale: f64) -> f64 {
        let last = self.sizes.len() - 1;
        let above = self.sizes.partition_point(|size| *size < bytes);
        let time = match above {
            0 => seconds[0],
            _ if above > last => {
                seconds[last] + (bytes - self.sizes[last]) / self.sizes[last] * (seconds[last] - seconds[0])
            }
            _ => {
                let (x0, x1) = (self.sizes[above - 1], self.sizes[above]);
                seconds[above - 1] + (seconds[above] - seconds[above - 1]) * (bytes - x0) / (x1 - x0)
            }
        };
        seconds[0] + (time - seconds[0]) * scale
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_curve_is_whole_and_rises() {
        assert_eq!(CURVES.len(), 7);
        for curves in CURVES.iter() {
            assert_eq!(
                curves.lines.len(),
                if curves.gpu.starts_with("GB") { 8 } else { 12 },
                "{}",
                curves.gpu
            );
            for (collective, ranks, seconds) in &curves.lines {
                assert_eq!(seconds.len(), curves.sizes.len());
                assert!(seconds.is_sorted(), "{} {collective:?} {ranks}", curves.gpu);
            }
        }
    }

    #[test]
    fn a_node_of_the_table_is_itself_and_more_ranks_or_slower_links_take_longer() {
        let curves = curves("H100").unwrap();
        let (_, _, line) = curves.lines.iter().find(|l| l.0 == Collective::AllGather && l.1 == 8).unwrap();
        let at = |ranks, scale| curves.seconds(Collective::AllGather, 33_554_432.0, ranks, scale).unwrap();
        assert_eq!(at(8, 1.0), line[curves.sizes.iter().position(|s| *s == 33_554_432.0).unwrap()]);
        assert!(at(8, 1.0) > at(6, 1.0) && at(6, 1.0) > at(4, 1.0) && at(16, 1.0) > at(8, 1.0));
        assert!(at(8, 2.0) > 1.8 * at(8, 1.0));
    }
}
