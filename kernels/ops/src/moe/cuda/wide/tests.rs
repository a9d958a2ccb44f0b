//! That no token's result depends on the others: bit for bit, whatever they hold and choose.

use crate::cuda::testing::{Device, device};
use crate::cuda::{Dtype, Rows, Tensor};
use crate::moe::cuda::{ExpertWeights, Routing, Scratch, experts};
use crate::testing::Random;
use device::cuda::{Arena, DeviceMemory};

const HIDDEN: usize = 272;
const INTERMEDIATE: usize = 200;
const EXPERTS: usize = 12;
const TOP_K: usize = 3;
const DTYPE: Dtype = Dtype::Bf16;

struct Layer {
    gate_up: device::cuda::DeviceSlice,
    down: device::cuda::DeviceSlice,
}

fn run(device: &Device, layer: &Layer, x: &[f32], chosen: &[u32]) -> Vec<u32> {
    let rows = x.len() / HIDDEN;
    let x = device.send_as(x, DTYPE);
    let chosen = device.send(chosen);
    let weights = device.send(&vec![0.25_f32; rows * TOP_K]);
    let out = device.poisoned(rows * HIDDEN * DTYPE.size());
    let bytes = Scratch::bytes(DTYPE, rows, TOP_K, EXPERTS, HIDDEN, INTERMEDIATE);
    let memory = DeviceMemory::allocate(&device.context, "scratch", bytes).expect("memory");
    device.stream.fill(&memory, 0xFF).expect("a fill");
    let mut arena = Arena::new(memory);
    let scratch = Scratch::take(&mut arena, DTYPE, rows, TOP_K, EXPERTS, HIDDEN, INTERMEDIATE)
        .expect("an arena of that size");
    let routing = Routing { chosen: &chosen, weights: &weights, top_k: TOP_K };
    let here = ExpertWeights {
        first: 0,
        held: EXPERTS,
        gate_up: Tensor::new(&layer.gate_up, DTYPE),
        down: &layer.down,
        hidden: HIDDEN,
        intermediate: INTERMEDIATE,
    };
    experts(device.queue(), Rows::exactly(rows), &x, &routing, &here, &out, &scratch)
        .expect("a launch");
    device.fetch_as(&out, DTYPE).into_iter().map(f32::to_bits).collect()
}

/// A token of NaN whose choices crowd experts that others use, in two launches and in one.
#[test]
fn other_tokens_change_no_bit_of_a_result() {
    let Some(device) = device() else { return };
    let mut random = Random::new(3);
    let mut weights = |len: usize, inputs: usize| {
        let size = (3.0 / inputs as f32).sqrt();
        let values: Vec<f32> = random.vector(len).iter().map(|w| w * size).collect();
        device.send_as(&values, DTYPE)
    };
    let layer = Layer {
        gate_up: weights(EXPERTS * 2 * INTERMEDIATE * HIDDEN, HIDDEN),
        down: weights(EXPERTS * HIDDEN * INTERMEDIATE, INTERMEDIATE),
    };
    for rows in [9_usize, 17, 63, 65, 200, 500] {
        let mut random = Random::new(rows as u64);
        let mut x = random.vector(rows * HIDDEN);
        let mut chosen = Vec::new();
        for _ in 0..rows {
            let start = random.below(EXPERTS / 2);
            chosen.extend((0..TOP_K).map(|j| (start + 2 * j) as u32));
        }
        let clean = run(&device, &layer, &x, &chosen);
        assert!(clean.iter().all(|bits| !f32::from_bits(*bits).is_nan()), "{rows} rows");
        let bad = rows / 2;
        x[bad * HIDDEN..(bad + 1) * HIDDEN].fill(f32::NAN);
        for (j, choice) in chosen[bad * TOP_K..(bad + 1) * TOP_K].iter_mut().enumerate() {
            *choice = (EXPERTS - 1 - j) as u32;
        }
        let planted = run(&device, &layer, &x, &chosen);
        for row in 0..rows {
            let (a, b) = (&clean[row * HIDDEN..][..HIDDEN], &planted[row * HIDDEN..][..HIDDEN]);
            if row == bad {
                assert!(b.iter().all(|bits| f32::from_bits(*bits).is_nan()), "row {row} of {rows}");
            } else {
                assert_eq!(a, b, "row {row} of {rows}");
            }
        }
    }
}
