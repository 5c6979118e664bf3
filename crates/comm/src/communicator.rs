//! One rank's handle on a group: the typed calls, argument checks, numbering and the ledger.

use std::any::type_name;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytemuck::Pod;
use unisono_mesh::LinkClass;

use crate::error::{CallSite, CommError};
use crate::flight::{CallState, FlightEntry, Message, wall_clock_us};
use crate::ledger::{Book, Ledger, Volume};
use crate::part::Part;
use crate::pending::{Pending, Take, disown, own};
use crate::transport::{Call, CallKey, GroupId, Landing, Piece, Transport};
use crate::watch::Pace;

/// The names of calls, as the ledger and errors show them.
pub mod kind {
    /// All ranks meet.
    pub const BARRIER: &str = "barrier";
    /// One rank's buffer to all.
    pub const BROADCAST: &str = "broadcast";
    /// Every rank's part to all.
    pub const ALL_GATHER: &str = "all_gather";
    /// Shards that have crossed between nodes, and those of the node itself, to all that want them inside it.
    pub const GATHER_IN_NODE: &str = "gather_in_node";
    /// A part from every rank to every rank.
    pub const ALL_TO_ALL: &str = "all_to_all";
    /// One rank to another.
    pub const SEND: &str = "send_recv";
    /// Sums of segments, each rank its shards.
    pub const REDUCE_SCATTER: &str = "reduce_scatter";
    /// Sums inside nodes that go before the sums between them.
    pub const REDUCE_IN_NODE: &str = "reduce_in_node";
    /// Small sums, all to all ranks.
    pub const ALL_REDUCE: &str = "all_reduce";
    /// Small values of any length from every rank to all.
    pub const VALUES: &str = "all_gather_values";
}

/// A rank's handle on a group of ranks. Cloning is cheap; clones speak for the same rank.
///
/// Ranks here are ranks *of the group*; [`Communicator::world_rank`] translates. All members must start the same
/// calls of a group in the same order; calls of different groups, and messages under different tags, are independent.
/// One thread at a time may speak for a rank: while one waits in a call, the rank counts as waiting.
#[derive(Clone)]
pub struct Communicator {
    core: Arc<Core>,
    group: Arc<Group>,
}

/// What all handles of a rank share.
pub(crate) struct Core {
    pub transport: Arc<dyn Transport>,
    book: Mutex<Book>,
    step: AtomicU64,
    groups: Mutex<HashMap<GroupId, Arc<Group>>>,
    pub pace: Mutex<Pace>,
    /// For tests: the step and kind of a call that this rank never comes to.
    pub stall: OnceLock<(u64, &'static str)>,
}

impl Core {
    pub fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The groups this rank is a member of and has opened.
    pub fn groups(&self) -> Vec<Arc<Group>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

/// What all handles of a rank on one group share.
pub(crate) struct Group {
    id: GroupId,
    pub name: Arc<str>,
    pub members: Arc<[usize]>,
    rank: usize,
    links: Vec<LinkClass>,
    pub farthest: LinkClass,
    next: AtomicU64,
    /// One more than the largest number of a collective call that this rank has started.
    pub started: AtomicU64,
    /// By (sender, receiver, tag).
    messages: Mutex<HashMap<(usize, usize, u32), u64>>,
}

/// Where a call goes, before it is a [`Call`].
struct Route {
    kind: &'static str,
    element: &'static str,
    seq: u64,
    key: CallKey,
    members: Arc<[usize]>,
    position: usize,
    synchronise: bool,
}

impl Communicator {
    /// The world communicator over a transport.
    ///
    /// # Errors
    /// If the transport cannot open the world group.
    pub fn over(transport: Arc<dyn Transport>) -> Result<Self, CommError> {
        let members: Vec<usize> = (0..transport.size()).collect();
        let core = Arc::new(Core {
            transport,
            book: Mutex::default(),
            step: AtomicU64::new(0),
            groups: Mutex::default(),
            pace: Mutex::default(),
            stall: OnceLock::new(),
        });
        Self::open(core, "world", &members)
    }

