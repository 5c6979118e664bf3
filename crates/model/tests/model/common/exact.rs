//! The model's forward in f64, layer by layer from the formulas of the kernels: what finite differences are taken of.

use std::collections::BTreeMap;

use unisono_plan::{ModelConfig, ScoreFunction};
use unisono_tensor::{AttentionShape, Heads, IGNORE, RouterShape};

use super::Reference;
use super::formulas::*;
use super::support::{dot, widen};

/// Tensors by their names in `fixtures/README.md`; experts and counts as numbers.
pub type Exact = BTreeMap<String, Vec<f64>>;

/// Every tensor of a forward pass over a case's batch with its parameters. `moved` names a parameter or an activation, and
/// what is added to it wherever it is used.
pub fn forward(reference: &Reference, moved: Option<(&str, &[f64])>) -> Exact {
    let heads = Heads {
        heads: reference.model.num_attention_heads,
        kv_heads: reference.model.num_key_value_heads,
        head_dim: reference.model.head_dim,
    };
    let mut pass = Pass { reference, model: &reference.model, heads, moved, tensors: Exact::new() };
    pass.run();
    pass.tensors
}

struct Pass<'a> {
    reference: &'a Reference,
    model: &'a ModelConfig,
    heads: Heads,
    moved: Option<(&'a str, &'a [f64])>,
    tensors: Exact,
}

