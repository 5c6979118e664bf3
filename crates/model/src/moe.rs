//! The sparse half of a layer: norm, router, dispatch, experts, combine, with the shared experts beside it.

use unisono_comm::CommError;
use unisono_plan::{Layout, TensorSpec};
use unisono_tensor::{Backend, Buffer, FfnRun, FfnShape, RouterShape, Routing};

use crate::batch::{Batch, LossScale};
use crate::dispatch::{DispatchGroup, Route};
use crate::feed_forward::FeedForwardWeights;
use crate::parameters::{UnitGradients, UnitParameters};
use crate::transformer::{Recompute, Transformer};

/// What the backward needs.
pub(crate) struct MoeSaved<B: Backend> {
    x: B::Buf,
    rstd: B::Buf,
    normed: Option<B::Buf>,
    logits: B::Buf,
    pub routing: Routing,
    route: Route,
    /// `[received_rows]`
    row_weight: Vec<f32>,
    /// `[received_rows, d]`
    expert_in: B::Buf,
    /// `[received_rows, 2 ffn]`
    gu: B::Buf,
    shared_gu: Option<B::Buf>,
}

/// What the weight-gradient step needs.
pub(crate) struct MoeWeights<B: Backend> {
    dy: B::Buf,
    x: B::Buf,
    rstd: B::Buf,
    normed: B::Buf,
    dnormed: B::Buf,
    dlogits: B::Buf,
    shared: Option<FeedForwardWeights<B>>,
    runs: Vec<FfnRun>,
    expert_in: B::Buf,
    dgu: B::Buf,
    hidden: B::Buf,
    expert_dy: B::Buf,
}

impl<B: Backend> Transformer<B> {
    fn router_tensor(&self, layer: usize) -> &TensorSpec {
        let router = self.layout.layers[layer].router.as_ref();
        router.expect("only layers that the layout gives a router are run as MoE layers")
    }

    pub(crate) fn router_shape(&self, batch: &Batch) -> RouterShape {
        RouterShape { sequence: batch.sequence_length, ..self.router }
    }

