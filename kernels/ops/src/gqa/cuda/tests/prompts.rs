//! The kernel for prompts against the f64 reference at every border.

use super::*;
use crate::cuda::testing::paged::assert_counted;
use crate::flash::cuda::Segment;

fn gqa(heads: usize, kv_heads: usize, head_dim: usize) -> Gqa {
    Gqa { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt(), window: None }
}

struct Case {
    shape: Gqa,
    cache: Cache,
    q: Vec<f32>,
}

const fn is_prompt(segment: &Segment) -> bool {
    segment.len > 1
}

impl Case {
    fn new(shape: Gqa, sequences: &[(usize, usize)]) -> Self {
        let row = 2 * shape.kv_heads * shape.head_dim;
        let cache = Cache::whole_rows(sequences, row, Dtype::Bf16, 3);
        let width = shape.heads * shape.head_dim;
        let q = Random::new(9).vector(cache.rows() * width);
        let q = rounded(&q.iter().map(|x| x * 2.0).collect::<Vec<_>>(), Dtype::Bf16);
        Self { shape, cache, q }
    }

    fn run(&self, device: &Device) -> Vec<f32> {
        let Self { shape, cache, q } = self;
        let cut = prompt_cut(shape, cache.layer, Dtype::Bf16).expect("a shape that is served");
        let mut list = Vec::new();
        cut.tiles(&cache.segments, is_prompt, &mut list);
        let count = device.send(&[list.len() as u32]);
        // Tiles beyond the count must not be looked at.
        list.extend([flash::Tile { segment: u32::MAX, line: u32::MAX }; 3]);
        let (max_tiles, tiles) = (list.len(), device.send(&list));
        let sent = cache.send(device, 1, 16);
        let segments = device.send(&cache.segments);
        let (tiles, tile_count) = (&tiles, &count);
        let plan =
            prompt::Plan { segments: &segments, tiles, tile_count, first_tile: None, max_tiles };
        // A padded row that must be left alone.
        let rows = cache.rows() + 1;
        let mut padded = q.clone();
        padded.resize(rows * shape.heads * shape.head_dim, f32::NAN);
        let out = device.poisoned(padded.len() * 2);
        // Queries lie in wider rows.
        let (width, stride) = (padded.len() / rows, padded.len() / rows + 72);
        let mut wide = vec![f32::NAN; rows * stride];
        for (wide, q) in wide.chunks_exact_mut(stride).zip(padded.chunks_exact(width)) {
            wide[..width].copy_from_slice(q);
        }
        let q = device.send_as(&wide[..(rows - 1) * stride + width], Dtype::Bf16);
        let q = Strided { slice: &q, stride };
        let (on, rows) = (device.queue(), Rows::exactly(rows));
        let (layer, tables) = (cache.layer, sent.tables());
        // Twice: the second launch finds what the first one left.
        for _ in 0..2 {
            device.stream.fill(&out, 0xFF).expect("a fill");
            prompts(on, rows, q, shape, layer, sent.arena(), tables, &plan, &out)
                .expect("a launch");
        }
        device.fetch_as(&out, Dtype::Bf16)
    }

    /// Compares some rows of each segment; the others would take f64 too long.
    fn check(&self, got: &[f32], some: usize) {
        let Self { shape, cache, q } = self;
        let width = shape.head_dim;
        for (segment, content) in cache.segments.iter().zip(&cache.contents) {
            let len = segment.len as usize;
            for i in (0..len).step_by(1 + len / some).chain([len - 1]) {
                for head in 0..shape.heads {
                    let at = ((segment.start as usize + i) * shape.heads + head) * width;
                    let got = &got[at..at + width];
                    if !is_prompt(segment) {
                        assert!(got.iter().all(|x| x.is_nan()), "left alone");
                        continue;
                    }
                    let position = segment.context as usize - len + i;
                    let expected =
                        reference::row(&q[at..at + width], content, shape, position, head);
                    let what = format!("{shape:?}: {i} of {segment:?}, head {head}");
                    assert_near(&what, got, &expected, 1e-2);
                }
            }
        }
        let padded = cache.rows() * shape.heads * width;
        assert!(got[padded..].iter().all(|x| x.is_nan()), "padding is left alone");
    }
}

