//! The whole model on one rank: what a wave of slots computes in one accumulation step.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;

use unisono_comm::{CommError, Communicator};
use unisono_mesh::{ExpertPlacement, Fold};
use unisono_plan::dispatch::{Census, DispatchShape};
use unisono_plan::{Layout, ModelConfig, ScoreFunction, TensorSpec};
use unisono_tensor::{Backend, Buffer, Dims, HeadGradients, Heads, Product, RouterShape};

use crate::attention::AttentionSaved;
use crate::batch::{Batch, LossScale, SlotLosses};
use crate::feed_forward::FeedForwardWeights;
use crate::moe::{MoeSaved, MoeWeights};
use crate::parameters::{GradientSink, ParameterSource, UnitGradients, UnitParameters};
use crate::profile::Profile;

/// Which activations are computed again in the backward instead of kept. Never changes a bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recompute {
    /// All are kept.
    None,
    /// What costs no product is computed again: norms, rotations.
    Selective,
    /// Only each layer's input is kept; its forward runs again, its exchanges included.
    Full,
}

/// Named activations (and their gradients under `grad.`) of one pass, for comparison with a reference; experts and counts
/// as numbers.
pub type Activations = BTreeMap<String, Vec<f32>>;

/// What a pass reports.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outcome {
    /// Sums of each slot of the wave.
    pub losses: Vec<SlotLosses>,
    /// `[MoE layer][expert]` how many choices fell on each expert.
    pub counts: Vec<Vec<u64>>,
    /// `[MoE layer]` how many rows there were for whom, among the ranks that exchange tokens.
    pub census: Vec<Census>,
}

/// The model on one rank of a fold.
pub struct Transformer<B: Backend> {
    pub(crate) backend: B,
    pub(crate) model: ModelConfig,
    pub(crate) layout: Layout,
    pub(crate) fold: Fold,
    pub(crate) placement: ExpertPlacement,
    /// The experts whose parameters this rank holds, ascending.
    pub(crate) held: Vec<usize>,
    pub(crate) heads: Heads,
    pub(crate) router: RouterShape,
    /// `[max_positions, head_dim]` cosines and sines.
    pub(crate) rope: B::Buf,
    pub(crate) dispatch: Communicator,
    pub(crate) shape: DispatchShape,
    /// Whether exchanges are under way while others compute; otherwise each is waited for.
    pub(crate) overlap: bool,
    pub(crate) profile: Profile,
    recompute: Recompute,
    activations: Option<RefCell<Activations>>,
}

pub(crate) enum FfnSaved<B: Backend> {
    Dense { x: B::Buf, rstd: B::Buf, normed: Option<B::Buf>, gu: B::Buf },
    Moe(Box<MoeSaved<B>>),
}

pub(crate) enum FfnWeights<B: Backend> {
    Dense {
        dy: B::Buf,
        x: B::Buf,
        rstd: B::Buf,
        normed: B::Buf,
        dnormed: B::Buf,
        work: FeedForwardWeights<B>,
    },
    Moe(Box<MoeWeights<B>>),
}

enum LayerSaved<B: Backend> {
    Kept(Box<AttentionSaved<B>>, FfnSaved<B>),
    /// The layer's input alone.
    Again(B::Buf),
}

