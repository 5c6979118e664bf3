//! Every constant that was fitted to measured training steps, in one place.
//!
//! `scripts/calibrate FOLDER` fits them to the published runs of the folder's `end_to_end.csv`. Kernel tables are measured alone on
//! an idle GPU; a training step runs hot, keeps every unit busy and waits for its host, which is what these factors say.
//! A constant belongs to a generation of GPUs or to a family of software, never to a model or a row.

use crate::hardware::Gpu;
use crate::precision::Precision;
use crate::software::Software;

/// What training does to the kernels and links of a generation of GPUs. Factors multiply seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GpuConstants {
    /// Of products in 16 or 32 bits.
    pub gemm: f64,
    /// Of products in 8 bits, casts not counted.
    pub gemm_fp8: f64,
    /// Of products in 4 bits, casts not counted.
    pub gemm_fp4: f64,
    /// Of the products of experts, on top of that of products.
    pub grouped: f64,
    /// Of fused attention.
    pub attention: f64,
    /// Of kernels bound by memory.
    pub memory: f64,
    /// Of what the host does.
    pub host: f64,
}

/// How a family of software runs a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SoftwareConstants {
    /// Of kernels bound by memory: less than 1 where they are fused.
    pub memory: f64,
    /// Of attention.
    pub attention: f64,
    /// Of the products of experts.
    pub grouped: f64,
    /// Of dispatch and combine.
    pub dispatch: f64,
    /// Host seconds for each kernel of a dense layer.
    pub launch_s: f64,
    /// By how much more the host works for an MoE layer's kernels.
    pub moe_launch: f64,
    /// What a local expert adds to the launches of a product of experts, in kernels.
    pub expert_launch: f64,
    /// Part of tensor-parallel communication that no product hides.
    pub tensor_exposed: f64,
    /// Part of gradient and parameter traffic that no computation hides.
    pub data_exposed: f64,
}

/// What does not depend on GPU or software.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CommonConstants {
    /// Part of dispatch and combine that nothing hides: shared experts and the router run meanwhile.
    pub dispatch: f64,
    /// The same of an all-to-all, which sends every copy of a token.
    pub all_to_all: f64,
    /// Part of what crosses servers that nothing hides, before the shares below.
    pub network: f64,
    /// Part of dispatch and combine that overlapping micro-batches leave exposed.
    pub expert_exposed: f64,
    /// Part of the context-parallel exchange that attention leaves exposed.
    pub context_exposed: f64,
    /// Part of messages between pipeline stages that is exposed.
    pub message_exposed: f64,
    /// Growth of the step for each doubling of the number of servers: the slowest of many.
    pub straggler: f64,
    /// Of the scan of a state-space mixer and what it reads and writes.
    pub scan: f64,
    /// How host and GPU share time: seconds of both are joined by this norm; 1 adds them, infinity takes the longer.
    pub norm: f64,
    /// Part of an MoE layer's launches that the GPU waits for where an all-to-all makes the host wait for the GPU first.
    pub awaited: f64,
    /// Seconds once a step.
    pub step_s: f64,
    /// Standard deviation of the logarithm of measured over predicted seconds of families that were left out, dense models.
    pub spread: f64,
    /// The same for models with experts.
    pub spread_moe: f64,
}

/// At least four of five measured peaks of what an allocator has reserved lie within this logarithm of the predicted one: 20 runs of
/// torchtitan, the families weighing alike (`scripts/calibrate FOLDER folds 3 8` prints the bands, rounded up, and what they cover). What a
/// GPU must have is predicted as reserved.
pub const MEMORY_BAND: f64 = 0.102;

/// The same of what is allocated: 565 peaks of 44 families. No constant of memory but `TEST_SKEW` is fitted to them, so families need
/// not be left out. What Megatron's tests run was learnt from their rows.
pub const ALLOCATED_BAND: f64 = 0.060;

