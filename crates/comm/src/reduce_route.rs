//! Who sends what to whom in a reduce-scatter, and what is added where: worked out once, as pure arithmetic.
//!
//! Whose roots a receiver adds, [`Reduction`] says; here they become pieces in buckets.

use std::ops::Range;
use std::sync::Arc;

use unisono_mesh::reduction::{NodeRoot, Reduction, Source};

use crate::exact::Segment;
use crate::tree_sum::TreeSum;

/// What a rank does in a reduce-scatter.
pub(crate) struct Route {
    /// Sums inside nodes for receivers on others; none if no rank of any node has any.
    pub inner: Option<Stage>,
    /// Elements that this rank joins in it.
    pub joined_len: usize,
    /// Sums of the receivers.
    pub outer: Stage,
}

/// One call.
pub(crate) struct Stage {
    /// Per rank: what is sent to it, bucket by bucket.
    pub sends: Vec<Vec<Cut>>,
    /// `[bucket][rank]`: the lengths in bytes of the pieces it sends.
    pub pieces: Vec<Vec<Vec<usize>>>,
    /// The additions, by bucket.
    pub jobs: Arc<Vec<Vec<Job>>>,
}

/// A piece to send.
pub(crate) enum Cut {
    /// Elements `range` of one of this rank's roots.
    Root {
        /// The segment.
        segment: usize,
        /// The root.
        root: usize,
        /// Its elements.
        range: Range<usize>,
    },
    /// Elements of what this rank has joined in the inner stage.
    Joined(Range<usize>),
}

/// One range of the output and the pieces it is the sum of.
pub(crate) struct Job {
    pub out: Range<usize>,
    /// (rank, its piece), in the order of the tree's leaves.
    pub sources: Vec<(usize, usize)>,
    pub tree: Arc<TreeSum>,
}

/// The roots of a segment, and the trees by which they are added.
#[derive(Clone)]
pub(crate) struct Layout {
    reduction: Reduction,
    /// `[node][root of the node]`
    node_trees: Vec<Vec<Arc<TreeSum>>>,
    /// `[node of the receiver]`
    view_trees: Vec<Arc<TreeSum>>,
}

impl Layout {
    /// The roots of a sum over `items` leaves of which rank r, on node `node_of[r]`, holds `held[r]`.
    pub fn new(items: usize, held: &[Range<usize>], node_of: &[usize]) -> Result<Self, String> {
        let reduction = Reduction::new(items, held, node_of)?;
        // The tree below a node is that over as many items.
        let tree = |root: &NodeRoot| Arc::new(TreeSum::over(root.range.len(), &root.parts));
        let node_trees = reduction.nodes.iter().map(|roots| roots.iter().map(tree).collect()).collect();
        let view_trees =
            reduction.views.iter().map(|view| Arc::new(TreeSum::over(items, &view.ranges))).collect();
        Ok(Self { reduction, node_trees, view_trees })
    }

    /// `[rank]` how many roots it contributes.
    pub fn roots_of(&self) -> &[usize] {
        &self.reduction.roots_of
    }

    /// What a receiver on `node` adds, and how.
    pub fn view(&self, node: usize) -> (&[Source], &Arc<TreeSum>) {
        (&self.reduction.views[node].sources, &self.view_trees[node])
    }
}

impl Route {
    /// What rank `me` does; each rank's concatenated shards are cut into buckets of at most `bucket` elements.
    pub fn new(
        segments: &[Segment],
        layouts: &[Layout],
        node_of: &[usize],
        me: usize,
        bucket: usize,
    ) -> Self {
        let size = node_of.len();
        let mut draft = Draft { node_of, me, joined_len: 0, inner: Vec::new(), outer: Vec::new() };
        // One bucket at least: a call that moves nothing is a call, too.
        draft.open(0);
        for to in 0..size {
            let mut before = 0;
            for (index, (segment, layout)) in segments.iter().zip(layouts).enumerate() {
                let shard = segment.shards[to].clone();
                let mut done = 0;
                while done < shard.len() {
                    let number = (before + done) / bucket;
                    let len = (shard.len() - done).min(bucket - (before + done) % bucket);
                    let range = shard.start + done..shard.start + done + len;
                    draft.open(number);
                    draft.add(number, index, layout, to, range, before + done);
                    done += len;
                }
                before += shard.len();
            }
        }
        let inner = layouts.iter().any(|layout| layout.reduction.joins());
        Self {
            inner: inner.then(|| Stage::of(draft.inner, size)),
            joined_len: draft.joined_len,
            outer: Stage::of(draft.outer, size),
        }
    }
}

