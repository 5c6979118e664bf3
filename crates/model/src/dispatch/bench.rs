//! How fast rows reach their experts and come back, next to memory copies and another implementation of the same exchange.

use std::hint::black_box;
use std::time::{Duration, Instant};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use unisono_comm::bench::{Native, slowest_medians};
use unisono_comm::{CommError, Communicator};
use unisono_mesh::{ExpertPlacement, Fold, Grid};
use unisono_plan::dispatch::{DispatchGroup, DispatchShape};
use unisono_tensor::{Backend, Routing};

use super::{Combining, Dispatching, Rounds, Route, Wave, Wiring, wire};
use crate::batch::Batch;

/// An exchange without computation: one slot a rank, every token at `top_k` experts drawn at random.
#[derive(Debug, Clone, PartialEq)]
pub struct ExchangeBench {
    /// A slot a rank, all in one group.
    pub grid: Grid,
    /// Routed experts, the same number on every rank.
    pub experts: usize,
    /// Experts that a token visits.
    pub top_k: usize,
    /// Tokens of a rank.
    pub tokens: usize,
    /// Values of a row.
    pub width: usize,
    /// How rows travel.
    pub shape: DispatchShape,
    /// Times that it is measured; two more warm up.
    pub rounds: usize,
}

/// Times of an exchange there and back, each the median over rounds of the slowest rank, in seconds.
#[derive(Debug, Clone, PartialEq)]
pub struct ExchangeTimed {
    /// Bytes that the busiest rank sends to others, both ways together, if every choice's row travels as f32.
    pub bytes: usize,
    /// This crate: packing, the exchanges, what a node sums or forwards.
    pub ours_s: f64,
    /// The other implementation, as f32: packing, and an exchange of every choice's row each way.
    pub native_s: Option<f64>,
    /// Every rank at once copies in memory what it would send to others.
    pub copy_s: f64,
}

/// Times an exchange, in turn with the other implementation and with copies.
///
/// # Errors
/// If the run fails, or `grid`, `experts` and the ranks do not fit each other.
pub fn time_exchange<B: Backend>(
    comm: &Communicator,
    backend: &B,
    native: Option<&dyn Native>,
    bench: &ExchangeBench,
) -> Result<ExchangeTimed, CommError> {
    let work = Workload::new(comm, backend, bench)?;
    let mut copies = Copies::new(&work);
    let mut times: [Vec<f64>; 3] = Default::default();
    for round in 0..bench.rounds + 2 {
        // A copy before each, so that both find the caches alike.
        let copy = copies.copy(work.bytes());
        comm.barrier()?;
        let ours = work.ours()?;
        let mut theirs = Duration::ZERO;
        if let Some(native) = native {
            copies.copy(work.bytes());
            comm.barrier()?;
            theirs = copies.native(native, &work)?;
        }
        if round >= 2 {
            for (list, time) in times.iter_mut().zip([ours, theirs, copy]) {
                list.push(time.as_secs_f64());
            }
        }
    }
    let bytes = comm.all_gather_values(&[work.bytes() as u64])?.into_iter().flatten().max().unwrap_or(0);
    let [ours_s, native_s, copy_s] = slowest_medians(comm, &times)?;
    Ok(ExchangeTimed { bytes: bytes as usize, ours_s, native_s: native.map(|_| native_s), copy_s })
}

/// The routing of one rank, and its rows.
struct Workload<'a, B: Backend> {
    comm: &'a Communicator,
    backend: &'a B,
    bench: &'a ExchangeBench,
    route: Route,
    x: B::Buf,
    /// Values to and from each rank if every choice's row travels.
    sent: Vec<usize>,
    received: Vec<usize>,
}

