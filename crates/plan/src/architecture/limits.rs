//! Sizes beyond which nothing is planned: products of sizes stay below 2^53, and no loop over layers or experts takes long.

use super::{Architecture, Attention};

/// The most layers.
pub(crate) const MOST_LAYERS: usize = 10_000;
/// The largest width or count.
pub(crate) const LARGEST_SIZE: usize = 1 << 24;
/// The most experts of all layers together.
const MOST_EXPERTS: usize = 1 << 18;
/// The most parameters.
const MOST_PARAMETERS: f64 = 1e15;

/// An architecture that is too large to be planned.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("the model has {value:.4e} {what}; at most {most:.4e} are planned")]
pub struct SizeError {
    /// What there is too much of.
    pub what: &'static str,
    /// How much.
    pub value: f64,
    /// How much may be.
    pub most: f64,
}

impl Architecture {
    /// Checks that the architecture is no larger than what is planned.
    ///
    /// # Errors
    /// Names what there is too much of.
    pub fn check_size(&self) -> Result<(), SizeError> {
        let layers = self.layers as f64 + self.mtp_layers as f64;
        let experts = layers * self.moe.map_or(0.0, |moe| moe.experts as f64);
        at_most("layers", layers, MOST_LAYERS as f64)?;
        at_most("experts in all layers", experts, MOST_EXPERTS as f64)?;
        at_most("parameters", self.parameters_at_most(), MOST_PARAMETERS)
    }

    /// Not fewer parameters than there are, in numbers that do not overflow. The mixer's products count twice: latent attention
    /// goes through two widths.
    fn parameters_at_most(&self) -> f64 {
        let (hidden, layers) = (self.hidden as f64, self.layers as f64 + self.mtp_layers as f64);
        let ranks = match self.attention {
            Attention::Grouped { .. } => 0.0,
            Attention::Latent { q_lora_rank, kv_lora_rank, .. } => {
                q_lora_rank.unwrap_or(0) as f64 + kv_lora_rank as f64
            }
        };
        let head = self.attention.qk_dim() as f64 + self.attention.v_dim() as f64;
        let attention = 2.0 * (hidden + ranks) * (self.attention.heads() as f64 * head + ranks);
        let state_space = self.state_space.map_or(0.0, |of| {
            let inner = of.heads as f64 * of.head_dim as f64;
            hidden * (3.0 * inner + 2.0 * of.groups as f64 * of.state as f64)
        });
        let matrices = self.ffn_matrices() as f64;
        let experts = self.moe.map_or(0.0, |moe| {
            let width = moe.latent.unwrap_or(self.hidden) as f64;
            moe.experts as f64 * (matrices * width * moe.expert_ffn as f64 + hidden)
                + matrices * hidden * moe.shared_ffn as f64
        });
        let dense = matrices * hidden * self.ffn_dense as f64;
        layers * (attention + state_space + experts.max(dense)) + 2.0 * hidden * self.vocab as f64
    }
}

fn at_most(what: &'static str, value: f64, most: f64) -> Result<(), SizeError> {
    if value <= most { Ok(()) } else { Err(SizeError { what, value, most }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_is_planned_and_no_size_overflows() {
        for model in Architecture::all_built_in() {
            model.check_size().unwrap();
            let (bound, exact) = (model.parameters_at_most(), model.parameters() as f64);
            assert!(bound > 0.9 * exact && bound < 3.0 * exact, "{}: {bound} for {exact}", model.name);
        }
        let said = |change: &dyn Fn(&mut Architecture)| {
            let mut model = Architecture::built_in("Mixtral-8x7B").unwrap();
            change(&mut model);
            model.check_size().unwrap_err().to_string()
        };
        assert_eq!(
            said(&|model| model.layers = 10_001),
            "the model has 1.0001e4 layers; at most 1.0000e4 are planned"
        );
        let all = said(&|model| model.moe.as_mut().unwrap().experts = LARGEST_SIZE);
        assert!(all.contains("experts in all layers"), "{all}");
        assert!(said(&|model| model.ffn_dense = usize::MAX).contains("parameters"));
    }
}
