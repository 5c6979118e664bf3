//! Seconds that a kernel takes on a GPU: the roofline of its operations and bytes, over an efficiency interpolated from
//! published measurements (`scripts/distil-kernels`).

mod grid;
mod imbalance;

use std::fmt;
use std::sync::LazyLock;

use crate::calibration::BORROWED_SPREAD;
use crate::hardware::Gpu;
use crate::precision::Precision;
use grid::Grid;

pub use imbalance::imbalance;

static GEMM: LazyLock<Vec<Grid>> = LazyLock::new(|| Grid::parse_all(include_str!("../data/gemm.txt")));
static ATTENTION: LazyLock<Vec<Grid>> =
    LazyLock::new(|| Grid::parse_all(include_str!("../data/attention.txt")));
static GROUPED: LazyLock<Vec<Grid>> = LazyLock::new(|| Grid::parse_all(include_str!("../data/grouped.txt")));

/// Operations of attention's backward over its forward: five products instead of two.
const BACKWARD_WORK: f64 = 2.5;

/// Efficiency of attention's backward over its forward; FlashAttention-3 (Shah et al., 2024, figures 5 and 6), head width
/// 128, causal: about 0.8 at 4k to 16k tokens. No backward is in the measured tables.
const BACKWARD_EFFICIENCY: f64 = 0.8;

/// Fixed seconds of a kernel that only moves memory: the least measured time of a product, about what a launch costs.
const LAUNCH_S: f64 = 2e-6;

/// GPUs without tables: whose efficiency they borrow, and times what. AMD's factor is the ratio of the best rates found by
/// search (mamf of stas00/ml-engineering) relative to peak: MI300X 668/1307 against H100 795/989, MI355X 1565/2500 against
/// B200 1745/2250; MI325X has the compute die of MI300X.
const SIBLINGS: [(&str, &str, f64); 5] = [
    ("H800", "H100", 1.0),
    ("H20", "H100", 1.0),
    ("MI300X", "H100", 0.64),
    ("MI325X", "H100", 0.64),
    ("MI355X", "B200", 0.81),
];

/// Pairs of GPUs with nearly the same die.
const SAME_DIE: [&str; 1] = ["H800"];

/// The GPU whose measurements stand for `gpu`'s, and the factor on its efficiency.
pub(crate) fn sibling(gpu: &str) -> (&str, f64) {
    SIBLINGS.iter().find(|(name, ..)| *name == gpu).map_or((gpu, 1.0), |&(_, from, factor)| (from, factor))
}

/// Where an efficiency comes from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Origin {
    /// Measured on this GPU in this precision.
    Measured,
    /// Measured on another GPU or in another precision.
    Borrowed {
        /// The GPU.
        gpu: &'static str,
        /// The precision.
        precision: &'static str,
        /// What its efficiency is multiplied by.
        factor: f64,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Measured => f.write_str("measured"),
            Self::Borrowed { gpu, precision, factor } if *factor == 1.0 => {
                write!(f, "borrowed from {gpu} in {precision}")
            }
            Self::Borrowed { gpu, precision, factor } => {
                write!(f, "borrowed from {gpu} in {precision}, times {factor}")
            }
        }
    }
}

/// Kernels with tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// A product of two matrices.
    Gemm,
    /// Products of experts, one for each.
    GroupedGemm,
    /// Fused attention.
    Attention,
}

/// Sizes of fused attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// Sequences.
    pub batch: usize,
    /// Query tokens of a sequence.
    pub queries: usize,
    /// Key tokens of a sequence.
    pub keys: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a query or key head.
    pub qk_dim: usize,
    /// Elements of a value head.
    pub v_dim: usize,
    /// Whether tokens see only earlier ones. Queries are spread evenly over the keys, so that half of all pairs is seen.
    pub causal: bool,
    /// Keys that a query sees at most.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// Pairs of query and key of one head and sequence.
    pub fn pairs(&self) -> f64 {
        let (queries, keys) = (self.queries as f64, self.keys as f64);
        let window = self.window.map_or(keys, |window| (window as f64).min(keys));
        // The first `window` tokens of a causal sequence see fewer than `window`.
        let seen = if self.causal { window * (1.0 - window / (2.0 * keys)) } else { window };
        queries * seen
    }

    fn forward_flops(&self) -> f64 {
        2.0 * self.batch as f64 * self.heads as f64 * self.pairs() * (self.qk_dim + self.v_dim) as f64
    }
}

