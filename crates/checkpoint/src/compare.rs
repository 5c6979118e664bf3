//! Comparing checkpoints by their logical contents, however they are cut into pieces.

use std::fmt;

use blake3::{Hash, Hasher};

use crate::error::Result;
use crate::manifest::{Dtype, TensorInfo};
use crate::reader::{CHUNK, Reader};

/// BLAKE3 of a tensor's whole contents, elements ascending, little-endian: the same on every layout.
///
/// # Errors
/// As [`Reader::read`].
pub fn tensor_hash(reader: &Reader, name: &str) -> Result<Hash> {
    let mut hasher = Hasher::new();
    let info = reader.require(name)?;
    let (len, per_chunk) = (info.len(), chunk_elements(info.dtype));
    let mut start = 0;
    while start < len {
        let end = len.min(start + per_chunk);
        hasher.update(&reader.read(name, start..end)?);
        start = end;
    }
    Ok(hasher.finalize())
}

fn chunk_elements(dtype: Dtype) -> u64 {
    CHUNK as u64 / dtype.size()
}

/// The value of one element, with its exact bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ElementValue {
    /// Type of the element.
    pub dtype: Dtype,
    /// Its bits, zero-extended.
    pub bits: u64,
}

impl ElementValue {
    /// From the element's little-endian bytes.
    fn new(dtype: Dtype, bytes: &[u8]) -> Self {
        let bits = bytes.iter().rev().fold(0, |bits, &byte| bits << 8 | u64::from(byte));
        Self { dtype, bits }
    }
}

impl fmt::Display for ElementValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dtype, bits } = *self;
        match dtype {
            Dtype::F64 => write!(f, "{:?}", f64::from_bits(bits))?,
            Dtype::F32 => write!(f, "{:?}", f32::from_bits(bits as u32))?,
            Dtype::BF16 => write!(f, "{:?}", f32::from_bits((bits as u32) << 16))?,
            Dtype::I64 => write!(f, "{}", bits as i64)?,
            Dtype::I32 => write!(f, "{}", bits as u32 as i32)?,
            Dtype::U64 | Dtype::U32 | Dtype::U8 => write!(f, "{bits}")?,
        }
        let digits = 2 * dtype.size() as usize;
        write!(f, " (0x{bits:0digits$x})")
    }
}

/// The first thing in which two checkpoints differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// One of them lacks a tensor.
    Missing {
        /// The tensor's name.
        tensor: String,
        /// Whether it is the first checkpoint that lacks it.
        in_first: bool,
    },
    /// A tensor has another type or shape.
    Layout {
        /// The tensor in the first checkpoint.
        first: TensorInfo,
        /// The tensor in the second one.
        second: TensorInfo,
    },
    /// An element has other bits.
    Value {
        /// The tensor's name.
        tensor: String,
        /// Index of the element in row-major order.
        element: u64,
        /// Its value in the first checkpoint.
        first: ElementValue,
        /// Its value in the second one.
        second: ElementValue,
    },
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { tensor, in_first } => {
                let which = if *in_first { "second" } else { "first" };
                write!(f, "tensor {tensor} is only in the {which} checkpoint")
            }
            Self::Layout { first, second } => {
                let (a, b) = (first.dtype.name(), second.dtype.name());
                write!(f, "tensor {} is {a} {:?} and {b} {:?}", first.name, first.shape, second.shape)
            }
            Self::Value { tensor, element, first, second } => {
                write!(f, "tensor {tensor}, element {element}: {first} and {second}")
            }
        }
    }
}

/// Finds the first tensor, in name order, in which two checkpoints differ, and its first differing element.
/// Bits are compared: -0.0 differs from 0.0, and equal NaNs are equal. Neither the cut into pieces nor the
/// `extra` state takes part.
///
/// # Errors
/// As [`Reader::read`], for either checkpoint.
pub fn compare(first: &Reader, second: &Reader) -> Result<Option<Difference>> {
    let (mut left, mut right) = (first.tensors().iter().peekable(), second.tensors().iter().peekable());
    while let Some(name) =
        left.peek().into_iter().chain(right.peek()).map(|tensor| tensor.name.as_str()).min()
    {
        let (a, b) = match (left.next_if(|a| a.name == name), right.next_if(|b| b.name == name)) {
            (Some(a), Some(b)) => (a, b),
            (in_first, _) => {
                let tensor = name.to_string();
                return Ok(Some(Difference::Missing { tensor, in_first: in_first.is_none() }));
            }
        };
        if a != b {
            return Ok(Some(Difference::Layout { first: a.clone(), second: b.clone() }));
        }
        if let Some(difference) = compare_tensor(first, second, a)? {
            return Ok(Some(difference));
        }
    }
    Ok(None)
}

fn compare_tensor(first: &Reader, second: &Reader, info: &TensorInfo) -> Result<Option<Difference>> {
    let (len, size) = (info.len(), info.dtype.size() as usize);
    let mut start = 0;
    while start < len {
        let end = len.min(start + chunk_elements(info.dtype));
        let (a, b) = (first.read(&info.name, start..end)?, second.read(&info.name, start..end)?);
        let differs = a.chunks_exact(size).zip(b.chunks_exact(size)).position(|(a, b)| a != b);
        if let Some(position) = differs {
            let at = position * size..(position + 1) * size;
            return Ok(Some(Difference::Value {
                tensor: info.name.clone(),
                element: start + position as u64,
                first: ElementValue::new(info.dtype, &a[at.clone()]),
                second: ElementValue::new(info.dtype, &b[at]),
            }));
        }
        start = end;
    }
    Ok(None)
}
