//! Efficiencies at powers of two, and what lies between them.

/// Nodes at `2^first`, `2^(first + step)`, ...
#[derive(Debug, Clone, Copy)]
struct Axis {
    first: f64,
    per_node: f64,
    last: f64,
}

impl Axis {
    /// Reads `first:step:nodes`.
    fn parse(text: &str) -> Option<(Self, usize)> {
        let mut parts = text.split(':').map(str::parse::<usize>);
        let (first, step, nodes) = (parts.next()?.ok()?, parts.next()?.ok()?, parts.next()?.ok()?);
        let axis = Self { first: first as f64, per_node: 1.0 / step as f64, last: (nodes - 1) as f64 };
        (nodes >= 2 && step >= 1).then_some((axis, nodes))
    }

    /// The node at or below `size`, and how far beyond it `size` lies, in nodes. Outside, the edge.
    fn locate(self, size: f64) -> (usize, f64) {
        let at = ((octave(size) - self.first) * self.per_node).clamp(0.0, self.last);
        let low = at.min(self.last - 1.0) as usize;
        (low, at - low as f64)
    }
}

/// Exponent plus mantissa less one: log2 made of straight lines between powers of two, so that what is linear in this is
/// linear in the size, and takes no logarithm. `size` is positive and normal.
fn octave(size: f64) -> f64 {
    const MANTISSA: f64 = (1u64 << 52) as f64;
    size.to_bits() as f64 / MANTISSA - 1023.0
}

/// Efficiencies over three sizes, for one GPU and precision.
#[derive(Debug)]
pub(super) struct Grid {
    axes: [Axis; 3],
    strides: [usize; 2],
    nodes: Vec<f32>,
    /// The GPU.
    pub(super) gpu: String,
    /// The precision.
    pub(super) precision: String,
    /// The other numbers of the table's heading.
    pub(super) facts: Vec<f64>,
}

impl Grid {
    /// The efficiency at these sizes, linear between nodes in each.
    pub(super) fn at(&self, sizes: [f64; 3]) -> f64 {
        let (i, u) = self.axes[0].locate(sizes[0]);
        let (j, v) = self.axes[1].locate(sizes[1]);
        let (k, w) = self.axes[2].locate(sizes[2]);
        let base = i * self.strides[0] + j * self.strides[1] + k;
        let line = |at: usize| {
            let pair = &self.nodes[at..at + 2];
            f64::from(pair[0]) + w * f64::from(pair[1] - pair[0])
        };
        let plane = |at: usize| {
            let (low, high) = (line(at), line(at + self.strides[1]));
            low + v * (high - low)
        };
        let (low, high) = (plane(base), plane(base + self.strides[0]));
        low + u * (high - low)
    }

    /// Every table of a file that `scripts/distil-kernels` wrote. What does not read ends the table.
    pub(super) fn parse_all(text: &str) -> Vec<Self> {
        let mut axes = Vec::new();
        let mut grids: Vec<Self> = Vec::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if let Some(rest) = line.strip_prefix("axes ") {
                axes = rest.split(' ').filter_map(Axis::parse).collect();
            } else if let Some(rest) = line.strip_prefix("table ") {
                grids.extend(Self::heading(&axes, rest));
            } else if let Some(grid) = grids.last_mut() {
                let permille =
                    line.as_bytes().chunks(3).filter_map(|digits| std::str::from_utf8(digits).ok());
                grid.nodes
                    .extend(permille.filter_map(|digits| digits.parse::<f32>().ok()).map(|p| p / 1000.0));
            }
        }
        grids
    }

    fn heading(axes: &[(Axis, usize)], text: &str) -> Option<Self> {
        let &[(a, _), (b, rows), (c, columns)] = axes else { return None };
        let mut words = text.split(' ').map(str::to_string);
        let (gpu, precision) = (words.next()?, words.next()?);
        let facts = words.filter_map(|word| word.parse().ok()).collect();
        let strides = [rows * columns, columns];
        Some(Self { axes: [a, b, c], strides, nodes: Vec::new(), gpu, precision, facts })
    }

    /// Whether every node is there.
    #[cfg(test)]
    pub(super) fn is_whole(&self) -> bool {
        self.nodes.len() == (self.axes[0].last as usize + 1) * self.strides[0]
            && self.nodes.iter().all(|efficiency| (0.001..1.0).contains(efficiency))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octaves_are_straight_between_powers_of_two() {
        for (size, expected) in
            [(1.0, 0.0), (1.5, 0.5), (2.0, 1.0), (3.0, 1.5), (7168.0, 12.75), (0.75, -0.5)]
        {
            assert_eq!(octave(size), expected, "{size}");
        }
    }

    #[test]
    fn values_are_linear_between_nodes_and_flat_outside() {
        let text =
            "# about\naxes 0:1:2 1:2:2 3:1:3\ntable X bf16 2.5\n100200300\n500600700\n110210310\n510610710\n";
        let grids = Grid::parse_all(text);
        let grid = &grids[0];
        assert!(grid.is_whole());
        assert_eq!((grid.gpu.as_str(), grid.precision.as_str(), &grid.facts[..]), ("X", "bf16", &[2.5][..]));
        let cases = [
            ([1.0, 2.0, 8.0], 0.1),
            ([1.0, 2.0, 12.0], 0.15),
            ([1.0, 4.0, 8.0], 0.3),
            ([1.5, 2.0, 32.0], 0.305),
            ([2.0, 8.0, 32.0], 0.71),
            ([0.1, 0.1, 0.1], 0.1),
            ([1e9, 1e9, 1e9], 0.71),
        ];
        for (sizes, expected) in cases {
            assert!((grid.at(sizes) - expected).abs() < 1e-6, "{sizes:?}: {}", grid.at(sizes));
        }
    }
}
