//! Streamed products against f64, bit for bit against themselves, and with what follows them.

use super::*;
use crate::cuda::testing::{Device, assert_near, device, rounded, rounding};
use crate::cuda::{Tensor, testing};
use crate::linear::cuda::{Variant, gates, linear_as};
use crate::linear::reference;
use crate::testing::Random;
use crate::{Matrix, WeightSlice};

/// Inputs, outputs, rows, real rows.
const SHAPES: [(usize, usize, usize, usize); 10] = [
    (8, 1, 1, 1),
    (8, 5, 2, 2),
    (40, 3, 4, 2),
    (2048, 577, 1, 1),
    (1408, 77, 8, 7),
    (2816, 300, 4, 0),
    (4104, 260, 8, 8),
    (10_944, 33, 7, 5),
    (12_288, 140, 8, 8),
    // So many weights that half of the memory is left late.
    (3848, 3400, 3, 2),
];

struct Case {
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Vec<f32>,
    before: Vec<f32>,
    inputs: usize,
    outputs: usize,
    rows: usize,
    real: usize,
}

impl Case {
    /// `w` has `parts * outputs` rows.
    fn new((inputs, outputs, rows, real): (usize, usize, usize, usize), parts: usize) -> Self {
        let mut random = Random::new((rows * 31 + inputs * 7 + outputs) as u64);
        let size = (3.0 / inputs as f32).sqrt();
        let mut bf16 = |len: usize, by: f32| -> Vec<f32> {
            rounded(&random.vector(len).iter().map(|x| x * by).collect::<Vec<_>>(), Dtype::Bf16)
        };
        let (x, w) = (bf16(rows * inputs, 1.0), bf16(parts * outputs * inputs, size));
        let (before, bias) = (bf16(rows * outputs, 1.0), bf16(outputs, 1.0));
        Self { x, w, bias, before, inputs, outputs, rows, real }
    }

    fn run(&self, device: &Device, then: Then, output: Dtype, bias: bool) -> Vec<f32> {
        let Self { inputs, outputs, rows, real, .. } = *self;
        let (x, w) = (device.send_as(&self.x, Dtype::Bf16), device.send_as(&self.w, Dtype::Bf16));
        let added = device.send(&self.bias);
        let out = match then {
            Then::Add => device.send_as(&self.before, output),
            _ => device.poisoned(rows * outputs * output.size()),
        };
        let (x, to) = (Tensor::new(&x, Dtype::Bf16), Tensor::new(&out, output));
        let plain = Linear::plain(x, &w, to, inputs, outputs);
        let operands = Linear { bias: bias.then_some(&added), then, ..plain };
        let count = device.send(&[real as u32]);
        let rows = Rows { padded: rows, count: Some(&count) };
        linear_as(Variant::Stream, device.queue(), rows, &operands).expect("a launch");
        device.fetch_as(&out, output)
    }

    /// Of the first part of the weights, or the one behind it.
    fn products(&self, part: usize) -> Vec<f64> {
        let Self { inputs, outputs, real, .. } = *self;
        let w = &self.w[part * outputs * inputs..][..outputs * inputs];
        let w = Matrix::new(WeightSlice::F32(w), outputs, inputs);
        reference::linear(&self.x[..real * inputs], real, &[w], &[])
    }

    fn check(&self, what: &str, got: &[f32], expected: &[f64], tolerance: f64) {
        let Self { inputs, outputs, rows, real, .. } = *self;
        let what = format!("{what} of {real} of {rows} x {inputs} x {outputs}");
        let (here, padding) = got.split_at(real * outputs);
        assert_near(&what, here, expected, tolerance);
        let before = &self.before[real * outputs..];
        let untouched = padding.iter().all(|x| x.is_nan()) || padding == before;
        assert!(untouched, "padding is left alone: {what}");
    }
}

#[test]
fn streamed_products_agree_with_f64() {
    let Some(device) = device() else { return };
    for shape in SHAPES {
        let case = Case::new(shape, 1);
        let expected: Vec<f64> = (case.products(0).iter().enumerate())
            .map(|(at, sum)| sum + f64::from(case.bias[at % case.outputs]))
            .collect();
        for output in testing::DTYPES {
            let got = case.run(&device, Then::Store, output, true);
            case.check("a product", &got, &expected, rounding(output));
        }
        let sums = case.products(0);
        let added: Vec<f64> =
            sums.iter().zip(&case.before).map(|(sum, x)| sum + f64::from(*x)).collect();
        let got = case.run(&device, Then::Add, Dtype::Bf16, false);
        // Rounded twice.
        case.check("a sum", &got, &added, 2.0 * rounding(Dtype::Bf16));
        let pairs = Case::new(shape, 2);
        let gated: Vec<f64> = (pairs.products(0).iter().zip(pairs.products(1)))
            .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
            .collect();
        let got = pairs.run(&device, Then::Gate, Dtype::Bf16, false);
        pairs.check("an activation", &got, &gated, 4.0 * rounding(Dtype::Bf16));
    }
}