/// Sizes of a product and what it computes and moves, at least.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Product {
    /// Rows in all, columns, and length of the sums.
    pub sizes: [f64; 3],
    /// Matrices of weights that rows are spread over.
    pub experts: f64,
    /// Operations: a multiply-add is two.
    pub flops: f64,
    /// Bytes of operands and result.
    pub bytes: f64,
}

impl Product {
    /// `[m, k] x [k, n]` with operands in `precision` and the result in 16 bits.
    pub fn single(m: f64, n: f64, k: f64, precision: Precision) -> Self {
        Self::grouped(m, 1.0, n, k, precision)
    }

    /// `rows` in all, spread evenly over `experts` matrices `[k, n]`.
    pub fn grouped(rows: f64, experts: f64, n: f64, k: f64, precision: Precision) -> Self {
        let bytes = precision.bytes() * k * (experts * n + rows) + 2.0 * rows * n;
        Self { sizes: [rows, n, k], experts, flops: 2.0 * rows * n * k, bytes }
    }
}

/// Forward or backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// Forward.
    Forward,
    /// Backward, with what it computes again.
    Backward,
}

/// A table and the factor on it.
#[derive(Debug, Clone, Copy)]
struct Source {
    grid: &'static Grid,
    factor: f64,
    origin: Origin,
}

impl Source {
    /// The table of this GPU and precision, else of the sibling, else of the next wider precision, else of H100 in bf16.
    fn of(grids: &'static [Grid], gpu: &Gpu, precision: Precision) -> Self {
        let (from, factor) = sibling(gpu.name);
        let found = |gpu: &str, name: &str| grids.iter().find(|g| g.gpu == gpu && g.precision == name);
        let names = substitutes(precision);
        let own = names.iter().find_map(|name| found(from, name));
        let grid = own.or_else(|| names.iter().find_map(|name| found("H100", name))).unwrap_or(&grids[0]);
        let measured = grid.gpu == gpu.name && !gpu.described && grid.precision == names[0];
        let origin = match measured {
            true => Origin::Measured,
            false => Origin::Borrowed { gpu: &grid.gpu, precision: &grid.precision, factor },
        };
        Self { grid, factor, origin }
    }

    fn efficiency(&self, sizes: [f64; 3]) -> f64 {
        self.factor * self.grid.at(sizes)
    }
}

/// Names of tables for a precision, best first.
fn substitutes(precision: Precision) -> &'static [&'static str] {
    match precision {
        Precision::F32 | Precision::F16 | Precision::Bf16 => &["bf16"],
        Precision::Fp8 => &["fp8", "bf16"],
        Precision::Mxfp8 => &["mxfp8", "fp8", "bf16"],
        Precision::Nvfp4 => &["nvfp4", "mxfp8", "fp8", "bf16"],
    }
}

/// What kernels take on one GPU. Outside the measured sizes the efficiency is that of the nearest measured one, and no
/// product is faster than the fastest measured.
#[derive(Debug, Clone)]
pub struct KernelModel {
    gpu: Gpu,
    memory_efficiency: f64,
    gemm: [Source; Precision::ALL.len()],
    grouped: [Source; Precision::ALL.len()],
    attention: [Source; Precision::ALL.len()],
}

impl KernelModel {
    /// The model of a GPU. Cheap: tables are read once in a process.
    pub fn of(gpu: &Gpu) -> Self {
        let sources = |grids: &'static [Grid]| Precision::ALL.map(|p| Source::of(grids, gpu, p));
        let gemm = sources(&GEMM);
        // A product with 64 rows only streams its weights: 1 GiB of them.
        let memory_efficiency = gemm[Precision::Bf16 as usize].grid.at([64.0, 65_536.0, 8192.0]);
        Self {
            gpu: *gpu,
            memory_efficiency,
            gemm,
            grouped: sources(&GROUPED),
            attention: sources(&ATTENTION),
        }
    }

    /// Where the efficiency of a kernel comes from.
    pub fn origin(&self, kernel: Kernel, precision: Precision) -> Origin {
        match kernel {
            Kernel::Gemm => self.gemm[precision as usize].origin,
            Kernel::GroupedGemm => self.grouped[precision as usize].origin,
            Kernel::Attention => self.attention[precision as usize].origin,
        }
    }

