//! Products of whole matrices against f64, and that one is the gradient of the other.

use super::formulas::product;
use super::support::*;
use unisono_tensor::{Backend, Cpu, Dims, Product};

fn transposed<T: Copy>(x: &[T], columns: usize) -> Vec<T> {
    let rows = x.len() / columns;
    (0..x.len()).map(|at| x[at % rows * columns + at / rows]).collect()
}

#[test]
fn the_three_products_follow_f64() {
    let mut rng = Rng::new(1);
    for (m, n, k) in [(1, 1, 1), (1, 40, 17), (33, 1, 300), (50, 64, 24), (7, 5, 600), (130, 70, 2)] {
        let dims = Dims { m, n, k };
        let (a, b, initial) = (rng.values(m * k), rng.values(k * n), rng.values(m * n));
        let exact = product(&widen(&a), &widen(&b), k);
        let summed: Vec<f64> = exact.iter().zip(&initial).map(|(x, y)| x + f64::from(*y)).collect();
        let operands = [
            (Product::Plain, a.clone(), b.clone()),
            (Product::TransposedRight, a.clone(), transposed(&b, n)),
            (Product::TransposedLeft, transposed(&a, k), b.clone()),
        ];
        for (kind, a, b) in operands {
            let multiply = |start: &[f32], accumulate: bool| {
                on_any_threads(|cpu| {
                    let mut c = start.to_vec();
                    cpu.matmul(kind, dims, &a, &b, &mut c, accumulate);
                    c
                })
            };
            assert_close("product", &multiply(&poison(m * n), false), &exact, 1e-5);
            assert_close("accumulated", &multiply(&initial, true), &summed, 1e-5);
        }
    }
}

#[test]
fn the_transposed_products_are_the_gradients_of_the_plain_one() {
    let (mut rng, dims) = (Rng::new(2), Dims { m: 9, n: 12, k: 10 });
    let (x, w, dy) = (rng.values(90), rng.values(120), rng.values(108));
    let objective = |x: &[f64], w: &[f64]| dot(&product(x, w, dims.k), &widen(&dy));
    let cpu = Cpu::new(1);
    let mut dx = poison(90);
    cpu.matmul(Product::TransposedRight, Dims { m: 9, n: 10, k: 12 }, &dy, &w, &mut dx, false);
    assert_close("dx", &dx, &gradient(&widen(&x), |x| objective(x, &widen(&w))), 1e-6);
    let mut dw = poison(120);
    cpu.matmul(Product::TransposedLeft, Dims { m: 10, n: 12, k: 9 }, &x, &dy, &mut dw, false);
    assert_close("dw", &dw, &gradient(&widen(&w), |w| objective(&widen(&x), w)), 1e-6);
}

#[test]
#[should_panic(expected = "got operands of 11 and 12 elements")]
fn operands_of_another_size_are_refused() {
    let dims = Dims { m: 3, n: 3, k: 4 };
    Cpu::new(1).matmul(Product::Plain, dims, &[0.0; 11], &[0.0; 12], &mut [0.0; 9], false);
}
