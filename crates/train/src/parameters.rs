//! Parameters in shards (ZeRO-3), the forward of `reduction.rs`: a unit is gathered before it is used, the next one is on
//! its way meanwhile, and what was gathered is let go after use. Under ZeRO-1 and 2 every rank keeps the units whole
//! and gathers them after each update.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use unisono_comm::{CommError, Communicator, GatherPlan, GatherSegment, Gatherer, Part, PendingGather};
use unisono_model::{ParameterSource, Profile, UnitParameters};
use unisono_plan::{Layout, Piece, SegmentKind, ShardedSegment, Shards};
use unisono_tensor::{Backend, Buffer};

use crate::config::LayoutConfig;

/// A rank's parameters.
pub struct ShardedParameters<B: Backend> {
    backend: B,
    profile: Profile,
    /// `[unit]`
    bias: Vec<Rc<[f32]>>,
    units: Vec<UnitPlan>,
    kept: Vec<KeptPart>,
    store: Store<B>,
}

/// How a unit is gathered.
struct UnitPlan {
    gatherer: Gatherer,
    /// Elements of the whole unit on this rank.
    len: usize,
    /// Where the shards that this rank sends lie in the whole unit.
    sent: Vec<Range<usize>>,
}

/// A part of a segment that the rank keeps.
#[derive(Debug, Clone)]
struct KeptPart {
    unit: usize,
    kind: SegmentKind,
    /// Elements of the segment.
    range: Range<usize>,
    /// Where they start in what the rank keeps of the unit.
    place: usize,
}

enum Store<B: Backend> {
    /// Every unit.
    Whole(Vec<Rc<B::Buf>>),
    /// This rank's shards of every unit, as they are sent.
    Shards { shards: Vec<Arc<B::Host>>, gathered: Box<RefCell<Gathered<B>>>, overlap: bool },
}

/// A unit on its way.
type Gathering<B> = PendingGather<f32, <B as Backend>::Host, <B as Backend>::Host>;

/// Units in use, and the one that is on its way.
struct Gathered<B: Backend> {
    used: Vec<Weak<B::Buf>>,
    coming: Option<(usize, Gathering<B>)>,
}

impl<B: Backend> ShardedParameters<B> {
    /// Parameters, all zero, of the rank that `comm` (the world) speaks for; `held` are the experts it computes with.
    ///
    /// # Errors
    /// If the plan of an exchange does not fit the communicator.
    pub fn new(
        backend: B,
        layout: &Layout,
        shards: &Shards,
        held: &[usize],
        config: &LayoutConfig,
        comm: &Communicator,
        profile: Profile,
    ) -> Result<Self, CommError> {
        let (rank, in_shards) = (comm.rank(), config.zero >= 3);
        // Whole units keep what only one rank holds, and this rank's own shards, where they are; shards are always copied
        // together.
        let moves = |segment: &ShardedSegment| in_shards || segment.is_shared();
        let mut units = Vec::with_capacity(layout.units());
        for unit in 0..layout.units() {
            let place = |kind| place_in_unit(layout, held, unit, kind);
            let experts = layout.moe_layer_of(unit).map_or(0, |_| held.len());
            let sent = shards.of_unit(unit).iter().filter(|segment| moves(segment)).map(|segment| {
                let (start, shard) = (place(segment.kind), &segment.shards[rank]);
                start + shard.start..start + shard.end
            });
            let plan = gather_plan(shards, unit, !in_shards, moves, place);
            units.push(UnitPlan {
                gatherer: match config.hierarchical_gather {
                    true => plan.compile_hierarchical(comm)?,
                    false => plan.compile(comm)?,
                },
                len: layout.unit_len(unit) + experts * layout.expert_len(),
                sent: sent.collect(),
            });
        }
        let kept = match in_shards {
            true => kept_shards(shards, rank),
            false => kept_whole(layout, shards, held, rank),
        };
        let store = match in_shards {
            true => {
                let zeros = |unit| backend.zeros(shards.owned_of_unit(rank, unit));
                Store::Shards {
                    shards: (0..layout.units()).map(|u| Arc::new(backend.hand_to_host(zeros(u)))).collect(),
                    gathered: Box::new(RefCell::new(Gathered {
                        used: std::iter::repeat_with(Weak::new).take(layout.units()).collect(),
                        coming: None,
                    })),
                    overlap: config.overlap,
                }
            }
            false => Store::Whole(units.iter().map(|unit| Rc::new(backend.zeros(unit.len))).collect()),
        };
        let bias = |unit| layout.moe_layer_of(unit).map_or(0, |_| layout.num_experts());
        let bias = (0..layout.units()).map(|unit| vec![0.0; bias(unit)].into()).collect();
        Ok(Self { backend, profile, bias, units, kept, store })
    }