#[test]
fn prompts_agree_with_f64() {
    let Some(device) = device() else { return };
    for (heads, kv_heads, head_dim) in
        [(8, 2, 128), (5, 1, 128), (3, 3, 64), (16, 2, 64), (2, 2, 128), (12, 1, 64)]
    {
        let case = Case::new(gqa(heads, kv_heads, head_dim), &RAGGED);
        case.check(&case.run(&device), 70);
        let chunks = [(2, 2), (1, 9), (200, 1000), (128, 256), (97, 1100), (300, 300)];
        let case = Case::new(gqa(heads, kv_heads, head_dim), &chunks);
        case.check(&case.run(&device), 7);
    }
}

#[test]
fn long_prompts_agree_with_f64() {
    let Some(device) = device() else { return };
    for head_dim in [128, 64] {
        let case = Case::new(gqa(4, 1, head_dim), &[(16_384, 16_384), (700, 9_001)]);
        case.check(&case.run(&device), 4);
    }
}

#[test]
fn chunks_behind_64k_agree_with_f64() {
    let Some(device) = device() else { return };
    for head_dim in [128, 64] {
        let shape = Gqa { scale: 0.25, ..gqa(4, 1, head_dim) };
        // Few rows, whose keys blocks share, and many.
        for sequences in [vec![(3, 65_536)], vec![(200, 65_537), (1, 9), (131, 65_535)]] {
            let case = Case::new(shape, &sequences);
            case.check(&case.run(&device), 2);
        }
    }
}

#[test]
fn every_key_of_64k_counts_once() {
    let Some(device) = device() else { return };
    for (kv_heads, head_dim) in [(4, 128), (8, 64)] {
        let marks = kv_heads * head_dim;
        for (len, context) in [(2, 65_537), (150, 65_535)] {
            let cache = Cache::counting(&[(len, context)], 2 * marks, marks..2 * marks);
            let (shape, q) = (gqa(kv_heads, kv_heads, head_dim), vec![1.0; len * marks]);
            let got = Case { shape, cache, q }.run(&device);
            for (row, got) in got[..len * marks].chunks_exact(marks).enumerate() {
                let keys = context - len + row + 1;
                assert_counted(&format!("row {row} of {len} of {context}"), got, keys);
            }
        }
    }
}

/// Blocks share the keys of each tile here, of one in eight parts, of others in fewer.
#[test]
fn few_rows_behind_long_contexts_agree_with_f64() {
    let Some(device) = device() else { return };
    for (heads, kv_heads, head_dim) in [(8, 2, 128), (5, 1, 128), (16, 2, 64)] {
        let case = Case::new(gqa(heads, kv_heads, head_dim), &[(77, 4077), (2, 8193), (30, 1500)]);
        case.check(&case.run(&device), 7);
        let case = Case::new(gqa(heads, kv_heads, head_dim), &[(3, 9999)]);
        case.check(&case.run(&device), 3);
    }
}

#[test]
fn nan_in_one_prompt_leaves_the_others_bit_for_bit() {
    let Some(device) = device() else { return };
    for head_dim in [128, 64] {
        let mut case = Case::new(gqa(4, 2, head_dim), &[(70, 70), (130, 700), (100, 270)]);
        let clean = case.run(&device);
        let row = 4 * head_dim;
        let at = case.cache.at(case.cache.segments[1].table as usize, 10);
        case.cache.arena[at..at + row].fill(f32::NAN);
        let got = case.run(&device);
        let (before, after) = (70 * row, 200 * row);
        assert!(got[before..after].iter().all(|x| x.is_nan()));
        assert_eq!(got[..before], clean[..before]);
        assert_eq!(got[after..after + 100 * row], clean[after..after + 100 * row]);
    }
}
