//! Rounds: how rows travel that would not fit the bound together.
//!
//! Every rank knows all counts, hence every rank's rounds. A round carries whole blocks of an expert's rows in canonical
//! order, so that its weight-gradient products can be made at once and nothing has to be kept.

use std::ops::Range;

use unisono_mesh::Instance;

use super::group::{Census, DispatchGroup};
use super::order::{Order, rows_from};

/// One round, from this rank's side.
#[derive(Debug, Clone)]
pub(crate) struct Round {
    /// What is sent, by peer: rows in the canonical order of sending.
    pub sent: Vec<Vec<Range<usize>>>,
    /// What is received, by peer.
    pub received: Vec<Vec<Range<usize>>>,
    /// The received rows of each instance that has some: `(instance, rows)`.
    pub runs: Vec<(usize, Range<usize>)>,
    /// Rows received.
    pub rows: usize,
}

/// Rows of each instance of a peer in a round: `(instance, rows of its run)`.
type Load = Vec<(usize, Range<usize>)>;

/// Whether no rank holds more rows of other tokens than the bound allows if all rows of the layer travel together. What
/// waits in a buffer of arrival and what a rank forwards count too.
pub(crate) fn fits(group: &DispatchGroup<'_>, census: &Census) -> bool {
    let options = group.options;
    let staged = options.chunks > 1 || options.wire != unisono_tensor::Wire::F32;
    let held = |peer: usize| {
        let received: usize = runs_of(group, census, peer).into_iter().sum();
        let forwarded: usize =
            group
                .carried_by(peer)
                .into_iter()
                .map(|source| {
                    if source == peer { 0 } else { carried_rows(group, census, source, group.node_of[peer]) }
                })
                .sum();
        received * if staged { 2 } else { 1 } + forwarded
    };
    options.rows == 0 || group.peers().all(|peer| held(peer) <= options.rows)
}

/// Rows of `source` that arrive for `node` and leave again for its ranks.
fn carried_rows(group: &DispatchGroup<'_>, census: &Census, source: usize, node: usize) -> usize {
    let crossing = group
        .slots_of(source)
        .map(|slot| (0..group.options.chunks).map(|part| census.crossing(slot, part, node)).sum::<usize>());
    let arrived: usize = crossing.sum();
    let to = |peer: &usize| {
        let instances = group.instances[*peer].iter();
        instances.map(|i| rows_from(group, census, source, i.group, i.expert)).sum::<usize>()
    };
    arrived + group.nodes[node].iter().map(to).sum::<usize>()
}

/// Rows of each instance of `peer`.
fn runs_of(group: &DispatchGroup<'_>, census: &Census, peer: usize) -> Vec<usize> {
    let rows = |i: &Instance| group.peers().map(|p| rows_from(group, census, p, i.group, i.expert)).sum();
    group.instances[peer].iter().map(rows).collect()
}

/// Cuts runs of `rows` rows into loads of at most `most` rows: whole blocks of `block` rows, in order.
fn loads(rows: &[usize], block: usize, most: usize) -> Vec<Load> {
    let mut loads: Vec<Load> = Vec::new();
    let mut free = 0;
    for (instance, rows) in rows.iter().enumerate() {
        for start in (0..*rows).step_by(block) {
            let end = (start + block).min(*rows);
            if end - start > free || loads.is_empty() {
                loads.push(Vec::new());
                free = most;
            }
            free = free.saturating_sub(end - start);
            if let Some(load) = loads.last_mut() {
                match load.last_mut() {
                    Some((last, range)) if *last == instance => range.end = end,
                    _ => load.push((instance, start..end)),
                }
            }
        }
    }
    loads
}

/// All rounds; every rank has the same number.
pub(crate) fn cut(group: &DispatchGroup<'_>, census: &Census, order: &Order, row_block: usize) -> Vec<Round> {
    let most = group.options.rows;
    let all: Vec<Vec<Load>> =
        group.peers().map(|peer| loads(&runs_of(group, census, peer), row_block, most)).collect();
    let count = all.iter().map(Vec::len).max().unwrap_or(0);
    let none = Load::new();
    (0..count)
        .map(|index| {
            let of = |peer: usize| all[peer].get(index).unwrap_or(&none);
            let sent = group.peers().map(|peer| sends(group, census, order, peer, of(peer))).collect();
            receives(group, order, of(group.me()), sent)
        })
        .collect()
}

/// The rows that this rank sends to `peer` for its load.
fn sends(
    group: &DispatchGroup<'_>,
    census: &Census,
    order: &Order,
    peer: usize,
    load: &Load,
) -> Vec<Range<usize>> {
    let mine = |(index, rows): &(usize, Range<usize>)| {
        let Instance { group: expert_group, expert } = group.instances[peer][*index];
        let before: usize = (0..group.me()).map(|p| rows_from(group, census, p, expert_group, expert)).sum();
        let segment = &order.sent[peer][*index];
        within(rows, before..before + segment.len(), segment.start)
    };
    load.iter().map(mine).collect()
}

fn receives(group: &DispatchGroup<'_>, order: &Order, load: &Load, sent: Vec<Vec<Range<usize>>>) -> Round {
    let mut received = vec![Vec::new(); group.comm.size()];
    let mut runs = Vec::new();
    let mut next = 0;
    for (index, rows) in load {
        let run = &order.runs[*index];
        let start = next;
        for (peer, ranges) in received.iter_mut().enumerate() {
            let segment = &order.received[peer][*index];
            let part = within(rows, segment.start - run.start..segment.end - run.start, 0);
            ranges.push(next..next + part.len());
            next += part.len();
        }
        runs.push((*index, start..next));
    }
    Round { sent, received, runs, rows: next }
}

/// What `rows` and `segment` of a run share, counted from `start` at the segment's first row.
fn within(rows: &Range<usize>, segment: Range<usize>, start: usize) -> Range<usize> {
    let (from, to) = (rows.start.max(segment.start), rows.end.min(segment.end));
    if from >= to { start..start } else { start + from - segment.start..start + to - segment.start }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_carry_whole_blocks_in_order_within_the_bound() {
        let cut = loads(&[10, 0, 3, 9], 4, 8);
        assert_eq!(cut, [vec![(0, 0..8)], vec![(0, 8..10), (2, 0..3)], vec![(3, 0..8)], vec![(3, 8..9)],]);
    }

    #[test]
    fn no_rows_need_no_round() {
        assert!(loads(&[0, 0], 4, 8).is_empty());
    }

    #[test]
    fn a_segment_outside_of_the_rows_sends_nothing() {
        assert_eq!(within(&(4..8), 0..3, 100), 100..100);
        assert_eq!(within(&(4..8), 6..20, 100), 100..102);
        assert_eq!(within(&(4..8), 0..20, 100), 104..108);
    }
}
