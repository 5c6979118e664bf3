//! Gradients in shards (ZeRO-2), the backward of `parameters.rs`: a unit's gradient is reduced to shards as soon as it is
//! ready, while the pass goes on, and its accumulators are let go. ZeRO-1 reduces all units at the end of the pass.

use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;

use unisono_comm::{CommError, Communicator, Part, PendingReduce, ReducePlan, Reducer, Segment};
use unisono_mesh::{ExpertPlacement, Fold};
use unisono_model::{GradientSink, Profile, UnitGradients};
use unisono_plan::{Layout, SegmentKind, Shards};
use unisono_tensor::{Backend, Buffer};

use crate::config::LayoutConfig;
use crate::gradients::GradientFold;

/// How a rank's gradients become shards.
pub struct GradientReducer<B: Backend> {
    backend: B,
    fold: Fold,
    placement: ExpertPlacement,
    layout: Layout,
    shards: Rc<Shards>,
    rank: usize,
    reducers: Vec<Reducer>,
    as_ready: bool,
    /// How many reductions may be under way where they start as soon as units are ready: each stage of a reduction moves
    /// while another unit computes.
    under_way: usize,
    profile: Profile,
}

/// One pass of the model: a wave at one accumulation step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pass {
    /// The wave.
    pub wave: Range<usize>,
    /// The accumulation step.
    pub turn: usize,
    /// Whether the wave's accumulators are to be joined after it: they have all turns, or turns are joined one by one.
    pub completes: bool,
    /// Whether the rank has no later wave.
    pub last_wave: bool,
}

/// The passes of a step, in order. `every_turn` joins gradients over slots at every accumulation step.
pub fn passes(waves: &[Range<usize>], turns: usize, every_turn: bool) -> Vec<Pass> {
    let pass = |index: usize, turn: usize| Pass {
        wave: waves[index].clone(),
        turn,
        completes: every_turn || turn + 1 == turns,
        last_wave: index + 1 == waves.len(),
    };
    if every_turn {
        (0..turns).flat_map(|turn| (0..waves.len()).map(move |index| pass(index, turn))).collect()
    } else {
        (0..waves.len()).flat_map(|index| (0..turns).map(move |turn| pass(index, turn))).collect()
    }
}

/// The reduce-scatter of a unit's gradients.
fn reduce_plan(shards: &Shards, unit: usize) -> ReducePlan {
    let segments = shards.of_unit(unit).iter().map(|segment| Segment {
        items: segment.items,
        held: segment.held.clone(),
        shards: segment.shards.clone(),
    });
    ReducePlan { segments: segments.collect() }
}

impl<B: Backend> GradientReducer<B> {
    /// The reducer of the rank that `comm` (the world) speaks for.
    ///
    /// # Errors
    /// If the plan of an exchange does not fit the communicator.
    pub fn new(
        backend: B,
        layout: &Layout,
        placement: ExpertPlacement,
        fold: Fold,
        shards: Rc<Shards>,
        config: &LayoutConfig,
        comm: &Communicator,
        profile: Profile,
    ) -> Result<Self, CommError> {
        let reducers = (0..shards.units()).map(|unit| match config.hierarchical_reduce {
            true => reduce_plan(&shards, unit).compile_hierarchical(comm),
            false => reduce_plan(&shards, unit).compile(comm),
        });
        let stages = match (0..comm.size()).any(|rank| comm.node(rank) != comm.node(0)) {
            true if config.hierarchical_reduce => 2,
            _ => 1,
        };
        Ok(Self {
            backend,
            fold,
            placement,
            layout: layout.clone(),
            reducers: reducers.collect::<Result<_, _>>()?,
            shards,
            rank: comm.rank(),
            as_ready: config.zero >= 2,
            under_way: if config.overlap { stages } else { 0 },
            profile,
        })
    }

    /// The gradients of a new step.
    pub fn begin(&self) -> StepGradients<'_, B> {
        let units = (0..self.shards.units()).map(|_| UnitState::default()).collect();
        StepGradients { reducer: self, pass: None, units, under_way: VecDeque::new() }
    }
}

/// The gradients of a step.
pub struct StepGradients<'a, B: Backend> {
    reducer: &'a GradientReducer<B>,
    pass: Option<Pass>,
    units: Vec<UnitState<B>>,
    under_way: VecDeque<(usize, PendingReduce<B::Host, B::Host>)>,
}

struct UnitState<B: Backend> {
    /// Of the running wave.
    accumulators: Option<UnitGradients<B>>,
    /// What waves have brought.
    fold: Option<GradientFold<B>>,
    /// The sum over turns so far.
    shard: Option<B::Buf>,
}

impl<B: Backend> Default for UnitState<B> {
    fn default() -> Self {
        Self { accumulators: None, fold: None, shard: None }
    }
}

