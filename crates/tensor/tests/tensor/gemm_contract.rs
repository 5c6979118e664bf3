//! The contract of the product entry point: an element's bits depend on its row and its column, on nothing else.

use unisono_tensor::cpu::{Matrix, MatrixMut, Threads, gemm};
use unisono_tensor::{Backend, Cpu, Dims, Product};

/// Rows and columns of the products that the others are compared with.
const ROWS: usize = 300;
const COLUMNS: usize = 512;
const WIDTHS: [usize; 12] = [1, 2, 3, 7, 8, 9, 16, 24, 64, 100, 257, 512];
const DEPTHS: [usize; 10] = [1, 2, 3, 5, 64, 255, 256, 257, 700, 2048];

/// A small counter-based generator (splitmix64), so that a failure names its case.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
    fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
    }
}

/// A matrix stored somewhere in a buffer: at an offset, with gaps between rows (or columns), in either order.
struct Stored {
    data: Vec<f32>,
    offset: usize,
    stride: usize,
    by_rows: bool,
}

impl Stored {
    fn new(
        random: &mut Random,
        rows: usize,
        columns: usize,
        by_rows: bool,
        value: impl Fn(usize, usize) -> f32,
    ) -> Self {
        let (outer, inner) = if by_rows { (rows, columns) } else { (columns, rows) };
        let (offset, stride) = (random.below(17), inner + random.below(5));
        let mut data = vec![f32::NAN; offset + outer * stride];
        for i in 0..outer {
            for j in 0..inner {
                data[offset + i * stride + j] = if by_rows { value(i, j) } else { value(j, i) };
            }
        }
        Self { data, offset, stride, by_rows }
    }
    fn view(&self) -> Matrix<'_> {
        let order = if self.by_rows { Matrix::rows } else { Matrix::columns };
        order(&self.data[self.offset..], self.stride)
    }
}

/// `[ROWS, k]` times `[k, COLUMNS]`, without and with an initial value of the result.
struct Reference {
    k: usize,
    lhs: Vec<f32>,
    rhs: Vec<f32>,
    initial: Vec<f32>,
    product: Vec<f32>,
    accumulated: Vec<f32>,
}

impl Reference {
    fn new(k: usize) -> Self {
        let mut random = Random(k as u64);
        let (lhs, rhs) = (random.values(ROWS * k), random.values(k * COLUMNS));
        let initial = random.values(ROWS * COLUMNS);
        let dims = Dims { m: ROWS, n: COLUMNS, k };
        let multiply = |mut dst: Vec<f32>, accumulate| {
            let dst_view = MatrixMut::rows(&mut dst, COLUMNS);
            gemm(dims, Matrix::rows(&lhs, k), Matrix::rows(&rhs, COLUMNS), dst_view, accumulate);
            dst
        };
        let product = multiply(vec![f32::NAN; ROWS * COLUMNS], false);
        let accumulated = multiply(initial.clone(), true);
        Self { k, lhs, rhs, initial, product, accumulated }
    }

    /// Computes `m` rows and `n` columns from random places, stored in random places, and compares.
    fn check(&self, random: &mut Random, m: usize, n: usize) {
        let (row, column) = (random.below(ROWS - m + 1), random.below(COLUMNS - n + 1));
        let (left_rows, right_rows, accumulate) =
            (random.below(2) == 0, random.below(2) == 0, random.below(2) == 0);
        let lhs = Stored::new(random, m, self.k, left_rows, |i, p| self.lhs[(row + i) * self.k + p]);
        let rhs = Stored::new(random, self.k, n, right_rows, |p, j| self.rhs[p * COLUMNS + column + j]);
        let at = |i: usize, j: usize| (row + i) * COLUMNS + column + j;
        let mut dst = Stored::new(random, m, n, true, |i, j| self.initial[at(i, j)]);
        let dst_view = MatrixMut::rows(&mut dst.data[dst.offset..], dst.stride);
        gemm(Dims { m, n, k: self.k }, lhs.view(), rhs.view(), dst_view, accumulate);
        let expected = if accumulate { &self.accumulated } else { &self.product };
        for i in 0..m {
            for j in 0..n {
                let value = dst.data[dst.offset + i * dst.stride + j];
                assert_eq!(
                    value.to_bits(),
                    expected[at(i, j)].to_bits(),
                    "m {m}, n {n}, k {}: element ({i}, {j}), lhs by rows {left_rows}, rhs by rows {right_rows}, \
                     accumulate {accumulate}: {value} and {}",
                    self.k,
                    expected[at(i, j)]
                );
            }
        }
    }
}

