//! Rotation on the device against f64.

use super::*;
use crate::cuda::testing::{DTYPES, assert_near, device, rounded, rounding};
use crate::testing::Random;

#[test]
fn heads_turn_by_position_in_both_pairings() {
    let Some(device) = device() else { return };
    for dtype in DTYPES {
        for (width, count) in [(2, 1), (6, 3), (64, 16), (128, 2)] {
            let inv_freq: Vec<f32> =
                (0..width / 2).map(|i| 1e4_f32.powf(-2.0 * i as f32 / width as f32)).collect();
            let heads =
                Heads { row: count * (width + 3) + 1, count, offset: 1, width, stride: width + 3 };
            let positions = [0_u32, 1, 63, 64, 4095, 100_000, 160_000];
            let x = rounded(&Random::new(3).vector(heads.row * positions.len()), dtype);
            for pairing in [Pairing::Halves, Pairing::Interleaved] {
                let sent = device.send_as(&x, dtype);
                let (frequencies, at) = (device.send(&inv_freq), device.send(&positions));
                let table = Rope { inv_freq: &frequencies, factor: 1.25, pairing };
                let rows = Rows::exactly(positions.len());
                let tensor = Tensor::new(&sent, dtype);
                rope(device.queue(), rows, tensor, &heads, &at, &table).expect("a launch");
                let mut expected: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                for (token, position) in positions.into_iter().enumerate() {
                    for h in 0..count {
                        for (i, frequency) in inv_freq.iter().enumerate() {
                            let angle = f64::from(position as f32 * frequency);
                            let start = token * heads.row + heads.range(h).start;
                            let (a, b) = match pairing {
                                Pairing::Halves => (start + i, start + i + width / 2),
                                Pairing::Interleaved => (start + 2 * i, start + 2 * i + 1),
                            };
                            let (u, v) = (f64::from(x[a]), f64::from(x[b]));
                            expected[a] = (u * angle.cos() - v * angle.sin()) * 1.25;
                            expected[b] = (v * angle.cos() + u * angle.sin()) * 1.25;
                        }
                    }
                }
                assert_near("rope", &device.fetch_as(&sent, dtype), &expected, rounding(dtype));
            }
        }
    }
}
