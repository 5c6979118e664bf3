//! Dense models to hold a sparse one against, and ways of synchronising that ours replaces.

use crate::architecture::{Architecture, Pattern};
use crate::hardware::Cluster;
use crate::parallelism::Parallelism;
use crate::pricing::Priced;
use crate::ranged::Ranged;

/// What a dense model has in common with the sparse one that it is held against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Equal {
    /// All parameters.
    Total,
    /// Quality, by a rule of thumb: as many parameters as the geometric mean of all and the active ones.
    ///
    /// Said of Mixtral in talks, fitted to nothing. What was published needs 1 to 3 times that: DeepSeekMoE of 16.4 B (2.8 B active;
    /// arXiv:2401.06066) does as well as 7 B where the rule says 6.8; Ling-mini-beta of 17.5 B (0.85 B; arXiv:2507.17702) as 6.1 B
    /// on the same tokens where it says 3.9; Mixtral 8x7B of 46.7 B (12.9 B; arXiv:2401.04088) as 70 B of other data where it says 25.
    Quality,
    /// Active parameters, and so operations a token.
    Active,
}

impl Equal {
    /// All of them, the largest models first.
    pub const ALL: [Self; 3] = [Self::Total, Self::Quality, Self::Active];

    /// What is equal, in a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Total => "total",
            Self::Quality => "quality",
            Self::Active => "active",
        }
    }

    /// Parameters of the dense model.
    pub fn parameters(self, sparse: &Architecture) -> f64 {
        let (total, active) = (sparse.parameters() as f64, sparse.active_parameters() as f64);
        match self {
            Self::Total => total,
            Self::Quality => (total * active).sqrt(),
            Self::Active => active,
        }
    }
}

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

    /// Seconds of a step that synchronises in `theirs_s` instead. Only the rest of the step is uncertain: theirs are bytes over a
    /// rate.
    pub fn step_with(&self, priced: &Priced, theirs_s: f64) -> Ranged {
        priced.step().growing(priced.step_s - self.ours_s).plus(theirs_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dense_twin_has_the_parameters_asked_for() {
        let model = Architecture::built_in("DeepSeek-V3").unwrap();
        for equal in Equal::ALL {
            let wanted = equal.parameters(&model);
            let dense = model.dense_twin(wanted).unwrap();
            assert!((dense.parameters() as f64 / wanted - 1.0).abs() < 0.01, "{}", dense.name);
            assert_eq!(dense.active_parameters(), dense.parameters());
        }
        let quality = Equal::Quality.parameters(&model);
        assert!((quality / (671.0e9f64 * 37.6e9).sqrt() - 1.0).abs() < 0.02, "{quality}");
        assert_eq!(model.dense_twin(1e6), None);
        assert_eq!(Architecture::built_in("Llama-3.1-8B").unwrap().dense_twin(1e10), None);
    }
}
