//! Calls between MPI ranks: matched by headers, progressed by whoever holds the lock.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;
use unisono_mesh::LinkClass;

use super::calls::{Active, Side, key_of};
use super::cores::enough_for_all;
use super::groups::{Clash, Groups};
use super::incoming::{Frame, Incoming, Place, Pool, Stream};
use super::neighbour::Neighbour;
use super::outgoing::{BOTH_WAYS_BYTES, Block, Held, blocks, chunks};
use super::ranks::MpiOptions;
use super::raw::{Channel, Completed, Library, Memory, Requests, TAGS};
use super::verdict::{CERTAIN, Verdict};
use super::wire::{CONTROL_BYTES, Header, INLINE_BYTES, Key, Message, fingerprint};
use crate::error::{CallSite, Cause, CommError, Failure, Waiting};
use crate::flight::FlightRecorder;
use crate::part::Piece;
use crate::transport::{Call, CallKey, Done, GroupId};

/// How long the headers of a call that do not match are waited for before somebody is blamed by those that have come.
const GATHER_EVIDENCE: Duration = Duration::from_secs(1);

/// A rank that waits sees so often whether it has come before it sees what else is due, such as a rank's death: a look at the clock
/// takes as long as one at messages.
const LOOKS: u32 = 32;

/// How often a rank says that it gets on with work that it does alone, at most.
const BEAT: Duration = Duration::from_millis(250);

/// So many buckets of a sum are asked for ahead where a rank is on another node, if they are of one rank; of several,
/// fewer. A question stands in line behind all that this rank is itself sending there, so the next bucket must be asked for long
/// before the last has arrived. Inside a node it need not, and few buckets stay in the cache.
const AHEAD: usize = 32;

/// This process's side of the job.
pub(super) struct Engine {
    pub rank: usize,
    pub size: usize,
    pub nodes: Vec<usize>,
    pub version: String,
    pub options: MpiOptions,
    pub recorder: FlightRecorder,
    pub step: AtomicU64,
    /// Sums are the library's, for benchmarks.
    pub native_sums: AtomicBool,
    /// The rank's own thread polls, so nobody else needs to.
    pub waits: AtomicBool,
    /// The process was told to end: others are told so, too, and their ends say nothing.
    pub ending: AtomicBool,
    /// The library has returned an error: what this rank fails with may be another one's death.
    pub library_failed: AtomicBool,
    /// There is a verdict.
    pub failed: AtomicBool,
    /// How often others have said that they get on.
    pub beats: AtomicU64,
    state: Mutex<State>,
}

/// What a request was for.
pub(super) enum Purpose {
    Inbox,
    Control,
    Send(Key),
    Frame { key: Key, member: usize, range: Range<usize> },
}

/// Everything under the lock.
pub(super) struct State {
    pub library: Library,
    requests: Requests<Purpose>,
    sides: FxHashMap<Key, Side>,
    tickets: FxHashMap<u64, Key>,
    next_ticket: u64,
    /// Headers of calls that this rank has not started.
    early: FxHashMap<Key, Vec<(usize, Header)>>,
    groups: Groups,
    /// Step, number, kind and group of the last call that each rank told of.
    last: Vec<Option<(u64, u64, String, u64)>>,
    next_tag: Vec<u32>,
    gone: Vec<bool>,
    conflict: Option<(Key, Instant)>,
    waiting: Option<Key>,
    pool: Pool,
    neighbour: Option<Neighbour>,
    /// How often something has come.
    pub heard: u64,
    /// Looks at what has come since the last one at what else may be due.
    looks: u32,
    pub verdict: Verdict,
    /// Another rank tells people why the job has failed.
    pub said: bool,
    /// When this rank last said that it gets on.
    beaten: Option<Instant>,
}

