//! The three kernels against the ops one by one, which have references of their own.

use super::*;
use crate::cuda::testing::paged::{Cache, Sent};
use crate::cuda::testing::{Device, assert_near, device, rounded, small};
use crate::cuda::{Strided, Tensor};
use crate::flash::cuda::cut;
use crate::mla::cuda::{Core, absorb_weights, absorbed_len, near};
use crate::norm::cuda::head_norm;
use crate::paged::{BLOCK, cuda::write_kv};
use crate::rope::cuda::rope;
use crate::testing::Random;
use device::cuda::Arena;

const BF16: Dtype = Dtype::Bf16;
/// Rows of garbage behind the real ones.
const PADDING: usize = 3;

const fn shape_of(heads: usize) -> Mla {
    Mla { heads, nope: NOPE, rope: ROPE, v: VALUE, latent: LATENT, scale: 0.072 }
}

/// How a step is run.
#[derive(Clone, Copy, PartialEq)]
pub(in crate::mla::cuda) enum By {
    /// One by one.
    Ops,
    /// The three kernels.
    Block,
    /// Keys and queries in one, attention as one by one.
    Keys,
    /// One kernel.
    Near,
}

/// A step of decoding rows, its operands on the host.
pub(in crate::mla::cuda) struct Decodes {
    mla: Mla,
    pub(in crate::mla::cuda) cache: Cache,
    pub(in crate::mla::cuda) q: Vec<f32>,
    pub(in crate::mla::cuda) kv: Vec<f32>,
    kv_b: Vec<f32>,
    norm: Vec<f32>,
    pairing: Pairing,
    padding: usize,
}

impl Decodes {
    pub(in crate::mla::cuda) fn new(heads: usize, contexts: &[usize], pairing: Pairing) -> Self {
        Self::padded(heads, contexts, pairing, PADDING)
    }

    pub(in crate::mla::cuda) fn padded(
        heads: usize,
        contexts: &[usize],
        pairing: Pairing,
        padding: usize,
    ) -> Self {
        let mla = shape_of(heads);
        let sequences: Vec<_> = contexts.iter().map(|context| (1, *context)).collect();
        let cache = Cache::whole_rows(&sequences, WIDTH, BF16, 21);
        let padded = contexts.len() + padding;
        let mut random = Random::new(22);
        let mut numbers = |len: usize| rounded(&random.vector(len), BF16);
        let (mut q, mut kv) = (numbers(padded * heads * QUERY), numbers(padded * WIDTH));
        q[contexts.len() * heads * QUERY..].fill(f32::NAN);
        kv[contexts.len() * WIDTH..].fill(f32::NAN);
        let norm = numbers(LATENT);
        let kv_b = numbers(heads * (NOPE + VALUE) * LATENT);
        // As trained weights are: products keep the size of what goes in.
        let kv_b: Vec<f32> = kv_b.iter().map(|x| x * (3.0 / LATENT as f32).sqrt()).collect();
        let kv_b = rounded(&kv_b, BF16);
        Self { mla, cache, q, kv, kv_b, norm, pairing, padding }
    }