    /// Where a piece that this rank owns starts in what it keeps of the piece's unit.
    pub fn place(&self, piece: &Piece) -> usize {
        let held = self.kept.iter().find(|part| {
            (part.unit, part.kind) == (piece.unit, piece.kind) && part.range.start <= piece.range.start
        });
        held.map_or(0, |part| part.place + piece.range.start - part.range.start)
    }

    /// The balance bias of a unit; empty unless it is an MoE layer.
    pub fn bias(&self, unit: usize) -> &[f32] {
        &self.bias[unit]
    }

    /// Replaces the balance bias of a unit.
    pub fn set_bias(&mut self, unit: usize, bias: Vec<f32>) {
        self.bias[unit] = bias.into();
    }

    /// Elements `range` of what the rank keeps of a unit.
    pub fn read(&self, unit: usize, range: Range<usize>) -> Vec<f32> {
        match &self.store {
            Store::Shards { shards, .. } => (*shards[unit]).as_ref()[range].to_vec(),
            Store::Whole(units) => {
                let mut values = vec![0.0; range.len()];
                self.backend.download(units[unit].slice(range), &mut values);
                values
            }
        }
    }

    /// Fills everything that the rank keeps from `read(segment, elements of it)`.
    ///
    /// # Errors
    /// What `read` says.
    pub fn fill<E>(
        &mut self,
        mut read: impl FnMut(SegmentKind, Range<usize>) -> Result<Vec<f32>, E>,
    ) -> Result<(), E> {
        for KeptPart { unit, kind, range, place } in &self.kept {
            let values = read(*kind, range.clone())?;
            let target = *place..*place + range.len();
            match &mut self.store {
                Store::Shards { shards, .. } => {
                    let shard = Arc::get_mut(&mut shards[*unit]).expect("no exchange is under way");
                    shard.as_mut()[target].copy_from_slice(&values);
                }
                Store::Whole(units) => {
                    let unit = Rc::get_mut(&mut units[*unit]).expect("no pass is under way");
                    self.backend.upload(&values, unit.slice_mut(target));
                }
            }
        }
        Ok(())
    }

    /// Changes what the rank keeps of a unit, and tells no other rank.
    pub(crate) fn change(&mut self, unit: usize, change: impl FnOnce(&mut B::Buf)) {
        match &mut self.store {
            Store::Shards { shards, .. } => {
                let host = std::mem::replace(&mut shards[unit], Arc::new(self.backend.alloc_host(0)));
                let host = Arc::into_inner(host).expect("no exchange is under way");
                let mut values = self.backend.take_from_host(host);
                change(&mut values);
                shards[unit] = Arc::new(self.backend.hand_to_host(values));
            }
            Store::Whole(units) => change(Rc::get_mut(&mut units[unit]).expect("no pass is under way")),
        }
    }

    /// Changes what the rank keeps of every unit with `change(unit, values)`; whole units then get what the other ranks
    /// have changed.
    ///
    /// # Errors
    /// If an exchange fails.
    pub fn update(&mut self, mut change: impl FnMut(usize, &mut B::Buf)) -> Result<(), CommError> {
        let Store::Whole(units) = &mut self.store else {
            (0..self.units.len()).for_each(|unit| self.change(unit, |values| change(unit, values)));
            return Ok(());
        };
        let backend = &self.backend;
        let mut under_way = Vec::with_capacity(units.len());
        for (unit, whole) in units.iter_mut().enumerate() {
            let values = std::mem::replace(whole, Rc::new(backend.alloc(0)));
            let mut values = Rc::into_inner(values).expect("no pass is under way");
            change(unit, &mut values);
            let gather = || start_gather_whole(backend, &self.units[unit], values);
            under_way.push(self.profile.communicate("gather parameters", gather)?);
        }
        for (whole, pending) in units.iter_mut().zip(under_way) {
            let values = self.profile.communicate("gather parameters", || pending.finish())?;
            *whole = Rc::new(backend.take_from_host(values));
        }
        Ok(())
    }

