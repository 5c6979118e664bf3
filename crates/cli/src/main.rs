//! The command line of Unisono.
fn main() {}
