//! Rows under way.

use std::ops::Range;
use std::sync::Arc;

use unisono_comm::{CommError, Communicator, Part, Pending};
use unisono_plan::dispatch::{Round, kind};
use unisono_tensor::{Backend, Buffer, NO_ROW, Wire};

use super::chunk::{Chunk, Origin};
use super::{Route, parts, scaled};

/// One call under way whose rows fill a buffer of their own.
type Moving<B> = Pending<<B as Backend>::Host>;

/// What an exchange needs besides its route.
pub(crate) struct Wiring<'a, B: Backend> {
    pub comm: &'a Communicator,
    pub backend: &'a B,
    /// Values of a row.
    pub d: usize,
    pub wire: Wire,
    /// Whether exchanges are under way while others compute.
    pub overlap: bool,
}

impl<B: Backend> Wiring<'_, B> {
    fn width(&self) -> usize {
        self.wire.width(self.d)
    }

    /// Rows as they travel.
    fn pack(&self, rows: B::Buf) -> B::Buf {
        match self.wire {
            Wire::F32 => rows,
            Wire::Bf16 => {
                let mut packed = self.backend.alloc(rows.len() / self.d * self.width());
                self.backend.pack_bf16(rows.all(), self.d, packed.all_mut());
                packed
            }
        }
    }

    /// Rows as they are computed on.
    fn unpack(&self, rows: B::Buf) -> B::Buf {
        match self.wire {
            Wire::F32 => rows,
            Wire::Bf16 => {
                let mut values = self.backend.alloc(rows.len() / self.width() * self.d);
                self.backend.unpack_bf16(rows.all(), self.d, values.all_mut());
                values
            }
        }
    }

    /// The rows `index` of `rows`, for sending; nothing where all of them are [`NO_ROW`].
    fn gather(&self, rows: &Travelling<'_, B>, index: &[u32]) -> Arc<B::Host> {
        let width = self.width();
        let none = index.iter().all(|row| *row == NO_ROW);
        let mut sent = self.backend.alloc(if none { 0 } else { index.len() * width });
        if !none {
            self.backend.gather_rows(rows.get().all(), width, index, sent.all_mut());
        }
        Arc::new(self.backend.hand_to_host(sent))
    }

    /// A tensor's rows as they travel.
    fn travelling<'x>(&self, rows: &'x B::Buf) -> Travelling<'x, B> {
        match self.wire {
            Wire::F32 => Travelling::Own(rows),
            Wire::Bf16 => {
                let mut packed = self.backend.alloc(rows.len() / self.d * self.width());
                self.backend.pack_bf16(rows.all(), self.d, packed.all_mut());
                Travelling::Packed(packed)
            }
        }
    }

    /// Starts to move `width` elements a row: `sent` rows of `rows` by peer, into `received` rows of a buffer, which has
    /// `placed` rows already that this rank would have sent to itself.
    fn start(
        &self,
        kind: &'static str,
        placed: usize,
        rows: &Arc<B::Host>,
        sent: &[Vec<Range<usize>>],
        recv: B::Host,
        received: &[Vec<Range<usize>>],
        width: usize,
    ) -> Result<Moving<B>, CommError> {
        let sends = sent.iter().map(|list| parts(rows, list, width)).collect();
        let received = received.iter().map(|list| scaled(list, width)).collect();
        self.comm.start_exchange_around(kind, placed * width, sends, recv, received)
    }
}

/// A tensor's rows as they travel.
enum Travelling<'a, B: Backend> {
    Own(&'a B::Buf),
    Packed(B::Buf),
}

impl<B: Backend> Travelling<'_, B> {
    fn get(&self) -> &B::Buf {
        match self {
            Self::Own(rows) => rows,
            Self::Packed(rows) => rows,
        }
    }
}

/// Rows of one tensor on their way to the experts, chunk by chunk. A chunk leaves when the one before it has arrived: if all
/// left at once they would share the link, and the first would arrive with the last.
pub(crate) struct Dispatching<'a, B: Backend> {
    wiring: Wiring<'a, B>,
    route: &'a Route,
    /// The tensor's rows; none once all have left.
    source: Option<Travelling<'a, B>>,
    /// Rows to send; none once all are sent.
    rows: Arc<B::Host>,
    under_way: Option<Moving<B>>,
    /// Chunks that have not left.
    waiting: std::slice::Iter<'a, Chunk>,
}

