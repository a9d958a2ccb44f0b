//! What Qwen3-8B has between the projections of queries, keys and values and a prompt's attention.

use super::step::Step;
use crate::case::{Case, Check, Launch, Ready, Work};
use crate::near::{Failure, near, near_of, some};
use crate::rig::Rig;
use ops::cuda::{Dtype, Rows, Strided, Tensor};
use ops::gqa::Gqa;
use ops::gqa::cuda::decode::{HeadNorm, Projected};
use ops::gqa::cuda::prepare::prepare;
use ops::paged::cuda::Destination;
use ops::paged::{BLOCK, KvLayer};
use ops::rope::{Pairing, cuda::Rope};

const GQA: Gqa = Gqa { heads: 32, kv_heads: 8, head_dim: 128, scale: 0.088, window: None };
const WIDTH: usize = GQA.heads * GQA.head_dim;
const LAYER: KvLayer = KvLayer { offset: 0, row: 2 * GQA.kv_heads * GQA.head_dim };
/// Of a row of queries, keys and values.
const ALL: usize = WIDTH + LAYER.row;
const EPS: f32 = 1e-6;
const ROWS: [usize; 3] = [256, 2048, 16_384];

pub(super) fn cases() -> Vec<Case> {
    let case = |rows: usize| {
        Case::new(format!("gqa_prepare.h32kv8.rows{rows}"), move |rig| prepared(rig, rows))
    };
    ROWS.into_iter().map(case).collect()
}

/// Of the summands of a rotation: both are rounded to bf16 behind the norm and their sum once more, each by
/// 2^-8 at most; what is left is for f32.
const ROUNDINGS: f64 = 2.0 * 1.05 / 256.0;

/// A head normed and rotated, in f64, and the size of the two summands of each element.
fn expected(x: &[f32], weight: &[f32], inv_freq: &[f32], position: usize) -> [Vec<f64>; 2] {
    let square: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
    let scale = 1.0 / (square / x.len() as f64 + f64::from(EPS)).sqrt();
    let normed = x.iter().zip(weight).map(|(x, w)| f64::from(*x) * scale * f64::from(*w));
    let normed: Vec<f64> = normed.collect();
    let (first, second) = normed.split_at(x.len() / 2);
    let turn = |sign: f64, a: &[f64], b: &[f64]| -> Vec<[f64; 2]> {
        let pairs = a.iter().zip(b).zip(inv_freq);
        let angle = |frequency: &f32| f64::from(position as f32 * frequency);
        pairs.map(|((a, b), f)| [a * angle(f).cos(), sign * b * angle(f).sin()]).collect()
    };
    let summands = [turn(-1.0, first, second), turn(1.0, second, first)].concat();
    let sum = |size: fn(f64) -> f64| summands.iter().map(|[a, b]| size(*a) + size(*b)).collect();
    [sum(|x| x), sum(f64::abs)]
}

