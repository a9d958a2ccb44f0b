//! Pieces of contexts of 64k tokens and around: some heads against f64, and every key counted.

use super::*;
use crate::cuda::testing::paged::{AROUND_64K, assert_counted};

const BLOCKS: [usize; 3] = [132, 264, 7];

#[test]
fn contexts_of_64k_agree_with_f64() {
    let Some(device) = device() else { return };
    for (heads, kv_heads, head_dim) in [(8, 2, 128), (9, 1, 64)] {
        let gqa = Gqa { scale: 0.25, ..shape_of(heads, kv_heads, head_dim) };
        for context in AROUND_64K {
            let row = 2 * kv_heads * head_dim;
            let cache = Cache::whole_rows(&[(1, 70), (1, context)], row, BF16, 3);
            let q = rounded(&Random::new(9).vector(2 * heads * head_dim), BF16);
            let some = [0, heads - 1];
            let at = |head: usize| (heads + head) * head_dim..(heads + head + 1) * head_dim;
            let expected: Vec<f64> = (some.iter())
                .flat_map(|head| {
                    let q = &q[at(*head)];
                    reference::row(q, &cache.contents[1], &gqa, context - 1, *head)
                })
                .collect();
            for blocks in BLOCKS {
                let got = run(&device, &cache, &q, &gqa, blocks);
                let what = format!("{gqa:?} of {context} in {blocks} blocks");
                let some: Vec<f32> =
                    some.iter().flat_map(|head| &got[at(*head)]).copied().collect();
                assert_near(&what, &some, &expected, TOLERANCE);
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
        let gqa = shape_of(2 * kv_heads, kv_heads, head_dim);
        let marks = kv_heads * head_dim;
        for context in AROUND_64K {
            let cache = Cache::counting(&[(2, context)], 2 * marks, marks..2 * marks);
            let q = vec![1.0; 2 * 2 * marks];
            for blocks in BLOCKS {
                let got = run(&device, &cache, &q, &gqa, blocks);
                for (row, got) in got.chunks_exact(2 * marks).enumerate() {
                    for first in 0..2 {
                        let heads = got.chunks_exact(head_dim).skip(first).step_by(2);
                        let what = format!("row {row} of {context} in {blocks} blocks");
                        let counted: Vec<f32> = heads.flatten().copied().collect();
                        assert_counted(&what, &counted, context - 1 + row);
                    }
                }
            }
        }
    }
}
