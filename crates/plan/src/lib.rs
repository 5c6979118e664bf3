//! Model and training descriptions, and what they cost in memory.