    fn open(core: Arc<Core>, name: &str, members: &[usize]) -> Result<Self, CommError> {
        let id = core.transport.open_group(name, members)?;
        let me = core.transport.rank();
        let link = |other: usize| match other {
            other if other == me => LinkClass::SameRank,
            other if core.transport.node(other) == core.transport.node(me) => LinkClass::SameNode,
            _ => LinkClass::OtherNode,
        };
        let mut groups = core.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let group = groups.entry(id).or_insert_with(|| {
            let links: Vec<LinkClass> = members.iter().map(|&member| link(member)).collect();
            Arc::new(Group {
                id,
                name: name.into(),
                members: members.into(),
                rank: members.iter().position(|&member| member == me).unwrap_or(0),
                farthest: links.iter().copied().max().unwrap_or(LinkClass::SameRank),
                links,
                next: AtomicU64::new(0),
                started: AtomicU64::new(0),
                messages: Mutex::default(),
            })
        });
        let group = Arc::clone(group);
        drop(groups);
        Ok(Self { core, group })
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// This rank's number in the group.
    pub fn rank(&self) -> usize {
        self.group.rank
    }

    /// How many ranks the group has.
    pub fn size(&self) -> usize {
        self.group.members.len()
    }

    /// The group's name; `world` for all ranks.
    pub fn name(&self) -> &str {
        &self.group.name
    }

    /// The world rank of the group's rank `rank`.
    ///
    /// # Panics
    /// If `rank` is not below [`Communicator::size`].
    pub fn world_rank(&self, rank: usize) -> usize {
        self.group.members[rank]
    }

    /// What lies between this rank and the group's rank `rank`.
    ///
    /// # Panics
    /// If `rank` is not below [`Communicator::size`].
    pub fn link(&self, rank: usize) -> LinkClass {
        self.group.links[rank]
    }

    /// The node that the group's rank `rank` is on.
    ///
    /// # Panics
    /// If `rank` is not below [`Communicator::size`].
    pub fn node(&self, rank: usize) -> usize {
        self.core.transport.node(self.world_rank(rank))
    }

    /// The node of every rank, numbered by first appearance.
    pub(crate) fn node_numbers(&self) -> Vec<usize> {
        let mut nodes: Vec<usize> = Vec::new();
        let number = |node: usize| {
            nodes.iter().position(|known| *known == node).unwrap_or_else(|| {
                nodes.push(node);
                nodes.len() - 1
            })
        };
        (0..self.size()).map(|rank| self.node(rank)).map(number).collect()
    }

    /// Lends `workers`, the rank's threads, to what its calls copy and add on the thread that finishes them.
    pub fn set_workers(&self, workers: impl Fn(usize, &(dyn Fn(usize) + Sync)) + Send + Sync + 'static) {
        self.core.transport.set_workers(Arc::new(workers));
    }

    /// Says which step this rank is in, as errors and the flight recorder name it. Holds for all handles of the rank.
    pub fn set_step(&self, step: u64) {
        self.core.step.store(step, Relaxed);
        self.core.transport.set_step(step);
    }

    /// The step set last; 0 at first.
    pub fn step(&self) -> u64 {
        self.core.step.load(Relaxed)
    }

    /// What this rank has moved so far, on all groups. Calls count when they are finished.
    pub fn ledger(&self) -> Ledger {
        self.core.book().snapshot(self.core.transport.rank())
    }

    /// The group of `members`, ranks of this group in any order, this rank among them.
    ///
    /// Only the members call it, and all with the same name and list; it does not wait. Asked again, it gives a handle
    /// on the same group. Groups of one name must be disjoint or equal, so that the ledger and errors are clear.
    ///
    /// # Errors
    /// If the list is impossible, or another member passed a list that overlaps with this one but differs.
    pub fn subgroup(&self, name: &str, members: &[usize]) -> Result<Self, CommError> {
        let refuse = |reason: String| {
            Err(self.refuse("subgroup", format!("members {members:?} of '{name}': {reason}")))
        };
        let mut seen = vec![false; self.size()];
        for &member in members {
            match seen.get_mut(member) {
                None => {
                    return refuse(format!("rank {member} is not below the group's size {}", self.size()));
                }
                Some(true) => return refuse(format!("rank {member} is named twice")),
                Some(free) => *free = true,
            }
        }
        if !seen[self.rank()] {
            return refuse(format!("rank {} calls but is not among them", self.rank()));
        }
        let world: Vec<usize> = members.iter().map(|&member| self.world_rank(member)).collect();
        Self::open(Arc::clone(&self.core), name, &world)
    }

    /// Waits until every rank of the group has come here.
    ///
    /// # Errors
    /// If the run fails.
    pub fn barrier(&self) -> Result<(), CommError> {
        self.start_barrier()?.finish()
    }

    /// Starts a [`barrier`](Self::barrier): says that this rank has come here.
    ///
    /// # Errors
    /// If the run has failed.
    pub fn start_barrier(&self) -> Result<Pending<()>, CommError> {
        let route = self.collective::<u8>(kind::BARRIER, true);
        self.launch(route, vec![Vec::new(); self.size()], nothing(self.size()), Take::Landed(|_| Some(())))
    }

    /// Copies the buffer of rank `root` into the buffers of all others, which have the same length.
    ///
    /// # Errors
    /// If there is no such root, lengths differ, or the run fails.
    pub fn broadcast<T, R>(&self, root: usize, buffer: R) -> Result<R, CommError>
    where
        T: Pod,
        R: AsRef<[T]> + AsMut<[T]> + Send + Sync + 'static,
    {
        self.start_broadcast(root, buffer)?.finish()
    }

    /// Starts a [`broadcast`](Self::broadcast).
    ///
    /// # Errors
    /// As the finished call.
    pub fn start_broadcast<T, R>(&self, root: usize, mut buffer: R) -> Result<Pending<R>, CommError>
    where
        T: Pod,
        R: AsRef<[T]> + AsMut<[T]> + Send + Sync + 'static,
    {
        self.check_rank(kind::BROADCAST, "root", root)?;
        let size = self.size();
        if self.rank() == root {
            let shared = Arc::new(buffer);
            let piece = Part::whole(Arc::clone(&shared)).into_piece();
            let send = |to: usize| if to == root { Vec::new() } else { vec![piece.clone()] };
            let sends = (0..size).map(send).collect();
            drop(piece);
            let route = self.collective::<T>(kind::BROADCAST, false);
            return self.launch(route, sends, nothing(size), Take::Shared(shared));
        }
        let mut ranges = vec![Vec::new(); size];
        ranges[root].push(0..buffer.as_mut().len());
        self.start_exchange(kind::BROADCAST, vec![Vec::new(); size], buffer, ranges)
    }

    /// Sends `send` to every rank, this one too; what rank `p` sends fills `recv_ranges[p]` of `recv`.
    ///
    /// # Errors
    /// If ranges do not lie in their buffers, overlap or do not fit what is sent, or the run fails.
    pub fn all_gather_v<T, R>(
        &self,
        send: impl Into<Part<T>>,
        recv: R,
        recv_ranges: &[Range<usize>],
    ) -> Result<R, CommError>
    where
        T: Pod,
        R: AsMut<[T]> + Send + 'static,
    {
        self.start_all_gather_v(send, recv, recv_ranges)?.finish()
    }

    /// Starts an [`all_gather_v`](Self::all_gather_v).
    ///
    /// # Errors
    /// As the finished call.
    pub fn start_all_gather_v<T, R>(
        &self,
        send: impl Into<Part<T>>,
        recv: R,
        recv_ranges: &[Range<usize>],
    ) -> Result<Pending<R>, CommError>
    where
        T: Pod,
        R: AsMut<[T]> + Send + 'static,
    {
        let sends = vec![vec![send.into()]; self.size()];
        self.start_exchange(kind::ALL_GATHER, sends, recv, one_each(recv_ranges))
    }

    /// Sends `sends[p]` to rank `p`; what rank `p` sends fills `recv_ranges[p]` of `recv`.
    ///
    /// # Errors
    /// If ranges do not lie in their buffers, overlap or do not fit what is sent, or the run fails.
    pub fn all_to_all_v<T, R>(
        &self,
        sends: Vec<Part<T>>,
        recv: R,
        recv_ranges: &[Range<usize>],
    ) -> Result<R, CommError>
    where
        T: Pod,
        R: AsMut<[T]> + Send + 'static,
    {
        self.start_all_to_all_v(sends, recv, recv_ranges)?.finish()
    }

    /// Starts an [`all_to_all_v`](Self::all_to_all_v).
    ///
    /// # Errors
    /// As the finished call.
    pub fn start_all_to_all_v<T, R>(
        &self,
        sends: Vec<Part<T>>,
        recv: R,
        recv_ranges: &[Range<usize>],
    ) -> Result<Pending<R>, CommError>
    where
        T: Pod,
        R: AsMut<[T]> + Send + 'static,
    {
        let sends = sends.into_iter().map(|part| vec![part]).collect();
        self.start_exchange(kind::ALL_TO_ALL, sends, recv, one_each(recv_ranges))
    }

    /// The pattern behind every collective: sends the parts `sends[p]`, in order, to rank `p`; what rank `p` sends fills
    /// the ranges `recv_ranges[p]` of `recv`, in order. Parts and ranges may be cut differently, their totals must agree.
    /// `kind` names the call in the ledger and in errors; all ranks must pass the same.
    ///
    /// # Errors
    /// As the finished call.
    pub fn start_exchange<T, R>(
        &self,
        kind: &'static str,
        sends: Vec<Vec<Part<T>>>,
        recv: R,
        recv_ranges: Vec<Vec<Range<usize>>>,
    ) -> Result<Pending<R>, CommError>
    where
        T: Pod,
        R: AsMut<[T]> + Send + 'static,
    {
        self.start_exchange_around(kind, 0, sends, recv, recv_ranges)
    }

    /// As [`start_exchange`](Self::start_exchange), for a caller that has itself put what this rank sends to itself where
    /// it lands in `recv`: `placed` elements, which the ledger counts as if they had been sent.
    ///
    /// # Errors
    /// As the finished call.
    pub fn start_exchange_around<T, R>(
        &self,
        kind: &'static str,
        placed: usize,
        sends: Vec<Vec<Part<T>>>,
        mut recv: R,
        recv_ranges: Vec<Vec<Range<usize>>>,
    ) -> Result<Pending<R>, CommError>
    where
        T: Pod,
        R: AsMut<[T]> + Send + 'static,
    {
        self.check_ranges(kind, recv.as_mut().len(), &recv_ranges)?;
        let sends = self.check_sends(kind, sends)?;
        let ranges =
            recv_ranges.into_iter().map(|list| list.into_iter().map(bytes_of::<T>).collect()).collect();
        let landing = Landing::Copy { buffer: own::<T, R>(recv), ranges };
        let route = self.collective::<T>(kind, false);
        let placed = (placed * size_of::<T>()) as u64;
        self.launch_around(route, placed, sends, landing, Take::Landed(disown::<T, R>))
    }

    /// [`start_exchange`](Self::start_exchange), finished.
    ///
    /// # Errors
    /// If ranges do not lie in their buffers, overlap or do not fit what is sent, or the run fails.
    pub fn exchange<T, R>(
        &self,
        kind: &'static str,
        sends: Vec<Vec<Part<T>>>,
        recv: R,
        recv_ranges: Vec<Vec<Range<usize>>>,
    ) -> Result<R, CommError>
    where
        T: Pod,
        R: AsMut<[T]> + Send + 'static,
    {
        self.start_exchange(kind, sends, recv, recv_ranges)?.finish()
    }

    /// Sends `part` to rank `to` under `tag`, and waits until it was taken.
    ///
    /// In a ring use [`shift`](Self::shift): ranks that all send first wait for each other, which is found and refused.
    ///
    /// # Errors
    /// If there is no such rank, the receiver expects another length, or the run fails.
    pub fn send<T: Pod>(&self, to: usize, tag: u32, part: impl Into<Part<T>>) -> Result<(), CommError> {
        self.start_send(to, tag, part)?.finish()
    }

    /// Starts a [`send`](Self::send).
    ///
    /// # Errors
    /// As the finished call.
    pub fn start_send<T: Pod>(
        &self,
        to: usize,
        tag: u32,
        part: impl Into<Part<T>>,
    ) -> Result<Pending<()>, CommError> {
        self.check_rank(kind::SEND, "receiver", to)?;
        let piece = self.check_part(kind::SEND, to, part.into())?;
        let route = self.message::<T>(self.rank(), to, tag, 0);
        self.launch(route, vec![Vec::new(), vec![piece]], nothing(2), Take::Landed(|_| Some(())))
    }

    /// Receives into `range` of `recv` what rank `from` sends under `tag`.
    ///
    /// # Errors
    /// If there is no such rank, the sender sends another length, or the run fails.
    pub fn recv<T, R>(&self, from: usize, tag: u32, recv: R, range: Range<usize>) -> Result<R, CommError>
    where
        T: Pod,
        R: AsMut<[T]> + Send + 'static,
    {
        self.start_recv(from, tag, recv, range)?.finish()
    }

    /// Starts a [`recv`](Self::recv).
    ///
    /// # Errors
    /// As the finished call.
    pub fn start_recv<T, R>(
        &self,
        from: usize,
        tag: u32,
        mut recv: R,
        range: Range<usize>,
    ) -> Result<Pending<R>, CommError>
    where
        T: Pod,
        R: AsMut<[T]> + Send + 'static,
    {
        self.check_rank(kind::SEND, "sender", from)?;
        if range.start > range.end || range.end > recv.as_mut().len() {
            let len = recv.as_mut().len();
            return Err(self.refuse(
                kind::SEND,
                format!("receive range {range:?} does not lie in the buffer of {len} elements"),
            ));
        }
        let ranges = vec![vec![bytes_of::<T>(range)], Vec::new()];
        let landing = Landing::Copy { buffer: own::<T, R>(recv), ranges };
        let route = self.message::<T>(from, self.rank(), tag, 1);
        self.launch(route, vec![Vec::new(); 2], landing, Take::Landed(disown::<T, R>))
    }

    /// One step of a ring: sends `part` to `to` while it receives into `range` of `recv` from `from`.
    ///
    /// # Errors
    /// As [`send`](Self::send) and [`recv`](Self::recv).
    pub fn shift<T, R>(
        &self,
        to: usize,
        part: impl Into<Part<T>>,
        from: usize,
        recv: R,
        range: Range<usize>,
        tag: u32,
    ) -> Result<R, CommError>
    where
        T: Pod,
        R: AsMut<[T]> + Send + 'static,
    {
        let sent = self.start_send(to, tag, part)?;
        let received = self.start_recv(from, tag, recv, range)?.finish()?;
        sent.finish()?;
        Ok(received)
    }

    /// Every rank's values, by rank; lengths may differ. For small control messages: it copies `values`.
    ///
    /// # Errors
    /// If the run fails.
    pub fn all_gather_values<T: Pod + Send + Sync>(&self, values: &[T]) -> Result<Vec<Vec<T>>, CommError> {
        self.gather_values(kind::VALUES, values)
    }

    pub(crate) fn gather_values<T: Pod + Send + Sync>(
        &self,
        kind: &'static str,
        values: &[T],
    ) -> Result<Vec<Vec<T>>, CommError> {
        let slots: Vec<_> = (0..self.size()).map(|i| i..i + 1).collect();
        let own_count = Part::whole(Arc::new(vec![values.len() as u64]));
        let counts = vec![0u64; self.size()];
        let counts = self.exchange(kind, vec![vec![own_count]; self.size()], counts, one_each(&slots))?;
        let mut end = 0;
        let mut ranges = Vec::with_capacity(self.size());
        for &count in &counts {
            let start = end;
            end += usize::try_from(count)
                .map_err(|_| self.refuse(kind, format!("a rank sends {count} values")))?;
            ranges.push(start..end);
        }
        let all = vec![T::zeroed(); end];
        let send = Part::whole(Arc::new(values.to_vec()));
        let all = self.exchange(kind, vec![vec![send]; self.size()], all, one_each(&ranges))?;
        Ok(ranges.into_iter().map(|range| all[range].to_vec()).collect())
    }

    /// Starts a reduction.
    pub(crate) fn start_combine<R: 'static>(
        &self,
        kind: &'static str,
        sends: Vec<Vec<Part<f32>>>,
        landing: Landing,
        take: fn(Landing) -> Option<R>,
    ) -> Result<Pending<R>, CommError> {
        let sends = self.check_sends(kind, sends)?;
        self.launch(self.collective::<f32>(kind, false), sends, landing, Take::Landed(take))
    }

