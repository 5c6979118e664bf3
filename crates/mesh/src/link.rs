//! What lies between two ranks.

use serde::{Deserialize, Serialize};

/// What lies between two ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkClass {
    /// Nothing: a rank and itself.
    SameRank,
    /// The memory of one node.
    SameNode,
    /// A network.
    OtherNode,
}

impl LinkClass {
    /// All classes, nearest first.
    pub const ALL: [Self; 3] = [Self::SameRank, Self::SameNode, Self::OtherNode];

    /// Between two ranks, of which rank r is on node `node_of[r]`.
    ///
    /// # Panics
    /// If a rank has no node.
    pub fn between(a: usize, b: usize, node_of: &[usize]) -> Self {
        match a {
            _ if a == b => Self::SameRank,
            _ if node_of[a] == node_of[b] => Self::SameNode,
            _ => Self::OtherNode,
        }
    }
}
