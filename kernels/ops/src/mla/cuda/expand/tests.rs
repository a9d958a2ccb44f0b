//! Whole prompts against the absorbed form in f64.

use super::*;
use crate::cuda::testing::{Device, assert_near, device, rounded};
use crate::mla::cuda::tests::absorbed_row;
use crate::testing::Random;
use device::cuda::DeviceMemory;

const fn mla(heads: usize) -> Mla {
    Mla { heads, nope: 128, rope: 64, v: 128, latent: 512, scale: 0.07 }
}

struct Case {
    mla: Mla,
    segments: Vec<Segment>,
    rows: usize,
    q: Vec<f32>,
    kv: Vec<f32>,
    kv_b: Vec<f32>,
}

impl Case {
    /// Segments of so many rows, of which negative ones begin before the step.
    fn new(heads: usize, lens: &[i32]) -> Self {
        let mla = mla(heads);
        let mut segments = Vec::new();
        let mut start = 0;
        for len in lens {
            let (len, before) = (len.unsigned_abs(), if *len < 0 { 70 } else { 0 });
            segments.push(Segment { start, len, context: len + before, table: 0 });
            start += len;
        }
        let rows = start as usize;
        let mut random = Random::new(rows as u64);
        let mut vector = |len: usize, by: f32| -> Vec<f32> {
            rounded(&random.vector(len).iter().map(|x| x * by).collect::<Vec<_>>(), Dtype::Bf16)
        };
        let (q, kv) = (vector(rows * heads * 192, 1.0), vector(rows * 576, 1.0));
        let kv_b = vector(heads * 256 * 512, 0.08);
        Self { mla, segments, rows, q, kv, kv_b }
    }

    fn run(&self, device: &Device) -> Vec<f32> {
        let Self { mla, rows, .. } = self;
        let mut list = Vec::new();
        cut().tiles(&self.segments, is_whole, &mut list);
        let count = device.send(&[list.len() as u32]);
        let mut words: Vec<u32> = list.iter().flat_map(|tile| [tile.segment, tile.line]).collect();
        words.extend([u32::MAX; 4]);
        let (tiles_sent, max_tiles) = (device.send(&words), list.len() + 2);
        let flat = self.segments.iter().flat_map(|s| [s.start, s.len, s.context, s.start]);
        let segments = device.send(&flat.collect::<Vec<u32>>());
        let send = |values: &[f32]| device.send_as(values, Dtype::Bf16);
        // Both are parts of the same rows.
        let (width, both) = (mla.heads * 192, mla.heads * 192 + 576);
        let pairs = self.q.chunks_exact(width).zip(self.kv.chunks_exact(576));
        let rows_of_both: Vec<f32> = pairs.flat_map(|(q, kv)| [q, kv].concat()).collect();
        let (first, kv_b) = (send(&rows_of_both), send(&self.kv_b));
        let second = first.slice(width * 2..first.bytes());
        let [q, kv] = [&first, &second].map(|slice| Strided { slice, stride: both });
        let room = Room { latents: 1, expanded: *rows };
        let memory = DeviceMemory::allocate(&device.context, "a test", Scratch::bytes(mla, room));
        let memory = memory.expect("memory");
        device.stream.fill(&memory, 0xFF).expect("a fill");
        let scratch = Scratch::take(&mut Arena::new(memory), mla, room).expect("an arena");
        let (segments, tiles) = (&segments, &tiles_sent);
        let plan =
            prompt::Plan { segments, tiles, tile_count: &count, first_tile: None, max_tiles };
        let out = device.poisoned(rows * mla.heads * 128 * 2);
        let (on, all) = (device.queue(), Rows::exactly(*rows));
        attention(on, all, mla, q, kv, &kv_b, &plan, &scratch, &out).expect("a launch");
        device.fetch_as(&out, Dtype::Bf16)
    }

    /// Compares some rows of each segment; the others would take f64 too long.
    fn check(&self, got: &[f32]) {
        let heads = self.mla.heads;
        for segment in &self.segments {
            let (start, len) = (segment.start as usize, segment.len as usize);
            for at in (0..len).step_by(1 + len / 5).chain([len - 1]) {
                for head in 0..heads {
                    let row = &got[((start + at) * heads + head) * 128..][..128];
                    if !is_whole(segment) {
                        assert!(row.iter().all(|x| x.is_nan()), "left alone");
                        continue;
                    }
                    let q = &self.q[((start + at) * heads + head) * 192..][..192];
                    let kv = &self.kv[start * 576..];
                    let expected = absorbed_row(q, kv, &self.kv_b, &self.mla, at, head);
                    // Keys, values and probabilities are rounded.
                    assert_near(&format!("row {at} of {len}, head {head}"), row, &expected, 2e-2);
                }
            }
        }
    }
}

#[test]
fn whole_prompts_agree_with_f64() {
    let Some(device) = device() else { return };
    for (heads, lens) in [
        (1, vec![16]),
        (3, vec![63, 1, 64, 65, -20, 129]),
        (16, vec![300, 127]),
        (2, vec![700, 15, 31]),
    ] {
        let case = Case::new(heads, &lens);
        case.check(&case.run(&device));
    }
}

#[test]
fn prompts_do_not_see_each_other() {
    let Some(device) = device() else { return };
    let mut case = Case::new(4, &[100, 77, 140]);
    let clean = case.run(&device);
    case.kv[120 * 576..][..576].fill(f32::NAN);
    case.q[130 * 4 * 192..][..192].fill(f32::NAN);
    let got = case.run(&device);
    let (before, after) = (100 * 4 * 128, 177 * 4 * 128);
    assert_eq!(got[..before], clean[..before]);
    assert_eq!(got[after..], clean[after..]);
    assert!(got[before..after].iter().any(|x| x.is_nan()));
}