/// How much narrower, in logarithms, the interval of a step time is once the release factor is known: the spread that covers 80% of
/// families that were left out, with the factor over without (`scripts/calibrate FOLDER folds 3 8`: 0.098 over 0.113 for dense models,
/// 0.133 over 0.156 for those with experts).
pub(crate) const RELEASED_SPREAD: f64 = 0.85;

/// Standard deviations of the logarithm of an efficiency that is borrowed from a GPU of the same die, and from another: a little above
/// the root mean square of the ratio of two GPUs' measured efficiencies over products of at least 1,024 rows in bf16, which the test
/// `borrowing_costs_what_the_tables_say` prints (H100 and H200, B200 and GB200, B300 and GB300: 0.06 to 0.10; A100, Hopper and
/// Blackwell among each other: 0.13 to 0.25).
pub(crate) const BORROWED_SPREAD: [f64; 2] = [0.09, 0.19];

/// How sure the seconds of a part of a step are, apart from what all parts err by together: standard deviations of their logarithm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PartSpread {
    /// Of the tables that kernels or collectives are interpolated from: that whose 80% interval holds four of five rows that were
    /// left out of them, of 1 MiB and above where it is collectives.
    pub table: f64,
    /// Of the fitted constants: by which the part would have come out differently, had other runs been published.
    pub constants: f64,
}

const fn part(table: f64, constants: f64) -> PartSpread {
    PartSpread { table, constants }
}

/// Of the parts of a step, in the order of `Breakdown::parts`, rounded up. Tables: `cargo test -p unisono-plan --test plan -- kernels collectives`
/// holds them to the rows left out (products, experts' products, attention; NCCL within a server; DeepEP, dispatch and combine).
/// Constants: the grouped jackknife over eight folds of families, `scripts/calibrate FOLDER parts 8 8`.
pub const PART_SPREADS: [PartSpread; 13] = [
    // Products, experts' products, attention.
    part(0.042, 0.10),
    part(0.084, 0.13),
    part(0.032, 0.13),
    // Kernels bound by memory, launches: no table.
    part(0.0, 0.13),
    part(0.0, 0.71),
    // Tensor and context-parallel communication, dispatch and combine, messages.
    part(0.050, 0.20),
    part(0.050, 0.32),
    part(0.053, 0.40),
    part(0.050, 0.29),
    // The bubble is made of passes.
    part(0.0, 0.18),
    // Gradients and parameters, the optimizer, overhead.
    part(0.050, 0.34),
    part(0.0, 0.12),
    part(0.0, 0.44),
];

/// Bytes that PyTorch's allocator reserves for each that is allocated at the peak, as torchtitan reports both.
pub(crate) const RESERVED: f64 = 1.12;

/// Bytes that are set aside on a GPU whatever runs: the intercept of peaks that Megatron's tests record on A100, over their layers,
/// without workspaces.
pub(crate) const BASE_BYTES: f64 = 36e6;

/// The exponent of the power law by which Megatron's functional tests spread tokens over experts, whose routers are new: at it the
/// memory of tests with experts has no bias. Runs that are measured for speed are balanced by force.
pub(crate) const TEST_SKEW: f64 = 0.3;

/// Constants for one GPU and software.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Calibration {
    /// Of the GPU.
    pub gpu: GpuConstants,
    /// Of the software.
    pub software: SoftwareConstants,
    /// Of neither.
    pub common: CommonConstants,
}

/// All constants.
#[derive(Debug, Clone, PartialEq)]
pub struct Constants {
    /// `[generation]`: A100; H100, H800, H200, H20; B200, B300, whose hosts are x86; GB200, GB300, whose hosts are Grace;
    /// MI300X, MI325X, MI355X.
    pub gpus: [GpuConstants; 5],
    /// `[software]`, in the order of the enumeration.
    pub software: [SoftwareConstants; 7],
    /// The rest.
    pub common: CommonConstants,
}