    fn dispatch_group(&self, batch: &Batch) -> DispatchGroup<'_> {
        DispatchGroup {
            comm: &self.dispatch,
            fold: self.fold,
            placement: self.placement,
            slots: batch.slots.clone(),
        }
    }

    fn expert_shape(&self) -> FfnShape {
        FfnShape {
            d_model: self.model.hidden_size,
            ffn: self.model.moe_intermediate_size,
            row_block: self.expert_row_block,
        }
    }

    /// One run an instance: parameters shared between groups, gradients its own.
    fn expert_runs(&self, layer: usize, batch: &Batch, route: &Route) -> Vec<FfnRun> {
        let (dense, len) = (self.layout.unit_len(Layout::layer_unit(layer)), self.layout.expert_len());
        let [w13, w2] = &self.layout.expert;
        let instances = self.placement.instances(batch.slots.clone());
        let runs = route.runs.iter().zip(instances).enumerate();
        runs.map(|(index, (rows, instance))| {
            let held = self.held.binary_search(&instance.expert);
            let held = held.expect("a rank holds the experts of its own slots");
            let block = dense + held * len;
            let gradient = index * len;
            FfnRun {
                rows: rows.clone(),
                w13: block + w13.offset,
                w2: block + w2.offset,
                dw13: gradient + w13.offset,
                dw2: gradient + w2.offset,
            }
        })
        .collect()
    }

    /// `y = x + (shared(norm(x)) + experts(norm(x)))`, `x` and `y` `[rows, d]`.
    pub(crate) fn moe_forward(
        &self,
        layer: usize,
        parameters: &UnitParameters<B>,
        batch: &Batch,
        x: B::Buf,
        keep: Recompute,
    ) -> Result<(B::Buf, MoeSaved<B>), CommError> {
        let (backend, profile) = (&self.backend, &self.profile);
        let tensors = &self.layout.layers[layer];
        let d = self.model.hidden_size;
        let (normed, rstd, logits, routing) = profile.compute("router", || {
            let (normed, rstd) = self.norm(&x, &tensors.ffn_norm, parameters);
            let router = self.router_tensor(layer);
            let logits = self.project(&normed, router.range(), self.model.num_experts, parameters);
            let routing = backend.router(self.router_shape(batch), logits.all(), &parameters.bias);
            (normed, rstd, logits, routing)
        });
        self.note("", layer, "ffn_norm", &normed);
        self.note("", layer, "router_logits", &logits);
        let group = self.dispatch_group(batch);
        let route =
            profile.communicate("dispatch counts", || group.route(&routing, batch, self.model.top_k))?;
        let rows = profile.compute("permute", || self.gather(&normed, &route));
        let (moving, weights) = profile.communicate("dispatch", || {
            let moving = route.start_dispatch(&self.dispatch, backend, rows, d)?;
            let mut sent = backend.alloc_host(route.sent_rows());
            route.in_sent_order(&routing.weights, sent.as_mut());
            let weights = route.start_dispatch(&self.dispatch, backend, backend.take_from_host(sent), 1)?;
            Ok::<_, CommError>((moving, weights))
        })?;
        let shared = tensors.ffn.as_ref().map(|ffn| {
            profile.compute("shared experts", || self.feed_forward(ffn, parameters, batch, &normed))
        });
        let (expert_in, row_weight) = profile.communicate("dispatch", || {
            let weights = backend.hand_to_host(weights.finish(backend)?).as_ref().to_vec();
            Ok::<_, CommError>((moving.finish(backend)?, weights))
        })?;
        let runs = self.expert_runs(layer, batch, &route);
        let mut gu = backend.alloc(route.received_rows() * 2 * self.model.moe_intermediate_size);
        let mut expert_y = backend.alloc(route.received_rows() * d);
        profile.compute("experts", || {
            let shape = self.expert_shape();
            let weights = parameters.values.all();
            let weight = Some(row_weight.as_slice());
            backend.ffn(shape, &runs, expert_in.all(), weights, weight, gu.all_mut(), expert_y.all_mut());
        });
        let back = profile.communicate("combine", || {
            route.start_combine(&self.dispatch, backend, expert_y, d)?.finish(backend)
        })?;
        let (shared, shared_gu) = shared.unzip();
        let y = profile.compute("permute", || {
            let mut y = backend.alloc(x.len());
            let shared = shared.as_ref().map(Buffer::all);
            self.combine(&back, &routing, &route, shared, x.all(), &mut y);
            y
        });
        let normed = (keep == Recompute::None).then_some(normed);
        let saved =
            MoeSaved { x, rstd, normed, logits, routing, route, row_weight, expert_in, gu, shared_gu };
        Ok((y, saved))
    }

    fn gather(&self, rows: &B::Buf, route: &Route) -> B::Buf {
        let d = self.model.hidden_size;
        let mut sent = self.backend.alloc(route.sent_rows() * d);
        self.backend.gather_rows(rows.all(), d, &route.tokens, sent.all_mut());
        sent
    }

    fn combine(
        &self,
        back: &B::Buf,
        routing: &Routing,
        route: &Route,
        shared: Option<unisono_tensor::Ref<'_, B>>,
        base: unisono_tensor::Ref<'_, B>,
        y: &mut B::Buf,
    ) {
        let node = self.model.num_experts / self.fold.grid().expert_nodes;
        let (d, top_k) = (self.model.hidden_size, self.model.top_k);
        let (experts, places) = (&routing.experts, &route.places);
        self.backend.combine_rows(
            back.all(),
            d,
            experts,
            places,
            top_k,
            node,
            shared,
            Some(base),
            y.all_mut(),
        );
    }

    /// Gradient of `x` from that of `y`.
    pub(crate) fn moe_backward(
        &self,
        layer: usize,
        parameters: &UnitParameters<B>,
        batch: &Batch,
        scale: &LossScale,
        dy: B::Buf,
        saved: MoeSaved<B>,
    ) -> Result<(B::Buf, MoeWeights<B>), CommError> {
        let (backend, profile) = (&self.backend, &self.profile);
        let tensors = &self.layout.layers[layer];
        let d = self.model.hidden_size;
        let MoeSaved { x, rstd, normed, logits, routing, route, row_weight, expert_in, mut gu, shared_gu } =
            saved;
        let rows = profile.compute("permute", || self.gather(&dy, &route));
        let moving =
            profile.communicate("dispatch", || route.start_dispatch(&self.dispatch, backend, rows, d))?;
        let shared = tensors.ffn.as_ref().zip(shared_gu).map(|(ffn, gu)| {
            profile.compute("shared experts", || self.feed_forward_backward(ffn, parameters, batch, &dy, gu))
        });
        let expert_dy = profile.communicate("dispatch", || moving.finish(backend))?;
        let runs = self.expert_runs(layer, batch, &route);
        let mut hidden = backend.alloc(route.received_rows() * self.model.moe_intermediate_size);
        let mut expert_dx = backend.alloc(route.received_rows() * d);
        let mut dweight = backend.alloc_host(route.received_rows());
        profile.compute("experts", || {
            let weight = Some(row_weight.as_slice());
            let (gu, hidden, dx) = (gu.all_mut(), hidden.all_mut(), expert_dx.all_mut());
            let (shape, weights) = (self.expert_shape(), parameters.values.all());
            let dweight = Some(dweight.as_mut());
            backend.ffn_backward(shape, &runs, expert_dy.all(), weights, weight, gu, hidden, dx, dweight);
        });
        let (back, dweights) = profile.communicate("combine", || {
            let moving = route.start_combine(&self.dispatch, backend, expert_dx, d)?;
            let dweight = backend.take_from_host(dweight);
            let dweight = route.start_combine(&self.dispatch, backend, dweight, 1)?.finish(backend)?;
            let mut dweights = vec![0.0; routing.weights.len()];
            route.in_choice_order(backend.hand_to_host(dweight).as_ref(), &mut dweights);
            Ok::<_, CommError>((moving.finish(backend)?, dweights))
        })?;
        let (dshared, shared) = shared.unzip();
        let (dx, normed, dnormed, dlogits) = profile.compute("router", || {
            let normed = normed.unwrap_or_else(|| self.norm(&x, &tensors.ffn_norm, parameters).0);
            let dlogits = self.router_gradient(batch, scale, &logits, &routing, &dweights);
            let router = self.router_tensor(layer);
            let base = self.project_back(&dlogits, router.range(), d, parameters);
            let mut dnormed = backend.alloc(x.len());
            let dshared = dshared.as_ref().map(Buffer::all);
            self.combine(&back, &routing, &route, dshared, base.all(), &mut dnormed);
            self.note("grad.", layer, "router_logits", &dlogits);
            self.note("grad.", layer, "ffn_norm", &dnormed);
            let dx = self.norm_backward(&dy, &dnormed, &x, &rstd, &tensors.ffn_norm, parameters);
            (dx, normed, dnormed, dlogits)
        });
        let weights = MoeWeights {
            dy,
            x,
            rstd,
            normed,
            dnormed,
            dlogits,
            shared,
            runs,
            expert_in,
            dgu: gu,
            hidden,
            expert_dy,
        };
        Ok((dx, weights))
    }

    fn router_gradient(
        &self,
        batch: &Batch,
        scale: &LossScale,
        logits: &B::Buf,
        routing: &Routing,
        dweights: &[f32],
    ) -> B::Buf {
        let mut dlogits = self.backend.alloc(logits.len());
        self.backend.router_backward(
            self.router_shape(batch),
            logits.all(),
            routing,
            dweights,
            scale.balance(self.model.balance_loss_coef),
            scale.z(self.model.z_loss_coef),
            dlogits.all_mut(),
        );
        dlogits
    }

    /// Adds the weight gradients: dense ones to each slot's accumulator, experts' to each instance's.
    pub(crate) fn moe_weight_grad(
        &self,
        layer: usize,
        batch: &Batch,
        work: &MoeWeights<B>,
        gradients: &mut UnitGradients<B>,
    ) {
        let tensors = &self.layout.layers[layer];
        let (d, experts) = (self.model.hidden_size, self.model.num_experts);
        self.profile.compute("expert weights", || {
            let (x, dgu, hidden, dy) =
                (work.expert_in.all(), work.dgu.all(), work.hidden.all(), work.expert_dy.all());
            let shape = self.expert_shape();
            self.backend.ffn_weight_grad(shape, &work.runs, x, dgu, hidden, dy, gradients.experts.all_mut());
        });
        self.profile.compute("dense weights", || {
            if let Some((ffn, shared)) = tensors.ffn.as_ref().zip(work.shared.as_ref()) {
                self.feed_forward_weight_grad(ffn, batch, &work.normed, &work.dy, shared, gradients);
            }
            let router = self.router_tensor(layer).offset;
            for index in 0..batch.slots.len() {
                let rows = batch.rows_of(index);
                let base = gradients.slot(index);
                self.product_gradient(
                    &work.normed,
                    d,
                    &work.dlogits,
                    experts,
                    &rows,
                    base + router,
                    gradients,
                );
                let norm = base + tensors.ffn_norm.offset;
                self.norm_gradient(&work.dnormed, &work.x, &work.rstd, &rows, norm, gradients);
            }
        });
    }
}