    /// Results, rotated queries and the cache.
    pub(in crate::mla::cuda) fn run(
        &self,
        device: &Device,
        by: By,
        blocks: usize,
    ) -> [Vec<f32>; 3] {
        let Self { mla, cache, .. } = self;
        let heads = mla.heads;
        let (real, padded) = (cache.rows(), cache.rows() + self.padding);
        let sent = cache.send(device, heads, 16);
        // But for the ops, both are parts of the same rows.
        let (width, both) = (heads * QUERY, heads * QUERY + WIDTH);
        let pairs = self.q.chunks_exact(width).zip(self.kv.chunks_exact(WIDTH));
        let rows_of_both: Vec<f32> = pairs.flat_map(|(q, kv)| [q, kv].concat()).collect();
        let [q, kv, rows_of_both, kv_b] =
            [&self.q, &self.kv, &rows_of_both, &self.kv_b].map(|x| device.send_as(x, BF16));
        let second = rows_of_both.slice(width * 2..rows_of_both.bytes());
        let apart = matches!(by, By::Ops);
        let [of_q, of_kv] = match apart {
            true => [Strided::dense(&q, width), Strided::dense(&kv, WIDTH)],
            false => [&rows_of_both, &second].map(|slice| Strided { slice, stride: both }),
        };
        let norm = device.send(&self.norm);
        let absorbed = device.poisoned(absorbed_len(mla) * 2);
        let on = device.queue();
        absorb_weights(on, mla, Tensor::new(&kv_b, BF16), &absorbed).expect("a launch");
        let inv_freq: Vec<f32> = (0..ROPE / 2).map(|i| 0.7_f32.powi(i as i32)).collect();
        let inv_freq = device.send(&inv_freq);
        let mut positions: Vec<u32> = cache.segments.iter().map(|s| s.context - 1).collect();
        let mut row_tables: Vec<u32> = cache.segments.iter().map(|s| s.table).collect();
        positions.resize(padded, u32::MAX);
        row_tables.resize(padded, u32::MAX);
        let [positions, row_tables, count] =
            [positions, row_tables, vec![real as u32]].map(|words| device.send(&words));
        let rows = Rows { padded, count: Some(&count) };
        let cut = Cut::new(device, self, &sent, blocks);
        let plan = cut.plan(sent.tables());
        let bytes = Scratch::bytes(mla, BF16, padded);
        let scratch = Scratch::take(&mut Arena::new(device.poisoned(bytes)), mla, BF16, padded);
        let out = device.poisoned(padded * heads * VALUE * 2);
        let to = Destination {
            arena: sent.arena(),
            positions: &positions,
            row_tables: &row_tables,
            tables: sent.tables(),
        };
        let block = Block {
            q: of_q,
            kv: of_kv,
            norm: &norm,
            eps: 1e-6,
            rope: Rope { inv_freq: &inv_freq, factor: 1.1, pairing: self.pairing },
            to,
            layer: cache.layer,
            weights: Weights { absorbed: &absorbed, kv_b: &kv_b },
            plan: &plan,
            partials: &cut.partials,
            scratch: &scratch.expect("room"),
            out: &out,
        };
        let launched = match by {
            By::Block => attention(on, rows, mla, &block),
            By::Near => near::attention(on, rows, mla, &block),
            By::Keys => {
                keys(on, rows, mla, &block.keys()).and_then(|()| absorbed_of(on, rows, mla, &block))
            }
            By::Ops => one_by_one(on, rows, mla, &block),
        };
        launched.expect("launches");
        if by == By::Keys {
            // What the cache got is in the rows too.
            let [rows, arena] =
                [&rows_of_both, sent.arena().slice].map(|x| device.fetch_as(x, BF16));
            let mut kept = rows.chunks_exact(both).map(|row| &row[width..]);
            for (of, row) in cache.segments.iter().zip(kept.by_ref()) {
                let at = cache.at(of.table as usize, of.context as usize - 1);
                assert_eq!(row, &arena[at..][..WIDTH], "of {of:?}");
            }
            assert!(kept.flatten().all(|x| x.is_nan()), "padding is left alone");
        }
        let mut got = [&out, of_q.slice, sent.arena().slice].map(|x| device.fetch_as(x, BF16));
        if !apart {
            got[1] = got[1].chunks_exact(both).flat_map(|row| row[..width].to_vec()).collect();
        }
        // What padding holds is nothing to look at.
        got[0].truncate(real * heads * VALUE);
        got[1].truncate(real * heads * QUERY);
        got
    }
}

/// A cut of a step's keys on the device.
struct Cut {
    map: decode::CacheMap,
    pieces: DeviceSlice,
    slots: DeviceSlice,
    partials: decode::Partials,
    blocks: usize,
    rows: usize,
}

impl Cut {
    fn new(device: &Device, of: &Decodes, sent: &Sent, blocks: usize) -> Self {
        let (rows, lines) = (of.cache.rows(), decode::lines(of.mla.heads));
        let mut cut = cut::Cut::default();
        cut.make(
            &of.cache.segments,
            |at| of.cache.tables.get(at).copied(),
            rows + of.padding,
            lines,
            blocks,
        );
        let (most, slots) = cut::Cut::most(rows, lines, blocks);
        let mut words: Vec<u32> = cut.pieces.iter().flat_map(cut::Piece::words).collect();
        words.resize(most * cut::Piece::WORDS, u32::MAX);
        let memory = device.poisoned(decode::Partials::bytes(slots));
        Self {
            map: decode::cache_map(sent.arena().slice).expect("a map"),
            pieces: device.send(&words),
            slots: device.send(cut.slots.as_flattened()),
            partials: decode::Partials::take(&mut Arena::new(memory), slots).expect("room"),
            blocks,
            rows,
        }
    }

    fn plan<'a>(&'a self, tables: &'a DeviceSlice) -> decode::Plan<'a> {
        let Self { map, pieces, slots, blocks, rows, .. } = self;
        decode::Plan { map, pieces, slots, tables, blocks: *blocks, decodes: *rows }
    }
}

fn one_by_one(
    on: Queue<'_>,
    rows: Rows<'_>,
    mla: &Mla,
    block: &Block<'_>,
) -> Result<(), CudaError> {
    let Block { q, kv, to, layer, .. } = *block;
    let [of_q, latent, key] = heads(mla);
    let [q_tensor, kv_tensor] = [q, kv].map(|x| Tensor::new(x.slice, BF16));
    rope(on, rows, q_tensor, &of_q, to.positions, &block.rope)?;
    head_norm(on, rows, kv_tensor, &latent, block.norm, block.eps)?;
    rope(on, rows, kv_tensor, &key, to.positions, &block.rope)?;
    write_kv(on, rows, kv, layer, &to)?;
    absorbed_of(on, rows, mla, block)
}

