//! Memory of a GPU that holds one pipeline rank, tensor by tensor, at its peak.

mod activations;
mod tensors;

use std::iter::once;

use crate::calibration::{BASE_BYTES, Constants, RESERVED};
use crate::parallelism::{Parallelism, Recomputation, Sharding, Training};
use crate::precision::Precision;
use crate::pricing::{MOST_KINDS, Pricer, RankParameters, Share};
use crate::schedule::{ChunkBytes, Peak};
use crate::software::{Software, Trainable};

use activations::{Half, Kept, Temporary};
pub use tensors::{HeldTensor, ParameterTensor, RankTensors, Unit};

/// Bytes of a rank at its peak, by what they hold.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RankMemory {
    /// Parameters in the format of products, copies in 8 bits included.
    pub weights: f64,
    /// Gradients.
    pub gradients: f64,
    /// Master parameters and moments.
    pub optimizer: f64,
    /// What layers keep for the backward, all micro-batches in flight, but for what dispatch or the pipeline received.
    pub activations: f64,
    /// Buffers of dispatch on the fullest rank in one step of twenty: rows as experts got them, of all micro-batches in flight; and in the
    /// layer that is being computed rows that are dispatched again, and gradients of rows that land and leave.
    pub dispatch: f64,
    /// What weight gradients that are put off still need: inputs of products and gradients of their outputs.
    pub operands: f64,
    /// What is alive only within the layer that is being computed: gradients of activations, recomputed tensors. None where the peak is
    /// in the loss.
    pub temporary: f64,
    /// Logits and their gradient, where the peak is in the loss.
    pub logits: f64,
    /// Buffers of collectives and of the pipeline.
    pub communication: CommunicationBuffers,
    /// What libraries of products set aside.
    pub workspace: f64,
    /// What the allocator reserves and cannot use: gaps between what comes and goes.
    pub fragmentation: f64,
    /// The process's context, outside of the allocator.
    pub context: f64,
}

/// Bytes of buffers that messages leave from and land in.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CommunicationBuffers {
    /// Parameters that are gathered from their shards, gradients before they are reduced to theirs.
    pub buckets: f64,
    /// Inputs that stages received from those before, of all micro-batches in flight.
    pub received: f64,
    /// Channels of communicators, outside of the allocator.
    pub channels: f64,
}

impl CommunicationBuffers {
    /// All of them.
    pub fn total(&self) -> f64 {
        self.buckets + self.received + self.channels
    }
}

/// A process on a GPU before it allocates anything.
const CONTEXT_BYTES: f64 = 512.0 * MIB;

/// Buffers of a communicator: 32 channels, 4 MiB (`NCCL_BUFFSIZE`) to send and to receive.
const COMMUNICATOR_BYTES: f64 = 32.0 * 2.0 * 4.0 * MIB;

/// Workspaces of products: PyTorch's own and Transformer Engine's. Grouped products use as many more of the latter as streams.
const WORKSPACES_AMPERE: [f64; 2] = [8.1 * MIB, 4.0 * MIB];
/// The same since Hopper.
const WORKSPACES: [f64; 2] = [32.0 * MIB, 32.0 * MIB];
/// Streams of grouped products.
const STREAMS: usize = 4;

const MIB: f64 = (1u64 << 20) as f64;

/// Bytes that a layer of each kind keeps.
#[derive(Debug, Clone, Default)]
struct KeptBytes {
    /// All of it; where attention is captured, what that keeps.
    first: KindBytes,
    /// The rest, where attention is captured.
    second: Option<KindBytes>,
    temporary: [Temporary; MOST_KINDS],
    /// What a stage receives of a micro-batch.
    received: f64,
}

/// Bytes of a micro-batch in a layer of each kind.
#[derive(Debug, Clone, Default)]
struct KindBytes {
    half: Half,
    kinds: [ChunkBytes; MOST_KINDS],
    /// What of the activations lies in buffers of dispatch.
    dispatched: [f64; MOST_KINDS],
    /// What the weight gradient of the head needs.
    head: f64,
}

impl KindBytes {
    /// Those of all layers that `share` has.
    fn of(&self, share: &Share) -> ChunkBytes {
        let mut sum = ChunkBytes::default();
        for (layers, bytes) in share.layers.iter().zip(&self.kinds) {
            sum.activations += f64::from(*layers) * bytes.activations;
            sum.weight_operands += f64::from(*layers) * bytes.weight_operands;
        }
        sum.weight_operands += if share.head { self.head } else { 0.0 };
        sum
    }

