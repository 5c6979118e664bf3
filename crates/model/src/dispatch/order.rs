//! The canonical order of all rows of a layer: the one in which experts see them, and in which single values travel.

use unisono_mesh::Instance;
use unisono_plan::dispatch::{Census, DispatchGroup, RowRanges};
use unisono_tensor::Routing;

use crate::batch::Batch;

/// Where every choice stands among the rows that this rank sends.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    /// `[rows * top_k]` token row behind each row sent.
    pub tokens: Vec<u32>,
    /// `[rows, top_k]` where each choice went, in rows sent.
    pub places: Vec<u32>,
    /// The rows, on both ends.
    pub ranges: RowRanges,
}

impl Order {
    pub fn new(
        group: &DispatchGroup,
        census: &Census,
        routing: &Routing,
        batch: &Batch,
        top_k: usize,
    ) -> Self {
        let ranges = RowRanges::new(group, census);
        let experts = group.experts();
        let mut cursor = vec![0u32; group.slots.len() * experts];
        for (instances, sent) in group.instances.iter().zip(&ranges.sent) {
            for (Instance { group: expert_group, expert }, range) in instances.iter().zip(sent) {
                let mut next = range.start;
                for slot in group.slots_in(group.me(), *expert_group) {
                    cursor[(slot - group.slots.start) * experts + expert] = next as u32;
                    next += census.rows(slot, *expert);
                }
            }
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
        Self { tokens, places, ranges }
    }
}
