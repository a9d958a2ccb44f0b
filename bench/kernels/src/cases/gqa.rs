//! Grouped-query attention of Qwen3-8B: decoding rows, and one long prompt.

use super::step::{Step, attend};
use crate::case::{Case, Check, Launch, Ready, Work};
use crate::near::{Failure, near, some};
use crate::rig::{Rig, cold_sets};
use ops::cuda::{Dtype, Rows, Tensor};
use ops::flash::cuda::{Partials, Plan, max_tiles, splits, tiles};
use ops::gqa::{Gqa, cuda as gqa};
use ops::paged::KvLayer;

const GQA: Gqa = Gqa { heads: 32, kv_heads: 8, head_dim: 128, scale: 0.088, window: None };
/// Elements of a cache row.
const WIDTH: usize = 2 * GQA.kv_heads * GQA.head_dim;
const LAYER: KvLayer = KvLayer { offset: 0, row: WIDTH };

/// Batch and context.
const DECODES: [(usize, usize); 8] =
    [(1, 256), (1, 4096), (1, 32_768), (4, 4096), (16, 4096), (16, 32_768), (64, 4096), (256, 256)];
const PROMPTS: [usize; 2] = [4096, 16_384];

pub(super) fn cases() -> Vec<Case> {
    let decodes = DECODES.into_iter().map(|(rows, context)| {
        let name = format!("gqa_decode.h32kv8.bs{rows}.ctx{context}");
        Case::new(name, move |rig| {
            let bytes = rows * context * WIDTH * 2;
            let sets = cold_sets(bytes);
            attention(rig, &Step::new(rows, 1, context, WIDTH), sets, Work::bytes(bytes))
        })
    });
    let prompts = PROMPTS.into_iter().map(|len| {
        Case::new(format!("gqa_prefill.h32kv8.len{len}"), move |rig| {
            let seen = len as f64 * (len + 1) as f64 / 2.0;
            let flops = 4.0 * (GQA.heads * GQA.head_dim) as f64 * seen;
            attention(rig, &Step::new(1, len, len, WIDTH), 1, Work::default().and_flops(flops))
        })
    });
    decodes.chain(prompts).collect()
}

fn attention(rig: &mut Rig, step: &Step, sets: usize, work: Work) -> Result<Ready, Failure> {
    let Gqa { heads, kv_heads, head_dim, scale, .. } = GQA;
    let rows = step.rows();
    let prompts = rows > step.segments.len();
    let group = heads / kv_heads;
    let (variant, lines) = gqa::select(&GQA, LAYER, Dtype::Bf16, prompts);
    let mut list = Vec::new();
    tiles(&step.segments, group, lines, &mut list);
    let most = max_tiles(rows, step.segments.len(), group, lines);
    let count = rig.u32s(&[list.len() as u32])?;
    let mut words: Vec<u32> = list.iter().flat_map(|tile| [tile.segment, tile.line]).collect();
    words.resize(2 * most, 0);
    let list = rig.u32s(&words)?;
    let segments = step.send_segments(rig)?;
    let tables = rig.u64s(&step.tables)?;
    let context = step.segments[0].context as usize;
    let of_step = if prompts { most } else { rows * group.div_ceil(lines) };
    let splits = splits(rig.multiprocessors(), of_step, kv_heads, context);
    let partial = if splits > 1 { rows * heads * splits } else { 0 };
    let partials = Partials::take(rig.arena(), partial, head_dim)?;
    let caches = (0..sets).map(|_| rig.normal(step.elements(), 1.0));
    let caches = caches.collect::<Result<Vec<_>, _>>()?;
    let q = rig.normal(rows * heads * head_dim, 1.0)?;
    let out = rig.space(rows * heads * head_dim * 2)?;
    let (queries, cache, result) = (q.clone(), caches[0].clone(), out.clone());
    let launch: Launch = Box::new(move |on, i| {
        let plan = Plan {
            segments: &segments,
            tiles: &list,
            tile_count: &count,
            max_tiles: most,
            tables: &tables,
            splits,
            variant,
        };
        let kv = Tensor::new(&caches[i], Dtype::Bf16);
        gqa::attention(on, Rows::exactly(rows), &q, &GQA, LAYER, kv, &plan, &partials, &out)
    });
    let (sequences, len) = (step.segments.len(), rows / step.segments.len());
    let step = Step::new(sequences, len, context, WIDTH);
    let check: Check = Box::new(move |rig, launch| {
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
    });
    Ok(Ready { work, sets, launch, check })
}
