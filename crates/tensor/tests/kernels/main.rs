//! Kernels against scalar f64 references, central finite differences, and themselves: other thread counts, other rows.

mod attention;
mod elementwise;
mod ffn;
mod formulas;
mod head;
mod matmul;
mod norm;
mod rope;
mod router;
mod rows;
mod support;
