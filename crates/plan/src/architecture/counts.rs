//! Parameters and floating-point operations of an architecture.

use super::{Architecture, LayerKind, Mixer, WeightGroup};

/// Parameters of a layer by how they are laid out. Biases are left out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerParameters {
    /// Matrices of attention or state space that tensor parallelism splits.
    pub mixer: usize,
    /// Matrices that every tensor rank holds whole: low-rank projections of latent attention.
    pub mixer_replicated: usize,
    /// Dense feed-forward network and shared experts.
    pub ffn: usize,
    /// Routed experts, all of them.
    pub experts: usize,
    /// Router and projections to the experts' width.
    pub router: usize,
    /// Norms.
    pub norms: usize,
}

impl LayerParameters {
    /// All parameters.
    pub fn total(&self) -> usize {
        self.dense() + self.experts
    }

    /// All but the routed experts.
    pub fn dense(&self) -> usize {
        self.mixer + self.mixer_replicated + self.ffn + self.router + self.norms
    }
}

impl Architecture {
    /// Matrices of a feed-forward network: gate, up, down.
    pub fn ffn_matrices(&self) -> usize {
        if self.gated { 3 } else { 2 }
    }

    /// Width in which tokens travel to experts.
    pub fn dispatch_width(&self) -> usize {
        self.moe.and_then(|moe| moe.latent).unwrap_or(self.hidden)
    }

    /// Parameters of a layer of `kind`.
    pub fn layer_parameters(&self, kind: LayerKind) -> LayerParameters {
        let mut of = LayerParameters::default();
        for weight in self.layer_weights(kind) {
            let sum = match weight.group {
                WeightGroup::Mixer => &mut of.mixer,
                WeightGroup::MixerReplicated => &mut of.mixer_replicated,
                WeightGroup::Network => &mut of.ffn,
                WeightGroup::Experts => &mut of.experts,
                WeightGroup::Router => &mut of.router,
                WeightGroup::Norm => &mut of.norms,
            };
            *sum += weight.elements();
        }
        of
    }

    /// Parameters of the embedding; the head has as many, unless it is the embedding.
    pub fn embedding_parameters(&self) -> usize {
        self.vocab * self.hidden
    }

    /// All parameters without multi-token prediction, as models are named by.
    pub fn parameters(&self) -> usize {
        let layers: usize = (0..self.layers).map(|l| self.layer_parameters(self.kind(l)).total()).sum();
        let tables = if self.tied_embeddings { 1 } else { 2 };
        layers + tables * self.embedding_parameters() + self.hidden
    }

    /// Parameters that one token visits, embedding and head included, without multi-token prediction.
    pub fn active_parameters(&self) -> usize {
        let idle = |layer| {
            let experts = self.layer_parameters(self.kind(layer)).experts;
            self.moe.map_or(0, |moe| experts - experts / moe.experts * moe.top_k)
        };
        self.parameters() - (0..self.layers).map(idle).sum::<usize>()
    }

    /// Keys that a query of layer `layer` meets on average in `sequence` tokens.
    pub fn mean_context(&self, layer: usize, sequence: usize, causal: bool) -> f64 {
        let length = sequence as f64;
        let full = if causal { length / 2.0 } else { length };
        match self.window {
            Some(window) if self.is_windowed(layer) && window.tokens < sequence => {
                let width = window.tokens as f64;
                full.min(width - width * width / (2.0 * length))
            }
            _ => full,
        }
    }

    /// Floating-point operations of one token's forward and backward pass at `sequence` tokens: a multiply-add counts two,
    /// the backward twice the forward, recomputation not at all; with multi-token prediction, its layer and its head too.
    /// `causal` counts only the keys that a token may see.
    pub fn train_flops(&self, sequence: usize, causal: bool, with_mtp: bool) -> f64 {
        let extra = if with_mtp { self.mtp_layers } else { 0 };
        let layers: f64 =
            (0..self.layers + extra).map(|layer| self.layer_flops(layer, sequence, causal)).sum();
        let d = self.hidden as f64;
        let heads = (1 + extra) as f64 * d * self.vocab as f64 + extra as f64 * 2.0 * d * d;
        3.0 * (layers + 2.0 * heads)
    }

    /// Operations of one token's forward pass through layer `layer`.
    pub fn layer_flops(&self, layer: usize, sequence: usize, causal: bool) -> f64 {
        let kind = self.kind(layer);
        let of = self.layer_parameters(kind);
        let routed = self.moe.map_or(0, |moe| of.experts / moe.experts * moe.top_k);
        let weights = of.dense() - of.norms + routed;
        let mixing = match kind.mixer {
            Mixer::None => 0.0,
            Mixer::Attention => {
                let width = self.attention.heads() * (self.attention.qk_dim() + self.attention.v_dim());
                2.0 * self.mean_context(layer, sequence, causal) * width as f64
            }
            // States are written and read: two products of state and head for each element.
            Mixer::StateSpace => {
                self.state_space.map_or(0.0, |s| (6 * s.heads * s.head_dim * s.state) as f64)
            }
        };
        2.0 * weights as f64 + mixing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn near(value: f64, expected: f64, relative: f64) {
        assert!((value / expected - 1.0).abs() < relative, "{value} instead of {expected}");
    }

    #[test]
    fn parameters_are_those_that_models_are_named_by() {
        // Model, all parameters and those of a token in units of 1e9, as their reports state them.
        let cases = [
            ("DeepSeek-V3", 671.0, 37.5),
            ("DeepSeek-V2", 235.7, 21.4),
            ("Kimi-K2", 1026.0, 32.9),
            ("Qwen3-235B-A22B", 235.1, 22.2),
            ("Qwen3-30B-A3B", 30.5, 3.35),
            ("Mixtral-8x7B", 46.7, 12.9),
            ("Mixtral-8x22B", 140.6, 39.2),
            ("Llama-3.1-405B", 405.9, 405.9),
            ("Llama-3.1-8B", 8.03, 8.03),
            ("GPT3-175B", 174.6, 174.6),
            ("GPT-OSS-120B", 116.8, 5.7),
            ("Llama-4-Maverick", 400.7, 17.2),
            ("Qwen2-57B-A14B", 57.4, 14.2),
            ("Moonlight-16B-A3B", 15.96, 2.9),
            ("Nemotron-3-Nano-30B", 31.6, 3.6),
            ("Nemotron-3-Super-120B", 120.6, 12.7),
        ];
        for (name, total, active) in cases {
            let model = Architecture::built_in(name).unwrap();
            println!("{name} {} {}", model.parameters() as f64 / 1e9, model.active_parameters() as f64 / 1e9);
            near(model.parameters() as f64 / 1e9, total, 0.015);
            near(model.active_parameters() as f64 / 1e9, active, 0.04);
        }
    }

    #[test]
    fn operations_a_token_match_published_ones() {
        let giga = |name: &str, causal, mtp| {
            Architecture::built_in(name).unwrap().train_flops(4096, causal, mtp) / 1e9
        };
        near(giga("DeepSeek-V3", true, true), 260.6, 0.001);
        near(giga("DeepSeek-V3", true, false), 250.4, 0.001);
        near(giga("DeepSeek-V3", false, false), 281.2, 0.001);
        near(giga("Qwen3-235B-A22B", true, false), 148.3, 0.001);
        near(giga("Qwen3-30B-A3B", true, false), 23.1, 0.002);
    }
}
