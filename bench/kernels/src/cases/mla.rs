//! Latent attention: decoding rows of 16 and of 128 heads in pieces, and one prompt of 16 heads in the
//! expanded form, whole or behind a context.

use super::step::{Step, attend};
use crate::case::{Case, Check, Launch, Ready, Work};
use crate::near::{Failure, near, some};
use crate::rig::{Rig, cold_sets};
use device::cuda::{CudaError, DeviceSlice};
use ops::cuda::{Dtype, Rows, Strided, Tensor};
use ops::flash::cuda::cut::{Cut, Piece};
use ops::flash::cuda::{Query, prompt as kernel};
use ops::mla::Mla;
use ops::mla::cuda::decode;
use ops::mla::cuda::expand::later::{self, Later, Passes};
use ops::mla::cuda::expand::{self, Room};
use ops::paged::KvLayer;

/// DeepSeek-V2-Lite's.
pub(super) const MLA: Mla =
    Mla { heads: 16, nope: 128, rope: 64, v: 128, latent: 512, scale: 0.072 };
/// Elements of a cache row, and of a head's query.
pub(super) const WIDTH: usize = MLA.latent + MLA.rope;
pub(super) const QUERY: usize = MLA.nope + MLA.rope;
pub(super) const LAYER: KvLayer = KvLayer { offset: 0, row: WIDTH };

/// Heads, batch and context.
const DECODES: [(usize, usize, usize); 11] = [
    (16, 1, 1024),
    (16, 1, 8192),
    (16, 4, 8192),
    (16, 16, 8192),
    (16, 64, 8192),
    (16, 128, 8192),
    (16, 256, 256),
    (16, 512, 512),
    (128, 1, 8192),
    (128, 16, 8192),
    (128, 64, 8192),
];
const PROMPTS: [usize; 2] = [4096, 16_384];
/// Rows and context.
const BEHIND: [(usize, usize); 3] = [(2048, 4096), (2048, 10_240), (2048, 32_768)];

pub(super) fn cases() -> Vec<Case> {
    let decodes = DECODES.into_iter().map(|(heads, rows, context)| {
        Case::new(format!("mla_decode.h{heads}.bs{rows}.ctx{context}"), move |rig| {
            decoding(rig, heads, rows, context)
        })
    });
    let prompts = PROMPTS
        .into_iter()
        .map(|len| Case::new(format!("mla_prefill.h16.len{len}"), move |rig| prompt(rig, len)));
    let behind = BEHIND.into_iter().map(|(len, context)| {
        Case::new(format!("mla_prefill.h16.len{len}.ctx{context}"), move |rig| {
            behind(rig, len, context)
        })
    });
    decodes.chain(prompts).chain(behind).collect()
}

/// The cut of a step's keys on the device, over caches of several sets.
pub(super) struct Pieces {
    pieces: DeviceSlice,
    slots: DeviceSlice,
    pub(super) tables: DeviceSlice,
    blocks: usize,
    rows: usize,
    maps: Vec<decode::CacheMap>,
    pub(super) caches: Vec<DeviceSlice>,
    pub(super) partials: decode::Partials,
}

impl Pieces {
    pub(super) fn new(
        rig: &mut Rig,
        step: &Step,
        heads: usize,
        sets: usize,
    ) -> Result<Self, Failure> {
        let (rows, blocks) = (step.rows(), rig.multiprocessors());
        let mut cut = Cut::default();
        let at = |entry: usize| step.tables.get(entry).copied();
        let lines = decode::lines(heads);
        cut.make(&step.segments, at, rows, lines, blocks);
        let (most, slots) = Cut::most(rows, lines, blocks);
        let mut words: Vec<u32> = cut.pieces.iter().flat_map(Piece::words).collect();
        words.resize(most * Piece::WORDS, 0);
        let caches = (0..sets).map(|_| rig.normal(step.elements(), 1.0));
        let caches = caches.collect::<Result<Vec<_>, _>>()?;
        let maps = caches.iter().map(decode::cache_map).collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            pieces: rig.u32s(&words)?,
            slots: rig.u32s(cut.slots.as_flattened())?,
            tables: rig.u64s(&step.tables)?,
            blocks,
            rows,
            maps,
            caches,
            partials: decode::Partials::take(rig.arena(), slots)?,
        })
    }

    pub(super) fn plan(&self, set: usize) -> decode::Plan<'_> {
        let Self { pieces, slots, tables, blocks, rows, maps, .. } = self;
        decode::Plan { map: &maps[set], pieces, slots, tables, blocks: *blocks, decodes: *rows }
    }
}