impl<'a, B: Backend> Workload<'a, B> {
    fn new(comm: &'a Communicator, backend: &'a B, bench: &'a ExchangeBench) -> Result<Self, CommError> {
        let refuse = |error: unisono_mesh::MeshError| CommError::Transport(error.to_string());
        let fold = Fold::new(bench.grid, comm.size()).map_err(refuse)?;
        let placement = ExpertPlacement::new(fold, bench.experts);
        let slots = fold.slots_of(comm.rank());
        let batch =
            Batch { slots: slots.clone(), sequences: 1, sequence_length: bench.tokens, ..Batch::default() };
        let experts = slots.clone().flat_map(|slot| choices(bench, slot)).collect();
        let routing = Routing { experts, ..Routing::default() };
        let node_of = |rank: usize| if bench.shape.hierarchical { comm.node(rank) } else { 0 };
        let group = DispatchGroup::new(fold, placement, comm.rank(), slots, node_of);
        let wave = Wave { comm, group, shape: bench.shape };
        let route = Route::new(&wave, &routing, &batch, bench.top_k)?;
        let values = |ranges: &[std::ops::Range<usize>]| {
            ranges.iter().map(|range| range.len() * bench.width).sum::<usize>()
        };
        let [sent, received] = [&route.order.ranges.sent, &route.order.ranges.received]
            .map(|peers| peers.iter().map(|ranges| values(ranges)).collect::<Vec<_>>());
        let x = backend.alloc(batch.rows() * bench.width);
        Ok(Self { comm, backend, bench, route, x, sent, received })
    }

    fn wiring(&self) -> Wiring<'_, B> {
        let (d, wire) = (self.bench.width, wire(&self.bench.shape));
        Wiring { comm: self.comm, backend: self.backend, d, wire, overlap: true }
    }

    /// Bytes that this rank sends to others, both ways together.
    fn bytes(&self) -> usize {
        let others = |values: &[usize]| values.iter().sum::<usize>() - values[self.comm.rank()];
        (others(&self.sent) + others(&self.received)) * size_of::<f32>()
    }

    /// Brings all rows to their experts, and the same rows back as results.
    fn ours(&self) -> Result<Duration, CommError> {
        let begin = Instant::now();
        let back = if let Some(rounds) = &self.route.rounds {
            let rows = Rounds::new(self.wiring(), &self.route, &self.x);
            let mut returned = rows.returned(&self.route);
            for round in rounds {
                let results = rows.bring(round)?;
                returned = rows.take_back(round, results, returned)?;
            }
            rows.finish(returned)
        } else {
            let mut there = Dispatching::start(self.wiring(), &self.route, &self.x)?;
            let mut back = Combining::new(self.wiring(), &self.route);
            let mut received = None;
            for chunk in &self.route.chunks {
                there.arrive(chunk, &mut received)?;
                let results = match self.route.chunks.len() {
                    1 => received.take(),
                    _ => None,
                };
                let results = results.unwrap_or_else(|| self.backend.alloc(chunk.rows * self.bench.width));
                back.send_back(chunk, results)?;
            }
            back.finish()?
        };
        let took = begin.elapsed();
        black_box(back);
        Ok(took)
    }
}

/// Plain buffers of as many values.
struct Copies {
    /// A rank's rows, in place of those of its tokens.
    rows: Vec<f32>,
    send: Vec<f32>,
    receive: Vec<f32>,
    back: Vec<f32>,
}

impl Copies {
    fn new(work: &Workload<'_, impl Backend>) -> Self {
        let total = |values: &[usize]| vec![0.0; values.iter().sum()];
        let (sent, received) = (&work.sent, &work.received);
        let rows = vec![0.0; work.bench.tokens * work.bench.width];
        Self { rows, send: total(sent), receive: total(received), back: total(sent) }
    }

    fn copy(&mut self, bytes: usize) -> Duration {
        let mut left = bytes / size_of::<f32>();
        let begin = Instant::now();
        while left > 0 {
            let len = left.min(self.send.len());
            self.back[..len].copy_from_slice(black_box(&self.send[..len]));
            black_box(&mut self.back);
            left -= len;
        }
        begin.elapsed()
    }

    fn native(
        &mut self,
        native: &dyn Native,
        work: &Workload<'_, impl Backend>,
    ) -> Result<Duration, CommError> {
        let begin = Instant::now();
        let width = work.bench.width;
        for (packed, token) in self.send.chunks_exact_mut(width).zip(&work.route.order.tokens) {
            packed.copy_from_slice(&self.rows[*token as usize * width..][..width]);
        }
        native.exchange((&self.send, &work.sent), (&mut self.receive, &work.received))?;
        native.exchange((&self.receive, &work.received), (&mut self.back, &work.sent))?;
        Ok(begin.elapsed())
    }
}

