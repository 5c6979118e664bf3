//! Models known by name: facts of `data/models.csv`, each with its source.

use super::{Architecture, Attention, MoeShape, Pattern, StateSpace, Window};
use crate::table::{Row, Table};

const MODELS: &str = include_str!("../../data/models.csv");

/// A name that is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("model {name:?} is not known; nearest: {nearest}")]
pub struct UnknownModel {
    /// The name.
    pub name: String,
    /// The most similar known name.
    pub nearest: String,
}

impl Architecture {
    /// Every model known by name.
    pub fn all_built_in() -> Vec<Self> {
        Self::read_table(MODELS)
    }

    /// The known model of this name; case, dashes and dots do not matter.
    ///
    /// # Errors
    /// Names the most similar known model.
    pub fn built_in(name: &str) -> Result<Self, UnknownModel> {
        let wanted = plain(name);
        let mut models = Self::all_built_in();
        if let Some(at) = models.iter().position(|model| plain(&model.name) == wanted) {
            return Ok(models.swap_remove(at));
        }
        let nearest =
            models.iter().map(|model| &model.name).min_by_key(|known| distance(&plain(known), &wanted));
        Err(UnknownModel { name: name.to_string(), nearest: nearest.cloned().unwrap_or_default() })
    }

    /// Reads a table of architectures with the columns of `data/models.csv`. What a row leaves empty is taken from the
    /// known model of the same `model_key`; rows without layers, hidden width or heads, and those too large to be planned, are
    /// left out.
    pub fn read_table(text: &str) -> Vec<Self> {
        let known = Table::parse(MODELS);
        let table = Table::parse(text);
        let find = |key: &str| known.rows().find(|row| row.text("model_key") == key);
        let models = table.rows().filter_map(|row| read(&Facts { row, known: find(row.text("model_key")) }));
        models.filter(|model| model.check_size().is_ok()).collect()
    }
}

struct Facts<'a> {
    row: Row<'a>,
    known: Option<Row<'a>>,
}

impl Facts<'_> {
    fn text(&self, column: &str) -> &str {
        let own = self.row.text(column);
        if own.is_empty() { self.known.map_or("", |row| row.text(column)) } else { own }
    }

    fn count(&self, column: &str) -> Option<usize> {
        let own = self.row.count(column);
        own.or_else(|| self.known.and_then(|row| row.count(column))).map(|count| count as usize)
    }

    fn is_true(&self, column: &str) -> bool {
        self.text(column).eq_ignore_ascii_case("true")
    }
}

fn read(facts: &Facts<'_>) -> Option<Architecture> {
    let hidden = facts.count("hidden")?;
    let heads = facts.count("heads")?;
    let letters = facts.text("pattern");
    let pattern = match letters.is_empty() {
        true => Pattern::Uniform {
            first_dense: facts.count("dense_first_layers").unwrap_or(0),
            moe_every: facts.count("moe_every").unwrap_or(1),
        },
        false => Pattern::Letters(letters.to_string().into()),
    };
    Some(Architecture {
        name: facts.text("model_key").to_string(),
        layers: facts.count("layers")?,
        hidden,
        vocab: facts.count("vocab").unwrap_or(0),
        tied_embeddings: facts.is_true("tie_embeddings"),
        gated: facts.text("glu").is_empty() || facts.text("glu").contains("glu"),
        attention: attention(facts, heads, hidden),
        qk_norm: facts.is_true("qk_norm"),
        window: facts.count("window").map(|tokens| Window {
            tokens,
            first: 0,
            every: facts.count("window_every").unwrap_or(1),
        }),
        ffn_dense: facts.count("ffn_dense").unwrap_or(4 * hidden),
        moe: moe(facts),
        state_space: facts.count("state_heads").map(|heads| StateSpace {
            heads,
            head_dim: facts.count("state_head_dim").unwrap_or(64),
            state: facts.count("state_dim").unwrap_or(128),
            groups: facts.count("state_groups").unwrap_or(1),
        }),
        pattern,
        parallel_blocks: false,
        mtp_layers: facts.count("mtp_layers").unwrap_or(0),
        expert_biases: facts.is_true("expert_biases"),
    })
}

fn attention(facts: &Facts<'_>, heads: usize, hidden: usize) -> Attention {
    let head_dim = facts.count("head_dim").unwrap_or(hidden / heads);
    match (facts.count("kv_lora_rank"), facts.count("qk_nope_dim"), facts.count("qk_rope_dim")) {
        (Some(kv_lora_rank), Some(nope), Some(rope)) => Attention::Latent {
            heads,
            q_lora_rank: facts.count("q_lora_rank"),
            kv_lora_rank,
            nope,
            rope,
            value: facts.count("v_dim").unwrap_or(nope),
        },
        _ => Attention::Grouped { heads, kv_heads: facts.count("kv_heads").unwrap_or(heads), head_dim },
    }
}

fn moe(facts: &Facts<'_>) -> Option<MoeShape> {
    let expert_ffn = facts.count("moe_ffn").or_else(|| facts.count("ffn_dense"))?;
    let shared = facts.count("n_shared_experts").unwrap_or(0) * expert_ffn;
    Some(MoeShape {
        experts: facts.count("n_routed_experts")?,
        top_k: facts.count("topk")?,
        expert_ffn,
        shared_ffn: facts.count("shared_ffn").unwrap_or(shared),
        groups: facts.count("n_group").unwrap_or(1),
        top_groups: facts.count("topk_group").unwrap_or(1),
        latent: facts.count("moe_latent"),
    })
}

fn plain(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
}

/// Levenshtein's distance.
pub(crate) fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let changed = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_in_any_spelling_and_misspelt_ones_get_the_nearest() {
        assert_eq!(Architecture::built_in("deepseek_v3").unwrap().name, "DeepSeek-V3");
        let error = Architecture::built_in("deepsek-v4").unwrap_err();
        assert_eq!(error.to_string(), "model \"deepsek-v4\" is not known; nearest: DeepSeek-V3");
        assert_eq!(Architecture::all_built_in().len(), 59);
    }

    #[test]
    fn a_table_may_leave_out_what_is_known() {
        let read =
            Architecture::read_table("model_key,layers,hidden,heads\nMoonlight-16B-A3B,27,,\nnone,,,\n");
        assert_eq!(read, [Architecture::built_in("Moonlight-16B-A3B").unwrap()]);
    }

    #[test]
    fn letters_name_every_layer() {
        for model in Architecture::all_built_in() {
            if let Pattern::Letters(letters) = &model.pattern {
                assert_eq!(letters.len(), model.layers, "{}", model.name);
            }
        }
    }
}
