//! Layouts as one line of text: `tp2 pp16 vp2 ep64 dp64 mb1 dualpipev zero1 recompute=full`.

use std::fmt;
use std::str::FromStr;

use crate::parallelism::{Modules, Parallelism, Recomputation, Sharding};
use crate::schedule::ScheduleKind;

/// Degrees by their short names; ones are left out where the text is printed.
const DEGREES: [(&str, &str); 8] = [
    ("tp", "tensor"),
    ("pp", "pipeline"),
    ("vp", "virtual stages"),
    ("cp", "context"),
    ("ep", "expert"),
    ("etp", "expert tensor"),
    ("dp", "data"),
    ("mb", "micro-batch"),
];

const SHARDINGS: [(&str, Sharding); 4] = [
    ("zero0", Sharding::None),
    ("zero1", Sharding::Zero1),
    ("zero2", Sharding::Zero2),
    ("zero3", Sharding::Zero3),
];

/// Parts of a layer that can be computed again, as Megatron names them.
const MODULES: [&str; 6] = ["core_attn", "mla_up_proj", "mlp", "moe_act", "moe", "layernorm"];

fn parts(modules: &mut Modules) -> [&mut bool; 6] {
    [
        &mut modules.core_attention,
        &mut modules.mla_up_projection,
        &mut modules.mlp,
        &mut modules.moe_activation,
        &mut modules.moe,
        &mut modules.layernorm,
    ]
}

/// The largest degree, and the most GPUs of a layout.
const LARGEST: usize = 1 << 20;

/// A word of a layout that says nothing, too much, or what another has said.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("layout word {word:?}: must be {expected}")]
pub struct LayoutNameError {
    /// The word.
    pub word: String,
    /// What would be right.
    pub expected: String,
}

fn degrees(layout: &mut Parallelism) -> [&mut usize; 8] {
    [
        &mut layout.tensor,
        &mut layout.pipeline,
        &mut layout.virtual_stages,
        &mut layout.context,
        &mut layout.expert,
        &mut layout.expert_tensor,
        &mut layout.data,
        &mut layout.micro_batch,
    ]
}

impl fmt::Display for Parallelism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut copy = *self;
        for ((name, _), degree) in DEGREES.iter().zip(degrees(&mut copy)) {
            if *degree > 1 || *name == "dp" || *name == "mb" {
                write!(f, "{name}{degree} ")?;
            }
        }
        if self.pipeline > 1 {
            write!(f, "{} ", self.schedule.name())?;
        }
        let sharding = SHARDINGS.iter().find(|(_, kind)| *kind == self.sharding).map_or("", |(name, _)| name);
        f.write_str(sharding)?;
        match self.recompute {
            Recomputation::None => Ok(()),
            Recomputation::Full => f.write_str(" recompute=full"),
            Recomputation::SELECTIVE => f.write_str(" recompute=selective"),
            Recomputation::Modules(mut modules) => {
                let parts = MODULES.iter().zip(parts(&mut modules));
                let names: Vec<&str> = parts.filter(|(_, again)| **again).map(|(name, _)| *name).collect();
                write!(f, " recompute={}", names.join("+"))
            }
        }
    }
}

impl FromStr for Parallelism {
    type Err = LayoutNameError;

    /// Reads what [`Parallelism`] prints; words may come in any order, and what is not said is 1, ZeRO-1, nothing recomputed.
    fn from_str(text: &str) -> Result<Self, LayoutNameError> {
        let mut layout = Self::default();
        let mut schedule = None;
        let mut said: Vec<(&str, &str)> = Vec::new();
        for word in text.split([' ', ',']).filter(|word| !word.is_empty()) {
            let what = if let Some((_, sharding)) = SHARDINGS.iter().find(|(name, _)| *name == word) {
                layout.sharding = *sharding;
                "sharding"
            } else if let Some(kind) = ScheduleKind::ALL.into_iter().find(|kind| kind.name() == word) {
                schedule = Some(kind);
                "schedule"
            } else if let Some(what) = word.strip_prefix("recompute=") {
                layout.recompute = what.parse().map_err(|_| unknown(word))?;
                "recompute"
            } else {
                read_degree(&mut layout, word)?
            };
            if let Some((_, earlier)) = said.iter().find(|(other, _)| *other == what) {
                return Err(refused(word, format!("left out, or {earlier:?}: both say {what}")));
            }
            said.push((what, word));
        }
        let gpus = [layout.tensor, layout.pipeline, layout.context, layout.data];
        if gpus.iter().map(|degree| *degree as f64).product::<f64>() > LARGEST as f64 {
            return Err(refused(text, format!("for at most {LARGEST} GPUs (tp x pp x cp x dp)")));
        }
        let default = match layout.virtual_stages {
            1 => ScheduleKind::OneForwardOneBackward,
            _ => ScheduleKind::Interleaved,
        };
        layout.schedule = schedule.unwrap_or(default);
        Ok(layout)
    }
}