fn sweep(every: usize, repeats: usize) {
    for k in DEPTHS {
        let reference = Reference::new(k);
        let mut random = Random(1000 + k as u64);
        for (case, m) in (1..=ROWS).enumerate() {
            for (index, n) in WIDTHS.into_iter().enumerate() {
                if (case + index * 5) % every == 0 || (m < 20 && n < 20 && case % 4 == index % 4) {
                    (0..repeats).for_each(|_| reference.check(&mut random, m, n));
                }
            }
        }
    }
}

#[test]
fn an_element_does_not_depend_on_what_is_computed_beside_it() {
    sweep(29, 1);
}

/// Every number of rows, every width, every depth, several storage orders each: about two minutes.
#[test]
#[ignore = "the full sweep; the sample above runs by default"]
fn an_element_does_not_depend_on_what_is_computed_beside_it_full() {
    sweep(1, 4);
}

#[test]
fn small_products_in_every_storage_order() {
    for k in [1, 2, 3, 8, 17, 256, 300] {
        let reference = Reference::new(k);
        let mut random = Random(k as u64);
        for m in 1..18 {
            for n in [1, 2, 3, 5, 15, 16, 17, 128, 129] {
                (0..8).for_each(|_| reference.check(&mut random, m, n));
            }
        }
    }
}

/// Whether the product of this machine fuses multiplication and addition.
fn fuses() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    cfg!(target_arch = "aarch64")
}

/// The stated order of a sum, element by element: a chain of fused multiply-adds for each block of 256, blocks added
/// to the result in place. A last block of one or two products is not fused and starts from the result.
fn in_stated_order(terms: impl Iterator<Item = (f32, f32)>, initial: Option<f32>) -> f32 {
    let terms: Vec<(f32, f32)> = terms.collect();
    let mut result = initial;
    for block in terms.chunks(256) {
        result = Some(match (result, block) {
            (None, [(a, b)]) => a * b,
            (Some(c), [(a, b)]) => a * b + c,
            (None, [(a, b), (c, d)]) => c * d + a * b,
            (Some(e), [(a, b), (c, d)]) => c * d + (a * b + e),
            (result, block) => {
                let sum = block.iter().fold(0.0, |sum, (a, b)| f32::mul_add(*a, *b, sum));
                result.map_or(sum, |result| result + sum)
            }
        });
    }
    result.unwrap_or(0.0)
}

#[test]
fn sums_run_in_the_stated_order() {
    if !fuses() {
        return;
    }
    for k in DEPTHS.into_iter().chain([4, 258, 511, 512, 513, 514]) {
        let reference = Reference::new(k);
        for at in (0..ROWS * COLUMNS).step_by(if k < 600 { 61 } else { 487 }) {
            let (i, j) = (at / COLUMNS, at % COLUMNS);
            let terms = || (0..k).map(|p| (reference.lhs[i * k + p], reference.rhs[p * COLUMNS + j]));
            let expected = in_stated_order(terms(), None);
            assert_eq!(reference.product[at].to_bits(), expected.to_bits(), "k {k}, element ({i}, {j})");
            let expected = in_stated_order(terms(), Some(reference.initial[at]));
            assert_eq!(reference.accumulated[at].to_bits(), expected.to_bits(), "k {k}, element ({i}, {j})");
        }
    }
}

