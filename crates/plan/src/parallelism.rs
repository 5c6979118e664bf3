//! How a training run is laid out over GPUs, and every check of divisibility.

use serde::{Deserialize, Serialize};

use crate::architecture::Architecture;
use crate::precision::Precision;
use crate::schedule::{ScheduleError, ScheduleKind};
use crate::software::{DispatchKind, Habits, Software, Trainable};

/// What of the states is sharded over data-parallel ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharding {
    /// Nothing: every replica holds everything.
    None,
    /// Optimizer states.
    Zero1,
    /// Also gradients.
    Zero2,
    /// Also parameters, gathered layer by layer (FSDP).
    Zero3,
}

/// Exchanges of states in a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StateExchanges {
    /// Gathers of the parameters.
    pub weights: f64,
    /// Reductions of the gradients.
    pub gradients: f64,
}

/// Parts of a layer whose activations may be computed again; the names are Megatron's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Modules {
    /// Softmax and products of attention; free with fused attention, which always does so.
    pub core_attention: bool,
    /// Up projections of latent attention.
    pub mla_up_projection: bool,
    /// Dense feed-forward networks.
    pub mlp: bool,
    /// The experts' activation function.
    pub moe_activation: bool,
    /// The whole MoE layer, dispatch included.
    pub moe: bool,
    /// Norms.
    pub layernorm: bool,
}

/// What the backward computes again instead of keeping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recomputation {
    /// Nothing.
    None,
    /// Some parts of each layer.
    Modules(Modules),
    /// Whole layers: only their inputs are kept.
    Full,
}

impl Recomputation {
    /// Korthikanti et al. (2022): the core of attention.
    pub const SELECTIVE: Self = Self::Modules(Modules {
        core_attention: true,
        mla_up_projection: false,
        mlp: false,
        moe_activation: false,
        moe: false,
        layernorm: false,
    });

    /// The parts computed again; everything under `Full` is said by `Full` itself.
    pub fn modules(self) -> Modules {
        match self {
            Self::Modules(modules) => modules,
            Self::None | Self::Full => Modules::default(),
        }
    }
}

/// Degrees of every axis. Ranks are numbered with the tensor axis fastest, then context, data, pipeline (Megatron's order);
/// experts are laid over `tensor x context x data` anew, `expert_tensor` fastest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Parallelism {
    /// Ranks that split every matrix.
    pub tensor: usize,
    /// Whether what lies between tensor-parallel regions is split along the sequence.
    pub sequence_parallel: bool,
    /// Stages of the pipeline, in ranks.
    pub pipeline: usize,
    /// Chunks of layers a pipeline rank holds.
    pub virtual_stages: usize,
    /// Ranks that split the sequence in attention.
    pub context: usize,
    /// Ranks over which the experts of a layer are spread.
    pub expert: usize,
    /// Ranks that split each expert's matrices.
    pub expert_tensor: usize,
    /// Replicas of the dense parameters.
    pub data: usize,
    /// Sequences of a micro-batch.
    pub micro_batch: usize,
    /// Order of passes; `Interleaved` when `virtual_stages` is above 1, unless another holds several stages.
    pub schedule: ScheduleKind,
    /// What is sharded over replicas.
    pub sharding: Sharding,
    /// What is computed again.
    pub recompute: Recomputation,
}

impl Default for Parallelism {
    fn default() -> Self {
        Self {
            tensor: 1,
            sequence_parallel: true,
            pipeline: 1,
            virtual_stages: 1,
            context: 1,
            expert: 1,
            expert_tensor: 1,
            data: 1,
            micro_batch: 1,
            schedule: ScheduleKind::OneForwardOneBackward,
            sharding: Sharding::Zero1,
            recompute: Recomputation::None,
        }
    }
}

/// How tokens spread over experts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Routing {
    /// Every expert gets the same number of tokens.
    Balanced,
    /// Popularity has the density `x^-exponent`, up to 256 times the least.
    PowerLaw {
        /// Between 0, which is balanced, and [`Routing::STEEPEST`]; kernels were measured at 1.01 and 1.2.
        exponent: f64,
    },
    /// Measured shares of the experts, any scale.
    Measured {
        /// One weight an expert.
        loads: Vec<f64>,
    },
}

