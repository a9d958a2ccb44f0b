//! Routing against sorting in f64, experts against plain f64 sums, on the device.

use super::*;
use crate::cuda::testing::{DTYPES, Device, assert_near, device, rounded};
use crate::moe::tests::choose;
use crate::testing::Random;
use crate::{act, norm};
use device::cuda::DeviceMemory;

#[test]
fn every_kind_of_router_chooses_what_sorting_chooses() {
    let Some(device) = device() else { return };
    for (experts, groups, open) in [(24, 6, 3), (64, 8, 3), (128, 8, 3), (256, 8, 4), (512, 8, 4)] {
        let mut random = Random::new(21);
        let bias: Vec<f32> = random.vector(experts).iter().map(|x| x * 0.4).collect();
        let group = |score| Some(GroupLimit { groups, chosen: open, score });
        let bias_sent = device.send(&bias);
        for scoring in [Scoring::Softmax, Scoring::Sigmoid] {
            for limit in [None, group(GroupScore::Max), group(GroupScore::SumTop2)] {
                for correction in [None, Some(&bias[..])] {
                    for (norm_topk, top_k) in [(false, 1), (true, 4), (true, 7)] {
                        let scale = 1.5;
                        let router =
                            Router { experts, top_k, scoring, limit, correction, norm_topk, scale };
                        check_router(&device, &router, &bias_sent);
                    }
                }
            }
        }
    }
}

fn check_router(device: &Device, router: &Router<'_>, bias: &DeviceSlice) {
    let (padded, real) = (9, 7);
    let logits: Vec<f32> =
        Random::new(4).vector(padded * router.experts).iter().map(|x| x * 3.0).collect();
    let sent = device.send(&logits);
    let count = device.send(&[real as u32]);
    let chosen = device.poisoned(padded * router.top_k * 4);
    let weights = device.poisoned(padded * router.top_k * 4);
    let routing = Routing { chosen: &chosen, weights: &weights, top_k: router.top_k };
    let rows = Rows { padded, count: Some(&count) };
    let correction = router.correction.map(|_| bias);
    let scores = Scores { logits: Tensor::new(&sent, Dtype::F32), router, correction };
    route(device.queue(), rows, &scores, &routing).expect("a launch");
    let (chosen, weights) = (device.fetch(&chosen, 0_u32), device.fetch(&weights, 0.0_f32));
    let expected: Vec<(u32, f64)> = logits
        .chunks_exact(router.experts)
        .take(real)
        .flat_map(|row| choose(row, router))
        .collect();
    let ids: Vec<u32> = expected.iter().map(|e| e.0).collect();
    assert_eq!(chosen[..ids.len()], ids, "{router:?}");
    let values: Vec<f64> = expected.iter().map(|e| e.1).collect();
    assert_near("weights", &weights[..ids.len()], &values, 1e-5);
    assert!(chosen[ids.len()..].iter().all(|c| *c == u32::MAX), "padding chooses nothing");
}

#[test]
fn ties_go_to_the_lower_number_and_nan_stays_in_range() {
    let Some(device) = device() else { return };
    let router = Router {
        experts: 40,
        top_k: 3,
        scoring: Scoring::Softmax,
        limit: None,
        correction: None,
        norm_topk: true,
        scale: 1.0,
    };
    let mut logits = vec![1.0_f32; 80];
    logits[40..].fill(f32::NAN);
    let sent = device.send(&logits);
    let (chosen, weights) = (device.poisoned(24), device.poisoned(24));
    let routing = Routing { chosen: &chosen, weights: &weights, top_k: 3 };
    let rows = Rows::exactly(2);
    let scores =
        Scores { logits: Tensor::new(&sent, Dtype::F32), router: &router, correction: None };
    route(device.queue(), rows, &scores, &routing).expect("a launch");
    let chosen = device.fetch(&chosen, 0_u32);
    assert_eq!(chosen[..3], [0, 1, 2]);
    assert!(chosen[3..].iter().all(|c| *c < 40));
    assert!(device.fetch(&weights, 0.0_f32)[3..].iter().all(|w| w.is_nan()));
}

