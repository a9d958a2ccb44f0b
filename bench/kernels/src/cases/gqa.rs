//! Grouped-query attention of Qwen3-8B: decoding rows, and one long prompt.

use super::step::{Step, attend};
use crate::case::{Case, Check, Launch, Ready, Work};
use crate::near::{Failure, near, some};
use crate::rig::{Rig, cold_sets};
use device::cuda::{CudaError, DeviceSlice};
use ops::cuda::{Dtype, Rows, Strided, Tensor};
use ops::flash::cuda::cut::{Cut, Piece};
use ops::flash::cuda::prompt as kernel;
use ops::gqa::Gqa;
use ops::gqa::cuda::{self as gqa, decode};
use ops::paged::KvLayer;

const GQA: Gqa = Gqa { heads: 32, kv_heads: 8, head_dim: 128, scale: 0.088, window: None };
/// Elements of a cache row.
const WIDTH: usize = 2 * GQA.kv_heads * GQA.head_dim;
const LAYER: KvLayer = KvLayer { offset: 0, row: WIDTH };

/// Batch and context.
const DECODES: [(usize, usize); 12] = [
    (1, 256),
    (1, 4096),
    (1, 8192),
    (1, 32_768),
    (4, 4096),
    (4, 8192),
    (16, 4096),
    (16, 8192),
    (16, 32_768),
    (64, 4096),
    (256, 256),
    (256, 1024),
];
const PROMPTS: [usize; 2] = [4096, 16_384];

pub(super) fn cases() -> Vec<Case> {
    let decodes = DECODES.into_iter().map(|(rows, context)| {
        let name = format!("gqa_decode.h32kv8.bs{rows}.ctx{context}");
        Case::new(name, move |rig| decoding(rig, &Step::new(rows, 1, context, WIDTH)))
    });
    let prompts = PROMPTS.into_iter().map(|len| {
        Case::new(format!("gqa_prefill.h32kv8.len{len}"), move |rig| {
            let seen = len as f64 * (len + 1) as f64 / 2.0;
            let flops = 4.0 * (GQA.heads * GQA.head_dim) as f64 * seen;
            prompt(rig, &Step::new(1, len, len, WIDTH), Work::default().and_flops(flops))
        })
    });
    decodes.chain(prompts).collect()
}

/// Rows that decode, their keys cut into pieces.
fn decoding(rig: &mut Rig, step: &Step) -> Result<Ready, Failure> {
    let rows = step.rows();
    let bytes = rows * step.segments[0].context as usize * WIDTH * 2;
    let sets = cold_sets(bytes);
    let (blocks, lines) = (decode::blocks(rig.multiprocessors()), decode::lines(&GQA));
    let mut cut = Cut::default();
    let at = |entry: usize| step.tables.get(entry).copied();
    cut.make(&step.segments, at, rows, lines, blocks);
    let (most, slots) = Cut::most(rows, lines, blocks);
    let mut words: Vec<u32> = cut.pieces.iter().flat_map(Piece::words).collect();
    words.resize(most * Piece::WORDS, 0);
    let (pieces, tables) = (rig.u32s(&words)?, rig.u64s(&step.tables)?);
    let (arena, stream) = rig.arena_and_stream();
    let partials = decode::Partials::take(arena, stream, slots, GQA.head_dim)?;
    let caches = (0..sets).map(|_| rig.normal(step.elements(), 1.0));
    let caches = caches.collect::<Result<Vec<_>, _>>()?;
    let map = |cache| decode::cache_map(&GQA, cache);
    let maps = caches.iter().map(map).collect::<Result<Vec<_>, _>>()?;
    let q = rig.normal(rows * GQA.heads * GQA.head_dim, 1.0)?;
    let out = rig.space(rows * GQA.heads * GQA.head_dim * 2)?;
    let check = check(step, [q.clone(), caches[0].clone(), out.clone()]);
    let launch: Launch = Box::new(move |on, i| {
        let (map, pieces, tables) = (&maps[i], &pieces, &tables);
        let plan = decode::Plan { map, pieces, tables, blocks, decodes: rows };
        let kv = Tensor::new(&caches[i], Dtype::Bf16);
        let core = gqa::Core::Pieces(&plan, &partials);
        let q = Strided::dense(&q, GQA.heads * GQA.head_dim);
        gqa::attention(on, Rows::exactly(rows), q, &GQA, LAYER, kv, core, &out)
    });
    Ok(Ready { work: Work::bytes(bytes), sets, launch, check })
}

