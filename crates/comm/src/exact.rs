//! Exact reductions: the transport moves bytes, the sums are ours, along the fixed tree.
//!
//! A *segment* is a vector that is a sum over `items` leaves, joined by the tree over their indices
//! ([`unisono_mesh::tree`]). Every rank holds a contiguous range of the leaves and contributes the partial sums of that
//! range's maximal subtrees (its *roots*), so the additions that are left, and their order, depend on `items` alone.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;
use unisono_mesh::tree;

use crate::communicator::{Communicator, kind};
use crate::error::CommError;
use crate::part::Part;
use crate::pending::Pending;
use crate::transport::{Combine, Landing};
use crate::tree_sum::{Real, TreeSum};

/// One vector to be summed over ranks and handed out in shards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Leaves of the tree.
    pub items: usize,
    /// Per rank of the group: which leaves it holds. May be empty; together they are all leaves, each once.
    pub held: Vec<Range<usize>>,
    /// Per rank of the group: which elements of the segment's sum it receives. May be empty; disjoint.
    pub shards: Vec<Range<usize>>,
}

/// Which segments are reduced, and who holds and receives what. Equal on all ranks of the group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReducePlan {
    /// The segments, in order.
    pub segments: Vec<Segment>,
}

/// A compiled [`ReducePlan`], reused every step.
#[derive(Clone)]
pub struct Reducer {
    comm: Communicator,
    compiled: Arc<Compiled>,
}

struct Compiled {
    /// Roots this rank contributes, and the least length of each, per segment.
    roots: Vec<(usize, usize)>,
    /// Per rank: what is sent to it, bucket by bucket.
    sends: Vec<Vec<Cut>>,
    /// `[bucket][rank]`: the lengths in bytes of the pieces it sends.
    pieces: Vec<Vec<Vec<usize>>>,
    /// By bucket.
    jobs: Arc<Vec<Vec<Job>>>,
    shard_len: usize,
}

/// Elements `range` of one of this rank's roots.
struct Cut {
    segment: usize,
    root: usize,
    range: Range<usize>,
}

/// One range of the output and the pieces it is the sum of.
struct Job {
    out: Range<usize>,
    /// (rank, its piece), in the order of the tree's leaves.
    sources: Vec<(usize, usize)>,
    tree: Arc<TreeSum>,
}

impl ReducePlan {
    /// Checks the plan and works out who sends what to whom.
    ///
    /// # Errors
    /// If lists do not have one entry per rank, the held leaves are not all leaves, each once, or shards overlap.
    pub fn compile(&self, comm: &Communicator) -> Result<Reducer, CommError> {
        let mut layouts: Vec<Layout> = Vec::with_capacity(self.segments.len());
        for (index, segment) in self.segments.iter().enumerate() {
            let refuse =
                |reason| comm.refuse(kind::REDUCE_SCATTER, format!("segment {index} of the plan: {reason}"));
            segment.check(comm.size()).map_err(refuse)?;
            // Neighbours often are held alike, experts of a layer for example.
            let same = index.checked_sub(1).filter(|&last| {
                self.segments[last].items == segment.items && self.segments[last].held == segment.held
            });
            layouts.push(match same {
                Some(last) => layouts[last].clone(),
                None => Layout::of(segment).map_err(refuse)?,
            });
        }
        let me = comm.rank();
        let roots = self.segments.iter().zip(&layouts).map(|(segment, layout)| {
            (layout.roots_of[me], segment.shards.iter().map(|shard| shard.end).max().unwrap_or(0))
        });
        let buckets = self.cut(&layouts, comm.size(), me, (comm.bucket_bytes() / size_of::<f32>()).max(1));
        let mut compiled = Compiled {
            roots: roots.collect(),
            sends: (0..comm.size()).map(|_| Vec::new()).collect(),
            pieces: Vec::with_capacity(buckets.len()),
            jobs: Arc::default(),
            shard_len: self.segments.iter().map(|segment| segment.shards[me].len()).sum(),
        };
        let mut jobs = Vec::with_capacity(buckets.len());
        for bucket in buckets {
            compiled.sends.iter_mut().zip(bucket.sends).for_each(|(all, cuts)| all.extend(cuts));
            compiled.pieces.push(bucket.pieces);
            jobs.push(bucket.jobs);
        }
        compiled.jobs = Arc::new(jobs);
        Ok(Reducer { comm: comm.clone(), compiled: Arc::new(compiled) })
    }