impl<B: Backend> Transformer<B> {
    /// The model on the rank that `dispatch` speaks for.
    ///
    /// `dispatch` is the group of ranks that exchange tokens, [`Fold::dispatch_ranks`]; `rank` is the world rank,
    /// `max_positions` the longest sequence, `shape` says how tokens travel, `overlap` whether exchanges are under way while others compute.
    pub fn new(
        backend: B,
        model: ModelConfig,
        fold: Fold,
        rank: usize,
        dispatch: Communicator,
        max_positions: usize,
        recompute: Recompute,
        shape: DispatchShape,
        overlap: bool,
        profile: Profile,
    ) -> Self {
        let placement = ExpertPlacement::new(fold, model.num_experts);
        let heads = Heads {
            heads: model.num_attention_heads,
            kv_heads: model.num_key_value_heads,
            head_dim: model.head_dim,
        };
        let router = RouterShape {
            experts: model.num_experts,
            top_k: model.top_k,
            sigmoid: model.score_function == ScoreFunction::Sigmoid,
            normalize: model.normalize_top_k,
            scaling: model.routed_scaling_factor,
            groups: model.num_groups,
            top_groups: model.top_groups,
            force_balance: model.force_balance,
            sequence: max_positions,
        };
        let table = rotary_table(max_positions, model.head_dim, model.rope_theta);
        let mut rope = backend.alloc(table.len());
        backend.upload(&table, rope.all_mut());
        Self {
            layout: Layout::new(&model),
            held: if model.num_experts == 0 { Vec::new() } else { placement.experts_of(rank) },
            backend,
            model,
            fold,
            placement,
            heads,
            router,
            rope,
            dispatch,
            shape,
            overlap,
            profile,
            recompute,
            activations: None,
        }
    }

    /// Keeps every named activation and its gradient from now on, for comparison with a reference.
    pub fn keep_activations(&mut self) {
        self.activations = Some(RefCell::default());
    }

    /// The activations kept so far.
    pub fn take_activations(&self) -> Activations {
        self.activations.as_ref().map(RefCell::take).unwrap_or_default()
    }

    /// Keeps `buffer` as layer `layer`'s activation `what` (gradients have the prefix `grad.`), if they are kept.
    pub(crate) fn note(&self, prefix: &str, layer: usize, what: &str, buffer: &B::Buf) {
        self.note_as(buffer, || format!("{prefix}layers.{layer}.act.{what}"));
    }

    fn note_as(&self, buffer: &B::Buf, name: impl FnOnce() -> String) {
        if let Some(kept) = &self.activations {
            let mut values = vec![0.0; buffer.len()];
            self.backend.download(buffer.all(), &mut values);
            kept.borrow_mut().insert(name(), values);
        }
    }

    /// As [`Transformer::note`], of values that the host holds.
    pub(crate) fn note_host(
        &self,
        prefix: &str,
        layer: usize,
        what: &str,
        values: impl FnOnce() -> Vec<f32>,
    ) {
        if let Some(kept) = &self.activations {
            kept.borrow_mut().insert(format!("{prefix}layers.{layer}.act.{what}"), values());
        }
    }

    /// Where parameters lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where experts live.
    pub fn placement(&self) -> &ExpertPlacement {
        &self.placement
    }

