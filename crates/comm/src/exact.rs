//! Exact reductions: the transport moves bytes, the sums are ours, along the fixed tree.
//!
//! A *segment* is a vector that is a sum over `items` leaves, joined by the tree over their indices
//! ([`unisono_mesh::tree`]). Every rank holds a contiguous range of the leaves and contributes the partial sums of that
//! range's maximal subtrees (its *roots*), so the additions that are left, and their order, depend on `items` alone.

use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::Pod;
use unisono_mesh::reduction::Source;

use crate::communicator::{Communicator, kind};
use crate::error::CommError;
use crate::part::Part;
use crate::pending::Pending;
use crate::reduce_route::{Cut, Job, Layout, Route, Stage};
use crate::transport::{Combine, Landing, Workers};
use crate::tree_sum::Real;

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
    route: Route,
    shard_len: usize,
    /// What a reduce-scatter of a library would send, if it could: `(segment, elements)` by receiver, and how many each gets.
    plain: Option<(Vec<(usize, Range<usize>)>, Vec<usize>)>,
}

impl ReducePlan {
    /// Checks the plan and works out who sends what to whom: every rank its roots to every receiver.
    ///
    /// # Errors
    /// If lists do not have one entry per rank, the held leaves are not all leaves, each once, or shards overlap.
    pub fn compile(&self, comm: &Communicator) -> Result<Reducer, CommError> {
        self.compile_over(comm, &vec![0; comm.size()])
    }

    /// The same for ranks on several nodes: what ranks of a node hold together is joined inside it first, so that each
    /// node sends as few roots as one rank in its place would. The sums have the same bits.
    ///
    /// # Errors
    /// As [`compile`](Self::compile).
    pub fn compile_hierarchical(&self, comm: &Communicator) -> Result<Reducer, CommError> {
        self.compile_over(comm, &comm.node_numbers())
    }

    fn compile_over(&self, comm: &Communicator, node_of: &[usize]) -> Result<Reducer, CommError> {
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
                None => Layout::new(segment.items, &segment.held, node_of).map_err(refuse)?,
            });
        }
        let me = comm.rank();
        let roots = self.segments.iter().zip(&layouts).map(|(segment, layout)| {
            (layout.roots_of()[me], segment.shards.iter().map(|shard| shard.end).max().unwrap_or(0))
        });
        let bucket = (comm.bucket_bytes() / size_of::<f32>()).max(1);
        Ok(Reducer {
            comm: comm.clone(),
            compiled: Arc::new(Compiled {
                roots: roots.collect(),
                route: Route::new(&self.segments, &layouts, node_of, me, bucket),
                plain: self.plain(comm),
                shard_len: self.segments.iter().map(|segment| segment.shards[me].len()).sum(),
            }),
        })
    }
}