    /// What of them lies in buffers of dispatch.
    fn dispatched(&self, share: &Share) -> f64 {
        share.layers.iter().zip(&self.dispatched).map(|(layers, bytes)| f64::from(*layers) * bytes).sum()
    }
}

/// When a rank holds most, and of what.
struct Moment<'a> {
    /// What layers keep; where attention is captured, of the half that then counts.
    bytes: &'a KindBytes,
    /// `[stage of the rank]` bytes of a micro-batch.
    chunks: Vec<ChunkBytes>,
    peak: Peak,
}

/// A rank's layers and what is alive beside all that they keep.
struct Alive {
    /// `[stage of the rank]` layers.
    chunks: Vec<Share>,
    share: Share,
    /// The kind of layer whose backward needs most room.
    widest: usize,
    temporary: Temporary,
    /// Logits and their gradient.
    logits: f64,
}

/// What a rank's states are made of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryTerms {
    /// Parameters that the rank holds before any sharding over replicas: all but routed experts, and these.
    pub parameters: [f64; 2],
    /// Bytes of a parameter: as weight, as gradient, as master copy and moments.
    pub widths: [f64; 3],
}

/// The bucket that gradients of a layer are reduced from.
const LAYER_GRADIENTS: &str = "gradients of a layer before their reduce-scatter";

/// Buffers of a kind.
struct Bucket {
    name: &'static str,
    /// Bytes of one.
    bytes: f64,
    /// So many are alive at once.
    count: usize,
}

impl RankMemory {
    /// Bytes that the allocator reserves and cannot use, for each that comes and goes.
    pub const FRAGMENTATION: f64 = RESERVED - 1.0;

    /// The names and bytes of all parts of the sum, in the order in which they are printed.
    pub fn parts(&self) -> [(&'static str, f64); 12] {
        [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("dispatch", self.dispatch),
            ("operands", self.operands),
            ("temporary", self.temporary),
            ("logits", self.logits),
            ("communication", self.communication.total()),
            ("workspace", self.workspace),
            ("fragmentation", self.fragmentation),
            ("context", self.context),
        ]
    }

    /// Bytes that the GPU must have.
    pub fn total(&self) -> f64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }

    /// Bytes at the peak, as an allocator reports them.
    pub fn allocated(&self) -> f64 {
        self.total() - self.fragmentation - self.context - self.communication.channels
    }

    /// Bytes that come and go while a step runs.
    fn passing(&self) -> f64 {
        let of_layers = self.activations + self.dispatch + self.operands + self.temporary;
        of_layers + self.logits + self.communication.buckets + self.communication.received
    }
}

impl Pricer {
    /// The pipeline rank that needs most, and what it holds. The layout is checked.
    pub(crate) fn worst_rank(&self, layout: &Parallelism) -> (usize, RankMemory) {
        let kept = self.kept_bytes(layout);
        let mut worst = (0, self.memory_of(layout, 0, &kept));
        for rank in 1..layout.pipeline {
            let memory = self.memory_of(layout, rank, &kept);
            if memory.allocated() > worst.1.allocated() {
                worst = (rank, memory);
            }
        }
        worst
    }

    /// What pipeline rank `rank` of a checked layout holds at its peak.
    pub fn rank_memory(&self, layout: &Parallelism, rank: usize) -> RankMemory {
        self.memory_of(layout, rank, &self.kept_bytes(layout))
    }

    /// What the states of pipeline rank `rank` of a checked layout are made of.
    pub fn memory_terms(&self, layout: &Parallelism, rank: usize) -> MemoryTerms {
        let held = self.rank_parameters(layout, &self.stages.share(layout, rank));
        MemoryTerms { parameters: [held.dense, held.experts], widths: self.state_widths() }
    }

    /// Bytes of a parameter: as weight, as gradient, as master copy and moments.
    fn state_widths(&self) -> [f64; 3] {
        let optimizer = &self.training.optimizer;
        // Narrow weights are kept as they are and transposed, and not in 16 bits.
        let width = match self.training.compute {
            Precision::F32 => 4.0,
            narrow if narrow.is_narrow() => 2.0 * narrow.bytes(),
            _ => 2.0,
        };
        // Adapters are small beside what they adapt, which gets neither gradients nor moments.
        let trained = if self.training.trainable == Trainable::Adapters { 0.0 } else { 1.0 };
        let states = self.training.master_bytes() + 2.0 * optimizer.moments.bytes();
        [width, trained * optimizer.gradients.bytes(), trained * states]
    }

