//! Ranks as threads of one process, which read each other's send buffers where they are.

mod board;
mod launch;
mod world;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

pub use launch::{ThreadRanks, run_ranks};
use unisono_mesh::LinkClass;

use crate::copying::copy_stream;
use crate::error::{Cause, CommError, Failure};
use crate::flight::FlightRecorder;
use crate::transport::{Call, CallKey, Done, GroupId, Landing, Ticket, Transport, Workers, alone};
use board::{Post, Sends};
use world::World;

/// How long a rank looks for news before it sleeps, where every rank has a core.
const SPIN: Duration = Duration::from_micros(200);
/// The same where it has something to do meanwhile: others lend it work again after a moment.
const PATIENCE: Duration = Duration::from_millis(5);

/// What a rank does while it waits.
#[derive(Clone)]
struct Meanwhile(Arc<dyn Fn(usize) -> bool + Send + Sync>);

impl std::fmt::Debug for Meanwhile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Meanwhile")
    }
}

/// A network between pretended nodes, for measurements. What a call sends to another node arrives when a rank's own link
/// of this speed has carried it, one call after the other, whatever the ranks do meanwhile.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PretendedLink {
    /// Bytes a second of each rank's link.
    pub bytes_per_s: f64,
    /// The kinds of calls that take it; others arrive at once.
    pub kinds: &'static [&'static str],
}

/// One thread rank's side of the world.
struct ThreadTransport {
    world: Arc<World>,
    rank: usize,
    started: Mutex<VecDeque<Started>>,
    tickets: AtomicU64,
    random: AtomicU64,
    /// The rank's threads.
    workers: OnceLock<Arc<Workers>>,
}

/// A started call of this rank.
struct Started {
    ticket: Ticket,
    key: CallKey,
    position: usize,
    members: Arc<[usize]>,
    landing: Landing,
    wait: Duration,
    moving: [Duration; 3],
}

/// What came of a look at the started calls.
enum Look {
    Complete(usize),
    WentOn,
    /// Something for the awaited call is on its way for so long.
    Arriving(usize, Duration),
    Stuck,
}

impl ThreadTransport {
    fn new(world: Arc<World>, rank: usize) -> Self {
        let seed = world.jitter.unwrap_or(0);
        Self {
            world,
            rank,
            started: Mutex::default(),
            tickets: AtomicU64::new(0),
            random: AtomicU64::new(seed ^ (rank as u64 + 1).wrapping_mul(0xA076_1D64_78BD_642F)),
            workers: OnceLock::new(),
        }
    }

    /// Looks once: first at the awaited call, then, if nothing can be done there, at the others in start order. A call that
    /// is complete is left.
    fn look(&self, started: &mut VecDeque<Started>, ticket: Ticket) -> Result<Look, CommError> {
        let Some(awaited) = started.iter().position(|call| call.ticket == ticket) else {
            return Err(CommError::Transport("a call that was not started cannot be finished".into()));
        };
        let mut order = std::iter::once(awaited).chain((0..started.len()).filter(|&i| i != awaited));
        let now = Instant::now();
        let (index, ready) = {
            let mut state = self.world.lock();
            state.check()?;
            let Started { key, position, .. } = &started[awaited];
            if state.boards.get(key).is_some_and(|board| board.complete(*position)) {
                let left = state.leave(self.rank, key, *position);
                drop(state);
                drop(left);
                return Ok(Look::Complete(awaited));
            }
            let board_of = |i: usize| state.boards.get(&started[i].key);
            let next = order.find_map(|i| {
                let ready = board_of(i)?.ready(started[i].position, Some(now));
                (!ready.is_empty()).then_some((i, ready))
            });
            match next {
                Some(next) => next,
                None => {
                    let position = started[awaited].position;
                    let arrival = board_of(awaited).and_then(|board| board.next_arrival(position, now));
                    return Ok(arrival.map_or(Look::Stuck, |when| Look::Arriving(awaited, when - now)));
                }
            }
        };
        let ready = self.disturb(ready, &started[index].landing);
        self.land(&mut started[index], ready)?;
        Ok(Look::WentOn)
    }

