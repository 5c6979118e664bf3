//! A rank's tensors as pieces of logical tensors, out to a checkpoint and back on any fold.

use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};
use unisono_checkpoint::{Committed, Dtype, Error, Piece, Reader, SaveId, ShardReport, ShardWriter, Writer};
use unisono_mesh::shard::overlap;
use unisono_plan::{Layout, SegmentKind, TensorSpec};
use unisono_tensor::{Backend, Buffer};

use crate::config::RunConfig;
use crate::error::TrainError;
use crate::optimizer::PlacedPiece;
use crate::parameters::ShardedParameters;
use crate::rank::{Progress, RankState};

/// The small state beside the tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Extra {
    /// Where the run stands.
    pub progress: Progress,
    /// The run's config.
    pub config: RunConfig,
    /// Hash of tokenizer and tokens, hexadecimal.
    pub data: String,
}

/// A tensor of a segment: its full name, its shape, and where it lies in the segment.
pub struct NamedTensor<'a> {
    /// Full name.
    pub name: String,
    /// Its description; the offset counts from the segment's start.
    pub spec: &'a TensorSpec,
}

/// The tensors of a segment, in order.
pub fn tensors_of(layout: &Layout, kind: SegmentKind) -> Vec<NamedTensor<'_>> {
    match kind {
        SegmentKind::Dense { unit } => layout
            .unit_tensors(unit)
            .into_iter()
            .map(|spec| NamedTensor { name: spec.name.clone(), spec })
            .collect(),
        SegmentKind::Expert { moe_layer, expert } => {
            let layer = layout.moe_layers().start + moe_layer;
            let named = layout.expert.iter().enumerate();
            named
                .map(|(which, spec)| NamedTensor {
                    name: layout.expert_tensor_name(layer, expert, which),
                    spec,
                })
                .collect()
        }
    }
}

/// The three values a checkpoint has of every parameter: the parameter and both moments.
pub const PARTS: [&str; 3] = ["", "optimizer.first.", "optimizer.second."];

fn bias_name(layout: &Layout, moe_layer: usize) -> String {
    format!("layers.{}.router_bias", layout.moe_layers().start + moe_layer)
}

fn shape_of(spec: &TensorSpec) -> Vec<u64> {
    spec.shape.iter().map(|n| *n as u64).collect()
}

/// One tensor's overlap with a piece of the shard.
struct Cut {
    name: String,
    shape: Vec<u64>,
    /// Elements of the tensor.
    range: Range<u64>,
    /// Where they start in the piece.
    start: usize,
    len: usize,
}

fn cuts(layout: &Layout, placed: &PlacedPiece) -> Vec<Cut> {
    let piece = &placed.piece;
    let cut = |tensor: NamedTensor<'_>| {
        let shared = overlap(&tensor.spec.range(), &piece.range);
        (!shared.is_empty()).then(|| Cut {
            shape: shape_of(tensor.spec),
            range: (shared.start - tensor.spec.offset) as u64..(shared.end - tensor.spec.offset) as u64,
            start: shared.start - piece.range.start,
            len: shared.len(),
            name: tensor.name,
        })
    };
    tensors_of(layout, piece.kind).into_iter().filter_map(cut).collect()
}

