//! Both products against f64, padding rows left alone.

use super::*;
use crate::cuda::testing::{Device, assert_near, device, rounded, rounding};
use crate::testing::Random;

const BF16: Dtype = Dtype::Bf16;
const ROPE: usize = 64;

fn numbers(seed: usize, len: usize) -> Vec<f32> {
    rounded(&Random::new(seed as u64).vector(len), BF16)
}

/// `[real, heads, outputs]` of `x` and `w`, of which head h begins at `w[w_at(h)]`.
fn expected(
    (x, row, head): (&[f32], usize, usize),
    (w, w_at): (&[f32], impl Fn(usize) -> usize),
    (real, heads): (usize, usize),
    (inputs, outputs): (usize, usize),
) -> Vec<f64> {
    let mut all = Vec::with_capacity(real * heads * outputs);
    for r in 0..real {
        for h in 0..heads {
            let x = &x[r * row + h * head..][..inputs];
            for o in 0..outputs {
                let w = &w[w_at(h) + o * inputs..][..inputs];
                all.push(x.iter().zip(w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum());
            }
        }
    }
    all
}

fn check(device: &Device, heads: usize, padded: usize, real: usize) {
    let mla = Mla { heads, nope: NOPE, rope: ROPE, v: VALUE, latent: LATENT, scale: 1.0 };
    let what = format!("{real} of {padded} rows, {heads} heads");
    let count = device.send(&[real as u32]);
    let rows = Rows { padded, count: Some(&count) };
    let head = NOPE + ROPE;
    let mut q = numbers(padded + heads, padded * heads * head);
    let mut results = numbers(padded + heads + 1, padded * heads * LATENT);
    q[real * heads * head..].fill(f32::NAN);
    results[real * heads * LATENT..].fill(f32::NAN);
    let absorbed = numbers(2, heads * LATENT * NOPE);
    let kv_b = numbers(3, heads * (NOPE + VALUE) * LATENT);
    let send = |values: &[f32]| device.send_as(values, BF16);
    let stored = |out: &DeviceSlice, width: usize, expected: &[f64]| {
        let mut got = device.fetch_as(out, BF16);
        let padding = got.split_off(real * heads * width);
        assert!(padding.iter().all(|x| x.is_nan()), "{what}: padding is written");
        assert_near(&what, &got, expected, rounding(BF16));
    };

    let out = device.poisoned(padded * heads * LATENT * 2);
    // Queries lie in wider rows.
    let (width, stride) = (heads * head, heads * head + 72);
    let mut wide = vec![f32::NAN; padded * stride];
    for (wide, q) in wide.chunks_exact_mut(stride).zip(q.chunks_exact(width)) {
        wide[..width].copy_from_slice(q);
    }
    let sent = send(&wide);
    let x = Strided { slice: &sent, stride };
    to_latent(device.queue(), rows, &mla, x, &send(&absorbed), &out).expect("a launch");
    let w = (&absorbed[..], |h: usize| h * LATENT * NOPE);
    stored(&out, LATENT, &expected((&q, heads * head, head), w, (real, heads), (NOPE, LATENT)));

    let out = device.poisoned(padded * heads * VALUE * 2);
    from_latent(device.queue(), rows, &mla, &send(&results), &send(&kv_b), &out).expect("a launch");
    let w = (&kv_b[..], |h: usize| (h * (NOPE + VALUE) + NOPE) * LATENT);
    let x = (&results[..], heads * LATENT, LATENT);
    stored(&out, VALUE, &expected(x, w, (real, heads), (LATENT, VALUE)));
}

#[test]
fn every_head_agrees_with_f64() {
    let Some(device) = device() else { return };
    for (heads, padded, real) in [
        (1, 1, 1),
        (2, 17, 16),
        (16, 33, 33),
        (3, 64, 0),
        (16, 128, 97),
        (5, 130, 129),
        (16, 200, 131),
        (40, 260, 65),
    ] {
        check(&device, heads, padded, real);
    }
}