    fn start_gather(&self, shard: &Arc<B::Host>, unit: usize) -> Result<Gathering<B>, CommError> {
        let UnitPlan { gatherer, len, .. } = &self.units[unit];
        let whole = self.backend.alloc_host(*len);
        self.profile.communicate("gather parameters", || {
            gatherer.start_all_gather_by(Part::whole(Arc::clone(shard)), whole, |len| {
                self.backend.alloc_host(len)
            })
        })
    }
}

impl<B: Backend> ParameterSource<B> for ShardedParameters<B> {
    fn unit(&self, unit: usize, next: Option<usize>) -> Result<UnitParameters<B>, CommError> {
        let bias = Rc::clone(&self.bias[unit]);
        let (shards, gathered, overlap) = match &self.store {
            Store::Whole(units) => return Ok(UnitParameters { values: Rc::clone(&units[unit]), bias }),
            Store::Shards { shards, gathered, overlap } => (shards, gathered, *overlap),
        };
        let mut gathered = gathered.borrow_mut();
        let Gathered { used, coming } = &mut *gathered;
        let values = match used[unit].upgrade() {
            Some(values) => values,
            None => {
                let pending = match coming.take() {
                    Some((ahead, pending)) if ahead == unit => pending,
                    other => {
                        if let Some((_, pending)) = other {
                            pending.finish()?;
                        }
                        self.start_gather(&shards[unit], unit)?
                    }
                };
                let whole = self.profile.communicate("gather parameters", || pending.finish())?;
                Rc::new(self.backend.take_from_host(whole))
            }
        };
        used[unit] = Rc::downgrade(&values);
        let absent = |next: &usize| coming.is_none() && used[*next].strong_count() == 0;
        if let Some(next) = next.filter(|next| overlap && absent(next)) {
            *coming = Some((next, self.start_gather(&shards[next], next)?));
        }
        Ok(UnitParameters { values, bias })
    }
}

/// Sends this rank's shards of a whole unit to the ranks that hold it, and takes theirs.
fn start_gather_whole<B: Backend>(
    backend: &B,
    plan: &UnitPlan,
    whole: B::Buf,
) -> Result<Gathering<B>, CommError> {
    let mut send = backend.alloc(plan.gatherer.shard_len());
    let mut next = 0;
    for range in &plan.sent {
        backend.copy(whole.slice(range.clone()), send.slice_mut(next..next + range.len()));
        next += range.len();
    }
    let send = Part::whole(Arc::new(backend.hand_to_host(send)));
    plan.gatherer.start_all_gather_by(send, backend.hand_to_host(whole), |len| backend.alloc_host(len))
}

/// The all-gather of those of a unit's segments that are `chosen`. `offset` says where a segment lies in this rank's
/// receive buffer (any value if the rank does not hold it), which holds the rank's own shards already if it is `in_place`.
fn gather_plan(
    shards: &Shards,
    unit: usize,
    in_place: bool,
    chosen: impl Fn(&ShardedSegment) -> bool,
    offset: impl Fn(SegmentKind) -> usize,
) -> GatherPlan {
    let segments = shards.of_unit(unit).iter().filter(|segment| chosen(segment));
    let segments = segments.map(|segment| GatherSegment {
        shards: segment.shards.clone(),
        wanted: (0..segment.held.len()).map(|rank| segment.is_held(rank)).collect(),
        offset: offset(segment.kind),
    });
    GatherPlan { segments: segments.collect(), in_place }
}

/// Where a segment starts in its whole unit: dense tensors, then the experts the rank holds.
fn place_in_unit(layout: &Layout, held: &[usize], unit: usize, kind: SegmentKind) -> usize {
    match kind {
        SegmentKind::Dense { .. } => 0,
        SegmentKind::Expert { expert, .. } => {
            layout.unit_len(unit) + held.binary_search(&expert).unwrap_or(0) * layout.expert_len()
        }
    }
}

fn kept_shards(shards: &Shards, rank: usize) -> Vec<KeptPart> {
    let pieces = shards.pieces(rank).into_iter();
    pieces
        .map(|Piece { unit, kind, range, offset, .. }| KeptPart { unit, kind, range, place: offset })
        .collect()
}

fn kept_whole(layout: &Layout, shards: &Shards, held: &[usize], rank: usize) -> Vec<KeptPart> {
    let of_unit = |unit: usize| {
        let segments = shards.of_unit(unit).iter().filter(move |segment| segment.is_held(rank));
        segments.map(move |segment| KeptPart {
            unit,
            kind: segment.kind,
            range: 0..segment.len,
            place: place_in_unit(layout, held, unit, segment.kind),
        })
    };
    (0..layout.units()).flat_map(of_unit).collect()
}
