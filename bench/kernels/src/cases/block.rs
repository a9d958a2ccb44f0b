//! The attention block of a DeepSeek-V2-Lite layer in a decoding step: from the norm in front to the
//! output projection, as an engine launches it. Where rows are few enough to be streamed past, the product
//! in front makes the norm, and the one behind adds to the residual.

use super::linear::nth;
use super::mla::{LAYER, MLA, Pieces, QUERY, WIDTH};
use super::step::Step;
use crate::case::{Case, Check, Launch, Ready, Work};
use crate::near::{Failure, near};
use crate::rig::{Rig, cold_sets};
use device::cuda::{CudaError, DeviceSlice};
use ops::act;
use ops::cuda::{Dtype, Queue, Rows, Strided, Tensor};
use ops::linear::cuda::{Linear, Normed, Then, Variant, linear, linear_as, streams};
use ops::mla::cuda::{self as mla, Core, block, near};
use ops::norm::Heads;
use ops::norm::cuda::{add_rms_norm, head_norm, rms_norm};
use ops::paged::cuda::{Destination, write_kv};
use ops::rope::Pairing;
use ops::rope::cuda::{Rope, rope};

const HIDDEN: usize = 2048;
const EPS: f32 = 1e-6;
/// Of the residual before the first launch: little, so that what is added to it can be seen.
const RESIDUAL: f64 = 0.02;
const CONTEXT: usize = 256;
/// Of a row of queries and latents.
const BOTH: usize = MLA.heads * QUERY + WIDTH;
const ROWS: [usize; 5] = [1, 4, 16, 64, 256];

pub(super) fn cases() -> Vec<Case> {
    let case = |rows: usize| {
        let name = format!("attention_block.v2_lite.bs{rows}.ctx{CONTEXT}");
        Case::new(name, move |rig| layer(rig, rows))
    };
    ROWS.into_iter().map(case).collect()
}

/// Weights of as many layers as there are sets, and activations.
struct Layers {
    rows: usize,
    /// Of queries and latents, side by side.
    projections: DeviceSlice,
    o_proj: DeviceSlice,
    absorbed: Vec<DeviceSlice>,
    kv_b: Vec<DeviceSlice>,
    norms: [DeviceSlice; 2],
    inv_freq: DeviceSlice,
    positions: DeviceSlice,
    row_tables: DeviceSlice,
    pieces: Pieces,
    scratch: mla::Scratch,
    /// What is added in front, and the result where it is not added to the residual.
    hidden: DeviceSlice,
    residual: DeviceSlice,
    normed: DeviceSlice,
    /// Queries, and latents behind them in the same rows.
    projected: [DeviceSlice; 2],
    out: DeviceSlice,
}

const fn tensor(slice: &DeviceSlice) -> Tensor<'_> {
    Tensor::new(slice, Dtype::Bf16)
}

impl Layers {
    fn new(rig: &mut Rig, rows: usize, sets: usize) -> Result<Self, Failure> {
        let step = Step::new(rows, 1, CONTEXT, WIDTH);
        let scale = |inputs: usize| 1.0 / (inputs as f64).sqrt();
        let up = MLA.heads * (MLA.nope + MLA.v) * MLA.latent;
        let kv_b = (0..sets).map(|_| rig.normal(up, scale(MLA.latent)));
        let kv_b = kv_b.collect::<Result<Vec<_>, _>>()?;
        let mut absorbed = Vec::new();
        for kv_b in &kv_b {
            let out = rig.space(mla::absorbed_len(&MLA) * 2)?;
            mla::absorb_weights(rig.queue(), &MLA, tensor(kv_b), &out)?;
            absorbed.push(out);
        }
        let inv_freq: Vec<f32> =
            (0..MLA.rope / 2).map(|i| 1e4_f32.powf(-2.0 * i as f32 / MLA.rope as f32)).collect();
        let both = rig.space(rows * BOTH * 2)?;
        let projected = [both.clone(), both.slice(MLA.heads * QUERY * 2..both.bytes())];
        Ok(Self {
            rows,
            projections: rig.normal(sets * HIDDEN * BOTH, scale(HIDDEN))?,
            o_proj: rig.normal(sets * MLA.heads * MLA.v * HIDDEN, scale(HIDDEN))?,
            absorbed,
            kv_b,
            norms: [rig.normal_f32(HIDDEN, 1.0)?, rig.normal_f32(MLA.latent, 1.0)?],
            inv_freq: rig.f32s(&inv_freq)?,
            positions: rig.u32s(&step.positions())?,
            row_tables: rig.u32s(&step.row_tables())?,
            pieces: Pieces::new(rig, &step, MLA.heads, sets)?,
            scratch: mla::Scratch::take(rig.arena(), &MLA, Dtype::Bf16, rows)?,
            hidden: rig.normal(rows * HIDDEN, 1.0)?,
            residual: rig.normal(rows * HIDDEN, RESIDUAL)?,
            normed: rig.space(rows * HIDDEN * 2)?,
            projected,
            out: rig.space(rows * MLA.heads * MLA.v * 2)?,
        })
    }

