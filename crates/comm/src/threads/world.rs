//! What the ranks of one process share: boards, who waits for what, and the first failure.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::board::Board;
use super::{Meanwhile, PretendedLink};
use crate::error::{Cause, CommError, Failure, FirstOf, Waiting};
use crate::flight::FlightRecorder;
use crate::transport::{CallKey, GroupId};

/// The shared world.
pub(super) struct World {
    pub ranks: Vec<RankDesk>,
    /// The node of every rank.
    pub nodes: Vec<usize>,
    pub bucket_bytes: usize,
    pub spin: bool,
    pub jitter: Option<u64>,
    pub link: Option<PretendedLink>,
    pub meanwhile: Option<Meanwhile>,
    /// How often ranks have said that they get on.
    pub beats: AtomicU64,
    state: Mutex<State>,
}

/// What belongs to one rank and is seen by others.
#[derive(Default)]
pub(super) struct RankDesk {
    pub step: AtomicU64,
    pub recorder: FlightRecorder,
    /// Goes up whenever something the rank may wait for has happened.
    pub signal: AtomicU64,
    pub bell: Condvar,
    /// When the rank's pretended link has carried what was sent so far.
    pub link_free: Mutex<Option<Instant>>,
}

/// Everything under the world's lock.
pub(super) struct State {
    pub boards: HashMap<CallKey, Board>,
    pub ranks: Vec<RankState>,
    pub failure: Option<Arc<Failure>>,
    conflicts: Vec<CallKey>,
    groups: Vec<(String, Vec<usize>)>,
}

/// One rank under the world's lock.
#[derive(Default)]
pub(super) struct RankState {
    /// Started calls: key and position.
    pub started: Vec<(CallKey, usize)>,
    /// The call it waits in.
    pub waiting: Option<(CallKey, usize)>,
    exited: bool,
}

impl World {
    pub fn new(
        nodes: Vec<usize>,
        bucket_bytes: usize,
        spin: bool,
        jitter: Option<u64>,
        link: Option<PretendedLink>,
    ) -> Self {
        let ranks = nodes.len();
        let state = State {
            boards: HashMap::new(),
            ranks: (0..ranks).map(|_| RankState::default()).collect(),
            failure: None,
            conflicts: Vec::new(),
            groups: Vec::new(),
        };
        Self {
            ranks: (0..ranks).map(|_| RankDesk::default()).collect(),
            nodes,
            bucket_bytes,
            spin,
            jitter,
            link,
            meanwhile: None,
            beats: AtomicU64::new(0),
            state: Mutex::new(state),
        }
    }

    /// A rank that panicked while it held the lock has left nothing half done that matters: the run fails anyway.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps until the rank's signal is no longer `seen`.
    pub fn sleep<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        rank: usize,
        seen: u64,
    ) -> MutexGuard<'a, State> {
        let desk = &self.ranks[rank];
        while desk.signal.load(Ordering::Acquire) == seen {
            state = desk.bell.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    /// Tells a rank that something happened. The lock is held, so a rank cannot fall asleep in between.
    pub fn ring(&self, state: &State, rank: usize) {
        self.ranks[rank].signal.fetch_add(1, Ordering::Release);
        if state.ranks[rank].waiting.is_some() {
            self.ranks[rank].bell.notify_one();
        }
    }

    /// Finds the group of this name and these members, or opens it.
    pub fn open_group(&self, rank: usize, name: &str, members: &[usize]) -> Result<GroupId, CommError> {
        let mut state = self.lock();
        state.check()?;
        let same_name = |group: &&(String, Vec<usize>)| group.0 == name;
        let related =
            |(_, (_, other)): &(usize, &(String, Vec<usize>))| other.iter().any(|m| members.contains(m));
        let mut groups = state.groups.iter().enumerate().filter(|(_, group)| same_name(group));
        if let Some((index, (_, other))) = groups.find(related) {
            if other == members {
                // Each group takes memory, so there are never 2^32 of them.
                return Ok(GroupId(index as u32));
            }
            let detail = format!(
                "group '{name}' was opened with the world ranks {}, and rank {rank} opens it with {}",
                FirstOf::new(other),
                FirstOf::new(members)
            );
            self.fail(&mut state, rank, Cause::Mismatch { detail });
            state.check()?;
        }
        state.groups.push((name.to_owned(), members.to_vec()));
        Ok(GroupId((state.groups.len() - 1) as u32))
    }

    /// Notes that the posts of a call do not match. Judged when all are there, so that the blame is not a matter of who
    /// came first, or when nothing else can go on.
    pub fn note_conflict(&self, state: &mut State, key: &CallKey) {
        if !state.conflicts.contains(key) {
            state.conflicts.push(key.clone());
        }
        if state.boards.get(key).is_some_and(Board::all_posted) {
            self.judge(state);
        }
    }

    /// Gives up a started call of `rank`.
    pub fn cancel(&self, state: &mut State, rank: usize, key: &CallKey, position: usize) {
        forget(&mut state.ranks[rank].started, key, position);
        let Some(board) = state.boards.get_mut(key) else { return };
        let members = Arc::clone(&board.members);
        let (freed, empty) = board.cancel(position);
        if empty {
            state.boards.remove(key);
        }
        for sender in freed {
            self.ring(state, members[sender]);
        }
    }

    /// A rank's function has returned or panicked.
    pub fn exit(&self, rank: usize, cause: Option<Cause>) {
        let mut state = self.lock();
        if let Some(cause) = cause {
            self.fail(&mut state, rank, cause);
        }
        for (key, position) in std::mem::take(&mut state.ranks[rank].started) {
            self.cancel(&mut state, rank, &key, position);
        }
        state.ranks[rank].exited = true;
        self.look_for_dead_ends(&mut state);
        if state.ranks.iter().all(|rank| rank.exited) {
            self.judge(&mut state);
        }
    }

    /// Fails the run if a waiting rank can never go on.
    pub fn look_for_dead_ends(&self, state: &mut State) {
        if state.failure.is_some() {
            return;
        }
        if state.ranks.iter().any(|rank| rank.exited)
            && let Some(absent) = state.waits().iter().find_map(|wait| state.absent_member(wait))
        {
            if !self.judge(state) {
                self.fail(state, absent, Cause::ReturnedEarly);
            }
            return;
        }
        let stuck = |rank: &RankState| rank.exited || rank.waiting.is_some();
        let all_stuck =
            state.ranks.iter().all(stuck) && state.ranks.iter().any(|rank| rank.waiting.is_some());
        if all_stuck && !state.ranks.iter().any(|rank| state.can_go_on(rank)) && !self.judge(state) {
            let culprit = most_awaited(&state.waits(), state.ranks.len());
            self.fail(state, culprit, Cause::Deadlock);
        }
    }

    /// Fails the run for the first calls that do not match, if there are any.
    fn judge(&self, state: &mut State) -> bool {
        let verdict = state.conflicts.iter().find_map(|key| {
            let board = state.boards.get(key)?;
            let (position, detail) = board.judge()?;
            Some((board.members[position], detail))
        });
        if let Some((culprit, detail)) = verdict {
            self.fail(state, culprit, Cause::Mismatch { detail });
            return true;
        }
        false
    }

    /// Records the first failure and wakes everybody; later ones are consequences.
    pub fn fail(&self, state: &mut State, rank: usize, cause: Cause) {
        if state.failure.is_some() {
            return;
        }
        let desk = &self.ranks[rank];
        let failure = Arc::new(Failure {
            rank,
            step: desk.step.load(Ordering::Relaxed),
            call: desk.recorder.last(),
            cause,
            waiting: state.waits(),
            flights: self.ranks.iter().map(|desk| desk.recorder.entries()).collect(),
        });
        self.end(state, failure);
    }

    /// Ends the run with a failure, unless it has failed already.
    pub fn end(&self, state: &mut State, failure: Arc<Failure>) {
        if state.failure.is_some() {
            return;
        }
        state.failure = Some(failure);
        for desk in &self.ranks {
            desk.signal.fetch_add(1, Ordering::Release);
            desk.bell.notify_all();
        }
    }
}

