//! What the tests share.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub mod cases;

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use unisono_comm::{CommError, Communicator, Part};

/// Fails the test if `body` hangs.
pub fn within_seconds<T: Send + 'static>(seconds: u64, body: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = channel();
    let thread = std::thread::spawn(move || {
        let value = body();
        // The receiver is gone only if the time was over.
        let _ = sender.send(());
        value
    });
    let timed_out = receiver.recv_timeout(Duration::from_secs(seconds))
        == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
    assert!(!timed_out, "hangs: not done in {seconds} s");
    match thread.join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// An all-gather of one u32 per rank.
pub fn gather_one(comm: &Communicator, value: u32) -> Result<Vec<u32>, CommError> {
    let slots: Vec<Range<usize>> = (0..comm.size()).map(|i| i..i + 1).collect();
    comm.all_gather_v(Arc::new(vec![value]), vec![0; comm.size()], &slots)
}

/// The parts of a buffer.
pub fn parts(buffer: &Arc<Vec<f32>>, ranges: &[Range<usize>]) -> Vec<Part<f32>> {
    ranges.iter().map(|range| Part::new(Arc::clone(buffer), range.clone())).collect()
}

/// Ranges of the given lengths, one after another.
pub fn consecutive(lengths: &[usize]) -> Vec<Range<usize>> {
    let mut end = 0;
    let next = |&len: &usize| {
        let start = end;
        end += len;
        start..end
    };
    lengths.iter().map(next).collect()
}
