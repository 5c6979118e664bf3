//! Where a call's payload lands: straight in the caller's buffer, or in staging that a sum reads.
//!
//! What a member sends is one stream of bytes. Each frame (one MPI message) of it is received where it belongs if that
//! is one place, otherwise aside, and then copied. A sum stages few buckets at a time, so staging stays small however
//! large the sum is; a frame waits with its sender until its bucket's turn has come.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::raw::{Target, TargetOwner};
use crate::part::Piece;
use crate::transport::{Combine, Landing, alone};

/// Buckets that are staged at a time, at least: one is summed while the next arrives.
const STAGED_BUCKETS: usize = 2;

/// One message of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    /// Which bytes of the stream it has.
    pub range: Range<usize>,
    pub tag: u32,
}

/// What a member sends, as it is still to be received.
#[derive(Debug, Default)]
pub(super) struct Stream {
    frames: VecDeque<Frame>,
}

impl Stream {
    pub fn new(frames: impl IntoIterator<Item = Frame>) -> Self {
        Self { frames: frames.into_iter().collect() }
    }
}

/// Where a frame is received.
pub(super) enum Place {
    /// Where it belongs.
    Direct(Arc<Target>, Range<usize>),
    /// Aside: it belongs to several places.
    Aside(Vec<u8>),
}

/// A part of a member's stream that belongs to one place.
#[derive(Debug, Clone)]
struct Span {
    stream: Range<usize>,
    /// Where it starts in the caller's buffer, or which bucket it is.
    at: usize,
}

/// The landing of one call.
pub(super) struct Incoming {
    /// `[member]`, ascending.
    spans: Vec<Vec<Span>>,
    body: Body,
    /// Bytes still to come from others.
    left: u64,
}

enum Body {
    Copy { target: Arc<Target>, ranges: Vec<Vec<Range<usize>>> },
    Sum(Sum),
}

struct Sum {
    sum: Box<dyn Combine + Send>,
    /// `[bucket][member]`
    pieces: Vec<Vec<Vec<usize>>>,
    /// What this rank itself contributes, not yet summed.
    own: VecDeque<Piece>,
    /// The next bucket to be summed.
    next: usize,
    /// Bytes still to come, by bucket.
    left: Vec<u64>,
    /// How many buckets are staged at a time.
    ahead: usize,
    /// `[bucket - next][member]`
    staged: VecDeque<Vec<Option<Arc<Target>>>>,
    position: usize,
}

/// Staging memory that is used again.
#[derive(Default)]
pub(super) struct Pool(Vec<Vec<u64>>);

impl Pool {
    /// At most so many free buffers are kept.
    const KEPT: usize = 64;

    fn take(&mut self, bytes: usize) -> Vec<u64> {
        let words = bytes.div_ceil(8);
        let fits = |buffer: &Vec<u64>| buffer.len() >= words && buffer.len() <= 2 * words + 512;
        match self.0.iter().position(fits) {
            Some(index) => self.0.swap_remove(index),
            None => vec![0; words],
        }
    }

    fn give(&mut self, buffer: Vec<u64>) {
        if self.0.len() < Self::KEPT {
            self.0.push(buffer);
        }
    }
}

fn spans(lens: impl Iterator<Item = (usize, usize)>) -> Vec<Span> {
    let mut end = 0;
    let next = |(at, len): (usize, usize)| {
        let start = end;
        end += len;
        (len > 0).then_some(Span { stream: start..end, at })
    };
    lens.filter_map(next).collect()
}

