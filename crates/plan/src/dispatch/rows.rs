//! Where rows stand that travel straight from tokens to experts, on both ends.

use std::ops::Range;

use super::census::Census;
use super::group::DispatchGroup;

/// The sender orders rows by (peer, instance, slot, token), the receiver by (instance, peer, slot, token), which is
/// (group, expert, slot, token) since ranks hold consecutive slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowRanges {
    /// `[peer][instance of the peer]` rows sent.
    pub sent: Vec<Vec<Range<usize>>>,
    /// `[peer][own instance]` rows received.
    pub received: Vec<Vec<Range<usize>>>,
    /// The runs of received rows, one an instance of this rank.
    pub runs: Vec<Range<usize>>,
}

impl RowRanges {
    /// The ranges of this rank.
    pub fn new(group: &DispatchGroup, census: &Census) -> Self {
        let mut next = 0;
        let mut range = |rows: usize| {
            next += rows;
            next - rows..next
        };
        let sent = group.instances.iter().map(|instances| {
            instances.iter().map(|i| range(census.rows_from(group, group.me(), i))).collect()
        });
        let sent = sent.collect();
        let (mut received, mut runs) = (vec![Vec::new(); group.size()], Vec::new());
        let mut next = 0;
        for instance in &group.instances[group.me()] {
            let start = next;
            for (peer, ranges) in received.iter_mut().enumerate() {
                let rows = census.rows_from(group, peer, instance);
                ranges.push(next..next + rows);
                next += rows;
            }
            runs.push(start..next);
        }
        Self { sent, received, runs }
    }
}