impl Engine {
    pub fn new(library: Library, options: MpiOptions) -> Result<Self, CommError> {
        let (rank, size) = (library.rank, library.size);
        let (nodes, version) = (library.nodes.clone(), library.version.clone());
        let neighbour = Neighbour::of(rank, &nodes, &library.processes);
        let mut state = State {
            library,
            requests: Requests::new(),
            sides: FxHashMap::default(),
            tickets: FxHashMap::default(),
            next_ticket: 0,
            early: FxHashMap::default(),
            groups: Groups::new(options.named_ranks),
            last: vec![None; size],
            next_tag: vec![0; size],
            gone: vec![false; size],
            conflict: None,
            waiting: None,
            pool: Pool::default(),
            neighbour,
            heard: 0,
            looks: 0,
            verdict: Verdict::default(),
            said: false,
            beaten: None,
        };
        for _ in 0..(2 * size).clamp(4, 64) {
            state.listen(vec![0; CONTROL_BYTES])?;
        }
        Ok(Self {
            rank,
            size,
            nodes,
            version,
            options,
            recorder: FlightRecorder::default(),
            step: AtomicU64::new(0),
            native_sums: AtomicBool::new(false),
            waits: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            library_failed: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            beats: AtomicU64::new(0),
            state: Mutex::new(state),
        })
    }

    /// A rank that panicked while it held the lock fails the job anyway.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn link(&self, rank: usize) -> LinkClass {
        LinkClass::between(self.rank, rank, &self.nodes)
    }

    /// A failure of this rank, as it stands.
    pub fn failure(&self, cause: Cause) -> Failure {
        let step = self.step.load(Ordering::Relaxed);
        Failure {
            rank: self.rank,
            step,
            call: self.recorder.last(),
            cause,
            waiting: Vec::new(),
            flights: Vec::new(),
        }
    }
}

impl State {
    fn listen(&mut self, buffer: Vec<u8>) -> Result<(), CommError> {
        let len = buffer.len();
        let any = (Channel::Control, None, 0);
        self.requests.receive(&self.library, any, Memory::Bytes(buffer), 0..len, Purpose::Inbox)
    }

    /// Sends a message to a rank.
    pub fn tell(&mut self, rank: usize, message: &Message) -> Result<(), CommError> {
        let bytes = message.encode();
        let len = bytes.len();
        let to = (Channel::Control, rank, 0);
        self.requests.send(&self.library, to, Memory::Bytes(bytes), 0..len, Purpose::Control)
    }

    /// Sends a message to all other ranks.
    pub fn tell_all(&mut self, message: &Message) -> Result<(), CommError> {
        let me = self.library.rank;
        (0..self.library.size).filter(|&rank| rank != me).try_for_each(|rank| self.tell(rank, message))
    }

    /// Finds the group of this name and these members, or opens it.
    pub fn open_group(
        &mut self,
        engine: &Engine,
        name: &str,
        members: &[usize],
    ) -> Result<GroupId, CommError> {
        self.verdict.check()?;
        if let Some(id) = self.groups.find(name, members) {
            return Ok(id);
        }
        let (id, told, clash) = self.groups.open(engine.rank, name, members);
        // The next call of this rank comes back with the verdict.
        self.report_clash(engine, clash);
        let told = Message::Group(told);
        members
            .iter()
            .filter(|&&member| member != engine.rank)
            .try_for_each(|&rank| self.tell(rank, &told))?;
        Ok(id)
    }

    fn report_clash(&mut self, engine: &Engine, clash: Option<Clash>) {
        if let Some(Clash { rank, detail }) = clash {
            let failure = Failure { rank, ..engine.failure(Cause::Mismatch { detail }) };
            self.report(engine, failure, 1);
        }
    }

