//! Streamed experts against f64, and tokens that do not see each other.

use super::*;
use crate::cuda::testing::{Device, assert_near, device, rounded};
use crate::cuda::{Rows, Tensor};
use crate::moe::tests::choose;
use crate::moe::{Router, Scoring};
use crate::testing::Random;
use device::cuda::{Arena, DeviceMemory};

#[derive(Clone, Copy, Debug)]
struct Case {
    padded: usize,
    real: usize,
    hidden: usize,
    inner: usize,
    always: usize,
    first: usize,
    held: usize,
    /// Experts in all, of which some may live elsewhere.
    all: usize,
    top_k: usize,
}

struct Data {
    x: Vec<f32>,
    before: Vec<f32>,
    gate_up: Vec<f32>,
    down: Vec<f32>,
    always_gate_up: Vec<f32>,
    always_down: Vec<f32>,
    logits: Vec<f32>,
    chosen: Vec<u32>,
    weights: Vec<f32>,
}

/// The scale makes weights about one, so that experts matter beside those of every token.
fn router(experts: usize, top_k: usize) -> Router<'static> {
    let (scoring, scale) = (Scoring::Softmax, 2.0);
    Router { experts, top_k, scoring, limit: None, correction: None, norm_topk: true, scale }
}

impl Data {
    fn new(case: Case) -> Self {
        let Case { padded, hidden, inner, always, held, all, top_k, .. } = case;
        let mut random = Random::new((padded * 3 + hidden + held) as u64);
        let scaled = |random: &mut Random, len: usize, inputs: usize| {
            let size = (3.0 / inputs.max(1) as f32).sqrt();
            rounded(&random.vector(len).iter().map(|w| w * size).collect::<Vec<_>>(), Dtype::Bf16)
        };
        // The last token takes what the first does.
        let mut logits: Vec<f32> = random.vector(padded * all).iter().map(|x| x * 3.0).collect();
        logits.copy_within(0..all, (padded - 1) * all);
        let router = router(all, top_k);
        let made = logits.chunks(all).flat_map(|row| choose(row, &router));
        let (chosen, weights) = made.map(|(id, weight)| (id, weight as f32)).unzip();
        Self {
            x: scaled(&mut random, padded * hidden, 3),
            before: scaled(&mut random, padded * hidden, 3),
            gate_up: scaled(&mut random, held * 2 * inner * hidden, hidden),
            down: scaled(&mut random, held * hidden * inner, inner),
            always_gate_up: scaled(&mut random, 2 * always * hidden, hidden),
            always_down: scaled(&mut random, hidden * always, always),
            logits,
            chosen,
            weights,
        }
    }

    fn run(&self, device: &Device, case: Case, add: bool) -> Vec<f32> {
        let together = self.run_by(device, case, add, true);
        assert_eq!(bits(&self.run_by(device, case, add, false)), bits(&together), "{case:?}");
        together
    }

    /// With the choice made on the way, or apart.
    fn run_by(&self, device: &Device, case: Case, add: bool, here: bool) -> Vec<f32> {
        let Case { padded, real, hidden, inner, always, first, held, all, top_k } = case;
        let send = |values: &[f32]| device.send_as(values, Dtype::Bf16);
        let (x, gate_up, down) = (send(&self.x), send(&self.gate_up), send(&self.down));
        let beside = [&self.always_gate_up, &self.always_down].map(|values| send(values));
        let [chosen, weights] = [(); 2].map(|()| device.poisoned(padded * top_k * 4));
        let out = if add { send(&self.before) } else { device.poisoned(padded * hidden * 2) };
        let room = 2 * (always.div_ceil(inner) + top_k) * inner;
        let bytes = Scratch::bytes(Dtype::Bf16, padded, top_k, held, hidden, room);
        let memory = DeviceMemory::allocate(&device.context, "scratch", bytes).expect("memory");
        device.stream.fill(&memory, 0xFF).expect("a fill");
        let mut arena = Arena::new(memory);
        let scratch = Scratch::take(&mut arena, Dtype::Bf16, padded, top_k, held, hidden, room);
        let scratch = scratch.expect("an arena of that size");
        let weights_here = ExpertWeights {
            first,
            held,
            gate_up: Tensor::new(&gate_up, Dtype::Bf16),
            down: &down,
            hidden,
            intermediate: inner,
        };
        let always = Always { gate_up: &beside[0], down: &beside[1], width: always };
        let always = (always.width > 0).then_some(&always);
        let count = device.send(&[real as u32]);
        let rows = Rows { padded, count: Some(&count) };
        let routing = Routing { chosen: &chosen, weights: &weights, top_k };
        let (on, sum) = (device.queue(), Sum { out: &out, add });
        let logits = device.send(&self.logits);
        let router = router(all, top_k);
        let logits = Tensor::new(&logits, Dtype::F32);
        let scores = Scores { logits, router: &router, correction: None };
        if !here {
            crate::moe::cuda::route(on, rows, &scores, &routing).expect("a launch");
        }
        let scores = here.then_some(&scores);
        // Of several in a row one begins before the other has ended. Those before the last are of other
        // tokens, so that what is left of them is not what the last one must make.
        let other = send(&self.before);
        for x in [&other, &other, &x].into_iter().skip(if add { 2 } else { 0 }) {
            experts(on, rows, x, &routing, scores, &weights_here, always, &sum, &scratch)
                .expect("a launch");
        }
        assert_eq!(device.fetch(&chosen, 0_u32)[..real * top_k], self.chosen[..real * top_k]);
        device.fetch_as(&out, Dtype::Bf16)
    }

