//! Experts that every row takes beside the chosen ones, against f64, and rows that see no other.

use super::Joined;
use crate::cuda::testing::{Device, assert_near, device, rounded};
use crate::cuda::{Dtype, Rows, Tensor};
use crate::moe::cuda::stream::Always;
use crate::moe::cuda::{Combined, ExpertWeights, Routing, Scratch, combine, joins, results};
use crate::testing::Random;
use device::cuda::{Arena, DeviceMemory, DeviceSlice};

const DTYPE: Dtype = Dtype::Bf16;
const SIZE: usize = 2;

/// `real` of `padded` rows, of experts that nobody takes too.
#[derive(Clone, Copy, Debug)]
struct Case {
    padded: usize,
    real: usize,
    top_k: usize,
    experts: usize,
    hidden: usize,
    intermediate: usize,
    width: usize,
}

struct Layer {
    gate_up: DeviceSlice,
    down: DeviceSlice,
    all: [Vec<f32>; 2],
    all_sent: [DeviceSlice; 2],
}

fn layer(device: &Device, case: Case) -> Layer {
    let Case { experts, hidden, intermediate, width, .. } = case;
    let mut random = Random::new(11);
    let mut weights = |len: usize, inputs: usize| {
        let size = (3.0 / inputs as f32).sqrt();
        rounded(&random.vector(len).iter().map(|w| w * size).collect::<Vec<_>>(), DTYPE)
    };
    let gate_up = weights(experts * 2 * intermediate * hidden, hidden);
    let down = weights(experts * hidden * intermediate, intermediate);
    let all = [weights(2 * width * hidden, hidden), weights(hidden * width, width)];
    let all_sent = [device.send_as(&all[0], DTYPE), device.send_as(&all[1], DTYPE)];
    let [gate_up, down] = [gate_up, down].map(|values| device.send_as(&values, DTYPE));
    Layer { gate_up, down, all, all_sent }
}