fn decoding(rig: &mut Rig, heads: usize, rows: usize, context: usize) -> Result<Ready, Failure> {
    let mla = Mla { heads, ..MLA };
    let step = Step::new(rows, 1, context, WIDTH);
    let bytes = rows * context * WIDTH * 2;
    let sets = cold_sets(bytes);
    let pieces = Pieces::new(rig, &step, heads, sets)?;
    let queries = rig.normal(rows * heads * WIDTH, 1.0)?;
    let out = rig.space(rows * heads * MLA.latent * 2)?;
    let (cache, q, sums) = (pieces.caches[0].clone(), queries.clone(), out.clone());
    let launch: Launch = Box::new(move |on, i| {
        let query = |from: usize| Query {
            address: queries.address() + 2 * from as u64,
            row: heads * WIDTH,
            head: WIDTH,
        };
        let (queries, all) = ([query(0), query(MLA.latent)], Rows::exactly(rows));
        let kv = Tensor::new(&pieces.caches[i], Dtype::Bf16);
        let (plan, partials) = (pieces.plan(i), &pieces.partials);
        decode::attention(on, all, &mla, queries, LAYER, kv, &plan, partials, &out)
    });
    let check: Check = Box::new(move |rig, launch| {
        rig.poison(&sums)?;
        rig.run(launch, 0)?;
        for row in some(rows, 2) {
            let keys = step.contents(rig, &cache, row)?;
            for head in some(heads, 2) {
                let at = row * heads + head;
                let q = rig.bf16s(&q, at * WIDTH..(at + 1) * WIDTH)?;
                let q: Vec<f64> = q.into_iter().map(f64::from).collect();
                let tokens = || keys.chunks_exact(WIDTH).take(context);
                let values = tokens().map(|key| &key[..MLA.latent]);
                let expected = attend(MLA.scale, &q, tokens(), values);
                let got = rig.bf16s(&sums, at * MLA.latent..(at + 1) * MLA.latent)?;
                near(&format!("row {row}, head {head}"), &got, &expected, 1e-2)?;
            }
        }
        Ok(())
    });
    let work = Work::bytes(bytes);
    // What the tensor cores have to do is far from what they can where heads are few.
    let flops = 2.0 * (rows * heads * context * (WIDTH + MLA.latent)) as f64;
    let work = if heads > 16 { work.and_flops(flops) } else { work };
    Ok(Ready { work, sets, launch, check })
}

/// A prompt that lies in the step as a whole: keys and values projected up, then attention. Operations
/// are those of attention alone.
fn prompt(rig: &mut Rig, len: usize) -> Result<Ready, Failure> {
    let Mla { heads, nope, v, latent, .. } = MLA;
    let mut step = Step::new(1, len, len, WIDTH);
    step.segments.iter_mut().for_each(|segment| segment.table = segment.start);
    let mut list = Vec::new();
    expand::cut().tiles(&step.segments, expand::is_whole, &mut list);
    let segments = step.send_segments(rig)?;
    let count = rig.u32s(&[list.len() as u32])?;
    let words: Vec<u32> = list.iter().flat_map(|tile| [tile.segment, tile.line]).collect();
    let (max_tiles, tiles) = (list.len(), rig.u32s(&words)?);
    let q = rig.normal(len * heads * QUERY, 1.0)?;
    let kv = rig.normal(len * WIDTH, 1.0)?;
    let kv_b = rig.normal(heads * (nope + v) * latent, 1.0 / (latent as f64).sqrt())?;
    let scratch = expand::Scratch::take(rig.arena(), &MLA, Room { latents: 1, expanded: len })?;
    let out = rig.space(len * heads * v * 2)?;
    let of = [&q, &kv_b, &out, &kv].map(DeviceSlice::clone);
    let launch: Launch = Box::new(move |on, _| -> Result<(), CudaError> {
        let (segments, tiles, tile_count) = (&segments, &tiles, &count);
        let plan = kernel::Plan { segments, tiles, tile_count, first_tile: None, max_tiles };
        let all = Rows::exactly(len);
        let (q, kv) = (Strided::dense(&q, heads * QUERY), Strided::dense(&kv, WIDTH));
        expand::attention(on, all, &MLA, q, kv, &kv_b, &plan, &scratch, &out)
    });
    let check: Check = Box::new(move |rig, launch| {
        let keys = rig.bf16s(&of[3], 0..len * WIDTH)?;
        check_prompt(rig, launch, (len, &keys), &of)
    });
    Ok(Ready { work: Work::default().and_flops(flops(len, len)), sets: 1, launch, check })
}

