//! The absorbed form on the device against f64: the paper's own form for small shapes, the absorbed one
//! in f64 at native widths.

use super::*;
use crate::cuda::testing::paged::{Cache, LONG, RAGGED};
use crate::cuda::testing::{Device, assert_near, device, rounded};
use crate::mla::reference;
use crate::testing::Random;
use device::cuda::DeviceMemory;

fn run(
    device: &Device,
    cache: &Cache,
    q: &[f32],
    kv_b: &[f32],
    mla: &Mla,
    variant: Variant,
    splits: usize,
) -> Vec<f32> {
    let dtype = cache.dtype;
    let core = core(mla, dtype);
    let sent = cache.send(device, mla.heads, core.tile_lines(variant));
    let (q, kv_b) = (device.send_as(q, dtype), device.send_as(kv_b, dtype));
    let absorbed = device.poisoned(absorbed_len(mla) * dtype.size());
    absorb_weights(device.queue(), mla, Tensor::new(&kv_b, dtype), &absorbed).expect("a launch");
    let rows = cache.rows();
    let lines = rows * mla.heads * splits;
    let bytes = Scratch::bytes(mla, dtype, rows, lines);
    let memory = DeviceMemory::allocate(&device.context, "scratch", bytes).expect("memory");
    device.stream.fill(&memory, 0xFF).expect("a fill");
    let scratch = Scratch::take(&mut Arena::new(memory), mla, dtype, rows, lines);
    let scratch = scratch.expect("an arena of that size");
    let out = device.poisoned(rows * mla.heads * mla.v * dtype.size());
    let weights = Weights { absorbed: &absorbed, kv_b: &kv_b };
    let plan = sent.plan(variant, splits);
    let (queue, rows) = (device.queue(), Rows::exactly(rows));
    attention(queue, rows, &q, &weights, mla, cache.layer, sent.arena(), &plan, &scratch, &out)
        .expect("a launch");
    device.fetch_as(&out, dtype)
}

/// The absorbed form of one row and head in f64.
fn absorbed_row(
    q: &[f32],
    kv: &[f32],
    kv_b: &[f32],
    mla: &Mla,
    position: usize,
    head: usize,
) -> Vec<f64> {
    let Mla { nope, rope, v, latent, scale, .. } = *mla;
    let row = |i: usize| &kv_b[(head * (nope + v) + i) * latent..][..latent];
    let mut query = vec![0.0_f64; latent];
    for (n, q) in q[..nope].iter().enumerate() {
        query.iter_mut().zip(row(n)).for_each(|(y, w)| *y += f64::from(*q) * f64::from(*w));
    }
    query.extend(q[nope..].iter().map(|x| f64::from(*x)));
    let line = |t: usize| &kv[t * (latent + rope)..][..latent + rope];
    let scores: Vec<f64> = (0..=position)
        .map(|t| query.iter().zip(line(t)).map(|(a, b)| a * f64::from(*b)).sum::<f64>())
        .map(|score| score * f64::from(scale))
        .collect();
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mass: f64 = scores.iter().map(|s| (s - top).exp()).sum();
    let mut sum = vec![0.0_f64; latent];
    for (t, score) in scores.iter().enumerate() {
        let weight = (score - top).exp() / mass;
        sum.iter_mut().zip(line(t)).for_each(|(y, x)| *y += weight * f64::from(*x));
    }
    (0..v).map(|i| sum.iter().zip(row(nope + i)).map(|(a, b)| a * f64::from(*b)).sum()).collect()
}

type Row = fn(&[f32], &[f32], &[f32], &Mla, usize, usize) -> Vec<f64>;

fn check(
    device: &Device,
    mla: &Mla,
    sequences: &[(usize, usize)],
    dtype: Dtype,
    variants: &[Variant],
    reference: Row,
) {
    let Mla { heads, nope, rope, v, latent, .. } = *mla;
    let cache = Cache::new(sequences, latent + rope, dtype, 11);
    let mut random = Random::new(12);
    let width = heads * (nope + rope);
    let q = rounded(&random.vector(cache.rows() * width), dtype);
    // As trained weights are: products keep the size of what goes in.
    let size = (3.0 / latent as f32).sqrt();
    let kv_b: Vec<f32> =
        random.vector(heads * (nope + v) * latent).iter().map(|x| x * size).collect();
    let kv_b = rounded(&kv_b, dtype);
    let mut expected = Vec::new();
    for (segment, content) in cache.segments.iter().zip(&cache.contents) {
        for i in 0..segment.len as usize {
            for head in 0..heads {
                let at = (segment.start as usize + i) * width + head * (nope + rope);
                let position = segment.context as usize - segment.len as usize + i;
                let q = &q[at..at + nope + rope];
                expected.extend(reference(q, content, &kv_b, mla, position, head));
            }
        }
    }
    // In bf16 queries, weights, sums and results are rounded one after the other.
    let tolerance = match dtype {
        Dtype::F32 => 1e-4,
        Dtype::Bf16 => 1.6e-2,
    };
    for variant in variants {
        for splits in [1, 2, 9] {
            let got = run(device, &cache, &q, &kv_b, mla, *variant, splits);
            assert_near(&format!("{variant:?} {splits} {mla:?}"), &got, &expected, tolerance);
        }
    }
}

const NATIVE: Mla = Mla { heads: 2, nope: 128, rope: 64, v: 128, latent: 512, scale: 0.072 };

#[test]
fn any_shape_agrees_with_the_paper() {
    let Some(device) = device() else { return };
    for (heads, nope, rope, v, latent) in [(1, 1, 1, 1, 1), (3, 5, 2, 7, 9), (2, 16, 8, 16, 24)] {
        let mla = Mla { heads, nope, rope, v, latent, scale: 0.4 };
        for dtype in [Dtype::F32, Dtype::Bf16] {
            check(&device, &mla, &RAGGED, dtype, &[Variant::Any], reference::row);
        }
    }
}

#[test]
fn native_widths_agree_with_f64_on_tensor_cores() {
    let Some(device) = device() else { return };
    let both = [Variant::Few, Variant::Many];
    check(&device, &NATIVE, &RAGGED, Dtype::Bf16, &both, absorbed_row);
    for heads in [16, 40, 128] {
        let mla = Mla { heads, ..NATIVE };
        let steps = [(1, 1), (1, 65), (3, 130), (2, 300)];
        check(&device, &mla, &steps, Dtype::Bf16, &both, absorbed_row);
    }
    check(&device, &NATIVE, &LONG, Dtype::Bf16, &both, absorbed_row);
    check(&device, &NATIVE, &[(2, 200)], Dtype::F32, &[Variant::Any], absorbed_row);
}
