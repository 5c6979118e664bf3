//! A hash of the kernels' results on fixed inputs: machines with the same probe give the same bits.

use unisono_tensor::{Backend, Buffer, Dims, FfnRun, FfnShape, Product};

/// Numbers without structure, the same everywhere: a linear congruential generator (Knuth's MMIX constants).
fn numbers(len: usize, mut state: u64) -> Vec<f32> {
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..len).map(|_| next()).collect()
}

/// BLAKE3, hexadecimal, of products of several shapes and of a feed-forward network.
pub fn probe<B: Backend>(backend: &B) -> String {
    let mut hasher = blake3::Hasher::new();
    let upload = |values: &[f32]| {
        let mut buffer = backend.alloc(values.len());
        backend.upload(values, buffer.all_mut());
        buffer
    };
    let mut add = |buffer: &B::Buf| {
        let mut values = vec![0.0; buffer.len()];
        backend.download(buffer.all(), &mut values);
        hasher.update(bytemuck::cast_slice(&values));
    };
    for (index, (m, n, k)) in [(1, 16, 64), (37, 48, 300), (128, 96, 700)].into_iter().enumerate() {
        let (a, b) = (upload(&numbers(m * k, index as u64)), upload(&numbers(k * n, 100 + index as u64)));
        for product in [Product::Plain, Product::TransposedRight, Product::TransposedLeft] {
            let mut c = backend.alloc(m * n);
            backend.matmul(product, Dims { m, n, k }, a.all(), b.all(), c.all_mut(), false);
            add(&c);
        }
    }
    let shape = FfnShape { d_model: 32, ffn: 48, row_block: 16 };
    let (x, weights) = (upload(&numbers(20 * 32, 7)), upload(&numbers(3 * 32 * 48, 8)));
    let (mut gu, mut y) = (backend.alloc(20 * 96), backend.alloc(20 * 32));
    let run = FfnRun { rows: 0..20, out: 0, w13: 0, w2: 2 * 32 * 48, dw13: 0, dw2: 0 };
    backend.ffn(shape, &[run], x.all(), weights.all(), None, gu.all_mut(), y.all_mut());
    add(&gu);
    add(&y);
    hasher.finalize().to_hex().to_string()
}
