//! Rounds: how rows travel that would not fit the bound together.
//!
//! Every rank knows all counts, hence every rank's rounds. A round carries whole blocks of an expert's rows in canonical
//! order, so that its weight-gradient products can be made at once and nothing has to be kept.

use std::ops::Range;

use unisono_mesh::Instance;

use super::calls::DispatchShape;
use super::census::Census;
use super::group::DispatchGroup;
use super::rows::RowRanges;

/// One round, from this rank's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Round {
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
pub fn fits(group: &DispatchGroup, census: &Census, shape: &DispatchShape) -> bool {
    let copies = if shape.staged() { 2 } else { 1 };
    let held = |peer: usize| {
        let received = received_rows(group, census, peer);
        let others = group.carried_by(peer).into_iter().filter(|source| *source != peer);
        let forwarded: usize =
            others.map(|source| carried_rows(group, census, source, group.node_of[peer])).sum();
        received * copies + forwarded
    };
    shape.most_rows == 0 || group.peers().all(|peer| held(peer) <= shape.most_rows)
}

/// Rows of `source` that arrive for `node` and leave again for its ranks.
fn carried_rows(group: &DispatchGroup, census: &Census, source: usize, node: usize) -> usize {
    let crossing = group
        .slots_of(source)
        .map(|slot| (0..census.parts()).map(|part| census.crossing(slot, part, node)).sum::<usize>());
    let arrived: usize = crossing.sum();
    let instances = group.nodes[node].iter().flat_map(|peer| &group.instances[*peer]);
    arrived + instances.map(|instance| census.rows_from(group, source, instance)).sum::<usize>()
}

/// Rows that the experts of `peer` receive.
pub fn received_rows(group: &DispatchGroup, census: &Census, peer: usize) -> usize {
    runs_of(group, census, peer).into_iter().sum()
}

/// Rows of each instance of `peer`.
fn runs_of(group: &DispatchGroup, census: &Census, peer: usize) -> Vec<usize> {
    let rows = |instance: &Instance| group.peers().map(|p| census.rows_from(group, p, instance)).sum();
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
pub fn cut(group: &DispatchGroup, census: &Census, ranges: &RowRanges, shape: &DispatchShape) -> Vec<Round> {
    let load = |peer: usize| loads(&runs_of(group, census, peer), shape.row_block, shape.most_rows);
    let all: Vec<Vec<Load>> = group.peers().map(load).collect();
    let count = all.iter().map(Vec::len).max().unwrap_or(0);
    let none = Load::new();
    (0..count)
        .map(|index| {
            let of = |peer: usize| all[peer].get(index).unwrap_or(&none);
            let sent = group.peers().map(|peer| sends(group, census, ranges, peer, of(peer))).collect();
            receives(group, ranges, of(group.me()), sent)
        })
        .collect()
}

/// The rows that this rank sends to `peer` for its load.
fn sends(
    group: &DispatchGroup,
    census: &Census,
    ranges: &RowRanges,
    peer: usize,
    load: &Load,
) -> Vec<Range<usize>> {
    let mine = |(index, rows): &(usize, Range<usize>)| {
        let instance = &group.instances[peer][*index];
        let before: usize = (0..group.me()).map(|p| census.rows_from(group, p, instance)).sum();
        let segment = &ranges.sent[peer][*index];
        within(rows, before..before + segment.len(), segment.start)
    };
    load.iter().map(mine).collect()
}

fn receives(group: &DispatchGroup, ranges: &RowRanges, load: &Load, sent: Vec<Vec<Range<usize>>>) -> Round {
    let mut received = vec![Vec::new(); group.size()];
    let mut runs = Vec::new();
    let mut next = 0;
    for (index, rows) in load {
        let run = &ranges.runs[*index];
        let start = next;
        for (peer, list) in received.iter_mut().enumerate() {
            let segment = &ranges.received[peer][*index];
            let part = within(rows, segment.start - run.start..segment.end - run.start, 0);
            list.push(next..next + part.len());
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
