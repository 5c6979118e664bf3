//! An MoE layer whose rows come in rounds, since together they would not fit the bound.
//!
//! Received rows are not kept: the backward brings them again and computes the hidden products again. What a rank holds
//! of other ranks' tokens is then one round's, in any layer.

use unisono_comm::CommError;
use unisono_plan::dispatch::Round;
use unisono_tensor::{Backend, Buffer, Routing};

use crate::batch::Batch;
use crate::dispatch::{Rounds, Route};
use crate::moe::Received;
use crate::parameters::{UnitGradients, UnitParameters};
use crate::transformer::Transformer;

impl<B: Backend> Transformer<B> {
    /// The weights of rows, ready to be sent.
    fn row_weights(&self, route: &Route, routing: &Routing) -> Rounds<'_, B> {
        let mut sent = self.backend.alloc_host(routing.weights.len());
        route.in_sent_order(&routing.weights, sent.as_mut());
        Rounds::of_values(&self.dispatch, &self.backend, sent)
    }

    /// The experts' forward on the rows of one round: what they keep, and their results.
    fn round_forward(
        &self,
        layer: usize,
        parameters: &UnitParameters<B>,
        batch: &Batch,
        round: &Round,
        expert_in: B::Buf,
        row_weight: B::Buf,
    ) -> (Received<B>, B::Buf) {
        let backend = &self.backend;
        let runs = round.runs.iter().map(|(index, rows)| (*index, rows.clone(), rows.start));
        let runs = self.expert_runs(layer, batch, runs);
        let row_weight = backend.hand_to_host(row_weight).as_ref().to_vec();
        let mut gu = backend.alloc(round.rows * 2 * self.model.moe_intermediate_size);
        let mut y = backend.alloc(round.rows * self.model.hidden_size);
        let (shape, weights) = (self.expert_shape(), parameters.values.all());
        self.profile.compute("experts", || {
            let weight = Some(row_weight.as_slice());
            backend.ffn(shape, &runs, expert_in.all(), weights, weight, gu.all_mut(), y.all_mut());
        });
        (Received { row_weight, expert_in, gu }, y)
    }

    /// Returned rows of the experts' forward over `normed` `[rows, d]`.
    pub(crate) fn rounds_forward(
        &self,
        layer: usize,
        parameters: &UnitParameters<B>,
        batch: &Batch,
        route: &Route,
        routing: &Routing,
        normed: &B::Buf,
    ) -> Result<B::Buf, CommError> {
        let profile = &self.profile;
        let rows = Rounds::new(self.wiring(), route, normed);
        let weights = self.row_weights(route, routing);
        let mut returned = rows.returned(route);
        for round in route.rounds.iter().flatten() {
            let (expert_in, row_weight) = profile.communicate("dispatch", || {
                Ok::<_, CommError>((rows.bring(round)?, weights.bring(round)?))
            })?;
            let (_, y) = self.round_forward(layer, parameters, batch, round, expert_in, row_weight);
            returned = profile.communicate("combine", || rows.take_back(round, y, returned))?;
        }
        Ok(rows.finish(returned))
    }

    /// Returned rows of the experts' backward, and gradients of the choices' weights; `rows` are the layer's normed input
    /// and the gradient of its result. Adds the experts' weight gradients.
    pub(crate) fn rounds_backward(
        &self,
        layer: usize,
        parameters: &UnitParameters<B>,
        batch: &Batch,
        route: &Route,
        routing: &Routing,
        [normed, dy]: [&B::Buf; 2],
        gradients: &mut UnitGradients<B>,
    ) -> Result<(B::Buf, Vec<f32>), CommError> {
        let (backend, profile) = (&self.backend, &self.profile);
        let (inputs, slopes) =
            (Rounds::new(self.wiring(), route, normed), Rounds::new(self.wiring(), route, dy));
        let weights = self.row_weights(route, routing);
        let (mut returned, mut returned_weights) = (slopes.returned(route), weights.returned(route));
        for round in route.rounds.iter().flatten() {
            let (expert_in, row_weight, expert_dy) = profile.communicate("dispatch", || {
                Ok::<_, CommError>((inputs.bring(round)?, weights.bring(round)?, slopes.bring(round)?))
            })?;
            let (received, y) = self.round_forward(layer, parameters, batch, round, expert_in, row_weight);
            drop(y);
            let (dx, dweight) =
                self.round_backward(layer, parameters, batch, round, received, expert_dy, gradients);
            (returned, returned_weights) = profile.communicate("combine", || {
                let dweight = backend.take_from_host(dweight);
                let returned_weights = weights.take_back(round, dweight, returned_weights)?;
                Ok::<_, CommError>((slopes.take_back(round, dx, returned)?, returned_weights))
            })?;
        }
        let mut dweights = vec![0.0; routing.weights.len()];
        route.in_choice_order(returned_weights.as_ref(), &mut dweights);
        Ok((slopes.finish(returned), dweights))
    }

    /// The experts' backward on the rows of one round, the weight-gradient step included: gradients of rows and of their
    /// weights.
    fn round_backward(
        &self,
        layer: usize,
        parameters: &UnitParameters<B>,
        batch: &Batch,
        round: &Round,
        received: Received<B>,
        expert_dy: B::Buf,
        gradients: &mut UnitGradients<B>,
    ) -> (B::Buf, B::Host) {
        let (backend, profile) = (&self.backend, &self.profile);
        let Received { row_weight, expert_in, gu: mut dgu } = received;
        let runs = round.runs.iter().map(|(index, rows)| (*index, rows.clone(), rows.start));
        let runs = self.expert_runs(layer, batch, runs);
        let mut hidden = backend.alloc(round.rows * self.model.moe_intermediate_size);
        let mut dx = backend.alloc(round.rows * self.model.hidden_size);
        let mut dweight = backend.alloc_host(round.rows);
        let shape = self.expert_shape();
        profile.compute("experts", || {
            let (weight, dweight) = (Some(row_weight.as_slice()), Some(dweight.as_mut()));
            let (dgu, hidden, dx) = (dgu.all_mut(), hidden.all_mut(), dx.all_mut());
            let weights = parameters.values.all();
            backend.ffn_backward(shape, &runs, expert_dy.all(), weights, weight, dgu, hidden, dx, dweight);
        });
        profile.compute("expert weights", || {
            let (x, dgu, hidden, dy) = (expert_in.all(), dgu.all(), hidden.all(), expert_dy.all());
            backend.ffn_weight_grad(shape, &runs, x, dgu, hidden, dy, gradients.experts.all_mut());
        });
        (dx, dweight)
    }
}
