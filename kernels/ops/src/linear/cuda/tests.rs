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

    /// Without the bias.
    fn run_plain(&self, device: &Device, variant: Variant, output: Dtype) -> Vec<f32> {
        let Self { rows, inputs, outputs, .. } = *self;
        let (x, w) = (device.send_as(&self.x, Dtype::Bf16), device.send_as(&self.w, Dtype::Bf16));
        let out = device.poisoned(rows * outputs * output.size());
        let (x, to) = (Tensor::new(&x, Dtype::Bf16), Tensor::new(&out, output));
        let operands = Linear::plain(x, &w, to, inputs, outputs);
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

/// By the library, or a loud skip where it is absent.
fn with_library(device: &Device) -> bool {
    let found = device.gpu.cublaslt();
    if let Err(error) = found {
        crate::cuda::testing::skip(&error.to_string());
    }
    found.is_ok()
}

#[test]
fn the_library_agrees_with_f64() {
    let Some(device) = device() else { return };
    if !with_library(&device) {
        return;
    }
    for (rows, inputs, outputs) in
        [(1, 8, 8), (17, 72, 136), (100, 2048, 64), (96, 2816, 2048), (300, 520, 1032)]
    {
        let case =
            Case { bias: vec![0.0; outputs], ..Case::new(rows, inputs, outputs, Dtype::Bf16) };
        let expected = case.expected();
        for output in [Dtype::Bf16, Dtype::F32] {
            let got = case.run_plain(&device, Variant::Library, output);
            let what = format!("{rows} x {inputs} x {outputs} by the library");
            assert_near(&what, &got, &expected, rounding(output));
        }
    }
}

#[test]
fn rows_by_the_library_do_not_depend_on_others() {
    let Some(device) = device() else { return };
    if !with_library(&device) {
        return;
    }
    // The library splits the sums of some of these.
    for (rows, inputs, outputs) in
        [(96, 10944, 2048), (128, 4096, 4096), (256, 12288, 4096), (512, 2048, 576)]
    {
        let case = Case::new(rows, inputs, outputs, Dtype::Bf16);
        let mut other = Case::new(rows, inputs, outputs, Dtype::Bf16);
        let kept = [0, rows / 2, rows - 1];
        for row in (0..rows).filter(|row| !kept.contains(row)) {
            let fill = if row % 2 == 0 { f32::NAN } else { 3.0 };
            other.x[row * inputs..][..inputs].fill(fill);
        }
        let [one, two] =
            [&case, &other].map(|case| case.run_plain(&device, Variant::Library, Dtype::Bf16));
        for row in kept {
            let row = row * outputs..(row + 1) * outputs;
            let bits =
                |all: &[f32]| all[row.clone()].iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert!(bits(&one) == bits(&two), "{rows} x {inputs} x {outputs}");
            assert!(one[row.clone()].iter().all(|x| x.is_finite()));
        }
    }
}

#[test]
fn a_product_by_the_library_is_captured_when_it_is_first_asked_for() {
    let Some(device) = device() else { return };
    if !with_library(&device) {
        return;
    }
    let planned = || device.gpu.cublaslt().expect("it is there").planned();
    for (rows, inputs, outputs) in [(192, 1024, 768), (384, 2056, 520), (1024, 512, 2048)] {
        let case =
            Case { bias: vec![0.0; outputs], ..Case::new(rows, inputs, outputs, Dtype::Bf16) };
        let (x, w) = (device.send_as(&case.x, Dtype::Bf16), device.send_as(&case.w, Dtype::Bf16));
        let out = device.poisoned(rows * outputs * 2);
        let (x, to) = (Tensor::new(&x, Dtype::Bf16), Tensor::new(&out, Dtype::Bf16));
        let operands = Linear::plain(x, &w, to, inputs, outputs);
        let before = planned();
        let graph =
            device.stream.capture(|_| linear(device.queue(), Rows::exactly(rows), &operands));
        let graph = graph.expect("a capture");
        assert_eq!(planned(), before + 1, "{rows} rows are the library's");
        for _ in 0..2 {
            device.stream.fill(&out, 0xFF).expect("a fill");
            graph.launch(&device.stream).expect("a launch");
            let got = device.fetch_as(&out, Dtype::Bf16);
            assert_near("a captured product", &got, &case.expected(), rounding(Dtype::Bf16));
        }
    }
}

#[test]
fn without_the_library_the_kernels_here_compute_the_same_products() {
    let Some(device) = device() else { return };
    let gpu = crate::cuda::Gpu::without_library(&device.context).expect("kernels");
    assert!(matches!(gpu.cublaslt(), Err(CudaError::NoLibrary { .. })));
    let alone = Queue { gpu: &gpu, stream: &device.stream };
    for (rows, inputs, outputs) in [(96, 512, 264), (256, 2048, 576), (768, 256, 1024)] {
        let case =
            Case { bias: vec![0.0; outputs], ..Case::new(rows, inputs, outputs, Dtype::Bf16) };
        let (x, w) = (device.send_as(&case.x, Dtype::Bf16), device.send_as(&case.w, Dtype::Bf16));
        let out = device.poisoned(rows * outputs * 2);
        let (x, to) = (Tensor::new(&x, Dtype::Bf16), Tensor::new(&out, Dtype::Bf16));
        let operands = Linear::plain(x, &w, to, inputs, outputs);
        linear(alone, Rows::exactly(rows), &operands).expect("a launch");
        let got = device.fetch_as(&out, Dtype::Bf16);
        assert_near("without the library", &got, &case.expected(), rounding(Dtype::Bf16));
    }
}

#[test]
fn the_library_serves_what_was_measured_and_few_numbers_of_rows() {
    for rows in [96, 128, 192, 256, 384, 2000, 8192] {
        assert!(library::faster(rows, 2048, 2048), "{rows}");
    }
    for rows in [1, 8, 32, 65, 100, 255] {
        assert!(!library::faster(rows, 2048, 2048), "{rows}");
    }
    // At 48 and 64 rows some are: query and output projections, not what is wide or deep.
    assert!([(3072, 2048), (4096, 4096)].iter().all(|(n, k)| library::faster(64, *n, *k)));
    let own = [(576, 2048), (4096, 12288), (24576, 4096), (102_400, 2048)];
    assert!(own.iter().all(|(n, k)| !library::faster(64, *n, *k)));
}

#[test]
fn a_large_product_is_timed_while_a_graph_is_captured() {
    let Some(device) = device() else { return };
    if !with_library(&device) {
        return;
    }
    let (rows, inputs, outputs) = (1536, 2048, 4096);
    let numbers = |seed| Random::new(seed).vector(8 * inputs);
    // Few distinct rows and weights, so that the reference is small.
    let (few_x, few_w) = (rounded(&numbers(1), Dtype::Bf16), rounded(&numbers(2), Dtype::Bf16));
    let repeat = |few: &[f32], lines: usize| {
        few.iter().copied().cycle().take(lines * inputs).collect::<Vec<_>>()
    };
    let x = device.send_as(&repeat(&few_x, rows), Dtype::Bf16);
    let w = device.send_as(&repeat(&few_w, outputs), Dtype::Bf16);
    let out = device.poisoned(rows * outputs * 2);
    let (x, to) = (Tensor::new(&x, Dtype::Bf16), Tensor::new(&out, Dtype::Bf16));
    let operands = Linear::plain(x, &w, to, inputs, outputs);
    let graph = device.stream.capture(|_| linear(device.queue(), Rows::exactly(rows), &operands));
    let graph = graph.expect("a capture");
    // The library may clear counters in front of its kernel; timing would be some fifteen products.
    assert!(graph.nodes().expect("a graph") <= 2, "timing is not captured");
    device.stream.fill(&out, 0xFF).expect("a fill");
    graph.launch(&device.stream).expect("a launch");
    let matrix = Matrix::new(WeightSlice::F32(&few_w), 8, inputs);
    let expected = reference::linear(&few_x, 8, &[matrix], &[&[0.0; 8]]);
    let got = device.fetch_as(&out, Dtype::Bf16);
    let some: Vec<f32> =
        (0..64).map(|i| got[(8 * 100 + i / 8) * outputs + 8 * 50 + i % 8]).collect();
    assert_near("a large product", &some, &expected, rounding(Dtype::Bf16));
    assert!(got.iter().all(|x| x.is_finite()));
}