/// Attention of rows whose keys are written.
fn absorbed_of(
    on: Queue<'_>,
    rows: Rows<'_>,
    mla: &Mla,
    block: &Block<'_>,
) -> Result<(), CudaError> {
    let Block { q, to, layer, plan, partials, scratch, out, .. } = *block;
    let core = Core::Pieces(plan, partials);
    let weights = &block.weights;
    super::super::attention(on, rows, q, weights, mla, layer, to.arena, core, scratch, out)
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}

/// Results differ by the order of sums, which may round a stored number the other way: a unit in the
/// last place of bf16, and what follows from it.
fn check(device: &Device, decodes: &Decodes, blocks: usize) {
    let what = format!("{} heads, {blocks} blocks", decodes.mla.heads);
    let fused = decodes.run(device, By::Block, blocks);
    let expected = decodes.run(device, By::Ops, blocks);
    assert_eq!(fused[1].len(), expected[1].len());
    assert!(fused[1].iter().all(|x| x.is_finite()), "{what}: queries of real rows");
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&fused[1]), bits(&expected[1]), "{what}: queries are rotated alike");
    assert_near(&format!("{what}: cache"), &fused[2], &wide(&expected[2]), 8e-3);
    assert!(expected[0].iter().all(|x| x.is_finite()), "{what}: results");
    assert_near(&format!("{what}: results"), &fused[0], &wide(&expected[0]), 1.6e-2);
    let apart = decodes.run(device, By::Keys, blocks);
    assert_near(&format!("{what}: results apart"), &apart[0], &wide(&expected[0]), 1.6e-2);
    assert_eq!(
        apart[1..].iter().map(|x| bits(x)).collect::<Vec<_>>(),
        fused[1..].iter().map(|x| bits(x)).collect::<Vec<_>>(),
        "{what}"
    );
    // The order of sums is given.
    let again = decodes.run(device, By::Block, blocks);
    for (once, again) in fused.iter().zip(&again) {
        assert_eq!(bits(once), bits(again), "{what}");
    }
}

#[test]
fn a_block_agrees_with_its_ops() {
    let Some(device) = device() else { return };
    let ragged = [1, 2, 15, 16, 17, 63, 64, 65, 129, 400, 513];
    let heads: &[usize] = if small() { &[3, 16] } else { &[1, 3, 16, 40, 128] };
    for heads in heads {
        for pairing in [Pairing::Interleaved, Pairing::Halves] {
            check(&device, &Decodes::new(*heads, &ragged, pairing), 132);
        }
    }
    for contexts in [vec![1], vec![BLOCK], vec![256], vec![3001, 1], vec![65_539]] {
        for blocks in [1, 7, 132] {
            check(&device, &Decodes::new(16, &contexts, Pairing::Interleaved), blocks);
        }
    }
    for contexts in [vec![256], vec![3001, 1]] {
        check(&device, &Decodes::new(128, &contexts, Pairing::Interleaved), 132);
    }
    // More than a tile of rows, and more than run at once; one long among many short ones.
    for rows in [13, 14, 17, 30, 64, 126, 250] {
        let mut contexts: Vec<usize> = (0..rows).map(|i| 1 + i * 37 % 300).collect();
        contexts[rows / 2] = 9000;
        check(&device, &Decodes::new(16, &contexts, Pairing::Interleaved), 132);
    }
}

#[test]
fn a_row_that_is_not_a_number_leaves_its_neighbours_alone() {
    let Some(device) = device() else { return };
    for (rows, heads) in [(4, 16), (100, 16), (7, 70)] {
        a_broken_row(&device, rows, heads);
    }
}

fn a_broken_row(device: &Device, rows: usize, heads: usize) {
    let contexts: Vec<usize> = [300, 77, 500, 1].into_iter().cycle().take(rows).collect();
    let clean = Decodes::new(heads, &contexts, Pairing::Interleaved);
    let width = heads * VALUE;
    let expected = clean.run(device, By::Block, 132);
    // In its keys, in its query.
    for in_keys in [true, false] {
        let mut broken = Decodes::new(heads, &contexts, Pairing::Interleaved);
        if in_keys {
            let at = broken.cache.at(broken.cache.segments[1].table as usize, 70);
            broken.cache.arena[at + 3] = f32::NAN;
        } else {
            broken.q[heads * QUERY..][..heads * QUERY].fill(f32::NAN);
        }
        let got = broken.run(device, By::Block, 132);
        assert_eq!(got[0][..width], expected[0][..width], "{in_keys}: before");
        assert_eq!(got[0][2 * width..], expected[0][2 * width..], "{in_keys}: after");
        assert!(got[0][width..2 * width].iter().all(|x| x.is_nan()), "{in_keys}: itself");
    }
}

#[test]
fn blocks_are_as_many_as_run_at_once() {
    let most = VALUES_WAVES * 132;
    for (rows, heads, expected) in [(0, 16, 0), (1, 16, 1), (32, 16, 1), (33, 16, 2), (64, 16, 2)] {
        assert_eq!(tiles(rows, heads * VALUES_SHARES, most), expected, "{rows} rows");
    }
    // Heads that do not run at once take all rows each.
    assert_eq!(tiles(60, 128 * VALUES_SHARES, most), 4);
}