impl Incoming {
    /// `own` is what the rank sends to itself. Buckets are received ahead up to `ahead_bytes` from all members.
    pub fn new(landing: Landing, position: usize, own: &[Piece], ahead_bytes: usize) -> Self {
        match landing {
            Landing::Copy { buffer, ranges } => {
                let spans: Vec<Vec<Span>> = ranges
                    .iter()
                    .map(|list| spans(list.iter().map(|range| (range.start, range.len()))))
                    .collect();
                let target = Arc::new(Target::new(TargetOwner::Buffer(buffer), usize::MAX));
                let left = others(&spans, position);
                let mut incoming = Self { spans, body: Body::Copy { target, ranges }, left };
                let mut at = 0;
                for piece in own {
                    incoming.fill(position, at, piece.bytes());
                    at += piece.len();
                }
                incoming
            }
            Landing::Combine { sum, pieces } => {
                let members = pieces.first().map_or(0, Vec::len);
                let len = |bucket: usize, member: usize| pieces[bucket][member].iter().sum::<usize>();
                let of = |member: usize| spans((0..pieces.len()).map(|bucket| (bucket, len(bucket, member))));
                let spans: Vec<Vec<Span>> = (0..members).map(of).collect();
                let mut left = vec![0; pieces.len()];
                for (member, list) in spans.iter().enumerate() {
                    for span in list.iter().filter(|_| member != position) {
                        left[span.at] += span.stream.len() as u64;
                    }
                }
                let largest = left.iter().max().map_or(1, |&bytes| bytes.max(1) as usize);
                let ahead = (ahead_bytes / largest).max(STAGED_BUCKETS);
                let (staged, own) = (VecDeque::new(), own.iter().cloned().collect());
                let body = Body::Sum(Sum { sum, pieces, own, next: 0, left, ahead, staged, position });
                Self { left: others(&spans, position), spans, body }
            }
        }
    }

    /// Whether everything has arrived and was summed.
    pub fn complete(&self) -> bool {
        let summed = match &self.body {
            Body::Copy { .. } => true,
            Body::Sum(sum) => sum.next == sum.pieces.len(),
        };
        self.left == 0 && summed
    }

    /// The next frame of a member's stream that can be received now, and where to.
    pub fn next_frame(
        &mut self,
        member: usize,
        stream: &mut Stream,
        pool: &mut Pool,
    ) -> Option<(Frame, Place)> {
        let frame = stream.frames.front()?;
        if frame.range.start >= self.open_until(member) {
            return None;
        }
        let frame = stream.frames.pop_front()?;
        let places = self.places(member, &frame.range, pool);
        let place = match places.as_slice() {
            [(target, range)] => Place::Direct(Arc::clone(target), range.clone()),
            _ => Place::Aside(vec![0; frame.range.len()]),
        };
        Some((frame, place))
    }

    /// Up to where a member's stream may be received now.
    fn open_until(&self, member: usize) -> usize {
        let Body::Sum(sum) = &self.body else { return usize::MAX };
        let open = |span: &&Span| span.at < sum.next + sum.ahead;
        self.spans[member].iter().rev().find(open).map_or(0, |span| span.stream.end)
    }

    /// The places that bytes of a member's stream belong to, in order. Bytes that nobody expects have none.
    fn places(
        &mut self,
        member: usize,
        range: &Range<usize>,
        pool: &mut Pool,
    ) -> Vec<(Arc<Target>, Range<usize>)> {
        let list = &self.spans[member];
        let first = list.partition_point(|span| span.stream.end <= range.start);
        let mut places = Vec::new();
        for span in list[first..].iter().take_while(|span| span.stream.start < range.end) {
            let (start, end) = (range.start.max(span.stream.start), range.end.min(span.stream.end));
            let inside = start - span.stream.start..end - span.stream.start;
            places.push(match &mut self.body {
                Body::Copy { target, .. } => {
                    (Arc::clone(target), span.at + inside.start..span.at + inside.end)
                }
                Body::Sum(sum) => (sum.area(span.at, member, span.stream.len(), pool), inside),
            });
        }
        places
    }

    /// Copies bytes that were received aside, or came with a header, to where they belong.
    pub fn scatter(&mut self, member: usize, range: &Range<usize>, bytes: &[u8], pool: &mut Pool) {
        let mut from = 0;
        for (target, place) in self.places(member, range, pool) {
            let len = place.len();
            target.fill(place.start, &bytes[from..from + len]);
            from += len;
        }
    }

    fn fill(&mut self, member: usize, at: usize, bytes: &[u8]) {
        self.scatter(member, &(at..at + bytes.len()), bytes, &mut Pool::default());
    }