/// The choices of a slot's tokens, ascending, the same for every fold.
fn choices(bench: &ExchangeBench, slot: usize) -> Vec<u32> {
    let mut random = ChaCha8Rng::seed_from_u64(slot as u64);
    let mut all: Vec<u32> = (0..bench.experts as u32).collect();
    let mut chosen = Vec::with_capacity(bench.tokens * bench.top_k);
    for _ in 0..bench.tokens {
        let start = chosen.len();
        for at in 0..bench.top_k {
            let other = at + (random.next_u64() % (all.len() - at) as u64) as usize;
            all.swap(at, other);
            chosen.push(all[at]);
        }
        chosen[start..].sort_unstable();
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use unisono_comm::{ThreadRanks, bench::Collective};
    use unisono_tensor::Cpu;

    fn bench(shape: DispatchShape) -> ExchangeBench {
        let grid = Grid { replicas: 4, expert_group: 4, expert_nodes: 2, ..Grid::default() };
        ExchangeBench { grid, experts: 8, top_k: 3, tokens: 50, width: 4, shape, rounds: 2 }
    }

    #[test]
    fn every_way_is_timed_and_counts_the_rows_that_travel() {
        let shapes = [
            DispatchShape::default(),
            DispatchShape { chunks: 3, half: true, ..DispatchShape::default() },
            DispatchShape { hierarchical: true, ..DispatchShape::default() },
            DispatchShape { most_rows: 64, row_block: 16, ..DispatchShape::default() },
        ];
        for shape in shapes {
            let bench = bench(shape);
            let timed = ThreadRanks::new(4)
                .nodes(&[2, 2])
                .run(|comm| {
                    assert_eq!(
                        Workload::new(&comm, &Cpu::new(1), &bench)?.route.rounds.is_some(),
                        shape.most_rows > 0
                    );
                    time_exchange(&comm, &Cpu::new(1), None, &bench)
                })
                .expect("the exchange succeeds");
            // What slot s sends to slot p's experts, from the choices themselves.
            let rows = |s: usize, p: usize| {
                choices(&bench, s).iter().filter(|expert| **expert as usize / 2 == p).count()
            };
            let of = |me: usize| {
                (0..4).filter(|p| *p != me).map(|p| rows(me, p) + rows(p, me)).sum::<usize>() * 16
            };
            let busiest = (0..4).map(of).max().unwrap();
            for timed in timed {
                assert_eq!((timed.bytes, timed.native_s), (busiest, None), "{shape:?}");
                assert!(timed.ours_s > 0.0 && timed.copy_s > 0.0);
            }
        }
    }

    /// Sends through the crate's own exchange.
    struct Through<'a>(&'a Communicator);

    impl Native for Through<'_> {
        fn name(&self) -> String {
            "through".into()
        }

        fn run(&self, _: Collective, _: &[f32], _: &mut [f32]) -> Result<(), CommError> {
            Err(CommError::Transport("not a collective".into()))
        }

        fn exchange(&self, from: (&[f32], &[usize]), to: (&mut [f32], &[usize])) -> Result<(), CommError> {
            // Both ends agree on what every pair moves.
            let all = self.0.all_gather_values(&from.1.iter().map(|n| *n as u64).collect::<Vec<_>>())?;
            let me = self.0.rank();
            assert!(all.iter().zip(to.1).all(|(peer, expected)| peer[me] == *expected as u64));
            assert_eq!((from.0.len(), to.0.len()), (from.1.iter().sum(), to.1.iter().sum()));
            Ok(())
        }
    }

    #[test]
    fn the_other_implementation_gets_the_same_counts() {
        let bench = bench(DispatchShape::default());
        let timed =
            ThreadRanks::new(4).run(|comm| time_exchange(&comm, &Cpu::new(1), Some(&Through(&comm)), &bench));
        assert!(timed.expect("the exchange succeeds").iter().all(|timed| timed.native_s > Some(0.0)));
    }
}
