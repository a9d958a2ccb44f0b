//! Every tile against f64 at odd sizes, and that rows keep to themselves.

use super::*;
use crate::cuda::Tensor;
use crate::cuda::testing::{Device, assert_near, device, rounded, rounding};
use crate::linear::cuda::{Variant, linear_as};
use crate::linear::reference;
use crate::testing::Random;
use crate::{Matrix, WeightSlice};

/// Rows within wider ones, as slices of merged projections lie.
struct Case {
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Vec<f32>,
    rows: usize,
    inputs: usize,
    outputs: usize,
}

const X_GAP: usize = 24;
const OUT_GAP: usize = 8;

impl Case {
    fn new(rows: usize, inputs: usize, outputs: usize) -> Self {
        let mut random = Random::new((rows * 31 + inputs * 7 + outputs) as u64);
        Self {
            x: rounded(&random.vector(rows * (inputs + X_GAP)), Dtype::Bf16),
            w: rounded(&random.vector(outputs * inputs), Dtype::Bf16),
            bias: random.vector(outputs),
            rows,
            inputs,
            outputs,
        }
    }

    /// All of the output, with its gaps.
    fn run(&self, device: &Device, tile: Tile, output: Dtype, real: usize) -> Vec<f32> {
        let Self { rows, inputs, outputs, .. } = *self;
        let x = device.send_as(&self.x, Dtype::Bf16);
        let w = device.send_as(&self.w, Dtype::Bf16);
        let bias = device.send(&self.bias);
        let count = device.send(&[real as u32]);
        let out = device.poisoned(rows * (outputs + OUT_GAP) * output.size());
        let operands = Linear {
            bias: Some(&bias),
            x_stride: inputs + X_GAP,
            out_stride: outputs + OUT_GAP,
            ..Linear::plain(
                Tensor::new(&x, Dtype::Bf16),
                &w,
                Tensor::new(&out, output),
                inputs,
                outputs,
            )
        };
        let rows = Rows { padded: rows, count: Some(&count) };
        linear_as(Variant::Wide(tile), device.queue(), rows, &operands).expect("a launch");
        device.fetch_as(&out, output)
    }

    fn expected(&self, real: usize) -> Vec<f64> {
        let Self { inputs, outputs, .. } = *self;
        let w = Matrix::new(WeightSlice::F32(&self.w), outputs, inputs);
        let mut expected = vec![f64::NAN; self.rows * (outputs + OUT_GAP)];
        for row in 0..real {
            let x = &self.x[row * (inputs + X_GAP)..][..inputs];
            let at = row * (outputs + OUT_GAP);
            let line = reference::linear(x, 1, &[w], &[&self.bias]);
            expected[at..at + outputs].copy_from_slice(&line);
        }
        expected
    }
}

#[test]
fn every_tile_agrees_with_f64() {
    let Some(device) = device() else { return };
    // A single step; many blocks for a tile; many tiles for a block.
    let shapes = [(8, 8), (72, 136), (1000, 576), (2056, 264), (136, 9000)];
    for (inputs, outputs) in shapes {
        for rows in [1, 9, 17, 63, 64, 65, 200, 256, 300] {
            let case = Case::new(rows, inputs, outputs);
            let real = rows - rows / 5;
            let expected = case.expected(real);
            let output = if rows % 2 == 0 { Dtype::F32 } else { Dtype::Bf16 };
            for tile in ALL {
                let got = case.run(&device, tile, output, real);
                let what = format!("{tile:?} of {rows} x {inputs} x {outputs} to {output:?}");
                assert_near(&what, &got, &expected, rounding(output));
            }
        }
    }
}

