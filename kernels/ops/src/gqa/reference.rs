//! Attention of one row and head, in f64 over unpaged KV rows: scores, softmax, weighted sum.

use super::Gqa;

pub(super) fn row(q: &[f32], kv: &[f32], shape: &Gqa, position: usize, head: usize) -> Vec<f64> {
    let row = 2 * shape.kv_heads * shape.head_dim;
    let kv_head = head / (shape.heads / shape.kv_heads);
    let begin = shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
    let key = |t: usize| &kv[t * row + kv_head * shape.head_dim..][..shape.head_dim];
    let value =
        |t: usize| &kv[t * row + (shape.kv_heads + kv_head) * shape.head_dim..][..shape.head_dim];
    let scores: Vec<f64> = (begin..=position)
        .map(|t| {
            let product: f64 =
                q.iter().zip(key(t)).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            product * f64::from(shape.scale)
        })
        .collect();
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
    let mass: f64 = weights.iter().sum();
    (0..shape.head_dim)
        .map(|d| {
            weights.iter().zip(begin..).map(|(w, t)| w * f64::from(value(t)[d])).sum::<f64>() / mass
        })
        .collect()
}
