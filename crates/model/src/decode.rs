//! Generation: one sequence at a time, keys and values of the past kept.

use unisono_comm::CommError;
use unisono_plan::Layout;
use unisono_tensor::{AttentionShape, Backend, Buffer, Dims, Product};

use crate::batch::Batch;
use crate::parameters::{ParameterSource, UnitParameters};
use crate::transformer::{Recompute, Transformer};

/// Keys and values of the tokens seen so far, one buffer `[capacity, 2 * kv_width]` a layer.
pub struct Cache<B: Backend> {
    layers: Vec<B::Buf>,
    capacity: usize,
    len: usize,
}

impl<B: Backend> Cache<B> {
    /// Tokens seen so far.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none were seen.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }
}

/// Next-token logits from a model that one rank holds whole.
pub struct Decoder<'a, B: Backend> {
    model: &'a Transformer<B>,
    parameters: &'a dyn ParameterSource<B>,
}

impl<'a, B: Backend> Decoder<'a, B> {
    /// A decoder over a model folded onto one rank.
    pub fn new(model: &'a Transformer<B>, parameters: &'a dyn ParameterSource<B>) -> Self {
        Self { model, parameters }
    }

    /// An empty cache for at most `capacity` tokens, which the model's rotary table must cover.
    pub fn cache(&self, capacity: usize) -> Cache<B> {
        let width = 2 * self.model.heads.kv_width();
        let layers =
            (0..self.model.model.num_hidden_layers).map(|_| self.model.backend.zeros(capacity * width));
        Cache { layers: layers.collect(), capacity, len: 0 }
    }

    /// Takes the next `tokens` and returns the logits `[vocab]` that follow the last of them.
    ///
    /// # Errors
    /// If an exchange fails.
    ///
    /// # Panics
    /// If `tokens` is empty or the cache has no room for it.
    pub fn advance(&self, cache: &mut Cache<B>, tokens: &[u32]) -> Result<Vec<f32>, CommError> {
        assert!(
            !tokens.is_empty() && cache.len + tokens.len() <= cache.capacity,
            "tokens must fit the cache"
        );
        let model = self.model;
        let (backend, d) = (&model.backend, model.model.hidden_size);
        let batch = self.batch(cache.len, tokens);
        let mut x = backend.alloc(tokens.len() * d);
        let embedding = self.parameters.unit(Layout::EMBED, model.unit_after(Layout::EMBED))?;
        let table = embedding.values.slice(model.layout.embed.range());
        backend.embedding(tokens, table, d, x.all_mut());
        for layer in 0..model.model.num_hidden_layers {
            let unit = Layout::layer_unit(layer);
            let parameters = self.parameters.unit(unit, model.unit_after(unit))?;
            x = self.attention(layer, cache, &parameters, &batch, x);
            x = self.feed_forward(layer, &parameters, &batch, x)?;
        }
        cache.len += tokens.len();
        let (last, table) = model.head_parameters(self.parameters, None)?;
        let (normed, _) = model.norm(&x, &model.layout.final_norm, &last);
        let vocab = model.model.vocab_size;
        let mut logits = backend.alloc(vocab);
        let last = normed.slice((tokens.len() - 1) * d..tokens.len() * d);
        let head = table.values.slice(model.layout.head.range());
        backend.matmul(
            Product::TransposedRight,
            Dims { m: 1, n: vocab, k: d },
            last,
            head,
            logits.all_mut(),
            false,
        );
        let mut host = vec![0.0; vocab];
        backend.download(logits.all(), &mut host);
        Ok(host)
    }

    fn batch(&self, past: usize, tokens: &[u32]) -> Batch {
        Batch {
            slots: 0..1,
            sequences: 1,
            sequence_length: tokens.len(),
            inputs: tokens.to_vec(),
            targets: Vec::new(),
            document_start: vec![0; tokens.len()],
            positions: (past..past + tokens.len()).map(|p| p as u32).collect(),
        }
    }

    fn attention(
        &self,
        layer: usize,
        cache: &mut Cache<B>,
        parameters: &UnitParameters<B>,
        batch: &Batch,
        x: B::Buf,
    ) -> B::Buf {
        let model = self.model;
        let (backend, heads) = (&model.backend, model.heads);
        let tensors = &model.layout.layers[layer];
        let (normed, _) = model.norm(&x, &tensors.attn_norm, parameters);
        let raw = model.project(&normed, tensors.wqkv.range(), heads.qkv_width(), parameters);
        let (qkv, _) = model.place(layer, parameters, batch, raw);
        let (width, kv_width, rows) = (heads.qkv_width(), 2 * heads.kv_width(), batch.inputs.len());
        let past = &mut cache.layers[layer];
        for row in 0..rows {
            let from = row * width + heads.q_width()..(row + 1) * width;
            let to = (cache.len + row) * kv_width..(cache.len + row + 1) * kv_width;
            backend.copy(qkv.slice(from), past.slice_mut(to));
        }
        let keys = cache.len + rows;
        let shape = AttentionShape {
            heads,
            sequences: 1,
            queries: rows,
            keys,
            document_start: &batch.document_start,
        };
        let mut out = backend.alloc(rows * heads.q_width());
        let mut lse = backend.alloc(rows * heads.heads);
        let kv = past.slice(0..keys * kv_width);
        backend.attention(shape, qkv.all(), width, kv, kv_width, out.all_mut(), lse.all_mut());
        let mut y = model.project(&out, tensors.wo.range(), model.model.hidden_size, parameters);
        backend.add(y.all_mut(), x.all());
        y
    }

    fn feed_forward(
        &self,
        layer: usize,
        parameters: &UnitParameters<B>,
        batch: &Batch,
        x: B::Buf,
    ) -> Result<B::Buf, CommError> {
        self.model.ffn_forward(layer, parameters, batch, x, Recompute::Selective).map(|(y, _)| y)
    }
}
