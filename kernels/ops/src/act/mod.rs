//! Element-wise ops: the gated activation and the residual sum.

pub mod cuda;

use crate::share::Shared;
use device::ThreadPool;

/// Elements of one item; enough to be worth a dispatch.
const CHUNK: usize = 4096;

/// `x * sigmoid(x)`.
#[inline]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// `out[t][i] = silu(gate[t][i]) * up[t][i]`, where a row of `gate_up` is gate then up, `n` each.
///
/// # Panics
/// When the lengths do not fit.
pub fn silu_mul(pool: &ThreadPool, gate_up: &[f32], n: usize, out: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * out.len(), "gate and up");
    assert!(n > 0 && out.len().is_multiple_of(n), "rows of {n}");
    let tokens = out.len() / n;
    let rows = (CHUNK / n).max(1);
    let out = Shared::new(out);
    pool.run(tokens.div_ceil(rows), &|item| {
        for token in item * rows..((item + 1) * rows).min(tokens) {
            let (gate, up) = gate_up[2 * n * token..2 * n * (token + 1)].split_at(n);
            // SAFETY: one row per token, each token in one item.
            let row = unsafe { out.part(token * n, n) };
            for ((y, gate), up) in row.iter_mut().zip(gate).zip(up) {
                *y = silu(*gate) * up;
            }
        }
    });
}

/// `target += x`.
///
/// # Panics
/// When the lengths differ.
pub fn add(pool: &ThreadPool, x: &[f32], target: &mut [f32]) {
    assert_eq!(x.len(), target.len(), "operands of a sum");
    let len = x.len();
    let target = Shared::new(target);
    pool.run(len.div_ceil(CHUNK), &|item| {
        let range = item * CHUNK..((item + 1) * CHUNK).min(len);
        // SAFETY: items cover disjoint ranges.
        let part = unsafe { target.part(range.start, range.len()) };
        part.iter_mut().zip(&x[range]).for_each(|(y, x)| *y += x);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close, poisoned};

    #[test]
    fn the_gate_goes_through_the_activation_and_up_does_not() {
        let pool = ThreadPool::new(2);
        for (tokens, n) in [(1, 1), (3, 5), (65, 17), (2, 9000)] {
            let gate_up = Random::new(3).vector(2 * tokens * n);
            let mut out = poisoned(tokens * n);
            silu_mul(&pool, &gate_up, n, &mut out);
            let expected: Vec<f64> = (0..tokens * n)
                .map(|i| {
                    let row = &gate_up[i / n * 2 * n..];
                    let (gate, up) = (f64::from(row[i % n]), f64::from(row[n + i % n]));
                    gate / (1.0 + (-gate).exp()) * up
                })
                .collect();
            assert_close("silu_mul", &out, &expected, 1e-6);
        }
    }

    #[test]
    fn extremes_of_the_activation_are_finite() {
        assert_eq!(silu(-200.0), 0.0);
        assert_eq!(silu(200.0), 200.0);
        assert!(silu(f32::NAN).is_nan());
    }

    #[test]
    fn a_sum_covers_every_element() {
        let pool = ThreadPool::new(3);
        for len in [0, 1, 4095, 4097, 10_000] {
            let x = Random::new(4).vector(len);
            let mut y = vec![1.0; len];
            add(&pool, &x, &mut y);
            assert!(y.iter().zip(&x).all(|(y, x)| *y == 1.0 + x));
        }
    }
}