    fn expected(&self, case: Case, add: bool) -> Vec<f64> {
        let Case { real, hidden, inner, always, first, held, top_k, .. } = case;
        let dot =
            |x: &[f64], w: &[f32]| -> f64 { x.iter().zip(w).map(|(a, b)| a * f64::from(*b)).sum() };
        let mlp = |x: &[f64], gate_up: &[f32], down: &[f32], width: usize| -> Vec<f64> {
            let line = |i: usize| dot(x, &gate_up[i * hidden..][..hidden]);
            let h = (0..width).map(|i| line(i) / (1.0 + (-line(i)).exp()) * line(width + i));
            let h: Vec<f64> = h.collect();
            (0..hidden).map(|i| dot(&h, &down[i * width..][..width])).collect()
        };
        let mut sums = vec![0.0_f64; real * hidden];
        for (token, sum) in sums.chunks_exact_mut(hidden).enumerate() {
            let x = self.x[token * hidden..][..hidden].iter().map(|x| f64::from(*x));
            let x: Vec<f64> = x.collect();
            if always > 0 {
                let beside = mlp(&x, &self.always_gate_up, &self.always_down, always);
                sum.iter_mut().zip(beside).for_each(|(sum, y)| *sum += y);
            }
            for pair in token * top_k..(token + 1) * top_k {
                let expert = (self.chosen[pair] as usize).checked_sub(first);
                let Some(e) = expert.filter(|e| *e < held) else { continue };
                let up = &self.gate_up[e * 2 * inner * hidden..];
                let y = mlp(&x, up, &self.down[e * hidden * inner..], inner);
                let weight = f64::from(self.weights[pair]);
                sum.iter_mut().zip(y).for_each(|(sum, y)| *sum += weight * y);
            }
            if add {
                let before = &self.before[token * hidden..];
                sum.iter_mut().zip(before).for_each(|(sum, x)| *sum += f64::from(*x));
            }
        }
        sums
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

const fn case(padded: usize, real: usize, hidden: usize, inner: usize, always: usize) -> Case {
    Case { padded, real, hidden, inner, always, first: 0, held: 24, all: 24, top_k: 6 }
}

#[test]
fn streamed_experts_agree_with_f64() {
    let Some(device) = device() else { return };
    for case in [
        case(1, 1, 264, 56, 112),
        case(1, 1, 8, 8, 0),
        case(4, 3, 264, 56, 8),
        case(8, 8, 1024, 136, 272),
        case(8, 0, 264, 56, 8),
        Case { first: 5, held: 7, ..case(7, 7, 264, 72, 40) },
        // Nobody chooses what is here.
        Case { first: 50, held: 3, all: 24, ..case(3, 3, 264, 72, 40) },
        Case { first: 50, held: 3, all: 24, ..case(3, 3, 264, 72, 0) },
        Case { held: 1, all: 1, top_k: 1, ..case(8, 8, 520, 40, 0) },
        Case { held: 300, all: 300, top_k: 8, ..case(8, 8, 64, 16, 0) },
        Case { held: 4, all: 4, top_k: 2, ..case(2, 2, 2048, 1408, 2816) },
        // Less fits than may be under way.
        Case { held: 4, all: 4, top_k: 2, ..case(8, 8, 520, 1000, 4000) },
    ] {
        let data = Data::new(case);
        for add in [false, true] {
            let (got, expected) = (data.run(&device, case, add), data.expected(case, add));
            let (here, padding) = got.split_at(case.real * case.hidden);
            // The inner values and the sum are rounded.
            assert_near(&format!("{case:?}"), here, &expected, 1e-2);
            let before = &data.before[case.real * case.hidden..];
            assert!(padding == before || padding.iter().all(|x| x.is_nan()), "padding: {case:?}");
        }
    }
}

#[test]
fn tokens_of_streamed_experts_do_not_see_each_other() {
    let Some(device) = device() else { return };
    let all = case(8, 8, 1024, 136, 272);
    let data = Data::new(all);
    let whole = data.run(&device, all, false);
    for real in [1, 5] {
        let few = Case { real, ..all };
        assert_eq!(data.run(&device, few, false)[..real * 1024], whole[..real * 1024]);
    }
    let mut poisoned = Data::new(all);
    poisoned.x[3 * 1024 + 7] = f32::NAN;
    let got = poisoned.run(&device, all, false);
    for (token, (got, clean)) in got.chunks(1024).zip(whole.chunks(1024)).enumerate() {
        match token {
            3 => assert!(got.iter().all(|x| x.is_nan())),
            _ => assert_eq!(got, clean, "token {token}"),
        }
    }
}

#[test]
fn rings_of_both_products_fit_shared_memory() {
    for (hidden, inner, always) in
        [(8, 8, 0), (2048, 1408, 2816), (2048, 768, 0), (4096, 1536, 0), (1024, 1408, 2816)]
    {
        for rows in 1..=MOST_ROWS {
            let blocks = hidden.min(LEAST_BLOCKS);
            let ([up, down], shared) =
                rings(rows, hidden, inner, always, blocks).expect("both rings");
            assert!(shared as usize <= WHOLE && up.stages >= 2 && up.stages == down.stages);
            let (of_up, of_down) = (2 * ROWS * up.step as usize, 2 * down.step as usize);
            assert!(up.stage_bytes as usize >= of_up.max((ROWS + rows) * of_down));
            assert_eq!(up.stage_bytes, down.stage_bytes);
            assert!(up.under_way <= up.stages && up.under_way > 0, "{up:?}");
        }
    }
}
