//! From text to sequences, and what damaged files do.

mod common;
mod hostile;
mod hostile_tokenizer;
mod prepare;