impl<B: Backend> StepGradients<'_, B> {
    /// Says which pass runs next.
    pub fn enter(&mut self, pass: Pass) {
        self.pass = Some(pass);
    }

    /// Reduces what has not been reduced yet, waits for all, and adds it to the shards.
    ///
    /// # Errors
    /// If an exchange fails.
    pub fn reduce(&mut self) -> Result<(), CommError> {
        for unit in 0..self.units.len() {
            self.start(unit)?;
        }
        while !self.under_way.is_empty() {
            self.finish_oldest()?;
        }
        Ok(())
    }

    /// The reduced gradient: this rank's shard of every unit.
    pub fn into_shards(self) -> Vec<B::Buf> {
        let empty = || self.reducer.backend.alloc(0);
        self.units.into_iter().map(|unit| unit.shard.unwrap_or_else(empty)).collect()
    }

    /// The gradients of every segment, not yet joined over ranks: for the baselines.
    pub fn into_roots(self) -> Vec<(SegmentKind, Vec<Part<f32>>)> {
        let shards = &self.reducer.shards;
        let folds = self.units.into_iter().enumerate();
        let roots = folds.filter_map(|(unit, state)| Some((unit, state.fold?)));
        let roots = roots.flat_map(|(unit, fold)| {
            let segments = shards.of_unit(unit);
            segments.iter().map(|segment| segment.kind).zip(fold.into_roots(segments))
        });
        roots.collect()
    }

    fn start(&mut self, unit: usize) -> Result<(), CommError> {
        let reducer = self.reducer;
        let Some(fold) = self.units[unit].fold.take() else { return Ok(()) };
        let roots = fold.into_roots(reducer.shards.of_unit(unit));
        let room = |len| reducer.backend.alloc_host(len);
        let out = room(reducer.shards.owned_of_unit(reducer.rank, unit));
        let pending = reducer.profile.communicate("reduce gradients", || {
            reducer.reducers[unit].start_reduce_scatter_by(&roots, out, room)
        })?;
        drop(roots);
        self.under_way.push_back((unit, pending));
        Ok(())
    }

    fn finish_oldest(&mut self) -> Result<(), CommError> {
        let Some((unit, pending)) = self.under_way.pop_front() else { return Ok(()) };
        let GradientReducer { backend, profile, .. } = self.reducer;
        let reduced = profile.communicate("reduce gradients", || pending.finish())?;
        let reduced = backend.take_from_host(reduced);
        let shard = &mut self.units[unit].shard;
        match shard {
            Some(shard) => backend.add(shard.all_mut(), reduced.all()),
            None => *shard = Some(reduced),
        }
        Ok(())
    }
}

impl<B: Backend> GradientSink<B> for StepGradients<'_, B> {
    fn unit(&mut self, unit: usize) -> &mut UnitGradients<B> {
        let GradientReducer { backend, layout, placement, .. } = self.reducer;
        let wave = self.pass.as_ref().map_or(0..0, |pass| pass.wave.clone());
        self.units[unit].accumulators.get_or_insert_with(|| {
            let instances = layout.moe_layer_of(unit).map_or(0, |_| placement.instances(wave.clone()).len());
            UnitGradients::zeros(backend, layout, unit, wave.len(), instances)
        })
    }

    fn ready(&mut self, unit: usize) -> Result<(), CommError> {
        let Some(pass) = self.pass.as_ref().filter(|pass| pass.completes) else { return Ok(()) };
        let (wave, last_wave) = (pass.wave.clone(), pass.last_wave);
        let GradientReducer { backend, fold, placement, layout, as_ready, under_way, profile, .. } =
            self.reducer;
        let state = &mut self.units[unit];
        let Some(gradients) = state.accumulators.take() else { return Ok(()) };
        let joined = state
            .fold
            .get_or_insert_with(|| GradientFold::new(backend.clone(), *fold, *placement, layout, unit));
        let alone = fold.wave_slots() == fold.slots_per_rank();
        profile.compute("join gradients", || joined.absorb(wave, gradients, alone));
        if *as_ready && last_wave {
            for (unit, pending) in std::mem::take(&mut self.under_way) {
                let pending = profile.communicate("reduce gradients", || pending.advance())?;
                self.under_way.push_back((unit, pending));
            }
            while self.under_way.len() >= (*under_way).max(1) {
                self.finish_oldest()?;
            }
            self.start(unit)?;
            if *under_way == 0 {
                self.finish_oldest()?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_run_inside_waves_unless_each_is_joined() {
        let order = |every_turn| {
            let list = passes(&[0..2, 2..4], 2, every_turn).into_iter();
            list.map(|p| (p.wave.start, p.turn, p.completes && p.last_wave)).collect::<Vec<_>>()
        };
        assert_eq!(order(false), [(0, 0, false), (0, 1, false), (2, 0, false), (2, 1, true)]);
        assert_eq!(order(true), [(0, 0, false), (2, 0, true), (0, 1, false), (2, 1, true)]);
    }
}
