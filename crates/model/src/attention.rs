//! The attention half of a layer: norm, queries, keys and values, rotary positions, attention, output projection.

use unisono_tensor::{AttentionShape, Backend, Buffer, Dims, Product};

use crate::batch::Batch;
use crate::parameters::{UnitGradients, UnitParameters};
use crate::transformer::{Recompute, Transformer};

/// What the backward needs.
pub(crate) struct AttentionSaved<B: Backend> {
    x: B::Buf,
    rstd: B::Buf,
    normed: Option<B::Buf>,
    /// Queries, keys and values before their norm, and the roots of that norm.
    raw: Option<(B::Buf, B::Buf)>,
    /// Rotated queries and keys, and values.
    qkv: Option<B::Buf>,
    out: B::Buf,
    lse: B::Buf,
}

/// What the weight-gradient step needs.
pub(crate) struct AttentionWeights<B: Backend> {
    dy: B::Buf,
    out: B::Buf,
    /// Gradient of the products' result.
    dqkv: B::Buf,
    /// With norms on heads: gradient after the norm, values before it, roots.
    head_norm: Option<(B::Buf, B::Buf, B::Buf)>,
    normed: B::Buf,
    dnormed: B::Buf,
    x: B::Buf,
    rstd: B::Buf,
}

impl<B: Backend> Transformer<B> {
    /// `y = x + attention(norm(x)) wo`, `x` and `y` `[rows, d]`.
    pub(crate) fn attention_forward(
        &self,
        layer: usize,
        parameters: &UnitParameters<B>,
        batch: &Batch,
        x: B::Buf,
        keep: Recompute,
    ) -> (B::Buf, AttentionSaved<B>) {
        let backend = &self.backend;
        let tensors = &self.layout.layers[layer];
        let rows = batch.rows();
        let (normed, rstd) = self.norm(&x, &tensors.attn_norm, parameters);
        let qkv = self.project(&normed, tensors.wqkv.range(), self.model.qkv_width(), parameters);
        self.note("", layer, "attn_norm", &normed);
        self.note("", layer, "qkv_raw", &qkv);
        let (qkv, raw) = self.place(layer, parameters, batch, qkv);
        self.note("", layer, "qkv", &qkv);
        let mut out = backend.alloc(rows * self.heads.q_width());
        let mut lse = backend.alloc(rows * self.heads.heads);
        let kv = qkv.slice(self.heads.q_width()..qkv.len());
        let width = self.heads.qkv_width();
        backend.attention(
            self.attention_shape(batch),
            qkv.all(),
            width,
            kv,
            width,
            out.all_mut(),
            lse.all_mut(),
        );
        self.note("", layer, "attention", &out);
        self.note("", layer, "lse", &lse);
        let mut y = self.project(&out, tensors.wo.range(), self.model.hidden_size, parameters);
        backend.add(y.all_mut(), x.all());
        let all = keep == Recompute::None;
        let keep_qkv = all || raw.is_none();
        let saved = AttentionSaved {
            x,
            rstd,
            normed: all.then_some(normed),
            raw,
            qkv: keep_qkv.then_some(qkv),
            out,
            lse,
        };
        (y, saved)
    }

    /// Norms heads (if configured) and rotates: queries, keys and values as attention reads them, and what the norm's
    /// backward needs.
    pub(crate) fn place(
        &self,
        layer: usize,
        parameters: &UnitParameters<B>,
        batch: &Batch,
        raw: B::Buf,
    ) -> (B::Buf, Option<(B::Buf, B::Buf)>) {
        let (mut qkv, raw) = match &self.layout.layers[layer].qk_norm {
            None => (raw, None),
            Some([q_norm, k_norm]) => {
                let mut qkv = self.backend.alloc(raw.len());
                let mut rstd = self.backend.alloc(batch.rows() * (self.heads.heads + self.heads.kv_heads));
                let q_weight = parameters.values.slice(q_norm.range());
                let k_weight = parameters.values.slice(k_norm.range());
                let epsilon = self.model.rms_norm_eps;
                self.backend.head_norm(
                    self.heads,
                    raw.all(),
                    q_weight,
                    k_weight,
                    epsilon,
                    qkv.all_mut(),
                    rstd.all_mut(),
                );
                (qkv, Some((raw, rstd)))
            }
        };
        self.backend.rope(self.heads, qkv.all_mut(), &batch.positions, self.rope.all(), false);
        (qkv, raw)
    }

