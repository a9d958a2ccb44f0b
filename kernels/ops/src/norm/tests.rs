//! Norms against f64 at odd sizes.

use super::*;
use crate::testing::{Random, assert_close, poisoned};

fn reference(x: &[f32], weight: &[f32], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| f64::from(*x) * scale * f64::from(*w)).collect()
}

#[test]
fn rows_agree_with_f64() {
    let pool = ThreadPool::new(2);
    for (tokens, width) in [(0, 4), (1, 1), (3, 7), (65, 63), (9, 512)] {
        let mut random = Random::new(width as u64);
        let (x, weight) = (random.vector(tokens * width), random.vector(width));
        let mut out = poisoned(x.len());
        rms_norm(&pool, &x, &weight, 1e-5, &mut out);
        let expected: Vec<f64> =
            x.chunks_exact(width).flat_map(|row| reference(row, &weight, 1e-5)).collect();
        assert_close("rms_norm", &out, &expected, 1e-5);

        let delta = random.vector(x.len());
        let mut residual = x.clone();
        let mut out = poisoned(x.len());
        add_rms_norm(&pool, &delta, &mut residual, &weight, 1e-5, &mut out);
        let sums: Vec<f32> = x.iter().zip(&delta).map(|(x, d)| x + d).collect();
        assert_eq!(residual, sums);
        let expected: Vec<f64> =
            sums.chunks_exact(width).flat_map(|row| reference(row, &weight, 1e-5)).collect();
        assert_close("add_rms_norm", &out, &expected, 1e-5);
    }
}

#[test]
fn heads_are_normed_alone_and_nothing_else_changes() {
    let pool = ThreadPool::new(2);
    let heads = Heads { row: 31, count: 3, offset: 2, width: 5, stride: 8 };
    let mut random = Random::new(8);
    let x = random.vector(31 * 20);
    let weight = random.vector(5);
    let mut y = x.clone();
    head_norm(&pool, &mut y, &heads, &weight, 1e-6);
    for (token, (x, y)) in x.chunks_exact(31).zip(y.chunks_exact(31)).enumerate() {
        let mut untouched: Vec<usize> = (0..31).collect();
        for h in 0..3 {
            let expected = reference(&x[heads.range(h)], &weight, 1e-6);
            assert_close(&format!("token {token} head {h}"), &y[heads.range(h)], &expected, 1e-5);
            untouched.retain(|i| !heads.range(h).contains(i));
        }
        assert!(untouched.iter().all(|i| x[*i] == y[*i]));
    }
}

#[test]
#[should_panic(expected = "heads lie inside rows")]
fn a_head_outside_of_its_row_is_refused() {
    let heads = Heads { row: 10, count: 2, offset: 1, width: 5, stride: 5 };
    head_norm(&ThreadPool::new(1), &mut [0.0; 10], &heads, &[1.0; 5], 1e-6);
}