impl Pass<'_> {
    fn move_by(&self, name: &str, values: &mut [f64]) {
        if let Some((_, by)) = self.moved.filter(|(moved, _)| *moved == name) {
            assert_eq!(values.len(), by.len(), "{name}: elements");
            values.iter_mut().zip(by).for_each(|(value, by)| *value += by);
        }
    }

    fn parameter(&self, name: String) -> Vec<f64> {
        let mut values = widen(&self.reference.floats[&name]);
        self.move_by(&name, &mut values);
        values
    }

    /// An activation, from here on.
    fn keep(&mut self, name: String, mut values: Vec<f64>) -> Vec<f64> {
        self.move_by(&name, &mut values);
        self.tensors.insert(name, values.clone());
        values
    }

    /// A result that nothing is computed from.
    fn report(&mut self, name: String, values: Vec<f64>) {
        self.tensors.insert(name, values);
    }

    fn run(&mut self) {
        let (model, words) = (self.model, &self.reference.words);
        let d = model.hidden_size;
        let embed = self.parameter("embed".into());
        let looked_up = words["ids"].iter().flat_map(|id| embed[*id as usize * d..][..d].to_vec()).collect();
        let mut x = self.keep("act.embed".into(), looked_up);
        let [mut balance, mut z] = [0.0; 2];
        for layer in 0..model.num_hidden_layers {
            let at = |what: &str| format!("layers.{layer}.{what}");
            let h = self.norm(&x, at("attn_norm"), at("act.attn_norm"));
            let attended = self.attention(&at, &h);
            x = self.keep(at("act.attn_residual"), sum(&x, &attended));
            let h = self.norm(&x, at("ffn_norm"), at("act.ffn_norm"));
            let y = if model.is_moe(layer) {
                let (y, losses) = self.moe(&at, &h);
                balance += losses[0];
                z += losses[1];
                y
            } else {
                self.feed_forward(&at, at("act.gate_up"), &h)
            };
            let y = self.keep(at("act.ffn"), y);
            x = self.keep(at("act.out"), sum(&x, &y));
        }
        let x = self.norm(&x, "final_norm".into(), "act.final_norm".into());
        let entropy = self.cross_entropy(&x);
        let balance = f64::from(model.balance_loss_coef) * balance;
        let z = f64::from(model.z_loss_coef) * z;
        for (name, loss) in
            [("ce", entropy), ("balance", balance), ("z", z), ("total", entropy + balance + z)]
        {
            self.report(format!("loss.{name}"), vec![loss]);
        }
    }

    fn norm(&mut self, x: &[f64], weight: String, name: String) -> Vec<f64> {
        let weight = self.parameter(weight);
        self.keep(name, rms_norm(x, &weight, f64::from(self.model.rms_norm_eps)))
    }

    /// The residual branch: what attention adds to the stream.
    fn attention(&mut self, at: &dyn Fn(&str) -> String, x: &[f64]) -> Vec<f64> {
        let (model, heads, length) = (self.model, self.heads, self.reference.sequence_length);
        let raw = product(x, &self.parameter(at("wqkv")), model.hidden_size);
        let mut qkv = self.keep(at("act.qkv_raw"), raw);
        if model.qk_norm {
            let (q_norm, k_norm) = (self.parameter(at("q_norm")), self.parameter(at("k_norm")));
            qkv = norm_heads(heads, &qkv, &q_norm, &k_norm, f64::from(model.rms_norm_eps));
        }
        let document_start = &self.reference.words["document_start"];
        let rows = document_start.len();
        let positions: Vec<u32> = (0..rows).map(|row| (row % length) as u32).collect();
        let qkv = rotate(heads, &qkv, &positions, &rotary_table(model, length), false);
        let qkv = self.keep(at("act.qkv"), qkv);
        let shape =
            AttentionShape { heads, sequences: rows / length, queries: length, keys: length, document_start };
        let width = heads.qkv_width();
        let [out, lse] = attention(shape, &qkv, width, &qkv[heads.q_width()..], width);
        self.report(at("act.lse"), lse);
        let out = self.keep(at("act.attention"), out);
        product(&out, &self.parameter(at("wo")), heads.q_width())
    }

    /// SwiGLU with `w13` and `w2` at `at`; `name` is that of the products with `w13`.
    fn feed_forward(&mut self, at: &dyn Fn(&str) -> String, name: String, x: &[f64]) -> Vec<f64> {
        let (w13, w2) = (self.parameter(at("w13")), self.parameter(at("w2")));
        let gate_up = self.keep(name, product(x, &w13, self.model.hidden_size));
        let ffn = w2.len() / self.model.hidden_size;
        product(&silu_product(&gate_up, ffn), &w2, ffn)
    }

    /// Routed and shared experts: their sum, and the balance loss (mean over sequences) and z-loss (mean over rows).
    fn moe(&mut self, at: &dyn Fn(&str) -> String, x: &[f64]) -> (Vec<f64>, [f64; 2]) {
        let model = self.model;
        let logits = product(x, &self.parameter(at("router")), model.hidden_size);
        let logits = self.keep(at("act.router_logits"), logits);
        let experts = self.choices(at, &logits);
        let shape = self.router_shape();
        let rows = logits.chunks_exact(shape.experts).zip(experts.chunks_exact(shape.top_k));
        let row_weights = rows.flat_map(|(logits, chosen)| weights(shape, &scores(shape, logits), chosen));
        let row_weights = row_weights.collect();
        let row_weights = self.keep(at("act.router_weights"), row_weights);

        let mut y = self.routed(at, x, &experts, &row_weights);
        if model.num_shared_experts > 0 {
            let of_shared = |what: &str| at(&format!("shared.{what}"));
            let shared = self.feed_forward(&of_shared, at("act.shared_gate_up"), x);
            y = sum(&y, &self.keep(at("act.shared"), shared));
        }
        (y, self.routing_losses(at, &logits, &experts))
    }

    fn router_shape(&self) -> RouterShape {
        let model = self.model;
        RouterShape {
            experts: model.num_experts,
            top_k: model.top_k,
            sigmoid: model.score_function == ScoreFunction::Sigmoid,
            normalize: model.normalize_top_k,
            scaling: model.routed_scaling_factor,
            groups: model.num_groups,
            top_groups: model.top_groups,
            force_balance: model.force_balance,
            sequence: self.reference.sequence_length,
        }
    }

    /// `[rows, top_k]`
    fn choices(&mut self, at: &dyn Fn(&str) -> String, logits: &[f64]) -> Vec<u32> {
        let shape = self.router_shape();
        let bias = widen(&self.reference.floats[&at("router_bias")]);
        let of_row = |(row, logits)| {
            let key = sum(&scores(shape, logits), &bias);
            choose(shape, &key, row % shape.sequence)
        };
        let experts: Vec<usize> = logits.chunks_exact(shape.experts).enumerate().flat_map(of_row).collect();
        self.report(at("act.experts"), experts.iter().map(|expert| *expert as f64).collect());
        experts.into_iter().map(|expert| expert as u32).collect()
    }

    /// The chosen experts' results, weighted and summed.
    fn routed(
        &mut self,
        at: &dyn Fn(&str) -> String,
        x: &[f64],
        experts: &[u32],
        row_weights: &[f64],
    ) -> Vec<f64> {
        let (d, top_k) = (self.model.hidden_size, self.model.top_k);
        let mut choices: Vec<usize> = (0..experts.len()).collect();
        choices.sort_by_key(|choice| experts[*choice]);
        let runs: Vec<&[usize]> = choices.chunk_by(|a, b| experts[*a] == experts[*b]).collect();
        let of_run = |what: &str, run: &[usize]| at(&format!("experts.{}.{what}", experts[run[0]]));

        let gate_up = runs.iter().flat_map(|run| {
            let inputs: Vec<f64> =
                run.iter().flat_map(|choice| x[choice / top_k * d..][..d].to_vec()).collect();
            product(&inputs, &self.parameter(of_run("w13", run)), d)
        });
        let gate_up = gate_up.collect();
        let gate_up = self.keep(at("act.expert_gate_up"), gate_up);
        let ffn = self.model.moe_intermediate_size;
        let mut y = vec![0.0; x.len()];
        let mut hidden = gate_up.chunks_exact(2 * ffn);
        for run in runs {
            let w2 = self.parameter(of_run("w2", run));
            for (choice, gate_up) in run.iter().zip(&mut hidden) {
                let row = &mut y[choice / top_k * d..][..d];
                let result = product(&silu_product(gate_up, ffn), &w2, ffn);
                row.iter_mut().zip(result).for_each(|(y, result)| *y += row_weights[*choice] * result);
            }
        }
        self.keep(at("act.routed"), y)
    }

    fn routing_losses(&mut self, at: &dyn Fn(&str) -> String, logits: &[f64], experts: &[u32]) -> [f64; 2] {
        let shape = self.router_shape();
        let (mut all_counts, mut losses) = (Vec::new(), [const { Vec::new() }; 3]);
        let sequences = logits.chunks_exact(shape.sequence * shape.experts);
        for (logits, experts) in sequences.zip(experts.chunks_exact(shape.sequence * shape.top_k)) {
            let mut counts = vec![0; shape.experts];
            experts.iter().for_each(|expert| counts[*expert as usize] += 1);
            let of_sequence = balance_z_entropy(shape, logits, &counts);
            losses.iter_mut().zip(of_sequence).for_each(|(losses, loss)| losses.push(loss));
            all_counts.extend(counts.into_iter().map(f64::from));
        }
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let means = [mean(&losses[0]), mean(&losses[1]) / shape.sequence as f64];
        self.report(at("act.counts"), all_counts);
        for (name, losses) in ["balance_loss", "z_loss", "entropy"].into_iter().zip(losses) {
            self.report(at(&format!("act.{name}")), losses);
        }
        means
    }

    /// The mean over the targets that count.
    fn cross_entropy(&mut self, x: &[f64]) -> f64 {
        let (model, targets) = (self.model, &self.reference.words["targets"]);
        let table = self.parameter(if model.tie_embeddings { "embed" } else { "head" }.into());
        let logits = x.chunks_exact(model.hidden_size).flat_map(|x| {
            table.chunks_exact(model.hidden_size).map(|entry| dot(x, entry)).collect::<Vec<_>>()
        });
        let logits = logits.collect();
        let logits = self.keep("act.logits".into(), logits);
        let of_row = |(logits, target): (&[f64], &u32)| match *target {
            IGNORE => 0.0,
            target => log_sum_exp(logits) - logits[target as usize],
        };
        let losses: Vec<f64> = logits.chunks_exact(model.vocab_size).zip(targets).map(of_row).collect();
        let counted = targets.iter().filter(|target| **target != IGNORE).count();
        let mean = losses.iter().sum::<f64>() / counted as f64;
        self.report("loss.per_token".into(), losses);
        mean
    }
}

fn sum(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// Cosines, then sines of every position.
fn rotary_table(model: &ModelConfig, positions: usize) -> Vec<f64> {
    let half = model.head_dim / 2;
    let angle = |position: usize, i: usize| {
        position as f64 * f64::from(model.rope_theta).powf(-(i as f64) / half as f64)
    };
    let of_position = |position| {
        let angles: Vec<f64> = (0..half).map(|i| angle(position, i)).collect();
        let (cosines, sines) = (angles.iter().map(|a| a.cos()), angles.iter().map(|a| a.sin()));
        cosines.chain(sines).collect::<Vec<_>>()
    };
    (0..positions).flat_map(of_position).collect()
}
