//! The state of a simulated step: where every rank stands in its list and who waits for what.

use std::collections::VecDeque;

use super::costs::{Costs, Lane, Segment};
use super::flows::Flows;
use super::{RankTimes, Replicas, Simulated, Span, Standstill};
use crate::schedule::{Chunk, Exchange, Op, Schedule};

/// Segments of one op (or half of an overlapped one) that run one after the other.
#[derive(Clone, Copy, Default)]
struct Chain<'a> {
    segments: &'a [Segment],
    next: usize,
    live: bool,
}

/// Who asked for a segment on the communication lane.
#[derive(Clone, Copy, PartialEq)]
enum Asker {
    /// A chain of the current op.
    Chain(u8),
    /// An exchange that the op at this index started; `last` if it is done after this segment.
    Started { op: u32, last: bool },
}

#[derive(Default)]
struct RankState<'a> {
    next: usize,
    chains: [Chain<'a>; 2],
    /// The chain on the compute lane, the one that waits for it, and when the lane's segment began.
    computing: Option<u8>,
    wants_compute: Option<u8>,
    compute_began_s: f64,
    /// What is on the communication lane and what waits for it.
    communicating: Option<(Asker, &'a Segment)>,
    communication: VecDeque<(Asker, &'a Segment)>,
    communication_began_s: f64,
    /// Exchanges started and not done.
    open: Vec<Exchange>,
    /// `(replicas, how many of them have joined)` of exchanges that wait at this rank, the first of its group.
    gathering: Vec<(u32, u32)>,
    times: RankTimes,
    accounted_s: f64,
}

/// A step under way.
pub(super) struct Run<'a, C> {
    schedule: &'a Schedule,
    costs: &'a C,
    replicas: Replicas,
    flows: Flows,
    ranks: Vec<RankState<'a>>,
    /// `[replica][stage][micro-batch][output, gradient]` whether it has reached the rank that needs it.
    arrived: Vec<bool>,
    /// What the activities beyond those of the lanes bring.
    transfers: Vec<(u32, bool, Chunk)>,
    idle_transfers: Vec<u32>,
    /// Ranks that may be able to go on.
    awake: Vec<u32>,
    /// First link of each class.
    link_offsets: Vec<u32>,
    events: u64,
    spans: Option<Vec<Span>>,
}

impl<'a, C: Costs> Run<'a, C> {
    pub fn new(schedule: &'a Schedule, costs: &'a C, replicas: Replicas, keep_spans: bool) -> Self {
        let ranks = schedule.ranks.len() * replicas.simulated();
        let all = schedule.ranks.len() * replicas.count;
        let mut link_offsets = Vec::new();
        let mut links: Vec<(f64, f64)> = Vec::new();
        for class in costs.links() {
            link_offsets.push(links.len() as u32);
            let stands_for =
                if replicas.symmetric { (class.ranks as usize).min(replicas.count) as f64 } else { 1.0 };
            links.extend((0..all.div_ceil(class.ranks as usize)).map(|_| (class.capacity, stands_for)));
        }
        let items = replicas.simulated() * schedule.stages() * schedule.micro_batches as usize * 2;
        Self {
            schedule,
            costs,
            replicas,
            flows: Flows::new(2 * ranks, links.into_iter()),
            ranks: (0..ranks).map(|_| RankState::default()).collect(),
            arrived: vec![false; items],
            transfers: Vec::new(),
            idle_transfers: Vec::new(),
            awake: (0..ranks as u32).rev().collect(),
            link_offsets,
            events: 0,
            spans: keep_spans.then(Vec::new),
        }
    }

    /// Runs to the end.
    pub fn finish(mut self) -> Result<Simulated, Standstill> {
        self.settle();
        while let Some(activity) = self.flows.next_end() {
            self.events += 1;
            self.ended(activity);
            self.settle();
        }
        for (index, rank) in self.ranks.iter().enumerate() {
            let (replica, position) = self.place(index);
            if let Some(op) = self.schedule.ranks[position].get(rank.next) {
                let op = op.to_string();
                return Err(Standstill { replica, rank: position, index: rank.next, op });
            }
        }
        let ranks: Vec<RankTimes> = self.ranks.iter().map(|rank| rank.times).collect();
        Ok(Simulated {
            seconds: ranks.iter().map(|rank| rank.end_s).fold(0.0, f64::max),
            ranks,
            events: self.events,
            spans: self.spans.unwrap_or_default(),
        })
    }

    /// `(replica, pipeline rank)`
    fn place(&self, rank: usize) -> (usize, usize) {
        (rank / self.schedule.ranks.len(), rank % self.schedule.ranks.len())
    }

    fn settle(&mut self) {
        while let Some(rank) = self.awake.pop() {
            self.advance(rank as usize);
        }
    }

    /// Starts ops of `rank` until one takes time or has to wait.
    fn advance(&mut self, rank: usize) {
        let (replica, position) = self.place(rank);
        let (schedule, costs) = (self.schedule, self.costs);
        while !self.ranks[rank].chains.iter().any(|chain| chain.live) {
            let index = self.ranks[rank].next;
            let Some(op) = schedule.ranks[position].get(index) else {
                let end = &mut self.ranks[rank].times.end_s;
                *end = self.flows.now_s().max(*end);
                return;
            };
            match op {
                Op::Finish(exchange) if self.ranks[rank].open.contains(exchange) => return,
                Op::Finish(_) if costs.segments(replica, position, op).is_empty() => {
                    self.ranks[rank].next += 1
                }
                Op::Start(exchange) => {
                    self.ranks[rank].next += 1;
                    self.start_exchange(rank, index, *exchange, costs.segments(replica, position, op));
                }
                _ if !self.has_inputs(replica, op) => return,
                Op::Overlapped { forward, backward } => {
                    let halves = [Op::Forward(*forward), Op::Backward(*backward)];
                    for (chain, half) in halves.iter().enumerate() {
                        let segments = costs.segments(replica, position, half);
                        self.ranks[rank].chains[chain] = Chain { segments, next: 0, live: true };
                    }
                    self.step(rank, 0);
                    self.step(rank, 1);
                }
                _ => {
                    let segments = costs.segments(replica, position, op);
                    self.ranks[rank].chains[0] = Chain { segments, next: 0, live: true };
                    self.step(rank, 0);
                }
            }
        }
    }

    fn start_exchange(&mut self, rank: usize, op: usize, exchange: Exchange, segments: &'a [Segment]) {
        let count = segments.len();
        if count > 0 {
            self.ranks[rank].open.push(exchange);
        }
        for (index, segment) in segments.iter().enumerate() {
            let asker = Asker::Started { op: op as u32, last: index + 1 == count };
            self.ranks[rank].communication.push_back((asker, segment));
        }
        self.next_communication(rank);
    }

    fn item(&self, replica: usize, chunk: Chunk, gradient: bool) -> usize {
        let stage = replica * self.schedule.stages() + usize::from(chunk.stage);
        (stage * self.schedule.micro_batches as usize + chunk.micro_batch as usize) * 2
            + usize::from(gradient)
    }

    fn has_inputs(&self, replica: usize, op: &Op) -> bool {
        let last = self.schedule.stages();
        op.forward().is_none_or(|c| c.stage == 0 || self.arrived[self.item(replica, c, false)])
            && op
                .backward()
                .is_none_or(|c| usize::from(c.stage) + 1 == last || self.arrived[self.item(replica, c, true)])
    }

    /// Runs the next segment of a chain, or ends it.
    fn step(&mut self, rank: usize, chain: u8) {
        let state = &mut self.ranks[rank].chains[usize::from(chain)];
        let Some(segment) = state.segments.get(state.next) else {
            state.live = false;
            self.chain_done(rank, chain);
            return;
        };
        state.next += 1;
        match segment.lane {
            Lane::Compute if self.ranks[rank].computing.is_some() => {
                self.ranks[rank].wants_compute = Some(chain);
            }
            Lane::Compute => self.compute(rank, chain),
            Lane::Communication => {
                self.ranks[rank].communication.push_back((Asker::Chain(chain), segment));
                self.next_communication(rank);
            }
        }
    }

    fn compute(&mut self, rank: usize, chain: u8) {
        self.account(rank);
        let state = &mut self.ranks[rank];
        state.computing = Some(chain);
        state.compute_began_s = self.flows.now_s();
        let chain = &state.chains[usize::from(chain)];
        self.flows.start(rank as u32, chain.segments[chain.next - 1].seconds, std::iter::empty());
    }

    /// Takes the next segment to the communication lane if it is free.
    fn next_communication(&mut self, rank: usize) {
        if self.ranks[rank].communicating.is_some() {
            return;
        }
        let Some((asker, segment)) = self.ranks[rank].communication.pop_front() else { return };
        self.account(rank);
        self.ranks[rank].communicating = Some((asker, segment));
        self.ranks[rank].communication_began_s = self.flows.now_s();
        let group = self.group(rank, segment);
        if group.len() == 1 {
            self.exchange(rank, segment, group);
            return;
        }
        let width = group.len() as u32;
        let first = group.start * self.schedule.ranks.len() + self.place(rank).1;
        let gathering = &mut self.ranks[first].gathering;
        match gathering.iter_mut().find(|(of, _)| *of == width) {
            Some((_, joined)) if *joined + 1 < width => *joined += 1,
            Some((_, joined)) => {
                *joined = 0;
                self.exchange(rank, segment, group);
            }
            None => gathering.push((width, 1)),
        }
    }

    /// The replicas that join `rank` in a segment.
    fn group(&self, rank: usize, segment: &Segment) -> std::ops::Range<usize> {
        let replica = self.place(rank).0;
        let width = if self.replicas.symmetric { 1 } else { segment.group.max(1) as usize };
        let start = replica / width * width;
        start..(start + width).min(self.replicas.simulated())
    }

    /// Begins an exchange that everyone has joined. It takes as long as its slowest member's would, and is an activity of
    /// the communication lane of the rank that came last.
    fn exchange(&mut self, rank: usize, segment: &Segment, group: std::ops::Range<usize>) {
        let position = self.place(rank).1;
        let mut seconds = segment.seconds;
        let mut links = Vec::new();
        for member in group.clone().map(|replica| replica * self.schedule.ranks.len() + position) {
            if let Some((_, segment)) = self.ranks[member].communicating {
                seconds = seconds.max(segment.seconds);
                links.extend(segment.link.map(|class| self.link(member, class)));
            }
            self.flows.set_factor(member as u32, 1.0 / (1.0 + self.costs.slowdown()));
        }
        self.flows.start((self.ranks.len() + rank) as u32, seconds, links.into_iter());
    }

    /// The link of `rank` in a class.
    fn link(&self, rank: usize, class: u8) -> u32 {
        let (replica, position) = self.place(rank);
        let world_rank = position * self.replicas.count + replica;
        let class = usize::from(class);
        self.link_offsets[class] + world_rank as u32 / self.costs.links()[class].ranks
    }

    /// An activity has ended.
    fn ended(&mut self, activity: u32) {
        let (activity, ranks) = (activity as usize, self.ranks.len());
        if activity < ranks {
            self.compute_ended(activity);
        } else if activity < 2 * ranks {
            self.exchange_ended(activity - ranks);
        } else {
            let (replica, gradient, chunk) = self.transfers[activity - 2 * ranks];
            self.idle_transfers.push(activity as u32);
            self.arrive(replica as usize, gradient, chunk);
        }
    }

    fn compute_ended(&mut self, rank: usize) {
        self.account(rank);
        let state = &mut self.ranks[rank];
        let chain = state.computing.take().expect("an activity of the compute lane has a chain");
        let began_s = state.compute_began_s;
        let segment = state.chains[usize::from(chain)].segments[state.chains[usize::from(chain)].next - 1];
        self.keep_span(rank, self.ranks[rank].next, chain, &segment, began_s);
        if let Some(waiting) = self.ranks[rank].wants_compute.take() {
            self.compute(rank, waiting);
        }
        self.step(rank, chain);
    }

    fn exchange_ended(&mut self, rank: usize) {
        let (_, segment) =
            self.ranks[rank].communicating.expect("an activity of the communication lane has a segment");
        let position = self.place(rank).1;
        for member in self.group(rank, segment).map(|replica| replica * self.schedule.ranks.len() + position)
        {
            self.account(member);
            self.flows.set_factor(member as u32, 1.0);
            let state = &mut self.ranks[member];
            let Some((asker, segment)) = state.communicating.take() else { continue };
            let began_s = state.communication_began_s;
            let (op, half) = match asker {
                Asker::Chain(chain) => (state.next, chain),
                Asker::Started { op, .. } => (op as usize, 0),
            };
            self.keep_span(member, op, half, segment, began_s);
            self.next_communication(member);
            match asker {
                Asker::Chain(chain) => self.step(member, chain),
                Asker::Started { last: true, .. } => {
                    if let Op::Start(exchange) = self.schedule.ranks[position][op] {
                        self.ranks[member].open.retain(|open| *open != exchange);
                        self.awake.push(member as u32);
                    }
                }
                Asker::Started { .. } => {}
            }
        }
    }

    /// Sends what a chain has computed and, if the op is done, lets the rank go on.
    fn chain_done(&mut self, rank: usize, chain: u8) {
        let (replica, position) = self.place(rank);
        let op = &self.schedule.ranks[position][self.ranks[rank].next];
        let overlapped = matches!(op, Op::Overlapped { .. });
        if let Some(chunk) = op.forward().filter(|_| chain == 0) {
            self.send(replica, false, chunk);
        }
        if let Some(chunk) = op.backward().filter(|_| !overlapped || chain == 1) {
            self.send(replica, true, chunk);
        }
        if !self.ranks[rank].chains.iter().any(|chain| chain.live) {
            self.ranks[rank].next += 1;
            self.awake.push(rank as u32);
        }
    }

    /// Brings the output of a chunk to the next stage, or its gradient to the one before.
    fn send(&mut self, replica: usize, gradient: bool, from: Chunk) {
        let stage = match gradient {
            true if from.stage == 0 => return,
            true => from.stage - 1,
            false if usize::from(from.stage) + 1 == self.schedule.stages() => return,
            false => from.stage + 1,
        };
        let chunk = Chunk { stage, ..from };
        let at = |stage: u16| usize::from(self.schedule.placement[usize::from(stage)]);
        let (source, destination) = (at(from.stage), at(stage));
        let transfer = self.costs.transfer(replica, from.stage, stage);
        if source == destination || (transfer.seconds == 0.0 && transfer.link.is_none()) {
            self.arrive(replica, gradient, chunk);
            return;
        }
        let activity = self.idle_transfers.pop().unwrap_or_else(|| {
            self.transfers.push((0, false, chunk));
            self.flows.add()
        });
        self.transfers[activity as usize - 2 * self.ranks.len()] = (replica as u32, gradient, chunk);
        let base = replica * self.schedule.ranks.len();
        let ends = transfer
            .link
            .map(|class| [self.link(base + source, class), self.link(base + destination, class)]);
        let links = ends.map(|[a, b]| if a == b { [Some(a), None] } else { [Some(a), Some(b)] });
        self.flows.start(activity, transfer.seconds, links.into_iter().flatten().flatten());
    }

    fn arrive(&mut self, replica: usize, gradient: bool, chunk: Chunk) {
        let item = self.item(replica, chunk, gradient);
        self.arrived[item] = true;
        let position = usize::from(self.schedule.placement[usize::from(chunk.stage)]);
        self.awake.push((replica * self.schedule.ranks.len() + position) as u32);
    }

    /// Adds the time since the last change of a lane.
    fn account(&mut self, rank: usize) {
        let state = &mut self.ranks[rank];
        let since_s = self.flows.now_s() - state.accounted_s;
        state.accounted_s = self.flows.now_s();
        if state.computing.is_some() {
            state.times.compute_s += since_s;
        }
        if state.communicating.is_some() {
            state.times.communication_s += since_s;
            if state.computing.is_none() {
                state.times.exposed_s += since_s;
            }
        }
    }

    fn keep_span(&mut self, rank: usize, op: usize, half: u8, segment: &Segment, start_s: f64) {
        let seconds = self.flows.now_s() - start_s;
        if let Some(spans) = &mut self.spans {
            let Segment { lane, name, .. } = *segment;
            spans.push(Span { rank: rank as u32, op: op as u32, half, lane, name, start_s, seconds });
        }
    }
}
