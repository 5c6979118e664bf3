//! The canonical order of all rows of a layer: the one in which experts see them, and in which single values travel.

use std::ops::Range;

use unisono_mesh::Instance;
use unisono_tensor::Routing;

use super::group::{Census, DispatchGroup};
use crate::batch::Batch;

/// The sender orders rows by (peer, instance, slot, token), the receiver by (instance, peer, slot, token), which is
/// (group, expert, slot, token) since ranks hold consecutive slots.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    /// `[rows * top_k]` token row behind each row sent.
    pub tokens: Vec<u32>,
    /// `[rows, top_k]` where each choice went, in rows sent.
    pub places: Vec<u32>,
    /// `[peer][instance of the peer]` rows sent.
    pub sent: Vec<Vec<Range<usize>>>,
    /// `[peer][own instance]` rows received.
    pub received: Vec<Vec<Range<usize>>>,
    /// The runs of received rows, one an instance of this rank.
    pub runs: Vec<Range<usize>>,
}

impl Order {
    pub fn new(
        group: &DispatchGroup<'_>,
        census: &Census,
        routing: &Routing,
        batch: &Batch,
        top_k: usize,
    ) -> Self {
        let (received, runs) = order_receives(group, census);
        let experts = group.experts();
        let mut cursor = vec![0u32; group.slots.len() * experts];
        let mut next = 0;
        let mut sent = Vec::with_capacity(group.instances.len());
        for instances in &group.instances {
            let mut ranges = Vec::with_capacity(instances.len());
            for Instance { group: expert_group, expert } in instances {
                let start = next;
                for slot in group.slots_in(group.me(), *expert_group) {
                    cursor[(slot - group.slots.start) * experts + expert] = next as u32;
                    next += census.rows(slot, *expert);
                }
                ranges.push(start..next);
            }
            sent.push(ranges);
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
        Self { tokens, places, sent, received, runs }
    }
}

fn order_receives(group: &DispatchGroup<'_>, census: &Census) -> (Vec<Vec<Range<usize>>>, Vec<Range<usize>>) {
    let mut received = vec![Vec::new(); group.comm.size()];
    let mut next = 0;
    let mut runs = Vec::new();
    for Instance { group: expert_group, expert } in &group.instances[group.me()] {
        let start = next;
        for (peer, ranges) in received.iter_mut().enumerate() {
            let rows = rows_from(group, census, peer, *expert_group, *expert);
            ranges.push(next..next + rows);
            next += rows;
        }
        runs.push(start..next);
    }
    (received, runs)
}

/// Rows that `peer` sends to `expert` as it serves `expert_group`.
pub(crate) fn rows_from(
    group: &DispatchGroup<'_>,
    census: &Census,
    peer: usize,
    expert_group: usize,
    expert: usize,
) -> usize {
    group.slots_in(peer, expert_group).map(|slot| census.rows(slot, expert)).sum()
}
