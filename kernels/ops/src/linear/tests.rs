//! Every variant and element type against the f64 reference, at odd sizes.

use super::*;
use crate::WeightSlice;
use crate::testing::{Random, assert_close, poisoned};
use half::{bf16, f16};

struct Case {
    tokens: usize,
    rows: Vec<usize>,
    cols: usize,
    bias: bool,
}

fn check(case: &Case, threads: usize) {
    let mut random = Random::new((case.tokens * 31 + case.cols) as u64);
    let pool = ThreadPool::new(threads);
    let x = random.vector(case.tokens * case.cols);
    let width: usize = case.rows.iter().sum();
    let biases: Vec<Vec<f32>> = case.rows.iter().map(|r| random.vector(*r)).collect();
    let biases: Vec<&[f32]> =
        if case.bias { biases.iter().map(|b| &b[..]).collect() } else { vec![] };
    let f32s: Vec<Vec<f32>> = case.rows.iter().map(|r| random.vector(r * case.cols)).collect();
    let bf16s: Vec<Vec<bf16>> =
        f32s.iter().map(|v| v.iter().map(|x| bf16::from_f32(*x)).collect()).collect();
    let f16s: Vec<Vec<f16>> =
        f32s.iter().map(|v| v.iter().map(|x| f16::from_f32(*x)).collect()).collect();
    let build = |slices: Vec<WeightSlice<'_>>| -> Vec<(usize, usize)> {
        slices.iter().zip(&case.rows).map(|(s, r)| (s.len(), *r)).collect()
    };
    for kind in 0..3 {
        let slices: Vec<WeightSlice<'_>> = match kind {
            0 => f32s.iter().map(|v| WeightSlice::F32(v)).collect(),
            1 => bf16s.iter().map(|v| WeightSlice::Bf16(v)).collect(),
            _ => f16s.iter().map(|v| WeightSlice::F16(v)).collect(),
        };
        assert_eq!(build(slices.clone()).len(), case.rows.len());
        let parts: Vec<Matrix<'_>> = slices
            .into_iter()
            .zip(&case.rows)
            .map(|(data, rows)| Matrix::new(data, *rows, case.cols))
            .collect();
        let expected = reference::linear(&x, case.tokens, &parts, &biases);
        for isa in Isa::available() {
            let mut out = poisoned(case.tokens * width);
            let mut scratch = poisoned(scratch_len(&pool, case.cols));
            linear_on(isa, &pool, &x, case.tokens, &parts, &biases, &mut out, &mut scratch);
            let what = format!("{isa} kind {kind} tokens {} cols {}", case.tokens, case.cols);
            assert_close(&what, &out, &expected, 2e-5 * (case.cols as f64).sqrt());
        }
    }
}

#[test]
fn every_variant_agrees_with_f64_at_odd_sizes() {
    for tokens in [0, 1, 2, 3, 4, 5, 12, 13, 14, 25, 31, 64, 65] {
        for (rows, cols) in [(1, 1), (3, 5), (33, 17), (64, 64), (65, 63), (129, 100)] {
            check(&Case { tokens, rows: vec![rows], cols, bias: tokens % 2 == 0 }, 2);
        }
    }
}

#[test]
fn parts_stand_side_by_side() {
    for tokens in [1, 7, 40] {
        check(&Case { tokens, rows: vec![5, 64, 1, 70], cols: 48, bias: true }, 3);
    }
}

#[test]
fn the_variant_is_the_one_for_the_number_of_tokens() {
    assert_eq!(select(Isa::Avx512, 1), Variant::GemvAvx512);
    assert_eq!(select(Isa::Avx512, GEMV_MAX_TOKENS), Variant::GemvAvx512);
    assert_eq!(select(Isa::Avx512, GEMV_MAX_TOKENS + 1), Variant::GemmAvx512);
    assert_eq!(select(Isa::Avx2, 1), Variant::Rows);
    assert_eq!(select(Isa::Scalar, 100), Variant::Rows);
}

#[test]
fn a_nan_stays_in_its_token() {
    let pool = ThreadPool::new(2);
    let mut random = Random::new(5);
    let (tokens, rows, cols) = (20, 40, 33);
    let w = random.vector(rows * cols);
    let parts = [Matrix::new(WeightSlice::F32(&w), rows, cols)];
    for tokens in [3, tokens] {
        let mut x = random.vector(tokens * cols);
        x[cols + 4] = f32::NAN;
        let mut out = poisoned(tokens * rows);
        let mut scratch = poisoned(scratch_len(&pool, cols));
        linear(&pool, &x, tokens, &parts, &[], &mut out, &mut scratch);
        for (i, y) in out.iter().enumerate() {
            assert_eq!(y.is_nan(), i / rows == 1, "token {}", i / rows);
        }
    }
}

#[test]
fn a_few_tokens_each_get_what_one_alone_gets() {
    let pool = ThreadPool::new(2);
    let mut random = Random::new(6);
    let (rows, cols) = (70, 129);
    let w = random.vector(rows * cols);
    let parts = [Matrix::new(WeightSlice::F32(&w), rows, cols)];
    let x = random.vector(GEMV_MAX_TOKENS * cols);
    let mut all = poisoned(GEMV_MAX_TOKENS * rows);
    linear(&pool, &x, GEMV_MAX_TOKENS, &parts, &[], &mut all, &mut []);
    for token in 0..GEMV_MAX_TOKENS {
        let mut one = poisoned(rows);
        linear(&pool, &x[token * cols..(token + 1) * cols], 1, &parts, &[], &mut one, &mut []);
        assert_eq!(one[..], all[token * rows..(token + 1) * rows], "bit for bit");
    }
}
