//! Memory of every pipeline rank, tensor by tensor.

use serde_json::{Value, json};
use unisono_plan::{HeldTensor, ParameterTensor, RankTensors, Unit};

use super::answer::Answer;
use super::{explain, show};
use crate::style::{figure, grouped, table};

/// Bytes of a MiB.
const MIB: f64 = (1u64 << 20) as f64;

/// `[pipeline rank]` what it holds.
pub fn ranks(answer: &Answer) -> Vec<RankTensors> {
    let pricer = answer.pricer();
    (0..answer.memory.len()).map(|rank| pricer.rank_tensors(&answer.chosen.layout, rank)).collect()
}

/// `Attention + Moe`, `Head`
fn unit(unit: Unit) -> String {
    match unit {
        Unit::Layer { kind, windowed } => {
            format!("{}{}", explain::name(kind), if windowed { ", windowed" } else { "" })
        }
        Unit::Embedding => "Embedding".into(),
        Unit::Head => "Head".into(),
        Unit::Rank => String::new(),
    }
}

/// A table whose last columns are the pipeline ranks that are shown: `of` a rank what leads a row, and the rank's cell in it.
fn by_rank(
    answer: &Answer,
    head: &[&str],
    left: usize,
    of: impl Fn(usize) -> Vec<(Vec<String>, String)>,
) -> Vec<String> {
    let shown = show::shown_ranks(answer);
    let mut rows: Vec<Vec<String>> = Vec::new();
    for (column, rank) in shown.iter().enumerate() {
        for (leading, cell) in of(*rank) {
            let at = rows.iter().position(|row| row.starts_with(&leading)).unwrap_or_else(|| {
                rows.push(leading.into_iter().chain(vec!["-".into(); shown.len()]).collect());
                rows.len() - 1
            });
            rows[at][head.len() + column] = cell;
        }
    }
    if rows.is_empty() {
        return Vec::new();
    }
    let ranks = shown.iter().map(|rank| format!("rank {rank}"));
    rows.insert(0, head.iter().map(|name| name.to_string()).chain(ranks).collect());
    table(&rows, left)
}

/// Weights, gradients and optimizer states of one tensor each, and how many layers have it.
pub fn parameters(answer: &Answer, ranks: &[RankTensors]) -> Vec<String> {
    let head = ["layer", "tensor", "shape", "B an element", "weights", "gradients", "optimizer"];
    by_rank(answer, &head, 3, |rank| {
        let row = |of: &ParameterTensor| {
            let elements = |elements: &f64| match elements.fract() == 0.0 {
                true => grouped(*elements as u64),
                false => figure(*elements),
            };
            let shape: Vec<String> = of.shape.iter().map(elements).collect();
            let mut leading = vec![unit(of.unit), of.name.into(), shape.join(" x ")];
            leading.push(of.element_bytes.map(|bytes| bytes.to_string()).join(" + "));
            leading.extend(of.bytes.map(|bytes| figure(bytes / MIB)));
            (leading, of.layers.to_string())
        };
        ranks[rank].parameters.iter().map(row).collect()
    })
}

/// What layers keep until the backward, and what weight gradients wait for: one tensor each, and how many are held.
pub fn kept(answer: &Answer, ranks: &[RankTensors]) -> Vec<String> {
    by_rank(answer, &["part", "layer", "tensor", "MiB"], 3, |rank| {
        let row = |of: &HeldTensor| {
            let leading = vec![of.part.into(), unit(of.unit), of.name.to_string(), figure(of.bytes / MIB)];
            (leading, if of.recomputed { "recomputed".into() } else { of.count.to_string() })
        };
        ranks[rank].held.iter().filter(|of| of.is_kept).map(row).collect()
    })
}

/// The rest: the layer or the loss that is being computed, buffers, what lies outside of the step.
pub fn others(answer: &Answer, ranks: &[RankTensors]) -> Vec<String> {
    by_rank(answer, &["part", "layer", "what"], 3, |rank| {
        let row = |of: &HeldTensor| {
            let leading = vec![of.part.into(), unit(of.unit), of.name.to_string()];
            (leading, figure(of.count as f64 * of.bytes / MIB))
        };
        ranks[rank].held.iter().filter(|of| !of.is_kept).map(row).collect()
    })
}

/// The same as data, in bytes.
pub fn object(answer: &Answer) -> Value {
    let parameter = |of: &ParameterTensor| {
        let [weights, gradients, optimizer] = of.bytes;
        json!({
            "layer": unit(of.unit),
            "tensor": of.name,
            "shape": of.shape,
            "element_bytes": of.element_bytes,
            "weights": weights,
            "gradients": gradients,
            "optimizer": optimizer,
            "layers": of.layers,
        })
    };
    let held = |of: &HeldTensor| {
        json!({
            "part": of.part,
            "layer": unit(of.unit),
            "tensor": of.name,
            "bytes": of.bytes,
            "count": of.count,
            "recomputed": of.recomputed,
        })
    };
    let rank = |of: &RankTensors| {
        json!({
            "parameters": of.parameters.iter().map(parameter).collect::<Vec<_>>(),
            "held": of.held.iter().map(held).collect::<Vec<_>>(),
        })
    };
    Value::Array(ranks(answer).iter().map(rank).collect())
}
