//! Contexts of 64k tokens and around: some heads against f64, and every key counted.

use super::*;
use crate::cuda::testing::paged::{AROUND_64K, assert_counted};

/// Scores spread, so that some hundred keys make up a result.
const SPREAD: Mla = Mla { heads: 16, scale: 0.5, ..NATIVE };
const BOTH: [(By, usize); 5] = [
    (By::Pieces, 1),
    (By::Pieces, 9),
    (By::Tiles(Variant::Few), 64),
    (By::Tiles(Variant::Few), 7),
    (By::Tiles(Variant::Many), 1),
];

/// `heads` compares these heads of all rows.
fn check(device: &Device, mla: &Mla, sequences: &[(usize, usize)], heads: &[usize]) {
    let cache = Cache::whole_rows(sequences, mla.latent + mla.rope, Dtype::Bf16, 11);
    let mut random = Random::new(12);
    let (width, out) = (mla.nope + mla.rope, mla.heads * mla.v);
    let q = rounded(&random.vector(cache.rows() * mla.heads * width), Dtype::Bf16);
    let size = (3.0 / mla.latent as f32).sqrt();
    let kv_b = random.vector(mla.heads * (mla.nope + mla.v) * mla.latent);
    let kv_b = rounded(&kv_b.iter().map(|x| x * size).collect::<Vec<_>>(), Dtype::Bf16);
    let mut expected = Vec::new();
    for (segment, content) in cache.segments.iter().zip(&cache.contents) {
        for (row, position) in (segment.start..).zip(segment.context - segment.len..segment.context)
        {
            for head in heads {
                let q = &q[(row as usize * mla.heads + head) * width..][..width];
                expected.extend(absorbed_row(q, content, &kv_b, mla, position as usize, *head));
            }
        }
    }
    for (by, splits) in BOTH {
        let all = run(device, &cache, &q, &kv_b, mla, by, splits);
        let got: Vec<f32> = (all.chunks_exact(out))
            .flat_map(|row| heads.iter().flat_map(|head| &row[head * mla.v..][..mla.v]))
            .copied()
            .collect();
        assert_near(&format!("{by:?} {splits} {sequences:?}"), &got, &expected, 1.6e-2);
        assert!(all.iter().all(|x| x.is_finite()), "{by:?} {splits}: other heads");
    }
}

#[test]
fn contexts_of_64k_agree_with_f64() {
    let Some(device) = device() else { return };
    for context in AROUND_64K {
        check(&device, &SPREAD, &[(1, context)], &[0, 7, 15]);
    }
    let mla = Mla { heads: 128, ..SPREAD };
    check(&device, &mla, &[(1, 65_537)], &[0, 127]);
    // Among short ones, and two rows that see as many keys as a cache of 64k has.
    check(&device, &SPREAD, &[(1, 900), (2, 65_536), (1, 1_025)], &[3]);
}

#[test]
fn every_key_of_64k_counts_once() {
    let Some(device) = device() else { return };
    for context in AROUND_64K {
        every_key_counts(&device, 16, context, &BOTH);
    }
}

#[test]
fn every_key_of_64k_counts_once_for_many_heads() {
    let Some(device) = device() else { return };
    every_key_counts(&device, 128, 65_537, &BOTH[..2]);
}

fn every_key_counts(device: &Device, heads: usize, context: usize, variants: &[(By, usize)]) {
    let mla = Mla { heads, ..NATIVE };
    let (width, of_head) = (mla.nope + mla.rope, (mla.nope + mla.v) * mla.latent);
    // The first four heads give the latent as it is, each a part of it, and so on; queries see no
    // difference.
    let mut kv_b = vec![0.0; mla.heads * of_head];
    for (head, kv_b) in kv_b.chunks_exact_mut(of_head).enumerate() {
        for value in 0..mla.v {
            let latent = (head * mla.v + value) % mla.latent;
            kv_b[(mla.nope + value) * mla.latent + latent] = 1.0;
        }
    }
    let cache = Cache::counting(&[(2, context)], mla.latent + mla.rope, 0..mla.latent);
    let q = vec![1.0; cache.rows() * mla.heads * width];
    for (by, splits) in variants {
        let got = run(device, &cache, &q, &kv_b, &mla, *by, *splits);
        for (row, got) in got.chunks_exact(mla.heads * mla.v).enumerate() {
            for (at, got) in got.chunks_exact(mla.latent).enumerate() {
                let what = format!("{by:?} {splits}, row {row} of {context}, heads from {at}");
                assert_counted(&what, got, context - 1 + row);
            }
        }
    }
}
