//! A small checkpoint, cut in any way, for the tests.

use std::path::Path;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use unisono_checkpoint::{Committed, Dtype, Piece, Reader, Result, SaveId, Writer};

/// A whole logical tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    pub bytes: Vec<u8>,
}

impl Tensor {
    pub fn new(name: &str, dtype: Dtype, shape: &[u64], seed: u64) -> Self {
        let len: u64 = shape.iter().product();
        let mut bytes = vec![0; (len * dtype.size()) as usize];
        ChaCha8Rng::seed_from_u64(seed).fill_bytes(&mut bytes);
        Self { name: name.into(), dtype, shape: shape.into(), bytes }
    }

    pub fn len(&self) -> u64 {
        self.shape.iter().product()
    }

    pub fn piece(&self, start: u64, end: u64) -> Piece<'_> {
        let size = self.dtype.size();
        let bytes = &self.bytes[(start * size) as usize..(end * size) as usize];
        Piece { tensor: &self.name, dtype: self.dtype, shape: &self.shape, range: start..end, bytes }
    }
}

/// Parameters, moments, a router bias and counters: every width, a scalar and an empty tensor.
pub fn tensors(seed: u64) -> Vec<Tensor> {
    let shapes: [(&str, Dtype, &[u64]); 8] = [
        ("adam.m/model.embed.weight", Dtype::F32, &[16, 5]),
        ("model.embed.weight", Dtype::F32, &[16, 5]),
        ("model.layers.3.experts.7.w1.weight", Dtype::BF16, &[9, 7]),
        ("model.layers.3.router.bias", Dtype::F64, &[8]),
        ("model.layers.3.router.counts", Dtype::U64, &[8]),
        ("model.norm.weight", Dtype::F32, &[33]),
        ("scale", Dtype::U8, &[]),
        ("unused", Dtype::I32, &[0, 4]),
    ];
    shapes
        .iter()
        .zip(seed..)
        .map(|((name, dtype, shape), seed)| Tensor::new(name, *dtype, shape, seed))
        .collect()
}

pub fn id(epoch: u64, step: u64) -> SaveId {
    SaveId { run_id: "test".into(), epoch, step }
}

/// Saves `tensors`, each cut into `ranks` nearly equal pieces, one shard a rank.
pub fn save(dir: &Path, id: SaveId, tensors: &[Tensor], ranks: u64) -> Result<Committed> {
    let writer = Writer::begin(dir, id)?;
    let mut reports = Vec::new();
    for rank in 0..ranks {
        let cut = |len: u64, rank: u64| len * rank / ranks;
        let pieces: Vec<_> = tensors
            .iter()
            .map(|tensor| tensor.piece(cut(tensor.len(), rank), cut(tensor.len(), rank + 1)))
            .collect();
        reports.push(writer.shards().write_shard(&format!("dense-{rank:02}-of-{ranks:02}"), &pieces)?);
    }
    writer.commit(reports, serde_json::json!({"tokens": 4096, "skipped": [3, 5]}))
}

/// Reads everything back.
pub fn load(reader: &Reader) -> Result<Vec<Tensor>> {
    let read = |info: &unisono_checkpoint::TensorInfo| {
        let bytes = reader.read(&info.name, 0..info.len())?;
        Ok(Tensor { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone(), bytes })
    };
    reader.tensors().iter().map(read).collect()
}

/// A number below `bound` (tests only: the tiny bias does not matter).
pub fn below(rng: &mut ChaCha8Rng, bound: usize) -> usize {
    (rng.next_u64() % bound as u64) as usize
}