    pub(crate) fn bucket_bytes(&self) -> usize {
        self.core.transport.bucket_bytes()
    }

    fn collective<T>(&self, kind: &'static str, synchronise: bool) -> Route {
        let group = &self.group;
        let seq = group.next.fetch_add(1, Relaxed);
        Route {
            kind,
            element: type_name::<T>(),
            seq,
            key: CallKey::Collective { group: group.id, seq },
            members: Arc::clone(&group.members),
            position: group.rank,
            synchronise,
        }
    }

    fn message<T>(&self, from: usize, to: usize, tag: u32, position: usize) -> Route {
        let group = &self.group;
        let mut messages = group.messages.lock().unwrap_or_else(PoisonError::into_inner);
        // A message to oneself has both its sides here, each with its own count.
        let side = if position == 0 { (from, to, tag) } else { (from, to + self.size(), tag) };
        let next = messages.entry(side).or_insert(0);
        let seq = *next;
        *next += 1;
        Route {
            kind: kind::SEND,
            element: type_name::<T>(),
            seq,
            key: CallKey::Message { group: group.id, from, to, tag, seq },
            members: [group.members[from], group.members[to]].into(),
            position,
            synchronise: false,
        }
    }

    fn launch<R>(
        &self,
        route: Route,
        sends: Vec<Vec<Piece>>,
        landing: Landing,
        take: Take<R>,
    ) -> Result<Pending<R>, CommError> {
        self.launch_around(route, 0, sends, landing, take)
    }

