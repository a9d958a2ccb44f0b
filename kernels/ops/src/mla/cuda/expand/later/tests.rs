//! Prompts behind a context against the absorbed form in f64, and what is gathered together.

use super::*;
use crate::cuda::testing::paged::{Cache, assert_counted};
use crate::cuda::testing::{Device, assert_near, device, rounded};
use crate::mla::cuda::tests::absorbed_row;
use crate::testing::Random;
use device::cuda::{Arena, DeviceMemory};

const fn mla(heads: usize) -> Mla {
    Mla { heads, nope: 128, rope: 64, v: 128, latent: 512, scale: 0.07 }
}

struct Case {
    mla: Mla,
    cache: Cache,
    q: Vec<f32>,
    kv_b: Vec<f32>,
}

impl Case {
    fn new(heads: usize, sequences: &[(usize, usize)]) -> Self {
        let cache = Cache::whole_rows(sequences, 576, Dtype::Bf16, 7);
        let mut random = Random::new(cache.rows() as u64);
        let mut vector = |len: usize, by: f32| {
            rounded(&random.vector(len).iter().map(|x| x * by).collect::<Vec<_>>(), Dtype::Bf16)
        };
        let (q, kv_b) = (vector(cache.rows() * heads * 192, 1.0), vector(heads * 256 * 512, 0.08));
        Self { mla: mla(heads), cache, q, kv_b }
    }

    /// With room for so many tokens, in all and of all heads.
    fn run(&self, device: &Device, room: Room) -> (Vec<f32>, usize) {
        let Self { mla, cache, .. } = self;
        let rows = cache.rows();
        let mut passes = Passes::default();
        passes.make(&cache.segments, room);
        let sent = cache.send(device, 1, 16);
        let memory = DeviceMemory::allocate(&device.context, "a test", Scratch::bytes(mla, room));
        let memory = memory.expect("memory");
        device.stream.fill(&memory, 0xFF).expect("a fill");
        let scratch = Scratch::take(&mut Arena::new(memory), mla, room).expect("an arena");
        let send = |values: &[f32]| device.send_as(values, Dtype::Bf16);
        // Queries lie in wider rows.
        let (width, stride) = (mla.heads * 192, mla.heads * 192 + 72);
        let mut wide = vec![f32::NAN; rows * stride];
        for (wide, q) in wide.chunks_exact_mut(stride).zip(self.q.chunks_exact(width)) {
            wide[..width].copy_from_slice(q);
        }
        let (wide, kv_b) = (send(&wide), send(&self.kv_b));
        let q = Strided { slice: &wide, stride };
        let out = device.poisoned(rows * mla.heads * 128 * 2);
        let segments = &device.send(&passes.segments);
        let (firsts, tiles) = (&device.send(&passes.firsts), &device.send(&passes.tiles));
        for pass in &passes.passes {
            let (tokens, parts, tables) = (pass.padded, &device.send(&pass.words()), sent.tables());
            let later = Later { tokens, parts, segments, firsts, tiles, tables };
            let of = (cache.layer, sent.arena());
            let on = device.queue();
            attention(on, rows, mla, q, &kv_b, of, &later, &scratch, &out).expect("a launch");
        }
        (device.fetch_as(&out, Dtype::Bf16), passes.passes.len())
    }

    /// Compares some rows of each segment; the others would take f64 too long.
    fn check(&self, got: &[f32]) {
        let Self { mla, cache, q, kv_b } = self;
        for (segment, content) in cache.segments.iter().zip(&cache.contents) {
            let len = segment.len as usize;
            for i in (0..len).step_by(1 + len / 3).chain([len - 1]) {
                for head in 0..mla.heads {
                    let line = (segment.start as usize + i) * mla.heads + head;
                    let row = &got[line * 128..][..128];
                    if !is_later(segment) {
                        assert!(row.iter().all(|x| x.is_nan()), "left alone");
                        continue;
                    }
                    let position = segment.context as usize - len + i;
                    let q = &q[line * 192..][..192];
                    let expected = absorbed_row(q, content, kv_b, mla, position, head);
                    let what = format!("row {i} of {segment:?}, head {head}");
                    // Keys, values and probabilities are rounded.
                    assert_near(&what, row, &expected, 2e-2);
                }
            }
        }
    }
}

#[test]
fn prompts_behind_a_context_agree_with_f64() {
    let Some(device) = device() else { return };
    let sequences = [(32, 33), (1, 300), (130, 131), (64, 64), (100, 365), (31, 99), (33, 1000)];
    let case = Case::new(3, &sequences);
    let (got, passes) = case.run(&device, Room { latents: 4096, expanded: 4096 });
    assert_eq!(passes, 1);
    case.check(&got);
    // Room for all heads of most and for two heads of the longest.
    let (few, passes) = case.run(&device, Room { latents: 1000, expanded: 700 });
    assert_eq!(passes, 2);
    case.check(&few);
    let (least, passes) = case.run(&device, Room { latents: 1000, expanded: 400 });
    assert_eq!(passes, 3);
    case.check(&least);
}

#[test]
fn a_chunk_behind_a_long_context_agrees_with_f64() {
    let Some(device) = device() else { return };
    let case = Case::new(2, &[(200, 9_000)]);
    let (got, _) = case.run(&device, Room { latents: 9_000, expanded: 9_000 });
    case.check(&got);
}

#[test]
fn chunks_behind_64k_agree_with_f64() {
    let Some(device) = device() else { return };
    // Scores spread, so that some hundred keys make up a result.
    let mut case = Case::new(2, &[(200, 65_537), (33, 65_535)]);
    case.mla.scale = 0.5;
    let (got, passes) = case.run(&device, Room { latents: 131_072, expanded: 131_072 });
    assert_eq!(passes, 1);
    case.check(&got);
    // A sequence at a time, and one head.
    let (got, passes) = case.run(&device, Room { latents: 65_537, expanded: 33_000 });
    assert_eq!(passes, 2);
    case.check(&got);
}

