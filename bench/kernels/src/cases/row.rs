//! Ops that treat rows one by one: embedding, norms, rotation, activation, the choice of experts. Their
//! operands stay in the cache, as activations do between two launches, except the embedding's table.

use crate::case::{Case, Check, Launch, Ready, Work};
use crate::near::{Failure, equal, near, some};
use crate::rig::{Random, Rig, cold_sets};
use device::ThreadPool;
use ops::cuda::{Dtype, Rows, Tensor};
use ops::moe::{self, Router, Scoring};
use ops::norm::Heads;
use ops::norm::cuda::{add_rms_norm, head_norm, rms_norm};
use ops::rope::{self, Pairing};
use ops::{act, embed};

const BF16: Dtype = Dtype::Bf16;
const HIDDEN: usize = 2048;
const EPS: f32 = 1e-6;
const ROWS: [usize; 4] = [1, 64, 256, 2048];

pub(super) fn cases() -> Vec<Case> {
    type Setup = fn(&mut Rig, usize) -> Result<Ready, Failure>;
    let ops: [(&str, Setup); 7] = [
        ("embed.w2048", embedding),
        ("rms_norm.w2048", |rig, rows| norm(rig, rows, false)),
        ("add_rms_norm.w2048", |rig, rows| norm(rig, rows, true)),
        ("head_norm.h32.w128", heads_normed),
        ("rope.h32.w128", rotated),
        ("silu_mul.w10944", activated),
        ("route.e64.k6", chosen),
    ];
    let all = ops.into_iter().flat_map(|(name, setup)| {
        ROWS.into_iter()
            .map(move |rows| Case::new(format!("{name}.rows{rows}"), move |rig| setup(rig, rows)))
    });
    all.collect()
}

/// Rows drawn from a vocabulary of 102,400.
fn embedding(rig: &mut Rig, rows: usize) -> Result<Ready, Failure> {
    const VOCAB: usize = 102_400;
    let table = rig.normal(VOCAB * HIDDEN, 1.0)?;
    let mut random = Random::new(6);
    let sets = cold_sets(rows * HIDDEN * 2).min(64);
    let draw = (0..sets).map(|_| (0..rows).map(|_| random.below(VOCAB) as u32).collect());
    let tokens: Vec<Vec<u32>> = draw.collect();
    let ids = tokens.iter().map(|ids| rig.u32s(ids)).collect::<Result<Vec<_>, _>>()?;
    let out = rig.space(rows * HIDDEN * 2)?;
    let (from, result) = (table.clone(), out.clone());
    let launch: Launch = Box::new(move |on, i| {
        let operands = embed::cuda::Embed {
            ids: &ids[i],
            table: Tensor::new(&table, BF16),
            table_rows: VOCAB,
            first_row: 0,
            width: HIDDEN,
            out: &out,
        };
        embed::cuda::embed(on, Rows::exactly(rows), &operands)
    });
    let check: Check = Box::new(move |rig, launch| {
        rig.poison(&result)?;
        rig.run(launch, 0)?;
        for row in some(rows, 8) {
            let token = tokens[0][row] as usize;
            let expected = rig.bf16s(&from, token * HIDDEN..(token + 1) * HIDDEN)?;
            let got = rig.bf16s(&result, row * HIDDEN..(row + 1) * HIDDEN)?;
            equal(&format!("row {row}"), &got, &expected)?;
        }
        Ok(())
    });
    Ok(Ready { work: Work::cached(2 * rows * HIDDEN * 2), sets, launch, check })
}

fn normed(x: &[f32], weight: &[f32]) -> Vec<f64> {
    let square: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
    let scale = 1.0 / (square / x.len() as f64 + f64::from(EPS)).sqrt();
    x.iter().zip(weight).map(|(x, w)| f64::from(*x) * scale * f64::from(*w)).collect()
}

