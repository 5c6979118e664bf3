//! Who sends what to whom in a reduce-scatter, and what is added where: worked out once, as pure arithmetic.
//!
//! A receiver adds the roots of the ranks on its own node, and what other nodes send. In a hierarchical plan a node sends the
//! roots of the maximal subtrees of what its ranks hold *together*: those that no rank holds alone are joined inside the
//! node first, by one of the ranks that hold a part. Both follow the one tree, so nodes may be cut anywhere.

use std::ops::Range;
use std::sync::Arc;

use unisono_mesh::tree;

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

/// The roots of a segment: whose they are and how they are added.
#[derive(Clone)]
pub(crate) struct Layout {
    /// How many roots each rank contributes.
    pub roots_of: Vec<usize>,
    /// By node: the roots of what its ranks hold together.
    nodes: Vec<Vec<NodeRoot>>,
    /// By the receiver's node: what it adds.
    views: Vec<View>,
}

/// A root of what a node's ranks hold together.
#[derive(Clone)]
struct NodeRoot {
    range: Range<usize>,
    /// The ranks' roots it is made of, (rank, root), in the order of the leaves.
    sources: Vec<(usize, usize)>,
    tree: Arc<TreeSum>,
}

/// What the receivers on one node add, in the order of the leaves.
#[derive(Clone)]
pub(crate) struct View {
    pub sources: Vec<Source>,
    pub tree: Arc<TreeSum>,
}

/// What a receiver adds.
#[derive(Clone, Copy)]
pub(crate) enum Source {
    /// A rank's root.
    Root { rank: usize, root: usize },
    /// A joined root of a node.
    Joined { node: usize, index: usize },
}

impl Layout {
    /// The roots of a sum over `items` leaves of which rank r, on node `node_of[r]`, holds `held[r]`.
    pub fn new(items: usize, held: &[Range<usize>], node_of: &[usize]) -> Result<Self, String> {
        let all = checked_roots(items, held)?;
        let mut roots_of = vec![0; held.len()];
        for (_, rank, _) in &all {
            roots_of[*rank] += 1;
        }
        let count = node_of.iter().max().map_or(1, |last| last + 1);
        let nodes: Vec<Vec<NodeRoot>> = (0..count)
            .map(|node| {
                let of_node = all.iter().filter(|(_, rank, _)| node_of[*rank] == node).cloned();
                node_roots(items, &of_node.collect::<Vec<_>>())
            })
            .collect();
        let views = (0..count).map(|node| View::new(items, &all, &nodes, node_of, node)).collect();
        Ok(Self { roots_of, nodes, views })
    }

    /// What a receiver on `node` adds.
    pub fn view(&self, node: usize) -> &View {
        &self.views[node]
    }

    /// Whether anything is joined inside a node for others.
    fn joins(&self) -> bool {
        let joined = |view: &View| view.sources.iter().any(|source| matches!(source, Source::Joined { .. }));
        self.views.iter().any(joined)
    }
}

impl View {
    fn new(
        items: usize,
        all: &[(Range<usize>, usize, usize)],
        nodes: &[Vec<NodeRoot>],
        node_of: &[usize],
        own: usize,
    ) -> Self {
        let near = all.iter().filter(|(_, rank, _)| node_of[*rank] == own);
        let mut list: Vec<(Range<usize>, Source)> = near
            .map(|(range, rank, root)| (range.clone(), Source::Root { rank: *rank, root: *root }))
            .collect();
        for (node, roots) in nodes.iter().enumerate().filter(|(node, _)| *node != own) {
            list.extend(roots.iter().enumerate().map(|(index, joined)| {
                let source = match joined.sources[..] {
                    [(rank, root)] => Source::Root { rank, root },
                    _ => Source::Joined { node, index },
                };
                (joined.range.clone(), source)
            }));
        }
        list.sort_unstable_by_key(|(range, _)| range.start);
        let ranges: Vec<Range<usize>> = list.iter().map(|(range, _)| range.clone()).collect();
        let sources = list.into_iter().map(|(_, source)| source).collect();
        Self { sources, tree: Arc::new(TreeSum::over(items, &ranges)) }
    }
}

/// All roots, (leaves, rank, root), in the order of the leaves.
fn checked_roots(items: usize, held: &[Range<usize>]) -> Result<Vec<(Range<usize>, usize, usize)>, String> {
    let mut all = Vec::new();
    for (rank, range) in held.iter().enumerate() {
        if range.end > items {
            return Err(format!("rank {rank} holds {range:?} of {items} items"));
        }
        let roots = tree::roots(range.clone(), items);
        all.extend(roots.into_iter().enumerate().map(|(root, node)| (node, rank, root)));
    }
    all.sort_unstable_by_key(|(node, ..)| node.start);
    let mut end = 0;
    for (node, rank, _) in &all {
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
    Ok(all)
}

/// The maximal subtrees of what a node's ranks hold together; `roots` are theirs, in the order of the leaves.
fn node_roots(items: usize, roots: &[(Range<usize>, usize, usize)]) -> Vec<NodeRoot> {
    let mut found = Vec::new();
    for run in roots.chunk_by(|left, right| left.0.end == right.0.start) {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
        for range in tree::roots(first.0.start..last.0.end, items) {
            let inside = run.iter().filter(|(node, ..)| range.start <= node.start && node.end <= range.end);
            let parts: Vec<Range<usize>> =
                inside.clone().map(|(n, ..)| n.start - range.start..n.end - range.start).collect();
            let sources = inside.map(|(_, rank, root)| (*rank, *root)).collect();
            // The tree below a node is that over as many items.
            let tree = Arc::new(TreeSum::over(range.len(), &parts));
            found.push(NodeRoot { range, sources, tree });
        }
    }
    found
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
        let inner = layouts.iter().any(Layout::joins);
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
        let view = layout.view(self.node_of[to]);
        let mut sources = Vec::new();
        for source in &view.sources {
            let (from, cut) = match *source {
                Source::Root { rank, root } => (rank, Cut::Root { segment, root, range: range.clone() }),
                Source::Joined { node, index } => {
                    self.join(number, segment, &layout.nodes[node][index], to, &range)
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
            let tree = Arc::clone(&view.tree);
            self.outer[number].jobs.push(Job { out: at..at + range.len(), sources, tree });
        }
    }

    /// Joins a node's root for a receiver on another node: who does it, and what that rank then sends.
    fn join(
        &mut self,
        number: usize,
        segment: usize,
        joined: &NodeRoot,
        to: usize,
        range: &Range<usize>,
    ) -> (usize, Cut) {
        // Receivers of a node take turns, so that the ranks that could do it share the work.
        let turn = self.node_of[..to].iter().filter(|node| **node == self.node_of[to]).count();
        let (relay, _) = joined.sources[turn % joined.sources.len()];
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
            self.inner[number].jobs.push(Job { out: out.clone(), sources, tree: Arc::clone(&joined.tree) });
        }
        (relay, Cut::Joined(out))
    }
}