    /// Starts a call.
    pub fn start(&mut self, engine: &Engine, mut call: Call) -> Result<u64, CommError> {
        self.verdict.check()?;
        let group = match call.key {
            CallKey::Collective { group, .. } | CallKey::Message { group, .. } => group,
        };
        let group = self.groups.fingerprint(group);
        let key = key_of(&call.key, group, call.position);
        let mut side = Side::new(&call);
        let own = std::mem::take(&mut call.sends[call.position]);
        let mut moving = [Duration::ZERO; 3];
        let members = side.members.len();
        let mut sends_left = 0;
        let mut held: Vec<Option<Held>> = (0..members).map(|_| None).collect();
        // Each rank begins with its neighbour, so that not all send to the same one first.
        for turn in 1..members {
            let member = (call.position + turn) % members;
            if side.talks_to(member) {
                let to = key_of(&call.key, group, member);
                let pieces = std::mem::take(&mut call.sends[member]);
                let (messages, waits) = self.post(engine, &side, (key, to), member, pieces, &mut moving)?;
                sends_left += messages;
                held[member] = waits;
            }
        }
        let begin = Instant::now();
        let far = side.members.iter().any(|&rank| engine.link(rank) == LinkClass::OtherNode);
        let ahead_bytes = if far { engine.options.bucket_bytes.saturating_mul(AHEAD) } else { 0 };
        let mut incoming = Incoming::new(call.landing, call.position, &own, ahead_bytes);
        incoming.sum_up(&mut self.pool);
        moving[LinkClass::SameRank as usize] += begin.elapsed();
        let streams = (0..members).map(|_| Stream::default()).collect();
        side.active = Some(Active { incoming, streams, held, sends_left, moving, given_up: false });
        self.sides.insert(key, side);
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.tickets.insert(ticket, key);
        for (source, header) in self.early.remove(&key).unwrap_or_default() {
            self.meet(engine, source, header)?;
        }
        Ok(ticket)
    }

    /// Sends a member its header, and its payload unless that has to wait for the member's own header. Returns how many
    /// messages of payload there are, and what waits.
    fn post(
        &mut self,
        engine: &Engine,
        side: &Side,
        (key, to): (Key, Key),
        member: usize,
        pieces: Vec<Piece>,
        moving: &mut [Duration; 3],
    ) -> Result<(usize, Option<Held>), CommError> {
        let rank = side.members[member];
        let (sent, begin) = (side.bytes[member], Instant::now());
        let mut header = Header {
            key: to,
            position: side.position as u32,
            step: side.site.step,
            kind: side.site.kind.to_string(),
            element: side.element.to_owned(),
            sent,
            expected: side.expects[member],
            pieces: fingerprint(pieces.iter().map(|piece| piece.len() as u64)),
            first_tag: self.next_tag[rank],
            blocks: Vec::new(),
            payload: Vec::new(),
        };
        if sent <= INLINE_BYTES.min(engine.options.chunk_bytes) as u64 {
            header.payload = pieces.iter().map(Piece::bytes).collect::<Vec<_>>().concat();
            self.tell(rank, &Message::Call(header))?;
            return Ok((0, None));
        }
        let blocks = blocks(pieces);
        header.blocks = blocks.iter().map(|block| block.len() as u64).collect();
        moving[engine.link(rank) as usize] += begin.elapsed();
        let first_tag = header.first_tag;
        let messages: usize =
            blocks.iter().map(|block| chunks(block.len(), engine.options.chunk_bytes).count()).sum();
        self.next_tag[rank] = tag_after(first_tag, messages);
        self.tell(rank, &Message::Call(header))?;
        let held = Held { blocks, first_tag };
        let expected = side.expects[member];
        if engine.link(rank) == LinkClass::OtherNode && sent.min(expected) > BOTH_WAYS_BYTES {
            return Ok((messages, Some(held)));
        }
        self.send_payload(engine, key, rank, held)?;
        Ok((messages, None))
    }

