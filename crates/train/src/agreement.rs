//! What the planner said next to what was measured.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use unisono_comm::Ledger;
use unisono_mesh::LinkClass;
use unisono_plan::engine::CallTraffic;

/// Seconds of a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct StepTimeRecord {
    /// As predicted before the first; none where the machine has not been measured.
    pub predicted_s: Option<f64>,
    /// The 80% interval of the prediction; none where the machine's file does not tell how well it predicts.
    #[serde(default)]
    pub interval_80_s: Option<[f64; 2]>,
    /// The median, the first step left out where there are others.
    pub measured_s: f64,
}

impl StepTimeRecord {
    /// The record of steps that took `seconds`.
    pub(crate) fn new(predicted_s: Option<f64>, interval_80_s: Option<[f64; 2]>, seconds: &[f64]) -> Self {
        let mut sorted = seconds.get(1..).filter(|rest| !rest.is_empty()).unwrap_or(seconds).to_vec();
        sorted.sort_by(f64::total_cmp);
        Self { predicted_s, interval_80_s, measured_s: sorted.get(sorted.len() / 2).copied().unwrap_or(0.0) }
    }
}

/// Calls and bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// Calls that move bytes over the class of links.
    pub calls: u64,
    /// Bytes sent.
    pub bytes_sent: u64,
    /// Bytes received.
    pub bytes_received: u64,
}

/// What training steps moved by one kind of call on one group over one class of links, all ranks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficRecord {
    /// The kind of call.
    pub kind: String,
    /// The group's name.
    pub group: String,
    /// The class of links.
    pub link: LinkClass,
    /// From the layout and the run's routing counts.
    pub predicted: Moved,
    /// As the ledger counts.
    pub measured: Moved,
}

/// The two side by side, by kind, group and class of links.
pub(crate) fn compare(predicted: &[CallTraffic], measured: &Ledger) -> Vec<TrafficRecord> {
    let mut rows: BTreeMap<(&str, &str, LinkClass), [Moved; 2]> = BTreeMap::new();
    let mut add = |key, which: usize, calls, bytes_sent, bytes_received| {
        let moved = &mut rows.entry(key).or_default()[which];
        moved.calls += calls;
        moved.bytes_sent += bytes_sent;
        moved.bytes_received += bytes_received;
    };
    for row in predicted {
        add((&row.kind, &row.group, row.link), 0, row.calls, row.bytes_sent, row.bytes_received);
    }
    for row in &measured.rows {
        add((&row.kind, &row.group, row.link), 1, row.calls, row.bytes_sent, row.bytes_received);
    }
    let record = |((kind, group, link), [predicted, measured]): ((&str, &str, LinkClass), [Moved; 2])| {
        TrafficRecord { kind: kind.into(), group: group.into(), link, predicted, measured }
    };
    rows.into_iter().map(record).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_step_counts_only_alone() {
        assert_eq!(StepTimeRecord::new(None, None, &[9.0, 1.0, 3.0, 2.0]).measured_s, 2.0);
        assert_eq!(StepTimeRecord::new(None, None, &[9.0]).measured_s, 9.0);
        assert_eq!(StepTimeRecord::new(None, None, &[]).measured_s, 0.0);
    }

    #[test]
    fn what_only_one_side_has_is_shown() {
        let row = |kind: &str| CallTraffic {
            kind: kind.into(),
            group: "world".into(),
            link: LinkClass::SameNode,
            calls: 1,
            bytes_sent: 8,
            bytes_received: 8,
        };
        let records = compare(&[row("a"), row("a")], &Ledger::default());
        let predicted = Moved { calls: 2, bytes_sent: 16, bytes_received: 16 };
        assert_eq!(records.len(), 1);
        assert_eq!((records[0].predicted, records[0].measured), (predicted, Moved::default()));
    }
}
