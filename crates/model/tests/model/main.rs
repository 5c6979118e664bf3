//! Layers against PyTorch, finite differences and each other.

mod common;
mod decoding;
mod differences;
mod kernels;
mod reference;
