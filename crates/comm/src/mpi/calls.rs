//! One rank's side of a call: what it posted, what the others' headers say, and what is under way.

use std::sync::Arc;
use std::time::Duration;

use super::incoming::{Incoming, Stream};
use super::outgoing::Held;
use super::wire::{Header, Key, fingerprint};
use crate::error::CallSite;
use crate::transport::{Call, CallKey, Landing};

/// What a call says about itself, kept until all members have been compared with it.
pub(super) struct Side {
    pub site: CallSite,
    pub element: &'static str,
    pub members: Arc<[usize]>,
    pub position: usize,
    /// Bytes sent to each member.
    pub bytes: Vec<u64>,
    /// Bytes expected from each member.
    pub expects: Vec<u64>,
    /// Fingerprints of how each member should cut what it sends; none where it may cut as it likes.
    pieces: Vec<Option<u64>>,
    pub synchronise: bool,
    /// By member.
    pub headers: Vec<Option<Header>>,
    /// None once it is finished.
    pub active: Option<Active>,
    /// Its headers do not match.
    pub conflict: bool,
}

/// What is under way.
pub(super) struct Active {
    pub incoming: Incoming,
    /// By member.
    pub streams: Vec<Stream>,
    /// By member: payload that waits for the member's header.
    pub held: Vec<Option<Held>>,
    /// Messages that are not sent yet.
    pub sends_left: usize,
    /// How long the rank copied and added for it, by link class.
    pub moving: [Duration; 3],
    /// Nobody waits for it.
    pub given_up: bool,
}

impl Side {
    /// The side of `call`; what is under way is added by the engine.
    pub fn new(call: &Call) -> Self {
        let members = call.members.len();
        let sum = |list: &Vec<crate::part::Piece>| list.iter().map(|piece| piece.len() as u64).sum();
        let pieces = match &call.landing {
            Landing::Copy { .. } => vec![None; members],
            Landing::Combine { pieces, .. } => (0..members)
                .map(|member| {
                    let lens = pieces.iter().flat_map(|bucket| &bucket[member]);
                    Some(fingerprint(lens.map(|&len| len as u64)))
                })
                .collect(),
        };
        Self {
            site: call.site.clone(),
            element: call.element,
            members: Arc::clone(&call.members),
            position: call.position,
            bytes: call.sends.iter().map(sum).collect(),
            expects: call.landing.expected(),
            pieces,
            synchronise: call.synchronise,
            headers: (0..members).map(|_| None).collect(),
            active: None,
            conflict: false,
        }
    }

    /// Whether this rank and a member tell each other about the call.
    pub fn talks_to(&self, member: usize) -> bool {
        let moves = self.bytes[member] > 0 || self.expects[member] > 0;
        member != self.position && (moves || self.synchronise)
    }

    /// Whether the header of every member that sends one is here.
    pub fn all_told(&self) -> bool {
        (0..self.members.len()).all(|member| !self.talks_to(member) || self.headers[member].is_some())
    }

    /// Whether the header of a rank is not here.
    pub fn silent(&self, rank: usize) -> bool {
        self.members.iter().zip(&self.headers).any(|(member, header)| *member == rank && header.is_none())
    }

    /// Whether all is sent, received and summed.
    pub fn complete(&self) -> bool {
        let done = |active: &Active| active.sends_left == 0 && active.incoming.complete();
        !self.conflict && self.active.as_ref().is_some_and(done) && (!self.synchronise || self.all_told())
    }

    /// The members it waits for.
    pub fn missing(&self) -> Vec<usize> {
        let waits = |member: &usize| {
            let silent = self.headers[*member].is_none();
            let needs = self.expects[*member] > 0 || self.synchronise || self.bytes[*member] > 0;
            *member != self.position && ((needs && silent) || self.conflict)
        };
        let silent: Vec<usize> = (0..self.members.len()).filter(waits).collect();
        if !silent.is_empty() {
            return silent;
        }
        // All have come; payload is under way.
        (0..self.members.len())
            .filter(|&member| member != self.position && self.expects[member] + self.bytes[member] > 0)
            .collect()
    }

    /// Why a member's header does not match this call.
    pub fn disagrees(&self, header: &Header, member: usize) -> Option<String> {
        if self.site.kind != header.kind {
            return Some("different calls".into());
        }
        if self.element != header.element {
            return Some("different element types".into());
        }
        if header.sent != self.expects[member] {
            let (sent, expected) = (header.sent, self.expects[member]);
            return Some(format!("the second sends {sent} bytes to the first, which expects {expected}"));
        }
        if header.expected != self.bytes[member] {
            let (sent, expected) = (self.bytes[member], header.expected);
            return Some(format!("the first sends {sent} bytes to the second, which expects {expected}"));
        }
        if self.pieces[member].is_some_and(|pieces| pieces != header.pieces) {
            return Some("the pieces have other lengths than expected: their plans differ".into());
        }
        None
    }