    /// Standard deviation of the logarithm of a kernel's seconds because its efficiency is another GPU's or another format's.
    pub fn borrowed_spread(&self, kernel: Kernel, precision: Precision) -> f64 {
        let [same, other] = BORROWED_SPREAD;
        match self.origin(kernel, precision) {
            Origin::Measured => 0.0,
            Origin::Borrowed { precision: from, .. } => {
                let same_format = substitutes(precision).first() == Some(&from);
                let same_die = SAME_DIE.contains(&self.gpu.name) && !self.gpu.described;
                if same_die && same_format { same } else { other }
            }
        }
    }

    /// Seconds of a product `[m, k] x [k, n]` with operands in `precision` and the result in 16 bits.
    pub fn gemm(&self, m: usize, n: usize, k: usize, precision: Precision) -> f64 {
        let (m, n, k) = (m.max(1) as f64, n.max(1) as f64, k.max(1) as f64);
        let source = &self.gemm[precision as usize];
        let product = Product::single(m, n, k, precision);
        let roofline = self.roofline(product.flops, product.bytes, precision);
        let floor = source.grid.facts.first().map_or(LAUNCH_S, |least_us| least_us * 1e-6);
        (roofline / source.efficiency([m, n, k])).max(floor)
    }

    /// Seconds of one grouped product: `rows` in all, spread evenly over `experts` matrices `[k, n]`.
    pub fn grouped_gemm(&self, rows: f64, experts: usize, n: usize, k: usize, precision: Precision) -> f64 {
        let (rows, experts, n, k) = (rows.max(1.0), experts.max(1) as f64, n.max(1) as f64, k.max(1) as f64);
        let source = &self.grouped[precision as usize];
        let product = Product::grouped(rows, experts, n, k, precision);
        let roofline = self.roofline(product.flops, product.bytes, precision);
        // The tables hold hidden x expert width; the mean of an MoE layer's two products is sqrt(2) times that.
        let area = n * k * std::f64::consts::FRAC_1_SQRT_2;
        (roofline / source.efficiency([rows / experts, experts, area])).max(LAUNCH_S)
    }

    /// Seconds to sort the rows of `tokens` by expert and to add up what comes back, `hidden` elements a token, apart from
    /// what crosses the network.
    pub fn permutation(&self, tokens: f64, hidden: usize, precision: Precision) -> f64 {
        let facts = &self.grouped[precision as usize].grid.facts;
        let (picoseconds, fixed_us) = (facts[0], facts[1]);
        tokens * hidden as f64 * picoseconds * 1e-12 + fixed_us * 1e-6
    }

    /// Seconds of fused attention.
    pub fn attention(&self, pass: Pass, shape: &AttentionShape, precision: Precision) -> f64 {
        let source = &self.attention[precision as usize];
        let width = (shape.qk_dim + shape.v_dim) as f64;
        // A causal sequence of s tokens has s^2/2 pairs: the tables hold s.
        let length = (2.0 * shape.pairs()).sqrt().max(1.0);
        let efficiency = source.efficiency([(shape.batch * shape.heads) as f64, length, width / 2.0]);
        let rows = (shape.queries * shape.heads + shape.keys * shape.kv_heads) as f64;
        let bytes = precision.bytes() * shape.batch as f64 * rows * width;
        let forward = self.roofline(shape.forward_flops(), bytes, precision) / efficiency;
        let seconds = match pass {
            Pass::Forward => forward,
            Pass::Backward => forward * BACKWARD_WORK / BACKWARD_EFFICIENCY,
        };
        seconds.max(LAUNCH_S)
    }

    /// Seconds of a kernel that only reads and writes: its bytes at the bandwidth that products with few rows reach.
    pub fn memory_bound(&self, bytes: f64) -> f64 {
        bytes / (self.gpu.memory_bytes_per_s * self.memory_efficiency) + LAUNCH_S
    }

