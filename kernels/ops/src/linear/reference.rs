//! The product in f64, one element after another.

use crate::Matrix;

pub(super) fn linear(x: &[f32], tokens: usize, w: &[Matrix<'_>], bias: Option<&[f32]>) -> Vec<f64> {
    let mut out = Vec::new();
    for token in 0..tokens {
        for part in w {
            for row in 0..part.rows {
                let mut sum = bias.map_or(0.0, |bias| f64::from(bias[out.len() % bias.len()]));
                for col in 0..part.cols {
                    let x = x[token * part.cols + col];
                    sum += f64::from(x) * f64::from(part.data.get(row * part.cols + col));
                }
                out.push(sum);
            }
        }
    }
    out
}