    /// Whom to blame if headers do not match, in what words, and how many members that one disagrees with.
    ///
    /// As between threads: the member that disagrees with most others, among equals the last one.
    pub fn judge(&self) -> Option<(usize, String, u32)> {
        let seen = |member: usize| {
            if member == self.position {
                return Some((&*self.site.kind, self.element));
            }
            self.headers[member].as_ref().map(|header| (header.kind.as_str(), header.element.as_str()))
        };
        let with_me = |member: usize| {
            self.headers[member].as_ref().is_some_and(|header| self.disagrees(header, member).is_some())
        };
        let differ = |a: usize, b: usize| match (a == self.position, b == self.position) {
            (true, false) => with_me(b),
            (false, true) => with_me(a),
            _ => matches!((seen(a), seen(b)), (Some(first), Some(second)) if first != second),
        };
        let members = self.members.len();
        let counts = (0..members).map(|a| (0..members).filter(|&b| a != b && differ(a, b)).count());
        let (culprit, count) = counts.enumerate().max_by_key(|(member, count)| (*count, *member))?;
        let other = if culprit == self.position {
            (0..members).find(|&member| member != culprit && with_me(member))?
        } else {
            culprit
        };
        let header = self.headers[other].as_ref()?;
        let why = self.disagrees(header, other)?;
        let ours = format!("rank {} called {} of {}", self.members[self.position], self.site, self.element);
        let theirs = format!(
            "rank {} called {} (call {} on group '{}', step {}) of {}",
            self.members[other], header.kind, self.site.seq, self.site.group, header.step, header.element
        );
        Some((self.members[culprit], format!("{ours}, {theirs}: {why}"), count as u32))
    }
}

/// The key of a call as a member at `position` knows it, and how others address that member.
pub(super) fn key_of(key: &CallKey, group: u64, position: usize) -> Key {
    match *key {
        CallKey::Collective { seq, .. } => Key { group, message: None, seq, side: 0 },
        CallKey::Message { from, to, tag, seq, .. } => {
            let side = if from == to { position as u8 } else { 0 };
            Key { group, message: Some((from as u32, to as u32, tag)), seq, side }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pending::own;
    use crate::transport::GroupId;

    fn side(kind: &'static str, position: usize, expects: usize) -> Side {
        let piece = || crate::Part::<u8>::whole(Arc::new(vec![0u8; 4])).into_piece();
        let ranges: Vec<_> = (0..4).map(|i| vec![i * expects..(i + 1) * expects]).collect();
        Side::new(&Call {
            site: CallSite { step: 3, seq: 6, kind: kind.into(), group: "world".into() },
            element: "u8",
            key: CallKey::Collective { group: GroupId(0), seq: 6 },
            members: [0, 1, 2, 3].into(),
            position,
            sends: (0..4).map(|_| vec![piece()]).collect(),
            landing: Landing::Copy { buffer: own::<u8, Vec<u8>>(vec![0; 4 * expects]), ranges },
            synchronise: false,
        })
    }

    fn header(of: &Side, to: usize) -> Header {
        Header {
            key: Key { group: 0, message: None, seq: 6, side: 0 },
            position: of.position as u32,
            step: of.site.step,
            kind: of.site.kind.to_string(),
            element: of.element.into(),
            sent: of.bytes[to],
            expected: of.expects[to],
            pieces: 0,
            first_tag: 0,
            blocks: Vec::new(),
            payload: Vec::new(),
        }
    }

    /// Every rank's verdict, with all headers there.
    fn verdicts(mut sides: Vec<Side>) -> Vec<Option<(usize, String, u32)>> {
        for to in 0..4 {
            let headers: Vec<_> = sides.iter().map(|side| Some(header(side, to))).collect();
            sides[to].headers = headers;
            sides[to].headers[to] = None;
        }
        sides.iter().map(Side::judge).collect()
    }

    #[test]
    fn the_odd_one_out_is_blamed_by_all() {
        let kinds = ["all_gather", "all_gather", "all_to_all", "all_gather"];
        let sides = kinds.iter().enumerate().map(|(i, kind)| side(kind, i, 4)).collect();
        for verdict in verdicts(sides) {
            let (culprit, words, _) = verdict.unwrap();
            assert_eq!(culprit, 2, "{words}");
            assert!(
                words.contains("rank 2 called all_to_all (call 6 on group 'world', step 3) of u8"),
                "{words}"
            );
        }
    }

    #[test]
    fn who_sees_most_disagreement_is_surest() {
        let sides = (0..4).map(|i| side("all_gather", i, if i == 1 { 5 } else { 4 })).collect();
        let verdicts = verdicts(sides);
        let surest = verdicts.iter().flatten().max_by_key(|verdict| verdict.2).unwrap();
        assert_eq!((surest.0, surest.2), (1, 3), "{}", surest.1);
    }

    #[test]
    fn equal_calls_are_nobodys_fault() {
        let sides = (0..4).map(|i| side("all_gather", i, 4)).collect();
        assert!(verdicts(sides).iter().all(Option::is_none));
    }
}
