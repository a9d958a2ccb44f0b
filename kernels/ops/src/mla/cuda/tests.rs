//! The absorbed form on the device against f64: the paper's own form for small shapes, the absorbed one
//! in f64 at native widths.

mod long;

use super::*;
use crate::cuda::testing::paged::{Cache, LONG, RAGGED};
use crate::cuda::testing::{Device, assert_near, device, rounded};
use crate::flash::cuda::cut::{Cut, Piece};
use crate::mla::reference;
use crate::testing::Random;

/// Which kernels.
#[derive(Clone, Copy, Debug)]
enum By {
    Tiles(Variant),
    Pieces,
}

fn run(
    device: &Device,
    cache: &Cache,
    q: &[f32],
    kv_b: &[f32],
    mla: &Mla,
    by: By,
    splits: usize,
) -> Vec<f32> {
    let dtype = cache.dtype;
    let variant = match by {
        By::Tiles(variant) => variant,
        By::Pieces => Variant::Any,
    };
    let sent = cache.send(device, mla.heads, shape_of(mla, dtype).tile_lines(variant));
    let (q, kv_b) = (device.send_as(q, dtype), device.send_as(kv_b, dtype));
    let absorbed = device.poisoned(absorbed_len(mla) * dtype.size());
    absorb_weights(device.queue(), mla, Tensor::new(&kv_b, dtype), &absorbed).expect("a launch");
    let rows = cache.rows();
    let lines = rows * mla.heads * splits;
    let bytes = Scratch::bytes(mla, dtype, rows)
        + Partials::bytes(lines, mla.latent)
        + decode::Partials::bytes(Cut::most(rows, decode::lines(mla.heads), splits).1);
    let mut arena = Arena::new(device.poisoned(bytes));
    let scratch = Scratch::take(&mut arena, mla, dtype, rows).expect("room");
    let out = device.poisoned(rows * mla.heads * mla.v * dtype.size());
    let weights = Weights { absorbed: &absorbed, kv_b: &kv_b };
    let (queue, all) = (device.queue(), Rows::exactly(rows));
    let q = Strided::dense(&q, mla.heads * (mla.nope + mla.rope));
    let go = |core| {
        attention(queue, all, q, &weights, mla, cache.layer, sent.arena(), core, &scratch, &out)
            .expect("a launch");
    };
    match by {
        By::Tiles(variant) => {
            let partials = Partials::take(&mut arena, lines, mla.latent).expect("room");
            go(Core::Tiles(&sent.plan(variant, splits), &partials));
        }
        By::Pieces => {
            // As many blocks as there would be splits, from one to more than there are keys.
            let blocks = if splits == 1 { 1 } else { splits * 15 };
            let mut cut = Cut::default();
            let lines = decode::lines(mla.heads);
            cut.make(&cache.segments, |at| cache.tables.get(at).copied(), rows, lines, blocks);
            let (most, slots) = Cut::most(rows, lines, blocks);
            let mut words: Vec<u32> = cut.pieces.iter().flat_map(Piece::words).collect();
            words.resize(most * Piece::WORDS, u32::MAX);
            let slot_words: Vec<u32> = cut.slots.iter().flatten().copied().collect();
            let (pieces, slot_words) = (device.send(&words), device.send(&slot_words));
            let map = decode::cache_map(sent.arena().slice).expect("a map");
            let tables = sent.tables();
            let plan = decode::Plan {
                map: &map,
                pieces: &pieces,
                slots: &slot_words,
                tables,
                blocks,
                decodes: rows,
            };
            let memory = device.poisoned(decode::Partials::bytes(slots));
            let partials = decode::Partials::take(&mut Arena::new(memory), slots).expect("room");
            go(Core::Pieces(&plan, &partials));
        }
    }
    device.fetch_as(&out, dtype)
}

/// The absorbed form of one row and head in f64.
pub(super) fn absorbed_row(
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
    variants: &[By],
    reference: Row,
) {
    let Mla { heads, nope, rope, v, latent, .. } = *mla;
    let new = if matches!(variants, [By::Pieces]) { Cache::whole_rows } else { Cache::new };
    let cache = new(sequences, latent + rope, dtype, 11);
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
            check(&device, &mla, &RAGGED, dtype, &[By::Tiles(Variant::Any)], reference::row);
        }
    }
}

#[test]
fn native_widths_agree_with_f64_on_tensor_cores() {
    let Some(device) = device() else { return };
    let both = [By::Tiles(Variant::Few), By::Tiles(Variant::Many)];
    check(&device, &NATIVE, &RAGGED, Dtype::Bf16, &both, absorbed_row);
    for heads in [16, 40, 128] {
        let mla = Mla { heads, ..NATIVE };
        let steps = [(1, 1), (1, 65), (3, 130), (2, 300)];
        check(&device, &mla, &steps, Dtype::Bf16, &both, absorbed_row);
    }
    check(&device, &NATIVE, &LONG, Dtype::Bf16, &both, absorbed_row);
    check(&device, &NATIVE, &[(2, 200)], Dtype::F32, &[By::Tiles(Variant::Any)], absorbed_row);
}