    /// Sends what was announced.
    fn send_payload(
        &mut self,
        engine: &Engine,
        key: Key,
        rank: usize,
        Held { blocks, first_tag: mut tag }: Held,
    ) -> Result<(), CommError> {
        for block in blocks {
            for range in chunks(block.len(), engine.options.chunk_bytes) {
                let memory = match &block {
                    Block::Piece(piece) => Memory::Piece(piece.clone()),
                    Block::Packed(bytes) => Memory::Bytes(bytes[range.clone()].to_vec()),
                };
                let range = if matches!(memory, Memory::Bytes(_)) { 0..range.len() } else { range };
                let to = (Channel::Data, rank, tag);
                self.requests.send(&self.library, to, memory, range, Purpose::Send(key))?;
                tag = tag_after(tag, 1);
            }
        }
        Ok(())
    }

    /// A header has come for a call of this rank.
    fn meet(&mut self, engine: &Engine, source: usize, header: Header) -> Result<(), CommError> {
        let key = header.key;
        let Some(side) = self.sides.get_mut(&key) else {
            self.early.entry(key).or_default().push((source, header));
            return Ok(());
        };
        let member = header.position as usize;
        if side.members.get(member) != Some(&source) {
            let text = format!("rank {source} says it is member {member} of {}", side.site);
            return Err(CommError::Transport(text));
        }
        let disagrees = side.disagrees(&header, member).is_some();
        if disagrees && !side.conflict {
            side.conflict = true;
            self.conflict.get_or_insert((key, Instant::now() + GATHER_EVIDENCE));
        }
        if let (false, Some(active)) = (disagrees, &mut side.active) {
            if header.payload.is_empty() {
                active.streams[member] = stream_of(&header, engine.options.chunk_bytes);
            } else {
                let (begin, range) = (Instant::now(), 0..header.payload.len());
                active.incoming.scatter(member, &range, &header.payload, &mut self.pool);
                active.incoming.arrived(member, &range);
                active.moving[engine.link(source) as usize] += begin.elapsed();
            }
        }
        let held = side.active.as_mut().filter(|_| !disagrees).and_then(|active| active.held[member].take());
        side.headers[member] = Some(Header { blocks: Vec::new(), payload: Vec::new(), ..header });
        // Before a place is named for the member's payload, see `Held`.
        if let Some(held) = held {
            self.send_payload(engine, key, source, held)?;
        }
        self.go_on(engine, key)
    }

    /// Sums what is complete, receives what has a place now, and lets go what is done.
    fn go_on(&mut self, engine: &Engine, key: Key) -> Result<(), CommError> {
        let Some(side) = self.sides.get_mut(&key) else { return Ok(()) };
        if let (Some(active), false) = (&mut side.active, side.conflict) {
            let farthest = side.members.iter().map(|&rank| engine.link(rank)).max();
            let farthest = farthest.unwrap_or(LinkClass::SameRank) as usize;
            active.moving[farthest] += active.incoming.sum_up(&mut self.pool);
            let Active { incoming, streams, .. } = active;
            for (member, stream) in streams.iter_mut().enumerate() {
                while let Some((frame, place)) = incoming.next_frame(member, stream, &mut self.pool) {
                    let (memory, place) = match place {
                        Place::Direct(target, range) => (Memory::Target(target), range),
                        Place::Aside(bytes) => (Memory::Bytes(bytes), 0..frame.range.len()),
                    };
                    let from = (Channel::Data, Some(side.members[member]), frame.tag);
                    let purpose = Purpose::Frame { key, member, range: frame.range };
                    self.requests.receive(&self.library, from, memory, place, purpose)?;
                }
            }
        }
        if side.active.as_ref().is_some_and(|active| active.given_up) && side.complete() {
            side.active = None;
        }
        if side.active.is_none() && side.all_told() {
            self.sides.remove(&key);
        }
        Ok(())
    }

