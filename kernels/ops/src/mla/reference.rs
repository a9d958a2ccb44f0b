//! Attention of one row and head as the paper writes it, in f64: every latent expanded to its key
//! and value, scores, softmax, weighted sum.

use super::Mla;

pub(super) fn row(
    q: &[f32],
    kv: &[f32],
    kv_b: &[f32],
    shape: &Mla,
    position: usize,
    head: usize,
) -> Vec<f64> {
    let Mla { nope, rope, v, latent, scale, .. } = *shape;
    let line = |t: usize| &kv[t * (latent + rope)..][..latent + rope];
    let expand = |t: usize, row: usize| -> f64 {
        let w = &kv_b[(head * (nope + v) + row) * latent..][..latent];
        line(t).iter().zip(w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let scores: Vec<f64> = (0..=position)
        .map(|t| {
            let plain: f64 = (0..nope).map(|n| f64::from(q[n]) * expand(t, n)).sum();
            let turned: f64 =
                (0..rope).map(|r| f64::from(q[nope + r]) * f64::from(line(t)[latent + r])).sum();
            (plain + turned) * f64::from(scale)
        })
        .collect();
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
    let mass: f64 = weights.iter().sum();
    (0..v)
        .map(|i| weights.iter().enumerate().map(|(t, w)| w * expand(t, nope + i)).sum::<f64>())
        .map(|sum| sum / mass)
        .collect()
}
