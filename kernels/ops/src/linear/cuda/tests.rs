//! Every variant of the product against f64, and bit for bit against itself.

use super::*;
use crate::cuda::testing::{Device, assert_near, device, rounded, rounding};
use crate::linear::reference;
use crate::testing::Random;
use crate::{Matrix, WeightSlice};

const FEW: [Variant; 5] = [
    Variant::Few { rows: 8, outputs: 8 },
    Variant::Few { rows: 8, outputs: 16 },
    Variant::Few { rows: 16, outputs: 8 },
    Variant::Few { rows: 16, outputs: 16 },
    Variant::Few { rows: 16, outputs: 32 },
];
const MANY: [Variant; 2] = [Variant::Many { rows: 64 }, Variant::Many { rows: 128 }];

struct Case {
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Vec<f32>,
    rows: usize,
    inputs: usize,
    outputs: usize,
}

impl Case {
    fn new(rows: usize, inputs: usize, outputs: usize, dtype: Dtype) -> Self {
        let mut random = Random::new((rows * 31 + inputs * 7 + outputs) as u64);
        Self {
            x: rounded(&random.vector(rows * inputs), dtype),
            w: rounded(&random.vector(outputs * inputs), dtype),
            bias: random.vector(outputs),
            rows,
            inputs,
            outputs,
        }
    }

    fn run(&self, device: &Device, variant: Variant, input: Dtype, output: Dtype) -> Vec<f32> {
        let Self { rows, inputs, outputs, .. } = *self;
        let (x, w) = (device.send_as(&self.x, input), device.send_as(&self.w, input));
        let bias = device.send(&self.bias);
        let out = device.poisoned(rows * outputs * output.size());
        let (x, out_tensor) = (Tensor::new(&x, input), Tensor::new(&out, output));
        let operands =
            Linear { bias: Some(&bias), ..Linear::plain(x, &w, out_tensor, inputs, outputs) };
        linear_as(variant, device.queue(), Rows::exactly(rows), &operands).expect("a launch");
        device.fetch_as(&out, output)
    }

    fn expected(&self) -> Vec<f64> {
        let w = Matrix::new(WeightSlice::F32(&self.w), self.outputs, self.inputs);
        reference::linear(&self.x, self.rows, &[w], &[&self.bias])
    }

    fn check(&self, device: &Device, variant: Variant, input: Dtype) {
        let expected = self.expected();
        let what = format!("{variant:?} of {} x {} x {}", self.rows, self.inputs, self.outputs);
        for output in [input, Dtype::F32] {
            let got = self.run(device, variant, input, output);
            assert_near(&what, &got, &expected, rounding(output));
        }
    }
}

#[test]
fn any_shape_agrees_with_f64() {
    let Some(device) = device() else { return };
    for dtype in [Dtype::F32, Dtype::Bf16] {
        for (rows, inputs, outputs) in [(1, 1, 1), (3, 5, 7), (33, 65, 31), (70, 100, 40)] {
            Case::new(rows, inputs, outputs, dtype).check(&device, Variant::Any, dtype);
        }
    }
}

#[test]
fn few_rows_agree_with_f64() {
    let Some(device) = device() else { return };
    for variant in FEW {
        let shapes =
            [(1, 8, 1), (1, 2048, 64), (5, 40, 9), (8, 1408, 100), (16, 136, 33), (17, 2056, 50)];
        for (rows, inputs, outputs) in shapes {
            Case::new(rows, inputs, outputs, Dtype::Bf16).check(&device, variant, Dtype::Bf16);
        }
    }
}

#[test]
fn many_rows_agree_with_f64() {
    let Some(device) = device() else { return };
    for variant in MANY {
        for (rows, inputs, outputs) in [(1, 8, 1), (17, 72, 129), (130, 200, 128), (300, 512, 260)]
        {
            Case::new(rows, inputs, outputs, Dtype::Bf16).check(&device, variant, Dtype::Bf16);
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_batch() {
    let Some(device) = device() else { return };
    let all = Case::new(16, 1000, 48, Dtype::Bf16);
    let wide = wide::ALL.map(Variant::Wide);
    for variant in FEW.into_iter().chain(MANY).chain(wide).chain([Variant::Any]) {
        let whole = all.run(&device, variant, Dtype::Bf16, Dtype::F32);
        for rows in [1, 3, 9] {
            let part = Case {
                x: all.x[..rows * 1000].to_vec(),
                w: all.w.clone(),
                bias: all.bias.clone(),
                rows,
                ..all
            };
            let got = part.run(&device, variant, Dtype::Bf16, Dtype::F32);
            assert_eq!(got, whole[..rows * 48], "{variant:?}, {rows} rows");
        }
    }
}

#[test]
fn batches_take_strides_and_rows_beyond_the_count_are_left_alone() {
    let Some(device) = device() else { return };
    let (padded, heads, inputs, outputs) = (6, 3, 24, 16);
    for real in [0_usize, 1, 5, 6] {
        let mut random = Random::new(8);
        let x = rounded(&random.vector(padded * heads * inputs), Dtype::Bf16);
        let w = rounded(&random.vector(heads * outputs * inputs), Dtype::Bf16);
        let sent = [device.send_as(&x, Dtype::Bf16), device.send_as(&w, Dtype::Bf16)];
        let count = device.send(&[real as u32]);
        for variant in [FEW[0], FEW[3], MANY[0], Variant::Any] {
            let out = device.poisoned(padded * heads * outputs * 4);
            let operands = Linear {
                x_stride: heads * inputs,
                x_batch: inputs,
                w_batch: outputs * inputs,
                out_stride: heads * outputs,
                out_batch: outputs,
                batch: heads,
                ..Linear::plain(
                    Tensor::new(&sent[0], Dtype::Bf16),
                    &sent[1],
                    Tensor::new(&out, Dtype::F32),
                    inputs,
                    outputs,
                )
            };
            let rows = Rows { padded, count: Some(&count) };
            linear_as(variant, device.queue(), rows, &operands).expect("a launch");
            let mut expected = vec![f64::NAN; padded * heads * outputs];
            for row in 0..real {
                for head in 0..heads {
                    let w = &w[head * outputs * inputs..][..outputs * inputs];
                    let w = Matrix::new(WeightSlice::F32(w), outputs, inputs);
                    let x = &x[(row * heads + head) * inputs..][..inputs];
                    let at = (row * heads + head) * outputs;
                    expected[at..at + outputs].copy_from_slice(&reference::linear(x, 1, &[w], &[]));
                }
            }
            assert_near("batched", &device.fetch(&out, 0.0), &expected, 1e-5);
        }
    }
}

#[test]
fn selection_follows_rows_and_alignment() {
    assert_eq!(select(false, 1, 4096, 1, 132), Variant::Any);
    assert_eq!(select(true, 1, 102_400, 1, 132), Variant::Few { rows: 8, outputs: 16 });
    assert_eq!(select(true, 8, 2048, 1, 132), Variant::Few { rows: 8, outputs: 8 });
    assert_eq!(select(true, 16, 102_400, 1, 132), Variant::Few { rows: 16, outputs: 32 });
    assert_eq!(select(true, 17, 2048, 1, 132), Variant::Many { rows: 64 });
    assert_eq!(select(true, 4096, 2048, 1, 132), Variant::Many { rows: 128 });
}
