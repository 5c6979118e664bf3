#![doc = include_str!("../../FORMAT.md")]

mod header;
mod reader;
mod writer;

pub use header::Header;
pub use reader::Shard;
pub use writer::ShardWriter;