impl<B: Backend> RankState<'_, B> {
    /// Saves the state of all ranks as one checkpoint. Every rank returns the same verdict.
    ///
    /// # Errors
    /// [`TrainError::Checkpoint`] on the rank that failed and [`TrainError::Peer`] elsewhere if it could not be written: what was
    /// saved before is intact and training may go on.
    pub fn save(&self, dir: &Path, id: &SaveId, extra: &Extra) -> Result<Option<Committed>, TrainError> {
        let rank = self.comm.rank();
        let writer = (rank == 0).then(|| Writer::begin(dir, id.clone())).transpose();
        self.agree(&writer)?;
        let shards = ShardWriter::join(dir, id).and_then(|writer| self.write_shards(&writer));
        let agreed = self.agree(&shards);
        let reports = match (agreed, shards) {
            (Ok(()), Ok(reports)) => reports,
            (failed, shards) => {
                if let Ok(Some(writer)) = writer {
                    writer.abort()?;
                }
                shards?;
                return Err(failed.expect_err("some rank could not write its shards"));
            }
        };
        let mut bytes = Vec::new();
        for report in &reports {
            let encoded = report.to_bytes()?;
            bytes.extend((encoded.len() as u64).to_le_bytes());
            bytes.extend(encoded);
        }
        let all = self.comm.all_gather_values(&bytes)?;
        let committed = writer.and_then(|writer| {
            let Some(writer) = writer else { return Ok(None) };
            let mut reports = Vec::new();
            for mut rest in all.iter().map(Vec::as_slice) {
                while let Some((len, tail)) = rest.split_first_chunk::<8>() {
                    let (report, tail) = tail.split_at(u64::from_le_bytes(*len) as usize);
                    reports.push(ShardReport::from_bytes(report)?);
                    rest = tail;
                }
            }
            let extra = serde_json::to_value(extra).map_err(|e| Error::Refused { reason: e.to_string() })?;
            writer.commit(reports, extra).map(Some)
        });
        self.agree(&committed)?;
        Ok(committed?)
    }

    /// All ranks learn whether any failed, before anyone goes on. The rank that failed keeps its own error.
    fn agree<T>(&self, outcome: &Result<T, Error>) -> Result<(), TrainError> {
        let message = outcome.as_ref().err().map(ToString::to_string).unwrap_or_default();
        let all = self.comm.all_gather_values(message.as_bytes())?;
        match all.iter().position(|message| !message.is_empty()) {
            None => Ok(()),
            Some(rank) => {
                let said = String::from_utf8_lossy(&all[rank]).into_owned();
                Err(TrainError::Peer { rank, said })
            }
        }
    }

    fn write_shards(&self, writer: &ShardWriter) -> Result<Vec<ShardReport>, Error> {
        let layout = self.model.layout();
        let mut reports = Vec::new();
        for placed in self.optimizer.pieces() {
            let cuts = cuts(layout, placed);
            if cuts.is_empty() {
                continue;
            }
            let values = self.values_of(placed);
            let mut pieces = Vec::new();
            let names: Vec<[String; 3]> =
                cuts.iter().map(|c| PARTS.map(|part| format!("{part}{}", c.name))).collect();
            for (cut, names) in cuts.iter().zip(&names) {
                for (name, values) in names.iter().zip(&values) {
                    pieces.push(Piece {
                        tensor: name,
                        dtype: Dtype::F32,
                        shape: &cut.shape,
                        range: cut.range.clone(),
                        bytes: bytemuck::cast_slice(&values[cut.start..cut.start + cut.len]),
                    });
                }
            }
            reports.push(writer.write_shard(&self.file_name(placed), &pieces)?);
        }
        if self.comm.rank() == 0 && !self.model.layout().moe_layers().is_empty() {
            reports.push(self.write_bias(writer)?);
        }
        Ok(reports)
    }

    fn write_bias(&self, writer: &ShardWriter) -> Result<ShardReport, Error> {
        let layout = self.model.layout();
        let names: Vec<String> =
            (0..layout.moe_layers().len()).map(|index| bias_name(layout, index)).collect();
        let shape = [layout.num_experts() as u64];
        let pieces: Vec<Piece<'_>> = names
            .iter()
            .zip(layout.moe_layers())
            .map(|(tensor, layer)| Piece {
                tensor,
                dtype: Dtype::F32,
                shape: &shape,
                range: 0..shape[0],
                bytes: bytemuck::cast_slice(self.parameters.bias(Layout::layer_unit(layer))),
            })
            .collect();
        writer.write_shard("router-bias", &pieces)
    }

    /// Parameters and both moments of a piece, in host memory.
    pub(crate) fn values_of(&self, placed: &PlacedPiece) -> [Vec<f32>; 3] {
        let len = placed.piece.range.len();
        let download = |moments: &B::Buf| {
            let mut values = vec![0.0; len];
            let range = placed.moment..placed.moment + len;
            self.model.backend().download(moments.slice(range), &mut values);
            values
        };
        let (first, second) = self.optimizer.moments();
        let parameters = self.parameters.read(placed.piece.unit, placed.place..placed.place + len);
        [parameters, download(first), download(second)]
    }

    fn file_name(&self, placed: &PlacedPiece) -> String {
        let owners: Vec<usize> = {
            let segment = &self.optimizer.shards().segments[placed.piece.segment];
            (0..self.comm.size()).filter(|rank| !segment.shards[*rank].is_empty()).collect()
        };
        let index = owners.iter().position(|rank| *rank == self.comm.rank()).unwrap_or(0);
        let count = owners.len();
        match placed.piece.kind {
            SegmentKind::Dense { unit } => format!("unit{unit:03}-dense-{index:03}-of-{count:03}"),
            SegmentKind::Expert { moe_layer, expert } => {
                let layer = self.model.layout().moe_layers().start + moe_layer;
                let unit = Layout::layer_unit(layer);
                format!("unit{unit:03}-expert{expert:04}-{index:03}-of-{count:03}")
            }
        }
    }

    /// Takes over the state of a checkpoint that any fold of the same grid wrote.
    ///
    /// # Errors
    /// If a file is damaged or a tensor is missing or of another shape.
    pub fn restore(&mut self, reader: &Reader, extra: &Extra) -> Result<(), TrainError> {
        let layout = self.model.layout().clone();
        restore_parameters(&mut self.parameters, &layout, reader)?;
        self.restore_moments(reader, &layout)?;
        self.progress = extra.progress;
        Ok(())
    }

    fn restore_moments(&mut self, reader: &Reader, layout: &Layout) -> Result<(), TrainError> {
        let backend = self.model.backend().clone();
        for placed in self.optimizer.pieces().to_vec() {
            for tensor in tensors_of(layout, placed.piece.kind) {
                let shared = overlap(&tensor.spec.range(), &placed.piece.range);
                if shared.is_empty() {
                    continue;
                }
                let range = shared.start - tensor.spec.offset..shared.end - tensor.spec.offset;
                let at = placed.moment + shared.start - placed.piece.range.start;
                let first = read_values(reader, &tensor, PARTS[1], range.clone())?;
                let second = read_values(reader, &tensor, PARTS[2], range)?;
                let (first_buffer, second_buffer) = self.optimizer.moments_mut();
                backend.upload(&first, first_buffer.slice_mut(at..at + shared.len()));
                backend.upload(&second, second_buffer.slice_mut(at..at + shared.len()));
            }
        }
        Ok(())
    }
}

