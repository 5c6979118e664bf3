//! Expert parallelism: the all-to-all that brings rows to their experts and its conjugate that brings results back.
//!
//! `dispatch` and `combine` are conjugate: the backward of the one is the other with gradients. A group of one rank
//! takes the same path.

use std::ops::Range;
use std::sync::Arc;

use unisono_comm::{CommError, Communicator, Part, Pending};
use unisono_mesh::{ExpertPlacement, Fold, Instance};
use unisono_tensor::{Backend, Routing};

use crate::batch::Batch;

/// The ledger's name for rows on their way to their experts (and gradients on the same way).
const DISPATCH: &str = "dispatch";
/// The ledger's name for results on their way back.
const COMBINE: &str = "combine";
/// The ledger's name for the counts that go before.
const COUNTS: &str = "dispatch_counts";

/// Where every row of one layer's routing goes, on both ends.
///
/// The sender orders rows by (peer, instance, slot, token), the receiver by (instance, peer, slot, token), which is
/// (group, expert, slot, token) since ranks hold consecutive slots.
#[derive(Debug, Clone)]
pub(crate) struct Route {
    /// `[rows * top_k]` token row behind each row sent.
    pub tokens: Vec<u32>,
    /// `[rows, top_k]` where each choice went, in rows sent.
    pub places: Vec<u32>,
    /// The runs of received rows, one an instance of this rank's wave.
    pub runs: Vec<Range<usize>>,
    sent: Vec<Range<usize>>,
    received: Vec<Vec<Range<usize>>>,
    received_rows: usize,
}

/// The ranks that exchange rows in a wave.
pub(crate) struct DispatchGroup<'a> {
    pub comm: &'a Communicator,
    pub fold: Fold,
    pub placement: ExpertPlacement,
    /// The slots of this rank's wave.
    pub slots: Range<usize>,
}

impl DispatchGroup<'_> {
    /// The slots that group member `peer` brings to the wave.
    fn slots_of(&self, peer: usize) -> Range<usize> {
        if self.comm.size() == 1 {
            self.slots.clone()
        } else {
            self.fold.slots_of(self.comm.world_rank(peer))
        }
    }

    fn group_of(&self, slot: usize) -> usize {
        slot / self.fold.grid().expert_group
    }

    /// Plans the exchange of one layer: gathers how many rows each slot has for each expert, then orders.
    ///
    /// # Errors
    /// If the exchange of counts fails.
    pub fn route(&self, routing: &Routing, batch: &Batch, top_k: usize) -> Result<Route, CommError> {
        let counts = self.exchange_counts(routing, batch)?;
        let (sent, places, tokens) = self.order_sends(routing, batch, top_k, &counts[self.comm.rank()]);
        let (runs, received, received_rows) = self.order_receives(&counts);
        Ok(Route { tokens, places, runs, sent, received, received_rows })
    }

    /// `[peer][slot of the peer, expert]`.
    fn exchange_counts(&self, routing: &Routing, batch: &Batch) -> Result<Vec<Vec<u32>>, CommError> {
        let experts = self.placement.num_experts();
        let mut own = vec![0u32; self.slots.len() * experts];
        for (index, slot) in own.chunks_exact_mut(experts).enumerate() {
            let sequences = index * batch.sequences * experts..(index + 1) * batch.sequences * experts;
            for sequence in routing.counts[sequences].chunks_exact(experts) {
                slot.iter_mut().zip(sequence).for_each(|(sum, count)| *sum += count);
            }
        }
        let ranges: Vec<Range<usize>> = (0..self.comm.size())
            .scan(0, |next, peer| {
                let start = *next;
                *next += self.slots_of(peer).len() * experts;
                Some(start..*next)
            })
            .collect();
        let total = ranges.last().map_or(0, |range| range.end);
        let sends = vec![vec![Part::whole(Arc::new(own))]; self.comm.size()];
        let lists = ranges.iter().map(|range| vec![range.clone()]).collect();
        let all = self.comm.start_exchange(COUNTS, sends, vec![0u32; total], lists)?.finish()?;
        Ok(ranges.into_iter().map(|range| all[range].to_vec()).collect())
    }

    fn order_sends(
        &self,
        routing: &Routing,
        batch: &Batch,
        top_k: usize,
        counts: &[u32],
    ) -> (Vec<Range<usize>>, Vec<u32>, Vec<u32>) {
        let experts = self.placement.num_experts();
        let mut cursor = vec![0u32; self.slots.len() * experts];
        let mut next = 0;
        let mut sent = Vec::with_capacity(self.comm.size());
        for peer in 0..self.comm.size() {
            let start = next;
            for Instance { group, expert } in self.placement.instances(self.slots_of(peer)) {
                for index in (0..self.slots.len()).filter(|i| self.group_of(self.slots.start + i) == group) {
                    cursor[index * experts + expert] = next;
                    next += counts[index * experts + expert];
                }
            }
            sent.push(start as usize..next as usize);
        }
        let mut places = vec![0u32; routing.experts.len()];
        let mut tokens = vec![0u32; routing.experts.len()];
        for (choice, expert) in routing.experts.iter().enumerate() {
            let row = choice / top_k;
            let place = &mut cursor[row / batch.slot_rows() * experts + *expert as usize];
            places[choice] = *place;
            tokens[*place as usize] = row as u32;
            *place += 1;
        }
        (sent, places, tokens)
    }

    fn order_receives(&self, counts: &[Vec<u32>]) -> (Vec<Range<usize>>, Vec<Vec<Range<usize>>>, usize) {
        let experts = self.placement.num_experts();
        let mut received = vec![Vec::new(); self.comm.size()];
        let mut next = 0;
        let mut runs = Vec::new();
        for Instance { group, expert } in self.placement.instances(self.slots.clone()) {
            let start = next;
            for (peer, ranges) in received.iter_mut().enumerate() {
                let slots = self.slots_of(peer);
                let of_group = (0..slots.len()).filter(|i| self.group_of(slots.start + i) == group);
                let rows: usize = of_group.map(|i| counts[peer][i * experts + expert] as usize).sum();
                ranges.push(next..next + rows);
                next += rows;
            }
            runs.push(start..next);
        }
        (runs, received, next)
    }
}

