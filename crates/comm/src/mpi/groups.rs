//! The groups that this rank is in, and what other members have told of theirs.
//!
//! A rank opens only groups that it belongs to, and tells only their members. So whatever one rank knows of a name has that
//! rank in common: it is one group, or ranks disagree. Groups of one name on other ranks are unknown here.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::wire::fingerprint;
use crate::error::FirstOf;
use crate::transport::GroupId;

/// What a member tells the others of a group: however large the group is, it fits a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Told {
    pub name: String,
    /// Of the name and all members, in order.
    pub fingerprint: u64,
    /// How many members there are.
    pub size: usize,
    /// The first of them, for error texts.
    pub first: Vec<usize>,
}

struct OpenGroup {
    name: String,
    members: Vec<usize>,
    fingerprint: u64,
}

/// A group that ranks know differently.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Clash {
    /// The rank that came later.
    pub rank: usize,
    /// Who opened what.
    pub detail: String,
}

/// All groups that this rank knows.
pub(super) struct Groups {
    /// By [`GroupId`].
    open: Vec<OpenGroup>,
    /// By name: who was the first to tell what.
    known: HashMap<String, (usize, Told)>,
    /// So many members are named to others.
    named: usize,
}

impl Groups {
    pub fn new(named: usize) -> Self {
        Self { open: Vec::new(), known: HashMap::new(), named }
    }

    /// The open group of this name and these members.
    pub fn find(&self, name: &str, members: &[usize]) -> Option<GroupId> {
        let same = |group: &OpenGroup| group.name == name && group.members == members;
        self.open.iter().position(same).map(|index| GroupId(index as u32))
    }

    /// Opens a group for `rank`, this one; with what its other members are to be told.
    pub fn open(&mut self, rank: usize, name: &str, members: &[usize]) -> (GroupId, Told, Option<Clash>) {
        let words = name.bytes().map(u64::from).chain(members.iter().map(|&member| member as u64));
        let fingerprint = fingerprint(words.chain([members.len() as u64]));
        self.open.push(OpenGroup { name: name.to_owned(), members: members.to_vec(), fingerprint });
        let first = members.iter().copied().take(self.named).collect();
        let told = Told { name: name.to_owned(), fingerprint, size: members.len(), first };
        let clash = self.hear(rank, told.clone());
        (GroupId((self.open.len() - 1) as u32), told, clash)
    }

    /// Notes a group of which this rank is a member, as `rank` has opened it.
    pub fn hear(&mut self, rank: usize, told: Told) -> Option<Clash> {
        match self.known.entry(told.name.clone()) {
            Entry::Vacant(free) => {
                free.insert((rank, told));
                None
            }
            Entry::Occupied(known) => {
                let (opener, first) = known.get();
                (first.fingerprint != told.fingerprint).then(|| {
                    let detail = format!(
                        "group '{}' was opened with the world ranks {} by rank {opener}, and rank {rank} opens it with {}",
                        told.name,
                        FirstOf(&first.first, first.size),
                        FirstOf(&told.first, told.size)
                    );
                    Clash { rank, detail }
                })
            }
        }
    }

    pub fn fingerprint(&self, group: GroupId) -> u64 {
        self.open[group.0 as usize].fingerprint
    }

    /// The name of the open group with this fingerprint.
    pub fn name_of(&self, fingerprint: u64) -> Option<&str> {
        let group = self.open.iter().find(|group| group.fingerprint == fingerprint);
        group.map(|group| group.name.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::{CONTROL_BYTES, Message};
    use super::*;

    /// What `rank` tells of a group, as it comes out of a message.
    fn tells(rank: usize, name: &str, members: &[usize], named: usize) -> Told {
        let (_, told, clash) = Groups::new(named).open(rank, name, members);
        assert_eq!(clash, None);
        let bytes = Message::Group(told).encode();
        assert!(bytes.len() <= CONTROL_BYTES, "{} bytes", bytes.len());
        let Message::Group(told) = Message::decode(&bytes).unwrap() else { panic!("another message") };
        told
    }

    #[test]
    fn a_group_of_any_size_is_the_same_for_all_its_members() {
        for size in [1, 2, 3, 128, 129, 500, 100_000] {
            let members: Vec<usize> = (0..size).map(|i| 3 * i).collect();
            for named in [0, 2, 16, usize::MAX] {
                // Told before this rank opens it, and after.
                let mut groups = Groups::new(named);
                assert_eq!(groups.hear(3, tells(3, "world", &members, named)), None);
                let (id, _, clash) = groups.open(0, "world", &members);
                assert_eq!((clash, groups.find("world", &members)), (None, Some(id)));
                assert_eq!(groups.hear(6, tells(6, "world", &members, named)), None);
            }
        }
    }

    #[test]
    fn lists_that_differ_behind_what_is_told_are_a_clash_that_names_both() {
        let members: Vec<usize> = (0..500).collect();
        let mut swapped = members.clone();
        swapped.swap(498, 499);
        for other in [&members[..499], &swapped] {
            let mut groups = Groups::new(3);
            groups.open(1, "world", &members);
            let clash = groups.hear(7, tells(7, "world", other, 3)).unwrap();
            assert_eq!(clash.rank, 7);
            let expected = format!(
                "group 'world' was opened with the world ranks [0, 1, 2, … (500 ranks)] by rank 1, and rank 7 opens it with \
                 [0, 1, 2, … ({} ranks)]",
                other.len()
            );
            assert_eq!(clash.detail, expected);
            // The other way round: this rank comes later.
            let mut groups = Groups::new(3);
            assert_eq!(groups.hear(7, tells(7, "world", other, 3)), None);
            let (_, _, clash) = groups.open(1, "world", &members);
            assert_eq!(clash.unwrap().rank, 1);
        }
    }

    #[test]
    fn groups_of_other_names_share_members_as_they_like() {
        let mut groups = Groups::new(16);
        let (world, _, _) = groups.open(0, "world", &[0, 1, 2]);
        let (pair, _, clash) = groups.open(0, "pair", &[0, 2]);
        assert_eq!((clash, groups.hear(2, tells(2, "other", &[0, 2], 16))), (None, None));
        assert_eq!(groups.find("pair", &[0, 1]), None);
        assert_ne!(groups.fingerprint(world), groups.fingerprint(pair));
        assert_eq!(groups.name_of(groups.fingerprint(pair)), Some("pair"));
    }
}