impl<'a, B: Backend> Dispatching<'a, B> {
    /// Starts to bring rows of `x` `[rows, d]` to the experts.
    ///
    /// # Errors
    /// If the run has failed.
    pub fn start(wiring: Wiring<'a, B>, route: &'a Route, x: &'a B::Buf) -> Result<Self, CommError> {
        let source = wiring.travelling(x);
        let rows = wiring.gather(&source, &route.tokens);
        // Where rows cross, they are all sent from `rows`.
        let source = (!route.crosses).then_some(source);
        let overlap = wiring.overlap;
        let mut dispatching =
            Self { wiring, route, source, rows, under_way: None, waiting: route.chunks.iter() };
        if overlap {
            dispatching.start_next()?;
        }
        Ok(dispatching)
    }

    fn start_next(&mut self) -> Result<(), CommError> {
        let next = self.waiting.next().map(|chunk| self.leave(chunk)).transpose()?;
        self.under_way = next;
        Ok(())
    }

    /// Starts a chunk; the tensor's rows are let go with the last.
    fn leave(&mut self, chunk: &Chunk) -> Result<Moving<B>, CommError> {
        let moving = self.start_chunk(chunk)?;
        if self.route.chunks.last().is_some_and(|last| std::ptr::eq(last, chunk)) {
            self.source = None;
        }
        Ok(moving)
    }

    fn start_chunk(&self, chunk: &Chunk) -> Result<Moving<B>, CommError> {
        if self.route.crosses {
            return self.start_across(chunk);
        }
        let width = self.wiring.width();
        let mut recv = self.wiring.backend.alloc(chunk.rows * width);
        if let Some(source) = &self.source {
            self.wiring.backend.gather_rows(source.get().all(), width, &chunk.own_received, recv.all_mut());
        }
        self.start_inside(chunk, None, self.wiring.backend.hand_to_host(recv))
    }

    fn start_across(&self, chunk: &Chunk) -> Result<Moving<B>, CommError> {
        let width = self.wiring.width();
        let recv = self.wiring.backend.alloc_host(chunk.arrived_rows * width);
        self.wiring.start(kind::DISPATCH, 0, &self.rows, &chunk.across, recv, &chunk.arrived, width)
    }

    fn start_inside(
        &self,
        chunk: &Chunk,
        forwarded: Option<&Arc<B::Host>>,
        recv: B::Host,
    ) -> Result<Moving<B>, CommError> {
        let width = self.wiring.width();
        let part = |(origin, range): &(Origin, Range<usize>)| {
            let range = range.start * width..range.end * width;
            match (origin, forwarded) {
                (Origin::Forwarded, Some(rows)) => Part::new(Arc::clone(rows), range),
                _ => Part::new(Arc::clone(&self.rows), range),
            }
        };
        let filled = |list: &Vec<(Origin, Range<usize>)>| {
            list.iter().filter(|(_, range)| !range.is_empty()).map(part).collect()
        };
        let sends = chunk.inside.iter().map(filled).collect();
        let ranges = chunk.received.iter().map(|list| scaled(list, width)).collect();
        let kind = if forwarded.is_some() { kind::DISPATCH_INSIDE } else { kind::DISPATCH };
        self.wiring.comm.start_exchange_around(kind, chunk.placed * width, sends, recv, ranges)
    }

    /// Waits for the next chunk's rows and puts them where they stand among the layer's, `into` `[received rows, d]`.
    ///
    /// # Errors
    /// If the exchange fails.
    pub fn arrive(&mut self, chunk: &Chunk, into: &mut Option<B::Buf>) -> Result<(), CommError> {
        let moving = match self.under_way.take() {
            Some(moving) => moving,
            None => self.leave(chunk)?,
        };
        let (backend, d, width) = (self.wiring.backend, self.wiring.d, self.wiring.width());
        let mut received = moving.finish()?;
        if self.wiring.overlap {
            self.start_next()?;
        }
        if self.route.crosses {
            let arrived = backend.take_from_host(received);
            let mut forwarded = backend.alloc(chunk.forward.len() * width);
            backend.gather_rows(arrived.all(), width, &chunk.forward, forwarded.all_mut());
            let forwarded = Arc::new(backend.hand_to_host(forwarded));
            let recv = backend.alloc_host(chunk.rows * width);
            received = self.start_inside(chunk, Some(&forwarded), recv)?.finish()?;
        }
        let received = backend.take_from_host(received);
        if self.wiring.overlap && self.under_way.is_none() {
            self.rows = Arc::new(backend.alloc_host(0));
        }
        if self.route.chunks.len() == 1 {
            *into = Some(self.wiring.unpack(received));
            return Ok(());
        }
        let all = into.get_or_insert_with(|| backend.alloc(self.route.received_rows() * d));
        for (_, rows, first) in &chunk.runs {
            let from = received.slice(first * width..(first + rows.len()) * width);
            let to = all.slice_mut(rows.start * d..rows.end * d);
            match self.wiring.wire {
                Wire::F32 => backend.copy(from, to),
                Wire::Bf16 => backend.unpack_bf16(from, d, to),
            }
        }
        Ok(())
    }
}