/// Fills parameters and balance biases from a checkpoint.
///
/// # Errors
/// If a file is damaged or a tensor is missing or of another shape.
pub(crate) fn restore_parameters<B: Backend>(
    parameters: &mut ShardedParameters<B>,
    layout: &Layout,
    reader: &Reader,
) -> Result<(), TrainError> {
    parameters.fill(|kind, range| read_segment(reader, layout, kind, range))?;
    for (index, layer) in layout.moe_layers().enumerate() {
        let bytes = reader.read(&bias_name(layout, index), 0..layout.num_experts() as u64)?;
        parameters.set_bias(Layout::layer_unit(layer), floats(&bytes));
    }
    Ok(())
}

/// Elements `range` of a segment's parameters, padding zero.
fn read_segment(
    reader: &Reader,
    layout: &Layout,
    kind: SegmentKind,
    range: Range<usize>,
) -> Result<Vec<f32>, TrainError> {
    let mut values = vec![0.0; range.len()];
    for tensor in tensors_of(layout, kind) {
        let shared = overlap(&tensor.spec.range(), &range);
        if shared.is_empty() {
            continue;
        }
        let of_tensor = shared.start - tensor.spec.offset..shared.end - tensor.spec.offset;
        let target = shared.start - range.start..shared.end - range.start;
        values[target].copy_from_slice(&read_values(reader, &tensor, "", of_tensor)?);
    }
    Ok(values)
}

fn read_values(
    reader: &Reader,
    tensor: &NamedTensor<'_>,
    part: &str,
    range: Range<usize>,
) -> Result<Vec<f32>, TrainError> {
    let name = format!("{part}{}", tensor.name);
    let shape = shape_of(tensor.spec);
    match reader.tensor(&name) {
        Some(info) if info.shape == shape && info.dtype == Dtype::F32 => {}
        Some(info) => {
            return Err(TrainError::Refused(format!(
                "checkpoint step {}: {name} has shape {:?}, the model's config gives {shape:?}; resume with the config the \
                 run was started with",
                reader.step(),
                info.shape
            )));
        }
        None => {
            return Err(TrainError::Refused(format!(
                "checkpoint step {} has no tensor {name}; resume with the config the run was started with",
                reader.step()
            )));
        }
    }
    Ok(floats(&reader.read(&name, range.start as u64..range.end as u64)?))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect()
}
