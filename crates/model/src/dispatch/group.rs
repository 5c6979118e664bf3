//! One wave's dispatch: its group, who speaks for this rank in it, and how rows move.

use std::ops::Range;
use std::sync::Arc;

use unisono_comm::{CommError, Communicator, Part};
use unisono_plan::dispatch::{Census, DispatchGroup, DispatchShape, kind};
use unisono_tensor::{Routing, Wire};

use crate::batch::Batch;

/// What a row is rounded to.
pub(crate) fn wire(shape: &DispatchShape) -> Wire {
    if shape.half { Wire::Bf16 } else { Wire::F32 }
}

/// What all exchanges of a wave share.
pub(crate) struct Wave<'a> {
    pub comm: &'a Communicator,
    pub group: DispatchGroup,
    pub shape: DispatchShape,
}

impl Wave<'_> {
    /// Counts this rank's rows and gathers everybody's.
    ///
    /// # Errors
    /// If the exchange fails.
    pub fn census(&self, routing: &Routing, batch: &Batch, top_k: usize) -> Result<Census, CommError> {
        let Self { comm, group, shape } = self;
        let own = Census::count(group, shape.chunks, &routing.experts, batch.slot_rows(), top_k);
        let width = Census::width(group, shape.chunks);
        let first_slot = group.slots_of(0).start;
        let range = |peer: usize| {
            let slots = group.slots_of(peer);
            (slots.start - first_slot) * width..(slots.end - first_slot) * width
        };
        let ranges: Vec<Vec<Range<usize>>> = group.peers().map(|peer| vec![range(peer)]).collect();
        let total = ranges.last().map_or(0, |list| list[0].end);
        let sends = vec![vec![Part::whole(Arc::new(own))]; group.size()];
        let counts = comm.exchange(kind::COUNTS, sends, vec![0u32; total], ranges)?;
        Ok(Census::new(group, shape.chunks, counts))
    }
}