    /// Tensors that one layer of each kind keeps for a micro-batch's backward, on the fullest rank in the step whose memory is
    /// priced, in the order of [`Pricer::kinds`].
    fn kept_by_kind(&self, layout: &Parallelism) -> impl Iterator<Item = Kept> {
        let uneven = self.unevenness(layout).of(self.memory);
        let kinds = self.kinds().iter().take(MOST_KINDS);
        kinds.map(move |(kind, _)| Kept::of(&self.model, layout, &self.training, *kind, uneven))
    }

    fn kept_bytes(&self, layout: &Parallelism) -> KeptBytes {
        // What a graph keeps is its own once it is captured, and its allocator counts it as free: the peak is that of capturing
        // attention alone, in the pipeline's order, or that of everything else while a step runs.
        let mut bytes = KeptBytes { received: self.message_bytes(layout), ..KeptBytes::default() };
        if self.training.habits.captured_attention {
            bytes.first.half = Half::Mixer;
            bytes.second = Some(KindBytes { half: Half::Network, ..KindBytes::default() });
        }
        for (at, kept) in self.kept_by_kind(layout).enumerate() {
            bytes.temporary[at] = kept.temporary(layout.recompute);
            for half in once(&mut bytes.first).chain(&mut bytes.second) {
                let of = kept.bytes(half.half, layout.recompute);
                (half.kinds[at], half.dispatched[at]) = (of.kept, of.dispatched);
            }
        }
        let rest = bytes.second.as_mut().unwrap_or(&mut bytes.first);
        rest.head = self.head_operands(layout);
        if self.training.trainable == Trainable::Adapters {
            // No gradient of a whole weight, hence nothing that waits for it.
            for half in once(&mut bytes.first).chain(&mut bytes.second) {
                half.kinds.iter_mut().for_each(|kind| kind.weight_operands = 0.0);
                half.head = 0.0;
            }
        }
        bytes
    }

    /// Bytes of a micro-batch that the weight gradients of all heads need: their inputs and the gradients of the logits.
    fn head_operands(&self, layout: &Parallelism) -> f64 {
        let logits = tokens(layout, &self.training) * self.model.vocab as f64 / layout.tensor as f64;
        let bytes = self.message_bytes(layout) + self.training.element_bytes() * logits;
        (1 + self.model.mtp_layers) as f64 * bytes
    }

    /// Bytes of logits and their gradient.
    fn logits_bytes(&self, layout: &Parallelism) -> f64 {
        // In 32 bits as the loss needs them, which becomes the gradient in place, and that in 16. Frameworks that leave
        // the loss to autograd hold logits and gradients in both formats.
        let bytes = match self.training.software {
            Software::TorchCompiled if self.training.habits.compiled_loss => 4.0,
            // Split over tensor-parallel ranks, the loss keeps the logarithms of probabilities beside them.
            Software::TorchEager | Software::TorchCompiled if layout.tensor > 1 => 16.0,
            Software::TorchEager | Software::TorchCompiled => 12.0,
            // Losses of multi-token prediction come first, and keep their probabilities in 32 bits.
            _ => 6.0 + 4.0 * self.model.mtp_layers as f64,
        };
        bytes * tokens(layout, &self.training) * self.model.vocab as f64 / layout.tensor as f64
    }

    fn memory_of(&self, layout: &Parallelism, rank: usize, kept: &KeptBytes) -> RankMemory {
        let alive = self.alive(layout, rank, kept);
        let moment = self.moment(layout, rank, &alive, kept);
        let mut memory = self.states_of(layout, &alive.share);
        for (turn, (bytes, chunk)) in moment.chunks.iter().zip(&alive.chunks).enumerate() {
            let in_flight = moment.peak.in_flight(turn);
            let (held, micro_batches) = (bytes.times(in_flight), in_flight.activations as f64);
            let dispatched = micro_batches * moment.bytes.dispatched(chunk);
            let received = if receives(layout, rank, turn, chunk) { kept.received } else { 0.0 };
            let received = micro_batches * received;
            memory.activations += held.activations - dispatched - received;
            memory.operands += held.weight_operands;
            memory.dispatch += dispatched;
            memory.communication.received += received;
        }
        if alive.peaks_in_loss(&moment.peak) {
            memory.logits = alive.logits;
        } else {
            memory.temporary = alive.temporary.bytes;
            memory.dispatch += alive.temporary.dispatched;
        }
        memory.fragmentation = RankMemory::FRAGMENTATION * memory.passing();
        memory
    }

