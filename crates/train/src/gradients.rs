//! From the accumulators of waves to the partial sums that a rank brings to the reduce-scatter, along the tree.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use unisono_comm::Part;
use unisono_mesh::{ExpertPlacement, Fold, Instance, tree::Joiner};
use unisono_model::Gradients;
use unisono_plan::Layout;
use unisono_tensor::{Backend, Buffer};

use crate::shards::{SegmentKind, Shards};

/// A partial sum: a tree node and where it lies.
type Root<H> = (Range<usize>, Arc<H>, usize);

/// Joins the gradients of a rank's waves, in slot order, holding no more than the tree needs.
pub struct GradientFold<B: Backend> {
    backend: B,
    fold: Fold,
    placement: ExpertPlacement,
    dense_len: usize,
    moe_layers: usize,
    expert_len: usize,
    /// More than one wave: partial sums that wait for their sibling.
    dense: Joiner<B::Buf>,
    groups: Joiner<B::Buf>,
    /// One wave: its accumulators, joined in place.
    single: Option<WaveRoots<B>>,
}

struct WaveRoots<B: Backend> {
    gradients: Gradients<B>,
    dense: Vec<(Range<usize>, usize)>,
    /// expert -> (groups, instance)
    experts: BTreeMap<usize, Vec<(Range<usize>, usize)>>,
}

impl<B: Backend> GradientFold<B> {
    /// An empty fold.
    pub fn new(backend: B, fold: Fold, placement: ExpertPlacement, layout: &Layout) -> Self {
        Self {
            backend,
            fold,
            placement,
            dense_len: layout.dense_len(),
            moe_layers: layout.moe_layers().len(),
            expert_len: layout.expert_len(),
            dense: Joiner::new(fold.grid().slots()),
            groups: Joiner::new(fold.grid().groups()),
            single: None,
        }
    }

    /// Takes the gradients of a wave; `alone` if the rank has no other.
    pub fn absorb(&mut self, wave: Range<usize>, mut gradients: Gradients<B>, alone: bool) {
        let dense = self.join_slots(&wave, &mut gradients);
        if alone {
            let experts = self.join_groups(&wave, &mut gradients);
            self.single = Some(WaveRoots { gradients, dense, experts });
            return;
        }
        let backend = self.backend.clone();
        let add = |mut left: B::Buf, right: B::Buf| {
            backend.add(left.all_mut(), right.all());
            left
        };
        let Gradients { dense: slots, experts } = gradients;
        if wave.len() == 1 {
            self.dense.push(wave.clone(), slots, add);
        } else {
            for (node, index) in dense {
                let mut root = backend.alloc(self.dense_len);
                backend
                    .copy(slots.slice(index * self.dense_len..(index + 1) * self.dense_len), root.all_mut());
                self.dense.push(node, root, add);
            }
        }
        let group = wave.start / self.fold.grid().expert_group;
        self.groups.push(group..group + 1, experts, add);
    }

    fn join_slots(&self, wave: &Range<usize>, gradients: &mut Gradients<B>) -> Vec<(Range<usize>, usize)> {
        let mut joiner = Joiner::new(self.fold.grid().slots());
        for (index, slot) in wave.clone().enumerate() {
            joiner.push(slot..slot + 1, index, |left, right| {
                let (into, from) = (left * self.dense_len, right * self.dense_len);
                self.backend.add_within(gradients.dense.all_mut(), into, from, self.dense_len);
                left
            });
        }
        joiner.into_roots()
    }

    fn join_groups(
        &self,
        wave: &Range<usize>,
        gradients: &mut Gradients<B>,
    ) -> BTreeMap<usize, Vec<(Range<usize>, usize)>> {
        let block = self.moe_layers * self.expert_len;
        let mut joiners: BTreeMap<usize, Joiner<usize>> = BTreeMap::new();
        if block == 0 {
            return BTreeMap::new();
        }
        for (index, Instance { group, expert }) in
            self.placement.instances(wave.clone()).into_iter().enumerate()
        {
            let joiner = joiners.entry(expert).or_insert_with(|| Joiner::new(self.fold.grid().groups()));
            joiner.push(group..group + 1, index, |left, right| {
                self.backend.add_within(gradients.experts.all_mut(), left * block, right * block, block);
                left
            });
        }
        joiners.into_iter().map(|(expert, joiner)| (expert, joiner.into_roots())).collect()
    }

    /// The partial sums of every segment, in the order of `shards.segments`.
    pub fn into_roots(self, shards: &Shards) -> Vec<Vec<Part<f32>>> {
        let Self { backend, dense_len, moe_layers, expert_len, dense, groups, single, .. } = self;
        let (dense, experts) = match single {
            Some(roots) => roots.into_shared(&backend, dense_len, moe_layers * expert_len),
            None => Self::share(&backend, dense, groups, moe_layers * expert_len),
        };
        let part = |(_, buffer, offset): &Root<B::Host>, start: usize, len: usize| {
            Part::new(Arc::clone(buffer), offset + start..offset + start + len)
        };
        let roots_of = |kind: SegmentKind| match kind {
            SegmentKind::Dense => dense.iter().map(|root| part(root, 0, dense_len)).collect(),
            SegmentKind::Expert { moe_layer, expert } => {
                let roots = experts.of(expert);
                roots.iter().map(|root| part(root, moe_layer * expert_len, expert_len)).collect()
            }
        };
        shards.segments.iter().map(|segment| roots_of(segment.kind)).collect()
    }

    /// Whole groups: every expert's roots lie in the same buffers, one block after the other.
    fn share(
        backend: &B,
        dense: Joiner<B::Buf>,
        groups: Joiner<B::Buf>,
        block: usize,
    ) -> (Vec<Root<B::Host>>, ExpertRoots<B::Host>) {
        let shared = |joiner: Joiner<B::Buf>| -> Vec<Root<B::Host>> {
            let roots = joiner.into_roots().into_iter();
            roots.map(|(node, buffer)| (node, Arc::new(backend.hand_to_host(buffer)), 0)).collect()
        };
        (shared(dense), ExpertRoots::Blocks(shared(groups), block))
    }
}

enum ExpertRoots<H> {
    /// Buffers that hold every expert, in order.
    Blocks(Vec<Root<H>>, usize),
    /// By expert.
    Listed(BTreeMap<usize, Vec<Root<H>>>),
}

impl<H> ExpertRoots<H> {
    fn of(&self, expert: usize) -> Vec<Root<H>> {
        let clone =
            |(node, buffer, offset): &Root<H>, more: usize| (node.clone(), Arc::clone(buffer), offset + more);
        match self {
            Self::Blocks(roots, block) => roots.iter().map(|root| clone(root, expert * block)).collect(),
            Self::Listed(map) => map.get(&expert).into_iter().flatten().map(|root| clone(root, 0)).collect(),
        }
    }
}

impl<B: Backend> WaveRoots<B> {
    fn into_shared(
        self,
        backend: &B,
        dense_len: usize,
        block: usize,
    ) -> (Vec<Root<B::Host>>, ExpertRoots<B::Host>) {
        let slots = Arc::new(backend.hand_to_host(self.gradients.dense));
        let instances = Arc::new(backend.hand_to_host(self.gradients.experts));
        let dense = self.dense.into_iter().map(|(node, index)| (node, Arc::clone(&slots), index * dense_len));
        let experts = self.experts.into_iter().map(|(expert, roots)| {
            let roots = roots.into_iter();
            (expert, roots.map(|(node, index)| (node, Arc::clone(&instances), index * block)).collect())
        });
        (dense.collect(), ExpertRoots::Listed(experts.collect()))
    }
}
