//! Every variant against the f64 reference at every border.

mod long;
mod prompts;

use super::*;
use crate::cuda::testing::paged::{Cache, LONG, RAGGED};
use crate::cuda::testing::{Device, assert_near, device, rounded};
use crate::flash::cuda::splits;
use crate::gqa::reference;
use crate::testing::Random;
use device::cuda::{Arena, DeviceMemory};

fn run(
    device: &Device,
    cache: &Cache,
    q: &[f32],
    shape: &Gqa,
    variant: Variant,
    splits: usize,
) -> Vec<f32> {
    let core = shape_of(shape, cache.dtype);
    let sent = cache.send(device, core.group, core.tile_lines(variant));
    let q = device.send_as(q, cache.dtype);
    let out = device.poisoned(q.bytes());
    let lines = cache.rows() * shape.heads * splits;
    let bytes = Partials::bytes(lines, shape.head_dim);
    let memory = DeviceMemory::allocate(&device.context, "partials", bytes).expect("memory");
    device.stream.fill(&memory, 0xFF).expect("a fill");
    let partials = Partials::take(&mut Arena::new(memory), lines, shape.head_dim);
    let partials = partials.expect("an arena of that size");
    let rows = Rows::exactly(cache.rows());
    let plan = sent.plan(variant, splits);
    let core = Core::Tiles(&plan, &partials);
    let q = Strided::dense(&q, shape.heads * shape.head_dim);
    attention(device.queue(), rows, q, shape, cache.layer, sent.arena(), core, &out)
        .expect("a launch");
    device.fetch_as(&out, cache.dtype)
}

fn check(
    device: &Device,
    shape: &Gqa,
    sequences: &[(usize, usize)],
    dtype: Dtype,
    variants: &[Variant],
) {
    let cache = Cache::new(sequences, 2 * shape.kv_heads * shape.head_dim, dtype, 3);
    let width = shape.heads * shape.head_dim;
    let q: Vec<f32> = Random::new(9).vector(cache.rows() * width).iter().map(|x| x * 2.0).collect();
    let q = rounded(&q, dtype);
    let mut expected = Vec::new();
    for (segment, content) in cache.segments.iter().zip(&cache.contents) {
        for i in 0..segment.len as usize {
            for head in 0..shape.heads {
                let at = ((segment.start as usize + i) * shape.heads + head) * shape.head_dim;
                let position = segment.context as usize - segment.len as usize + i;
                let q = &q[at..at + shape.head_dim];
                expected.extend(reference::row(q, content, shape, position, head));
            }
        }
    }
    // A result's rounding, and that of weights to bf16 before they meet the values.
    let tolerance = match dtype {
        Dtype::F32 => 1e-4,
        Dtype::Bf16 => 8e-3,
    };
    let auto = splits(132, cache.segments.len(), shape.kv_heads, 8192);
    for variant in variants {
        for splits in [1, 2, auto, 7] {
            let got = run(device, &cache, &q, shape, *variant, splits);
            let what = format!("{variant:?} {splits} {shape:?}");
            assert_near(&what, &got, &expected, tolerance);
        }
    }
}

#[test]
fn any_shape_and_window_agrees_with_f64() {
    let Some(device) = device() else { return };
    for (heads, kv_heads, head_dim) in [(1, 1, 3), (6, 2, 33), (5, 1, 8)] {
        for window in [None, Some(1), Some(64), Some(65)] {
            let shape = Gqa { heads, kv_heads, head_dim, scale: 0.7, window };
            for dtype in [Dtype::F32, Dtype::Bf16] {
                check(&device, &shape, &RAGGED, dtype, &[Variant::Any]);
            }
        }
    }
}

#[test]
fn tensor_cores_agree_with_f64() {
    let Some(device) = device() else { return };
    let shapes = [(8, 2, 128), (3, 3, 64), (5, 1, 80), (4, 4, 256), (32, 1, 64)];
    for (heads, kv_heads, head_dim) in shapes {
        for window in [None, Some(63), Some(65)] {
            let scale = 1.0 / (head_dim as f32).sqrt();
            let shape = Gqa { heads, kv_heads, head_dim, scale, window };
            let both = [Variant::Few, Variant::Many];
            check(&device, &shape, &RAGGED, Dtype::Bf16, &both);
        }
    }
}

#[test]
fn long_contexts_are_split_and_merged() {
    let Some(device) = device() else { return };
    for window in [None, Some(600)] {
        let shape = Gqa { heads: 8, kv_heads: 2, head_dim: 128, scale: 0.088, window };
        let variants = [Variant::Few, Variant::Many, Variant::Any];
        check(&device, &shape, &LONG, Dtype::Bf16, &variants);
        let shape = Gqa { heads: 2, kv_heads: 1, head_dim: 20, scale: 0.3, window };
        check(&device, &shape, &LONG, Dtype::F32, &[Variant::Any]);
    }
}

#[test]
fn nan_in_one_sequence_leaves_the_others_bit_for_bit() {
    let Some(device) = device() else { return };
    let shape = Gqa { heads: 4, kv_heads: 2, head_dim: 64, scale: 0.125, window: None };
    let mut cache = Cache::new(&[(1, 70), (3, 700), (2, 70)], 256, Dtype::Bf16, 5);
    let q = Random::new(3).vector(6 * 256);
    for variant in [Variant::Few, Variant::Many, Variant::Any] {
        for splits in [1, 3] {
            let clean = run(&device, &cache, &q, &shape, variant, splits);
            let at = cache.at(cache.segments[1].table as usize, 10);
            let was: Vec<f32> = cache.arena[at..at + 256].to_vec();
            cache.arena[at..at + 256].fill(f32::NAN);
            let got = run(&device, &cache, &q, &shape, variant, splits);
            cache.arena[at..at + 256].copy_from_slice(&was);
            assert!(got[256..4 * 256].iter().all(|x| x.is_nan()), "{variant:?} {splits}");
            assert_eq!(got[..256], clean[..256]);
            assert_eq!(got[4 * 256..], clean[4 * 256..]);
        }
    }
}