    /// Starts a call beside which the caller has moved `placed` bytes of its own.
    fn launch_around<R>(
        &self,
        route: Route,
        placed: u64,
        sends: Vec<Vec<Piece>>,
        landing: Landing,
        take: Take<R>,
    ) -> Result<Pending<R>, CommError> {
        let core = &self.core;
        let mut volume = self.volume(&route, &sends, &landing.expected());
        volume.sent[LinkClass::SameRank as usize] += placed;
        volume.received[LinkClass::SameRank as usize] += placed;
        if core.stall.get() == Some(&(self.step(), route.kind)) {
            return Err(self.stall());
        }
        let site = CallSite {
            step: self.step(),
            seq: route.seq,
            kind: route.kind.into(),
            group: Arc::clone(&self.group.name),
        };
        let message = match route.key {
            CallKey::Collective { .. } => None,
            CallKey::Message { tag, .. } => {
                Some(Message { from: route.members[0], to: route.members[1], tag })
            }
        };
        let flight = core.transport.recorder().push(FlightEntry {
            call: site.clone(),
            message,
            bytes_sent: volume.sent_to_others(),
            bytes_received: volume.received_from_others(),
            state: CallState::Started,
            started_us: wall_clock_us(),
            ended_us: None,
        });
        let ticket = core.transport.start(Call {
            site,
            element: route.element,
            key: route.key,
            members: route.members,
            position: route.position,
            sends,
            landing,
            synchronise: route.synchronise,
        });
        let ticket = ticket.inspect_err(|_| core.transport.recorder().set(flight, CallState::Failed))?;
        if message.is_none() {
            self.group.started.fetch_max(route.seq + 1, Relaxed);
        }
        Ok(Pending::new(Arc::clone(core), Arc::clone(&self.group), route.kind, volume, flight, ticket, take))
    }

