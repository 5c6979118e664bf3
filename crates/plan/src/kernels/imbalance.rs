//! What skewed routing costs the experts.

use std::sync::LazyLock;

/// Exponents of the measured power laws; 0 is balanced.
const EXPONENTS: [f64; 2] = [1.01, 1.2];
/// Ranks 2^0 to 2^8 by rows an expert 2^5 to 2^10.
const RANKS: usize = 9;
const ROWS: usize = 6;
const FIRST_ROWS_LOG2: f64 = 5.0;

/// Time of the slowest rank's experts relative to balanced routing, by exponent, ranks, rows an expert.
static RATIOS: LazyLock<Vec<f64>> = LazyLock::new(|| {
    let text = include_str!("../../data/imbalance.txt");
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.starts_with("table"));
    lines
        .flat_map(|line| line.split(' ').filter_map(|word| word.parse::<f64>().ok()))
        .map(|r| r / 100.0)
        .collect()
});

/// Time of the experts of the slowest rank when popularity falls as a power of the expert's rank, over the time when all
/// experts get `rows_an_expert` rows. Measured on `ranks` expert-parallel ranks for exponents 1.01 and 1.2 (medians over
/// kernels and GPUs); linear between these and balanced routing, and outwards from the last two.
pub fn imbalance(exponent: f64, ranks: usize, rows_an_expert: f64) -> f64 {
    let ranks = (ranks.max(1) as f64).log2().min((RANKS - 1) as f64);
    let rows = (rows_an_expert.max(1.0).log2() - FIRST_ROWS_LOG2).clamp(0.0, (ROWS - 1) as f64);
    let at = |law: usize| {
        let (i, j) = (ranks.min((RANKS - 2) as f64) as usize, rows.min((ROWS - 2) as f64) as usize);
        let (u, v) = (ranks - i as f64, rows - j as f64);
        let node = |i: usize, j: usize| RATIOS[(law * RANKS + i) * ROWS + j];
        let low = node(i, j) + v * (node(i, j + 1) - node(i, j));
        let high = node(i + 1, j) + v * (node(i + 1, j + 1) - node(i + 1, j));
        low + u * (high - low)
    };
    if exponent <= 0.0 {
        return 1.0;
    }
    if exponent <= EXPONENTS[0] {
        return 1.0 + (at(0) - 1.0) * exponent / EXPONENTS[0];
    }
    at(0) + (at(1) - at(0)) * (exponent - EXPONENTS[0]) / (EXPONENTS[1] - EXPONENTS[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skew_costs_more_with_every_rank_and_nothing_when_balanced() {
        assert_eq!(RATIOS.len(), 2 * RANKS * ROWS);
        assert_eq!(imbalance(0.0, 64, 512.0), 1.0);
        let mut last = 1.0;
        for ranks in [1, 2, 6, 8, 64, 100, 256, 512] {
            let ratio = imbalance(1.2, ranks, 256.0);
            assert!(ratio >= last, "{ranks} ranks: {ratio} after {last}");
            last = ratio;
        }
        // DeepSeek-V3 on 64 ranks, 8,192 tokens: measured 2.7 (1.01) and 4.0 (1.2).
        assert!((2.0..3.5).contains(&imbalance(1.01, 64, 256.0)));
        assert!((3.0..5.0).contains(&imbalance(1.2, 64, 256.0)));
    }
}