    /// Lets MPI work, and deals with what has come. Returns whether anything has.
    pub fn progress(&mut self, engine: &Engine) -> Result<bool, CommError> {
        let completed = self.requests.poll()?;
        let any = !completed.is_empty();
        self.heard += u64::from(any);
        for done in completed {
            self.completed(engine, done)?;
        }
        // A rank that waits looks all the time, the other thread once in a while.
        self.looks += 1;
        if self.looks >= LOOKS || !engine.waits.load(Ordering::Relaxed) {
            self.looks = 0;
            self.tend(engine)?;
        }
        Ok(any)
    }

    /// Whether every rank of this node has a core: looking again and again costs nobody anything.
    pub fn has_cores_for_all(&self) -> bool {
        let Library { rank, nodes, cores, .. } = &self.library;
        let here = cores.iter().zip(nodes).filter(|(_, node)| **node == nodes[*rank]);
        enough_for_all(&cores[*rank], here.map(|(cores, _)| cores))
    }

    fn completed(&mut self, engine: &Engine, done: Completed<Purpose>) -> Result<(), CommError> {
        match (done.of, done.memory) {
            (Purpose::Inbox, Memory::Bytes(buffer)) => {
                let message = Message::decode(&buffer[..done.bytes.min(buffer.len())])?;
                // First: what it announces may be on its way, and others listen, too.
                self.hear(engine, done.source, message)?;
                self.listen(buffer)
            }
            (Purpose::Send(key), memory) => {
                drop(memory);
                if let Some(active) = self.sides.get_mut(&key).and_then(|side| side.active.as_mut()) {
                    active.sends_left -= 1;
                }
                self.go_on(engine, key)
            }
            (Purpose::Frame { key, member, range }, memory) => {
                let source = done.source;
                if done.bytes != range.len() {
                    let (got, wanted) = (done.bytes, range.len());
                    let text = format!("rank {source} sent {got} bytes where it had announced {wanted}");
                    return Err(CommError::Transport(text));
                }
                if let Some(active) = self.sides.get_mut(&key).and_then(|side| side.active.as_mut()) {
                    if let Memory::Bytes(bytes) = &memory {
                        let begin = Instant::now();
                        active.incoming.scatter(member, &range, bytes, &mut self.pool);
                        active.moving[engine.link(source) as usize] += begin.elapsed();
                    }
                    drop(memory);
                    active.incoming.arrived(member, &range);
                }
                self.go_on(engine, key)
            }
            (Purpose::Inbox | Purpose::Control, _) => Ok(()),
        }
    }

