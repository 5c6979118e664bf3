//! Chrome traces, for Perfetto and `chrome://tracing`.
//!
//! A rank is a process, its lanes are threads. Events are streamed to the file in the JSON object form,
//! `{"traceEvents": [...]}`; nothing but a write buffer is kept in memory. The file is valid JSON once the
//! writer is closed or dropped.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use unisono_model::{Lane, Span};

/// The thread number that stands for a lane.
fn thread_id(lane: Lane) -> u32 {
    match lane {
        Lane::Compute => 0,
        Lane::Communication => 1,
    }
}

/// Writes one trace file.
#[derive(Debug)]
pub struct TraceWriter {
    /// `None` once it is closed.
    file: Option<BufWriter<File>>,
    first: bool,
}

impl TraceWriter {
    /// Creates the file, or empties it, and names the processes of the ranks `0..ranks` and their lanes.
    ///
    /// # Errors
    /// The file cannot be created or written.
    pub fn create(path: &Path, ranks: usize) -> io::Result<Self> {
        let mut file = BufWriter::new(File::create(path)?);
        file.write_all(b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n")?;
        let mut writer = Self { file: Some(file), first: true };
        for rank in 0..ranks {
            writer.metadata(rank, 0, "process_name", json!({"name": format!("rank {rank}")}))?;
            // Without an index viewers sort processes by name: 10 before 2.
            writer.metadata(rank, 0, "process_sort_index", json!({"sort_index": rank}))?;
            for lane in [Lane::Compute, Lane::Communication] {
                writer.metadata(rank, thread_id(lane), "thread_name", json!({"name": lane.name()}))?;
            }
        }
        Ok(writer)
    }

    /// Writes one span: `start` is counted from the beginning of the run. `args` are shown when the span is
    /// selected; use an object, or null for none.
    ///
    /// # Errors
    /// The file cannot be written, or was closed.
    pub fn span(
        &mut self,
        rank: usize,
        lane: Lane,
        name: &str,
        start: Duration,
        duration: Duration,
        args: &Value,
    ) -> io::Result<()> {
        let mut event = json!({
            "ph": "X",
            "pid": rank,
            "tid": thread_id(lane),
            "name": name,
            "cat": lane.name(),
            "ts": microseconds(start),
            "dur": microseconds(duration),
        });
        if !args.is_null() {
            event["args"] = args.clone();
        }
        self.event(&event)
    }

    /// Writes the spans of a rank, as [`span_value`] gave them in one JSON list.
    ///
    /// # Errors
    /// The file cannot be written, or `text` is not such a list.
    pub fn spans(&mut self, rank: usize, text: &[u8], args: &Value) -> io::Result<()> {
        let list: Vec<(bool, String, u64, u64)> = serde_json::from_slice(text)?;
        for (computes, name, start_ns, length_ns) in list {
            let lane = if computes { Lane::Compute } else { Lane::Communication };
            let (start, length) = (Duration::from_nanos(start_ns), Duration::from_nanos(length_ns));
            self.span(rank, lane, &name, start, length, args)?;
        }
        Ok(())
    }

    /// Ends the file. Dropping the writer does it, too, but cannot tell whether it worked.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn close(mut self) -> io::Result<()> {
        self.finish()
    }

    fn metadata(&mut self, rank: usize, thread_id: u32, name: &str, args: Value) -> io::Result<()> {
        self.event(&json!({"ph": "M", "pid": rank, "tid": thread_id, "name": name, "args": args}))
    }

    fn event(&mut self, event: &Value) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Err(io::Error::other("the trace is closed")) };
        if !self.first {
            file.write_all(b",\n")?;
        }
        self.first = false;
        serde_json::to_writer(file, event).map_err(io::Error::from)
    }

    fn finish(&mut self) -> io::Result<()> {
        let Some(mut file) = self.file.take() else { return Ok(()) };
        file.write_all(b"\n]}\n")?;
        file.flush()
    }
}

impl Drop for TraceWriter {
    fn drop(&mut self) {
        // A drop cannot report; `close` does.
        let _ = self.finish();
    }
}

/// A span as JSON, for the rank that writes the trace: whether it computes, its name, start and length in nanoseconds.
pub fn span_value(span: &Span) -> Value {
    let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    json!([span.lane == Lane::Compute, span.name, nanoseconds(span.start), nanoseconds(span.length)])
}

/// Microseconds with the fraction that the clock gives.
fn microseconds(duration: Duration) -> f64 {
    duration.as_nanos() as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(path: &Path) -> Vec<Value> {
        let trace: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        trace["traceEvents"].as_array().unwrap().clone()
    }

    #[test]
    fn a_trace_parses_to_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        let mut writer = TraceWriter::create(&path, 2).unwrap();
        let (start, duration) = (Duration::from_nanos(1_234_567), Duration::from_micros(40));
        let odd = "all-to-all \"x\"\\\n\u{1}\u{2028}é";
        let args = json!({"bytes": 4096, "group": odd});
        writer.span(1, Lane::Communication, odd, start, duration, &args).unwrap();
        writer.span(0, Lane::Compute, "forward", Duration::ZERO, duration, &Value::Null).unwrap();
        writer.close().unwrap();

        let events = parse(&path);
        assert_eq!(events.len(), 2 * 4 + 2);
        let names: Vec<_> = events.iter().filter(|event| event["name"] == "process_name").collect();
        assert_eq!((&names[1]["args"]["name"], &names[1]["pid"]), (&json!("rank 1"), &json!(1)));
        let lanes: Vec<_> = events.iter().filter(|event| event["name"] == "thread_name").collect();
        assert_eq!((&lanes[3]["args"]["name"], &lanes[3]["tid"]), (&json!("communication"), &json!(1)));
        let expected = json!({"ph": "X", "pid": 1, "tid": 1, "name": odd, "cat": "communication",
            "ts": 1234.567, "dur": 40.0, "args": args});
        assert_eq!(events[8], expected);
        assert!(events[9].get("args").is_none());
    }

    #[test]
    fn a_dropped_or_empty_trace_is_valid() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        drop(TraceWriter::create(&path, 0).unwrap());
        assert!(parse(&path).is_empty());
        let mut writer = TraceWriter::create(&path, 1).unwrap();
        writer.span(0, Lane::Compute, "step", Duration::ZERO, Duration::MAX, &Value::Null).unwrap();
        drop(writer);
        assert_eq!(parse(&path).len(), 5);
    }
}
