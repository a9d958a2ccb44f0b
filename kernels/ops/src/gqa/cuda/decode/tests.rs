//! Pieces against f64, and the fused launch against the ops one by one, which have references of their
//! own.

mod long;

use super::*;
use crate::cuda::testing::paged::{Cache, Sent};
use crate::cuda::testing::{Device, assert_near, device, rounded};
use crate::gqa::{cuda as grouped, reference};
use crate::norm::cuda::head_norm;
use crate::paged::{BLOCK, cuda::write_kv};
use crate::rope::cuda::rope;
use crate::testing::Random;

const BF16: Dtype = Dtype::Bf16;
/// Rows of garbage behind the real ones.
const PADDING: usize = 3;
/// Roundings of weights to bf16 before they meet the values, and of the result.
const TOLERANCE: f64 = 8e-3;

fn shape_of(heads: usize, kv_heads: usize, head_dim: usize) -> Gqa {
    let scale = 1.0 / (head_dim as f32).sqrt();
    Gqa { heads, kv_heads, head_dim, scale, window: None }
}

/// A cut of a step's keys on the device.
struct Cutting {
    map: TensorMap,
    pieces: DeviceSlice,
    partials: Partials,
    blocks: usize,
    rows: usize,
}

impl Cutting {
    fn new(device: &Device, gqa: &Gqa, cache: &Cache, sent: &Sent, blocks: usize) -> Self {
        let (rows, lines) = (cache.rows(), lines(gqa));
        let mut cut = Cut::default();
        let at = |entry: usize| cache.tables.get(entry).copied();
        cut.make(&cache.segments, at, rows + PADDING, lines, blocks);
        let (most, slots) = Cut::most(rows, lines, blocks);
        let mut words: Vec<u32> = cut.pieces.iter().flat_map(Piece::words).collect();
        words.resize(most * Piece::WORDS, u32::MAX);
        let memory = device.poisoned(Partials::bytes(slots, gqa.head_dim));
        let partials = Partials::take(&mut Arena::new(memory), &device.stream, slots, gqa.head_dim);
        Self {
            map: cache_map(gqa, sent.arena().slice).expect("a map"),
            pieces: device.send(&words),
            partials: partials.expect("room"),
            blocks,
            rows,
        }
    }

    fn plan<'a>(&'a self, tables: &'a DeviceSlice) -> Plan<'a> {
        let Self { map, pieces, blocks, rows, .. } = self;
        Plan { map, pieces, tables, blocks: *blocks, decodes: *rows }
    }
}

/// Results of the real rows, twice: counters are as they were.
fn run(device: &Device, cache: &Cache, q: &[f32], gqa: &Gqa, blocks: usize) -> Vec<f32> {
    let sent = cache.send(device, 1, 1);
    let cutting = Cutting::new(device, gqa, cache, &sent, blocks);
    let plan = cutting.plan(sent.tables());
    let mut q = q.to_vec();
    q.resize((cache.rows() + PADDING) * gqa.heads * gqa.head_dim, f32::NAN);
    let q = device.send_as(&q, BF16);
    let rows = Rows::exactly(cache.rows() + PADDING);
    let mut results = [0, 1].map(|_| {
        let out = device.poisoned(q.bytes());
        let core = grouped::Core::Pieces(&plan, &cutting.partials);
        let q = Strided::dense(&q, gqa.heads * gqa.head_dim);
        grouped::attention(device.queue(), rows, q, gqa, cache.layer, sent.arena(), core, &out)
            .expect("a launch");
        device.fetch_as(&out, BF16)
    });
    let real = cache.rows() * gqa.heads * gqa.head_dim;
    assert!(results[0][real..].iter().all(|x| x.is_nan()), "padding is not written");
    results.each_mut().iter_mut().for_each(|result| result.truncate(real));
    let [first, second] = results;
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&first), bits(&second), "{gqa:?} in {blocks} blocks");
    first
}