/// Rows under way; the receive buffer and how wide its rows are.
pub(crate) struct Moving<B: Backend>(Pending<B::Host>);

impl<B: Backend> Moving<B> {
    /// Waits for the rows.
    pub fn finish(self, backend: &B) -> Result<B::Buf, CommError> {
        Ok(backend.take_from_host(self.0.finish()?))
    }
}

impl Route {
    /// Rows sent.
    pub fn sent_rows(&self) -> usize {
        self.tokens.len()
    }

    /// Rows received.
    pub fn received_rows(&self) -> usize {
        self.received_rows
    }

    /// Starts to bring `[sent_rows, width]` to the experts: `[received_rows, width]`.
    pub fn start_dispatch<B: Backend>(
        &self,
        comm: &Communicator,
        backend: &B,
        rows: B::Buf,
        width: usize,
    ) -> Result<Moving<B>, CommError> {
        let rows = Arc::new(backend.hand_to_host(rows));
        let sends =
            self.sent.iter().map(|range| vec![Part::new(Arc::clone(&rows), scaled(range, width))]).collect();
        drop(rows);
        let recv = backend.alloc_host(self.received_rows * width);
        let ranges =
            self.received.iter().map(|list| list.iter().map(|r| scaled(r, width)).collect()).collect();
        comm.start_exchange(DISPATCH, sends, recv, ranges).map(Moving)
    }

    /// Starts to bring `[received_rows, width]` back to where the rows came from: `[sent_rows, width]`.
    pub fn start_combine<B: Backend>(
        &self,
        comm: &Communicator,
        backend: &B,
        rows: B::Buf,
        width: usize,
    ) -> Result<Moving<B>, CommError> {
        let rows = Arc::new(backend.hand_to_host(rows));
        let part = |range: &Range<usize>| Part::new(Arc::clone(&rows), scaled(range, width));
        let sends = self.received.iter().map(|list| list.iter().map(part).collect()).collect();
        drop(rows);
        let recv = backend.alloc_host(self.sent_rows() * width);
        let ranges = self.sent.iter().map(|range| vec![scaled(range, width)]).collect();
        comm.start_exchange(COMBINE, sends, recv, ranges).map(Moving)
    }

    /// Puts per-choice values `[rows, top_k]` into the order of rows sent.
    pub fn in_sent_order(&self, values: &[f32], sent: &mut [f32]) {
        self.places.iter().zip(values).for_each(|(place, value)| sent[*place as usize] = *value);
    }

    /// The inverse of [`Route::in_sent_order`].
    pub fn in_choice_order(&self, sent: &[f32], values: &mut [f32]) {
        self.places.iter().zip(values).for_each(|(place, value)| *value = sent[*place as usize]);
    }
}

fn scaled(rows: &Range<usize>, width: usize) -> Range<usize> {
    rows.start * width..rows.end * width
}