    /// Cuts each rank's concatenated shards into buckets of at most `bucket` elements.
    fn cut(&self, layouts: &[Layout], size: usize, me: usize, bucket: usize) -> Vec<Bucket> {
        // One at least: a call that moves nothing is a call, too.
        let mut buckets = vec![Bucket::new(size)];
        for to in 0..size {
            let mut before = 0;
            for (index, (segment, layout)) in self.segments.iter().zip(layouts).enumerate() {
                let shard = segment.shards[to].clone();
                let mut done = 0;
                while done < shard.len() {
                    let number = (before + done) / bucket;
                    let len = (shard.len() - done).min(bucket - (before + done) % bucket);
                    let range = shard.start + done..shard.start + done + len;
                    if buckets.len() <= number {
                        buckets.resize_with(number + 1, || Bucket::new(size));
                    }
                    buckets[number].add(index, layout, me, to, range, before + done);
                    done += len;
                }
                before += shard.len();
            }
        }
        buckets
    }
}

/// At most so many bytes from each rank to each rank, summed at once.
struct Bucket {
    /// Per rank: what is sent to it.
    sends: Vec<Vec<Cut>>,
    /// Per rank: the lengths in bytes of the pieces it sends.
    pieces: Vec<Vec<usize>>,
    jobs: Vec<Job>,
}

impl Bucket {
    fn new(size: usize) -> Self {
        let sends = (0..size).map(|_| Vec::new()).collect();
        Self { sends, pieces: vec![Vec::new(); size], jobs: Vec::new() }
    }

    /// Elements `range` of segment `index` go to rank `to`, at `at` of its output.
    fn add(&mut self, index: usize, layout: &Layout, me: usize, to: usize, range: Range<usize>, at: usize) {
        for root in 0..layout.roots_of[me] {
            self.sends[to].push(Cut { segment: index, root, range: range.clone() });
        }
        if to != me {
            return;
        }
        let first: Vec<usize> = self.pieces.iter().map(Vec::len).collect();
        for (pieces, &roots) in self.pieces.iter_mut().zip(&layout.roots_of) {
            pieces.extend(std::iter::repeat_n(range.len() * size_of::<f32>(), roots));
        }
        self.jobs.push(Job {
            out: at..at + range.len(),
            sources: layout.sources.iter().map(|&(rank, root)| (rank, first[rank] + root)).collect(),
            tree: Arc::clone(&layout.tree),
        });
    }
}

impl Segment {
    fn check(&self, size: usize) -> Result<(), String> {
        if self.held.len() != size || self.shards.len() != size {
            let (held, shards) = (self.held.len(), self.shards.len());
            return Err(format!("{held} held ranges and {shards} shards, but the group has {size} ranks"));
        }
        let mut shards: Vec<&Range<usize>> = self.shards.iter().filter(|shard| !shard.is_empty()).collect();
        shards.sort_unstable_by_key(|shard| shard.start);
        if let Some(pair) = shards.windows(2).find(|pair| pair[0].end > pair[1].start) {
            return Err(format!("shards {:?} and {:?} overlap", pair[0], pair[1]));
        }
        Ok(())
    }
}

/// The roots of a segment: whose they are and how they are added.
#[derive(Clone)]
struct Layout {
    /// How many roots each rank contributes.
    roots_of: Vec<usize>,
    /// (rank, its root), in the order of the leaves.
    sources: Vec<(usize, usize)>,
    tree: Arc<TreeSum>,
}

impl Layout {
    fn of(segment: &Segment) -> Result<Self, String> {
        Self::new(segment.items, &segment.held)
    }