    pub(crate) fn attention_shape<'a>(&self, batch: &'a Batch) -> AttentionShape<'a> {
        AttentionShape {
            heads: self.heads,
            sequences: batch.all_sequences(),
            queries: batch.sequence_length,
            keys: batch.sequence_length,
            document_start: &batch.document_start,
        }
    }

    /// Gradient of `x` from that of `y`.
    pub(crate) fn attention_backward(
        &self,
        layer: usize,
        parameters: &UnitParameters<B>,
        batch: &Batch,
        dy: B::Buf,
        saved: AttentionSaved<B>,
    ) -> (B::Buf, AttentionWeights<B>) {
        let backend = &self.backend;
        let tensors = &self.layout.layers[layer];
        let AttentionSaved { x, rstd, normed, raw, qkv, out, lse } = saved;
        let normed = normed.unwrap_or_else(|| self.norm(&x, &tensors.attn_norm, parameters).0);
        let (qkv, raw) = match (qkv, raw) {
            (Some(qkv), raw) => (qkv, raw),
            (None, Some((raw, _))) => self.place(layer, parameters, batch, raw),
            (None, None) => unreachable!("one of raw and placed queries is always kept"),
        };
        let dout = self.project_back(&dy, tensors.wo.range(), self.heads.q_width(), parameters);
        let mut dqkv = backend.alloc(qkv.len());
        let shape = self.attention_shape(batch);
        backend.attention_backward(shape, dout.all(), qkv.all(), out.all(), lse.all(), dqkv.all_mut());
        self.note("grad.", layer, "attention", &dout);
        self.note("grad.", layer, "qkv", &dqkv);
        drop((dout, qkv, lse));
        backend.rope(self.heads, dqkv.all_mut(), &batch.positions, self.rope.all(), true);
        let (dqkv, head_norm) = self.head_norm_backward(layer, parameters, dqkv, raw);
        let dnormed = self.project_back(&dqkv, tensors.wqkv.range(), self.model.hidden_size, parameters);
        self.note("grad.", layer, "qkv_raw", &dqkv);
        self.note("grad.", layer, "attn_norm", &dnormed);
        let dx = self.norm_backward(&dy, &dnormed, &x, &rstd, &tensors.attn_norm, parameters);
        (dx, AttentionWeights { dy, out, dqkv, head_norm, normed, dnormed, x, rstd })
    }

    /// Gradient of the products' result from `after`, that of what the norm of heads (if configured) made of it, and what
    /// the norm's weight gradients need.
    fn head_norm_backward(
        &self,
        layer: usize,
        parameters: &UnitParameters<B>,
        after: B::Buf,
        raw: Option<(B::Buf, B::Buf)>,
    ) -> (B::Buf, Option<(B::Buf, B::Buf, B::Buf)>) {
        let (Some([q_norm, k_norm]), Some((raw, rstd))) = (&self.layout.layers[layer].qk_norm, raw) else {
            return (after, None);
        };
        let mut dqkv = self.backend.alloc(after.len());
        let q_weight = parameters.values.slice(q_norm.range());
        let k_weight = parameters.values.slice(k_norm.range());
        self.backend.head_norm_backward(
            self.heads,
            after.all(),
            raw.all(),
            q_weight,
            k_weight,
            rstd.all(),
            dqkv.all_mut(),
        );
        (dqkv, Some((after, raw, rstd)))
    }

    /// Adds the weight gradients, each slot's to its own accumulator.
    pub(crate) fn attention_weight_grad(
        &self,
        layer: usize,
        batch: &Batch,
        work: &AttentionWeights<B>,
        gradients: &mut UnitGradients<B>,
    ) {
        let tensors = &self.layout.layers[layer];
        let (d, width) = (self.model.hidden_size, self.heads.qkv_width());
        let heads = self.heads;
        for index in 0..batch.slots.len() {
            let rows = batch.rows_of(index);
            let base = gradients.slot(index);
            self.product_gradient(
                &work.out,
                heads.q_width(),
                &work.dy,
                d,
                &rows,
                base + tensors.wo.offset,
                gradients,
            );
            self.product_gradient(
                &work.normed,
                d,
                &work.dqkv,
                width,
                &rows,
                base + tensors.wqkv.offset,
                gradients,
            );
            self.norm_gradient(
                &work.dnormed,
                &work.x,
                &work.rstd,
                &rows,
                base + tensors.attn_norm.offset,
                gradients,
            );
            let (Some([q_norm, k_norm]), Some((after, raw, rstd))) = (&tensors.qk_norm, &work.head_norm)
            else {
                continue;
            };
            let normed_heads = heads.heads + heads.kv_heads;
            let mut dq = self.backend.zeros(heads.head_dim);
            let mut dk = self.backend.zeros(heads.head_dim);
            let (q_range, k_range) = (q_norm.range(), k_norm.range());
            self.backend.copy(gradients.dense.slice(base + q_range.start..base + q_range.end), dq.all_mut());
            self.backend.copy(gradients.dense.slice(base + k_range.start..base + k_range.end), dk.all_mut());
            self.backend.head_norm_weight_grad(
                heads,
                after.slice(rows.start * width..rows.end * width),
                raw.slice(rows.start * width..rows.end * width),
                rstd.slice(rows.start * normed_heads..rows.end * normed_heads),
                dq.all_mut(),
                dk.all_mut(),
            );
            self.backend.copy(dq.all(), gradients.dense.slice_mut(base + q_range.start..base + q_range.end));
            self.backend.copy(dk.all(), gradients.dense.slice_mut(base + k_range.start..base + k_range.end));
        }
    }

    /// `dw += x^T dy` over the rows of one slot, one product.
    pub(crate) fn product_gradient(
        &self,
        x: &B::Buf,
        width: usize,
        dy: &B::Buf,
        out_width: usize,
        rows: &std::ops::Range<usize>,
        offset: usize,
        gradients: &mut UnitGradients<B>,
    ) {
        self.backend.matmul(
            Product::TransposedLeft,
            Dims { m: width, n: out_width, k: rows.len() },
            x.slice(rows.start * width..rows.end * width),
            dy.slice(rows.start * out_width..rows.end * out_width),
            gradients.dense.slice_mut(offset..offset + width * out_width),
            true,
        );
    }

    /// Adds the gradient of a norm's weight over the rows of one slot.
    pub(crate) fn norm_gradient(
        &self,
        dnormed: &B::Buf,
        x: &B::Buf,
        rstd: &B::Buf,
        rows: &std::ops::Range<usize>,
        offset: usize,
        gradients: &mut UnitGradients<B>,
    ) {
        let d = self.model.hidden_size;
        self.backend.rms_norm_weight_grad(
            dnormed.slice(rows.start * d..rows.end * d),
            x.slice(rows.start * d..rows.end * d),
            rstd.slice(rows.clone()),
            d,
            gradients.dense.slice_mut(offset..offset + d),
        );
    }
}