/// Of attention alone.
fn flops(len: usize, context: usize) -> f64 {
    let seen = (context - len) as f64 * len as f64 + len as f64 * (len + 1) as f64 / 2.0;
    2.0 * (MLA.heads * (QUERY + MLA.v)) as f64 * seen
}

/// The last rows of a prompt, the latents of all of which are in the cache: gathered, projected up, then
/// attention. Operations are those of attention alone.
fn behind(rig: &mut Rig, len: usize, context: usize) -> Result<Ready, Failure> {
    let Mla { heads, nope, v, latent, .. } = MLA;
    let step = Step::new(1, len, context, WIDTH);
    let room = Room { latents: context, expanded: context };
    let mut passes = Passes::default();
    passes.make(&step.segments, room);
    let words: Vec<u32> = passes.tiles.iter().flat_map(|t| [t.segment, t.line]).collect();
    let (tiles, parts) = (rig.u32s(&words)?, rig.u32s(&passes.passes[0].words())?);
    let (tokens, segment) = (passes.passes[0].padded, passes.segments[0]);
    let segments = rig.u32s(&[segment.start, segment.len, segment.context, segment.table])?;
    let (firsts, tables) = (rig.u32s(&passes.firsts)?, rig.u64s(&step.tables)?);
    let q = rig.normal(len * heads * QUERY, 1.0)?;
    let cache = rig.normal(step.elements(), 1.0)?;
    let kv_b = rig.normal(heads * (nope + v) * latent, 1.0 / (latent as f64).sqrt())?;
    let scratch = expand::Scratch::take(rig.arena(), &MLA, room)?;
    let out = rig.space(len * heads * v * 2)?;
    let of = [&q, &kv_b, &out, &cache].map(DeviceSlice::clone);
    let launch: Launch = Box::new(move |on, _| -> Result<(), CudaError> {
        let (parts, segments, firsts, tiles, tables) =
            (&parts, &segments, &firsts, &tiles, &tables);
        let later = Later { tokens, parts, segments, firsts, tiles, tables };
        let from = (LAYER, Tensor::new(&cache, Dtype::Bf16));
        let q = Strided::dense(&q, heads * QUERY);
        later::attention(on, len, &MLA, q, &kv_b, from, &later, &scratch, &out)
    });
    let check: Check = Box::new(move |rig, launch| {
        let keys = step.contents(rig, &of[3], 0)?;
        check_prompt(rig, launch, (len, &keys[..context * WIDTH]), &of)
    });
    Ok(Ready { work: Work::default().and_flops(flops(len, context)), sets: 1, launch, check })
}

/// Some rows against the absorbed form in f64, which is the same with fewer products.
fn check_prompt(
    rig: &Rig,
    launch: &Launch,
    (len, keys): (usize, &[f32]),
    [q, kv_b, out, _]: &[DeviceSlice; 4],
) -> Result<(), Failure> {
    let Mla { heads, nope, v, latent, scale, .. } = MLA;
    rig.poison(out)?;
    rig.run(launch, 0)?;
    let before = keys.len() / WIDTH - len;
    for head in some(heads, 2) {
        let first = head * (nope + v) * latent;
        let weights = rig.bf16s(kv_b, first..first + (nope + v) * latent)?;
        let up: Vec<&[f32]> = weights.chunks_exact(latent).collect();
        for row in some(len, 3) {
            let at = row * heads + head;
            let q = rig.bf16s(q, at * QUERY..(at + 1) * QUERY)?;
            let mut query = vec![0.0; latent];
            for (q, up) in q.iter().zip(&up[..nope]) {
                query.iter_mut().zip(*up).for_each(|(sum, w)| *sum += f64::from(q * w));
            }
            query.extend(q[nope..].iter().map(|x| f64::from(*x)));
            let tokens = || keys.chunks_exact(WIDTH).take(before + row + 1);
            let sums = attend(scale, &query, tokens(), tokens().map(|key| &key[..latent]));
            let dot = |up: &&[f32]| sums.iter().zip(*up).map(|(s, w)| s * f64::from(*w)).sum();
            let expected: Vec<f64> = up[nope..].iter().map(dot).collect();
            let got = rig.bf16s(out, at * v..(at + 1) * v)?;
            // Keys, values and probabilities are rounded.
            near(&format!("row {row}, head {head}"), &got, &expected, 2e-2)?;
        }
    }
    Ok(())
}