fn check(device: &Device, gqa: &Gqa, sequences: &[(usize, usize)], blocks: &[usize]) {
    let Gqa { heads, kv_heads, head_dim, .. } = *gqa;
    let cache = Cache::whole_rows(sequences, 2 * kv_heads * head_dim, BF16, 3);
    let q = Random::new(9).vector(cache.rows() * heads * head_dim);
    let q = rounded(&q.iter().map(|x| x * 2.0).collect::<Vec<_>>(), BF16);
    let mut expected = Vec::new();
    for (segment, content) in cache.segments.iter().zip(&cache.contents) {
        for i in 0..segment.len as usize {
            for head in 0..heads {
                let at = ((segment.start as usize + i) * heads + head) * head_dim;
                let position = segment.context as usize - segment.len as usize + i;
                let q = &q[at..at + head_dim];
                expected.extend(reference::row(q, content, gqa, position, head));
            }
        }
    }
    for &blocks in blocks {
        let got = run(device, &cache, &q, gqa, blocks);
        assert_near(&format!("{gqa:?} in {blocks} blocks"), &got, &expected, TOLERANCE);
    }
}

#[test]
fn pieces_agree_with_f64() {
    let Some(device) = device() else { return };
    let decodes = [(1, 1), (1, 15), (1, 16), (1, 63), (1, 64), (1, 65), (3, 130), (1, 513), (2, 2)];
    for head_dim in [64, 128] {
        for (heads, kv_heads) in [(1, 1), (6, 3), (5, 1), (8, 2), (7, 1), (8, 1), (9, 1), (32, 2)] {
            check(&device, &shape_of(heads, kv_heads, head_dim), &decodes, &[1, 7, 132]);
        }
    }
    let long = [(1, 4097), (5, 3000), (1, 7000)];
    check(&device, &shape_of(8, 2, 128), &long, &[1, 132]);
}

#[test]
fn nan_in_one_sequence_leaves_the_others_bit_for_bit() {
    let Some(device) = device() else { return };
    let gqa = shape_of(8, 2, 128);
    let mut cache = Cache::whole_rows(&[(1, 70), (1, 700), (2, 90)], 512, BF16, 5);
    let q = Random::new(3).vector(4 * 1024);
    for blocks in [1, 5, 132] {
        let clean = run(&device, &cache, &q, &gqa, blocks);
        for element in [0, 256] {
            // A key of the first head, then a value.
            let at = cache.at(cache.segments[1].table as usize, 100) + element;
            let was = std::mem::replace(&mut cache.arena[at], f32::NAN);
            let got = run(&device, &cache, &q, &gqa, blocks);
            cache.arena[at] = was;
            assert!(got[1024..1536].iter().any(|x| x.is_nan()), "{blocks}: itself");
            assert_eq!(got[..1024], clean[..1024], "{blocks}: before");
            assert_eq!(got[1536..], clean[1536..], "{blocks}: the other head, and after");
        }
    }
}