    /// Projections of a set: queries with latents, output.
    fn projections(&self, set: usize) -> [DeviceSlice; 2] {
        [
            nth(&self.projections, HIDDEN * BOTH * 2, set),
            nth(&self.o_proj, MLA.heads * MLA.v * HIDDEN * 2, set),
        ]
    }

    fn products<'a>(&'a self, [both, o]: &'a [DeviceSlice; 2]) -> [Linear<'a>; 2] {
        let wide = MLA.heads * MLA.v;
        let normed = tensor(&self.normed);
        [
            Linear::plain(normed, both, tensor(&self.projected[0]), HIDDEN, BOTH),
            Linear::plain(tensor(&self.out), o, tensor(&self.hidden), wide, HIDDEN),
        ]
    }

    /// The same with norm and sum, if kernels have them.
    fn folded<'a>(&'a self, [both, o]: [Linear<'a>; 2]) -> Option<[Linear<'a>; 2]> {
        let Self { residual, normed, norms: [weight, _], .. } = self;
        let norm = Some(Normed { weight, eps: EPS, out: normed });
        let both = Linear { x: tensor(residual), norm, ..both };
        let o = Linear { out: tensor(residual), then: Then::Add, ..o };
        let all = [both, o];
        all.iter().all(|product| streams(self.rows, product)).then_some(all)
    }

    /// Where the result lies.
    fn result(&self) -> &DeviceSlice {
        let weights = self.projections(0);
        let folds = self.folded(self.products(&weights)).is_some();
        if folds { &self.residual } else { &self.hidden }
    }

    fn norm(&self, on: Queue<'_>) -> Result<(), CudaError> {
        let Self { rows, hidden, residual, normed, norms: [weight, _], .. } = self;
        let rows = Rows::exactly(*rows);
        add_rms_norm(on, rows, HIDDEN, tensor(hidden), residual, weight, EPS, normed)
    }

    /// What lies between the projections, by launch and set.
    fn with_block<T>(&self, set: usize, work: impl FnOnce(&block::Block<'_>) -> T) -> T {
        let to = Destination {
            arena: tensor(&self.pieces.caches[set]),
            positions: &self.positions,
            row_tables: &self.row_tables,
            tables: &self.pieces.tables,
        };
        let (absorbed, kv_b) = (&self.absorbed[set], &self.kv_b[set]);
        let pairing = Pairing::Interleaved;
        work(&block::Block {
            q: Strided { slice: &self.projected[0], stride: BOTH },
            kv: Strided { slice: &self.projected[1], stride: BOTH },
            norm: &self.norms[1],
            eps: EPS,
            rope: Rope { inv_freq: &self.inv_freq, factor: 1.0, pairing },
            to,
            layer: LAYER,
            weights: mla::Weights { absorbed, kv_b },
            plan: &self.pieces.plan(set),
            partials: &self.pieces.partials,
            scratch: &self.scratch,
            out: &self.out,
        })
    }

    /// As an engine does it.
    fn run(&self, on: Queue<'_>, set: usize) -> Result<(), CudaError> {
        let rows = Rows::exactly(self.rows);
        let weights = self.projections(set);
        let plain = self.products(&weights);
        let folded = self.folded(plain);
        let [both, o] = folded.unwrap_or(plain);
        let product = |of: &Linear<'_>| match folded {
            Some(_) => linear_as(Variant::Stream, on, rows, of),
            None => linear(on, rows, of),
        };
        if folded.is_none() {
            self.norm(on)?;
        }
        product(&both)?;
        self.with_block(set, |block| match near::fits(std::iter::repeat_n(CONTEXT, self.rows)) {
            true => near::attention(on, rows, &MLA, block),
            false => block::attention(on, rows, &MLA, block),
        })?;
        product(&o)
    }

    /// Op by op, products without tensor cores.
    fn one_by_one(&self, on: Queue<'_>, set: usize) -> Result<(), CudaError> {
        let rows = Rows::exactly(self.rows);
        let weights = self.projections(set);
        let plain = self.products(&weights);
        let adds = self.folded(plain).is_some();
        let [both, o] = plain;
        if adds {
            let (residual, weight) = (tensor(&self.residual), &self.norms[0]);
            rms_norm(on, rows, HIDDEN, residual, weight, EPS, &self.normed)?;
        } else {
            self.norm(on)?;
        }
        linear_as(Variant::Any, on, rows, &both)?;
        let [of_q, latent, key] = block::heads(&MLA).map(|heads| Heads { row: BOTH, ..heads });
        let [queries, latents] = self.projected.each_ref().map(tensor);
        self.with_block(set, |block| {
            let block::Block { q, kv, to, .. } = *block;
            rope(on, rows, queries, &of_q, to.positions, &block.rope)?;
            head_norm(on, rows, latents, &latent, block.norm, EPS)?;
            rope(on, rows, latents, &key, to.positions, &block.rope)?;
            write_kv(on, rows, kv, LAYER, &to)?;
            let core = Core::Pieces(block.plan, block.partials);
            let (weights, scratch) = (&block.weights, &self.scratch);
            mla::attention(on, rows, q, weights, &MLA, LAYER, to.arena, core, scratch, &self.out)
        })?;
        linear_as(Variant::Any, on, rows, &o)?;
        if adds {
            act::cuda::add(on, rows, HIDDEN, tensor(&self.hidden), &self.residual)?;
        }
        Ok(())
    }
}