const DECODES: [(usize, usize); 8] =
    [(1, 1), (1, 15), (1, 63), (1, 64), (1, 65), (3, 130), (1, 513), (2, 2)];

#[test]
fn pieces_agree_with_f64() {
    let Some(device) = device() else { return };
    for heads in [1, 9, 16] {
        let mla = Mla { heads, ..NATIVE };
        check(&device, &mla, &DECODES, Dtype::Bf16, &[By::Pieces], absorbed_row);
    }
    let mla = Mla { heads: 16, ..NATIVE };
    // Rows of one size, since what is near is measured by what is typical.
    let long = [(1, 4097), (5, 3000), (1, 7000)];
    check(&device, &mla, &long, Dtype::Bf16, &[By::Pieces], absorbed_row);
    check(&device, &mla, &[(1, 65_539)], Dtype::Bf16, &[By::Pieces], absorbed_row);
}

#[test]
fn pieces_of_many_short_rows_agree_with_f64() {
    let Some(device) = device() else { return };
    // Rows of a tile and less after rows of many, in one block and in as many as there are rows.
    let short: Vec<_> = (0..60).map(|i| (1, i * i * 7 % 300 + 1)).collect();
    for heads in [5, 16] {
        check(&device, &Mla { heads, ..NATIVE }, &short, Dtype::Bf16, &[By::Pieces], absorbed_row);
    }
    // Scores far apart: what is subtracted from them changes from tile to tile.
    let mla = Mla { heads: 16, scale: 0.5, ..NATIVE };
    check(&device, &mla, &[(1, 1); 40], Dtype::Bf16, &[By::Pieces], absorbed_row);
    check(&device, &mla, &short[..20], Dtype::Bf16, &[By::Pieces], absorbed_row);
}

#[test]
fn pieces_of_many_heads_agree_with_f64() {
    let Some(device) = device() else { return };
    for heads in [17, 40, 64, 70, 128, 136] {
        let mla = Mla { heads, ..NATIVE };
        check(&device, &mla, &DECODES, Dtype::Bf16, &[By::Pieces], absorbed_row);
    }
    // Scores far apart: what is subtracted from them changes from tile to tile.
    let mla = Mla { heads: 128, scale: 0.5, ..NATIVE };
    let steps = [(1, 700), (1, 129), (1, 1_000)];
    check(&device, &mla, &steps, Dtype::Bf16, &[By::Pieces], absorbed_row);
    let mla = Mla { heads: 20, ..NATIVE };
    check(&device, &mla, &[(1, 4097), (5, 3000)], Dtype::Bf16, &[By::Pieces], absorbed_row);
}

#[test]
fn a_row_that_is_not_a_number_leaves_its_neighbours_alone() {
    let Some(device) = device() else { return };
    for heads in [16, 64, 128] {
        let mla = Mla { heads, ..NATIVE };
        spoil_one_of_three(&device, &mla);
    }
}

fn spoil_one_of_three(device: &Device, mla: &Mla) {
    let row = mla.latent + mla.rope;
    let clean = Cache::whole_rows(&[(1, 300), (1, 77), (1, 500)], row, Dtype::Bf16, 5);
    let mut broken = Cache::whole_rows(&[(1, 300), (1, 77), (1, 500)], row, Dtype::Bf16, 5);
    let at = broken.at(broken.segments[1].table as usize, 70);
    broken.arena[at + 3] = f32::NAN;
    let mut random = Random::new(6);
    let q = rounded(&random.vector(3 * mla.heads * (mla.nope + mla.rope)), Dtype::Bf16);
    let kv_b = random.vector(mla.heads * (mla.nope + mla.v) * mla.latent);
    let kv_b = rounded(&kv_b.iter().map(|x| x * 0.07).collect::<Vec<_>>(), Dtype::Bf16);
    // All in one block too, one after the other through the same memory.
    for (by, splits) in [(By::Pieces, 1), (By::Pieces, 2), (By::Tiles(Variant::Few), 2)] {
        let of = |cache: &Cache| run(device, cache, &q, &kv_b, mla, by, splits);
        let (clean, broken) = (of(&clean), of(&broken));
        let width = mla.heads * mla.v;
        assert_eq!(clean[..width], broken[..width], "{by:?} {splits}: before");
        assert_eq!(clean[2 * width..], broken[2 * width..], "{by:?} {splits}: after");
        assert!(broken[width..2 * width].iter().all(|x| x.is_nan()), "{by:?} {splits}: itself");
    }
}
