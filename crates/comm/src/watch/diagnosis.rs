//! What the flight records of all ranks say together: who keeps whom waiting.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use serde::Serialize;

use super::pace::Activity;
use super::record::{FlightRecord, Reason};
use crate::error::{CallSite, Cause, Waiting, waiting_lines};
use crate::flight::{CallState, FlightEntry, Message};

/// A rank whose record comes later than this after the watchdog's first, in microseconds, is as silent as a dead one: it was
/// stopped, and the others have judged without it.
const IN_TIME_US: u64 = 5_000_000;
/// More ranks are not looked at one by one.
const MOST_CULPRITS: usize = 64;

/// What a rank has to do with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "verdict")]
pub enum Verdict {
    /// It failed, and said why.
    Failed {
        /// What it said.
        message: String,
    },
    /// It called something else where others made the same call.
    Mismatch {
        /// What it called.
        called: CallSite,
        /// What the others called.
        expected: CallSite,
    },
    /// It wrote no record that can be used, and others did: it died, or it is stopped.
    Silent,
    /// It has not come to a call in which others wait, and waits in none itself.
    Late {
        /// What it is doing.
        activity: Activity,
        /// The call it has not come to, if there is one: it may also have started it and not gone on.
        missing: Option<CallSite>,
    },
    /// It waits, in a circle, for ranks that wait for it.
    Circle,
}

/// A rank that keeps others waiting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Culprit {
    /// The world rank.
    pub rank: usize,
    /// The step it is in; of a silent one, the step of those that wait for it.
    pub step: u64,
    /// The last call it started, as far as is known.
    pub last_call: Option<CallSite>,
    /// What it did.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// Who keeps whom waiting.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Diagnosis {
    /// The ranks to look at first, those that left no record before others; empty if nobody waits and nobody failed.
    pub culprits: Vec<Culprit>,
    /// The ranks that wait, by rank.
    pub waiting: Vec<Waiting>,
}

/// Which calls of different ranks belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Key<'a> {
    Collective(&'a str, &'a [usize], u64),
    Message(&'a str, (usize, usize, u32), u64),
}

/// One rank's record, with what is asked of it often.
struct Pilot<'a> {
    record: &'a FlightRecord,
    calls: HashMap<Key<'a>, &'a FlightEntry>,
    waits: Option<&'a FlightEntry>,
}

impl<'a> Pilot<'a> {
    fn new(record: &'a FlightRecord) -> Self {
        let keyed = record.calls.iter().filter_map(|entry| Some((key(record, entry)?, entry)));
        let waits = record.calls.iter().rfind(|entry| entry.state == CallState::Waiting);
        Self { record, calls: keyed.collect(), waits }
    }

    /// Whether the rank has started this call.
    fn has_joined(&self, key: Key<'_>) -> bool {
        if self.calls.contains_key(&key) {
            return true;
        }
        match key {
            Key::Collective(name, _, seq) => {
                self.record.groups.get(name).is_some_and(|group| seq < group.started)
            }
            // Older messages than the recorded ones were the ones before.
            Key::Message(name, ends, seq) => self
                .calls
                .keys()
                .any(|other| matches!(other, Key::Message(n, e, s) if (*n, *e) == (name, ends) && *s > seq)),
        }
    }
}

fn key<'a>(record: &'a FlightRecord, entry: &'a FlightEntry) -> Option<Key<'a>> {
    let group = record.groups.get(&*entry.call.group)?;
    Some(match entry.message {
        None => Key::Collective(&entry.call.group, &group.members, entry.call.seq),
        Some(Message { from, to, tag }) => Key::Message(&entry.call.group, (from, to, tag), entry.call.seq),
    })
}

/// Whether a record of `records` came in time to say something: one that was written long after the watchdog's first comes
/// from a rank that was stopped.
pub fn in_time(records: &[FlightRecord]) -> impl Fn(&FlightRecord) -> bool + use<> {
    let stalled_us = first_us(records.iter(), &Reason::Stalled);
    move |record| is_in_time(record, stalled_us)
}

fn is_in_time(record: &FlightRecord, stalled_us: Option<u64>) -> bool {
    stalled_us.is_none_or(|first| record.written_us <= first.saturating_add(IN_TIME_US))
}

/// When the first record was written for this reason.
fn first_us<'a>(records: impl Iterator<Item = &'a FlightRecord>, reason: &Reason) -> Option<u64> {
    records.filter(|record| record.reason == *reason).map(|record| record.written_us).min()
}

