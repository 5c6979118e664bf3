//! The sparse half of a layer: norm, router, dispatch, experts, combine, with the shared experts beside it.

use std::ops::Range;

use unisono_comm::{CommError, Pending};
use unisono_plan::dispatch::{Census, DispatchGroup};
use unisono_plan::{Layout, TensorSpec};
use unisono_tensor::{Backend, Buffer, FfnRun, FfnShape, RouterShape, Routing};

use crate::batch::{Batch, LossScale};
use crate::dispatch::{Combining, Dispatching, Route, Wave, Wiring, wire};
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
    /// None where rows come in rounds and are not kept.
    received: Option<Received<B>>,
    shared_gu: Option<B::Buf>,
}

impl<B: Backend> MoeSaved<B> {
    /// How many rows there were for whom.
    pub fn census(&self) -> &Census {
        &self.route.census
    }
}

/// What experts keep of the rows they received.
pub(crate) struct Received<B: Backend> {
    /// `[received_rows]`
    pub row_weight: Vec<f32>,
    /// `[received_rows, d]`
    pub expert_in: B::Buf,
    /// `[received_rows, 2 ffn]`
    pub gu: B::Buf,
}

/// What the experts' weight-gradient step needs.
pub(crate) struct ExpertWeights<B: Backend> {
    runs: Vec<FfnRun>,
    expert_in: B::Buf,
    dgu: B::Buf,
    hidden: B::Buf,
    expert_dy: B::Buf,
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
    /// None where rows came in rounds: each round has taken the step for its rows.
    experts: Option<ExpertWeights<B>>,
}

impl<B: Backend> Transformer<B> {
    fn router_tensor(&self, layer: usize) -> &TensorSpec {
        let router = self.layout.layers[layer].router.as_ref();
        router.expect("only layers that the layout gives a router are run as MoE layers")
    }

    pub(crate) fn router_shape(&self, batch: &Batch) -> RouterShape {
        RouterShape { sequence: batch.sequence_length, ..self.router }
    }

    fn route(&self, routing: &Routing, batch: &Batch) -> Result<Route, CommError> {
        let (comm, first) = (&self.dispatch, self.dispatch.world_rank(0));
        let node_of = |rank: usize| if self.shape.hierarchical { comm.node(rank - first) } else { 0 };
        let (fold, placement) = (self.fold, self.placement);
        let rank = comm.world_rank(comm.rank());
        let group = DispatchGroup::new(fold, placement, rank, batch.slots.clone(), node_of);
        let wave = Wave { comm, group, shape: self.shape };
        Route::new(&wave, routing, batch, self.model.top_k)
    }

    fn note_routing(&self, layer: usize, routing: &Routing) {
        let words = |words: &[u32]| words.iter().map(|word| *word as f32).collect::<Vec<_>>();
        let sums = |sums: &[f64]| sums.iter().map(|sum| *sum as f32).collect::<Vec<_>>();
        self.note_host("", layer, "router_weights", || routing.weights.clone());
        self.note_host("", layer, "experts", || words(&routing.experts));
        self.note_host("", layer, "counts", || words(&routing.counts));
        self.note_host("", layer, "balance_loss", || sums(&routing.balance_loss));
        self.note_host("", layer, "z_loss", || sums(&routing.z_loss));
        self.note_host("", layer, "entropy", || sums(&routing.entropy));
    }