impl Routing {
    /// Steeper laws leave nearly all experts alike, and none was measured.
    pub const STEEPEST: f64 = 1.3;
}

/// The optimizer and what it keeps for every parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Optimizer {
    /// Format of the master copy; `None` when parameters themselves are updated.
    pub master: Option<Precision>,
    /// Format of each of the two moments.
    pub moments: Precision,
    /// Format in which gradients are accumulated and reduced.
    pub gradients: Precision,
}

impl Default for Optimizer {
    /// Adam with f32 master parameters, moments and gradients.
    fn default() -> Self {
        Self { master: Some(Precision::F32), moments: Precision::F32, gradients: Precision::F32 }
    }
}

/// What is trained, apart from the model and the layout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// Tokens of a sequence.
    pub sequence: usize,
    /// Sequences of an optimizer step.
    pub global_batch: usize,
    /// Tokens of the whole run.
    pub tokens: f64,
    /// Format of products.
    pub compute: Precision,
    /// Format in which tokens travel to experts, if activations are not narrower.
    pub wire: Precision,
    /// The optimizer.
    pub optimizer: Optimizer,
    /// How tokens spread over experts.
    pub routing: Routing,
    /// How tokens travel to experts.
    pub dispatch: DispatchKind,
    /// Which parameters are trained.
    pub trainable: Trainable,
    /// What executes the plan.
    pub software: Software,
    /// What that does with memory.
    #[serde(default)]
    pub habits: Habits,
}

impl Default for Training {
    /// What a plan is for where nothing is said: 4 M tokens a step and 1 T in all, in bf16, rows sent once to a server while others compute.
    fn default() -> Self {
        Self {
            sequence: 4096,
            global_batch: 1024,
            tokens: 1e12,
            compute: Precision::Bf16,
            wire: Precision::Bf16,
            optimizer: Optimizer::default(),
            routing: Routing::Balanced,
            dispatch: DispatchKind { deduplicated: true, overlapped: true, padded: false },
            trainable: Trainable::All,
            software: Software::default(),
            habits: Habits::default(),
        }
    }
}

impl Training {
    /// Bytes of an activation; residual streams and inputs of norms stay in 16 bits whatever products use.
    pub fn element_bytes(&self) -> f64 {
        if self.compute == Precision::F32 { 4.0 } else { 2.0 }
    }

    /// Format in which rows travel: the wire's, or that of activations where these are narrower.
    pub fn row_format(&self) -> Precision {
        if self.wire == Precision::F32 { self.compute.wide() } else { self.wire }
    }

    /// Bytes of an element of a row on its way to an expert, and of a result or gradient, which has 16 bits at least.
    pub fn wire_bytes(&self) -> [f64; 2] {
        let bytes = self.row_format().bytes();
        [bytes, bytes.max(2.0)]
    }

    /// Bytes of a parameter's master copy; parameters in 32 bits are their own.
    pub fn master_bytes(&self) -> f64 {
        let master = self.optimizer.master.filter(|_| self.compute != Precision::F32);
        master.map_or(0.0, Precision::bytes)
    }
}

/// A layout that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParallelismError {
    /// A degree does not fit the model, the batch or another degree.
    #[error("{field} = {value}: {rule}{}", nearest.map_or_else(String::new, |nearest| format!("; nearest: {nearest}")))]
    Degree {
        /// The degree.
        field: &'static str,
        /// Its value.
        value: usize,
        /// What would be right.
        rule: String,
        /// The nearest value that keeps the rule, all others as they are, if it is one of divisibility.
        nearest: Option<usize>,
    },
    /// The pipeline's schedule does not exist in these sizes.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
}

impl Parallelism {
    /// GPUs in use.
    pub fn gpus(&self) -> usize {
        self.tensor * self.context * self.pipeline * self.data
    }

    /// Replicas of an expert: the ranks over which its gradients are reduced. The layout is checked.
    pub fn expert_data(&self) -> usize {
        self.tensor * self.context * self.data / (self.expert * self.expert_tensor)
    }

    /// Micro-batches that a pipeline passes in a step. The layout is checked.
    pub fn micro_batches(&self, training: &Training) -> usize {
        training.global_batch / (self.data * self.micro_batch)
    }

