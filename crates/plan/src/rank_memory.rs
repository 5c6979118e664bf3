//! Memory of a GPU that holds one pipeline rank, tensor by tensor, at its peak.

mod activations;

use crate::calibration::{BASE_BYTES, Constants, RESERVED};
use crate::parallelism::{Parallelism, Recomputation, Sharding};
use crate::precision::Precision;
use crate::pricing::{MOST_KINDS, Pricer, Share};
use crate::schedule::ChunkBytes;
use crate::software::{Software, Trainable};

use activations::Half;
pub use activations::Kept;

/// Bytes of a rank at its peak, by what they hold.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RankMemory {
    /// Parameters in the format of products, copies in 8 bits included.
    pub weights: f64,
    /// Gradients.
    pub gradients: f64,
    /// Master parameters and moments.
    pub optimizer: f64,
    /// What layers keep for the backward, all micro-batches in flight.
    pub activations: f64,
    /// What weight gradients that are put off still need: inputs of products and gradients of their outputs.
    pub operands: f64,
    /// What is alive only within the layer that is being computed: gradients of activations, recomputed tensors.
    pub temporary: f64,
    /// Logits and their gradient.
    pub logits: f64,
    /// Buffers of collectives: parameters that are gathered, gradients on their way.
    pub communication: f64,
    /// What libraries of products set aside.
    pub workspace: f64,
    /// What the allocator reserves and cannot use: gaps between what comes and goes.
    pub fragmentation: f64,
    /// What lies outside the allocator: the driver's context and the buffers of communicators.
    pub outside: f64,
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
const STREAMS: f64 = 4.0;

const MIB: f64 = (1u64 << 20) as f64;

/// Bytes that a layer of each kind keeps.
#[derive(Debug, Clone, Default)]
struct KeptBytes {
    /// All of it; where attention is captured, what that keeps.
    first: KindBytes,
    /// The rest, where attention is captured.
    second: KindBytes,
    temporary: [f64; MOST_KINDS],
    captured: bool,
}

/// Bytes of a micro-batch in a layer of each kind.
#[derive(Debug, Clone, Default)]
struct KindBytes {
    kinds: [ChunkBytes; MOST_KINDS],
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
}

/// What a rank's memory is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryTerms {
    /// Parameters that the rank holds before any sharding over replicas: all but routed experts, and these.
    pub parameters: [f64; 2],
    /// Bytes of a parameter: as weight, as gradient, as master copy and moments.
    pub widths: [f64; 3],
    /// Layers of each kind that the rank has, in the order of [`Pricer::kinds`], with the bytes that one keeps of a micro-batch.
    pub layers: Vec<(u32, ChunkBytes)>,
    /// Bytes of a micro-batch that the head's weight gradient needs, where the rank has it.
    pub head: f64,
    /// Communicators that it belongs to.
    pub communicators: usize,
}

impl MemoryTerms {
    /// Bytes that all layers of the rank keep of a micro-batch.
    pub fn kept_bytes(&self) -> f64 {
        self.layers.iter().map(|(layers, bytes)| f64::from(*layers) * bytes.activations).sum()
    }

    /// Bytes that weight gradients of the rank need of a micro-batch.
    pub fn operand_bytes(&self) -> f64 {
        let layers = self.layers.iter().map(|(layers, bytes)| f64::from(*layers) * bytes.weight_operands);
        layers.sum::<f64>() + self.head
    }
}

impl RankMemory {
    /// Bytes that the allocator reserves and cannot use, for each that comes and goes.
    pub const FRAGMENTATION: f64 = RESERVED - 1.0;
    /// Bytes of a process on a GPU before it allocates anything.
    pub const CONTEXT_BYTES: f64 = CONTEXT_BYTES;
    /// Bytes of a communicator's buffers.
    pub const COMMUNICATOR_BYTES: f64 = COMMUNICATOR_BYTES;