    /// Notes that bytes of a member's stream are where they belong.
    pub fn arrived(&mut self, member: usize, range: &Range<usize>) {
        self.left = self.left.saturating_sub(range.len() as u64);
        if let Body::Sum(sum) = &mut self.body {
            for span in &self.spans[member] {
                let (start, end) = (range.start.max(span.stream.start), range.end.min(span.stream.end));
                sum.left[span.at] -= end.saturating_sub(start) as u64;
            }
        }
    }

    /// Adds up the buckets that have arrived. Returns the time it took.
    pub fn sum_up(&mut self, pool: &mut Pool) -> Duration {
        let Body::Sum(sum) = &mut self.body else { return Duration::ZERO };
        if !sum.is_ready() {
            return Duration::ZERO;
        }
        let begin = Instant::now();
        while sum.is_ready() {
            sum.one_bucket(pool);
        }
        begin.elapsed()
    }

    /// The landing, filled; none while requests are under way.
    pub fn into_landing(self) -> Option<Landing> {
        match self.body {
            Body::Copy { target, ranges } => match Arc::into_inner(target)?.into_owner() {
                TargetOwner::Buffer(buffer) => Some(Landing::Copy { buffer, ranges }),
                TargetOwner::Staging(_) => None,
            },
            Body::Sum(Sum { sum, pieces, .. }) => Some(Landing::Combine { sum, pieces }),
        }
    }
}

/// Bytes expected from others than `position`.
fn others(spans: &[Vec<Span>], position: usize) -> u64 {
    let from = spans.iter().enumerate().filter(|(member, _)| *member != position);
    from.flat_map(|(_, list)| list).map(|span| span.stream.len() as u64).sum()
}

impl Sum {
    /// Whether the next bucket has arrived.
    fn is_ready(&self) -> bool {
        self.left.get(self.next) == Some(&0)
    }

    /// The staging of a bucket of a member, which has `len` bytes.
    fn area(&mut self, bucket: usize, member: usize, len: usize, pool: &mut Pool) -> Arc<Target> {
        let index = bucket - self.next;
        let members = self.pieces[bucket].len();
        while self.staged.len() <= index {
            self.staged.push_back((0..members).map(|_| None).collect());
        }
        let area = &mut self.staged[index][member];
        Arc::clone(
            area.get_or_insert_with(|| Arc::new(Target::new(TargetOwner::Staging(pool.take(len)), len))),
        )
    }