    /// How often a step gathers parameters and reduces gradients. Sharded gradients hold no micro-batch's sum whole, so each
    /// is reduced; stages of a pipeline keep what they gather until the step ends. The layout is checked.
    pub fn state_exchanges(&self, training: &Training) -> StateExchanges {
        let each = self.micro_batches(training) as f64;
        match self.sharding {
            Sharding::Zero3 if self.pipeline == 1 => StateExchanges { weights: 2.0 * each, gradients: each },
            Sharding::Zero2 => StateExchanges { weights: 1.0, gradients: each },
            _ => StateExchanges { weights: 1.0, gradients: 1.0 },
        }
    }

    /// GPUs of a pipeline rank: peers of two neighbours are so far apart.
    pub fn stage_gpus(&self) -> usize {
        self.tensor * self.context * self.data
    }

    /// The pipeline rank that holds a chunk of layers.
    pub fn rank_of_chunk(&self, chunk: usize) -> usize {
        let (turn, place) = (chunk / self.pipeline, chunk % self.pipeline);
        match self.schedule {
            ScheduleKind::DualPipeV if turn % 2 == 1 => self.pipeline - 1 - place,
            _ => place,
        }
    }

    /// Chunks of layers in the order in which a micro-batch passes them.
    pub fn chunks(&self) -> usize {
        self.pipeline * self.virtual_stages
    }

    /// The chunk of layers that is pipeline rank `rank`'s in its stage `turn`.
    pub(crate) fn chunk(&self, rank: usize, turn: usize) -> usize {
        match self.schedule {
            ScheduleKind::DualPipeV if turn % 2 == 1 => (turn + 1) * self.pipeline - 1 - rank,
            _ => turn * self.pipeline + rank,
        }
    }

    /// Checks every degree against the model, the batch and the others.
    ///
    /// # Errors
    /// Names the degree, its value and the nearest that would do.
    pub fn check(&self, model: &Architecture, training: &Training) -> Result<(), ParallelismError> {
        self.check_positive(training)?;
        self.check_model(model)?;
        self.check_pipeline(model)?;
        self.check_batch(training)?;
        let micro_batches = self.micro_batches(training);
        Ok(self.schedule.check_sizes(self.pipeline, self.virtual_stages, micro_batches)?)
    }

    fn check_positive(&self, training: &Training) -> Result<(), ParallelismError> {
        let degrees = [
            ("tensor", self.tensor),
            ("pipeline", self.pipeline),
            ("virtual_stages", self.virtual_stages),
            ("context", self.context),
            ("expert", self.expert),
            ("expert_tensor", self.expert_tensor),
            ("data", self.data),
            ("micro_batch", self.micro_batch),
            ("sequence", training.sequence),
            ("global_batch", training.global_batch),
        ];
        for (field, value) in degrees {
            check(value >= 1, field, value, || "must be at least 1".into())?;
        }
        Ok(())
    }

    fn check_model(&self, model: &Architecture) -> Result<(), ParallelismError> {
        let heads = model.attention.heads();
        divides("tensor", self.tensor, "attention heads", heads)?;
        let Some(moe) = &model.moe else {
            check(self.expert == 1, "expert", self.expert, || "must be 1: the model has no experts".into())?;
            return check(self.expert_tensor == 1, "expert_tensor", self.expert_tensor, || {
                "must be 1: the model has no experts".into()
            });
        };
        divides("expert", self.expert, "experts", moe.experts)?;
        divides("expert_tensor", self.expert_tensor, "expert_ffn", moe.expert_ffn)?;
        let ranks = self.tensor * self.context * self.data;
        let block = self.expert * self.expert_tensor;
        let rule = || format!("times expert_tensor must divide tensor x context x data = {ranks}");
        let nearest = || nearest_divisor(ranks / self.expert_tensor.min(ranks), self.expert);
        check_or(ranks.is_multiple_of(block), "expert", self.expert, rule, nearest)
    }

    fn check_pipeline(&self, model: &Architecture) -> Result<(), ParallelismError> {
        let layers = model.layers + model.mtp_layers + 2;
        check(self.chunks() <= layers, "pipeline", self.pipeline, || {
            format!("times virtual_stages must be at most {layers}: layers, embedding and head")
        })
    }

