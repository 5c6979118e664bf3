//! The global gradient norm: squares over chunks, joined by the tree over the chunk index.

use std::ops::Range;

use unisono_comm::{CommError, Communicator};
use unisono_mesh::tree::{Joiner, roots};
use unisono_plan::Shards;

/// Sums per-chunk values over all ranks along the tree over all chunks. `values` are this rank's, in
/// the order of [`Shards::owned_chunks`].
///
/// Every rank sends the roots of the maximal subtrees of the chunk ranges it owns, nothing else.
///
/// # Errors
/// If the exchange fails.
pub fn sum_over_chunks(comm: &Communicator, shards: &Shards, values: &[f64]) -> Result<f64, CommError> {
    let chunks = shards.chunks();
    let mut own = Vec::new();
    let mut next = 0;
    for range in shards.owned_chunks(comm.rank()) {
        let mut joiner = Joiner::new(chunks);
        for chunk in range {
            joiner.push(chunk..chunk + 1, values[next], |left, right| left + right);
            next += 1;
        }
        own.extend(joiner.into_roots().into_iter().map(|(_, value)| value));
    }
    let all = comm.all_gather_values(&own)?;
    let nodes_of =
        |rank: usize| shards.owned_chunks(rank).into_iter().flat_map(move |range| roots(range, chunks));
    let mut nodes: Vec<(Range<usize>, f64)> = all
        .iter()
        .enumerate()
        .flat_map(|(rank, values)| nodes_of(rank).zip(values.iter().copied()))
        .collect();
    nodes.sort_unstable_by_key(|(node, _)| node.start);
    let mut joiner = Joiner::new(chunks);
    for (node, value) in nodes {
        joiner.push(node, value, |left, right| left + right);
    }
    Ok(joiner.into_roots().into_iter().map(|(_, value)| value).sum())
}
