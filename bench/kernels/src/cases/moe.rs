//! Experts of DeepSeek-V2-Lite: the chosen ones alone, as an engine launches them for so many tokens,
//! with choices that are uniform over all experts.

use crate::case::{Case, Check, Launch, Ready, Work};
use crate::near::{Failure, near};
use crate::rig::{COLD, Random, Rig};
use device::cuda::DeviceSlice;
use ops::cuda::{Dtype, Rows, Tensor};
use ops::moe::cuda::{ExpertWeights, Routing, Scratch, experts, stream};

const HIDDEN: usize = 2048;
const INNER: usize = 1408;
const EXPERTS: usize = 64;
const TOP_K: usize = 6;
/// Elements of an expert.
const EXPERT: usize = 3 * INNER * HIDDEN;
/// Sets of choices.
const CHOICES: usize = 32;
const ROWS: [usize; 7] = [1, 4, 8, 16, 64, 128, 256];
const PROMPTS: [usize; 2] = [2048, 8192];

pub(super) fn cases() -> Vec<Case> {
    let case = |rows: usize| {
        let what = if rows > 256 { "rows" } else { "bs" };
        Case::new(format!("moe.v2_lite.{what}{rows}"), move |rig| layer(rig, rows))
    };
    ROWS.into_iter().chain(PROMPTS).map(case).collect()
}

/// Distinct experts for every token.
fn choose(random: &mut Random, rows: usize) -> Vec<u32> {
    let mut chosen = Vec::with_capacity(rows * TOP_K);
    for _ in 0..rows {
        let mut of: Vec<u32> = (0..EXPERTS as u32).collect();
        chosen.extend((0..TOP_K).map(|_| of.swap_remove(random.below(of.len()))));
    }
    chosen
}

fn layer(rig: &mut Rig, rows: usize) -> Result<Ready, Failure> {
    let mut random = Random::new(5);
    let choices: Vec<Vec<u32>> = (0..CHOICES).map(|_| choose(&mut random, rows)).collect();
    let touched = |chosen: &Vec<u32>| {
        let mut chosen = chosen.clone();
        chosen.sort_unstable();
        chosen.dedup();
        chosen.len()
    };
    let touched = choices.iter().map(touched).sum::<usize>() as f64 / CHOICES as f64;
    let bytes = touched * (EXPERT * 2) as f64 + (rows * HIDDEN * 4) as f64;
    // Layers in turn, so that what a launch reads was not read by the few in front.
    let layers = (COLD as f64 / bytes) as usize + 2;
    let all = EXPERTS * 2 * INNER * HIDDEN;
    let mut gate_up = Vec::new();
    let mut down = Vec::new();
    for _ in 0..layers {
        gate_up.push(rig.normal(all, 1.0 / (HIDDEN as f64).sqrt())?);
        down.push(rig.normal(all / 2, 1.0 / (INNER as f64).sqrt())?);
    }
    let chosen = choices.iter().map(|c| rig.u32s(c)).collect::<Result<Vec<_>, _>>()?;
    let factors = rig.normal_f32(rows * TOP_K, 1.0)?;
    let (x, out) = (rig.normal(rows * HIDDEN, 1.0)?, rig.space(rows * HIDDEN * 2)?);
    let shape = (rows, TOP_K, EXPERTS);
    let (arena, dtype) = (rig.arena(), Dtype::Bf16);
    let scratch = Scratch::take(arena, dtype, shape.0, shape.1, shape.2, HIDDEN, INNER)?;
    let of = Operands {
        x: x.clone(),
        gate_up: gate_up[0].clone(),
        down: down[0].clone(),
        chosen: choices[0].clone(),
        factors: factors.clone(),
        out: out.clone(),
    };
    let launch: Launch = Box::new(move |on, i| {
        let routing = Routing { chosen: &chosen[i % CHOICES], weights: &factors, top_k: TOP_K };
        let weights = ExpertWeights {
            first: 0,
            held: EXPERTS,
            gate_up: Tensor::new(&gate_up[i % layers], Dtype::Bf16),
            down: &down[i % layers],
            hidden: HIDDEN,
            intermediate: INNER,
        };
        let all = Rows::exactly(rows);
        if stream::takes(rows, &weights, TOP_K, None) {
            let sum = stream::Sum { out: &out, add: false };
            stream::experts(on, all, &x, &routing, None, &weights, None, &sum, &scratch)
        } else {
            experts(on, all, &x, &routing, &weights, &out, &scratch)
        }
    });
    let check: Check = Box::new(move |rig, launch| {
        rig.poison(&of.out)?;
        rig.run(launch, 0)?;
        of.check(rig, 0)?;
        of.check(rig, rows - 1)
    });
    let work = Work::bytes(bytes as usize).and_flops(2.0 * (rows * TOP_K * EXPERT) as f64);
    // Every pair of a layer and choices.
    Ok(Ready { work, sets: CHOICES * layers, launch, check })
}

struct Operands {
    x: DeviceSlice,
    gate_up: DeviceSlice,
    down: DeviceSlice,
    chosen: Vec<u32>,
    factors: DeviceSlice,
    out: DeviceSlice,
}

impl Operands {
    /// A token's sum in f64, what lies between the products rounded as it is stored.
    fn check(&self, rig: &Rig, row: usize) -> Result<(), Failure> {
        let x = rig.bf16s(&self.x, row * HIDDEN..(row + 1) * HIDDEN)?;
        let pairs = row * TOP_K..(row + 1) * TOP_K;
        let factors = rig.floats(&self.factors, pairs.clone(), Dtype::F32)?;
        let mut expected = vec![0.0; HIDDEN];
        for (expert, factor) in self.chosen[pairs].iter().zip(factors) {
            let expert = *expert as usize;
            let wide = 2 * INNER * HIDDEN;
            let gate_up = rig.bf16s(&self.gate_up, expert * wide..(expert + 1) * wide)?;
            let down = rig.bf16s(&self.down, expert * wide / 2..(expert + 1) * wide / 2)?;
            let inner: Vec<f64> = (0..INNER)
                .map(|i| {
                    let gate = dot(&x, &gate_up[i * HIDDEN..(i + 1) * HIDDEN]);
                    let up = dot(&x, &gate_up[(INNER + i) * HIDDEN..(INNER + i + 1) * HIDDEN]);
                    gate / (1.0 + (-gate).exp()) * up
                })
                .collect();
            for (sum, row) in expected.iter_mut().zip(down.chunks_exact(INNER)) {
                let y: f64 = inner.iter().zip(row).map(|(a, b)| a * f64::from(*b)).sum();
                *sum += f64::from(factor) * y;
            }
        }
        let got = rig.bf16s(&self.out, row * HIDDEN..(row + 1) * HIDDEN)?;
        near(&format!("token {row}"), &got, &expected, 1.6e-2)
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