    fn new(items: usize, held: &[Range<usize>]) -> Result<Self, String> {
        let mut nodes = Vec::new();
        for (rank, range) in held.iter().enumerate() {
            if range.end > items {
                return Err(format!("rank {rank} holds {range:?} of {items} items"));
            }
            let roots = tree::roots(range.clone(), items);
            nodes.extend(roots.into_iter().enumerate().map(|(root, node)| (node, rank, root)));
        }
        nodes.sort_unstable_by_key(|(node, ..)| node.start);
        let mut end = 0;
        for (node, rank, _) in &nodes {
            if node.start != end {
                let what = if node.start > end { "held by nobody" } else { "held twice" };
                let (from, to) = (end.min(node.start), end.max(node.start));
                return Err(format!("items {from}..{to} of {items} are {what} (at rank {rank})"));
            }
            end = node.end;
        }
        if end != items || items == 0 {
            return Err(format!("items {end}..{items} are held by nobody; a sum needs at least one item"));
        }
        let mut roots_of = vec![0; held.len()];
        for (_, rank, _) in &nodes {
            roots_of[*rank] += 1;
        }
        let ranges: Vec<Range<usize>> = nodes.iter().map(|(node, ..)| node.clone()).collect();
        let sources = nodes.into_iter().map(|(_, rank, root)| (rank, root)).collect();
        Ok(Self { roots_of, sources, tree: Arc::new(TreeSum::over(items, &ranges)) })
    }
}

impl Reducer {
    /// How many elements this rank receives: its shards of all segments.
    pub fn shard_len(&self) -> usize {
        self.compiled.shard_len
    }

    /// Sums every segment over all ranks along the tree and writes this rank's shards, concatenated in the order of the
    /// segments, to the start of `out`. `roots[segment]` are the partial sums of the maximal subtrees of the leaves
    /// this rank holds ([`tree::roots`]), in index order; each part is the whole segment, at least up to the end of
    /// its last shard.
    ///
    /// # Errors
    /// If roots are missing or too short, `out` is too short, or the run fails.
    pub fn reduce_scatter<R>(&self, roots: &[Vec<Part<f32>>], out: R) -> Result<R, CommError>
    where
        R: AsMut<[f32]> + Send + 'static,
    {
        self.start_reduce_scatter(roots, out)?.finish()
    }

    /// Starts a [`reduce_scatter`](Self::reduce_scatter).
    ///
    /// # Errors
    /// As the finished call.
    pub fn start_reduce_scatter<R>(
        &self,
        roots: &[Vec<Part<f32>>],
        mut out: R,
    ) -> Result<Pending<R>, CommError>
    where
        R: AsMut<[f32]> + Send + 'static,
    {
        let (len, compiled) = (out.as_mut().len(), &self.compiled);
        if len < compiled.shard_len {
            let need = compiled.shard_len;
            return Err(self.refuse(format!("the output has {len} elements, the shards have {need}")));
        }
        self.check_roots(roots)?;
        let part = |cut: &Cut| roots[cut.segment][cut.root].slice(cut.range.clone());
        let sends = compiled.sends.iter().map(|cuts| cuts.iter().map(part).collect()).collect();
        let sum = Box::new(Sum { out, jobs: Arc::clone(&compiled.jobs) });
        let landing = Landing::Combine { sum, pieces: compiled.pieces.clone() };
        self.comm.start_combine(sends, landing, take_sum::<R>)
    }

    fn check_roots(&self, roots: &[Vec<Part<f32>>]) -> Result<(), CommError> {
        if roots.len() != self.compiled.roots.len() {
            let (given, need) = (roots.len(), self.compiled.roots.len());
            return Err(self.refuse(format!("roots of {given} segments, the plan has {need}")));
        }
        for (index, (parts, &(count, len))) in roots.iter().zip(&self.compiled.roots).enumerate() {
            if parts.len() != count {
                let given = parts.len();
                return Err(self.refuse(format!("segment {index}: {given} roots, this rank holds {count}")));
            }
            if let Some(short) = parts.iter().find(|part| part.len() < len) {
                return Err(
                    self.refuse(format!("segment {index}: {short:?} is shorter than the segment, {len}"))
                );
            }
        }
        Ok(())
    }

    fn refuse(&self, reason: String) -> CommError {
        self.comm.refuse(kind::REDUCE_SCATTER, reason)
    }
}

/// Adds up the jobs of each bucket.
struct Sum<R> {
    out: R,
    jobs: Arc<Vec<Vec<Job>>>,
}