    /// The layers of a rank and what is alive beside what they keep.
    fn alive(&self, layout: &Parallelism, rank: usize, kept: &KeptBytes) -> Alive {
        let chunks: Vec<Share> = self.stages.chunk_shares(layout, rank).collect();
        let share: Share = chunks.iter().copied().sum();
        let mut widest = 0;
        for (kind, layers) in share.layers.iter().enumerate() {
            let wider = kept.temporary[kind].total() > kept.temporary[widest].total();
            if *layers > 0 && (wider || share.layers[widest] == 0) {
                widest = kind;
            }
        }
        let temporary = if share.layers[widest] > 0 { kept.temporary[widest] } else { Temporary::default() };
        let logits = if share.head { self.logits_bytes(layout) } else { 0.0 };
        Alive { chunks, share, widest, temporary, logits }
    }

    /// The moment when what all micro-batches in flight hold and what the loss takes beyond a layer's temporary tensors are most.
    fn moment<'a>(
        &self,
        layout: &Parallelism,
        rank: usize,
        alive: &Alive,
        kept: &'a KeptBytes,
    ) -> Moment<'a> {
        let micro_batches = layout.micro_batches(&self.training);
        let of = |bytes: &'a KindBytes| {
            let chunks: Vec<ChunkBytes> = alive.chunks.iter().map(|chunk| bytes.of(chunk)).collect();
            let peak = layout.schedule.peak(layout.pipeline, micro_batches, rank, &chunks, alive.loss());
            Moment { bytes, chunks, peak }
        };
        let first = of(&kept.first);
        let Some(second) = kept.second.as_ref().map(of) else { return first };
        let held = |moment: &Moment| {
            let elsewhere = if moment.peak.before_last_stage { 0.0 } else { alive.loss() };
            moment.peak.bytes(&moment.chunks).total() - elsewhere
        };
        if held(&second) > held(&first) { second } else { first }
    }

    /// At least so many bytes of weights, gradients and optimizer states on the fullest rank: the mean over pipeline ranks,
    /// whatever the schedule. Prunes a search.
    pub(crate) fn least_states(&self, layout: &Parallelism) -> f64 {
        let whole = Parallelism { pipeline: 1, virtual_stages: 1, ..*layout };
        let states = self.states_of(layout, &self.stages.share(&whole, 0));
        (states.total() - states.communication.buckets) / layout.pipeline as f64
    }

    /// Weights, gradients and optimizer states, what gathers and reduces them, and what is there before a step runs.
    fn states_of(&self, layout: &Parallelism, share: &Share) -> RankMemory {
        let held = self.rank_parameters(layout, share);
        let [weights, gradients, states] = sharded(layout, held.dense, held.experts);
        let [width, gradient, state] = self.state_widths();
        let buckets = self.buckets(layout, share, &held);
        RankMemory {
            weights: width * weights,
            gradients: gradient * gradients,
            optimizer: state * states,
            communication: CommunicationBuffers {
                buckets: buckets.iter().map(|bucket| bucket.count as f64 * bucket.bytes).sum(),
                received: 0.0,
                channels: groups(layout).count() as f64 * COMMUNICATOR_BYTES,
            },
            workspace: self.workspaces().iter().map(|of| of.count as f64 * of.bytes).sum(),
            context: CONTEXT_BYTES,
            ..RankMemory::default()
        }
    }

    /// Buffers that parameters are gathered in and gradients reduced from. Megatron's ZeRO-1 does both in place.
    fn buckets(&self, layout: &Parallelism, share: &Share, held: &RankParameters) -> [Bucket; 3] {
        let [width, gradient, _] = self.state_widths();
        let all = held.dense + held.experts;
        let tables = self.tables(layout, share);
        let layer = (all - tables) / f64::from(share.layers.iter().sum::<u32>().max(1));
        let bucket = |name, bytes, count| Bucket { name, bytes, count };
        let none = || bucket("", 0.0, 0);
        match layout.sharding {
            // Gathered once and for all micro-batches, and their gradients.
            Sharding::Zero3 if layout.pipeline > 1 => [
                bucket("parameters, gathered for a step", width * all, 1),
                bucket("gradients before their reduce-scatter", gradient * all, 1),
                none(),
            ],
            // Two layers gathered, the gradient of one on its way; and embedding and head, which belong to no layer's
            // unit but the root's, and that is not given back after the forward.
            Sharding::Zero3 => [
                bucket("parameters of a layer, gathered", width * layer, 2),
                bucket(LAYER_GRADIENTS, gradient * layer, 1),
                bucket("embedding and head, gathered", 2.0 * tables, 1),
            ],
            // The gradients of a layer are whole until they are reduced.
            Sharding::Zero2 => [bucket(LAYER_GRADIENTS, gradient * layer, 1), none(), none()],
            Sharding::None | Sharding::Zero1 => [none(), none(), none()],
        }
    }

    /// What is set aside whatever runs, and by libraries of products.
    fn workspaces(&self) -> [Bucket; 3] {
        let [own, engine] = if Constants::generation(self.gpu()) == Constants::AMPERE {
            WORKSPACES_AMPERE
        } else {
            WORKSPACES
        };
        let grouped = self.model.moe.is_some() && !self.training.habits.experts_in_turn;
        let streams = if grouped { STREAMS } else { 0 };
        [
            Bucket { name: "set aside whatever runs", bytes: BASE_BYTES, count: 1 },
            Bucket { name: "PyTorch's products", bytes: own, count: 1 },
            Bucket { name: "Transformer Engine's products, by stream", bytes: engine, count: 1 + streams },
        ]
    }
}