    fn volume(&self, route: &Route, sends: &[Vec<Piece>], expected: &[u64]) -> Volume {
        let mut volume = Volume::default();
        for (index, member) in route.members.iter().enumerate() {
            // Members of a message are a pair, not the group: find the link by world rank.
            let link = match route.key {
                CallKey::Collective { .. } => self.group.links[index],
                CallKey::Message { from, to, .. } => {
                    debug_assert!(self.group.members[from] == *member || self.group.members[to] == *member);
                    self.group.links[if index == 0 { from } else { to }]
                }
            };
            volume.sent[link as usize] += sends[index].iter().map(|piece| piece.len() as u64).sum::<u64>();
            volume.received[link as usize] += expected[index];
        }
        volume
    }

    pub(crate) fn refuse(&self, kind: &'static str, reason: String) -> CommError {
        CommError::Argument {
            rank: self.core.transport.rank(),
            step: self.step(),
            kind,
            group: Arc::clone(&self.group.name),
            reason,
        }
    }

    fn check_rank(&self, kind: &'static str, what: &str, rank: usize) -> Result<(), CommError> {
        if rank < self.size() {
            return Ok(());
        }
        Err(self
            .refuse(kind, format!("the {what} {rank} is not a rank of the group, which has {}", self.size())))
    }

