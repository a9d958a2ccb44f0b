//! One kernel against three, which have references of their own.

use super::*;
use crate::cuda::Strided;
use crate::cuda::testing::{Device, assert_near, device, small};
use crate::mla::cuda::block::tests::{By, Decodes};

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

/// Padding rows behind as many as fit.
fn decodes(heads: usize, contexts: &[usize], pairing: Pairing) -> Decodes {
    Decodes::padded(heads, contexts, pairing, MOST_ROWS - contexts.len())
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// The cache has the same bits; results differ by the order of sums.
fn check(device: &Device, heads: usize, contexts: &[usize], pairing: Pairing) {
    let what = format!("{heads} heads, {contexts:?}");
    let decodes = decodes(heads, contexts, pairing);
    let expected = decodes.run(device, By::Block, 132);
    let got = decodes.run(device, By::Near, 132);
    assert!(got[0].iter().all(|x| x.is_finite()), "{what}");
    assert_near(&what, &got[0], &wide(&expected[0]), 1e-2);
    assert_eq!(bits(&got[2]), bits(&expected[2]), "{what}: the cache");
    let again = decodes.run(device, By::Near, 132);
    assert_eq!(bits(&got[0]), bits(&again[0]), "{what}: the order of sums is given");
}

#[test]
fn few_rows_of_short_contexts_have_the_results_of_three_kernels() {
    let Some(device) = device() else { return };
    for pairing in [Pairing::Interleaved, Pairing::Halves] {
        if small() {
            // A ring that is filled again, or two rows.
            let contexts: &[usize] = if pairing == Pairing::Halves { &[768] } else { &[130, 17] };
            check(&device, 2, contexts, pairing);
            continue;
        }
        for context in [1, 2, 15, 16, 17, 64, 65, 127, 128, 129, 255, 256, 257, 300, 511, 768] {
            check(&device, 16, &[context], pairing);
        }
        for contexts in [[256, 256], [1, 300], [384, 17], [64, 255]] {
            check(&device, 16, &contexts, pairing);
        }
        for heads in [1, 3, 40, 128] {
            check(&device, heads, &[130, 7], pairing);
        }
    }
}

#[test]
fn what_is_not_a_number_stays_in_its_row() {
    let Some(device) = device() else { return };
    let contexts = [200, 77];
    let clean = decodes(16, &contexts, Pairing::Interleaved);
    let width = 16 * VALUE;
    let expected = clean.run(&device, By::Near, 132);
    // In its older keys, in its query, in its new key.
    for broken in 0..3 {
        let mut decodes = decodes(16, &contexts, Pairing::Interleaved);
        match broken {
            0 => {
                let at = decodes.cache.at(decodes.cache.segments[1].table as usize, 70);
                decodes.cache.arena[at + 3] = f32::NAN;
            }
            1 => decodes.q[16 * QUERY..][..16 * QUERY].fill(f32::NAN),
            _ => decodes.kv[WIDTH + 5] = f32::NAN,
        }
        let got = decodes.run(&device, By::Near, 132);
        assert_eq!(got[0][..width], expected[0][..width], "{broken}: before");
        assert!(got[0][width..2 * width].iter().all(|x| x.is_nan()), "{broken}: itself");
    }
}

#[test]
fn only_what_is_short_fits() {
    assert!(fits([1]) && fits([768]) && !fits([769]));
    assert!(fits([384; 2]) && !fits([385, 384]) && fits([512, 256]));
    assert!(fits([1; 2]) && !fits([1; 3]));
}

#[test]
fn operands_that_begin_between_units_are_refused() {
    let Some(device) = device() else { return };
    let memory = device.poisoned(4096);
    let [even, odd] = [memory.slice(0..1024), memory.slice(8..1024)];
    let rows = |slice, stride| Strided { slice, stride };
    let whole = rows(&even, 64);
    aligned([whole; 2], [&even]).expect("multiples of 16 bytes");
    for (rows, slice) in
        [([whole, rows(&even, 60)], &even), ([rows(&odd, 64), whole], &even), ([whole; 2], &odd)]
    {
        let refused = aligned(rows, [slice]).expect_err("no multiples").to_string();
        assert!(refused.contains("0x"), "{refused}");
    }
}