    fn roofline(&self, flops: f64, bytes: f64, precision: Precision) -> f64 {
        (flops / self.gpu.peak_flops(precision)).max(bytes / self.gpu.memory_bytes_per_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_is_whole() {
        for (grids, count) in [(&*GEMM, 23), (&*ATTENTION, 13), (&*GROUPED, 22)] {
            assert_eq!(grids.len(), count);
            for grid in grids {
                assert!(grid.is_whole() && !grid.facts.is_empty(), "{} {}", grid.gpu, grid.precision);
            }
        }
    }

    #[test]
    fn a_gpu_says_whose_measurements_it_uses() {
        let said = |gpu: &str, kernel, precision| {
            KernelModel::of(&Gpu::named(gpu).unwrap()).origin(kernel, precision).to_string()
        };
        assert_eq!(said("H100", Kernel::Gemm, Precision::Fp8), "measured");
        assert_eq!(said("H800", Kernel::Gemm, Precision::Bf16), "borrowed from H100 in bf16");
        assert_eq!(said("A100", Kernel::GroupedGemm, Precision::Bf16), "borrowed from H100 in bf16");
        assert_eq!(said("H100", Kernel::Gemm, Precision::Nvfp4), "borrowed from H100 in mxfp8");
        assert_eq!(
            said("MI355X", Kernel::Attention, Precision::Bf16),
            "borrowed from B200 in bf16, times 0.81"
        );
    }

    #[test]
    fn borrowing_costs_what_the_tables_say() {
        let table = |gpu: &str| GEMM.iter().find(|grid| grid.gpu == gpu && grid.precision == "bf16").unwrap();
        // Root mean square of the logarithm of the ratio of two GPUs' efficiencies over products of at least 1,024 rows.
        let apart = |a: &str, b: &str| {
            let sizes = |from: i32, to: i32| (from..=to).map(|power| f64::from(1 << power));
            let mut squares = Vec::new();
            for m in sizes(10, 14) {
                for n in sizes(10, 14) {
                    for k in sizes(10, 14) {
                        squares.push((table(a).at([m, n, k]) / table(b).at([m, n, k])).ln().powi(2));
                    }
                }
            }
            (squares.iter().sum::<f64>() / squares.len() as f64).sqrt()
        };
        let mean = |pairs: &[(&str, &str)]| {
            let each: Vec<f64> = pairs.iter().map(|(a, b)| apart(a, b)).collect();
            println!("{pairs:?}: {each:.2?}");
            each.iter().sum::<f64>() / each.len() as f64
        };
        let same = mean(&[("H100", "H200"), ("B200", "GB200"), ("B300", "GB300")]);
        let other =
            mean(&[("A100", "H100"), ("A100", "B200"), ("A100", "B300"), ("H100", "B200"), ("H100", "B300")]);
        let [of_same, of_other] = BORROWED_SPREAD;
        assert!((same - of_same).abs() < 0.02 && (other - of_other).abs() < 0.04, "{same:.3} {other:.3}");
    }

    #[test]
    fn what_is_borrowed_is_less_sure() {
        let spread = |gpu: &str, precision| {
            KernelModel::of(&Gpu::named(gpu).unwrap()).borrowed_spread(Kernel::Gemm, precision)
        };
        let said = [
            spread("H100", Precision::Bf16),
            spread("H800", Precision::Bf16),
            spread("MI300X", Precision::Bf16),
            spread("H100", Precision::Nvfp4),
        ];
        assert_eq!(said, [0.0, 0.09, 0.19, 0.19]);
        let described = |gpu: &str| Gpu { described: true, ..Gpu::named(gpu).unwrap() };
        for gpu in ["H100", "H800"].map(described) {
            let kernels = KernelModel::of(&gpu);
            assert_eq!(kernels.borrowed_spread(Kernel::Gemm, Precision::Bf16), 0.19);
            assert_eq!(
                kernels.origin(Kernel::Gemm, Precision::Bf16).to_string(),
                "borrowed from H100 in bf16"
            );
        }
    }

    #[test]
    fn attention_counts_the_pairs_that_are_seen() {
        let mut shape = AttentionShape {
            batch: 1,
            queries: 1024,
            keys: 4096,
            heads: 8,
            kv_heads: 8,
            qk_dim: 128,
            v_dim: 128,
            causal: true,
            window: None,
        };
        assert_eq!(shape.pairs(), 1024.0 * 4096.0 / 2.0);
        shape.window = Some(1024);
        // All but the first 1,024 of 4,096 positions see 1,024 tokens, those see 512 on average.
        assert_eq!(shape.pairs(), 1024.0 * (0.75 * 1024.0 + 0.25 * 512.0));
        shape.causal = false;
        assert_eq!(shape.pairs(), 1024.0 * 1024.0);
    }
}