    fn check_part<T: Pod>(&self, kind: &'static str, to: usize, part: Part<T>) -> Result<Piece, CommError> {
        let (range, len) = (part.range(), part.buffer_len());
        if range.start > range.end || range.end > len {
            return Err(self.refuse(
                kind,
                format!("the part {range:?} for rank {to} does not lie in its buffer of {len} elements"),
            ));
        }
        Ok(part.into_piece())
    }

    fn check_sends<T: Pod>(
        &self,
        kind: &'static str,
        sends: Vec<Vec<Part<T>>>,
    ) -> Result<Vec<Vec<Piece>>, CommError> {
        if sends.len() != self.size() {
            let (given, size) = (sends.len(), self.size());
            return Err(self.refuse(kind, format!("{given} lists to send, but the group has {size} ranks")));
        }
        let check = |(to, parts): (usize, Vec<Part<T>>)| {
            parts.into_iter().map(|part| self.check_part(kind, to, part)).collect()
        };
        sends.into_iter().enumerate().map(check).collect()
    }

    fn check_ranges(
        &self,
        kind: &'static str,
        len: usize,
        ranges: &[Vec<Range<usize>>],
    ) -> Result<(), CommError> {
        if ranges.len() != self.size() {
            let (given, size) = (ranges.len(), self.size());
            return Err(self.refuse(kind, format!("{given} receive ranges, but the group has {size} ranks")));
        }
        let mut all: Vec<&Range<usize>> =
            ranges.iter().flatten().filter(|range| range.start != range.end).collect();
        if let Some(range) = all.iter().find(|range| range.start > range.end || range.end > len) {
            return Err(self.refuse(
                kind,
                format!("the receive range {range:?} does not lie in the buffer of {len} elements"),
            ));
        }
        all.sort_unstable_by_key(|range| range.start);
        if let Some(pair) = all.windows(2).find(|pair| pair[0].end > pair[1].start) {
            return Err(self.refuse(kind, format!("receive ranges {:?} and {:?} overlap", pair[0], pair[1])));
        }
        Ok(())
    }
}

fn nothing(members: usize) -> Landing {
    Landing::Copy { buffer: own::<u8, Vec<u8>>(Vec::new()), ranges: vec![Vec::new(); members] }
}

fn one_each(ranges: &[Range<usize>]) -> Vec<Vec<Range<usize>>> {
    ranges.iter().map(|range| vec![range.clone()]).collect()
}

fn bytes_of<T>(range: Range<usize>) -> Range<usize> {
    range.start * size_of::<T>()..range.end * size_of::<T>()
}