impl Alive {
    /// What the loss takes beyond a layer's temporary tensors.
    fn loss(&self) -> f64 {
        (self.logits - self.temporary.total()).max(0.0)
    }

    /// Whether logits are there at the peak; they are gone before the backward is in any layer.
    fn peaks_in_loss(&self, peak: &Peak) -> bool {
        peak.before_last_stage && self.loss() > 0.0
    }
}

/// Tokens of a micro-batch on a rank.
fn tokens(layout: &Parallelism, training: &Training) -> f64 {
    (layout.micro_batch * training.sequence) as f64 / layout.context as f64
}

/// Whether the input of the rank's `turn`-th stage, which has the layers of `chunk`, comes from another rank and is kept.
fn receives(layout: &Parallelism, rank: usize, turn: usize, chunk: &Share) -> bool {
    let before = layout.chunk(rank, turn).checked_sub(1);
    let elsewhere = before.is_some_and(|before| layout.rank_of_chunk(before) != rank);
    elsewhere && chunk.layers.iter().any(|layers| *layers > 0)
}

/// Of so many parameters, those that a rank holds as weights, as gradients and as optimizer states.
fn sharded(layout: &Parallelism, dense: f64, experts: f64) -> [f64; 3] {
    let all = dense + experts;
    let shards = (layout.data * layout.context) as f64;
    let owned = dense / shards + experts / layout.expert_data().max(1) as f64;
    match layout.sharding {
        Sharding::None => [all, all, all],
        Sharding::Zero1 => [all, all, owned],
        Sharding::Zero2 => [all, owned, owned],
        Sharding::Zero3 => [owned, owned, owned],
    }
}

/// Groups of more than one rank that a GPU belongs to, each with a communicator.
fn groups(layout: &Parallelism) -> impl Iterator<Item = &'static str> {
    let groups = [
        ("channels of the tensor-parallel group", layout.tensor),
        ("channels of the context-parallel group", layout.context),
        ("channels of the pipeline", layout.pipeline),
        ("channels of the replicas", layout.data * layout.context),
        ("channels of the expert-parallel group", layout.expert),
        ("channels of the replicas of experts", if layout.expert > 1 { layout.expert_data() } else { 1 }),
    ];
    groups.into_iter().filter(|(_, ranks)| *ranks > 1).map(|(name, _)| name)
}

/// Whether nothing but a layer's input is kept.
fn full(recompute: Recomputation) -> bool {
    matches!(recompute, Recomputation::Full)
}