/// Says from the flight records of one start of a run who keeps whom waiting. Ranks without a record are those that wrote
/// none. Of several records of a rank the last counts.
pub fn diagnose(records: &[FlightRecord]) -> Diagnosis {
    let stalled_us = first_us(records.iter(), &Reason::Stalled);
    let pilots: BTreeMap<usize, Pilot<'_>> = records
        .iter()
        .filter(|record| is_in_time(record, stalled_us))
        .map(|record| (record.rank, Pilot::new(record)))
        .collect();
    // What is known of killed ranks is of different moments, and says nothing about who waits for whom.
    let of_one_moment = pilots.values().filter(|pilot| pilot.record.reason != Reason::Killed);
    let waiting: Vec<Waiting> = of_one_moment.filter_map(|pilot| wait_of(pilot, &pilots)).collect();
    let mut culprits = failed(&pilots, stalled_us);
    if culprits.is_empty() {
        culprits.extend(mismatch(&pilots));
    }
    if culprits.is_empty() {
        culprits = awaited(&pilots, &waiting);
    }
    if culprits.is_empty() {
        culprits = silent(&pilots);
    }
    Diagnosis { culprits, waiting }
}

/// For whom a rank waits: for members that have not come to the call, or, if all have, for those that do not go on.
fn wait_of(pilot: &Pilot<'_>, pilots: &BTreeMap<usize, Pilot<'_>>) -> Option<Waiting> {
    let entry = pilot.waits?;
    let key = key(pilot.record, entry)?;
    let members: BTreeSet<usize> = match key {
        Key::Collective(_, members, _) => members.iter().copied().collect(),
        Key::Message(_, (from, to, _), _) => [from, to].into(),
    };
    let others = || members.iter().copied().filter(|member| *member != pilot.record.rank);
    let absent = |member: &usize| pilots.get(member).is_none_or(|other| !other.has_joined(key));
    let idle = |member: &usize| {
        let entry = pilots.get(member).and_then(|other| other.calls.get(&key));
        entry.is_some_and(|entry| entry.state == CallState::Started)
    };
    let mut for_ranks: Vec<usize> = others().filter(absent).collect();
    if for_ranks.is_empty() {
        for_ranks = others().filter(idle).collect();
    }
    Some(Waiting { rank: pilot.record.rank, call: entry.call.clone(), for_ranks })
}

/// Ranks without a record, though others have one: a dead rank writes none.
fn silent(pilots: &BTreeMap<usize, Pilot<'_>>) -> Vec<Culprit> {
    let Some(last) = pilots.values().max_by_key(|pilot| pilot.record.step) else { return Vec::new() };
    let missing = (0..last.record.ranks).filter(|rank| !pilots.contains_key(rank)).take(MOST_CULPRITS);
    let step = last.record.step;
    missing.map(|rank| Culprit { rank, step, last_call: None, verdict: Verdict::Silent }).collect()
}

/// The rank that records say has failed, or that was the first to be killed.
fn failed(pilots: &BTreeMap<usize, Pilot<'_>>, stalled_us: Option<u64>) -> Vec<Culprit> {
    // What follows when a watchdog has ended the run, or somebody else has, is a consequence: a launcher kills one after the other.
    let before = |record: &FlightRecord, end: Option<u64>| end.is_none_or(|end| record.written_us < end);
    let terminated_us = first_us(pilots.values().map(|pilot| pilot.record), &Reason::Terminated);
    let told = pilots.values().filter_map(|pilot| {
        let record = pilot.record;
        let (rank, message, step, call) = match &record.reason {
            Reason::Failed { rank, message, step, call } => (*rank, message.clone(), *step, call.clone()),
            Reason::Killed => (record.rank, Cause::Died.to_string(), Some(record.step), last_call(pilot)),
            Reason::Stalled | Reason::Terminated => return None,
        };
        let counts = match record.reason {
            Reason::Killed => before(record, stalled_us) && before(record, terminated_us),
            _ => rank == record.rank || before(record, stalled_us),
        };
        counts.then_some((rank, message, step, call, record))
    });
    let told = told.min_by_key(|(.., record)| record.written_us);
    let culprit = |(rank, message, step, call, teller): (
        usize,
        String,
        Option<u64>,
        Option<CallSite>,
        &FlightRecord,
    )| {
        let own = pilots.get(&rank);
        Culprit {
            rank,
            step: step.or(own.map(|pilot| pilot.record.step)).unwrap_or(teller.step),
            last_call: call.or_else(|| own.and_then(last_call)),
            verdict: Verdict::Failed { message },
        }
    };
    told.map(culprit).into_iter().collect()
}

fn last_call(pilot: &Pilot<'_>) -> Option<CallSite> {
    pilot.record.calls.last().map(|entry| entry.call.clone())
}