/// Fitted values: what `scripts/calibrate FOLDER fit 8` prints, rounded. Beside each group stand the published runs with a step time that
/// it was fitted to, by the file that lists them; constants that none of them tells of (`without_evidence` of
/// `examples/calibrate/knobs.rs`) keep the neutral value of their like.
pub const FITTED: Constants = Constants {
    gpus: [
        // A100: 1,432 runs of 26 families: vTrain, llm-foundry, Megatron 2021, MegaScale, Korthikanti 2022.
        GpuConstants {
            gemm: 1.01,
            gemm_fp8: 1.1,
            gemm_fp4: 1.1,
            grouped: 1.1,
            attention: 0.835,
            memory: 1.29,
            host: 1.0,
        },
        // H100, H800, H200, H20: 499 runs of 58 families: DGX Cloud, MoE parallel folding, llm-foundry, Megatron-Bridge, NeMo, torchtitan,
        // MLPerf. None tells of 4 bits.
        GpuConstants {
            gemm: 1.05,
            gemm_fp8: 0.815,
            gemm_fp4: 1.2,
            grouped: 1.47,
            attention: 1.35,
            memory: 1.42,
            host: 1.0,
        },
        // B200, B300: 111 runs of 19 families: Megatron-Bridge, SimuMax, NeMo, MLPerf.
        GpuConstants {
            gemm: 1.54,
            gemm_fp8: 0.767,
            gemm_fp4: 0.982,
            grouped: 1.45,
            attention: 0.997,
            memory: 1.31,
            host: 0.774,
        },
        // GB200, GB300: 164 runs of 25 families: Megatron-Bridge, DGX Cloud, Megatron-Core.
        GpuConstants {
            gemm: 1.21,
            gemm_fp8: 0.845,
            gemm_fp4: 0.847,
            grouped: 0.961,
            attention: 0.882,
            memory: 1.61,
            host: 0.723,
        },
        // MI300X, MI325X, MI355X: 8 runs of 3 families: Primus. None tells of 4 bits.
        GpuConstants {
            gemm: 0.989,
            gemm_fp8: 0.852,
            gemm_fp4: 1.2,
            grouped: 1.34,
            attention: 0.917,
            memory: 1.12,
            host: 0.848,
        },
    ],
    software: [
        // Megatron-Core: the reference of kernels, which is 1; runs of Megatron-Bridge, DGX Cloud, NeMo, SimuMax, MLPerf, HAI-LLM and others.
        SoftwareConstants {
            memory: 1.0,
            attention: 1.0,
            grouped: 1.0,
            dispatch: 1.0,
            launch_s: 3.86e-5,
            moe_launch: 1.42,
            expert_launch: 0.461,
            tensor_exposed: 0.438,
            data_exposed: 0.231,
        },
        // Megatron-Core in graphs: Megatron-Bridge's in mxfp8 on Grace and B300 since 26.06.
        SoftwareConstants {
            memory: 0.695,
            attention: 1.16,
            grouped: 0.873,
            dispatch: 0.799,
            launch_s: 5e-6,
            moe_launch: 1.47,
            expert_launch: 0.166,
            tensor_exposed: 0.606,
            data_exposed: 0.423,
        },
        // Megatron 2021: 1,322 runs of 20 families on A100: vTrain, Megatron 2021, MegaScale's comparison, Korthikanti 2022.
        SoftwareConstants {
            memory: 0.698,
            attention: 0.953,
            grouped: 1.0,
            dispatch: 1.0,
            launch_s: 7.61e-5,
            moe_launch: 1.0,
            expert_launch: 0.1,
            tensor_exposed: 1.01,
            data_exposed: 0.415,
        },
        // DeepSpeed 2021: 6 runs of 2 families, which tell of exposed traffic only; memory and attention are
        // still the first fit's, which stopped at the ends of their ranges.
        SoftwareConstants {
            memory: 5.0,
            attention: 4.0,
            grouped: 1.0,
            dispatch: 1.0,
            launch_s: 2.8e-5,
            moe_launch: 1.0,
            expert_launch: 0.1,
            tensor_exposed: 1.0,
            data_exposed: 0.919,
        },
        // PyTorch, eager: 181 runs of 15 families: llm-foundry, MoE parallel folding.
        SoftwareConstants {
            memory: 1.22,
            attention: 1.64,
            grouped: 1.08,
            dispatch: 0.967,
            launch_s: 2e-5,
            moe_launch: 1.47,
            expert_launch: 0.166,
            tensor_exposed: 0.619,
            data_exposed: 0.551,
        },
        // PyTorch, compiled: 32 runs of 4 families: torchtitan.
        SoftwareConstants {
            memory: 0.949,
            attention: 1.55,
            grouped: 0.984,
            dispatch: 0.929,
            launch_s: 1e-5,
            moe_launch: 1.47,
            expert_launch: 0.166,
            tensor_exposed: 0.879,
            data_exposed: 0.379,
        },
        // XLA: 35 runs of 4 families: MaxText of DGX Cloud.
        SoftwareConstants {
            memory: 1.05,
            attention: 1.17,
            grouped: 1.0,
            dispatch: 1.0,
            launch_s: 5e-6,
            moe_launch: 1.0,
            expert_launch: 0.1,
            tensor_exposed: 0.606,
            data_exposed: 0.542,
        },
    ],
    // All runs; the two spreads are those that cover 80% of families left out (docs/validation.md).
    common: CommonConstants {
        dispatch: 0.261,
        all_to_all: 0.914,
        network: 1.07,
        expert_exposed: 0.297,
        context_exposed: 0.482,
        message_exposed: 0.363,
        straggler: 0.0111,
        scan: 2.27,
        norm: 5.68,
        awaited: 0.499,
        step_s: 0.0143,
        spread: 0.115,
        spread_moe: 0.155,
    },
};