#[test]
fn every_key_of_64k_counts_once() {
    let Some(device) = device() else { return };
    let (heads, of_head) = (4, 256 * 512);
    // Each head gives a part of the latent as it is; queries see no difference.
    let mut kv_b = vec![0.0; heads * of_head];
    for (head, kv_b) in kv_b.chunks_exact_mut(of_head).enumerate() {
        (0..128).for_each(|value| kv_b[(128 + value) * 512 + head * 128 + value] = 1.0);
    }
    for (len, context) in [(32, 65_535), (150, 65_537)] {
        let cache = Cache::counting(&[(len, context)], 576, 0..512);
        let (q, kv_b) = (vec![1.0; len * heads * 192], kv_b.clone());
        let case = Case { mla: mla(heads), cache, q, kv_b };
        let (got, _) = case.run(&device, Room { latents: 66_000, expanded: 66_000 });
        for (row, got) in got.chunks_exact(512).enumerate() {
            let keys = context - len + row + 1;
            assert_counted(&format!("row {row} of {len} of {context}"), got, keys);
        }
    }
}

#[test]
fn nan_behind_one_prompt_leaves_the_others_bit_for_bit() {
    let Some(device) = device() else { return };
    let mut case = Case::new(2, &[(40, 70), (32, 170), (50, 129)]);
    let room = Room { latents: 1000, expanded: 1000 };
    let (clean, _) = case.run(&device, room);
    let at = case.cache.at(case.cache.segments[1].table as usize, 100);
    case.cache.arena[at..at + 576].fill(f32::NAN);
    let (got, _) = case.run(&device, room);
    let (before, after) = (40 * 2 * 128, 72 * 2 * 128);
    assert!(got[before..after].iter().all(|x| x.is_nan()));
    assert_eq!(got[..before], clean[..before]);
    assert_eq!(got[after..], clean[after..]);
}

#[test]
fn passes_hold_what_fits_and_nothing_twice() {
    let segment = |len, context| Segment { start: 0, len, context, table: 5 };
    let all = [(40, 100), (1, 50), (40, 40), (300, 600), (32, 301), (40, 2000), (32, 33)];
    let all = all.map(|(len, context)| segment(len, context));
    let mut passes = Passes::with_capacity(1000, 10);
    passes.make(&all, Room { latents: 2000, expanded: 1000 });
    let of = |p: &Pass| (p.segments.clone(), p.tokens, p.padded);
    let got: Vec<_> = passes.passes.iter().map(of).collect();
    assert_eq!(got, [(0..2, 700, 1000), (2..3, 301, 1000), (3..4, 2000, 2000), (4..5, 33, 1000)]);
    assert_eq!(passes.firsts, [5; 5]);
    assert_eq!(passes.segments.iter().map(|s| s.table).collect::<Vec<_>>(), [0, 100, 0, 0, 0]);
    let tiles: Vec<_> = passes.passes.iter().map(|p| p.tiles.len()).collect();
    assert_eq!(tiles, [4, 1, 1, 1]);
    assert_eq!(passes.tiles[0], Tile { segment: 1, line: 128 });
    assert_eq!(passes.passes[3].words(), [4, 5, 6, 1]);
    assert_eq!(passes.tiles[6], Tile { segment: 4, line: 0 });
    passes.make(&all[1..3], Room { latents: 2000, expanded: 1000 });
    assert!(passes.passes.is_empty() && passes.tiles.is_empty());
}

#[test]
fn passes_are_padded_to_few_numbers_of_rows() {
    let room = |latents, expanded| Room { latents, expanded };
    let all =
        [1, 1024, 1025, 1600, 30_000, 40_000, 100_000].map(|n| padded(n, room(1 << 20, 32_768)));
    assert_eq!(all, [1024, 1024, 1536, 2048, 32_768, 49_152, 131_072]);
    assert_eq!(padded(30_000, room(50_000, 30_500)), 30_500);
    assert_eq!(padded(30_501, room(50_000, 30_500)), 32_768);
    for room in [room(5000, 5000), room(500, 4000), room(9000, 1000), room(163_840, 32_768)] {
        let all = paddings(room);
        assert!(all.len() < 20 && all.is_sorted_by(|a, b| a < b), "{all:?}");
        for tokens in 1..=room.latents {
            let padded = padded(tokens, room);
            assert!(
                padded >= tokens && padded <= room.latents && all.contains(&padded),
                "{tokens}"
            );
            assert!(tokens > room.expanded || padded <= room.expanded, "{tokens}");
        }
    }
}

#[test]
fn a_head_of_the_longest_sequence_fits_whatever_the_shape() {
    for heads in [0, 1, 2, 4, 16, 128] {
        for context in [1, 64, 40_000, 163_840, 1 << 20] {
            let room = Room::new(&mla(heads), 512, 16, context);
            assert!(room.latents >= context, "{heads} heads, {context}: {room:?}");
            let of_heads = room.expanded * heads.max(1);
            assert!(of_heads >= room.latents, "{heads} heads, {context}: {room:?}");
        }
    }
    // As many as ever where heads are many.
    let room = Room::new(&mla(16), 2048, 256, 163_840);
    assert_eq!(room, Room { latents: 163_840, expanded: 32_768 });
    let room = Room::new(&mla(128), 2048, 256, 163_840);
    assert_eq!(room, Room { latents: 163_840, expanded: 8192 });
}
