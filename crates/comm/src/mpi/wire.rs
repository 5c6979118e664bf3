//! The engine's own messages, as bytes.
//!
//! A call's header goes ahead of its payload, so that a receiver can match it with its own call, compare the two, and
//! only then name the place where the payload lands. Small payloads ride with their header.

use super::groups::Told;
use crate::error::{CallSite, Cause, CommError, Failure, SHOWN, Waiting};

/// Room for one message.
pub(super) const CONTROL_BYTES: usize = 4096;
/// The largest payload that rides with its header.
pub(super) const INLINE_BYTES: usize = 1536;
/// At most so many blocks are told in a header.
pub(super) const MOST_BLOCKS: usize = 128;
/// Texts in messages are cut to so many bytes.
const MOST_TEXT: usize = 700;
/// At most so many ranks of a list are told: lists are for texts.
const MOST_RANKS: usize = 128;

/// Which calls belong together, the same on all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// The group's fingerprint.
    pub group: u64,
    /// Sender, receiver and tag of a message; none for a collective call.
    pub message: Option<(u32, u32, u32)>,
    /// The call's number.
    pub seq: u64,
    /// Which side it is, where both are on one rank.
    pub side: u8,
}

/// One side of a call, as another one needs to know it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Header {
    pub key: Key,
    /// The sender's position among the call's members.
    pub position: u32,
    pub step: u64,
    pub kind: String,
    pub element: String,
    /// Bytes that follow.
    pub sent: u64,
    /// Bytes expected in return.
    pub expected: u64,
    /// Fingerprint of how what follows is cut into pieces.
    pub pieces: u64,
    /// The tag of the first of the messages that follow.
    pub first_tag: u32,
    /// What follows, as lengths of blocks; empty if it is here.
    pub blocks: Vec<u64>,
    /// What follows, if it is small.
    pub payload: Vec<u8>,
}

/// A message of the engine.
#[derive(Debug, Clone)]
pub(super) enum Message {
    /// A call has started.
    Call(Header),
    /// A group was opened.
    Group(Told),
    /// To rank 0: something has failed; `weight` says how sure the sender is whose fault it is.
    Report { failure: Failure, weight: u32 },
    /// From rank 0: this is why the run has failed.
    Verdict(Failure),
    /// The sender will make no more calls.
    Bye,
    /// The sender tells people why the job has failed.
    Said,
    /// The sender gets on with work that it does alone.
    Beat,
}

/// FNV-1a (Fowler, Noll, Vo): enough to tell things apart that are equal on all ranks or a defect.
pub(super) fn fingerprint(words: impl IntoIterator<Item = u64>) -> u64 {
    words.into_iter().flat_map(u64::to_le_bytes).fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}

impl Message {
    /// As bytes, at most [`CONTROL_BYTES`].
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer(Vec::with_capacity(256));
        match self {
            Self::Call(header) => {
                out.byte(0);
                header.write(&mut out);
            }
            Self::Group(told) => {
                out.byte(1);
                out.text(&told.name);
                out.number(told.fingerprint);
                out.number(told.size as u64);
                out.ranks(told.first.iter().copied());
            }
            Self::Report { failure, weight } => {
                out.byte(2);
                out.number(u64::from(*weight));
                write_failure(&mut out, failure);
            }
            Self::Verdict(failure) => {
                out.byte(3);
                write_failure(&mut out, failure);
            }
            Self::Bye => out.byte(4),
            Self::Said => out.byte(5),
            Self::Beat => out.byte(6),
        }
        out.0
    }

    /// What [`encode`](Self::encode) wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, CommError> {
        let mut from = Reader(bytes);
        let message = match from.byte()? {
            0 => Self::Call(Header::read(&mut from)?),
            1 => Self::Group(Told {
                name: from.text()?,
                fingerprint: from.number()?,
                size: from.number()? as usize,
                first: from.ranks()?,
            }),
            2 => {
                let weight = from.number()? as u32;
                Self::Report { failure: read_failure(&mut from)?, weight }
            }
            3 => Self::Verdict(read_failure(&mut from)?),
            4 => Self::Bye,
            5 => Self::Said,
            6 => Self::Beat,
            other => return Err(damaged(&format!("there is no message {other}"))),
        };
        Ok(message)
    }
}