/// Sums of chosen experts, and results of the others where they join.
fn run(
    device: &Device,
    layer: &Layer,
    case: Case,
    x: &[f32],
    chosen: &[u32],
    join: bool,
) -> [Vec<f32>; 2] {
    let Case { padded, real, top_k, experts, hidden, intermediate, width } = case;
    let x = device.send_as(x, DTYPE);
    let chosen = device.send(chosen);
    let weights = device.send(&vec![0.25_f32; padded * top_k]);
    let out = device.poisoned(padded * hidden * SIZE);
    let inner = device.poisoned(padded * width * SIZE);
    let beside = device.poisoned(padded * hidden * SIZE);
    let bytes = Scratch::bytes(DTYPE, padded, top_k, experts, hidden, intermediate);
    let memory = DeviceMemory::allocate(&device.context, "scratch", bytes).expect("memory");
    device.stream.fill(&memory, 0xFF).expect("a fill");
    let mut arena = Arena::new(memory);
    let scratch = Scratch::take(&mut arena, DTYPE, padded, top_k, experts, hidden, intermediate)
        .expect("an arena of that size");
    let routing = Routing { chosen: &chosen, weights: &weights, top_k };
    let here = ExpertWeights {
        first: 0,
        held: experts,
        gate_up: Tensor::new(&layer.gate_up, DTYPE),
        down: &layer.down,
        hidden,
        intermediate,
    };
    let [gate_up, down] = &layer.all_sent;
    let always = Always { gate_up, down, width };
    assert!(joins(padded, &here, top_k, &always), "{case:?}");
    let joined = join.then_some(Joined { always, inner: &inner, out: &beside });
    let count = device.send(&[real as u32]);
    let rows = Rows { padded, count: Some(&count) };
    let on = device.queue();
    results(on, rows, &x, &routing, &here, joined, &scratch).expect("a launch");
    let to = Combined { dtype: DTYPE, hidden, out: &out };
    combine(on, rows, &routing, &scratch, &to, None).expect("a launch");
    [device.fetch_as(&out, DTYPE), device.fetch_as(&beside, DTYPE)]
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Uniform over the first three quarters of experts, or the first ones for all.
fn choices(case: Case, crowded: bool) -> Vec<u32> {
    let mut random = Random::new(case.padded as u64);
    let some = (case.experts * 3 / 4).max(case.top_k);
    let of_row = |_| {
        let start = if crowded { 0 } else { random.below(some) };
        (0..case.top_k).map(move |j| ((start + j) % some) as u32).collect::<Vec<_>>()
    };
    (0..case.padded).flat_map(of_row).collect()
}

fn check(device: &Device, case: Case, crowded: bool) {
    let Case { padded, real, top_k, hidden, width, .. } = case;
    let layer = layer(device, case);
    let mut random = Random::new(padded as u64);
    let mut x = rounded(&random.vector(padded * hidden), DTYPE);
    let mut chosen = choices(case, crowded);
    let [alone, _] = run(device, &layer, case, &x, &chosen, false);
    let [sums, beside] = run(device, &layer, case, &x, &chosen, true);
    assert_eq!(bits(&sums), bits(&alone), "{case:?}");

    let dot =
        |x: &[f64], w: &[f32]| -> f64 { x.iter().zip(w).map(|(a, b)| a * f64::from(*b)).sum() };
    let [gate_up, down] = &layer.all;
    let mut expected = Vec::new();
    for row in x[..real * hidden].chunks_exact(hidden) {
        let row: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
        let line = |i: usize| &gate_up[i * hidden..][..hidden];
        let inner: Vec<f64> = (0..width)
            .map(|i| {
                let (gate, up) = (dot(&row, line(i)), dot(&row, line(width + i)));
                gate / (1.0 + (-gate).exp()) * up
            })
            .collect();
        expected.extend(down.chunks_exact(width).map(|w| dot(&inner, w)));
    }
    // Rounded between the products and after them.
    assert_near(&format!("{case:?}"), &beside[..real * hidden], &expected, 2e-2);
    assert!(beside[real * hidden..].iter().all(|x| x.is_nan()), "padding is not written");

    // A row of NaN, at experts that others use.
    let bad = real / 2;
    x[bad * hidden..(bad + 1) * hidden].fill(f32::NAN);
    for (j, choice) in chosen[bad * top_k..(bad + 1) * top_k].iter_mut().enumerate() {
        *choice = j as u32;
    }
    let planted = run(device, &layer, case, &x, &chosen, true);
    for (clean, planted) in [sums, beside].iter().zip(&planted) {
        for row in 0..real {
            let (a, b) = (&clean[row * hidden..][..hidden], &planted[row * hidden..][..hidden]);
            if row == bad {
                assert!(b.iter().all(|x| x.is_nan()), "row {row} of {case:?}");
            } else {
                assert_eq!(bits(a), bits(b), "row {row} of {case:?}");
            }
        }
    }
}

#[test]
fn experts_of_all_rows_join_those_that_are_chosen() {
    let Some(device) = device() else { return };
    let case = |padded, real, top_k, experts, hidden, intermediate, width| Case {
        padded,
        real,
        top_k,
        experts,
        hidden,
        intermediate,
        width,
    };
    for case in [
        case(128, 101, 2, 4, 32, 24, 40),
        case(300, 257, 2, 8, 272, 200, 136),
        case(201, 197, 2, 8, 144, 72, 136),
        case(184, 181, 2, 4, 80, 264, 72),
        case(700, 700, 3, 16, 208, 104, 424),
        case(1100, 1025, 6, 64, 64, 104, 208),
        // Blocks take several units each, of one step: what they store is announced later than it is done.
        case(2400, 2397, 6, 32, 64, 1024, 128),
    ] {
        for crowded in [false, true] {
            check(&device, case, crowded);
        }
    }
}
