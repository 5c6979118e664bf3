//! From the accumulators of waves to the partial sums of a unit that a rank brings to its reduce-scatter, along the tree.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use unisono_comm::Part;
use unisono_mesh::{ExpertPlacement, Fold, Instance, tree::Joiner};
use unisono_model::UnitGradients;
use unisono_plan::{Layout, SegmentKind, ShardedSegment};
use unisono_tensor::{Backend, Buffer};

/// A partial sum: a tree node and where it lies.
type Root<H> = (Range<usize>, Arc<H>, usize);

/// Joins a unit's gradients of a rank's waves, in slot order, holding no more than the tree needs.
pub struct GradientFold<B: Backend> {
    backend: B,
    fold: Fold,
    placement: ExpertPlacement,
    dense_len: usize,
    /// 0 for units without experts.
    expert_len: usize,
    /// More than one wave: partial sums that wait for their sibling.
    dense: Joiner<B::Buf>,
    groups: Joiner<B::Buf>,
    /// One wave: its accumulators, joined in place.
    single: Option<WaveRoots<B>>,
}

struct WaveRoots<B: Backend> {
    gradients: UnitGradients<B>,
    dense: Vec<(Range<usize>, usize)>,
    /// expert -> (groups, instance)
    experts: BTreeMap<usize, Vec<(Range<usize>, usize)>>,
}

impl<B: Backend> GradientFold<B> {
    /// An empty fold of a unit.
    pub fn new(backend: B, fold: Fold, placement: ExpertPlacement, layout: &Layout, unit: usize) -> Self {
        Self {
            backend,
            fold,
            placement,
            dense_len: layout.unit_len(unit),
            expert_len: layout.moe_layer_of(unit).map_or(0, |_| layout.expert_len()),
            dense: Joiner::new(fold.grid().slots()),
            groups: Joiner::new(fold.grid().groups()),
            single: None,
        }
    }

    /// Takes the gradients of a wave; `alone` if the rank has no other.
    pub fn absorb(&mut self, wave: Range<usize>, mut gradients: UnitGradients<B>, alone: bool) {
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
        let UnitGradients { dense: slots, experts, .. } = gradients;
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

    fn join_slots(
        &self,
        wave: &Range<usize>,
        gradients: &mut UnitGradients<B>,
    ) -> Vec<(Range<usize>, usize)> {
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
        gradients: &mut UnitGradients<B>,
    ) -> BTreeMap<usize, Vec<(Range<usize>, usize)>> {
        let block = self.expert_len;
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

    /// The partial sums of each of the unit's segments.
    pub fn into_roots(self, segments: &[ShardedSegment]) -> Vec<Vec<Part<f32>>> {
        let Self { backend, dense_len, expert_len, dense, groups, single, .. } = self;
        let (dense, experts) = match single {
            Some(roots) => roots.into_shared(&backend, dense_len, expert_len),
            None => (shared(&backend, dense), ExpertRoots::Blocks(shared(&backend, groups), expert_len)),
        };
        let part = |(_, buffer, offset): &Root<B::Host>, len: usize| {
            Part::new(Arc::clone(buffer), *offset..offset + len)
        };
        let roots_of = |kind: SegmentKind| match kind {
            SegmentKind::Dense { .. } => dense.iter().map(|root| part(root, dense_len)).collect(),
            SegmentKind::Expert { expert, .. } => {
                experts.of(expert).iter().map(|root| part(root, expert_len)).collect()
            }
        };
        segments.iter().map(|segment| roots_of(segment.kind)).collect()
    }
}

fn shared<B: Backend>(backend: &B, joiner: Joiner<B::Buf>) -> Vec<Root<B::Host>> {
    let roots = joiner.into_roots().into_iter();
    roots.map(|(node, buffer)| (node, Arc::new(backend.hand_to_host(buffer)), 0)).collect()
}

enum ExpertRoots<H> {
    /// Whole groups: buffers that hold every expert, in order, each a block of so many elements.
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