impl Header {
    fn write(&self, out: &mut Writer) {
        out.number(self.key.group);
        let (from, to, tag) = self.key.message.unwrap_or_default();
        out.byte(u8::from(self.key.message.is_some()));
        for number in [from, to, tag].map(u64::from) {
            out.number(number);
        }
        out.byte(self.key.side);
        for number in [self.key.seq, u64::from(self.position), self.step] {
            out.number(number);
        }
        out.text(&self.kind);
        out.text(&self.element);
        for number in [self.sent, self.expected, self.pieces, u64::from(self.first_tag)] {
            out.number(number);
        }
        out.number(self.blocks.len() as u64);
        self.blocks.iter().for_each(|&len| out.number(len));
        out.bytes(&self.payload);
    }

    fn read(from: &mut Reader<'_>) -> Result<Self, CommError> {
        let group = from.number()?;
        let is_message = from.byte()? == 1;
        let message = (from.number()? as u32, from.number()? as u32, from.number()? as u32);
        let side = from.byte()?;
        let seq = from.number()?;
        Ok(Self {
            key: Key { group, message: is_message.then_some(message), seq, side },
            position: from.number()? as u32,
            step: from.number()?,
            kind: from.text()?,
            element: from.text()?,
            sent: from.number()?,
            expected: from.number()?,
            pieces: from.number()?,
            first_tag: from.number()? as u32,
            blocks: (0..from.number()?).map(|_| from.number()).collect::<Result<_, _>>()?,
            payload: from.bytes()?.to_vec(),
        })
    }
}

fn write_site(out: &mut Writer, site: &CallSite) {
    out.number(site.step);
    out.number(site.seq);
    out.text(&site.kind);
    out.text(&site.group);
}

fn read_site(from: &mut Reader<'_>) -> Result<CallSite, CommError> {
    let (step, seq) = (from.number()?, from.number()?);
    Ok(CallSite { step, seq, kind: from.text()?.into(), group: from.text()?.into() })
}

fn write_failure(out: &mut Writer, failure: &Failure) {
    out.number(failure.rank as u64);
    out.number(failure.step);
    out.byte(u8::from(failure.call.is_some()));
    if let Some(call) = &failure.call {
        write_site(out, call);
    }
    let (which, text) = match &failure.cause {
        Cause::Panicked { message } => (0, message.as_str()),
        Cause::Errored { message } => (1, message.as_str()),
        Cause::ReturnedEarly => (2, ""),
        Cause::Mismatch { detail } => (3, detail.as_str()),
        Cause::Deadlock => (4, ""),
        Cause::NotStarted { message } => (5, message.as_str()),
        Cause::Stalled { detail, .. } => (6, detail.as_str()),
        Cause::Died => (7, ""),
    };
    out.byte(which);
    out.text(text);
    if let Cause::Stalled { waited_s, .. } = &failure.cause {
        out.number(waited_s.unwrap_or(f64::NAN).to_bits());
    }
    let told = &failure.waiting[..failure.waiting.len().min(8)];
    out.number(told.len() as u64);
    for waiting in told {
        out.number(waiting.rank as u64);
        write_site(out, &waiting.call);
        out.ranks(waiting.for_ranks.iter().copied().take(SHOWN));
    }
}

fn read_failure(from: &mut Reader<'_>) -> Result<Failure, CommError> {
    let (rank, step) = (from.number()? as usize, from.number()?);
    let call = match from.byte()? {
        0 => None,
        _ => Some(read_site(from)?),
    };
    let (which, text) = (from.byte()?, from.text()?);
    let cause = match which {
        0 => Cause::Panicked { message: text },
        1 => Cause::Errored { message: text },
        2 => Cause::ReturnedEarly,
        3 => Cause::Mismatch { detail: text },
        4 => Cause::Deadlock,
        5 => Cause::NotStarted { message: text },
        6 => {
            let waited_s = f64::from_bits(from.number()?);
            Cause::Stalled { waited_s: waited_s.is_finite().then_some(waited_s), detail: text }
        }
        7 => Cause::Died,
        other => return Err(damaged(&format!("there is no cause {other}"))),
    };
    let wait = |from: &mut Reader<'_>| {
        Ok::<_, CommError>(Waiting {
            rank: from.number()? as usize,
            call: read_site(from)?,
            for_ranks: from.ranks()?,
        })
    };
    let waiting = (0..from.number()?).map(|_| wait(from)).collect::<Result<_, _>>()?;
    Ok(Failure { rank, step, call, cause, waiting, flights: Vec::new() })
}