/// Prompts that lie in the step as a whole.
fn prompt(rig: &mut Rig, step: &Step, work: Work) -> Result<Ready, Failure> {
    let Gqa { heads, head_dim, .. } = GQA;
    let rows = step.rows();
    let cut = gqa::prompt_cut(&GQA, LAYER, Dtype::Bf16);
    let cut = cut.ok_or_else(|| CudaError::Shape { op: "gqa", why: format!("{GQA:?}") })?;
    let mut list = Vec::new();
    cut.tiles(&step.segments, |_| true, &mut list);
    let max_tiles = list.len();
    let count = rig.u32s(&[max_tiles as u32])?;
    let words: Vec<u32> = list.iter().flat_map(|tile| [tile.segment, tile.line]).collect();
    let tiles = rig.u32s(&words)?;
    let segments = step.send_segments(rig)?;
    let tables = rig.u64s(&step.tables)?;
    let cache = rig.normal(step.elements(), 1.0)?;
    let q = rig.normal(rows * heads * head_dim, 1.0)?;
    let out = rig.space(rows * heads * head_dim * 2)?;
    let check = check(step, [q.clone(), cache.clone(), out.clone()]);
    let launch: Launch = Box::new(move |on, _| {
        let (segments, tiles, tile_count) = (&segments, &tiles, &count);
        let plan = kernel::Plan { segments, tiles, tile_count, first_tile: None, max_tiles };
        let (all, kv) = (Rows::exactly(rows), Tensor::new(&cache, Dtype::Bf16));
        let q = Strided::dense(&q, heads * head_dim);
        gqa::prompts(on, all, q, &GQA, LAYER, kv, &tables, &plan, &out)
    });
    Ok(Ready { work, sets: 1, launch, check })
}

/// Some rows of some sequences in f64.
fn check(step: &Step, [queries, cache, result]: [DeviceSlice; 3]) -> Check {
    let Gqa { heads, kv_heads, head_dim, scale, .. } = GQA;
    let (rows, group) = (step.rows(), heads / kv_heads);
    let context = step.segments[0].context as usize;
    let (sequences, len) = (step.segments.len(), rows / step.segments.len());
    let step = Step::new(sequences, len, context, WIDTH);
    Box::new(move |rig, launch| {
        rig.poison(&result)?;
        rig.run(launch, 0)?;
        for sequence in some(sequences, 2) {
            let cache = step.contents(rig, &cache, sequence)?;
            for (i, head) in some(len, 3)
                .into_iter()
                .flat_map(|i| some(heads, 3).into_iter().map(move |head| (i, head)))
            {
                let at = (sequence * len + i) * heads + head;
                let of = |from: &_| rig.bf16s(from, at * head_dim..(at + 1) * head_dim);
                let q: Vec<f64> = of(&queries)?.into_iter().map(f64::from).collect();
                let seen = context - len + i + 1;
                let part = |from: usize| {
                    cache.chunks_exact(WIDTH).take(seen).map(move |row| &row[from..from + head_dim])
                };
                let key = head / group * head_dim;
                let expected = attend(scale, &q, part(key), part(kv_heads * head_dim + key));
                let what = format!("sequence {sequence}, row {i}, head {head}");
                near(&what, &of(&result)?, &expected, 1e-2)?;
            }
        }
        Ok(())
    })
}
