//! The product in f64, one element after another.

use crate::Matrix;

pub(super) fn linear(x: &[f32], tokens: usize, w: &[Matrix<'_>], biases: &[&[f32]]) -> Vec<f64> {
    let mut out = Vec::new();
    for token in 0..tokens {
        for (index, part) in w.iter().enumerate() {
            for row in 0..part.rows {
                let mut sum = biases.get(index).map_or(0.0, |bias| f64::from(bias[row]));
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