#[test]
fn products_follow_f64() {
    for k in DEPTHS {
        let reference = Reference::new(k);
        for at in (0..ROWS * COLUMNS).step_by(97) {
            let (i, j) = (at / COLUMNS, at % COLUMNS);
            let terms = (0..k)
                .map(|p| f64::from(reference.lhs[i * k + p]) * f64::from(reference.rhs[p * COLUMNS + j]));
            let exact: f64 = terms.sum();
            let error = (f64::from(reference.product[at]) - exact).abs();
            assert!(error < 2e-6 * (k as f64).sqrt(), "k {k}, element ({i}, {j}): {error}");
        }
    }
}

#[test]
fn an_empty_sum_is_zero_or_leaves_the_result() {
    for (m, n) in [(1, 1), (1, 5), (3, 4), (40, 70)] {
        let dims = Dims { m, n, k: 0 };
        let mut dst = vec![2.0; m * n];
        gemm(dims, Matrix::rows(&[], 0), Matrix::rows(&[], n), MatrixMut::rows(&mut dst, n), true);
        assert_eq!(dst, vec![2.0; m * n]);
        gemm(dims, Matrix::rows(&[], 0), Matrix::rows(&[], n), MatrixMut::rows(&mut dst, n), false);
        assert_eq!(dst, vec![0.0; m * n]);
    }
}

#[test]
#[should_panic(
    expected = "the right operand of a product, [5, 4] with strides (4, 1), reaches past its 19 elements"
)]
fn an_operand_that_is_too_short_is_named() {
    let dims = Dims { m: 3, n: 4, k: 5 };
    gemm(
        dims,
        Matrix::rows(&[0.0; 15], 5),
        Matrix::rows(&[0.0; 19], 4),
        MatrixMut::rows(&mut [0.0; 12], 4),
        false,
    );
}

#[test]
fn strides_that_overflow_reach_past_every_operand() {
    let dims = Dims { m: 3, n: 4, k: 5 };
    for stride in [usize::MAX, usize::MAX / 2 + 1, usize::MAX / 4 + 1] {
        let multiply = || {
            let dst = &mut [0.0; 12];
            gemm(
                dims,
                Matrix::rows(&[0.0; 15], stride),
                Matrix::rows(&[0.0; 20], 4),
                MatrixMut::rows(dst, 4),
                false,
            )
        };
        assert!(std::panic::catch_unwind(multiply).is_err());
        let multiply = || {
            let dst = &mut [0.0; 12];
            gemm(
                dims,
                Matrix::rows(&[0.0; 15], 5),
                Matrix::rows(&[0.0; 20], 4),
                MatrixMut::rows(dst, stride),
                false,
            )
        };
        assert!(std::panic::catch_unwind(multiply).is_err());
    }
}

/// Storage of the operands of a [`Product`], from those of the reference.
fn operands(reference: &Reference, product: Product) -> (Vec<f32>, Vec<f32>) {
    let transposed = |x: &[f32], columns: usize| {
        let rows = x.len() / columns;
        (0..x.len()).map(|at| x[at % rows * columns + at / rows]).collect::<Vec<f32>>()
    };
    match product {
        Product::Plain => (reference.lhs.clone(), reference.rhs.clone()),
        Product::TransposedRight => (reference.lhs.clone(), transposed(&reference.rhs, COLUMNS)),
        Product::TransposedLeft => (transposed(&reference.lhs, reference.k), reference.rhs.clone()),
    }
}