fn norm(rig: &mut Rig, rows: usize, adds: bool) -> Result<Ready, Failure> {
    let x = rig.normal(rows * HIDDEN, 1.0)?;
    let residual = rig.normal(rows * HIDDEN, 1.0)?;
    let weight = rig.normal_f32(HIDDEN, 1.0)?;
    let out = rig.space(rows * HIDDEN * 2)?;
    let [from, sum, by, result] = [&x, &residual, &weight, &out].map(Clone::clone);
    let launch: Launch = Box::new(move |on, _| {
        let (x, all) = (Tensor::new(&x, BF16), Rows::exactly(rows));
        match adds {
            true => add_rms_norm(on, all, HIDDEN, x, &residual, &weight, EPS, &out),
            false => rms_norm(on, all, HIDDEN, x, &weight, EPS, &out),
        }
    });
    let check: Check = Box::new(move |rig, launch| {
        let before = rig.bf16s(&sum, 0..rows * HIDDEN)?;
        rig.poison(&result)?;
        rig.run(launch, 0)?;
        let weight = rig.floats(&by, 0..HIDDEN, Dtype::F32)?;
        for row in some(rows, 8) {
            let of = row * HIDDEN..(row + 1) * HIDDEN;
            let mut x = rig.bf16s(&from, of.clone())?;
            if adds {
                let sums: Vec<f64> =
                    x.iter().zip(&before[of.clone()]).map(|(a, b)| f64::from(a + b)).collect();
                // The norm is of the sum as it is stored.
                x = rig.bf16s(&sum, of.clone())?;
                near(&format!("sum {row}"), &x, &sums, 4e-3)?;
            }
            let got = rig.bf16s(&result, of)?;
            near(&format!("row {row}"), &got, &normed(&x, &weight), 4e-3)?;
        }
        Ok(())
    });
    let bytes = rows * HIDDEN * 2 * if adds { 4 } else { 2 };
    Ok(Ready { work: Work::cached(bytes), sets: 1, launch, check })
}

/// Query heads of Qwen3 in rows of merged projections.
const HEADS: Heads = Heads { row: 6144, count: 32, offset: 0, width: 128, stride: 128 };

fn heads_normed(rig: &mut Rig, rows: usize) -> Result<Ready, Failure> {
    let x = rig.normal(rows * HEADS.row, 1.0)?;
    let weight = rig.normal_f32(HEADS.width, 1.0)?;
    let (inside, by) = (x.clone(), weight.clone());
    let launch: Launch = Box::new(move |on, _| {
        head_norm(on, Rows::exactly(rows), Tensor::new(&x, BF16), &HEADS, &weight, EPS)
    });
    let check: Check = Box::new(move |rig, launch| {
        let before = rig.bf16s(&inside, 0..rows * HEADS.row)?;
        rig.run(launch, 0)?;
        let weight = rig.floats(&by, 0..HEADS.width, Dtype::F32)?;
        for row in some(rows, 4) {
            let got = rig.bf16s(&inside, row * HEADS.row..(row + 1) * HEADS.row)?;
            let before = &before[row * HEADS.row..(row + 1) * HEADS.row];
            for head in some(HEADS.count, 4) {
                let at = head * HEADS.stride..head * HEADS.stride + HEADS.width;
                let expected = normed(&before[at.clone()], &weight);
                near(&format!("row {row}, head {head}"), &got[at], &expected, 4e-3)?;
            }
            let rest = HEADS.count * HEADS.stride;
            equal(&format!("the rest of row {row}"), &got[rest..], &before[rest..])?;
        }
        Ok(())
    });
    let bytes = rows * HEADS.count * HEADS.width * 4;
    Ok(Ready { work: Work::cached(bytes), sets: 1, launch, check })
}

fn rotated(rig: &mut Rig, rows: usize) -> Result<Ready, Failure> {
    let frequency = |i: usize| 1e6_f32.powf(-2.0 * i as f32 / HEADS.width as f32);
    let frequencies: Vec<f32> = (0..HEADS.width / 2).map(frequency).collect();
    let positions: Vec<u32> = (0..rows as u32).map(|row| row * 37 % 4096).collect();
    let x = rig.normal(rows * HEADS.row, 1.0)?;
    let (inv_freq, at) = (rig.f32s(&frequencies)?, rig.u32s(&positions)?);
    let inside = x.clone();
    let launch: Launch = Box::new(move |on, _| {
        let rope = rope::cuda::Rope { inv_freq: &inv_freq, factor: 1.0, pairing: Pairing::Halves };
        rope::cuda::rope(on, Rows::exactly(rows), Tensor::new(&x, BF16), &HEADS, &at, &rope)
    });
    let check: Check = Box::new(move |rig, launch| {
        let mut expected = rig.bf16s(&inside, 0..rows * HEADS.row)?;
        rig.run(launch, 0)?;
        let rope = rope::Rope { inv_freq: &frequencies, factor: 1.0, pairing: Pairing::Halves };
        rope::rope(&ThreadPool::new(1), &mut expected, &HEADS, &positions, &rope);
        for row in some(rows, 8) {
            let of = row * HEADS.row..(row + 1) * HEADS.row;
            let got = rig.bf16s(&inside, of.clone())?;
            let expected: Vec<f64> = expected[of].iter().map(|x| f64::from(*x)).collect();
            near(&format!("row {row}"), &got, &expected, 4e-3)?;
        }
        Ok(())
    });
    let bytes = rows * HEADS.count * HEADS.width * 4;
    Ok(Ready { work: Work::cached(bytes), sets: 1, launch, check })
}