/// Experts `first..first + held` of a layer, `real` of `padded` tokens.
#[derive(Clone, Copy, Debug)]
struct Case {
    padded: usize,
    real: usize,
    top_k: usize,
    experts: usize,
    first: usize,
    held: usize,
    hidden: usize,
    intermediate: usize,
}

fn check_experts(device: &Device, case: Case, dtype: Dtype) {
    let Case { padded, real, top_k, experts: all, first, held, hidden, intermediate } = case;
    let mut random = Random::new((padded * 3 + hidden) as u64);
    let x = rounded(&random.vector(padded * hidden), dtype);
    let scaled = |random: &mut Random, len: usize, inputs: usize| {
        let size = (3.0 / inputs as f32).sqrt();
        rounded(&random.vector(len).iter().map(|w| w * size).collect::<Vec<_>>(), dtype)
    };
    let gate_up = scaled(&mut random, held * 2 * intermediate * hidden, hidden);
    let down = scaled(&mut random, held * hidden * intermediate, intermediate);
    // Skewed choices, so that some experts have many tokens and some none.
    let mut chosen = Vec::new();
    for _ in 0..padded {
        let start = random.below(all) * random.below(all) / all;
        chosen.extend((0..top_k).map(|j| ((start + j) % all) as u32));
    }
    let weights: Vec<f32> = random.vector(padded * top_k).iter().map(|w| w.abs()).collect();

    let (chosen_sent, weights_sent) = (device.send(&chosen), device.send(&weights));
    let sent = [&x, &gate_up, &down].map(|values| device.send_as(values, dtype));
    let out = device.poisoned(padded * hidden * dtype.size());
    let bytes = Scratch::bytes(dtype, padded, top_k, held, hidden, intermediate);
    let memory = DeviceMemory::allocate(&device.context, "scratch", bytes).expect("memory");
    device.stream.fill(&memory, 0xFF).expect("a fill");
    let mut arena = Arena::new(memory);
    let scratch = Scratch::take(&mut arena, dtype, padded, top_k, held, hidden, intermediate);
    let scratch = scratch.expect("an arena of that size");
    let routing = Routing { chosen: &chosen_sent, weights: &weights_sent, top_k };
    let experts_here = ExpertWeights {
        first,
        held,
        gate_up: Tensor::new(&sent[1], dtype),
        down: &sent[2],
        hidden,
        intermediate,
    };
    let count = device.send(&[real as u32]);
    let rows = Rows { padded, count: Some(&count) };
    experts(device.queue(), rows, &sent[0], &routing, &experts_here, &out, &scratch)
        .expect("a launch");

    let dot =
        |x: &[f64], w: &[f32]| -> f64 { x.iter().zip(w).map(|(a, b)| a * f64::from(*b)).sum() };
    let mut expected = vec![0.0_f64; real * hidden];
    for token in 0..real {
        let x: Vec<f64> = x[token * hidden..][..hidden].iter().map(|x| f64::from(*x)).collect();
        for pair in token * top_k..(token + 1) * top_k {
            let expert = (chosen[pair] as usize).checked_sub(first).filter(|e| *e < held);
            let Some(expert) = expert else { continue };
            let line = |i: usize| &gate_up[(expert * 2 * intermediate + i) * hidden..][..hidden];
            let inner: Vec<f64> = (0..intermediate)
                .map(|i| {
                    let (gate, up) = (dot(&x, line(i)), dot(&x, line(intermediate + i)));
                    gate / (1.0 + (-gate).exp()) * up
                })
                .collect();
            for i in 0..hidden {
                let w = &down[(expert * hidden + i) * intermediate..][..intermediate];
                expected[token * hidden + i] += f64::from(weights[pair]) * dot(&inner, w);
            }
        }
    }
    let got = device.fetch_as(&out, dtype);
    // In bf16 both products, the activation and the sum are rounded one after the other.
    let tolerance = match dtype {
        Dtype::F32 => 2e-5,
        Dtype::Bf16 => 2e-2,
    };
    assert_near(&format!("{dtype:?} {case:?}"), &got[..real * hidden], &expected, tolerance);
    assert!(got[real * hidden..].iter().all(|x| x.is_nan()), "padding is not written");
    let sorted = (&routing, &scratch);
    for beside in [false, true] {
        check_behind(device, rows, (hidden, dtype), sorted, &out, beside);
    }
}