/// Results on their way back, chunk by chunk.
pub(crate) struct Combining<'a, B: Backend> {
    wiring: Wiring<'a, B>,
    route: &'a Route,
    /// Returned rows, as they travel; None while a call fills them, and before the first.
    returned: Option<B::Host>,
    /// The call that fills the buffer of returned rows.
    under_way: Option<Moving<B>>,
}

impl<'a, B: Backend> Combining<'a, B> {
    /// Nothing has come back yet.
    pub fn new(wiring: Wiring<'a, B>, route: &'a Route) -> Self {
        Self { wiring, route, returned: None, under_way: None }
    }

    /// Waits for what is under way: the buffer of returned rows to go on filling.
    fn settle(&mut self) -> Result<B::Host, CommError> {
        match (self.under_way.take(), self.returned.take()) {
            (Some(moving), _) => moving.finish(),
            (None, Some(returned)) => Ok(returned),
            (None, None) => {
                Ok(self.wiring.backend.alloc_host(self.route.returned_rows * self.wiring.width()))
            }
        }
    }

    fn go_on(&mut self, moving: Moving<B>) -> Result<(), CommError> {
        self.under_way = Some(moving);
        if !self.wiring.overlap {
            self.returned = Some(self.settle()?);
        }
        Ok(())
    }

    /// Starts to bring a chunk's results `[rows of the chunk, d]` back.
    ///
    /// # Errors
    /// If an exchange fails.
    pub fn send_back(&mut self, chunk: &Chunk, results: B::Buf) -> Result<(), CommError> {
        let width = self.wiring.width();
        let results = self.wiring.pack(results);
        if !self.route.crosses {
            return self.send_straight(chunk, results);
        }
        let results = Arc::new(self.wiring.backend.hand_to_host(results));
        let gathered = self.wiring.backend.alloc_host(chunk.gathered_rows() * width);
        let landing = chunk.landing(0, chunk.own.len());
        let moving = self.wiring.start(
            kind::COMBINE_INSIDE,
            0,
            &results,
            &chunk.received,
            gathered,
            &landing,
            width,
        )?;
        let gathered = self.wiring.backend.take_from_host(moving.finish()?);
        self.send_across(chunk, gathered)
    }

    /// Sends results to where they came from, but for those of own rows, which are placed.
    fn send_straight(&mut self, chunk: &Chunk, results: B::Buf) -> Result<(), CommError> {
        let (backend, width) = (self.wiring.backend, self.wiring.width());
        let landing = chunk.landing(chunk.first_returned, 0);
        let (results, returned) = if self.route.alone() {
            (backend.alloc(0), results)
        } else {
            let mut returned = backend.take_from_host(self.settle()?);
            let rows = chunk.first_returned..chunk.first_returned + chunk.own.len();
            let own = returned.slice_mut(rows.start * width..rows.end * width);
            backend.gather_rows(results.all(), width, &chunk.own_returned, own);
            (results, returned)
        };
        let (results, returned) = (Arc::new(backend.hand_to_host(results)), backend.hand_to_host(returned));
        let received = &chunk.received;
        let moving =
            self.wiring.start(kind::COMBINE, chunk.placed, &results, received, returned, &landing, width)?;
        self.go_on(moving)
    }

    /// Sums by expert node what goes back across, and sends it; own results pass through to their place.
    fn send_across(&mut self, chunk: &Chunk, gathered: B::Buf) -> Result<(), CommError> {
        let (backend, d, width, k) =
            (self.wiring.backend, self.wiring.d, self.wiring.width(), self.route.top_k);
        let mut sums = backend.alloc(chunk.sums.len() / k * d);
        let one_node = vec![0; chunk.sums.len()];
        let mut sum = |values: &B::Buf| {
            let (values, sums) = (values.all(), sums.all_mut());
            backend.combine_rows(values, d, &one_node, &chunk.sums, k, 1, Wire::F32, None, None, sums);
        };
        match self.wiring.wire {
            Wire::F32 => sum(&gathered),
            Wire::Bf16 => {
                let mut values = backend.alloc(gathered.len() / width * d);
                backend.unpack_bf16(gathered.all(), d, values.all_mut());
                sum(&values);
            }
        }
        let gathered = Arc::new(backend.hand_to_host(gathered));
        let sums = Arc::new(backend.hand_to_host(self.wiring.pack(sums)));
        let mut sends: Vec<_> = chunk.sums_sent.iter().map(|list| parts(&sums, list, width)).collect();
        let own = 0..chunk.own.len();
        sends[self.wiring.comm.rank()] = parts(&gathered, std::slice::from_ref(&own), width);
        let ranges = chunk.returned.iter().map(|list| scaled(list, width)).collect();
        let returned = self.settle()?;
        let moving = self.wiring.comm.start_exchange(kind::COMBINE, sends, returned, ranges)?;
        self.go_on(moving)
    }

