//! The traffic ledger: what moved, by kind of call, group and link class.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use unisono_mesh::LinkClass;

/// What one kind of call on one group moved over one class of links.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The kind of call, for example `reduce_scatter`.
    pub kind: String,
    /// The group's name.
    pub group: String,
    /// The class of links.
    pub link: LinkClass,
    /// Calls that moved bytes over this class. A call is always counted in the farthest class of its group.
    pub calls: u64,
    /// Bytes sent.
    pub bytes_sent: u64,
    /// Bytes received.
    pub bytes_received: u64,
    /// Seconds spent waiting for peers, booked in the farthest class of the group.
    pub wait_seconds: f64,
    /// Seconds spent copying and adding what came over this class. Sums that take from several classes at once are
    /// booked in the farthest of them.
    pub move_seconds: f64,
}

/// What one rank moved to and from other ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankTraffic {
    /// The world rank.
    pub rank: usize,
    /// Bytes sent to other ranks.
    pub bytes_sent: u64,
    /// Bytes received from other ranks.
    pub bytes_received: u64,
}

/// A snapshot of one rank's traffic, or of many ranks' merged.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    /// By kind, group and link class, in that order.
    pub rows: Vec<Row>,
    /// By rank.
    pub ranks: Vec<RankTraffic>,
}

impl Ledger {
    /// What was added since `earlier`, a snapshot of the same rank or ranks. Rows without calls are left out.
    pub fn since(&self, earlier: &Ledger) -> Ledger {
        let mut rows = self.rows.clone();
        for row in &mut rows {
            if let Some(old) = earlier.rows.iter().find(|old| old.key() == row.key()) {
                row.calls = row.calls.saturating_sub(old.calls);
                row.bytes_sent = row.bytes_sent.saturating_sub(old.bytes_sent);
                row.bytes_received = row.bytes_received.saturating_sub(old.bytes_received);
                row.wait_seconds = (row.wait_seconds - old.wait_seconds).max(0.0);
                row.move_seconds = (row.move_seconds - old.move_seconds).max(0.0);
            }
        }
        rows.retain(|row| row.calls > 0);
        let mut ranks = self.ranks.clone();
        for rank in &mut ranks {
            if let Some(old) = earlier.ranks.iter().find(|old| old.rank == rank.rank) {
                rank.bytes_sent = rank.bytes_sent.saturating_sub(old.bytes_sent);
                rank.bytes_received = rank.bytes_received.saturating_sub(old.bytes_received);
            }
        }
        Ledger { rows, ranks }
    }

    /// Adds another ledger, for example of another rank: all counts and times are summed.
    pub fn merge(&mut self, other: &Ledger) {
        for row in &other.rows {
            match self.rows.iter_mut().find(|mine| mine.key() == row.key()) {
                Some(mine) => {
                    mine.calls += row.calls;
                    mine.bytes_sent += row.bytes_sent;
                    mine.bytes_received += row.bytes_received;
                    mine.wait_seconds += row.wait_seconds;
                    mine.move_seconds += row.move_seconds;
                }
                None => self.rows.push(row.clone()),
            }
        }
        self.rows.sort_by(|a, b| a.key().cmp(&b.key()));
        for rank in &other.ranks {
            match self.ranks.iter_mut().find(|mine| mine.rank == rank.rank) {
                Some(mine) => {
                    mine.bytes_sent += rank.bytes_sent;
                    mine.bytes_received += rank.bytes_received;
                }
                None => self.ranks.push(*rank),
            }
        }
        self.ranks.sort_by_key(|rank| rank.rank);
    }

    /// Bytes that were sent to other ranks in calls of such kinds.
    pub fn sent_in(&self, kinds: &[&str]) -> u64 {
        let rows = self.rows.iter().filter(|row| row.link != LinkClass::SameRank);
        rows.filter(|row| kinds.contains(&row.kind.as_str())).map(|row| row.bytes_sent).sum()
    }

    /// The rank through which most bytes went, sent and received; the lowest of equals.
    pub fn busiest_rank(&self) -> Option<RankTraffic> {
        let through = |rank: &RankTraffic| rank.bytes_sent + rank.bytes_received;
        self.ranks.iter().rev().max_by_key(|rank| through(rank)).copied()
    }

    /// Bytes sent to other ranks, by all kinds of calls on all groups.
    pub fn bytes_sent(&self) -> u64 {
        self.ranks.iter().map(|rank| rank.bytes_sent).sum()
    }

    /// Seconds spent in calls: waiting, copying and adding. Summed over ranks if the ledger is merged.
    pub fn seconds(&self) -> f64 {
        self.rows.iter().map(|row| row.wait_seconds + row.move_seconds).sum()
    }
}

impl Row {
    fn key(&self) -> (&str, &str, LinkClass) {
        (&self.kind, &self.group, self.link)
    }
}

/// Bytes of one call, by link class.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Volume {
    pub sent: [u64; 3],
    pub received: [u64; 3],
}

impl Volume {
    pub fn sent_to_others(&self) -> u64 {
        self.sent[1] + self.sent[2]
    }

    pub fn received_from_others(&self) -> u64 {
        self.received[1] + self.received[2]
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    calls: u64,
    sent: u64,
    received: u64,
    wait: Duration,
    moving: Duration,
}

/// The running counts of one rank.
#[derive(Debug, Default)]
pub(crate) struct Book(BTreeMap<(&'static str, Arc<str>, LinkClass), Tally>);

impl Book {
    pub fn add(
        &mut self,
        kind: &'static str,
        group: &Arc<str>,
        farthest: LinkClass,
        volume: &Volume,
        wait: Duration,
        moving: &[Duration; 3],
    ) {
        for link in LinkClass::ALL {
            let i = link as usize;
            if link != farthest && volume.sent[i] == 0 && volume.received[i] == 0 {
                continue;
            }
            let tally = self.0.entry((kind, Arc::clone(group), link)).or_default();
            tally.calls += 1;
            tally.sent += volume.sent[i];
            tally.received += volume.received[i];
            tally.moving += moving[i];
            if link == farthest {
                tally.wait += wait;
            }
        }
    }

    pub fn snapshot(&self, rank: usize) -> Ledger {
        let mut traffic = RankTraffic { rank, bytes_sent: 0, bytes_received: 0 };
        let mut rows = Vec::with_capacity(self.0.len());
        for ((kind, group, link), tally) in &self.0 {
            if *link != LinkClass::SameRank {
                traffic.bytes_sent += tally.sent;
                traffic.bytes_received += tally.received;
            }
            rows.push(Row {
                kind: (*kind).to_owned(),
                group: group.to_string(),
                link: *link,
                calls: tally.calls,
                bytes_sent: tally.sent,
                bytes_received: tally.received,
                wait_seconds: tally.wait.as_secs_f64(),
                move_seconds: tally.moving.as_secs_f64(),
            });
        }
        Ledger { rows, ranks: vec![traffic] }
    }
}
