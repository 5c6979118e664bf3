//! Dense models to hold a sparse one against, and ways of synchronising that ours replaces.

use crate::architecture::{Architecture, Pattern};
use crate::hardware::Cluster;
use crate::parallelism::Parallelism;
use crate::pricing::Priced;

impl Architecture {
    /// The same model without experts: every layer has one feed-forward network, so wide that the model has about
    /// `parameters`. `None` if attention and embeddings alone have more, or there are no experts to replace.
    pub fn dense_twin(&self, parameters: f64) -> Option<Self> {
        self.moe?;
        if self.state_space.is_some() {
            return None;
        }
        let mut dense = Self {
            moe: None,
            ffn_dense: 0,
            pattern: Pattern::Uniform { first_dense: self.layers, moe_every: 1 },
            mtp_layers: 0,
            ..self.clone()
        };
        let rest = parameters - dense.parameters() as f64;
        let a_unit = (self.layers * self.ffn_matrices() * self.hidden) as f64;
        // Widths are whole multiples of 256, as kernels like them.
        dense.ffn_dense = (rest / a_unit / 256.0).round().max(0.0) as usize * 256;
        dense.name = format!("{} dense, {:.0} B", self.name, dense.parameters() as f64 / 1e9);
        (dense.ffn_dense > 0).then_some(dense)
    }
}

/// Other ways to join what replicas computed, as seconds that each adds to a step in place of our reduction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Synchronisation {
    /// Ours, what nothing hides of it.
    pub ours_s: f64,
    /// MapReduce's way: every replica sends all gradients to one place, which merges them and hands parameters out.
    pub merge_at_one_s: f64,
    /// A parameter server on one host of every eight, each with an equal share of the parameters.
    pub parameter_server_s: f64,
}

/// One host of so many is a parameter server.
const REPLICAS_A_SERVER: f64 = 8.0;

impl Synchronisation {
    /// Of a priced layout: `gradients` of a rank cross a network card in, 16-bit parameters out, one after the other.
    pub fn of(priced: &Priced, layout: &Parallelism, cluster: &Cluster) -> Self {
        let network = &cluster.levels[cluster.levels.len() - 1];
        let replicas = (layout.data * layout.context) as f64;
        let bytes = priced.memory.gradients + priced.memory.weights;
        let one = (replicas - 1.0) * bytes / network.shared_bytes_per_s();
        let servers = (replicas / REPLICAS_A_SERVER).max(1.0);
        Self { ours_s: priced.breakdown.data_s, merge_at_one_s: one, parameter_server_s: one / servers }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dense_twin_has_the_parameters_asked_for() {
        let model = Architecture::built_in("DeepSeek-V3").unwrap();
        for wanted in [model.parameters() as f64, model.active_parameters() as f64] {
            let dense = model.dense_twin(wanted).unwrap();
            assert!((dense.parameters() as f64 / wanted - 1.0).abs() < 0.01, "{}", dense.name);
            assert_eq!(dense.active_parameters(), dense.parameters());
        }
        assert_eq!(model.dense_twin(1e6), None);
        assert_eq!(Architecture::built_in("Llama-3.1-8B").unwrap().dense_twin(1e10), None);
    }
}
