//! Who keeps others waiting: flight records of all ranks on disk, what they say together, and the watchdog.
//!
//! Nothing here depends on the transport. A process knows its own ranks; what other processes know it reads from their
//! flight records, in a folder that all of them see.

mod deck;
mod diagnosis;
mod pace;
mod record;
mod stall;
mod watchdog;

pub use deck::FlightDeck;
pub use diagnosis::{Culprit, Diagnosis, Verdict, diagnose, in_time};
pub use pace::{Activity, Limits, Pace};
pub use record::{
    Damaged, FlightRecord, GroupRecord, Identity, LARGEST_RECORD_BYTES, MOST_RANKS, Reason, RecordError,
    Records, read_records,
};
pub use watchdog::{Grace, Watchdog, forget_messages, tell_of_death};
