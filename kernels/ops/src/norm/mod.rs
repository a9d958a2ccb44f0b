//! RMS norm (Zhang and Sennrich, 2019): `x / sqrt(mean(x^2) + eps) * weight`, over whole rows, with
//! a residual sum in front, or inside the heads of a row.

pub mod cuda;

use crate::share::Shared;
use device::ThreadPool;

#[cfg(test)]
mod tests;

/// Rows of one item of the parallel loop.
const ROWS: usize = 8;

/// `out[t] = norm(x[t]) * weight`; rows have `weight.len()` elements.
///
/// # Panics
/// When the lengths do not fit.
pub fn rms_norm(pool: &ThreadPool, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    assert_eq!(x.len(), out.len(), "as many rows out as in");
    assert!(x.len().is_multiple_of(width.max(1)), "rows of {width}");
    let tokens = x.len() / width.max(1);
    let out = Shared::new(out);
    pool.run(tokens.div_ceil(ROWS), &|item| {
        for token in item * ROWS..((item + 1) * ROWS).min(tokens) {
            let x = &x[token * width..(token + 1) * width];
            // SAFETY: one row per token, each token in one item.
            let y = unsafe { out.part(token * width, width) };
            scale_into(x, weight, inverse_rms(x, eps), y);
        }
    });
}

/// `residual += delta; out = norm(residual) * weight`.
///
/// # Panics
/// When the lengths do not fit.
pub fn add_rms_norm(
    pool: &ThreadPool,
    delta: &[f32],
    residual: &mut [f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let width = weight.len();
    assert!(delta.len() == residual.len() && delta.len() == out.len(), "as many rows out as in");
    assert!(delta.len().is_multiple_of(width.max(1)), "rows of {width}");
    let tokens = delta.len() / width.max(1);
    let (residual, out) = (Shared::new(residual), Shared::new(out));
    pool.run(tokens.div_ceil(ROWS), &|item| {
        for token in item * ROWS..((item + 1) * ROWS).min(tokens) {
            let at = token * width;
            // SAFETY: one row per token in each buffer, each token in one item.
            let (sum, y) = unsafe { (residual.part(at, width), out.part(at, width)) };
            sum.iter_mut().zip(&delta[at..at + width]).for_each(|(s, d)| *s += d);
            scale_into(sum, weight, inverse_rms(sum, eps), y);
        }
    });
}

/// Heads inside rows: `width` elements from `offset` on, every `stride`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Elements of a row.
    pub row: usize,
    /// Heads worked on.
    pub count: usize,
    /// First element of the first.
    pub offset: usize,
    /// Elements worked on in each.
    pub width: usize,
    /// From one to the next.
    pub stride: usize,
}

impl Heads {
    /// Panics where a head would leave its row.
    pub(crate) fn check(&self, len: usize) {
        let end = match self.count {
            0 => 0,
            count => self.offset + (count - 1) * self.stride + self.width,
        };
        assert!(end <= self.row && self.width <= self.stride, "heads lie inside rows: {self:?}");
        assert!(len.is_multiple_of(self.row.max(1)), "rows of {}", self.row);
    }

    /// Where head `h` lies in its row.
    pub(crate) fn range(&self, h: usize) -> std::ops::Range<usize> {
        let start = self.offset + h * self.stride;
        start..start + self.width
    }
}

/// Norms each head by itself, in place; `weight` is shared by all heads.
///
/// # Panics
/// When heads leave their rows or `weight` is not `[heads.width]`.
pub fn head_norm(pool: &ThreadPool, x: &mut [f32], heads: &Heads, weight: &[f32], eps: f32) {
    heads.check(x.len());
    assert_eq!(weight.len(), heads.width, "one weight per element of a head");
    let tokens = x.len() / heads.row.max(1);
    let x = Shared::new(x);
    pool.run(tokens.div_ceil(ROWS), &|item| {
        for token in item * ROWS..((item + 1) * ROWS).min(tokens) {
            // SAFETY: one row per token, each token in one item.
            let row = unsafe { x.part(token * heads.row, heads.row) };
            for h in 0..heads.count {
                let head = &mut row[heads.range(h)];
                let scale = inverse_rms(head, eps);
                head.iter_mut().zip(weight).for_each(|(x, w)| *x = *x * scale * w);
            }
        }
    });
}

/// `1 / sqrt(mean(x^2) + eps)`, the mean in eight partial sums.
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mut sums = [0.0_f32; 8];
    let (chunks, rest) = x.as_chunks::<8>();
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += x * x;
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        *sum += x * x;
    }
    let mean = sums.iter().sum::<f32>() / x.len() as f32;
    1.0 / (mean + eps).sqrt()
}

fn scale_into(x: &[f32], weight: &[f32], scale: f32, y: &mut [f32]) {
    for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
        *y = x * scale * w;
    }
}