#[test]
fn products_of_the_backend_do_not_depend_on_threads() {
    for k in [5, 256, 700] {
        let reference = Reference::new(k);
        let dims = Dims { m: ROWS, n: COLUMNS, k };
        for product in [Product::Plain, Product::TransposedRight, Product::TransposedLeft] {
            let (a, b) = operands(&reference, product);
            for threads in [1, 2, 3] {
                let cpu = Cpu::new(threads);
                let mut c = vec![f32::NAN; ROWS * COLUMNS];
                cpu.matmul(product, dims, &a, &b, &mut c, false);
                assert!(c == reference.product, "{product:?}, k {k}, {threads} threads");
                c.copy_from_slice(&reference.initial);
                cpu.matmul(product, dims, &a, &b, &mut c, true);
                assert!(c == reference.accumulated, "{product:?}, k {k}, {threads} threads, accumulated");
            }
        }
    }
}

/// Every number of rows at every depth; width, place, kind of product, accumulation and threads rotate.
#[test]
fn products_of_every_number_of_rows() {
    let backends = [1, 2, 3].map(Cpu::new);
    for (depth, k) in DEPTHS.into_iter().enumerate() {
        let reference = Reference::new(k);
        let mut random = Random(2000 + k as u64);
        for m in 1..=ROWS {
            let n = WIDTHS[(m + 5 * depth) % WIDTHS.len()];
            reference.check(&mut random, m, n);
            let (row, column) = (random.below(ROWS - m + 1), random.below(COLUMNS - n + 1));
            let left = |i: usize, p: usize| reference.lhs[(row + i) * k + p];
            let right = |p: usize, j: usize| reference.rhs[p * COLUMNS + column + j];
            let (product, threads) = ((m + depth) % 3, (m / 3 + depth) % 3);
            let product = [Product::Plain, Product::TransposedRight, Product::TransposedLeft][product];
            let a = match product {
                Product::TransposedLeft => matrix(k, m, |p, i| left(i, p)),
                _ => matrix(m, k, left),
            };
            let b = match product {
                Product::TransposedRight => matrix(n, k, |j, p| right(p, j)),
                _ => matrix(k, n, right),
            };
            let part = |of: &[f32]| matrix(m, n, |i, j| of[(row + i) * COLUMNS + column + j]);
            let accumulate = m / 9 % 2 == 1;
            let mut c = part(&reference.initial);
            backends[threads].matmul(product, Dims { m, n, k }, &a, &b, &mut c, accumulate);
            let expected = part(if accumulate { &reference.accumulated } else { &reference.product });
            assert!(
                c == expected,
                "{product:?}, m {m}, n {n}, k {k}, {} threads, accumulate {accumulate}",
                threads + 1
            );
        }
    }
}

fn matrix(rows: usize, columns: usize, value: impl Fn(usize, usize) -> f32) -> Vec<f32> {
    (0..rows * columns).map(|at| value(at / columns, at % columns)).collect()
}

#[test]
fn products_of_the_backend_do_not_depend_on_the_number_of_rows() {
    let reference = Reference::new(300);
    let cpu = Cpu::new(2);
    for m in [1, 2, 3, 31, 64, 65, 129, 250, 299] {
        let mut c = vec![f32::NAN; m * COLUMNS];
        let dims = Dims { m, n: COLUMNS, k: 300 };
        let last = &reference.lhs[(ROWS - m) * 300..];
        cpu.matmul(Product::Plain, dims, last, &reference.rhs, &mut c, false);
        assert!(c == reference.product[(ROWS - m) * COLUMNS..], "{m} rows");
        let b = operands(&reference, Product::TransposedRight).1;
        cpu.matmul(Product::TransposedRight, dims, last, &b, &mut c, false);
        assert!(c == reference.product[(ROWS - m) * COLUMNS..], "{m} rows, transposed");
    }
}

#[test]
fn products_run_on_several_threads_at_once() {
    let reference = Reference::new(700);
    Threads::new(3).run(24, |task| {
        let mut random = Random(task as u64);
        reference.check(&mut random, 1 + random_rows(task), 64);
    });
}

fn random_rows(task: usize) -> usize {
    task * 37 % 299
}