    fn one_bucket(&mut self, pool: &mut Pool) {
        let bucket = self.next;
        self.next += 1;
        let mut areas = self.staged.pop_front().unwrap_or_default();
        let own: Vec<Piece> = self.own.drain(..self.pieces[bucket][self.position].len()).collect();
        let mut received: Vec<Vec<&[u8]>> = vec![Vec::new(); self.pieces[bucket].len()];
        received[self.position] = own.iter().map(Piece::bytes).collect();
        for (member, area) in areas.iter_mut().enumerate() {
            let Some(target) = area.as_mut().and_then(Arc::get_mut) else { continue };
            let mut rest = target.bytes();
            for &len in &self.pieces[bucket][member] {
                let (piece, tail) = rest.split_at(len);
                received[member].push(piece);
                rest = tail;
            }
        }
        // Pieces without bytes have no area, but count as pieces.
        for (list, lens) in received.iter_mut().zip(&self.pieces[bucket]) {
            list.resize(lens.len(), &[]);
        }
        self.sum.combine(bucket, &received, &alone);
        drop(received);
        for target in areas.into_iter().flatten().filter_map(Arc::into_inner) {
            if let TargetOwner::Staging(buffer) = target.into_owner() {
                pool.give(buffer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pending::own;

    fn take(incoming: Incoming) -> Vec<u8> {
        let Some(Landing::Copy { mut buffer, .. }) = incoming.into_landing() else { panic!("not a copy") };
        buffer.bytes_mut().to_vec()
    }

    #[test]
    fn frames_land_in_ranges_that_are_cut_otherwise() {
        let landing = Landing::Copy {
            buffer: own::<u8, Vec<u8>>(vec![0; 12]),
            ranges: vec![vec![8..10], vec![0..3, 5..5, 4..8]],
        };
        let mut incoming = Incoming::new(landing, 2, &[], 1);
        let mut pool = Pool::default();
        let frame = |range, tag| Frame { range, tag };
        let mut stream = Stream::new([frame(0..2, 0), frame(2..5, 1), frame(5..7, 2)]);
        let (first, place) = incoming.next_frame(1, &mut stream, &mut pool).unwrap();
        let Place::Direct(target, at) = place else { panic!("it is one place") };
        assert_eq!(at, 0..2);
        target.fill(0, &[1, 2]);
        drop(target);
        incoming.arrived(1, &first.range);
        let (second, place) = incoming.next_frame(1, &mut stream, &mut pool).unwrap();
        assert!(matches!(place, Place::Aside(bytes) if bytes.len() == 3));
        incoming.scatter(1, &second.range, &[3, 4, 5], &mut pool);
        incoming.arrived(1, &second.range);
        assert!(!incoming.complete());
        incoming.scatter(1, &(5..7), &[6, 7], &mut pool);
        incoming.arrived(1, &(5..7));
        incoming.scatter(0, &(0..2), &[8, 9], &mut pool);
        incoming.arrived(0, &(0..2));
        assert!(incoming.complete());
        assert_eq!(take(incoming), [1, 2, 3, 0, 4, 5, 6, 7, 8, 9, 0, 0]);
    }

    /// Remembers what it was given.
    struct Record(std::sync::mpsc::Sender<(usize, Vec<Vec<u8>>)>);

    impl Combine for Record {
        fn combine(&mut self, bucket: usize, received: &[Vec<&[u8]>], _: &crate::transport::Workers) {
            let joined = received.iter().map(|pieces| pieces.concat()).collect();
            self.0.send((bucket, joined)).unwrap();
        }
    }

    #[test]
    fn buckets_are_summed_in_order_and_few_are_staged() {
        // Buckets of two bytes.
        for (ahead_bytes, staged) in [(9, 4), (0, STAGED_BUCKETS)] {
            sum_buckets(ahead_bytes, staged);
        }
    }

    fn sum_buckets(ahead_bytes: usize, most: usize) {
        let (sender, sums) = std::sync::mpsc::channel();
        let pieces = (0..6).map(|_| vec![vec![2], vec![1, 1]]).collect();
        let landing = Landing::Combine { sum: Box::new(Record(sender)), pieces };
        let bytes: Arc<Vec<u8>> = Arc::new((50..62).collect());
        let own: Vec<Piece> = (0..6)
            .map(|i| crate::Part::<u8>::new(Arc::clone(&bytes), 2 * i..2 * i + 2).into_piece())
            .collect();
        let mut incoming = Incoming::new(landing, 0, &own, ahead_bytes);
        let mut pool = Pool::default();
        let mut stream = Stream::new((0..6).map(|i| Frame { range: 2 * i..2 * i + 2, tag: i as u32 }));
        let mut open = VecDeque::new();
        let mut got = Vec::new();
        let mut seen = 0;
        while !incoming.complete() {
            while let Some((frame, place)) = incoming.next_frame(1, &mut stream, &mut pool) {
                open.push_back((frame, place));
            }
            seen = seen.max(open.len());
            // The newest first: sums still come in order.
            let (frame, place) = open.pop_back().unwrap();
            let Place::Direct(target, at) = place else { panic!("a bucket is one place") };
            target.fill(at.start, &[frame.range.start as u8, frame.range.start as u8 + 1]);
            drop(target);
            incoming.arrived(1, &frame.range);
            incoming.sum_up(&mut pool);
            got.extend(sums.try_iter());
        }
        assert_eq!(seen, most);
        let expected: Vec<_> = (0..6u8)
            .map(|i| (usize::from(i), vec![vec![50 + 2 * i, 51 + 2 * i], vec![2 * i, 2 * i + 1]]))
            .collect();
        assert_eq!(got, expected);
    }
}
