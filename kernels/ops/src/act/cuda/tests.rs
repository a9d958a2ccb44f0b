//! Element-wise ops on the device against f64.

use super::*;
use crate::cuda::testing::{DTYPES, assert_near, device, rounded, rounding};
use crate::testing::Random;

#[test]
fn the_gate_goes_through_the_activation_and_up_does_not() {
    let Some(device) = device() else { return };
    for dtype in DTYPES {
        for (rows, n) in [(0, 4), (1, 1), (3, 5), (65, 17), (2, 10944), (32_770, 8)] {
            let x: Vec<f32> = Random::new(3).vector(2 * rows * n).iter().map(|x| x * 8.0).collect();
            let x = rounded(&x, dtype);
            let sent = device.send_as(&x, dtype);
            let out = device.poisoned(rows * n * dtype.size());
            silu_mul(device.queue(), Rows::exactly(rows), n, Tensor::new(&sent, dtype), &out)
                .expect("a launch");
            let expected: Vec<f64> = (0..rows * n)
                .map(|i| {
                    let row = &x[i / n * 2 * n..];
                    let (gate, up) = (f64::from(row[i % n]), f64::from(row[n + i % n]));
                    gate / (1.0 + (-gate).exp()) * up
                })
                .collect();
            assert_near("silu_mul", &device.fetch_as(&out, dtype), &expected, rounding(dtype));
        }
    }
}

#[test]
fn a_sum_covers_every_real_element() {
    let Some(device) = device() else { return };
    for dtype in DTYPES {
        for (real, padded, width) in [(0, 1, 3), (1, 1, 1), (3, 4, 2048), (1000, 1001, 9)] {
            let mut random = Random::new(4);
            let x = rounded(&random.vector(padded * width), dtype);
            let y = rounded(&random.vector(padded * width), dtype);
            let (x_sent, y_sent) = (device.send_as(&x, dtype), device.send_as(&y, dtype));
            let count = device.send(&[real as u32]);
            let rows = Rows { padded, count: Some(&count) };
            add(device.queue(), rows, width, Tensor::new(&x_sent, dtype), &y_sent)
                .expect("a launch");
            let sum = (0..padded * width).map(|i| y[i] + if i < real * width { x[i] } else { 0.0 });
            let sum = rounded(&sum.collect::<Vec<_>>(), dtype);
            assert_eq!(device.fetch_as(&y_sent, dtype), sum);
        }
    }
}