fn activated(rig: &mut Rig, rows: usize) -> Result<Ready, Failure> {
    const WIDTH: usize = 10_944;
    let x = rig.normal(rows * 2 * WIDTH, 2.0)?;
    let out = rig.space(rows * WIDTH * 2)?;
    let (from, result) = (x.clone(), out.clone());
    let launch: Launch = Box::new(move |on, _| {
        act::cuda::silu_mul(on, Rows::exactly(rows), WIDTH, Tensor::new(&x, BF16), &out)
    });
    let check: Check = Box::new(move |rig, launch| {
        rig.poison(&result)?;
        rig.run(launch, 0)?;
        for row in some(rows, 4) {
            let x = rig.bf16s(&from, row * 2 * WIDTH..(row + 1) * 2 * WIDTH)?;
            let (gate, up) = x.split_at(WIDTH);
            let value = |(gate, up): (&f32, &f32)| {
                let gate = f64::from(*gate);
                gate / (1.0 + (-gate).exp()) * f64::from(*up)
            };
            let expected: Vec<f64> = gate.iter().zip(up).map(value).collect();
            let got = rig.bf16s(&result, row * WIDTH..(row + 1) * WIDTH)?;
            near(&format!("row {row}"), &got, &expected, 4e-3)?;
        }
        Ok(())
    });
    Ok(Ready { work: Work::cached(rows * WIDTH * 6), sets: 1, launch, check })
}

fn chosen(rig: &mut Rig, rows: usize) -> Result<Ready, Failure> {
    const EXPERTS: usize = 64;
    const TOP_K: usize = 6;
    const ROUTER: Router<'static> = Router {
        experts: EXPERTS,
        top_k: TOP_K,
        scoring: Scoring::Softmax,
        limit: None,
        correction: None,
        norm_topk: false,
        scale: 1.0,
    };
    let logits = rig.normal_f32(rows * EXPERTS, 1.0)?;
    let (chosen, weights) = (rig.space(rows * TOP_K * 4)?, rig.space(rows * TOP_K * 4)?);
    let [from, which, factors] = [&logits, &chosen, &weights].map(Clone::clone);
    let launch: Launch = Box::new(move |on, _| {
        let logits = Tensor::new(&logits, Dtype::F32);
        let scores = moe::cuda::Scores { logits, router: &ROUTER, correction: None };
        let routing = moe::cuda::Routing { chosen: &chosen, weights: &weights, top_k: TOP_K };
        moe::cuda::route(on, Rows::exactly(rows), &scores, &routing)
    });
    let check: Check = Box::new(move |rig, launch| {
        rig.poison(&which)?;
        rig.poison(&factors)?;
        rig.run(launch, 0)?;
        let logits = rig.floats(&from, 0..rows * EXPERTS, Dtype::F32)?;
        let (mut experts, mut weights) = (vec![0; rows * TOP_K], vec![0.0; rows * TOP_K]);
        moe::route(&ThreadPool::new(1), &logits, &ROUTER, &mut experts, &mut weights);
        equal("experts", &rig.words(&which)?, &experts)?;
        let expected: Vec<f64> = weights.iter().map(|x| f64::from(*x)).collect();
        near("weights", &rig.floats(&factors, 0..rows * TOP_K, Dtype::F32)?, &expected, 1e-5)
    });
    Ok(Ready { work: Work::cached(rows * (EXPERTS + 2 * TOP_K) * 4), sets: 1, launch, check })
}
