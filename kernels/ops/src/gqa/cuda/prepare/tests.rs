//! The one launch against the ops one by one, which have references of their own.

use super::*;
use crate::cuda::testing::{Device, device, rounded};
use crate::cuda::{Strided, Tensor};
use crate::gqa::cuda::decode::{HeadNorm, heads};
use crate::norm::cuda::head_norm;
use crate::paged::{BLOCK, KvLayer, cuda::Destination, cuda::write_kv};
use crate::rope::{Pairing, cuda::Rope, cuda::rope};
use crate::testing::Random;

const BF16: Dtype = Dtype::Bf16;

/// Rows of a step, some of them padding, and elements between those of queries, keys and the next row.
struct Case {
    gqa: Gqa,
    rows: usize,
    padding: usize,
    between: usize,
    normed: bool,
}

/// Queries, keys and values as they lie in memory afterwards, and the cache.
fn run(device: &Device, case: &Case, dead: Option<u64>, as_one: bool) -> [Vec<f32>; 2] {
    let Case { gqa, rows: real, padding, between, normed } = *case;
    let Gqa { heads: count, kv_heads, head_dim, .. } = gqa;
    let (width, row, padded) = (count * head_dim, 2 * kv_heads * head_dim, real + padding);
    let (at, stride) = (width + between, width + row + 2 * between);
    let mut random = Random::new(31);
    let mut numbers = |len: usize| rounded(&random.vector(len), BF16);
    let mut x = numbers(padded * stride);
    x[real * stride..].fill(f32::NAN);
    let weights = [numbers(head_dim), numbers(head_dim)].map(|weight| device.send(&weight));
    let inv_freq: Vec<f32> = (0..head_dim / 2).map(|i| 0.7_f32.powi(i as i32)).collect();
    // Every third row is of the second sequence; both begin somewhere.
    let blocks = real / BLOCK + 3;
    let layer = KvLayer { offset: row, row };
    let block = (layer.offset + BLOCK * row + 8) as u64;
    let mut tables: Vec<u64> =
        (0..2 * blocks as u64).map(|i| i * 7 % (2 * blocks as u64)).collect();
    if (2 * blocks).is_multiple_of(7) {
        tables = (0..2 * blocks as u64).rev().collect();
    }
    tables.iter_mut().for_each(|entry| *entry *= block);
    if let Some(dead) = dead {
        tables[0] = dead;
    }
    let mut next = [3_u32, 70];
    let mut row_tables = Vec::new();
    let mut positions = Vec::new();
    for i in 0..real {
        let of = usize::from(i % 3 == 2);
        positions.push(next[of]);
        row_tables.push((of * blocks) as u32);
        next[of] += 1;
    }
    positions.resize(padded, u32::MAX);
    row_tables.resize(padded, u32::MAX);
    let x = device.send_as(&x, BF16);
    let arena = device.poisoned(2 * blocks * block as usize * 2);
    let [positions, row_tables, real] =
        [positions, row_tables, vec![real as u32]].map(|words| device.send(&words));
    let (tables, inv_freq) = (device.send(&tables), device.send(&inv_freq));
    let norms = weights.each_ref().map(|weight| HeadNorm { weight, eps: 1e-6 });
    let keys = x.slice(at * 2..x.bytes());
    let of = Projected {
        q: Strided { slice: &x, stride },
        kv: Strided { slice: &keys, stride },
        norms: normed.then_some(norms),
        rope: Rope { inv_freq: &inv_freq, factor: 1.1, pairing: Pairing::Halves },
        to: Destination {
            arena: Tensor::new(&arena, BF16),
            positions: &positions,
            row_tables: &row_tables,
            tables: &tables,
        },
        layer,
    };
    let (on, rows) = (device.queue(), Rows { padded, count: Some(&real) });
    if as_one {
        prepare(on, rows, &gqa, &of).expect("a launch");
    } else {
        for ((x, of_x), norm) in [&x, &keys].into_iter().zip(heads(&gqa)).zip(norms) {
            let (x, of_x) = (Tensor::new(x, BF16), crate::norm::Heads { row: stride, ..of_x });
            if normed {
                head_norm(on, rows, x, &of_x, norm.weight, norm.eps).expect("a launch");
            }
            rope(on, rows, x, &of_x, of.to.positions, &of.rope).expect("a launch");
        }
        write_kv(on, rows, of.kv, layer, &of.to).expect("a launch");
    }
    [&x, &arena].map(|memory| device.fetch_as(memory, BF16))
}

