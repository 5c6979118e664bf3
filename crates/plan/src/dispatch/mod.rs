//! Expert dispatch as arithmetic: who exchanges rows with whom, in which rounds, and how many bytes every call moves.
//!
//! The engine follows these values; the planner counts with them.

mod calls;
mod census;
mod group;
mod rounds;
mod rows;

pub use calls::{DispatchShape, LayerCalls, Volume};
pub use census::{Census, part_of};
pub use group::DispatchGroup;
pub use rounds::{Round, cut, fits, received_rows};
pub use rows::RowRanges;

/// The names of the exchanges in the ledger.
pub mod kind {
    /// Rows on their way to their experts (and gradients on the same way): across nodes, if there are any.
    pub const DISPATCH: &str = "dispatch";
    /// Rows on their way inside a node, those that came across nodes included.
    pub const DISPATCH_INSIDE: &str = "dispatch_inside";
    /// Results on their way back; across nodes, if there are any.
    pub const COMBINE: &str = "combine";
    /// Results on their way inside a node, to where they are summed before they cross.
    pub const COMBINE_INSIDE: &str = "combine_inside";
    /// How many rows will come.
    pub const COUNTS: &str = "dispatch_counts";
    /// The choices of tokens that cross.
    pub const CHOICES: &str = "dispatch_choices";
    /// The weights of rows, and their gradients.
    pub const WEIGHTS: &str = "dispatch_weights";
}
