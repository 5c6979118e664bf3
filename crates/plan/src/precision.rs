//! Number formats.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The format in which products are computed or bytes travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit float.
    F32,
    /// IEEE 16-bit float.
    F16,
    /// Brain 16-bit float.
    Bf16,
    /// 8-bit float scaled by tensor, row or block of at least 128.
    Fp8,
    /// 8-bit float with one scale for 32 elements (Blackwell).
    Mxfp8,
    /// 4-bit float with one 8-bit scale for 16 elements (Blackwell).
    Nvfp4,
}

impl Precision {
    /// All of them, widest first.
    pub const ALL: [Self; 6] = [Self::F32, Self::F16, Self::Bf16, Self::Fp8, Self::Mxfp8, Self::Nvfp4];

    /// Bytes of an element, scales included.
    pub fn bytes(self) -> f64 {
        match self {
            Self::F32 => 4.0,
            Self::F16 | Self::Bf16 => 2.0,
            Self::Fp8 => 1.0 + 4.0 / 128.0,
            Self::Mxfp8 => 1.0 + 1.0 / 32.0,
            Self::Nvfp4 => 0.5 + 1.0 / 16.0,
        }
    }

    /// The format of what is never computed narrowly beside it: attention, router, head.
    pub fn wide(self) -> Self {
        if self == Self::F32 { Self::F32 } else { Self::Bf16 }
    }

    /// Whether it is narrower than 16 bits: products then need casts of what is kept in 16 bits.
    pub fn is_narrow(self) -> bool {
        matches!(self, Self::Fp8 | Self::Mxfp8 | Self::Nvfp4)
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Mxfp8 => "mxfp8",
            Self::Nvfp4 => "nvfp4",
        })
    }
}

/// A precision of no known name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("precision {0:?}: must be one of f32, f16, bf16, fp8, mxfp8, nvfp4")]
pub struct PrecisionError(String);

impl FromStr for Precision {
    type Err = PrecisionError;

    fn from_str(text: &str) -> Result<Self, PrecisionError> {
        let name = text.to_ascii_lowercase();
        Self::ALL
            .into_iter()
            .find(|precision| precision.to_string() == name)
            .ok_or_else(|| PrecisionError(text.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_and_unknown_ones_are_refused_with_the_choice() {
        for precision in Precision::ALL {
            assert_eq!(precision.to_string().parse(), Ok(precision));
        }
        let error = "int4".parse::<Precision>().unwrap_err();
        assert_eq!(error.to_string(), "precision \"int4\": must be one of f32, f16, bf16, fp8, mxfp8, nvfp4");
    }
}