struct Writer(Vec<u8>);

impl Writer {
    fn byte(&mut self, value: u8) {
        self.0.push(value);
    }

    fn number(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, value: &[u8]) {
        self.number(value.len() as u64);
        self.0.extend(value);
    }

    fn text(&mut self, value: &str) {
        self.bytes(&value.as_bytes()[..value.floor_char_boundary(MOST_TEXT)]);
    }

    fn ranks(&mut self, ranks: impl Iterator<Item = usize>) {
        let ranks: Vec<u64> = ranks.take(MOST_RANKS).map(|rank| rank as u64).collect();
        self.number(ranks.len() as u64);
        ranks.into_iter().for_each(|rank| self.number(rank));
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], CommError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or_else(|| damaged("it is too short"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, CommError> {
        Ok(self.take(1)?[0])
    }

    fn number(&mut self) -> Result<u64, CommError> {
        let (word, rest) = self.0.split_first_chunk::<8>().ok_or_else(|| damaged("it is too short"))?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*word))
    }

    fn bytes(&mut self) -> Result<&'a [u8], CommError> {
        let len = self.number()?;
        self.take(usize::try_from(len).unwrap_or(usize::MAX))
    }

    fn text(&mut self) -> Result<String, CommError> {
        Ok(String::from_utf8_lossy(self.bytes()?).into_owned())
    }

    fn ranks(&mut self) -> Result<Vec<usize>, CommError> {
        (0..self.number()?).map(|_| Ok(self.number()? as usize)).collect()
    }
}

fn damaged(why: &str) -> CommError {
    CommError::Transport(format!("a message between ranks cannot be read: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            key: Key { group: u64::MAX, message: Some((1, 2, 3)), seq: 77, side: 1 },
            position: 3,
            step: 12,
            kind: "all_to_all".into(),
            element: "f32".into(),
            sent: 1 << 40,
            expected: 5,
            pieces: 9,
            first_tag: 32_767,
            blocks: vec![1 << 39; MOST_BLOCKS],
            payload: vec![7; INLINE_BYTES],
        }
    }

    #[test]
    fn a_header_comes_back_and_fits() {
        let bytes = Message::Call(header()).encode();
        assert!(bytes.len() <= CONTROL_BYTES, "{} bytes", bytes.len());
        let Message::Call(back) = Message::decode(&bytes).unwrap() else { panic!("another message") };
        assert_eq!(back, header());
        for len in 0..bytes.len() {
            assert!(Message::decode(&bytes[..len]).is_err(), "cut to {len} bytes");
        }
    }

    #[test]
    fn a_failure_comes_back_and_fits_however_long_its_texts_are() {
        let site =
            |kind: &'static str| CallSite { step: 3, seq: 4, kind: kind.into(), group: "world".into() };
        let failure = Failure {
            rank: 2,
            step: 3,
            call: Some(site("barrier")),
            cause: Cause::Errored { message: "é".repeat(5000) },
            waiting: vec![Waiting { rank: 1, call: site("all_gather"), for_ranks: (0..500).collect() }; 30],
            flights: Vec::new(),
        };
        let bytes = Message::Verdict(failure.clone()).encode();
        assert!(bytes.len() <= CONTROL_BYTES, "{} bytes", bytes.len());
        let Message::Verdict(back) = Message::decode(&bytes).unwrap() else { panic!("another message") };
        assert_eq!((back.rank, back.step, &back.call), (failure.rank, failure.step, &failure.call));
        assert_eq!((back.waiting.len(), back.waiting[0].for_ranks.len()), (8, 16));
        let Cause::Errored { message } = back.cause else { panic!("another cause") };
        assert_eq!(message, "é".repeat(350));
    }

    #[test]
    fn fingerprints_tell_cuts_apart() {
        assert_ne!(fingerprint([2, 2]), fingerprint([4]));
        assert_ne!(fingerprint([1, 2]), fingerprint([2, 1]));
    }
}