impl Constants {
    /// The place of the generation of A100.
    pub const AMPERE: usize = 0;

    /// The place of a GPU's generation among them.
    pub fn generation(gpu: &Gpu) -> usize {
        match gpu.name {
            "A100" => Self::AMPERE,
            "H100" | "H800" | "H200" | "H20" => 1,
            name if name.starts_with("GB") => 3,
            name if name.starts_with("MI") => 4,
            _ => 2,
        }
    }

    /// The constants for `gpu` and `software`.
    pub fn of(&self, gpu: &Gpu, software: Software) -> Calibration {
        Calibration {
            gpu: self.gpus[Self::generation(gpu)],
            software: self.software[software as usize],
            common: self.common,
        }
    }
}

impl Calibration {
    /// The fitted constants for `gpu` and `software`.
    pub fn of(gpu: &Gpu, software: Software) -> Self {
        FITTED.of(gpu, software)
    }

    /// The factor of products in `precision`.
    pub fn product(&self, precision: Precision) -> f64 {
        match precision {
            Precision::F32 | Precision::F16 | Precision::Bf16 => self.gpu.gemm,
            Precision::Fp8 | Precision::Mxfp8 => self.gpu.gemm_fp8,
            Precision::Nvfp4 => self.gpu.gemm_fp4,
        }
    }

    /// The factor of kernels bound by memory.
    pub fn stream(&self) -> f64 {
        self.gpu.memory * self.software.memory
    }

    /// The factor of attention.
    pub fn attention(&self) -> f64 {
        self.gpu.attention * self.software.attention
    }

    /// The factor of the products of experts in `precision`.
    pub fn grouped(&self, precision: Precision) -> f64 {
        self.product(precision) * self.gpu.grouped * self.software.grouped
    }

    /// The factor of dispatch and combine, `once` to a server or by an all-to-all.
    pub fn dispatch(&self, once: bool) -> f64 {
        let common = if once { self.common.dispatch } else { self.common.all_to_all };
        common * self.software.dispatch
    }

    /// Host seconds of a kernel.
    pub fn launch_s(&self) -> f64 {
        self.software.launch_s * self.gpu.host
    }
}