impl State {
    pub fn check(&self) -> Result<(), CommError> {
        match &self.failure {
            Some(failure) => Err(CommError::Failed(Arc::clone(failure))),
            None => Ok(()),
        }
    }

    pub fn board(&mut self, key: &CallKey, members: &Arc<[usize]>) -> &mut Board {
        match self.boards.entry(key.clone()) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(Board::new(Arc::clone(members))),
        }
    }

    /// Ends a finished call of a rank. What is returned is let go without the lock.
    pub fn leave(&mut self, rank: usize, key: &CallKey, position: usize) -> impl Sized + use<> {
        forget(&mut self.ranks[rank].started, key, position);
        let (sends, empty) = self.boards.get_mut(key).map_or((None, false), |board| board.leave(position));
        (sends, if empty { self.boards.remove(key) } else { None })
    }

    fn waits(&self) -> Vec<Waiting> {
        let describe = |(rank, state): (usize, &RankState)| {
            let (key, position) = state.waiting.as_ref()?;
            let board = self.boards.get(key)?;
            let for_ranks: Vec<usize> =
                board.missing(*position).into_iter().map(|p| board.members[p]).collect();
            // A rank that could go on has only not woken up yet.
            let call = board.site(*position)?.clone();
            (!for_ranks.is_empty()).then_some(Waiting { rank, call, for_ranks })
        };
        self.ranks.iter().enumerate().filter_map(describe).collect()
    }

    /// A rank that has exited without making the call another one waits in.
    fn absent_member(&self, wait: &Waiting) -> Option<usize> {
        let (key, position) = self.ranks[wait.rank].waiting.as_ref()?;
        let board = self.boards.get(key)?;
        let gone = |p: &usize| self.ranks[board.members[*p]].exited && !board.has_posted(*p);
        board.missing(*position).into_iter().find(gone).map(|p| board.members[p])
    }

    fn can_go_on(&self, rank: &RankState) -> bool {
        let board_of = |key| self.boards.get(key);
        rank.waiting.as_ref().is_some_and(|(key, p)| board_of(key).is_some_and(|board| board.complete(*p)))
            || rank
                .started
                .iter()
                .any(|(key, p)| board_of(key).is_some_and(|board| !board.ready(*p, None).is_empty()))
    }
}

fn forget(started: &mut Vec<(CallKey, usize)>, key: &CallKey, position: usize) {
    started.retain(|(other, p)| other != key || *p != position);
}

fn most_awaited(waits: &[Waiting], ranks: usize) -> usize {
    let mut counts = vec![0usize; ranks];
    for rank in waits.iter().flat_map(|wait| &wait.for_ranks) {
        counts[*rank] += 1;
    }
    // The lowest of equals.
    (0..ranks).rev().max_by_key(|&rank| counts[rank]).unwrap_or(0)
}
