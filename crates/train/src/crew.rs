//! Ranks of one process that lend each other their cores while they wait.

use unisono_comm::ThreadRanks;
use unisono_tensor::cpu::Crew;

/// `ranks`, of which a rank that waits takes tasks of the others, and the crew of the `here` ranks of this process that their
/// backends join.
pub(crate) fn lending(ranks: ThreadRanks, here: usize) -> (ThreadRanks, Crew) {
    let crew = Crew::new(here);
    let helpers = crew.clone();
    (ranks.meanwhile(move |rank| helpers.help(rank)), crew)
}
