//! Norms on the device against f64.

use super::*;
use crate::cuda::testing::{DTYPES, assert_near, device, rounded, rounding};
use crate::testing::Random;

const EPS: f32 = 1e-5;

fn norm(x: &[f32], weight: &[f32]) -> Vec<f64> {
    let square: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
    let scale = 1.0 / (square / x.len() as f64 + f64::from(EPS)).sqrt();
    x.iter().zip(weight).map(|(x, w)| f64::from(*x) * scale * f64::from(*w)).collect()
}

#[test]
fn rows_agree_with_f64_and_padding_is_left_alone() {
    let Some(device) = device() else { return };
    for dtype in DTYPES {
        // A thread keeps one or two vectors of a row, or reads it twice.
        for (real, padded, width) in [
            (1, 1, 1),
            (3, 5, 7),
            (2, 2, 2048),
            (9, 12, 1000),
            (0, 4, 64),
            (3, 4, 4096),
            (2, 3, 5000),
            (2, 2, 4104),
        ] {
            let mut random = Random::new(5);
            let x = rounded(&random.vector(padded * width), dtype);
            let weight = random.vector(width);
            let (x_sent, w_sent) = (device.send_as(&x, dtype), device.send(&weight));
            let count = device.send(&[real as u32]);
            let out = device.poisoned(x_sent.bytes());
            let rows = Rows { padded, count: Some(&count) };
            rms_norm(device.queue(), rows, width, Tensor::new(&x_sent, dtype), &w_sent, EPS, &out)
                .expect("a launch");
            let got = device.fetch_as(&out, dtype);
            let expected: Vec<f64> =
                x.chunks_exact(width).take(real).flat_map(|x| norm(x, &weight)).collect();
            assert_near("rms_norm", &got[..real * width], &expected, rounding(dtype));
            assert!(got[real * width..].iter().all(|x| x.is_nan()), "padding is not written");
        }
    }
}

#[test]
fn the_residual_is_summed_stored_and_normed() {
    let Some(device) = device() else { return };
    for dtype in DTYPES {
        for (rows, width) in [(1, 3), (4, 2048), (3, 515), (5, 4096), (2, 7168)] {
            let mut random = Random::new(6);
            let delta = rounded(&random.vector(rows * width), dtype);
            let residual = rounded(&random.vector(rows * width), dtype);
            let weight = random.vector(width);
            let delta_sent = device.send_as(&delta, dtype);
            let residual_sent = device.send_as(&residual, dtype);
            let weight_sent = device.send(&weight);
            let out = device.poisoned(delta_sent.bytes());
            let x = Tensor::new(&delta_sent, dtype);
            let queue = device.queue();
            let rows = Rows::exactly(rows);
            add_rms_norm(queue, rows, width, x, &residual_sent, &weight_sent, EPS, &out)
                .expect("a launch");
            let sum: Vec<f32> = delta.iter().zip(&residual).map(|(a, b)| a + b).collect();
            let sum = rounded(&sum, dtype);
            assert_eq!(device.fetch_as(&residual_sent, dtype), sum);
            let expected: Vec<f64> =
                sum.chunks_exact(width).flat_map(|x| norm(x, &weight)).collect();
            assert_near("add_rms_norm", &device.fetch_as(&out, dtype), &expected, rounding(dtype));
        }
    }
}

#[test]
fn heads_are_normed_by_themselves_and_nothing_else_is_touched() {
    let Some(device) = device() else { return };
    for dtype in DTYPES {
        for (rows, count, width) in [(1, 1, 1), (3, 5, 33), (7, 4, 128)] {
            let heads =
                Heads { row: count * (width + 3) + 2, count, offset: 2, width, stride: width + 3 };
            let mut random = Random::new(7);
            let x = rounded(&random.vector(rows * heads.row), dtype);
            let weight = random.vector(width);
            let (sent, w_sent) = (device.send_as(&x, dtype), device.send(&weight));
            let tensor = Tensor::new(&sent, dtype);
            head_norm(device.queue(), Rows::exactly(rows), tensor, &heads, &w_sent, EPS)
                .expect("a launch");
            let mut expected: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            for row in 0..rows {
                for h in 0..count {
                    let at = heads.range(h);
                    let at = row * heads.row + at.start..row * heads.row + at.end;
                    expected[at.clone()].copy_from_slice(&norm(&x[at], &weight));
                }
            }
            assert_near("head_norm", &device.fetch_as(&sent, dtype), &expected, rounding(dtype));
        }
    }
}