impl<R: AsMut<[f32]> + 'static> Combine for Sum<R> {
    fn combine(&mut self, bucket: usize, received: &[Vec<&[u8]>]) {
        let out = self.out.as_mut();
        let mut scratch = Vec::new();
        let mut sources: Vec<&[f32]> = Vec::new();
        for job in &self.jobs[bucket] {
            sources.clear();
            sources
                .extend(job.sources.iter().map(|&(rank, piece)| bytemuck::cast_slice(received[rank][piece])));
            job.tree.run(&sources, &mut out[job.out.clone()], &mut scratch);
        }
    }
}

fn take_sum<R: 'static>(landing: Landing) -> Option<R> {
    let Landing::Combine { sum, .. } = landing else { return None };
    let any: Box<dyn Any> = sum;
    any.downcast::<Sum<R>>().ok().map(|sum| sum.out)
}

impl Communicator {
    /// Sums small vectors of `width` elements over `items` leaves along the tree; every rank gets the sum.
    ///
    /// `held[p]` are the leaves that rank `p` holds, as in [`Segment::held`]. `roots` (`[roots of this rank, width]`)
    /// are the partial sums of this rank's maximal subtrees, in index order. All roots go to all ranks, so this is for
    /// norms, losses and counts; large vectors take a [`Reducer`].
    ///
    /// # Errors
    /// If the held leaves are not all leaves, each once, `roots` has another length, or the run fails.
    pub fn all_reduce_tree<T: Real>(
        &self,
        items: usize,
        held: &[Range<usize>],
        width: usize,
        roots: &[T],
    ) -> Result<Vec<T>, CommError> {
        let refuse = |reason| self.refuse(kind::ALL_REDUCE, reason);
        if held.len() != self.size() {
            let (given, size) = (held.len(), self.size());
            return Err(refuse(format!("{given} held ranges, but the group has {size} ranks")));
        }
        let layout = Layout::new(items, held).map_err(refuse)?;
        let count = layout.roots_of[self.rank()];
        if roots.len() != count * width {
            let given = roots.len();
            return Err(refuse(format!(
                "{given} values, but this rank has {count} roots of {width} elements"
            )));
        }
        let (all, ranges) = self.gather_known(&layout.roots_of, width, roots)?;
        let of = |&(rank, root): &(usize, usize)| {
            let start = ranges[rank].start + root * width;
            &all[start..start + width]
        };
        let sources: Vec<&[T]> = layout.sources.iter().map(of).collect();
        let mut out = vec![T::zeroed(); width];
        layout.tree.run(&sources, &mut out, &mut Vec::new());
        Ok(out)
    }

    /// Adds up integers over the ranks, element by element; every rank gets the sums. All ranks pass the same length.
    ///
    /// # Errors
    /// If lengths differ, a sum does not fit, or the run fails.
    pub fn all_reduce_u64(&self, values: &[u64]) -> Result<Vec<u64>, CommError> {
        let (all, _) = self.gather_known(&vec![1; self.size()], values.len(), values)?;
        let mut sums = vec![0u64; values.len()];
        for row in all.chunks_exact(values.len().max(1)) {
            for (sum, &value) in sums.iter_mut().zip(row) {
                let wider = sum.checked_add(value);
                *sum = wider.ok_or_else(|| {
                    self.refuse(kind::ALL_REDUCE, format!("{sum} + {value} does not fit into 64 bits"))
                })?;
            }
        }
        Ok(sums)
    }

    /// Every rank's `rows[rank]` rows of `width`, and where each rank's start.
    fn gather_known<T: Pod + Send + Sync>(
        &self,
        rows: &[usize],
        width: usize,
        values: &[T],
    ) -> Result<(Vec<T>, Vec<Range<usize>>), CommError> {
        let mut end = 0;
        let mut ranges = Vec::with_capacity(rows.len());
        for count in rows {
            ranges.push(end..end + count * width);
            end += count * width;
        }
        let send = Part::whole(Arc::new(values.to_vec()));
        let lists = ranges.iter().map(|range| vec![range.clone()]).collect();
        let all =
            self.exchange(kind::ALL_REDUCE, vec![vec![send]; self.size()], vec![T::zeroed(); end], lists)?;
        Ok((all, ranges))
    }
}