impl Stage {
    fn of(buckets: Vec<Bucket>, size: usize) -> Self {
        let mut sends: Vec<Vec<Cut>> = (0..size).map(|_| Vec::new()).collect();
        let (mut pieces, mut jobs) = (Vec::with_capacity(buckets.len()), Vec::with_capacity(buckets.len()));
        for bucket in buckets {
            sends.iter_mut().zip(bucket.sends).for_each(|(all, cuts)| all.extend(cuts));
            pieces.push(bucket.pieces);
            jobs.push(bucket.jobs);
        }
        Self { sends, pieces, jobs: Arc::new(jobs) }
    }
}

/// At most so many bytes from each rank to each receiver, summed at once.
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

    /// Expects `len` elements from `rank`; returns it with the piece's number.
    fn expect(&mut self, rank: usize, len: usize) -> (usize, usize) {
        self.pieces[rank].push(len * size_of::<f32>());
        (rank, self.pieces[rank].len() - 1)
    }
}

/// A route in the making: the buckets of both stages.
struct Draft<'a> {
    node_of: &'a [usize],
    me: usize,
    joined_len: usize,
    inner: Vec<Bucket>,
    outer: Vec<Bucket>,
}

impl Draft<'_> {
    /// Makes sure that there is a bucket `number`.
    fn open(&mut self, number: usize) {
        let (size, count) = (self.node_of.len(), self.outer.len().max(number + 1));
        self.inner.resize_with(count, || Bucket::new(size));
        self.outer.resize_with(count, || Bucket::new(size));
    }

    /// Elements `range` of segment `segment` go to rank `to`, at `at` of its output, in bucket `number`.
    fn add(
        &mut self,
        number: usize,
        segment: usize,
        layout: &Layout,
        to: usize,
        range: Range<usize>,
        at: usize,
    ) {
        let (addends, tree) = layout.view(self.node_of[to]);
        let mut sources = Vec::new();
        for source in addends {
            let (from, cut) = match *source {
                Source::Root { rank, root } => (rank, Cut::Root { segment, root, range: range.clone() }),
                Source::Joined { node, index } => {
                    let root = &layout.reduction.nodes[node][index];
                    self.join(number, segment, (root, &layout.node_trees[node][index]), to, &range)
                }
            };
            if from == self.me {
                self.outer[number].sends[to].push(cut);
            }
            if to == self.me {
                sources.push(self.outer[number].expect(from, range.len()));
            }
        }
        if to == self.me {
            let tree = Arc::clone(tree);
            self.outer[number].jobs.push(Job { out: at..at + range.len(), sources, tree });
        }
    }

    /// Joins a node's root for a receiver on another node: who does it, and what that rank then sends.
    fn join(
        &mut self,
        number: usize,
        segment: usize,
        (joined, tree): (&NodeRoot, &Arc<TreeSum>),
        to: usize,
        range: &Range<usize>,
    ) -> (usize, Cut) {
        let relay = joined.relay(to, self.node_of);
        let mut sources = Vec::new();
        for &(rank, root) in &joined.sources {
            if rank == self.me {
                self.inner[number].sends[relay].push(Cut::Root { segment, root, range: range.clone() });
            }
            if relay == self.me {
                sources.push(self.inner[number].expect(rank, range.len()));
            }
        }
        let out = self.joined_len..self.joined_len + range.len();
        if relay == self.me {
            self.joined_len = out.end;
            self.inner[number].jobs.push(Job { out: out.clone(), sources, tree: Arc::clone(tree) });
        }
        (relay, Cut::Joined(out))
    }
}
