//! The kernels of a step: the Backend trait and its CPU implementation.