/// `w` is gates, then as many ups.
fn gated(case: &Case, device: &Device, tile: Tile, real: usize) -> Vec<f32> {
    let (rows, inputs, outputs) = (case.rows, case.inputs, case.outputs / 2);
    let x = device.send_as(&case.x, Dtype::Bf16);
    let w = device.send_as(&case.w, Dtype::Bf16);
    let count = device.send(&[real as u32]);
    let out = device.poisoned(rows * (outputs + OUT_GAP) * 2);
    let (x, to) = (Tensor::new(&x, Dtype::Bf16), Tensor::new(&out, Dtype::Bf16));
    let operands = Linear {
        x_stride: inputs + X_GAP,
        out_stride: outputs + OUT_GAP,
        then: Then::Gate,
        ..Linear::plain(x, &w, to, inputs, outputs)
    };
    assert!(gates(rows, &operands).is_some());
    let rows = Rows { padded: rows, count: Some(&count) };
    linear_as(Variant::Wide(tile), device.queue(), rows, &operands).expect("a launch");
    device.fetch_as(&out, Dtype::Bf16)
}

#[test]
fn activated_products_agree_with_f64_and_rows_keep_to_themselves() {
    let Some(device) = device() else { return };
    for (inputs, outputs) in [(8, 8), (72, 136), (1000, 584), (136, 4504)] {
        for rows in [1, 9, 17, 33, 64] {
            let mut case = Case::new(rows, inputs, 2 * outputs);
            let size = (3.0 / inputs as f32).sqrt();
            case.w = rounded(&case.w.iter().map(|w| w * size).collect::<Vec<_>>(), Dtype::Bf16);
            case.bias.fill(0.0);
            let real = rows - rows / 5;
            let sums = case.expected(real);
            let mut expected = vec![f64::NAN; rows * (outputs + OUT_GAP)];
            for row in 0..real {
                let of = &sums[row * (2 * outputs + OUT_GAP)..];
                for at in 0..outputs {
                    let (gate, up) = (of[at], of[outputs + at]);
                    expected[row * (outputs + OUT_GAP) + at] = gate / (1.0 + (-gate).exp()) * up;
                }
            }
            for tile in ALL.into_iter().filter(|tile| tile.gate().is_some()) {
                let got = gated(&case, &device, tile, real);
                let what =
                    format!("{tile:?} of {real} of {rows} x {inputs} x {outputs}, activated");
                assert_near(&what, &got, &expected, 2.0 * rounding(Dtype::Bf16));
                let mut planted =
                    Case { x: case.x.clone(), w: case.w.clone(), bias: vec![], ..case };
                planted.x[..inputs].fill(f32::NAN);
                let bad = gated(&planted, &device, tile, real);
                let wide = outputs + OUT_GAP;
                assert!(bad[..outputs].iter().all(|x| x.is_nan()), "{what}");
                let bits =
                    |all: &[f32]| all[wide..].iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert!(bits(&bad) == bits(&got), "{what}");
            }
        }
    }
}

#[test]
fn nothing_is_written_where_no_row_is_real() {
    let Some(device) = device() else { return };
    for tile in ALL {
        let got = Case::new(20, 72, 136).run(&device, tile, Dtype::F32, 0);
        assert!(got.iter().all(|x| x.is_nan()), "{tile:?}");
    }
}

#[test]
fn rows_of_nan_change_no_bit_of_the_others() {
    let Some(device) = device() else { return };
    for tile in ALL {
        for rows in [17, 65, 300] {
            let mut case = Case::new(rows, 1000, 576);
            let clean = case.run(&device, tile, Dtype::F32, rows);
            let bad = rows / 2;
            case.x[bad * (1000 + X_GAP)..][..1000].fill(f32::NAN);
            let planted = case.run(&device, tile, Dtype::F32, rows);
            let wide = 576 + OUT_GAP;
            for row in 0..rows {
                let (a, b) = (&clean[row * wide..][..576], &planted[row * wide..][..576]);
                if row == bad {
                    assert!(b.iter().all(|x| x.is_nan()), "{tile:?}, row {row}");
                } else {
                    assert_eq!(a, b, "{tile:?}, row {row} of {rows}");
                }
            }
        }
    }
}

#[test]
fn selection_names_tiles_that_exist() {
    for rows in [9, 16, 17, 64, 65, 128, 129, 512, 513, 16_384] {
        for (outputs, inputs) in [(8, 8), (2048, 2048), (6144, 4096), (102_400, 2048)] {
            let tile = Tile::select(rows, outputs, inputs);
            assert!(ALL.contains(&tile), "{tile:?}");
        }
    }
}