fn layer(rig: &mut Rig, rows: usize) -> Result<Ready, Failure> {
    let heads = MLA.heads;
    let projections = HIDDEN * (heads * QUERY + WIDTH + heads * MLA.v) * 2;
    let halves = heads * (MLA.nope + MLA.v) * MLA.latent * 2;
    let bytes = projections + halves + rows * CONTEXT * WIDTH * 2;
    let sets = cold_sets(bytes);
    let layers = std::rc::Rc::new(Layers::new(rig, rows, sets)?);
    let (of, before) = (layers.clone(), rig.space(2 * rows * HIDDEN * 2)?);
    let check: Check = Box::new(move |rig, launch| {
        let row = rows * HIDDEN * 2;
        let saved = [before.slice(0..row), before.slice(row..2 * row)];
        let mut results = Vec::new();
        for fused in [true, false] {
            let inputs = [&of.hidden, &of.residual].into_iter().zip(&saved);
            for (input, saved) in inputs {
                let (from, to) = if fused { (input, saved) } else { (saved, input) };
                rig.stream.copy(from, to)?;
            }
            match fused {
                true => rig.run(launch, 0)?,
                false => of.one_by_one(rig.queue(), 0)?,
            }
            results.push(rig.bf16s(of.result(), 0..rows * HIDDEN)?);
            rig.poison(&of.out)?;
        }
        let expected: Vec<f64> = results[1].iter().map(|x| f64::from(*x)).collect();
        // Sums in another order round stored numbers the other way now and then.
        near("the block", &results[0], &expected, 2e-2)
    });
    let launch: Launch = Box::new(move |on, i| layers.run(on, i));
    let flops = 2.0 * (rows * (projections + halves) / 2) as f64;
    Ok(Ready { work: Work::bytes(bytes).and_flops(flops), sets, launch, check })
}
