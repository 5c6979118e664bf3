//! Durable sharded checkpoints by logical coordinate.