    pub(crate) fn wiring(&self) -> Wiring<'_, B> {
        let (comm, backend) = (&self.dispatch, &self.backend);
        let wire = wire(&self.shape);
        Wiring { comm, backend, d: self.model.hidden_size, wire, overlap: self.overlap }
    }

    pub(crate) fn expert_shape(&self) -> FfnShape {
        FfnShape {
            d_model: self.model.hidden_size,
            ffn: self.model.moe_intermediate_size,
            row_block: self.shape.row_block,
        }
    }

    /// Runs of rows of instances, `(instance, rows, first result)`: parameters shared between groups, gradients their own.
    pub(crate) fn expert_runs(
        &self,
        layer: usize,
        batch: &Batch,
        runs: impl Iterator<Item = (usize, Range<usize>, usize)>,
    ) -> Vec<FfnRun> {
        let (dense, len) = (self.layout.unit_len(Layout::layer_unit(layer)), self.layout.expert_len());
        let [w13, w2] = &self.layout.expert;
        let instances = self.placement.instances(batch.slots.clone());
        runs.map(|(index, rows, out)| {
            let held = self.held.binary_search(&instances[index].expert);
            let held = held.expect("a rank holds the experts of its own slots");
            let block = dense + held * len;
            let gradient = index * len;
            FfnRun {
                rows,
                out,
                w13: block + w13.offset,
                w2: block + w2.offset,
                dw13: gradient + w13.offset,
                dw2: gradient + w2.offset,
            }
        })
        .collect()
    }

    /// One run an instance, of all rows of the layer.
    fn whole_runs(&self, layer: usize, batch: &Batch, route: &Route) -> Vec<FfnRun> {
        let whole = |(index, rows): (usize, &Range<usize>)| (index, rows.clone(), rows.start);
        self.expert_runs(layer, batch, route.runs.iter().enumerate().map(whole))
    }

    /// Where a wave's rows are cut between the two times that shared experts run: while rows go to their experts, and while
    /// results come back. A rank that waits for nobody runs them at once.
    fn shared_cut(&self, batch: &Batch) -> usize {
        if self.dispatch.size() == 1 { batch.rows() } else { batch.rows() / 2 }
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
        let (normed, rstd, logits, routing) = profile.compute("router", || {
            let (normed, rstd) = self.norm(&x, &tensors.ffn_norm, parameters);
            let router = self.router_tensor(layer);
            let logits = self.project(&normed, router.range(), self.model.num_experts, parameters);
            let routing = backend.router(self.router_shape(batch), logits.all(), &parameters.bias);
            (normed, rstd, logits, routing)
        });
        self.note("", layer, "ffn_norm", &normed);
        self.note("", layer, "router_logits", &logits);
        self.note_routing(layer, &routing);
        let route = profile.communicate("dispatch counts", || self.route(&routing, batch))?;
        let mut shared = tensors.ffn.as_ref().map(|ffn| self.start_feed_forward(ffn, batch, &normed));
        let mut run_shared = |rows: Range<usize>| {
            if let Some(shared) = &mut shared {
                profile.compute("shared experts", || {
                    self.feed_forward_rows(shared, parameters, batch, &normed, rows)
                });
            }
        };
        let cut = self.shared_cut(batch);
        let (back, received) = if route.rounds.is_some() {
            run_shared(0..batch.rows());
            (self.rounds_forward(layer, parameters, batch, &route, &routing, &normed)?, None)
        } else {
            let moving = self.start_dispatch(&route, &normed)?;
            let weights = self.start_row_weights(&route, &routing)?;
            run_shared(0..cut);
            let row_weight =
                profile.communicate("dispatch", || weights.finish()).map(|host| host.as_ref().to_vec())?;
            let (back, received) =
                self.chunks_forward(layer, parameters, batch, &route, moving, row_weight)?;
            run_shared(cut..batch.rows());
            (profile.communicate("combine", || back.finish())?, Some(received))
        };
        let (shared, shared_gu) = shared.map(|shared| (shared.result, shared.kept)).unzip();
        if let Some((shared, gu)) = shared.as_ref().zip(shared_gu.as_ref()) {
            self.note("", layer, "shared", shared);
            self.note("", layer, "shared_gate_up", gu);
        }
        if let Some(received) = &received {
            self.note("", layer, "expert_gate_up", &received.gu);
        }
        let y = profile.compute("permute", || {
            let mut y = backend.alloc(x.len());
            let shared = shared.as_ref().map(Buffer::all);
            self.combine(&back, &routing, &route, shared, x.all(), &mut y);
            y
        });
        let normed = (keep == Recompute::None).then_some(normed);
        let saved = MoeSaved { x, rstd, normed, logits, routing, route, received, shared_gu };
        Ok((y, saved))
    }

    /// Starts to bring rows of `x` `[rows, d]` to their experts.
    fn start_dispatch<'a>(
        &'a self,
        route: &'a Route,
        x: &'a B::Buf,
    ) -> Result<Dispatching<'a, B>, CommError> {
        self.profile.communicate("dispatch", || Dispatching::start(self.wiring(), route, x))
    }

    fn start_row_weights(&self, route: &Route, routing: &Routing) -> Result<Pending<B::Host>, CommError> {
        let mut sent = self.backend.alloc_host(routing.weights.len());
        route.in_sent_order(&routing.weights, sent.as_mut());
        let recv = self.backend.alloc_host(route.received_rows());
        route.start_values(&self.dispatch, sent, recv)
    }

    /// Experts on each chunk as it arrives, while later ones are under way and earlier results go back.
    fn chunks_forward<'a>(
        &'a self,
        layer: usize,
        parameters: &UnitParameters<B>,
        batch: &Batch,
        route: &'a Route,
        mut moving: Dispatching<'a, B>,
        row_weight: Vec<f32>,
    ) -> Result<(Combining<'a, B>, Received<B>), CommError> {
        let (backend, profile) = (&self.backend, &self.profile);
        let mut gu = backend.alloc(route.received_rows() * 2 * self.model.moe_intermediate_size);
        let mut expert_in = None;
        let mut back = Combining::new(self.wiring(), route);
        for chunk in &route.chunks {
            profile.communicate("dispatch", || moving.arrive(chunk, &mut expert_in))?;
            let expert_in: &B::Buf = expert_in.get_or_insert_with(|| backend.alloc(0));
            let runs = self.expert_runs(layer, batch, chunk.runs.iter().cloned());
            let mut y = backend.alloc(chunk.rows * self.model.hidden_size);
            profile.compute("experts", || {
                let (shape, weights) = (self.expert_shape(), parameters.values.all());
                let weight = Some(row_weight.as_slice());
                backend.ffn(shape, &runs, expert_in.all(), weights, weight, gu.all_mut(), y.all_mut());
            });
            profile.communicate("combine", || back.send_back(chunk, y))?;
        }
        let expert_in = expert_in.unwrap_or_else(|| backend.alloc(0));
        Ok((back, Received { row_weight, expert_in, gu }))
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
            wire(&self.shape),
            shared,
            Some(base),
            y.all_mut(),
        );
    }

    /// Gradient of `x` from that of `y`. Where rows come in rounds, the experts' weight gradients are added at once.
    pub(crate) fn moe_backward(
        &self,
        layer: usize,
        parameters: &UnitParameters<B>,
        batch: &Batch,
        scale: &LossScale,
        dy: B::Buf,
        saved: MoeSaved<B>,
        gradients: &mut UnitGradients<B>,
    ) -> Result<(B::Buf, MoeWeights<B>), CommError> {
        let (backend, profile) = (&self.backend, &self.profile);
        let tensors = &self.layout.layers[layer];
        let d = self.model.hidden_size;
        let MoeSaved { x, rstd, normed, logits, routing, route, received, shared_gu } = saved;
        // What routed and shared experts are given is the gradient of their sum.
        self.note("grad.", layer, "ffn", &dy);
        let mut shared = tensors
            .ffn
            .as_ref()
            .zip(shared_gu)
            .map(|(ffn, gu)| self.start_feed_forward_backward(ffn, batch, &dy, gu));
        let mut run_shared = |rows: Range<usize>| {
            if let Some(shared) = &mut shared {
                let work = || self.feed_forward_rows_backward(shared, parameters, batch, &dy, rows);
                profile.compute("shared experts", work);
            }
        };
        let again = |normed: Option<B::Buf>| {
            let norm = || self.norm(&x, &tensors.ffn_norm, parameters).0;
            normed.unwrap_or_else(|| profile.compute("router", norm))
        };
        let cut = self.shared_cut(batch);
        let (back, dweights, experts, normed) = match received {
            None => {
                run_shared(0..batch.rows());
                let normed = again(normed);
                let rows = [&normed, &dy];
                let (back, dweights) =
                    self.rounds_backward(layer, parameters, batch, &route, &routing, rows, gradients)?;
                (back, dweights, None, normed)
            }
            Some(received) => {
                let moving = self.start_dispatch(&route, &dy)?;
                run_shared(0..cut);
                let (back, dweight, experts) =
                    self.chunks_backward(layer, parameters, batch, &route, moving, received)?;
                let values = self.start_weight_gradients(&route, dweight, &routing)?;
                run_shared(cut..batch.rows());
                let normed = again(normed);
                let back = profile.communicate("combine", || back.finish())?;
                let values = profile.communicate("combine", || values.finish())?;
                let mut dweights = vec![0.0; routing.weights.len()];
                route.in_choice_order(values.as_ref(), &mut dweights);
                (back, dweights, Some(experts), normed)
            }
        };
        let (dshared, shared) = shared.map(|shared| (shared.result, shared.work)).unzip();
        if let Some(shared) = &shared {
            self.note("grad.", layer, "shared_gate_up", &shared.dgu);
        }
        if let Some(experts) = &experts {
            self.note("grad.", layer, "expert_gate_up", &experts.dgu);
        }
        let (dx, dnormed, dlogits) = profile.compute("router", || {
            let dlogits = self.router_gradient(batch, scale, &logits, &routing, &dweights);
            let router = self.router_tensor(layer);
            let base = self.project_back(&dlogits, router.range(), d, parameters);
            let mut dnormed = backend.alloc(x.len());
            let dshared = dshared.as_ref().map(Buffer::all);
            self.combine(&back, &routing, &route, dshared, base.all(), &mut dnormed);
            self.note_host("grad.", layer, "router_weights", || dweights.clone());
            self.note("grad.", layer, "router_logits", &dlogits);
            self.note("grad.", layer, "ffn_norm", &dnormed);
            let dx = self.norm_backward(&dy, &dnormed, &x, &rstd, &tensors.ffn_norm, parameters);
            (dx, dnormed, dlogits)
        });
        let weights = MoeWeights { dy, x, rstd, normed, dnormed, dlogits, shared, experts };
        Ok((dx, weights))
    }

    /// The experts' backward on each chunk as it arrives.
    fn chunks_backward<'a>(
        &'a self,
        layer: usize,
        parameters: &UnitParameters<B>,
        batch: &Batch,
        route: &'a Route,
        mut moving: Dispatching<'a, B>,
        received: Received<B>,
    ) -> Result<(Combining<'a, B>, B::Host, ExpertWeights<B>), CommError> {
        let (backend, profile) = (&self.backend, &self.profile);
        let Received { row_weight, expert_in, gu: mut dgu } = received;
        let mut hidden = backend.alloc(route.received_rows() * self.model.moe_intermediate_size);
        let mut dweight = backend.alloc_host(route.received_rows());
        let mut expert_dy = None;
        let mut back = Combining::new(self.wiring(), route);
        for chunk in &route.chunks {
            profile.communicate("dispatch", || moving.arrive(chunk, &mut expert_dy))?;
            let expert_dy: &B::Buf = expert_dy.get_or_insert_with(|| backend.alloc(0));
            let runs = self.expert_runs(layer, batch, chunk.runs.iter().cloned());
            let mut dx = backend.alloc(chunk.rows * self.model.hidden_size);
            profile.compute("experts", || {
                let (shape, weights) = (self.expert_shape(), parameters.values.all());
                let (dgu, hidden, dx) = (dgu.all_mut(), hidden.all_mut(), dx.all_mut());
                let (weight, dweight) = (Some(row_weight.as_slice()), Some(dweight.as_mut()));
                backend.ffn_backward(
                    shape,
                    &runs,
                    expert_dy.all(),
                    weights,
                    weight,
                    dgu,
                    hidden,
                    dx,
                    dweight,
                );
            });
            profile.communicate("combine", || back.send_back(chunk, dx))?;
        }
        let expert_dy = expert_dy.unwrap_or_else(|| backend.alloc(0));
        let runs = self.whole_runs(layer, batch, route);
        Ok((back, dweight, ExpertWeights { runs, expert_in, dgu, hidden, expert_dy }))
    }

    /// Starts to bring the gradients of row weights back, `[rows sent]`.
    fn start_weight_gradients(
        &self,
        route: &Route,
        dweight: B::Host,
        routing: &Routing,
    ) -> Result<Pending<B::Host>, CommError> {
        let recv = self.backend.alloc_host(routing.weights.len());
        self.profile.communicate("combine", || route.start_values_back(&self.dispatch, dweight, recv))
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
        if let Some(work) = &work.experts {
            self.profile.compute("expert weights", || {
                let (x, dgu, hidden, dy) =
                    (work.expert_in.all(), work.dgu.all(), work.hidden.all(), work.expert_dy.all());
                let (shape, gradient) = (self.expert_shape(), gradients.experts.all_mut());
                self.backend.ffn_weight_grad(shape, &work.runs, x, dgu, hidden, dy, gradient);
            });
        }
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