impl ReducePlan {
    /// The plan as a reduce-scatter over the world, where each rank holds the leaf of its number.
    fn plain(&self, comm: &Communicator) -> Option<(Vec<(usize, Range<usize>)>, Vec<usize>)> {
        let size = comm.size();
        let one_each = |segment: &Segment| {
            segment.items == size
                && segment.held.iter().enumerate().all(|(rank, held)| *held == (rank..rank + 1))
        };
        if size != comm.core().transport.size() || !self.segments.iter().all(one_each) {
            return None;
        }
        let shards = |rank: usize| {
            self.segments
                .iter()
                .enumerate()
                .map(move |(index, segment)| (index, segment.shards[rank].clone()))
        };
        let count = |rank: usize| shards(rank).map(|(_, shard)| shard.len()).sum();
        Some(((0..size).flat_map(shards).collect(), (0..size).map(count).collect()))
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

impl Reducer {
    /// How many elements this rank receives: its shards of all segments.
    pub fn shard_len(&self) -> usize {
        self.compiled.shard_len
    }

    /// Sums every segment over all ranks along the tree and writes this rank's shards, concatenated in the order of the
    /// segments, to the start of `out`. `roots[segment]` are the partial sums of the maximal subtrees of the leaves
    /// this rank holds ([`unisono_mesh::tree::roots`]), in index order; each part is the whole segment, at least up to the end of
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

    /// Starts a [`reduce_scatter`](Self::reduce_scatter). All ranks advance and finish hierarchical ones in the same
    /// order.
    ///
    /// # Errors
    /// As the finished call.
    pub fn start_reduce_scatter<R>(
        &self,
        roots: &[Vec<Part<f32>>],
        out: R,
    ) -> Result<PendingReduce<R, Vec<f32>>, CommError>
    where
        R: AsMut<[f32]> + Send + 'static,
    {
        self.start_reduce_scatter_by(roots, out, |len| vec![0.0; len])
    }

    /// The same with a buffer of `staging(len)` elements for what this rank joins inside its node, if it does; it is let go
    /// when the call is finished.
    ///
    /// # Errors
    /// As the finished call.
    pub fn start_reduce_scatter_by<R, S>(
        &self,
        roots: &[Vec<Part<f32>>],
        mut out: R,
        staging: impl FnOnce(usize) -> S,
    ) -> Result<PendingReduce<R, S>, CommError>
    where
        R: AsMut<[f32]> + Send + 'static,
        S: AsRef<[f32]> + AsMut<[f32]> + Send + Sync + 'static,
    {
        let (len, compiled) = (out.as_mut().len(), &self.compiled);
        if len < compiled.shard_len {
            let need = compiled.shard_len;
            return Err(self.refuse(format!("the output has {len} elements, the shards have {need}")));
        }
        self.check_roots(roots)?;
        if let Some(summed) = self.sum_natively(roots, out.as_mut()) {
            summed?;
            return Ok(PendingReduce { reducer: self.clone(), stage: PendingStage::Summed(out) });
        }
        let Some(inner) = &compiled.route.inner else {
            let outer = self.start_outer(roots, None::<&Arc<S>>, out)?;
            return Ok(PendingReduce { reducer: self.clone(), stage: PendingStage::Outer(outer) });
        };
        let joined = staging(compiled.route.joined_len);
        let pending = self.start_stage(kind::REDUCE_IN_NODE, inner, roots, None::<&Arc<S>>, joined)?;
        let stage = PendingStage::Inner { pending, roots: roots.to_vec(), out };
        Ok(PendingReduce { reducer: self.clone(), stage })
    }

    fn start_outer<R, S>(
        &self,
        roots: &[Vec<Part<f32>>],
        joined: Option<&Arc<S>>,
        out: R,
    ) -> Result<Pending<R>, CommError>
    where
        R: AsMut<[f32]> + Send + 'static,
        S: AsRef<[f32]> + Send + Sync + 'static,
    {
        self.start_stage(kind::REDUCE_SCATTER, &self.compiled.route.outer, roots, joined, out)
    }

    fn start_stage<R, S>(
        &self,
        kind: &'static str,
        stage: &Stage,
        roots: &[Vec<Part<f32>>],
        joined: Option<&Arc<S>>,
        out: R,
    ) -> Result<Pending<R>, CommError>
    where
        R: AsMut<[f32]> + Send + 'static,
        S: AsRef<[f32]> + Send + Sync + 'static,
    {
        let part = |cut: &Cut| match cut {
            Cut::Root { segment, root, range } => Some(roots[*segment][*root].slice(range.clone())),
            Cut::Joined(range) => Some(Part::new(Arc::clone(joined?), range.clone())),
        };
        let sends = stage.sends.iter().map(|cuts| cuts.iter().filter_map(part).collect()).collect();
        let sum = Box::new(Sum { out, jobs: Arc::clone(&stage.jobs) });
        let landing = Landing::Combine { sum, pieces: stage.pieces.clone() };
        self.comm.start_combine(kind, sends, landing, take_sum::<R>)
    }

    /// The sum by the transport's own reduce-scatter, if it is to be used and can express the plan.
    fn sum_natively(&self, roots: &[Vec<Part<f32>>], out: &mut [f32]) -> Option<Result<(), CommError>> {
        let (cuts, counts) = self.compiled.plain.as_ref()?;
        let sums = self.comm.core().transport.native_sums()?;
        let mut send: Vec<f32> = Vec::with_capacity(counts.iter().sum());
        for (segment, range) in cuts {
            let piece = roots[*segment][0].slice(range.clone()).into_piece();
            send.extend_from_slice(bytemuck::cast_slice(piece.bytes()));
        }
        Some(sums.reduce_scatter(&send, counts, out))
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

/// A started [`Reducer::reduce_scatter`].
#[must_use = "a started call must be finished"]
pub struct PendingReduce<R, S> {
    reducer: Reducer,
    stage: PendingStage<R, S>,
}

enum PendingStage<R, S> {
    /// Sums inside nodes.
    Inner { pending: Pending<S>, roots: Vec<Vec<Part<f32>>>, out: R },
    /// Sums of the receivers.
    Outer(Pending<R>),
    /// The sums, which were the library's.
    Summed(R),
}

impl<R, S> PendingReduce<R, S>
where
    R: AsMut<[f32]> + Send + 'static,
    S: AsRef<[f32]> + AsMut<[f32]> + Send + Sync + 'static,
{
    /// Finishes the sums inside nodes, if they are under way, and starts what goes between nodes.
    ///
    /// # Errors
    /// [`CommError::Failed`] if the run fails.
    pub fn advance(self) -> Result<Self, CommError> {
        let Self { reducer, stage } = self;
        let stage = match stage {
            PendingStage::Inner { pending, roots, out } => {
                let joined = Arc::new(pending.finish()?);
                PendingStage::Outer(reducer.start_outer(&roots, Some(&joined), out)?)
            }
            later => later,
        };
        Ok(Self { reducer, stage })
    }

    /// Waits for the sums and hands the output back; no clone of the roots is left.
    ///
    /// # Errors
    /// [`CommError::Failed`] if the run fails.
    pub fn finish(self) -> Result<R, CommError> {
        let Self { reducer, stage } = self.advance()?;
        match stage {
            PendingStage::Outer(pending) => pending.finish(),
            PendingStage::Summed(out) => Ok(out),
            PendingStage::Inner { .. } => {
                Err(reducer.refuse("its sums inside nodes are not finished".into()))
            }
        }
    }
}

/// Elements of a sum that one thread takes at a time.
const SUMMED_AT_ONCE: usize = 64 * 1024;

/// Adds up the jobs of each bucket.
struct Sum<R> {
    out: R,
    jobs: Arc<Vec<Vec<Job>>>,
}

impl<R: AsMut<[f32]> + 'static> Combine for Sum<R> {
    fn combine(&mut self, bucket: usize, received: &[Vec<&[u8]>], workers: &Workers) {
        // Jobs of a bucket stand in the order of what they fill.
        let (mut rest, mut before) = (self.out.as_mut(), 0);
        let mut parts = Vec::new();
        for job in &self.jobs[bucket] {
            rest = &mut rest[job.out.start - before..];
            before = job.out.end;
            for start in (0..job.out.len()).step_by(SUMMED_AT_ONCE) {
                let range = start..job.out.len().min(start + SUMMED_AT_ONCE);
                let (out, later) = rest.split_at_mut(range.len());
                rest = later;
                parts.push(Mutex::new((job, range, out)));
            }
        }
        workers(parts.len(), &|index| {
            let part = &mut *parts[index].lock().unwrap_or_else(PoisonError::into_inner);
            let (job, range, out) = part;
            let of =
                |&(rank, piece): &(usize, usize)| &bytemuck::cast_slice(received[rank][piece])[range.clone()];
            let sources: Vec<&[f32]> = job.sources.iter().map(of).collect();
            job.tree.run(&sources, out, &mut Vec::new());
        });
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
        let layout = Layout::new(items, held, &vec![0; self.size()]).map_err(refuse)?;
        let count = layout.roots_of()[self.rank()];
        if roots.len() != count * width {
            let given = roots.len();
            return Err(refuse(format!(
                "{given} values, but this rank has {count} roots of {width} elements"
            )));
        }
        let (all, ranges) = self.gather_known(layout.roots_of(), width, roots)?;
        let (addends, tree) = layout.view(0);
        let of = |source: &Source| match *source {
            Source::Root { rank, root } => {
                let start = ranges[rank].start + root * width;
                Some(&all[start..start + width])
            }
            Source::Joined { .. } => None,
        };
        let sources: Vec<&[T]> = addends.iter().filter_map(of).collect();
        let mut out = vec![T::zeroed(); width];
        tree.run(&sources, &mut out, &mut Vec::new());
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