#[test]
fn rows_normed_on_the_way_are_those_normed_before() {
    let Some(device) = device() else { return };
    for (inputs, outputs, padded, real) in [
        (8, 3, 1, 1),
        (264, 140, 3, 2),
        (2048, 300, 1, 1),
        (2048, 64, 8, 7),
        (4096, 33, 8, 8),
        (6152, 20, 4, 4),
        (264, 5, 2, 0),
    ] {
        let mut case = Case::new((inputs, outputs, padded, real), 2);
        if real > 2 {
            case.x[inputs + 3] = f32::NAN;
        }
        let x = device.send_as(&case.x, Dtype::Bf16);
        let w = device.send_as(&case.w, Dtype::Bf16);
        let weight: Vec<f32> = (0..inputs).map(|i| 0.5 + (i % 7) as f32 / 4.0).collect();
        let weight = device.send(&weight);
        let count = device.send(&[real as u32]);
        let (on, rows) = (device.queue(), Rows { padded, count: Some(&count) });
        let normed = [(); 3].map(|()| device.poisoned(padded * inputs * 2));
        let out = [(); 4].map(|()| device.poisoned(padded * outputs * 2));
        let tensor = |slice| Tensor::new(slice, Dtype::Bf16);
        let eps = 1e-5;
        crate::norm::cuda::rms_norm(on, rows, inputs, tensor(&x), &weight, eps, &normed[0])
            .expect("a launch");
        // As it comes, and as a gate.
        let half = w.slice(0..outputs * inputs * 2);
        let plain = |from, w, to| Linear::plain(tensor(from), w, tensor(to), inputs, outputs);
        let gate = |linear| Linear { then: Then::Gate, ..linear };
        let norm = |to| Some(Normed { weight: &weight, eps, out: to });
        let [a, b, c, d] = &out;
        for operands in [
            plain(&normed[0], &half, a),
            Linear { norm: norm(&normed[2]), ..plain(&x, &half, b) },
            gate(plain(&normed[0], &w, c)),
            gate(Linear { norm: norm(&normed[1]), ..plain(&x, &w, d) }),
        ] {
            linear_as(Variant::Stream, on, rows, &operands).expect("a launch");
        }
        let bits = |slice| -> Vec<u32> {
            device.fetch_as(slice, Dtype::Bf16).iter().map(|x: &f32| x.to_bits()).collect()
        };
        let what = format!("{real} of {padded} x {inputs} x {outputs}");
        for (apart, together) in [(a, b), (c, d)] {
            assert_eq!(bits(apart), bits(together), "{what}");
        }
        assert_eq!(bits(&normed[0]), bits(&normed[1]), "{what}");
        assert_eq!(bits(&normed[0]), bits(&normed[2]), "{what}");
    }
}

#[test]
fn rows_are_normed_where_nothing_is_written() {
    let Some(device) = device() else { return };
    let memory = device.poisoned(3 * 512);
    let [w, weight] = [device.poisoned(64 * 64 * 2), device.poisoned(64 * 4)];
    let tensor = |slice| Tensor::new(slice, Dtype::Bf16);
    let [x, behind, third] = [0, 1, 2].map(|i| memory.slice(i * 512..(i + 1) * 512));
    let normed = |out| Some(Normed { weight: &weight, eps: 1e-5, out });
    let of = |to, norm| Linear { norm, ..Linear::plain(tensor(&x), &w, tensor(to), 64, 64) };
    assert!(takes(4, &of(&behind, normed(&third))));
    assert!(!takes(4, &of(&behind, normed(&behind))));
    assert!(!takes(4, &of(&x, normed(&behind))));
    assert!(!takes(4, &of(&behind, normed(&x))));
    assert!(takes(4, &of(&x, None)));
    // Weights of two products, for rows that are halves.
    let gate = |to| Linear { then: Then::Gate, outputs: 32, out_stride: 32, ..of(to, None) };
    for rows in [4, 16] {
        assert!(gates(rows, &gate(&behind)).is_some());
        assert!(gates(rows, &gate(&x)).is_none());
    }
}

#[test]
fn a_streamed_row_has_the_same_bits_in_every_batch() {
    let Some(device) = device() else { return };
    for (inputs, outputs) in [(1000, 300), (12_288, 140), (3848, 3400)] {
        let all = Case::new((inputs, outputs, 8, 8), 1);
        let whole = all.run(&device, Then::Store, Dtype::F32, false);
        for rows in [1, 3, 7] {
            // Where tokens stay in shared memory, where they come with stages, and with stages of two sizes.
            let mut x = all.x[..rows * inputs].to_vec();
            if rows == 3 {
                x[2 * inputs..].fill(f32::NAN);
            }
            let part = Case {
                x,
                w: all.w.clone(),
                bias: all.bias.clone(),
                before: all.before.clone(),
                rows,
                real: rows,
                ..all
            };
            let got = part.run(&device, Then::Store, Dtype::F32, false);
            let same = if rows == 3 { 2 } else { rows };
            assert_eq!(got[..same * outputs], whole[..same * outputs], "{rows} rows");
            assert!(rows != 3 || got[same * outputs..].iter().all(|x| x.is_nan()));
        }
    }
}

#[test]
fn rings_fit_shared_memory() {
    for columns in [8, 1408, 2048, 2816, 12_288, 18_432] {
        for tokens in 1..=MOST_ROWS {
            for staying in [None, Some(columns).filter(|c| tokens * odd(2 * c) <= MOST_STAYING)] {
                for half in [Half::AtOnce, Half::Late, Half::Never] {
                    let beside = Beside { own: SHARED, staying, half };
                    let (ring, shared) = Ring::fit(columns, tokens, beside).expect("a ring");
                    assert!(shared as usize <= WHOLE && ring.stages >= 2, "{ring:?}");
                    assert!(ring.left == 0 || half == Half::Late && shared as usize <= HALF);
                    assert!(
                        ring.pitch as usize >= 2 * ring.step as usize && ring.pitch % 128 == 64
                    );
                    assert!(ring.x_pitch as usize >= staying.map_or(0, |c| 2 * c));
                }
            }
        }
    }
}
