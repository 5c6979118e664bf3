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
    /// Seconds once a step.
    pub step_s: f64,
    /// Standard deviation of the logarithm of measured over predicted seconds of families that were left out, dense models.
    pub spread: f64,
    /// The same for models with experts.
    pub spread_moe: f64,
}

/// Four of five measured peaks of memory lie within this logarithm of the predicted one: families weigh alike, none of the
/// memory's constants is fitted to a family (`unisono plan validate`).
pub const MEMORY_BAND: f64 = 0.138;

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

/// Fitted values.
pub const FITTED: Constants = Constants {
    gpus: [
        GpuConstants {
            gemm: 1.01,
            gemm_fp8: 1.1,
            gemm_fp4: 1.1,
            grouped: 1.1,
            attention: 0.842,
            memory: 1.2,
            host: 1.0,
        },
        GpuConstants {
            gemm: 1.05,
            gemm_fp8: 0.802,
            gemm_fp4: 1.2,
            grouped: 1.48,
            attention: 1.29,
            memory: 1.47,
            host: 1.0,
        },
        GpuConstants {
            gemm: 1.58,
            gemm_fp8: 0.776,
            gemm_fp4: 0.976,
            grouped: 1.79,
            attention: 1.03,
            memory: 0.954,
            host: 0.718,
        },
        GpuConstants {
            gemm: 1.27,
            gemm_fp8: 0.874,
            gemm_fp4: 0.866,
            grouped: 0.994,
            attention: 0.885,
            memory: 1.36,
            host: 0.502,
        },
        GpuConstants {
            gemm: 0.989,
            gemm_fp8: 0.852,
            gemm_fp4: 1.2,
            grouped: 1.34,
            attention: 0.919,
            memory: 1.04,
            host: 0.747,
        },
    ],
    software: [
        SoftwareConstants {
            memory: 1.0,
            attention: 1.0,
            grouped: 1.0,
            dispatch: 1.0,
            launch_s: 6.94e-5,
            moe_launch: 1.42,
            expert_launch: 0.224,
            tensor_exposed: 0.45,
            data_exposed: 0.257,
        },
        SoftwareConstants {
            memory: 1.21,
            attention: 1.01,
            grouped: 0.755,
            dispatch: 0.566,
            launch_s: 5e-6,
            moe_launch: 1.47,
            expert_launch: 0.131,
            tensor_exposed: 0.497,
            data_exposed: 0.266,
        },
        SoftwareConstants {
            memory: 0.79,
            attention: 0.933,
            grouped: 1.0,
            dispatch: 1.0,
            launch_s: 7.73e-5,
            moe_launch: 1.0,
            expert_launch: 0.1,
            tensor_exposed: 0.995,
            data_exposed: 0.389,
        },
        SoftwareConstants {
            memory: 5.0,
            attention: 4.0,
            grouped: 1.0,
            dispatch: 1.0,
            launch_s: 2.8e-5,
            moe_launch: 1.0,
            expert_launch: 0.1,
            tensor_exposed: 1.0,
            data_exposed: 0.822,
        },
        SoftwareConstants {
            memory: 1.29,
            attention: 1.63,
            grouped: 1.03,
            dispatch: 0.851,
            launch_s: 2e-5,
            moe_launch: 1.47,
            expert_launch: 0.131,
            tensor_exposed: 0.607,
            data_exposed: 0.538,
        },
        SoftwareConstants {
            memory: 1.07,
            attention: 1.52,
            grouped: 0.931,
            dispatch: 0.812,
            launch_s: 1e-5,
            moe_launch: 1.47,
            expert_launch: 0.131,
            tensor_exposed: 0.919,
            data_exposed: 0.286,
        },
        SoftwareConstants {
            memory: 1.24,
            attention: 1.14,
            grouped: 1.0,
            dispatch: 1.0,
            launch_s: 5e-6,
            moe_launch: 1.0,
            expert_launch: 0.1,
            tensor_exposed: 0.594,
            data_exposed: 0.486,
        },
    ],
    common: CommonConstants {
        dispatch: 0.331,
        all_to_all: 1.22,
        network: 1.11,
        expert_exposed: 0.449,
        context_exposed: 0.503,
        message_exposed: 0.454,
        straggler: 0.00963,
        scan: 2.67,
        norm: 5.96,
        step_s: 0.0123,
        spread: 0.116,
        spread_moe: 0.195,
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
