//! TensorBoard event files.
//!
//! An event file is a sequence of TFRecords (length, masked CRC-32C of the length, payload, masked CRC-32C of
//! the payload), each holding a protobuf `Event`. The few fields that are needed are encoded here by hand,
//! field numbers after `tensorflow/core/util/event.proto` and `.../framework/{summary,tensor}.proto`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// TensorBoard reads files whose names have `tfevents` in them.
const PREFIX: &str = "events.out.tfevents.";

/// Writes one event file. What was written is visible to TensorBoard after [`EventWriter::flush`]; dropping
/// the writer flushes, too.
#[derive(Debug)]
pub struct EventWriter {
    file: BufWriter<File>,
    path: PathBuf,
}

impl EventWriter {
    /// Creates a new event file in the folder `dir`, which is created if need be. A resumed run gets a file
    /// of its own; TensorBoard joins them.
    ///
    /// # Errors
    /// The folder or the file cannot be created or written.
    pub fn create(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let now = wall_time();
        // TensorBoard reads them in name order.
        for number in 0..1000 {
            let path = dir.join(format!("{PREFIX}{:010}.unisono.{number}", now as u64));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => {
                    let mut writer = Self { file: BufWriter::new(file), path };
                    writer.write_record(&version_event(now))?;
                    writer.flush()?;
                    return Ok(writer);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::new(io::ErrorKind::AlreadyExists, "1,000 event files of this second; remove some"))
    }

    /// Removes all event files of runs from the folder `dir`.
    ///
    /// # Errors
    /// The folder cannot be read or a file not removed.
    pub fn remove_all(dir: &Path) -> io::Result<()> {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().into_string().unwrap_or_default();
            if name.starts_with(PREFIX) && name.contains(".unisono.") {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes scalars of one step as one event; tags are grouped by what stands before their first slash.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn scalars(&mut self, step: u64, scalars: &[(&str, f32)]) -> io::Result<()> {
        self.write_record(&scalar_event(wall_time(), step, scalars))
    }

    /// Writes a text, shown as Markdown in the tab "Text".
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn text(&mut self, step: u64, tag: &str, text: &str) -> io::Result<()> {
        self.write_record(&text_event(wall_time(), step, tag, text))
    }

    /// Hands everything written so far to the operating system.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }

    fn write_record(&mut self, payload: &[u8]) -> io::Result<()> {
        let length = (payload.len() as u64).to_le_bytes();
        self.file.write_all(&length)?;
        self.file.write_all(&masked_crc32c(&length).to_le_bytes())?;
        self.file.write_all(payload)?;
        self.file.write_all(&masked_crc32c(payload).to_le_bytes())
    }
}

/// Seconds since 1970.
fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// The event that every file begins with.
fn version_event(wall_time: f64) -> Vec<u8> {
    let mut event = Message::default();
    event.double(1, wall_time).bytes(3, b"brain.Event:2");
    event.0
}

fn scalar_event(wall_time: f64, step: u64, scalars: &[(&str, f32)]) -> Vec<u8> {
    let mut summary = Message::default();
    for (tag, value) in scalars {
        let mut entry = Message::default();
        entry.bytes(1, tag.as_bytes()).float(2, *value);
        summary.bytes(1, &entry.0);
    }
    event(wall_time, step, &summary)
}

fn text_event(wall_time: f64, step: u64, tag: &str, text: &str) -> Vec<u8> {
    const DT_STRING: u64 = 7;
    let mut plugin = Message::default();
    plugin.bytes(1, b"text");
    let mut metadata = Message::default();
    metadata.bytes(1, &plugin.0);
    let mut tensor = Message::default();
    // A scalar: its shape message is there and has no dims.
    tensor.varint(1, DT_STRING).bytes(2, b"").bytes(8, text.as_bytes());
    let mut entry = Message::default();
    entry.bytes(1, tag.as_bytes()).bytes(8, &tensor.0).bytes(9, &metadata.0);
    let mut summary = Message::default();
    summary.bytes(1, &entry.0);
    event(wall_time, step, &summary)
}

fn event(wall_time: f64, step: u64, summary: &Message) -> Vec<u8> {
    let mut event = Message::default();
    event.double(1, wall_time).varint(2, step).bytes(5, &summary.0);
    event.0
}

/// A protobuf message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn key(&mut self, field: u64, wire_type: u64) {
        self.raw_varint(field << 3 | wire_type);
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(&mut self, field: u64, value: u64) -> &mut Self {
        self.key(field, 0);
        self.raw_varint(value);
        self
    }

    fn double(&mut self, field: u64, value: f64) -> &mut Self {
        self.key(field, 1);
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn bytes(&mut self, field: u64, bytes: &[u8]) -> &mut Self {
        self.key(field, 2);
        self.raw_varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
        self
    }

    fn float(&mut self, field: u64, value: f32) -> &mut Self {
        self.key(field, 5);
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }
}

/// CRC-32C of the data, rotated and offset as TFRecord asks for.
fn masked_crc32c(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Bitwise is fast enough: an event of ten scalars has some 400 bytes.
fn crc32c(data: &[u8]) -> u32 {
    const REVERSED_POLYNOMIAL: u32 = 0x82f6_3b78;
    let mut crc = !0u32;
    for byte in data {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ (REVERSED_POLYNOMIAL & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_of_known_inputs() {
        // RFC 3720, B.4, and the check value of the catalogue of CRCs.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b""), 0);
    }

    #[test]
    fn encoded_events_are_these_bytes() {
        let time = b"\x09\x00\x00\x00\x00\x00\x00\xf8\x3f"; // 1.5
        let version = [&time[..], b"\x1a\x0dbrain.Event:2"].concat();
        assert_eq!(version_event(1.5), version);
        // Step 300 is the varint ac 02; the value 0.5 is 3f000000.
        let scalar = [&time[..], b"\x10\xac\x02\x2a\x0d\x0a\x0b\x0a\x04loss\x15\x00\x00\x00\x3f"].concat();
        assert_eq!(scalar_event(1.5, 300, &[("loss", 0.5)]), scalar);
    }

    /// A decoded field: number, and value as varint, fixed bits or bytes.
    #[derive(Debug, PartialEq)]
    enum Field<'a> {
        Varint(u64, u64),
        Fixed64(u64, [u8; 8]),
        Fixed32(u64, [u8; 4]),
        Bytes(u64, &'a [u8]),
    }

    fn take<'a>(input: &mut &'a [u8], count: usize) -> &'a [u8] {
        let (head, tail) = input.split_at(count);
        *input = tail;
        head
    }

    fn take_varint(input: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = take(input, 1)[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return value;
            }
        }
        panic!("varint too long")
    }

    fn fields(mut input: &[u8]) -> Vec<Field<'_>> {
        let mut fields = Vec::new();
        while !input.is_empty() {
            let key = take_varint(&mut input);
            fields.push(match key & 7 {
                0 => Field::Varint(key >> 3, take_varint(&mut input)),
                1 => Field::Fixed64(key >> 3, take(&mut input, 8).try_into().unwrap()),
                2 => {
                    let len = take_varint(&mut input) as usize;
                    Field::Bytes(key >> 3, take(&mut input, len))
                }
                5 => Field::Fixed32(key >> 3, take(&mut input, 4).try_into().unwrap()),
                other => panic!("wire type {other}"),
            });
        }
        fields
    }

    fn records(mut file: &[u8]) -> Vec<&[u8]> {
        // By table and most significant bit first: another way than the writer's.
        fn check(data: &[u8], masked: u32) {
            let crc = masked.wrapping_sub(0xa282_ead8).rotate_left(15);
            let mut register = !0u32;
            for byte in data {
                register ^= u32::from(byte.reverse_bits()) << 24;
                for _ in 0..8 {
                    let high = register >> 31 == 1;
                    register <<= 1;
                    if high {
                        register ^= 0x1edc_6f41;
                    }
                }
            }
            assert_eq!((!register).reverse_bits(), crc);
        }
        let mut records = Vec::new();
        while !file.is_empty() {
            let length = take(&mut file, 8);
            check(length, u32::from_le_bytes(take(&mut file, 4).try_into().unwrap()));
            let payload = take(&mut file, u64::from_le_bytes(length.try_into().unwrap()) as usize);
            check(payload, u32::from_le_bytes(take(&mut file, 4).try_into().unwrap()));
            records.push(payload);
        }
        records
    }

    #[test]
    fn a_file_decodes_to_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(folder.path()).unwrap();
        let scalars =
            [("loss_metrics/global_avg_loss", 8.25f32), ("mfu(%)", f32::NAN), ("throughput(tps)", -0.0)];
        writer.scalars(u64::from(u32::MAX) + 7, &scalars).unwrap();
        let long = "words ".repeat(100);
        writer.text(20, "sample", &long).unwrap();
        let second = EventWriter::create(folder.path()).unwrap();
        assert_ne!(writer.path(), second.path());
        writer.flush().unwrap();

        let file = fs::read(writer.path()).unwrap();
        let records = records(&file);
        assert_eq!(records.len(), 3);
        assert_eq!(fields(records[0])[1], Field::Bytes(3, b"brain.Event:2"));
        let event = fields(records[1]);
        let Field::Fixed64(1, time) = event[0] else { panic!("{event:?}") };
        assert!((wall_time() - f64::from_le_bytes(time)).abs() < 60.0);
        assert_eq!(event[1], Field::Varint(2, u64::from(u32::MAX) + 7));
        let Field::Bytes(5, summary) = event[2] else { panic!("{event:?}") };
        for (entry, (tag, value)) in fields(summary).iter().zip(scalars) {
            let Field::Bytes(1, entry) = entry else { panic!("{entry:?}") };
            let expected = [Field::Bytes(1, tag.as_bytes()), Field::Fixed32(2, value.to_le_bytes())];
            assert_eq!(fields(entry), expected);
        }
        assert_eq!(fields(summary).len(), 3);
        let Field::Bytes(5, summary) = fields(records[2])[2] else { panic!() };
        let Field::Bytes(1, entry) = fields(summary)[0] else { panic!() };
        let entry = fields(entry);
        assert_eq!(entry[0], Field::Bytes(1, b"sample"));
        let Field::Bytes(8, tensor) = entry[1] else { panic!("{entry:?}") };
        assert_eq!(fields(tensor)[2], Field::Bytes(8, long.as_bytes()));
    }
}