    /// Waits for all results: `[returned rows, d]`.
    ///
    /// # Errors
    /// If the exchange fails.
    pub fn finish(mut self) -> Result<B::Buf, CommError> {
        let returned = self.settle()?;
        Ok(self.wiring.unpack(self.wiring.backend.take_from_host(returned)))
    }
}

/// Rows of one tensor, or single values, that travel in rounds, there and back.
pub(crate) struct Rounds<'a, B: Backend> {
    wiring: Wiring<'a, B>,
    rows: Arc<B::Host>,
    kinds: [&'static str; 2],
}

impl<'a, B: Backend> Rounds<'a, B> {
    /// Rows of `x` `[rows, d]`, ready to be sent.
    pub fn new(wiring: Wiring<'a, B>, route: &Route, x: &B::Buf) -> Self {
        let rows = wiring.gather(&wiring.travelling(x), &route.tokens);
        Self { wiring, rows, kinds: [kind::DISPATCH, kind::COMBINE] }
    }

    /// Values of rows sent, ready to be sent.
    pub fn of_values(comm: &'a Communicator, backend: &'a B, values: B::Host) -> Self {
        let wiring = Wiring { comm, backend, d: 1, wire: Wire::F32, overlap: false };
        Self { wiring, rows: Arc::new(values), kinds: [kind::WEIGHTS; 2] }
    }

    /// The rows of a round, `[rows of the round, d]`.
    ///
    /// # Errors
    /// If the exchange fails.
    pub fn bring(&self, round: &Round) -> Result<B::Buf, CommError> {
        let width = self.wiring.width();
        let recv = self.wiring.backend.alloc_host(round.rows * width);
        let [kind, _] = self.kinds;
        let moving = self.wiring.start(kind, 0, &self.rows, &round.sent, recv, &round.received, width)?;
        Ok(self.wiring.unpack(self.wiring.backend.take_from_host(moving.finish()?)))
    }

    /// Room for returned rows, as they travel.
    pub fn returned(&self, route: &Route) -> B::Host {
        self.wiring.backend.alloc_host(route.returned_rows * self.wiring.width())
    }

    /// Brings a round's results back into `returned`.
    ///
    /// # Errors
    /// If the exchange fails.
    pub fn take_back(&self, round: &Round, results: B::Buf, returned: B::Host) -> Result<B::Host, CommError> {
        let width = self.wiring.width();
        let results = Arc::new(self.wiring.backend.hand_to_host(self.wiring.pack(results)));
        let [_, kind] = self.kinds;
        self.wiring.start(kind, 0, &results, &round.received, returned, &round.sent, width)?.finish()
    }

    /// All returned rows `[returned rows, d]`.
    pub fn finish(&self, returned: B::Host) -> B::Buf {
        self.wiring.unpack(self.wiring.backend.take_from_host(returned))
    }
}

/// Single values on their way, one a row, in the canonical order.
impl Route {
    /// Starts to bring values of rows sent to the experts.
    ///
    /// # Errors
    /// If the run has failed.
    pub fn start_values<R: AsRef<[f32]> + AsMut<[f32]> + Send + Sync + 'static>(
        &self,
        comm: &Communicator,
        values: R,
        recv: R,
    ) -> Result<Pending<R>, CommError> {
        let values = Arc::new(values);
        let sends = self.order.ranges.sent.iter().map(|list| parts(&values, list, 1)).collect();
        drop(values);
        let ranges = self.order.ranges.received.iter().map(|list| scaled(list, 1)).collect();
        comm.start_exchange(kind::WEIGHTS, sends, recv, ranges)
    }

    /// Starts to bring values of rows received back to where the rows came from.
    ///
    /// # Errors
    /// If the run has failed.
    pub fn start_values_back<R: AsRef<[f32]> + AsMut<[f32]> + Send + Sync + 'static>(
        &self,
        comm: &Communicator,
        values: R,
        recv: R,
    ) -> Result<Pending<R>, CommError> {
        let values = Arc::new(values);
        let sends = self.order.ranges.received.iter().map(|list| parts(&values, list, 1)).collect();
        drop(values);
        let ranges = self.order.ranges.sent.iter().map(|list| scaled(list, 1)).collect();
        comm.start_exchange(kind::WEIGHTS, sends, recv, ranges)
    }
}
