//! Tiles over contexts of 64k tokens and around: some heads against f64, and every key counted.

use super::*;
use crate::cuda::testing::paged::{AROUND_64K, assert_counted};

const RUNS: [(Variant, usize); 4] =
    [(Variant::Few, 64), (Variant::Few, 7), (Variant::Many, 1), (Variant::Many, 33)];

#[test]
fn contexts_of_64k_agree_with_f64() {
    let Some(device) = device() else { return };
    for (window, head_dim) in [(None, 128), (Some(60_001), 64)] {
        let shape = Gqa { heads: 8, kv_heads: 2, head_dim, scale: 0.25, window };
        for context in AROUND_64K {
            let cache = Cache::new(&[(1, context)], 4 * head_dim, Dtype::Bf16, 3);
            let q = rounded(&Random::new(9).vector(8 * head_dim), Dtype::Bf16);
            let heads = [0, 7];
            let expected: Vec<f64> = (heads.iter())
                .flat_map(|head| {
                    let q = &q[head * head_dim..][..head_dim];
                    reference::row(q, &cache.contents[0], &shape, context - 1, *head)
                })
                .collect();
            for (variant, splits) in RUNS {
                let got = run(&device, &cache, &q, &shape, variant, splits);
                let of = |head: usize| &got[head * head_dim..][..head_dim];
                let what = format!("{variant:?} {splits} {shape:?} {context}");
                assert_near(&what, &heads.map(of).concat(), &expected, 8e-3);
                assert!(got.iter().all(|x| x.is_finite()), "{what}: other heads");
            }
        }
    }
}

#[test]
fn every_key_of_64k_counts_once() {
    let Some(device) = device() else { return };
    for (kv_heads, head_dim) in [(4, 128), (8, 64)] {
        // Two heads see the same keys.
        let shape = Gqa { heads: 2 * kv_heads, kv_heads, head_dim, scale: 1.0, window: None };
        let marks = kv_heads * head_dim;
        for context in AROUND_64K {
            let cache = Cache::counting(&[(2, context)], 2 * marks, marks..2 * marks);
            let q = vec![1.0; 2 * 2 * marks];
            for (variant, splits) in RUNS {
                let got = run(&device, &cache, &q, &shape, variant, splits);
                for (row, got) in got.chunks_exact(2 * marks).enumerate() {
                    for first in 0..2 {
                        let heads = got.chunks_exact(head_dim).skip(first).step_by(2);
                        let what = format!("{variant:?} {splits}, row {row} of {context}");
                        let counted: Vec<f32> = heads.flatten().copied().collect();
                        assert_counted(&what, &counted, context - 1 + row);
                    }
                }
            }
        }
    }
}