/// Results and the cache of a step that only decodes: fused, or by the ops.
fn step(
    device: &Device,
    gqa: &Gqa,
    contexts: &[usize],
    normed: bool,
    as_one: bool,
) -> [Vec<f32>; 2] {
    let Gqa { heads, kv_heads, head_dim, .. } = *gqa;
    let sequences: Vec<_> = contexts.iter().map(|context| (1, *context)).collect();
    let row = 2 * kv_heads * head_dim;
    let mut cache = Cache::whole_rows(&sequences, row, BF16, 21);
    for segment in cache.segments.clone() {
        // What is not written yet may be anything, in this place and behind it.
        let last = segment.context as usize - 1;
        for position in last..(last + 1).next_multiple_of(BLOCK) {
            let at = cache.at(segment.table as usize, position);
            cache.arena[at..at + row].fill(f32::NAN);
        }
    }
    let (real, padded) = (contexts.len(), contexts.len() + PADDING);
    let mut random = Random::new(22);
    let mut numbers = |len: usize| rounded(&random.vector(len), BF16);
    let (mut q, mut kv) = (numbers(padded * heads * head_dim), numbers(padded * row));
    q[real * heads * head_dim..].fill(f32::NAN);
    kv[real * row..].fill(f32::NAN);
    let weights = [numbers(head_dim), numbers(head_dim)].map(|weight| device.send(&weight));
    // Fused, both are parts of the same rows.
    let (width, wide) = (heads * head_dim, heads * head_dim + row);
    let both: Vec<f32> = q
        .chunks_exact(width)
        .zip(kv.chunks_exact(row))
        .flat_map(|(q, kv)| [q, kv].concat())
        .collect();
    let [q, kv, both] = [q, kv, both].map(|x| device.send_as(&x, BF16));
    let second = both.slice(width * 2..both.bytes());
    let [of_q, of_kv] = match as_one {
        true => [&both, &second].map(|slice| Strided { slice, stride: wide }),
        false => [Strided::dense(&q, width), Strided::dense(&kv, row)],
    };
    let inv_freq: Vec<f32> = (0..head_dim / 2).map(|i| 0.7_f32.powi(i as i32)).collect();
    let inv_freq = device.send(&inv_freq);
    let mut positions: Vec<u32> = cache.segments.iter().map(|s| s.context - 1).collect();
    let mut row_tables: Vec<u32> = cache.segments.iter().map(|s| s.table).collect();
    positions.resize(padded, u32::MAX);
    row_tables.resize(padded, u32::MAX);
    let [positions, row_tables, count] =
        [positions, row_tables, vec![real as u32]].map(|words| device.send(&words));
    let rows = Rows { padded, count: Some(&count) };
    let sent = cache.send(device, 1, 1);
    let cutting = Cutting::new(device, gqa, &cache, &sent, 132);
    let (plan, partials) = (cutting.plan(sent.tables()), &cutting.partials);
    let norms = weights.each_ref().map(|weight| HeadNorm { weight, eps: 1e-6 });
    let of = Projected {
        q: of_q,
        kv: of_kv,
        norms: normed.then_some(norms),
        rope: Rope { inv_freq: &inv_freq, factor: 1.1, pairing: Pairing::Halves },
        to: Destination {
            arena: sent.arena(),
            positions: &positions,
            row_tables: &row_tables,
            tables: sent.tables(),
        },
        layer: cache.layer,
    };
    let (on, out) = (device.queue(), device.poisoned(q.bytes()));
    if as_one {
        fused(on, rows, gqa, &of, &plan, partials, &out).expect("a launch");
    } else {
        for ((x, of_x), norm) in [&q, &kv].into_iter().zip(super::heads(gqa)).zip(norms) {
            let x = Tensor::new(x, BF16);
            if normed {
                head_norm(on, rows, x, &of_x, norm.weight, norm.eps).expect("a launch");
            }
            rope(on, rows, x, &of_x, of.to.positions, &of.rope).expect("a launch");
        }
        write_kv(on, rows, of_kv, of.layer, &of.to).expect("a launch");
        attention(on, rows, of_q, gqa, of.layer, sent.arena(), &plan, partials, &out)
            .expect("a launch");
    }
    let mut got = [&out, sent.arena().slice].map(|x| device.fetch_as(x, BF16));
    got[0].truncate(real * heads * head_dim);
    got
}

#[test]
fn the_fused_launch_equals_the_ops_bit_for_bit() {
    let Some(device) = device() else { return };
    let contexts = [1, 2, 16, 17, 64, 65, 130, 700, 5000];
    for (heads, kv_heads, head_dim) in [(8, 2, 128), (5, 1, 128), (16, 8, 64), (9, 1, 64)] {
        let gqa = shape_of(heads, kv_heads, head_dim);
        for normed in [true, false] {
            let [fused, ops] =
                [true, false].map(|as_one| step(&device, &gqa, &contexts, normed, as_one));
            for (what, fused, ops) in [("out", &fused[0], &ops[0]), ("cache", &fused[1], &ops[1])] {
                let differs = (fused.iter().zip(ops)).position(|(a, b)| a.to_bits() != b.to_bits());
                assert_eq!(differs, None, "{gqa:?}, {what}, normed: {normed}");
            }
            assert!(fused[0].iter().all(|x| x.is_finite()));
        }
    }
}

#[test]
fn shapes_that_are_not_served_are_told() {
    let layer = |gqa: &Gqa| {
        let row = 2 * gqa.kv_heads * gqa.head_dim;
        KvLayer { offset: 3 * row, row }
    };
    for (heads, kv_heads, head_dim) in [(1, 1, 64), (32, 8, 128), (128, 1, 128)] {
        let gqa = shape_of(heads, kv_heads, head_dim);
        assert!(serves(&gqa, layer(&gqa), BF16));
        assert!(!serves(&gqa, layer(&gqa), Dtype::F32));
        assert!(!serves(&Gqa { window: Some(64), ..gqa }, layer(&gqa), BF16));
        assert!(!serves(&gqa, KvLayer { offset: 64, ..layer(&gqa) }, BF16));
    }
    let wide = shape_of(4, 2, 256);
    assert!(!serves(&wide, layer(&wide), BF16));
}
