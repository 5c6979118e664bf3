//! Kernels against scalar f64 references, central finite differences, and themselves: other thread counts, other rows; and the vectors and
//! threads that they are made of.

mod attention;
mod elementwise;
mod ffn;
mod formulas;
mod gemm_contract;
mod head;
mod matmul;
mod norm;
mod parallel;
mod rope;
mod router;
mod rows;
mod simd;
mod support;