    fn hear(&mut self, engine: &Engine, source: usize, message: Message) -> Result<(), CommError> {
        match message {
            Message::Call(header) => {
                self.last[source] =
                    Some((header.step, header.key.seq, header.kind.clone(), header.key.group));
                self.meet(engine, source, header)
            }
            Message::Group(told) => {
                let clash = self.groups.hear(source, told);
                self.report_clash(engine, clash);
                Ok(())
            }
            Message::Report { failure, weight } => {
                self.verdict.report(failure, weight, true, Instant::now());
                Ok(())
            }
            Message::Verdict(failure) => {
                self.settle(engine, failure);
                Ok(())
            }
            Message::Said => {
                self.said = true;
                Ok(())
            }
            Message::Bye => {
                self.gone[source] = true;
                Ok(())
            }
            Message::Beat => {
                engine.beats.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
        }
    }

    /// Says that something has failed, if nobody has before.
    pub fn report(&mut self, engine: &Engine, mut failure: Failure, weight: u32) {
        if self.verdict.failure().is_some() || (self.verdict.has_report() && weight < CERTAIN) {
            return;
        }
        self.add_what_is_known(engine, &mut failure);
        self.accuse(engine, failure, weight);
    }

    /// Who waits here, and what the culprit did last.
    fn add_what_is_known(&self, engine: &Engine, failure: &mut Failure) {
        failure.waiting.extend(self.waits(engine.rank));
        self.add_last_call(engine, failure);
    }

    /// What the culprit did last, as far as it has told this rank.
    pub fn add_last_call(&self, engine: &Engine, failure: &mut Failure) {
        if failure.rank != engine.rank {
            let last = self.last[failure.rank].clone();
            failure.step = last.as_ref().map_or(failure.step, |(step, ..)| *step);
            failure.call = last.map(|(step, seq, kind, group)| {
                let group = self.groups.name_of(group).unwrap_or("?").into();
                CallSite { step, seq, kind: kind.into(), group }
            });
        }
    }

    /// Takes the verdict, with this rank's calls as they are: soon those that wait end with an error.
    fn settle(&mut self, engine: &Engine, mut failure: Failure) {
        failure.flights = vec![Vec::new(); engine.size];
        failure.flights[engine.rank] = engine.recorder.entries();
        self.verdict.settle(failure);
        engine.failed.store(true, Ordering::Relaxed);
    }

    /// Ends the job on all ranks if the watched rank has died. No other verdict is waited for: rank 0 may be the dead one.
    fn look_at_neighbour(&mut self, engine: &Engine) -> Result<(), CommError> {
        let Some(neighbour) = &mut self.neighbour else { return Ok(()) };
        let rank = neighbour.rank;
        let expected = self.gone[rank] || engine.ending.load(Ordering::Relaxed);
        if !neighbour.has_died(Instant::now()) || expected || self.verdict.failure().is_some() {
            return Ok(());
        }
        let mut failure = Failure { rank, ..engine.failure(Cause::Died) };
        self.add_what_is_known(engine, &mut failure);
        self.settle(engine, failure.clone());
        self.tell_all(&Message::Verdict(failure))
    }

    /// Whether it was this rank that found another one dead.
    pub fn is_witness(&self) -> bool {
        self.neighbour.as_ref().is_some_and(Neighbour::was_found_dead)
    }

    /// Tells the others that this rank gets on with work that it does alone, unless it just has.
    pub fn beat(&mut self) {
        if self.beaten.is_none_or(|when| when.elapsed() >= BEAT) {
            self.beaten = Some(Instant::now());
            // An error comes up again in the rank's next call.
            let _ = self.tell_all(&Message::Beat);
        }
    }

    /// Says who has not said goodbye for too long.
    pub fn report_staying(&mut self, engine: &Engine, waited: Duration) {
        let staying = self.staying();
        let Some(&rank) = staying.first() else { return };
        let others: Vec<String> = staying[1..].iter().map(|rank| format!("; nor has rank {rank}")).collect();
        let detail = format!(
            "has not left the job, which has ended: it is stopped, it died or it still works{}",
            others.concat()
        );
        let cause = Cause::Stalled { waited_s: Some(waited.as_secs_f64()), detail };
        self.report(engine, Failure { rank, ..engine.failure(cause) }, 1);
    }

    /// Brings a failure before rank 0.
    pub fn accuse(&mut self, engine: &Engine, failure: Failure, weight: u32) {
        let decides = engine.rank == 0;
        if !decides {
            // If this fails, too, the rank's own report stands when the time is over.
            let _ = self.tell(0, &Message::Report { failure: failure.clone(), weight });
        }
        self.verdict.report(failure, weight, decides, Instant::now());
    }

    /// The call this rank waits in, and for whom.
    pub fn waits(&self, rank: usize) -> Option<Waiting> {
        let side = self.sides.get(self.waiting.as_ref()?)?;
        let for_ranks = side.missing().into_iter().map(|member| side.members[member]).collect();
        Some(Waiting { rank, call: side.site.clone(), for_ranks })
    }

    /// What is due: blame, verdicts, ranks that are gone.
    fn tend(&mut self, engine: &Engine) -> Result<(), CommError> {
        self.look_at_neighbour(engine)?;
        if self.conflict.is_none() && !self.verdict.has_report() && !self.gone.contains(&true) {
            return Ok(());
        }
        let now = Instant::now();
        if let Some((key, due)) = self.conflict
            && (now >= due || self.sides.get(&key).is_none_or(Side::all_told))
        {
            self.conflict = None;
            if let Some((rank, detail, weight)) = self.sides.get(&key).and_then(Side::judge) {
                let failure = Failure { rank, ..engine.failure(Cause::Mismatch { detail }) };
                self.report(engine, failure, weight);
            }
        }
        if let Some(waiting) = self.waits(engine.rank)
            && let Some(&absent) = waiting.for_ranks.iter().find(|&&rank| self.gone[rank])
            && self.waiting.is_some_and(|key| self.sides.get(&key).is_some_and(|side| side.silent(absent)))
        {
            let failure = Failure { rank: absent, ..engine.failure(Cause::ReturnedEarly) };
            self.report(engine, failure, 1);
        }
        if let Some(failure) = self.verdict.decide(now)
            && engine.rank == 0
        {
            self.tell_all(&Message::Verdict(Failure::clone(&failure)))?;
        }
        Ok(())
    }

    /// Says which call the rank's own thread waits in.
    pub fn wait_in(&mut self, ticket: Option<u64>) {
        self.waiting = ticket.and_then(|ticket| self.tickets.get(&ticket).copied());
    }

    /// The call, if it is complete.
    pub fn take(&mut self, ticket: u64) -> Result<Option<Done>, CommError> {
        self.verdict.check()?;
        let unknown = || CommError::Transport("a call that was not started cannot be finished".into());
        let key = *self.tickets.get(&ticket).ok_or_else(unknown)?;
        let side = self.sides.get_mut(&key).ok_or_else(unknown)?;
        if !side.complete() {
            return Ok(None);
        }
        self.tickets.remove(&ticket);
        let active = side.active.take().ok_or_else(unknown)?;
        if side.all_told() {
            self.sides.remove(&key);
        }
        let landing = active.incoming.into_landing();
        let landing = landing.ok_or_else(|| CommError::Transport("a landing is still in use".into()))?;
        Ok(Some(Done { landing, wait: Duration::ZERO, moving: active.moving }))
    }

    /// Gives a call up: what is under way goes on, and is let go when it is done.
    pub fn cancel(&mut self, engine: &Engine, ticket: u64) {
        let Some(key) = self.tickets.remove(&ticket) else { return };
        if let Some(active) = self.sides.get_mut(&key).and_then(|side| side.active.as_mut()) {
            active.given_up = true;
        }
        // What goes wrong here comes up again in the next call.
        let _ = self.go_on(engine, key);
    }

    /// Whether calls are under way.
    pub fn is_busy(&self) -> bool {
        !self.tickets.is_empty()
    }

    /// The ranks that have not said goodbye.
    pub fn staying(&self) -> Vec<usize> {
        (0..self.library.size).filter(|&rank| rank != self.library.rank && !self.gone[rank]).collect()
    }

    /// Whether all other ranks have said goodbye and everything is sent.
    pub fn all_gone(&self) -> bool {
        self.staying().is_empty() && self.requests.len() == self.inbox()
    }

    fn inbox(&self) -> usize {
        (2 * self.library.size).clamp(4, 64)
    }

    /// Finalises MPI; all ranks do.
    pub fn finalise(&mut self) {
        self.requests.cancel();
        self.library.finalise();
    }
}

/// The tag that follows `messages` later.
fn tag_after(tag: u32, messages: usize) -> u32 {
    ((u64::from(tag) + messages as u64) % u64::from(TAGS)) as u32
}

fn stream_of(header: &Header, chunk_bytes: usize) -> Stream {
    let (mut start, mut tag) = (0, header.first_tag);
    let mut frames = Vec::new();
    for &len in &header.blocks {
        for chunk in chunks(len as usize, chunk_bytes) {
            frames.push(Frame { range: start + chunk.start..start + chunk.end, tag });
            tag = tag_after(tag, 1);
        }
        start += len as usize;
    }
    Stream::new(frames)
}