/// The sum with what follows it against op by op, bit for bit.
fn check_behind(
    device: &Device,
    rows: Rows<'_>,
    (hidden, dtype): (usize, Dtype),
    (routing, scratch): (&Routing<'_>, &Scratch),
    sum: &DeviceSlice,
    beside: bool,
) {
    let (on, elements) = (device.queue(), rows.padded * hidden);
    let mut random = Random::new(hidden as u64);
    let mut vector = || rounded(&random.vector(elements), dtype);
    let (other, start) = (vector(), vector());
    let weight = device.send(&random.vector(hidden));
    let other = device.send_as(&other, dtype);
    let [apart, together] = [(); 2].map(|()| device.send_as(&start, dtype));
    let [one, two] = [(); 2].map(|()| device.poisoned(elements * dtype.size()));
    let total = device.poisoned(elements * dtype.size());
    device.stream.copy(sum, &total).expect("a copy");
    if beside {
        act::cuda::add(on, rows, hidden, Tensor::new(&other, dtype), &total).expect("a launch");
    }
    let total = Tensor::new(&total, dtype);
    let eps = 1e-6;
    norm::cuda::add_rms_norm(on, rows, hidden, total, &apart, &weight, eps, &one)
        .expect("a launch");
    let to = Combined { dtype, hidden, out: &two };
    let beside = beside.then_some(&other);
    let follows = beside.is_some();
    let behind = Behind { beside, residual: &together, weight: &weight, eps, follows };
    combine(on, rows, routing, scratch, &to, Some(&behind)).expect("a launch");
    let bits = |slice: &DeviceSlice| -> Vec<u32> {
        device.fetch_as(slice, dtype).into_iter().map(f32::to_bits).collect()
    };
    assert_eq!(bits(&together), bits(&apart), "sums of {hidden} in {dtype:?}");
    assert_eq!(bits(&two), bits(&one), "norms of {hidden} in {dtype:?}");
}

#[test]
fn the_sum_of_experts_agrees_with_f64_for_few_and_many_tokens() {
    let Some(device) = device() else { return };
    let case = |padded, real, top_k, experts, hidden, intermediate| Case {
        padded,
        real,
        top_k,
        experts,
        first: 0,
        held: experts,
        hidden,
        intermediate,
    };
    for dtype in DTYPES {
        for case in [
            case(1, 1, 2, 4, 8, 16),
            case(3, 2, 3, 7, 33, 5),
            case(4, 0, 2, 8, 16, 16),
            case(8, 5, 6, 64, 64, 88),
            case(40, 33, 4, 16, 72, 40),
            Case { first: 5, held: 6, ..case(17, 17, 4, 16, 64, 32) },
            case(300, 290, 2, 8, 64, 48),
            case(600, 600, 4, 4, 40, 24),
            case(9, 9, 2, 16, 264, 200),
            case(65, 64, 4, 8, 328, 136),
            case(256, 256, 2, 24, 520, 72),
            case(3000, 2999, 3, 8, 16, 8),
            case(600, 590, 2, 300, 16, 8),
            case(700, 690, 2, 4, 272, 200),
            case(800, 800, 1, 5, 144, 104),
            case(520, 520, 1, 1, 48, 72),
            case(128, 128, 1, 1, 64, 264),
            case(257, 250, 1, 2, 80, 40),
            case(33, 31, 9, 12, 2064, 16),
            Case { first: 3, held: 2, ..case(400, 397, 2, 8, 80, 328) },
        ] {
            check_experts(&device, case, dtype);
        }
    }
}