    fn check_batch(&self, training: &Training) -> Result<(), ParallelismError> {
        let (batch, data) = (training.global_batch, self.data);
        divides("data", data, "global_batch", batch)?;
        divides("micro_batch", self.micro_batch, "the sequences of a replica", batch / data)?;
        divides("context", self.context, "sequence", training.sequence)
    }
}

fn divides(field: &'static str, value: usize, of: &str, whole: usize) -> Result<(), ParallelismError> {
    let rule = || format!("must divide {of} = {whole}");
    check_or(whole.is_multiple_of(value), field, value, rule, || nearest_divisor(whole, value))
}

/// The divisor of `whole` nearest to `value`; the smaller of two.
fn nearest_divisor(whole: usize, value: usize) -> usize {
    (1..=whole.min(2 * value))
        .filter(|d| whole.is_multiple_of(*d))
        .min_by_key(|d| d.abs_diff(value))
        .unwrap_or(1)
}

fn check(
    holds: bool,
    field: &'static str,
    value: usize,
    rule: impl FnOnce() -> String,
) -> Result<(), ParallelismError> {
    if holds { Ok(()) } else { Err(ParallelismError::Degree { field, value, rule: rule(), nearest: None }) }
}

/// The same of a rule that the nearest of other values keeps.
fn check_or(
    holds: bool,
    field: &'static str,
    value: usize,
    rule: impl FnOnce() -> String,
    nearest: impl FnOnce() -> usize,
) -> Result<(), ParallelismError> {
    let error = || ParallelismError::Degree { field, value, rule: rule(), nearest: Some(nearest()) };
    if holds { Ok(()) } else { Err(error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn training() -> Training {
        Training { global_batch: 512, dispatch: DispatchKind::default(), ..Training::default() }
    }

    fn said(change: impl FnOnce(&mut Parallelism, &mut Training)) -> String {
        let model = Architecture::built_in("Qwen3-30B-A3B").unwrap();
        let mut layout = Parallelism { data: 16, expert: 8, ..Parallelism::default() };
        let mut training = training();
        change(&mut layout, &mut training);
        layout.check(&model, &training).map_or_else(|error| error.to_string(), |()| "ok".into())
    }

    #[test]
    fn rows_travel_no_wider_than_activations_and_results_no_narrower_than_16_bits() {
        let bytes = |compute, wire| Training { compute, wire, ..training() }.wire_bytes();
        assert_eq!(bytes(Precision::Bf16, Precision::F32), [2.0, 2.0]);
        assert_eq!(bytes(Precision::F32, Precision::F32), [4.0, 4.0]);
        assert_eq!(bytes(Precision::F32, Precision::Bf16), [2.0, 2.0]);
        assert_eq!(bytes(Precision::Fp8, Precision::Fp8), [Precision::Fp8.bytes(), 2.0]);
    }

    #[test]
    fn errors_name_the_degree_and_the_nearest_that_would_do() {
        assert_eq!(said(|_, _| ()), "ok");
        assert_eq!(said(|l, _| l.tensor = 3), "tensor = 3: must divide attention heads = 32; nearest: 2");
        assert_eq!(said(|l, _| l.expert = 48), "expert = 48: must divide experts = 128; nearest: 32");
        assert_eq!(
            said(|l, _| l.expert = 32),
            "expert = 32: times expert_tensor must divide tensor x context x data = 16; nearest: 16"
        );
        assert_eq!(said(|l, _| l.data = 24), "data = 24: must divide global_batch = 512; nearest: 16");
        assert_eq!(
            said(|l, _| l.micro_batch = 64),
            "micro_batch = 64: must divide the sequences of a replica = 32; nearest: 32"
        );
        assert_eq!(said(|_, t| t.global_batch = 0), "global_batch = 0: must be at least 1");
        assert_eq!(
            said(|l, _| l.virtual_stages = 2),
            "1f1b cannot run 32 micro-batches on 1 pipeline ranks with 2 stages each: it holds one stage a rank"
        );
    }

    #[test]
    fn experts_are_replicated_over_what_expert_parallelism_leaves() {
        let layout =
            Parallelism { tensor: 4, data: 16, expert: 8, expert_tensor: 2, ..Parallelism::default() };
        assert_eq!(layout.gpus(), 64);
        assert_eq!(layout.expert_data(), 4);
    }
}