/// The odd one out, where ranks called different things under one number.
fn mismatch(pilots: &BTreeMap<usize, Pilot<'_>>) -> Option<Culprit> {
    let mut waits: Vec<&Pilot<'_>> = pilots.values().filter(|pilot| pilot.waits.is_some()).collect();
    waits.sort_by_key(|pilot| pilot.waits.map(|entry| entry.call.step));
    waits.into_iter().find_map(|pilot| {
        let key = key(pilot.record, pilot.waits?)?;
        let joined: Vec<(&Pilot<'_>, &CallSite)> =
            pilots.values().filter_map(|other| Some((other, &other.calls.get(&key)?.call))).collect();
        let alike = |call: &CallSite| joined.iter().filter(|(_, other)| other.kind == call.kind).count();
        // Among equals the last one, as where posts are compared.
        let (odd, called) = joined.iter().rev().min_by_key(|(_, call)| alike(call))?;
        let (_, expected) = joined.iter().find(|(_, call)| call.kind != called.kind)?;
        Some(Culprit {
            rank: odd.record.rank,
            step: odd.record.step,
            last_call: last_call(odd),
            verdict: Verdict::Mismatch { called: (*called).clone(), expected: (*expected).clone() },
        })
    })
}

/// The ranks that others wait for and that wait for nobody; in a circle the one most waited for.
fn awaited(pilots: &BTreeMap<usize, Pilot<'_>>, waiting: &[Waiting]) -> Vec<Culprit> {
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    for rank in waiting.iter().flat_map(|waiting| &waiting.for_ranks) {
        *counts.entry(*rank).or_default() += 1;
    }
    let waits: BTreeSet<usize> = waiting.iter().map(|waiting| waiting.rank).collect();
    let mut free: Vec<usize> = counts.keys().copied().filter(|rank| !waits.contains(rank)).collect();
    free.sort_by_key(|rank| pilots.contains_key(rank));
    if free.is_empty() {
        let most = counts.iter().rev().max_by_key(|(_, count)| **count).map(|(rank, _)| *rank);
        let circle = |rank: usize| Culprit {
            rank,
            step: pilots.get(&rank).map_or(0, |pilot| pilot.record.step),
            last_call: pilots.get(&rank).and_then(last_call),
            verdict: Verdict::Circle,
        };
        return most.map(circle).into_iter().collect();
    }
    free.into_iter().take(MOST_CULPRITS).map(|rank| late(rank, pilots, waiting)).collect()
}

fn late(rank: usize, pilots: &BTreeMap<usize, Pilot<'_>>, waiting: &[Waiting]) -> Culprit {
    // Who waits for the fewest is the closest to the cause; others wait for those that wait.
    let first = waiting.iter().filter(|waiting| waiting.for_ranks.contains(&rank));
    let first = first.min_by_key(|waiting| waiting.for_ranks.len());
    let Some(pilot) = pilots.get(&rank) else {
        let step = first.map_or(0, |waiting| waiting.call.step);
        return Culprit { rank, step, last_call: None, verdict: Verdict::Silent };
    };
    let missing = first.filter(|waiting| {
        let entry = pilots.get(&waiting.rank).and_then(|other| Some((other, other.waits?)));
        entry.and_then(|(other, entry)| key(other.record, entry)).is_some_and(|key| !pilot.has_joined(key))
    });
    let missing = missing.map(|waiting| waiting.call.clone());
    let verdict = Verdict::Late { activity: pilot.record.activity, missing };
    Culprit { rank, step: pilot.record.step, last_call: last_call(pilot), verdict }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed { message } => write!(f, "{message}"),
            Self::Mismatch { called, expected } => {
                write!(f, "called {called} where others called {expected}")
            }
            Self::Silent => write!(f, "left no flight record: it died or is stopped"),
            Self::Late { activity, missing: Some(call) } => {
                write!(f, "is late: {activity}, it has not come to {call}")
            }
            Self::Late { activity, missing: None } => {
                write!(f, "is late: {activity}, it does not go on with what it has started")
            }
            Self::Circle => write!(f, "waits for ranks that wait for it"),
        }
    }
}

impl fmt::Display for Culprit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} {}; ", self.rank, self.verdict)?;
        match (&self.verdict, &self.last_call) {
            (Verdict::Silent, _) => write!(f, "others were in step {}", self.step),
            (_, Some(call)) => write!(f, "it was in step {}, its last call was {call}", self.step),
            (_, None) => write!(f, "it was in step {}, its last call is not known", self.step),
        }
    }
}

impl Diagnosis {
    /// Who waits, those in the same call for the same ranks in one line.
    pub fn waiting_lines(&self) -> Vec<String> {
        waiting_lines(&self.waiting)
    }
}
