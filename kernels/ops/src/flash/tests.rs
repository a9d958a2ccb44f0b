//! The cut into pieces covers each visible key once, and waves of any size give the same bits.

use super::*;
use crate::paged::Segment;
use crate::testing::{Random, poisoned};
use crate::tile::Lines;
use device::{Isa, ThreadPool};
use std::sync::Mutex;

static TABLE: [u64; 64] = [0; 64];

fn segments() -> Vec<Segment<'static>> {
    let mut start = 0;
    [(1, 1), (3, 700), (1, 1024), (130, 1025), (2, 3000)]
        .into_iter()
        .map(|(len, context)| {
            let segment = Segment { start, len, context, table: &TABLE };
            start += len;
            segment
        })
        .collect()
}

#[test]
fn pieces_cover_what_rows_see_once_and_in_order() {
    let segments = segments();
    for (tile, window) in [(1, None), (7, None), (64, Some(1)), (16, Some(600))] {
        let work = Work { segments: &segments, rows: 2..135, heads: 2, tile, window };
        let mut seen = vec![[0_usize; 2]; 137];
        let mut before: Option<Piece> = None;
        for piece in work.pieces() {
            let same = before.is_some_and(|b: Piece| {
                (b.segment, b.head, b.first) == (piece.segment, piece.head, piece.first)
            });
            assert_eq!(piece.opens, !same, "{piece:?}");
            if let Some(before) = before {
                assert_eq!(before.closes, !same, "{before:?}");
                assert!(!same || before.end == piece.begin && piece.begin.is_multiple_of(SPLIT));
            }
            assert_eq!(piece.begin / SPLIT, (piece.end - 1) / SPLIT, "one split");
            let segment = &segments[piece.segment];
            for row in piece.first..piece.first + piece.rows {
                let sees = visible(segment.position(row), window);
                let (begin, end) = (sees.start.max(piece.begin), sees.end.min(piece.end));
                seen[segment.start + row][piece.head] += end.saturating_sub(begin);
            }
            before = Some(piece);
        }
        assert!(before.is_some_and(|last| last.closes));
        for segment in &segments {
            for i in 0..segment.len {
                let row = segment.start + i;
                let expected = visible(segment.position(i), window).len();
                let expected = if (2..135).contains(&row) { expected } else { 0 };
                assert_eq!(seen[row], [expected; 2], "row {row} {window:?}");
            }
        }
    }
}

/// Attention of width one over keys and values from one vector, in waves of `capacity` slots.
fn attend(capacity: usize, threads: usize, kv: &[f32]) -> Vec<f32> {
    let segments = segments();
    let work = Work { segments: &segments, rows: 0..137, heads: 1, tile: 5, window: None };
    let len = State::len(5, 1);
    let mut memory = poisoned(capacity * len);
    let out = Mutex::new(vec![f32::NAN; 137]);
    let isa = Isa::detect();
    let compute = |piece: &Piece, state: &mut State<'_>, _: &mut [f32]| {
        let ones = [1.0; 5];
        let queries = Queries { isa, lines: Lines::new(&ones, piece.rows, 1, 1), scale: 2.0 };
        for base in (piece.begin..piece.end).step_by(64) {
            let count = (piece.end - base).min(64);
            let lines = Lines::new(&kv[base..], count, 1, 1);
            state.absorb(queries, lines, lines, |m| {
                let position = segments[piece.segment].position(piece.first + m);
                0..(position + 1).saturating_sub(base).min(count)
            });
        }
    };
    let finish = |piece: &Piece, state: &State<'_>| {
        let mut out = out.lock().expect("no panic");
        for m in 0..piece.rows {
            let row = segments[piece.segment].start + piece.first + m;
            assert!(out[row].is_nan(), "row {row} is finished once");
            state.finish(m, &mut out[row..=row]);
        }
    };
    let slots = Slots { memory: &mut memory, len, lines: 1, width: 1 };
    run(&ThreadPool::new(threads), &work, slots, &compute, &finish);
    out.into_inner().expect("no panic")
}

#[test]
fn waves_of_any_size_give_the_same_bits() {
    let kv = Random::new(3).vector(3000);
    let expected = attend(2, 1, &kv);
    assert!(expected.iter().all(|x| x.is_finite()));
    for (capacity, threads) in [(2, 3), (3, 1), (5, 2), (7, 3), (64, 2), (1000, 2)] {
        assert_eq!(attend(capacity, threads, &kv), expected, "{capacity} slots");
    }
    let weights: Vec<f64> = kv.iter().map(|x| (2.0 * f64::from(*x)).exp()).collect();
    let sum: f64 = weights.iter().zip(&kv).map(|(w, x)| w * f64::from(*x)).sum();
    let exact = sum / weights.iter().sum::<f64>();
    assert!((f64::from(expected[136]) - exact).abs() < 1e-6, "{} {exact}", expected[136]);
}

#[test]
#[should_panic(expected = "scratch for two slots")]
fn too_little_scratch_is_refused() {
    attend(1, 1, &[0.0; 3000]);
}