impl FromStr for Recomputation {
    type Err = LayoutNameError;

    /// Reads `none`, `selective`, `full`, or parts of a layer: `moe_act+layernorm`.
    fn from_str(text: &str) -> Result<Self, LayoutNameError> {
        let mut modules = Modules::default();
        match text {
            "none" => return Ok(Self::None),
            "selective" => return Ok(Self::SELECTIVE),
            "full" => return Ok(Self::Full),
            _ => {}
        }
        for name in text.split('+') {
            let at = MODULES.iter().position(|known| *known == name);
            let expected = || format!("none, selective, full or parts of {}", MODULES.join("+"));
            *parts(&mut modules)[at.ok_or_else(|| refused(text, expected()))?] = true;
        }
        Ok(Self::Modules(modules))
    }
}

/// Sets a degree; gives its short name.
fn read_degree(layout: &mut Parallelism, word: &str) -> Result<&'static str, LayoutNameError> {
    let digits = word.find(|c: char| c.is_ascii_digit()).unwrap_or(word.len());
    let (name, number) = word.split_at(digits);
    let at = DEGREES.iter().position(|(short, _)| *short == name).ok_or_else(|| unknown(word))?;
    if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(unknown(word));
    }
    let degree = number.parse().ok().filter(|degree| *degree <= LARGEST);
    *degrees(layout)[at] =
        degree.ok_or_else(|| refused(word, format!("at most {name}{LARGEST}: it is too large")))?;
    Ok(DEGREES[at].0)
}

fn refused(word: &str, expected: String) -> LayoutNameError {
    LayoutNameError { word: word.to_string(), expected }
}

fn unknown(word: &str) -> LayoutNameError {
    let degrees = DEGREES.map(|(short, long)| format!("{short}N ({long})")).join(", ");
    let schedules = ScheduleKind::ALL.map(ScheduleKind::name).join(", ");
    let expected = format!(
        "one of {degrees}, {schedules}, zero0 to zero3, recompute=none, selective, full or parts of {}",
        MODULES.join("+")
    );
    refused(word, expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layout_prints_as_what_reads_back() {
        for text in [
            "dp8 mb1 zero1",
            "tp8 pp16 vp2 ep64 dp128 mb1 dualpipev zero1 recompute=full",
            "tp4 pp4 cp2 dp16 mb2 1f1b zero2 recompute=selective",
            "ep8 etp2 dp64 mb4 zero3",
            "dp8 mb1 zero1 recompute=core_attn+moe_act+layernorm",
        ] {
            let layout: Parallelism = text.parse().unwrap();
            assert_eq!(layout.to_string(), text);
            assert_eq!(layout.to_string().parse(), Ok(layout));
        }
        assert_eq!("pp4,vp2".parse::<Parallelism>().unwrap().schedule, ScheduleKind::Interleaved);
        let error = "tp2 zz4".parse::<Parallelism>().unwrap_err().to_string();
        assert!(error.starts_with("layout word \"zz4\": must be one of tpN (tensor), ppN"), "{error}");
    }

    #[test]
    fn what_is_said_twice_or_too_large_is_refused() {
        let cases = [
            ("dp64 dp32", r#"layout word "dp32": must be left out, or "dp64": both say dp"#),
            ("zero1 dp2 zero2", r#"layout word "zero2": must be left out, or "zero1": both say sharding"#),
            ("1f1b dualpipev", r#"layout word "dualpipev": must be left out, or "1f1b": both say schedule"#),
            (
                "dp99999999999999999999",
                r#"layout word "dp99999999999999999999": must be at most dp1048576: it is too large"#,
            ),
            (
                "tp2048 dp1024",
                r#"layout word "tp2048 dp1024": must be for at most 1048576 GPUs (tp x pp x cp x dp)"#,
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse::<Parallelism>().unwrap_err().to_string(), expected);
        }
    }
}