fn prepared(rig: &mut Rig, rows: usize) -> Result<Ready, Failure> {
    let Gqa { heads, kv_heads, head_dim, .. } = GQA;
    let step = Step::new(1, rows, rows, LAYER.row);
    let frequency = |i: usize| 1e6_f32.powf(-2.0 * i as f32 / head_dim as f32);
    let frequencies: Vec<f32> = (0..head_dim / 2).map(frequency).collect();
    let x = rig.normal(rows * ALL, 1.0)?;
    let cache = rig.space(step.elements() * 2)?;
    let weights = [rig.normal_f32(head_dim, 1.0)?, rig.normal_f32(head_dim, 1.0)?];
    let inv_freq = rig.f32s(&frequencies)?;
    let (positions, row_tables) = (rig.u32s(&step.positions())?, rig.u32s(&step.row_tables())?);
    let tables = rig.u64s(&step.tables)?;
    let (of, by, arena) = (x.clone(), weights.clone(), cache.clone());
    let launch: Launch = Box::new(move |on, _| {
        let keys = x.slice(WIDTH * 2..x.bytes());
        let of = Projected {
            q: Strided { slice: &x, stride: ALL },
            kv: Strided { slice: &keys, stride: ALL },
            norms: Some(weights.each_ref().map(|weight| HeadNorm { weight, eps: EPS })),
            rope: Rope { inv_freq: &inv_freq, factor: 1.0, pairing: Pairing::Halves },
            to: Destination {
                arena: Tensor::new(&cache, Dtype::Bf16),
                positions: &positions,
                row_tables: &row_tables,
                tables: &tables,
            },
            layer: LAYER,
        };
        prepare(on, Rows::exactly(rows), &GQA, &of)
    });
    let check: Check = Box::new(move |rig, launch| {
        rig.poison(&arena)?;
        let rows_before = some(rows, 6)
            .into_iter()
            .map(|row| rig.bf16s(&of, row * ALL..(row + 1) * ALL).map(|before| (row, before)));
        let rows_before = rows_before.collect::<Result<Vec<_>, _>>()?;
        rig.run(launch, 0)?;
        let weight = |i: usize| rig.floats(&by[i], 0..head_dim, Dtype::F32);
        let weights = [weight(0)?, weight(1)?];
        for (row, before) in rows_before {
            let at = step.tables[row / BLOCK] as usize + row % BLOCK * LAYER.row;
            let queries = rig.bf16s(&of, row * ALL..row * ALL + WIDTH)?;
            let stored = rig.bf16s(&arena, at..at + LAYER.row)?;
            let (q, kv) = before.split_at(WIDTH);
            let parts = [(q, &queries, heads, &weights[0]), (kv, &stored, kv_heads, &weights[1])];
            for (x, got, count, weight) in parts {
                for head in some(count, 4) {
                    let at = head * head_dim..(head + 1) * head_dim;
                    let [expected, sizes] = expected(&x[at.clone()], weight, &frequencies, row);
                    let what = format!("row {row}, head {head}");
                    near_of(&what, &got[at], &expected, &sizes, ROUNDINGS)?;
                }
            }
            let values = kv_heads * head_dim;
            let same: Vec<f64> = kv[values..].iter().map(|x| f64::from(*x)).collect();
            near(&format!("values of row {row}"), &stored[values..], &same, 0.0)?;
        }
        Ok(())
    });
    Ok(Ready { work: Work::copied(2 * rows * ALL * 2), sets: 1, launch, check })
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    /// What the op does: the norm rounded, its halves turned, those rounded.
    fn rounded(x: &[f32], weight: &[f32], inv_freq: &[f32], position: usize) -> Vec<f32> {
        let narrow = |x: f32| bf16::from_f32(x).to_f32();
        let square: f32 = x.iter().map(|x| x * x).sum();
        let scale = 1.0 / (square / x.len() as f32 + EPS).sqrt();
        let x: Vec<f32> = x.iter().zip(weight).map(|(x, w)| narrow(x * scale * w)).collect();
        let (a, b) = x.split_at(x.len() / 2);
        let angles: Vec<(f32, f32)> =
            inv_freq.iter().map(|f| (position as f32 * f).sin_cos()).collect();
        let turn = |a: &[f32], b: &[f32], sign: f32| -> Vec<f32> {
            let pairs = a.iter().zip(b).zip(&angles);
            pairs.map(|((a, b), (sin, cos))| narrow(a * cos + sign * b * sin)).collect()
        };
        [turn(a, b, -1.0), turn(b, a, 1.0)].concat()
    }

    #[test]
    fn roundings_of_the_op_are_within_and_a_wrong_angle_is_not() {
        let inv_freq: Vec<f32> = (0..64).map(|i| 1e6_f32.powf(-2.0 * i as f32 / 128.0)).collect();
        let mut state = 1_u64;
        let mut random = || {
            // A sum of twelve is close to normal.
            let next = |state: &mut u64| {
                *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (*state >> 40) as f32 / 16_777_216.0
            };
            (0..12).map(|_| next(&mut state)).sum::<f32>() - 6.0
        };
        for position in [0, 1, 2047, 16_383].into_iter().cycle().take(400) {
            let x: Vec<f32> = (0..128).map(|_| bf16::from_f32(random()).to_f32()).collect();
            let weight: Vec<f32> = (0..128).map(|_| random()).collect();
            let [value, sizes] = expected(&x, &weight, &inv_freq, position);
            let got = rounded(&x, &weight, &inv_freq, position);
            near_of("as the op", &got, &value, &sizes, ROUNDINGS).expect("within");
            let wrong = rounded(&x, &weight, &inv_freq, position + 1);
            assert!(near_of("one further", &wrong, &value, &sizes, ROUNDINGS).is_err());
        }
    }
}