    /// The names and bytes of all parts, in the order in which they are printed.
    pub fn parts(&self) -> [(&'static str, f64); 11] {
        [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("operands", self.operands),
            ("temporary", self.temporary),
            ("logits", self.logits),
            ("communication", self.communication),
            ("workspace", self.workspace),
            ("fragmentation", self.fragmentation),
            ("outside", self.outside),
        ]
    }

    /// Bytes that the GPU must have. Logits are gone before the backward is in any layer.
    pub fn total(&self) -> f64 {
        let sum: f64 = self.parts().iter().map(|(_, bytes)| bytes).sum();
        sum - self.temporary.min(self.logits)
    }

    /// Bytes at the peak, as an allocator reports them.
    pub fn allocated(&self) -> f64 {
        self.total() - self.fragmentation - self.outside
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

    /// What the memory of pipeline rank `rank` of a checked layout is made of.
    pub fn memory_terms(&self, layout: &Parallelism, rank: usize) -> MemoryTerms {
        let share = self.stages.share(layout, rank);
        let held = self.rank_parameters(layout, &share);
        let kept = self.kept_bytes(layout);
        let bytes = kept.first.kinds.iter().zip(kept.second.kinds).map(|(first, second)| *first + second);
        MemoryTerms {
            parameters: [held.dense, held.experts],
            widths: self.state_widths(),
            layers: share.layers.into_iter().zip(bytes).take(self.kinds().len()).collect(),
            head: if share.head { kept.first.head + kept.second.head } else { 0.0 },
            communicators: communicators(layout),
        }
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

    /// Tensors that one layer of each kind keeps for a micro-batch's backward, on the fullest rank in one step of twenty, in the order of [`Pricer::kinds`].
    pub fn kept_by_kind(&self, layout: &Parallelism) -> Vec<Kept> {
        let kinds = self.kinds().iter();
        let uneven = self.unevenness(layout).p95;
        kinds.map(|(kind, _)| Kept::of(&self.model, layout, &self.training, *kind, uneven)).collect()
    }

    fn kept_bytes(&self, layout: &Parallelism) -> KeptBytes {
        // What a graph keeps is its own once it is captured, and its allocator counts it as free: the peak is that of capturing
        // attention alone, in the pipeline's order, or that of everything else while a step runs.
        let captured = self.training.habits.captured_attention;
        let [first, second] = if captured { [Half::Mixer, Half::Network] } else { [Half::Both; 2] };
        let mut bytes = KeptBytes { captured, ..KeptBytes::default() };
        for (at, kept) in self.kept_by_kind(layout).iter().enumerate().take(MOST_KINDS) {
            bytes.first.kinds[at] = kept.chunk(first, layout.recompute);
            if captured {
                bytes.second.kinds[at] = kept.chunk(second, layout.recompute);
            }
            bytes.temporary[at] = kept.temporary(layout.recompute);
        }
        let rest = if captured { &mut bytes.second } else { &mut bytes.first };
        rest.head = self.head_operands(layout);
        if self.training.trainable == Trainable::Adapters {
            // No gradient of a whole weight, hence nothing that waits for it.
            for of in [&mut bytes.first, &mut bytes.second] {
                of.kinds.iter_mut().for_each(|kind| kind.weight_operands = 0.0);
                of.head = 0.0;
            }
        }
        bytes
    }

    /// Bytes of a micro-batch that the weight gradients of all heads need: their inputs and the gradients of the logits.
    fn head_operands(&self, layout: &Parallelism) -> f64 {
        let tokens = (layout.micro_batch * self.training.sequence) as f64 / layout.context as f64;
        let tensor = layout.tensor as f64;
        let split = if layout.sequence_parallel { tokens / tensor } else { tokens };
        let inputs = split * self.model.hidden as f64;
        let logits = tokens * self.model.vocab as f64 / tensor;
        (1 + self.model.mtp_layers) as f64 * self.training.element_bytes() * (inputs + logits)
    }

    fn memory_of(&self, layout: &Parallelism, rank: usize, kept: &KeptBytes) -> RankMemory {
        let share = self.stages.share(layout, rank);
        let mut memory = self.states_of(layout, &share);
        for (bytes, layers) in kept.temporary.iter().zip(share.layers) {
            if layers > 0 {
                memory.temporary = memory.temporary.max(*bytes);
            }
        }
        let tokens = (layout.micro_batch * self.training.sequence) as f64 / layout.context as f64;
        if share.head {
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
            memory.logits = bytes * tokens * self.model.vocab as f64 / layout.tensor as f64;
        }
        let loss = (memory.logits - memory.temporary).max(0.0);
        let mut held = self.held_at_peak(layout, rank, &share, loss, &kept.first);
        if kept.captured {
            let running = self.held_at_peak(layout, rank, &share, loss, &kept.second);
            held = if running.total() > held.total() { running } else { held };
        }
        (memory.activations, memory.operands) = (held.activations, held.weight_operands);
        let passing = held.total() + memory.temporary.max(memory.logits) + memory.communication;
        memory.fragmentation = (RESERVED - 1.0) * passing;
        memory
    }

    /// What all micro-batches in flight hold, of which a layer of each kind keeps `bytes`, at the moment when they and what the loss
    /// takes beyond a layer's temporary tensors are most; less `loss` where that moment is not one of the loss.
    fn held_at_peak(
        &self,
        layout: &Parallelism,
        rank: usize,
        share: &Share,
        loss: f64,
        bytes: &KindBytes,
    ) -> ChunkBytes {
        let (ranks, stages) = (layout.pipeline, layout.virtual_stages);
        let micro_batches = layout.micro_batches(&self.training);
        let peak = |chunks: &[ChunkBytes], elsewhere: f64| {
            layout.schedule.peak(ranks, micro_batches, rank, chunks, elsewhere)
        };
        if stages == 1 {
            return peak(&[bytes.of(share)], 0.0);
        }
        // Stages that hold fewer layers are in flight for fewer micro-batches than those before them.
        let chunk = |turn| self.stages.chunk_share(layout.chunk(rank, turn), layout.chunks());
        let chunks: Vec<ChunkBytes> = (0..stages).map(|turn| bytes.of(&chunk(turn))).collect();
        peak(&chunks, if share.head { loss } else { 0.0 })
    }

    /// At least so many bytes of weights, gradients and optimizer states on the fullest rank: the mean over pipeline ranks,
    /// whatever the schedule. Prunes a search.
    pub(crate) fn least_states(&self, layout: &Parallelism) -> f64 {
        let whole = Parallelism { pipeline: 1, virtual_stages: 1, ..*layout };
        let states = self.states_of(layout, &self.stages.share(&whole, 0));
        (states.total() - states.communication) / layout.pipeline as f64
    }

    /// Weights, gradients and optimizer states, and what gathers them.
    fn states_of(&self, layout: &Parallelism, share: &Share) -> RankMemory {
        let held = self.rank_parameters(layout, share);
        let optimizer = &self.training.optimizer;
        let shards = (layout.data * layout.context) as f64;
        let expert_shards = layout.expert_data().max(1) as f64;
        let all = held.dense + held.experts;
        let owned = held.dense / shards + held.experts / expert_shards;
        let (weights, gradients, states) = match layout.sharding {
            Sharding::None => (all, all, all),
            Sharding::Zero1 => (all, all, owned),
            Sharding::Zero2 => (all, owned, owned),
            Sharding::Zero3 => (owned, owned, owned),
        };
        let [width, gradient, state] = self.state_widths();
        let layers: u32 = share.layers.iter().sum();
        let tables = self.tables(layout, share);
        let layer = (all - tables) / f64::from(layers.max(1));
        RankMemory {
            weights: width * weights,
            gradients: gradient * gradients,
            optimizer: state * states,
            communication: match layout.sharding {
                // Gathered once and for all micro-batches, and their gradients.
                Sharding::Zero3 if layout.pipeline > 1 => (width + optimizer.gradients.bytes()) * all,
                // Two layers gathered, the gradient of one on its way; and embedding and head, which belong to no layer's
                // unit but the root's, and that is not given back after the forward.
                Sharding::Zero3 => 2.0 * width * layer + optimizer.gradients.bytes() * layer + 2.0 * tables,
                _ => 0.0,
            },
            workspace: self.workspace(),
            outside: CONTEXT_BYTES + communicators(layout) as f64 * COMMUNICATOR_BYTES,
            ..RankMemory::default()
        }
    }

    fn workspace(&self) -> f64 {
        let [own, engine] = if Constants::generation(self.gpu()) == Constants::AMPERE {
            WORKSPACES_AMPERE
        } else {
            WORKSPACES
        };
        let grouped = self.model.moe.is_some() && !self.training.habits.experts_in_turn;
        let streams = if grouped { STREAMS } else { 0.0 };
        BASE_BYTES + own + (1.0 + streams) * engine
    }
}

/// Groups of more than one rank that a GPU belongs to.
fn communicators(layout: &Parallelism) -> usize {
    let groups = [
        layout.tensor,
        layout.context,
        layout.pipeline,
        layout.data * layout.context,
        layout.expert,
        if layout.expert > 1 { layout.expert_data() } else { 1 },
    ];
    groups.iter().filter(|ranks| **ranks > 1).count()
}

/// Whether nothing but a layer's input is kept.
fn full(recompute: Recomputation) -> bool {
    matches!(recompute, Recomputation::Full)
}
