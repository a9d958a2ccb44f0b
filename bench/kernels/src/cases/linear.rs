//! Dense products: dependent chains of few rows, and single shapes of models at many.

use crate::case::{Case, Check, Launch, Ready, Work};
use crate::near::{Failure, near, some};
use crate::rig::{Rig, cold_sets};
use device::cuda::DeviceSlice;
use ops::cuda::{Dtype, Rows, Tensor};
use ops::linear::cuda::{Linear, linear};

/// Name, width, megabytes of its weights: both of what the name says within 3 %.
const CHAINS: [(&str, usize); 2] = [("100mb", 7168), ("30mb", 3840)];
const CHAINED_ROWS: [usize; 4] = [1, 2, 4, 8];

/// Name, inputs, outputs, type of results, rows.
type Shape = (&'static str, usize, usize, Dtype, &'static [usize]);
const SHAPES: [Shape; 12] = [
    // Of an engine's product of queries with latents, or keys and values, and its parts.
    ("v2_lite_q_kv", 2048, 3648, Dtype::Bf16, &[1, 16, 64, 256, 2048, 8192]),
    ("v2_lite_q", 2048, 3072, Dtype::Bf16, &[1, 16, 64, 256, 2048, 8192]),
    ("v2_lite_kv", 2048, 576, Dtype::Bf16, &[64, 256, 2048, 8192]),
    ("qwen3_8b_o", 4096, 4096, Dtype::Bf16, &[16, 64, 256, 2048, 8192]),
    ("qwen3_8b_kv", 4096, 2048, Dtype::Bf16, &[64, 256, 2048, 8192]),
    ("v2_lite_o", 2048, 2048, Dtype::Bf16, &[1, 16, 64, 256, 2048]),
    ("v2_lite_shared_up", 2048, 5632, Dtype::Bf16, &[16, 64, 256, 2048]),
    ("v2_lite_router", 2048, 64, Dtype::F32, &[1, 16, 64, 256, 2048]),
    ("v2_lite_head", 2048, 102_400, Dtype::F32, &[1, 16, 64, 256]),
    ("qwen3_8b_qkv", 4096, 6144, Dtype::Bf16, &[1, 16, 64, 256, 2048, 8192]),
    ("qwen3_8b_gate_up", 4096, 24_576, Dtype::Bf16, &[1, 16, 64, 256, 2048]),
    ("qwen3_8b_down", 12_288, 4096, Dtype::Bf16, &[1, 16, 64, 256, 2048]),
];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, width) in CHAINS {
        for rows in CHAINED_ROWS {
            cases.push(Case::new(format!("linear.chain.{name}.bs{rows}"), move |rig| {
                chain(rig, rows, width)
            }));
        }
    }
    for (name, inputs, outputs, to, all) in SHAPES {
        for &rows in all {
            cases.push(Case::new(format!("linear.{name}.rows{rows}"), move |rig| {
                single(rig, rows, (inputs, outputs), to)
            }));
        }
    }
    cases
}

/// The matrix of a set.
pub(super) fn nth(all: &DeviceSlice, bytes: usize, i: usize) -> DeviceSlice {
    all.slice(i * bytes..(i + 1) * bytes)
}

/// Some elements of `out` are products of rows of `x` and `w`, `[outputs, inputs]`.
pub(super) fn check_product(
    rig: &Rig,
    rows: usize,
    (inputs, outputs): (usize, usize),
    x: &DeviceSlice,
    w: &DeviceSlice,
    (out, to): (&DeviceSlice, Dtype),
) -> Result<(), Failure> {
    let some_outputs = some(outputs, 24);
    let weights = some_outputs.iter().map(|o| rig.bf16s(w, o * inputs..(o + 1) * inputs));
    let weights = weights.collect::<Result<Vec<_>, _>>()?;
    for row in some(rows, 4) {
        let x = rig.bf16s(x, row * inputs..(row + 1) * inputs)?;
        let all = rig.floats(out, row * outputs..(row + 1) * outputs, to)?;
        let got: Vec<f32> = some_outputs.iter().map(|o| all[*o]).collect();
        let dot = |w: &Vec<f32>| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
        let expected: Vec<f64> = weights.iter().map(dot).collect();
        let tolerance = if to == Dtype::F32 { 1e-4 } else { 4e-3 };
        near(&format!("row {row}"), &got, &expected, tolerance)?;
        if all.iter().any(|x| !x.is_finite()) {
            near("what must be written", &[f32::NAN], &[0.0], 0.0)?;
        }
    }
    Ok(())
}

fn single(
    rig: &mut Rig,
    rows: usize,
    (inputs, outputs): (usize, usize),
    to: Dtype,
) -> Result<Ready, Failure> {
    let bytes = inputs * outputs * 2;
    let sets = cold_sets(bytes);
    let weights = rig.normal(sets * inputs * outputs, 1.0 / (inputs as f64).sqrt())?;
    let x = rig.normal(rows * inputs, 1.0)?;
    let out = rig.space(rows * outputs * to.size())?;
    let work = Work::bytes(bytes + rows * (inputs * 2 + outputs * to.size()));
    let (w, of, result) = (nth(&weights, bytes, 0), x.clone(), out.clone());
    let launch: Launch = Box::new(move |on, i| {
        let w = nth(&weights, bytes, i);
        let (x, out) = (Tensor::new(&x, Dtype::Bf16), Tensor::new(&out, to));
        linear(on, Rows::exactly(rows), &Linear::plain(x, &w, out, inputs, outputs))
    });
    let check: Check = Box::new(move |rig, launch| {
        rig.poison(&result)?;
        rig.run(launch, 0)?;
        check_product(rig, rows, (inputs, outputs), &of, &w, (&result, to))
    });
    let flops = 2.0 * (rows * inputs * outputs) as f64;
    Ok(Ready { work: work.and_flops(flops), sets, launch, check })
}

/// Products each of which reads what the one before wrote.
fn chain(rig: &mut Rig, rows: usize, width: usize) -> Result<Ready, Failure> {
    let bytes = width * width * 2;
    // An even number, so that the last writes what the first reads.
    let sets = cold_sets(bytes).next_multiple_of(2);
    let weights = rig.normal(sets * width * width, 1.0 / (width as f64).sqrt())?;
    let rows_of = rows * width;
    let both = [rig.normal(rows_of, 1.0)?, rig.normal(rows_of, 1.0)?];
    let (w, [x, out]) = (nth(&weights, bytes, 0), both.clone());
    let launch: Launch = Box::new(move |on, i| {
        let w = nth(&weights, bytes, i);
        let [x, out] = [i, i + 1].map(|i| Tensor::new(&both[i % 2], Dtype::Bf16));
        linear(on, Rows::exactly(rows), &Linear::plain(x, &w, out, width, width))
    });
    let check: Check = Box::new(move |rig, launch| {
        rig.poison(&out)?;
        rig.run(launch, 0)?;
        check_product(rig, rows, (width, width), &x, &w, (&out, Dtype::Bf16))
    });
    Ok(Ready { work: Work::bytes(bytes), sets, launch, check })
}