fn gqa_of(heads: usize, kv_heads: usize, head_dim: usize) -> Gqa {
    Gqa { heads, kv_heads, head_dim, scale: 1.0, window: None }
}

fn differs(a: &[f32], b: &[f32]) -> Option<usize> {
    a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits())
}

#[test]
fn the_one_launch_equals_the_ops_bit_for_bit() {
    let Some(device) = device() else { return };
    for (heads, kv_heads, head_dim) in
        [(32, 8, 128), (8, 2, 64), (1, 1, 128), (9, 3, 64), (5, 5, 128), (64, 1, 64), (28, 4, 128)]
    {
        let gqa = gqa_of(heads, kv_heads, head_dim);
        for (rows, padding, between) in [(0, 2, 0), (1, 0, 0), (2, 3, 8), (77, 19, 0), (300, 0, 64)]
        {
            for normed in [true, false] {
                let case = Case { gqa, rows, padding, between, normed };
                let [one, ops] = [true, false].map(|as_one| run(&device, &case, None, as_one));
                let what = format!("{gqa:?}, {rows} rows, normed: {normed}");
                assert_eq!(differs(&one[1], &ops[1]), None, "cache: {what}");
                // Keys are not changed in place, and nothing else is touched.
                let (width, stride) =
                    (heads * head_dim, (heads + 2 * kv_heads) * head_dim + 2 * between);
                let queries = |x: &[f32]| -> Vec<f32> {
                    x.chunks_exact(stride).flat_map(|row| row[..width].to_vec()).collect()
                };
                assert_eq!(differs(&queries(&one[0]), &queries(&ops[0])), None, "queries: {what}");
                let mut random = Random::new(31);
                let mut before = rounded(&random.vector((rows + padding) * stride), BF16);
                before[rows * stride..].fill(f32::NAN);
                let rest = |x: &[f32]| -> Vec<f32> {
                    x.chunks_exact(stride).flat_map(|row| row[width..].to_vec()).collect()
                };
                let (got, before) = (rest(&one[0]), rest(&before));
                let same =
                    got.iter().zip(&before).all(|(a, b)| a == b || (a.is_nan() && b.is_nan()));
                assert!(same, "keys as projected: {what}");
                let written = one[1].iter().filter(|x| !x.is_nan()).count();
                assert_eq!(written, rows * 2 * kv_heads * head_dim, "{what}");
            }
        }
    }
}

#[test]
fn an_entry_outside_of_the_arena_is_passed_over() {
    let Some(device) = device() else { return };
    let case = Case { gqa: gqa_of(4, 2, 128), rows: 9, padding: 1, between: 0, normed: true };
    let alive = run(&device, &case, None, true);
    for dead in [u64::MAX, 1 << 40, 3] {
        let got = run(&device, &case, Some(dead), true);
        assert_eq!(differs(&got[0], &alive[0]), None, "queries do not mind");
        // The rows of the first sequence are nowhere, those of the second where they belong.
        let written = got[1].iter().filter(|x| !x.is_nan()).count();
        assert_eq!(written, 3 * 512, "{dead}");
    }
}

#[test]
fn what_is_not_served_is_refused() {
    let Some(device) = device() else { return };
    let memory = device.poisoned(1 << 16);
    let run = |gqa: Gqa, stride: usize, pairing: Pairing| {
        let row = 2 * gqa.kv_heads * gqa.head_dim;
        let of = Projected {
            q: Strided { slice: &memory, stride },
            kv: Strided::dense(&memory, row),
            norms: None,
            rope: Rope { inv_freq: &memory, factor: 1.0, pairing },
            to: Destination {
                arena: Tensor::new(&memory, BF16),
                positions: &memory,
                row_tables: &memory,
                tables: &memory,
            },
            layer: KvLayer { offset: 0, row },
        };
        prepare(device.queue(), Rows::exactly(2), &gqa, &of)
    };
    assert!(run(gqa_of(2, 1, 96), 192, Pairing::Halves).is_err(), "a width");
    assert!(run(gqa_of(2, 1, 64), 128, Pairing::Interleaved).is_err(), "a pairing");
    assert!(run(gqa_of(2, 1, 64), 132, Pairing::Halves).is_err(), "rows on 8 bytes");
    assert!(run(gqa_of(2, 1, 64), 64, Pairing::Halves).is_err(), "rows that overlap");
    assert!(run(gqa_of(512, 1, 64), 1 << 15, Pairing::Halves).is_err(), "rows that end outside");
}
