//! Attention against a plain f64 softmax over unpaged KV.

use super::*;
use crate::paged::testing::Cache;
use crate::testing::{Random, assert_close, poisoned};
use half::bf16;

fn reference(q: &[f32], kv: &[f32], shape: &Gqa, position: usize, head: usize) -> Vec<f64> {
    let row = 2 * shape.kv_heads * shape.head_dim;
    let kv_head = head / (shape.heads / shape.kv_heads);
    let begin = shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
    let key = |t: usize| &kv[t * row + kv_head * shape.head_dim..][..shape.head_dim];
    let value =
        |t: usize| &kv[t * row + (shape.kv_heads + kv_head) * shape.head_dim..][..shape.head_dim];
    let scores: Vec<f64> = (begin..=position)
        .map(|t| {
            let product: f64 =
                q.iter().zip(key(t)).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            product * f64::from(shape.scale)
        })
        .collect();
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
    let mass: f64 = weights.iter().sum();
    (0..shape.head_dim)
        .map(|d| {
            weights.iter().zip(begin..).map(|(w, t)| w * f64::from(value(t)[d])).sum::<f64>() / mass
        })
        .collect()
}

/// Ragged sequences: `(rows of this step, context)`.
fn check(shape: &Gqa, sequences: &[(usize, usize)], as_bf16: bool) {
    let row = 2 * shape.kv_heads * shape.head_dim;
    let lengths: Vec<usize> = sequences.iter().map(|s| s.1).collect();
    let (cache, mut contents) = Cache::random(&lengths, row, 3);
    let rounded: Vec<bf16> = cache.arena.iter().map(|x| bf16::from_f32(*x)).collect();
    if as_bf16 {
        contents.iter_mut().flatten().for_each(|x| *x = bf16::from_f32(*x).to_f32());
    }
    let tokens: usize = sequences.iter().map(|s| s.0).sum();
    let width = shape.heads * shape.head_dim;
    let q: Vec<f32> = Random::new(9).vector(tokens * width).iter().map(|x| x * 3.0).collect();
    let mut start = 0;
    let mut segments = Vec::new();
    for ((len, context), table) in sequences.iter().zip(&cache.tables) {
        segments.push(Segment { start, len: *len, context: *context, table });
        start += len;
    }
    for isa in Isa::available() {
        for threads in [1, 3] {
            let mut out = poisoned(tokens * width);
            let arena = if as_bf16 { Kv::Bf16(&rounded) } else { Kv::F32(&cache.arena) };
            let pool = ThreadPool::new(threads);
            attention_on(isa, &pool, &q, shape, cache.layer, &segments, arena, &mut out);
            for (segment, content) in segments.iter().zip(&contents) {
                for i in 0..segment.len {
                    for head in 0..shape.heads {
                        let at = ((segment.start + i) * shape.heads + head) * shape.head_dim;
                        let q = &q[at..at + shape.head_dim];
                        let expected = reference(q, content, shape, segment.position(i), head);
                        let what = format!("{isa} {shape:?} row {i} of {segment:?} head {head}");
                        assert_close(&what, &out[at..at + shape.head_dim], &expected, 1e-5);
                    }
                }
            }
        }
    }
}

#[test]
fn every_shape_and_window_agrees_with_f64() {
    let ragged = [(1, 1), (1, 64), (1, 65), (3, 3), (7, 130), (64, 64), (65, 129)];
    for (heads, kv_heads, head_dim) in [(1, 1, 3), (3, 3, 16), (6, 2, 33), (7, 1, 64)] {
        for window in [None, Some(1), Some(63), Some(64), Some(65)] {
            let shape = Gqa { heads, kv_heads, head_dim, scale: 0.7, window };
            check(&shape, &ragged, false);
        }
    }
    check(&Gqa { heads: 4, kv_heads: 2, head_dim: 128, scale: 0.09, window: None }, &ragged, true);
}

#[test]
fn a_chunk_gives_the_bits_that_single_rows_give() {
    let shape = Gqa { heads: 2, kv_heads: 1, head_dim: 16, scale: 0.25, window: None };
    let (cache, _) = Cache::random(&[100], 32, 4);
    let q = Random::new(2).vector(40 * 32);
    let pool = ThreadPool::new(2);
    let run = |start: usize, len: usize, context: usize, q: &[f32]| {
        let mut out = poisoned(q.len());
        let segment = Segment { start, len, context, table: &cache.tables[0] };
        attention(&pool, q, &shape, cache.layer, &[segment], Kv::F32(&cache.arena), &mut out);
        out.to_vec()
    };
    let whole = run(0, 40, 100, &q);
    for i in 0..40 {
        assert_eq!(run(0, 1, 61 + i, &q[i * 32..(i + 1) * 32]), whole[i * 32..(i + 1) * 32]);
    }
}

#[test]
fn nan_in_one_sequence_stays_there() {
    let shape = Gqa { heads: 2, kv_heads: 1, head_dim: 8, scale: 0.5, window: None };
    let (mut cache, _) = Cache::random(&[70, 70], 16, 5);
    let poisoned_at = usize::try_from(cache.tables[0][1]).expect("small") + cache.layer.offset;
    cache.arena[poisoned_at] = f32::NAN;
    let q = Random::new(3).vector(2 * 16);
    let mut out = poisoned(32);
    let segments =
        [0, 1].map(|s| Segment { start: s, len: 1, context: 70, table: &cache.tables[s] });
    let pool = ThreadPool::new(2);
    attention(&pool, &q, &shape, cache.layer, &segments, Kv::F32(&cache.arena), &mut out);
    assert!(out[..16].iter().all(|x| x.is_nan()) && out[16..].iter().all(|x| x.is_finite()));
}
