//! Expert parallelism: the exchanges that bring rows to their experts and their conjugates that bring results back.
//!
//! Dispatch and combine are conjugate: the backward of the one is the other with gradients. However rows travel, in one
//! exchange or in chunks, straight or through a node, at once or in rounds under a bound, they are computed on and summed
//! in the same order. A group of one rank takes the same path.

pub mod bench;
mod chunk;
mod exchange;
mod group;
mod order;
#[cfg(test)]
mod tests;

use std::ops::Range;

use unisono_comm::{CommError, Part};
use unisono_plan::dispatch::{Census, Round, cut, fits};
use unisono_tensor::Routing;

use crate::batch::Batch;
use chunk::{Chunk, Plan};
pub(crate) use exchange::{Combining, Dispatching, Rounds, Wiring};
pub(crate) use group::{Wave, wire};
use order::Order;

/// Where every row of one layer's routing goes, on both ends.
#[derive(Debug, Clone)]
pub(crate) struct Route {
    /// The token row behind each row sent; [`unisono_tensor::NO_ROW`] where this rank has the experts and nothing is sent.
    pub tokens: Vec<u32>,
    /// `[rows, top_k]` which returned row each choice is; [`unisono_tensor::NO_ROW`] for one that an earlier choice's row contains.
    pub places: Vec<u32>,
    /// The runs of received rows, one an instance of this rank's wave.
    pub runs: Vec<Range<usize>>,
    /// How many rows there are for whom.
    pub census: Census,
    /// The exchanges; empty if rows travel in rounds.
    pub chunks: Vec<Chunk>,
    /// The rounds in which rows travel that would not fit the bound together.
    pub rounds: Option<Vec<Round>>,
    /// Rows that come back to this rank.
    returned_rows: usize,
    /// Whether rows cross between nodes on a way of their own.
    crosses: bool,
    top_k: usize,
    order: Order,
}

impl Route {
    /// Plans the exchanges of one layer: gathers how many rows each slot has for each expert, then orders.
    ///
    /// # Errors
    /// If an exchange of counts fails.
    pub fn new(wave: &Wave<'_>, routing: &Routing, batch: &Batch, top_k: usize) -> Result<Self, CommError> {
        let (group, shape) = (&wave.group, &wave.shape);
        let mut census = wave.census(routing, batch, top_k)?;
        let order = Order::new(group, &census, routing, batch, top_k);
        let crosses = group.crosses();
        let runs = order.ranges.runs.clone();
        if !fits(group, &census, shape) {
            let rounds = cut(group, &census, &order.ranges, shape);
            let (tokens, places) = (order.tokens.clone(), order.places.clone());
            let returned_rows = tokens.len();
            let chunks = Vec::new();
            return Ok(Self {
                tokens,
                places,
                runs,
                census,
                chunks,
                rounds: Some(rounds),
                returned_rows,
                crosses,
                top_k,
                order,
            });
        }
        let Plan { tokens, places, chunks, returned_rows } =
            Plan::new(wave, &mut census, routing, batch, top_k, &runs)?;
        Ok(Self { tokens, places, runs, census, chunks, rounds: None, returned_rows, crosses, top_k, order })
    }

    /// Rows that this rank's experts receive.
    pub fn received_rows(&self) -> usize {
        self.runs.last().map_or(0, |run| run.end)
    }

    /// Whether all rows are this rank's own, whose results stand in the order in which they return.
    fn alone(&self) -> bool {
        let chunk = self.chunks.first();
        self.chunks.len() == 1
            && chunk.is_some_and(|chunk| chunk.placed == chunk.rows && chunk.placed == chunk.own.len())
    }

    /// Puts per-choice values `[rows, top_k]` into the order in which single values travel.
    pub fn in_sent_order(&self, values: &[f32], sent: &mut [f32]) {
        self.order.places.iter().zip(values).for_each(|(place, value)| sent[*place as usize] = *value);
    }

    /// The inverse of [`Route::in_sent_order`].
    pub fn in_choice_order(&self, sent: &[f32], values: &mut [f32]) {
        self.order.places.iter().zip(values).for_each(|(place, value)| *value = sent[*place as usize]);
    }
}

/// Ranges of elements, from ranges of rows of `width`; empty ones are left out.
fn scaled(rows: &[Range<usize>], width: usize) -> Vec<Range<usize>> {
    let filled = rows.iter().filter(|range| !range.is_empty());
    filled.map(|range| range.start * width..range.end * width).collect()
}

/// The parts of `buffer` that hold `rows` of `width`.
fn parts<S: AsRef<[f32]> + Send + Sync + 'static>(
    buffer: &std::sync::Arc<S>,
    rows: &[Range<usize>],
    width: usize,
) -> Vec<Part<f32>> {
    scaled(rows, width).into_iter().map(|range| Part::new(std::sync::Arc::clone(buffer), range)).collect()
}