    /// The experts whose parameters this rank holds, ascending.
    pub fn held_experts(&self) -> &[usize] {
        &self.held
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The model's description.
    pub fn model(&self) -> &ModelConfig {
        &self.model
    }

    /// The rank's profile.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// `x [rows, k] * w [k, columns]`.
    pub(crate) fn project(
        &self,
        x: &B::Buf,
        weight: Range<usize>,
        columns: usize,
        parameters: &UnitParameters<B>,
    ) -> B::Buf {
        let k = weight.len() / columns;
        let m = x.len() / k;
        let mut y = self.backend.alloc(m * columns);
        let dims = Dims { m, n: columns, k };
        self.backend.matmul(
            Product::Plain,
            dims,
            x.all(),
            parameters.values.slice(weight),
            y.all_mut(),
            false,
        );
        y
    }

    /// `dy [rows, n] * w [inputs, n]^T`.
    pub(crate) fn project_back(
        &self,
        dy: &B::Buf,
        weight: Range<usize>,
        inputs: usize,
        parameters: &UnitParameters<B>,
    ) -> B::Buf {
        let k = weight.len() / inputs;
        let m = dy.len() / k;
        let mut dx = self.backend.alloc(m * inputs);
        let dims = Dims { m, n: inputs, k };
        let weight = parameters.values.slice(weight);
        self.backend.matmul(Product::TransposedRight, dims, dy.all(), weight, dx.all_mut(), false);
        dx
    }

    /// `(norm(x), rstd)`.
    pub(crate) fn norm(
        &self,
        x: &B::Buf,
        weight: &TensorSpec,
        parameters: &UnitParameters<B>,
    ) -> (B::Buf, B::Buf) {
        let mut y = self.backend.alloc(x.len());
        let mut rstd = self.backend.alloc(x.len() / self.model.hidden_size);
        let weight = parameters.values.slice(weight.range());
        self.backend.rms_norm(x.all(), weight, self.model.rms_norm_eps, y.all_mut(), rstd.all_mut());
        (y, rstd)
    }

    /// Gradient of the residual stream before a norm: the branch's joins the stream's.
    pub(crate) fn norm_backward(
        &self,
        dy: &B::Buf,
        dnormed: &B::Buf,
        x: &B::Buf,
        rstd: &B::Buf,
        weight: &TensorSpec,
        parameters: &UnitParameters<B>,
    ) -> B::Buf {
        let mut dx = self.backend.alloc(dy.len());
        let (weight, base) = (parameters.values.slice(weight.range()), Some(dy.all()));
        self.backend.rms_norm_backward(dnormed.all(), x.all(), weight, rstd.all(), base, dx.all_mut());
        dx
    }

    fn embed(&self, parameters: &UnitParameters<B>, ids: &[u32]) -> B::Buf {
        let d = self.model.hidden_size;
        let mut x = self.backend.alloc(ids.len() * d);
        self.backend.embedding(ids, parameters.values.slice(self.layout.embed.range()), d, x.all_mut());
        x
    }

    pub(crate) fn ffn_forward(
        &self,
        layer: usize,
        parameters: &UnitParameters<B>,
        batch: &Batch,
        x: B::Buf,
        keep: Recompute,
    ) -> Result<(B::Buf, FfnSaved<B>), CommError> {
        if self.model.is_moe(layer) {
            let (y, saved) = self.moe_forward(layer, parameters, batch, x, keep)?;
            return Ok((y, FfnSaved::Moe(Box::new(saved))));
        }
        Ok(self.profile.compute("dense ffn", || {
            let tensors = &self.layout.layers[layer];
            let ffn =
                tensors.ffn.as_ref().expect("the layout gives every dense layer a feed-forward network");
            let (normed, rstd) = self.norm(&x, &tensors.ffn_norm, parameters);
            self.note("", layer, "ffn_norm", &normed);
            let (mut y, gu) = self.feed_forward(ffn, parameters, batch, &normed);
            self.note("", layer, "gate_up", &gu);
            self.note("", layer, "ffn", &y);
            self.backend.add(y.all_mut(), x.all());
            let normed = (keep == Recompute::None).then_some(normed);
            (y, FfnSaved::Dense { x, rstd, normed, gu })
        }))
    }

    fn ffn_backward(
        &self,
        layer: usize,
        parameters: &UnitParameters<B>,
        batch: &Batch,
        scale: &LossScale,
        dy: B::Buf,
        saved: FfnSaved<B>,
        gradients: &mut UnitGradients<B>,
    ) -> Result<(B::Buf, FfnWeights<B>), CommError> {
        let (x, rstd, normed, gu) = match saved {
            FfnSaved::Moe(saved) => {
                let (dx, weights) =
                    self.moe_backward(layer, parameters, batch, scale, dy, *saved, gradients)?;
                return Ok((dx, FfnWeights::Moe(Box::new(weights))));
            }
            FfnSaved::Dense { x, rstd, normed, gu } => (x, rstd, normed, gu),
        };
        Ok(self.profile.compute("dense ffn", || {
            let tensors = &self.layout.layers[layer];
            let ffn =
                tensors.ffn.as_ref().expect("the layout gives every dense layer a feed-forward network");
            let normed = normed.unwrap_or_else(|| self.norm(&x, &tensors.ffn_norm, parameters).0);
            self.note("grad.", layer, "ffn", &dy);
            let (dnormed, work) = self.feed_forward_backward(ffn, parameters, batch, &dy, gu);
            self.note("grad.", layer, "gate_up", &work.dgu);
            self.note("grad.", layer, "ffn_norm", &dnormed);
            let dx = self.norm_backward(&dy, &dnormed, &x, &rstd, &tensors.ffn_norm, parameters);
            (dx, FfnWeights::Dense { dy, x, rstd, normed, dnormed, work })
        }))
    }

    fn ffn_weight_grad(
        &self,
        layer: usize,
        batch: &Batch,
        ffn: &FfnWeights<B>,
        gradients: &mut UnitGradients<B>,
    ) {
        match ffn {
            FfnWeights::Moe(work) => self.moe_weight_grad(layer, batch, work, gradients),
            FfnWeights::Dense { dy, x, rstd, normed, dnormed, work } => {
                self.profile.compute("dense weights", || {
                    let tensors = &self.layout.layers[layer];
                    let ffn = tensors
                        .ffn
                        .as_ref()
                        .expect("the layout gives every dense layer a feed-forward network");
                    self.feed_forward_weight_grad(ffn, batch, normed, dy, work, gradients);
                    for index in 0..batch.slots.len() {
                        let offset = gradients.slot(index) + tensors.ffn_norm.offset;
                        self.norm_gradient(dnormed, x, rstd, &batch.rows_of(index), offset, gradients);
                    }
                })
            }
        }
    }

    fn layer_forward(
        &self,
        layer: usize,
        parameters: &UnitParameters<B>,
        batch: &Batch,
        x: B::Buf,
        keep: Recompute,
    ) -> Result<(B::Buf, Box<AttentionSaved<B>>, FfnSaved<B>), CommError> {
        let (x, attention) =
            self.profile.compute("attention", || self.attention_forward(layer, parameters, batch, x, keep));
        self.note("", layer, "attn_residual", &x);
        let (y, ffn) = self.ffn_forward(layer, parameters, batch, x, keep)?;
        self.note("", layer, "out", &y);
        Ok((y, Box::new(attention), ffn))
    }

    /// The unit that a forward asks for after `unit`.
    pub(crate) fn unit_after(&self, unit: usize) -> Option<usize> {
        Some(unit + 1).filter(|next| *next < self.layout.units())
    }

    /// The final norm's unit and that of the head's table; `next` is what is asked for after them.
    pub(crate) fn head_parameters(
        &self,
        parameters: &dyn ParameterSource<B>,
        next: Option<usize>,
    ) -> Result<(UnitParameters<B>, UnitParameters<B>), CommError> {
        let (unit, table) = (self.layout.head_unit(), self.layout.table_unit());
        if unit == table {
            let both = parameters.unit(unit, next)?;
            return Ok((both.clone(), both));
        }
        Ok((parameters.unit(unit, Some(table))?, parameters.unit(table, next)?))
    }

    fn forward(
        &self,
        parameters: &dyn ParameterSource<B>,
        batch: &Batch,
        keep: Option<Recompute>,
        outcome: &mut Outcome,
    ) -> Result<(B::Buf, Vec<LayerSaved<B>>), CommError> {
        let embedding = parameters.unit(Layout::EMBED, self.unit_after(Layout::EMBED))?;
        let mut x = self.profile.compute("embedding", || self.embed(&embedding, &batch.inputs));
        drop(embedding);
        self.note_as(&x, || "act.embed".into());
        let mut saved = Vec::with_capacity(self.model.num_hidden_layers);
        for layer in 0..self.model.num_hidden_layers {
            let unit = Layout::layer_unit(layer);
            let parameters = parameters.unit(unit, self.unit_after(unit))?;
            let input = (keep == Some(Recompute::Full)).then(|| self.duplicate(&x));
            let (y, attention, ffn) =
                self.layer_forward(layer, &parameters, batch, x, keep.unwrap_or(Recompute::Selective))?;
            if let FfnSaved::Moe(moe) = &ffn {
                self.report(batch, moe, outcome);
            }
            match (keep, input) {
                (None, _) => {}
                (_, Some(input)) => saved.push(LayerSaved::Again(input)),
                (_, None) => saved.push(LayerSaved::Kept(attention, ffn)),
            }
            x = y;
        }
        Ok((x, saved))
    }

    fn duplicate(&self, x: &B::Buf) -> B::Buf {
        let mut copy = self.backend.alloc(x.len());
        self.backend.copy(x.all(), copy.all_mut());
        copy
    }

    fn report(&self, batch: &Batch, moe: &MoeSaved<B>, outcome: &mut Outcome) {
        let experts = self.model.num_experts;
        let mut counts = vec![0u64; experts];
        for sequence in moe.routing.counts.chunks_exact(experts) {
            counts.iter_mut().zip(sequence).for_each(|(sum, count)| *sum += u64::from(*count));
        }
        outcome.counts.push(counts);
        outcome.census.push(moe.census().clone());
        for (index, losses) in outcome.losses.iter_mut().enumerate() {
            for sequence in index * batch.sequences..(index + 1) * batch.sequences {
                losses.balance += moe.routing.balance_loss[sequence];
                losses.z += moe.routing.z_loss[sequence];
                losses.entropy += moe.routing.entropy[sequence];
            }
        }
    }

    /// Runs the wave forward alone.
    ///
    /// # Errors
    /// If an exchange fails.
    pub fn evaluate(&self, parameters: &dyn ParameterSource<B>, batch: &Batch) -> Result<Outcome, CommError> {
        let mut outcome =
            Outcome { losses: vec![SlotLosses::default(); batch.slots.len()], ..Outcome::default() };
        let (x, _) = self.forward(parameters, batch, None, &mut outcome)?;
        let (last, table) = self.head_parameters(parameters, None)?;
        self.profile.compute("head", || {
            let (normed, _) = self.norm(&x, &self.layout.final_norm, &last);
            let d = self.model.hidden_size;
            let head = table.values.slice(self.layout.head.range());
            for index in 0..batch.slots.len() {
                let rows = batch.rows_of(index);
                let x = normed.slice(rows.start * d..rows.end * d);
                outcome.losses[index].cross_entropy +=
                    self.backend.head_loss(x, head, d, &batch.targets[rows.clone()], None);
            }
        });
        Ok(outcome)
    }

    /// Runs the wave forward and backward and adds to its gradients: the head's first, the layers' from the last to the
    /// first, the embedding's at the end.
    ///
    /// # Errors
    /// If an exchange fails.
    pub fn forward_backward(
        &self,
        parameters: &dyn ParameterSource<B>,
        batch: &Batch,
        scale: &LossScale,
        gradients: &mut dyn GradientSink<B>,
    ) -> Result<Outcome, CommError> {
        let mut outcome =
            Outcome { losses: vec![SlotLosses::default(); batch.slots.len()], ..Outcome::default() };
        let (x, mut saved) = self.forward(parameters, batch, Some(self.recompute), &mut outcome)?;
        let last = self.layout.head_unit() - 1;
        let weights = self.head_parameters(parameters, Some(last))?;
        let mut dx =
            self.profile.compute("head", || self.head(&weights, batch, scale, x, gradients, &mut outcome));
        drop(weights);
        gradients.ready(self.layout.head_unit())?;
        for layer in (0..self.model.num_hidden_layers).rev() {
            let unit = Layout::layer_unit(layer);
            let parameters = parameters.unit(unit, (layer > 0).then(|| unit - 1))?;
            let (attention, ffn) = match saved.pop().expect("the forward saved every layer") {
                LayerSaved::Kept(attention, ffn) => (attention, ffn),
                LayerSaved::Again(x) => {
                    let (_, attention, ffn) =
                        self.layer_forward(layer, &parameters, batch, x, Recompute::None)?;
                    (attention, ffn)
                }
            };
            self.note("grad.", layer, "out", &dx);
            let (dmiddle, work) =
                self.ffn_backward(layer, &parameters, batch, scale, dx, ffn, gradients.unit(unit))?;
            self.ffn_weight_grad(layer, batch, &work, gradients.unit(unit));
            drop(work);
            self.note("grad.", layer, "attn_residual", &dmiddle);
            let (dinput, work) = self.profile.compute("attention", || {
                self.attention_backward(layer, &parameters, batch, dmiddle, *attention)
            });
            drop(parameters);
            self.profile.compute("dense weights", || {
                self.attention_weight_grad(layer, batch, &work, gradients.unit(unit));
            });
            gradients.ready(unit)?;
            dx = dinput;
        }
        self.note_as(&dx, || "grad.act.embed".into());
        self.profile.compute("embedding", || {
            let d = self.model.hidden_size;
            let gradients = gradients.unit(Layout::EMBED);
            for index in 0..batch.slots.len() {
                let rows = batch.rows_of(index);
                let table = slot_gradient(gradients, index, &self.layout.embed);
                let dout = dx.slice(rows.start * d..rows.end * d);
                self.backend.embedding_backward(
                    &batch.inputs[rows],
                    dout,
                    d,
                    gradients.dense.slice_mut(table),
                );
            }
        });
        gradients.ready(Layout::EMBED)?;
        Ok(outcome)
    }

    /// The final norm and the fused head with its loss: gradient of the last layer's output.
    fn head(
        &self,
        (last, table): &(UnitParameters<B>, UnitParameters<B>),
        batch: &Batch,
        scale: &LossScale,
        x: B::Buf,
        gradients: &mut dyn GradientSink<B>,
        outcome: &mut Outcome,
    ) -> B::Buf {
        let d = self.model.hidden_size;
        let (normed, rstd) = self.norm(&x, &self.layout.final_norm, last);
        let head = table.values.slice(self.layout.head.range());
        let mut dnormed = self.backend.alloc(x.len());
        for index in 0..batch.slots.len() {
            let rows = batch.rows_of(index);
            let elements = rows.start * d..rows.end * d;
            let of_table = gradients.unit(self.layout.table_unit());
            let elements_of_table = slot_gradient(of_table, index, &self.layout.head);
            let with = HeadGradients {
                scale: scale.token(),
                dx: Some(dnormed.slice_mut(elements.clone())),
                dtable: Some(of_table.dense.slice_mut(elements_of_table)),
            };
            let targets = &batch.targets[rows.clone()];
            let loss = self.backend.head_loss(normed.slice(elements), head, d, targets, Some(with));
            outcome.losses[index].cross_entropy += loss;
            let of_norm = gradients.unit(self.layout.head_unit());
            let norm = slot_gradient(of_norm, index, &self.layout.final_norm).start;
            self.norm_gradient(&dnormed, &x, &rstd, &rows, norm, of_norm);
        }
        self.note_as(&normed, || "act.final_norm".into());
        self.note_as(&dnormed, || "grad.act.final_norm".into());
        let mut dx = self.backend.alloc(x.len());
        let weight = last.values.slice(self.layout.final_norm.range());
        self.backend.rms_norm_backward(dnormed.all(), x.all(), weight, rstd.all(), None, dx.all_mut());
        dx
    }
}

/// Where the gradient of a slot's `tensor` lies.
fn slot_gradient<B: Backend>(
    gradients: &UnitGradients<B>,
    index: usize,
    tensor: &TensorSpec,
) -> Range<usize> {
    let start = gradients.slot(index) + tensor.offset;
    start..start + tensor.len()
}

/// Cosines, then sines, of `position * theta^(-2i/head_dim)`, computed in f64.
fn rotary_table(positions: usize, head_dim: usize, theta: f32) -> Vec<f32> {
    let half = head_dim / 2;
    let mut table = vec![0.0; positions * head_dim];
    for (position, row) in table.chunks_exact_mut(head_dim).enumerate() {
        for i in 0..half {
            let frequency = libm::pow(f64::from(theta), -2.0 * i as f64 / head_dim as f64);
            let (sin, cos) = libm::sincos(position as f64 * frequency);
            row[i] = cos as f32;
            row[half + i] = sin as f32;
        }
    }
    table
}