    /// Moves what is ready to where it lands, and tells the senders.
    fn land(&self, call: &mut Started, ready: Vec<(usize, Arc<Sends>)>) -> Result<(), CommError> {
        let from: Vec<usize> = ready.iter().map(|(peer, _)| *peer).collect();
        let me = call.position;
        let workers: &Workers = self.workers.get().map_or(&alone, |workers| &**workers);
        match &mut call.landing {
            Landing::Copy { buffer, ranges } => {
                let target = buffer.bytes_mut();
                for (peer, sends) in &ready {
                    let begin = Instant::now();
                    let pieces = sends[me].iter().map(|piece| piece.bytes());
                    copy_stream(pieces, target, &ranges[*peer], workers);
                    call.moving[self.link(call.members[*peer]) as usize] += begin.elapsed();
                }
            }
            Landing::Combine { sum, pieces } => {
                let begin = Instant::now();
                let mut received: Vec<Vec<&[u8]>> = vec![Vec::new(); call.members.len()];
                for (peer, sends) in &ready {
                    received[*peer] = sends[me].iter().map(|piece| piece.bytes()).collect();
                }
                if let Some(peer) = cut_otherwise(pieces, &received) {
                    let detail = format!(
                        "rank {} sends rank {} pieces of other lengths than it expects: their plans differ",
                        call.members[peer], self.rank
                    );
                    let mut state = self.world.lock();
                    self.world.fail(&mut state, call.members[peer], Cause::Mismatch { detail });
                    return state.check();
                }
                for (bucket, members) in pieces.iter().enumerate() {
                    let take = |(list, lens): (&mut Vec<_>, &Vec<usize>)| list.drain(..lens.len()).collect();
                    let bucket_pieces: Vec<Vec<&[u8]>> = received.iter_mut().zip(members).map(take).collect();
                    sum.combine(bucket, &bucket_pieces, workers);
                }
                let links = from.iter().map(|&peer| self.link(call.members[peer]));
                call.moving[links.max().unwrap_or(LinkClass::SameRank) as usize] += begin.elapsed();
            }
        }
        // The senders get their buffers back, so no clone may outlive the note that all was taken.
        drop(ready);
        let mut state = self.world.lock();
        let Some(board) = state.boards.get_mut(&call.key) else { return state.check() };
        let emptied: Vec<usize> = from.into_iter().filter(|&peer| board.take(peer, me)).collect();
        for peer in emptied {
            self.world.ring(&state, call.members[peer]);
        }
        Ok(())
    }

    /// Waits until something may have changed since the signal was `seen`.
    fn wait(&self, call: &mut Started, seen: u64) {
        let begin = Instant::now();
        let desk = &self.world.ranks[self.rank];
        if self.world.spin {
            let (limit, meanwhile) = match &self.world.meanwhile {
                Some(Meanwhile(work)) => (PATIENCE, Some(work)),
                None => (SPIN, None),
            };
            let mut idle_since = begin;
            while desk.signal.load(Ordering::Acquire) == seen && idle_since.elapsed() < limit {
                match meanwhile.is_some_and(|work| work(self.rank)) {
                    true => idle_since = Instant::now(),
                    false => std::hint::spin_loop(),
                }
            }
        }
        if desk.signal.load(Ordering::Acquire) == seen {
            let mut state = self.world.lock();
            if desk.signal.load(Ordering::Acquire) == seen {
                state.ranks[self.rank].waiting = Some((call.key.clone(), call.position));
                self.world.look_for_dead_ends(&mut state);
                state = self.world.sleep(state, self.rank, seen);
                state.ranks[self.rank].waiting = None;
            }
        }
        call.wait += begin.elapsed();
    }

    /// When what a call sends to other nodes arrives, where a link is pretended.
    fn arrivals(&self, call: &Call) -> Vec<(usize, Instant)> {
        let Some(link) = self.world.link.filter(|link| link.kinds.iter().any(|kind| call.site.kind == *kind))
        else {
            return Vec::new();
        };
        let mut free = self.world.ranks[self.rank].link_free.lock().unwrap_or_else(PoisonError::into_inner);
        let far = |to: &usize| self.link(call.members[*to]) == LinkClass::OtherNode;
        let mut when = free.unwrap_or_else(Instant::now).max(Instant::now());
        let mut arrivals = Vec::new();
        for to in (0..call.members.len()).filter(far) {
            let bytes: usize = call.sends[to].iter().map(|piece| piece.len()).sum();
            when += Duration::from_secs_f64(bytes as f64 / link.bytes_per_s);
            arrivals.push((to, when));
        }
        *free = Some(when);
        arrivals
    }

    fn link(&self, member: usize) -> LinkClass {
        LinkClass::between(self.rank, member, &self.world.nodes)
    }

    /// For tests of determinism: takes what is ready late, in another order, or only a part of it.
    fn disturb(&self, mut ready: Vec<(usize, Arc<Sends>)>, landing: &Landing) -> Vec<(usize, Arc<Sends>)> {
        if self.world.jitter.is_some() {
            self.delay();
            if matches!(landing, Landing::Copy { .. }) {
                let chosen = (self.draw() % ready.len() as u64) as usize;
                ready = vec![ready.swap_remove(chosen)];
            }
        }
        ready
    }

    /// For tests of determinism: sleeps for a random time now and then.
    fn delay(&self) {
        if self.world.jitter.is_some() && self.draw().is_multiple_of(2) {
            std::thread::sleep(Duration::from_micros(self.draw() % 300));
        }
    }

