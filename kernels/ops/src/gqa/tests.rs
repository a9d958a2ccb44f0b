//! Attention against the f64 reference at every border, and bit for bit against itself.

use super::*;
use crate::paged::testing::Cache;
use crate::testing::{Random, assert_close, poisoned};
use half::bf16;

/// Runs on poisoned output and scratch.
fn run(
    isa: Isa,
    threads: usize,
    q: &[f32],
    shape: &Gqa,
    layer: KvLayer,
    segments: &[Segment<'_>],
    arena: Kv<'_>,
) -> Vec<f32> {
    let pool = ThreadPool::new(threads);
    let mut out = poisoned(q.len());
    let mut scratch = poisoned(scratch_len(&pool, shape));
    attention_on(isa, &pool, q, shape, layer, segments, arena, &mut out, &mut scratch);
    out.to_vec()
}

fn segments<'a>(sequences: &[(usize, usize)], tables: &'a [Vec<u64>]) -> Vec<Segment<'a>> {
    let mut start = 0;
    let mut segments = Vec::new();
    for ((len, context), table) in sequences.iter().zip(tables) {
        segments.push(Segment { start, len: *len, context: *context, table });
        start += len;
    }
    segments
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
    let q = Random::new(9).vector(tokens * shape.heads * shape.head_dim);
    let q: Vec<f32> = q.iter().map(|x| x * 3.0).collect();
    let segments = segments(sequences, &cache.tables);
    let mut expected = Vec::new();
    for (segment, content) in segments.iter().zip(&contents) {
        for i in 0..segment.len {
            for head in 0..shape.heads {
                let at = ((segment.start + i) * shape.heads + head) * shape.head_dim;
                let q = &q[at..at + shape.head_dim];
                expected.extend(reference::row(q, content, shape, segment.position(i), head));
            }
        }
    }
    let arena = if as_bf16 { Kv::Bf16(&rounded) } else { Kv::F32(&cache.arena) };
    for isa in Isa::available() {
        let one = run(isa, 1, &q, shape, cache.layer, &segments, arena);
        assert_close(&format!("{isa} {shape:?}"), &one, &expected, 1e-5);
        let three = run(isa, 3, &q, shape, cache.layer, &segments, arena);
        assert_eq!(one, three, "{isa} {shape:?}: threads change nothing");
    }
}

const RAGGED: [(usize, usize); 12] = [
    (1, 1),
    (1, 63),
    (1, 64),
    (1, 65),
    (3, 3),
    (3, 66),
    (7, 130),
    (63, 63),
    (64, 64),
    (65, 129),
    (129, 129),
    (2, 513),
];

#[test]
fn every_shape_and_window_agrees_with_f64() {
    for (heads, kv_heads, head_dim) in [(1, 1, 3), (3, 3, 16), (6, 2, 33), (5, 1, 8), (7, 7, 5)] {
        for window in [None, Some(1), Some(63), Some(64), Some(65)] {
            check(&Gqa { heads, kv_heads, head_dim, scale: 0.7, window }, &RAGGED, false);
        }
    }
}

#[test]
fn a_bf16_cache_is_read_as_what_it_holds() {
    let shape = Gqa { heads: 4, kv_heads: 2, head_dim: 128, scale: 0.09, window: None };
    check(&shape, &[(1, 65), (65, 129)], true);
}

#[test]
fn long_contexts_are_split_and_merged() {
    // Contexts on both sides of several splits; one alone fills more than a wave of one thread.
    let many = flash::SPLIT * (SLOTS_PER_THREAD + 2);
    for window in [None, Some(600), Some(64)] {
        let shape = Gqa { heads: 2, kv_heads: 1, head_dim: 4, scale: 0.5, window };
        let sequences = [(1, 511), (1, 512), (2, 513), (70, 1100), (1, many + 1), (3, many + 70)];
        check(&shape, &sequences, false);
    }
}

#[test]
fn a_chunk_gives_the_bits_that_single_rows_give() {
    for window in [None, Some(65)] {
        let shape = Gqa { heads: 6, kv_heads: 2, head_dim: 24, scale: 0.25, window };
        let (cache, _) = Cache::random(&[1100], 2 * 2 * 24, 4);
        let width = shape.heads * shape.head_dim;
        let q = Random::new(2).vector(600 * width);
        let arena = Kv::F32(&cache.arena);
        let at = |len: usize, context: usize, q: &[f32]| {
            let segment = Segment { start: 0, len, context, table: &cache.tables[0] };
            run(Isa::detect(), 2, q, &shape, cache.layer, &[segment], arena)
        };
        let whole = at(600, 1100, &q);
        for i in [0, 1, 10, 11, 12, 20, 63, 64, 300, 599] {
            let rows = i * width..(i + 1) * width;
            assert_eq!(at(1, 501 + i, &q[rows.clone()]), whole[rows], "row {i} {window:?}");
        }
    }
}

#[test]
fn nan_in_one_sequence_stays_there() {
    let shape = Gqa { heads: 2, kv_heads: 1, head_dim: 8, scale: 0.5, window: None };
    let (mut cache, _) = Cache::random(&[70, 700, 70], 16, 5);
    let poisoned_at = usize::try_from(cache.tables[1][1]).expect("small") + cache.layer.offset;
    cache.arena[poisoned_at] = f32::NAN;
    let q = Random::new(3).vector(6 * 16);
    let segments = segments(&[(1, 70), (3, 700), (2, 70)], &cache.tables);
    for isa in Isa::available() {
        let out = run(isa, 2, &q, &shape, cache.layer, &segments, Kv::F32(&cache.arena));
        for (token, row) in out.chunks_exact(16).enumerate() {
            let in_second = (1..4).contains(&token);
            assert!(row.iter().all(|x| x.is_nan() == in_second), "{isa}: token {token}: {row:?}");
        }
    }
}

#[test]
fn keys_that_a_row_does_not_see_do_not_touch_it() {
    // The newest token's key and value are NaN: only the newest row may know.
    for window in [None, Some(5)] {
        let shape = Gqa { heads: 3, kv_heads: 1, head_dim: 16, scale: 0.5, window };
        let (mut cache, _) = Cache::random(&[70], 32, 5);
        let newest = usize::try_from(cache.tables[0][1]).expect("small") + 5 + 5 * 32;
        cache.arena[newest..newest + 32].fill(f32::NAN);
        let q = Random::new(3).vector(20 * 48);
        let segments = segments(&[(20, 70)], &cache.tables);
        for isa in Isa::available() {
            let out = run(isa, 2, &q, &shape, cache.layer, &segments, Kv::F32(&cache.arena));
            assert!(out[..19 * 48].iter().all(|x| x.is_finite()), "{isa}");
            assert!(out[19 * 48..].iter().all(|x| x.is_nan()), "{isa}");
        }
    }
}

#[test]
#[should_panic(expected = "leaves the arena")]
fn a_table_that_names_foreign_memory_is_refused() {
    let shape = Gqa { heads: 1, kv_heads: 1, head_dim: 1, scale: 1.0, window: None };
    let segment = Segment { start: 0, len: 1, context: 1, table: &[1] };
    let layer = KvLayer { offset: 0, row: 2 };
    run(Isa::Scalar, 1, &[1.0], &shape, layer, &[segment], Kv::F32(&[0.0; 128]));
}
