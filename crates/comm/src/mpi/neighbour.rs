//! Whether the next rank of this node still lives: MPI itself says nothing about a rank that has died.
//!
//! Each rank watches one other, in a circle over the node, so that whoever dies, a rank that lives notices.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

/// How often it looks.
const LOOK: Duration = Duration::from_millis(50);
/// Looks that find it dead before it is said: a rank that fails in good order ends too, and its reason may be on the way.
const LOOKS: u32 = 2;
/// Only a process that was stopped makes such a pause between looks.
const STOPPED: Duration = Duration::from_secs(1);
/// How long nobody is found dead after it: a launcher wakes those that it kills, one after the other.
const DOUBT: Duration = Duration::from_secs(5);
/// The system's number of a process that is no more (`ESRCH`).
const NO_SUCH_PROCESS: i32 = 3;

/// A process as others on its node know it: its number, and the device of the `/proc` that has this number.
pub(super) type ProcessId = [u64; 2];

/// This process; zeros, which nobody watches, where there is no `/proc`.
pub(super) fn this_process() -> ProcessId {
    let number = fs::read_link("/proc/self").ok().and_then(|path| path.to_str()?.parse().ok());
    let device = fs::metadata("/proc").map(|proc| proc.dev());
    match (number, device) {
        (Some(number), Ok(device)) => [number, device],
        _ => [0, 0],
    }
}

/// The process of the rank that this one watches.
pub(super) struct Neighbour {
    pub rank: usize,
    /// Stays that process's, also when its number is used again.
    stat: File,
    due: Option<Instant>,
    looked: Option<Instant>,
    doubt: Option<Instant>,
    dead: u32,
}

impl Neighbour {
    /// The next rank on the node of `rank`, if there is one whose process can be seen.
    pub fn of(rank: usize, nodes: &[usize], processes: &[ProcessId]) -> Option<Self> {
        let size = nodes.len();
        let next = (1..size).map(|turn| (rank + turn) % size).find(|&next| nodes[next] == nodes[rank])?;
        let [number, device] = processes[next];
        if number == 0 || device != processes[rank][1] {
            return None;
        }
        let stat = File::open(format!("/proc/{number}/stat")).ok()?;
        Some(Self { rank: next, stat, due: None, looked: None, doubt: None, dead: 0 })
    }

    /// Whether it is known to be dead at `now`.
    pub fn has_died(&mut self, now: Instant) -> bool {
        let pause = self.looked.replace(now).map(|looked| now.saturating_duration_since(looked));
        if pause.is_some_and(|pause| pause > STOPPED) {
            self.doubt = Some(now + DOUBT);
        }
        if self.due.max(self.doubt).is_some_and(|due| now < due) {
            return false;
        }
        self.due = Some(now + LOOK);
        self.dead = if self.is_dead() { self.dead + 1 } else { 0 };
        self.was_found_dead()
    }

    /// Whether the last look found it dead for good.
    pub fn was_found_dead(&self) -> bool {
        self.dead >= LOOKS
    }

    fn is_dead(&self) -> bool {
        let mut text = [0u8; 256];
        let read = loop {
            match self.stat.read_at(&mut text, 0) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                read => break read,
            }
        };
        match read {
            // The state follows the name, which is in parentheses and may have any letters.
            Ok(len) => {
                let name_end = text[..len].iter().rposition(|&byte| byte == b')');
                matches!(name_end.and_then(|end| text.get(end + 2)), Some(b'Z' | b'X'))
            }
            Err(error) => error.raw_os_error() == Some(NO_SUCH_PROCESS),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    fn sleeper() -> (Child, Neighbour) {
        let child = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().unwrap();
        let [me, device] = this_process();
        let processes = [[me, device], [1, device + 1], [u64::from(child.id()), device]];
        let neighbour = Neighbour::of(0, &[0, 1, 0], &processes).unwrap();
        (child, neighbour)
    }

    /// Whether it is found dead within ten looks from `now` on, which goes on.
    fn dies(neighbour: &mut Neighbour, now: &mut Instant) -> bool {
        (0..10).any(|_| {
            *now += LOOK;
            neighbour.has_died(*now)
        })
    }

    #[test]
    fn a_killed_neighbour_is_dead_whether_or_not_its_parent_knows() {
        let (mut child, mut neighbour) = sleeper();
        let mut now = Instant::now();
        assert_eq!(neighbour.rank, 2);
        assert!(!dies(&mut neighbour, &mut now));
        child.kill().unwrap();
        while !neighbour.is_dead() {
            std::thread::yield_now();
        }
        assert!(dies(&mut neighbour, &mut now), "a process whose parent has not asked for it");
        child.wait().unwrap();
        assert!(dies(&mut neighbour, &mut now), "a process that is gone");
    }

    #[test]
    fn who_was_stopped_itself_finds_nobody_dead_for_a_while() {
        let (mut child, mut neighbour) = sleeper();
        let mut now = Instant::now();
        assert!(!dies(&mut neighbour, &mut now));
        child.kill().unwrap();
        child.wait().unwrap();
        now += 2 * STOPPED;
        assert!(!dies(&mut neighbour, &mut now), "the launcher may have killed it");
        now += STOPPED / 2;
        assert!(!dies(&mut neighbour, &mut now));
        let found = (0..200).find(|_| dies(&mut neighbour, &mut now));
        assert!(found.is_some(), "but it is said if the job goes on");
    }

    #[test]
    fn who_cannot_be_seen_is_not_watched() {
        let [me, device] = this_process();
        assert!(Neighbour::of(0, &[0], &[[me, device]]).is_none());
        assert!(Neighbour::of(0, &[0, 1], &[[me, device]; 2]).is_none());
        assert!(Neighbour::of(0, &[0, 0], &[[me, device], [me, device + 1]]).is_none());
        assert!(Neighbour::of(0, &[0, 0], &[[me, device], [0, 0]]).is_none());
    }
}