    /// SplitMix64 (Steele, Lea and Flood, 2014): enough for delays.
    fn draw(&self) -> u64 {
        let mut z = self.random.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

impl Transport for ThreadTransport {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.world.ranks.len()
    }

    fn node(&self, rank: usize) -> usize {
        self.world.nodes[rank]
    }

    fn bucket_bytes(&self) -> usize {
        self.world.bucket_bytes
    }

    fn set_workers(&self, workers: Arc<Workers>) {
        // A rank has one set of threads; a second is not needed.
        let _ = self.workers.set(workers);
    }

    fn set_step(&self, step: u64) {
        self.world.ranks[self.rank].step.store(step, Ordering::Relaxed);
    }

    fn recorder(&self) -> &FlightRecorder {
        &self.world.ranks[self.rank].recorder
    }

    fn failure(&self) -> Option<Arc<Failure>> {
        self.world.lock().failure.clone()
    }

    fn fail(&self, failure: Arc<Failure>) {
        self.world.end(&mut self.world.lock(), failure);
    }

    fn beat(&self) {
        self.world.beats.fetch_add(1, Ordering::Relaxed);
    }

    fn beats(&self) -> u64 {
        self.world.beats.load(Ordering::Relaxed)
    }

    fn open_group(&self, name: &str, members: &[usize]) -> Result<GroupId, CommError> {
        self.world.open_group(self.rank, name, members)
    }

    fn start(&self, call: Call) -> Result<Ticket, CommError> {
        self.delay();
        let (key, members, position) = (call.key.clone(), Arc::clone(&call.members), call.position);
        let meets = call.synchronise;
        let receivers: Vec<bool> = call.sends.iter().map(|list| !list.is_empty()).collect();
        let arrivals = self.arrivals(&call);
        let (post, landing) = Post::new(call);
        {
            let mut state = self.world.lock();
            state.check()?;
            let board = state.board(&key, &members);
            board.post(position, post);
            arrivals.into_iter().for_each(|(to, when)| board.delay(position, to, when));
            let conflict = board.conflict;
            state.ranks[self.rank].started.push((key.clone(), position));
            for (peer, &receives) in receivers.iter().enumerate() {
                if (receives || meets) && members[peer] != self.rank {
                    self.world.ring(&state, members[peer]);
                }
            }
            if conflict {
                self.world.note_conflict(&mut state, &key);
            }
        }
        let ticket = Ticket(self.tickets.fetch_add(1, Ordering::Relaxed));
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        started.push_back(Started {
            ticket,
            key,
            position,
            members,
            landing,
            wait: Duration::ZERO,
            moving: [Duration::ZERO; 3],
        });
        Ok(ticket)
    }

    fn finish(&self, ticket: Ticket) -> Result<Done, CommError> {
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let seen = self.world.ranks[self.rank].signal.load(Ordering::Acquire);
            match self.look(&mut started, ticket) {
                Ok(Look::WentOn) => {}
                Ok(Look::Arriving(index, time)) => {
                    std::thread::sleep(time);
                    started[index].wait += time;
                }
                Ok(Look::Stuck) => {
                    if let Some(call) = started.iter_mut().find(|call| call.ticket == ticket) {
                        self.wait(call, seen);
                    }
                }
                Ok(Look::Complete(index)) => {
                    if let Some(call) = started.remove(index) {
                        return Ok(Done { landing: call.landing, wait: call.wait, moving: call.moving });
                    }
                }
                Err(error) => {
                    started.retain(|call| call.ticket != ticket);
                    return Err(error);
                }
            }
        }
    }

    fn cancel(&self, ticket: Ticket) {
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = started.iter().position(|call| call.ticket == ticket)
            && let Some(call) = started.remove(index)
        {
            let mut state = self.world.lock();
            self.world.cancel(&mut state, self.rank, &call.key, call.position);
        }
    }
}

/// The first member whose pieces are not cut as `pieces[bucket][member]` expects.
fn cut_otherwise(pieces: &[Vec<Vec<usize>>], received: &[Vec<&[u8]>]) -> Option<usize> {
    let expected = |member: usize| pieces.iter().flat_map(move |bucket| bucket[member].iter().copied());
    (0..received.len()).find(|&member| !expected(member).eq(received[member].iter().map(|bytes| bytes.len())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Communicator;

    #[test]
    fn finished_calls_leave_nothing_behind() {
        let world = Arc::new(World::new(vec![0; 3], usize::MAX, false, None, None));
        std::thread::scope(|scope| {
            for rank in 0..3 {
                let transport = ThreadTransport::new(Arc::clone(&world), rank);
                scope.spawn(move || {
                    let comm = Communicator::over(Arc::new(transport)).unwrap();
                    for _ in 0..50 {
                        comm.barrier().unwrap();
                        comm.all_gather_values(&[rank]).unwrap();
                        comm.broadcast(1, vec![0u8; 9]).unwrap();
                        let (next, last) = ((rank + 1) % 3, (rank + 2) % 3);
                        comm.shift(next, Arc::new(vec![1u8]), last, vec![0u8], 0..1, 0).unwrap();
                    }
                });
            }
        });
        let state = world.lock();
        assert!(state.boards.is_empty());
        assert!(state.ranks.iter().all(|rank| rank.started.is_empty() && rank.waiting.is_none()));
    }
}
