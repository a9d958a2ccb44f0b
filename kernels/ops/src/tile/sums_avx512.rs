//! Weights with values on AVX-512: a strip of two registers for each of up to eight rows stays in
//! registers while the stored rows stream by.

use super::{Lines, Stored};
use crate::linear::lanes;
use std::arch::x86_64::*;

/// Lanes of a register.
const LANES: usize = 16;
/// Columns of a strip.
const STRIP: usize = 2 * LANES;

/// # Panics
/// Never for what [`super::sums`] passes on.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn sums<E: Stored>(
    rows: usize,
    p: &[f32],
    p_stride: usize,
    b: Lines<'_, E>,
    out: &mut [f32],
    stride: usize,
) {
    for column in (0..b.width).step_by(STRIP) {
        let mut m = 0;
        while m < rows {
            let (p, out) = (&p[m * p_stride..], &mut out[m * stride + column..]);
            m += match rows - m {
                1 => strip::<E, 1>(p, p_stride, b, column, out, stride),
                2 | 3 => strip::<E, 2>(p, p_stride, b, column, out, stride),
                4..8 => strip::<E, 4>(p, p_stride, b, column, out, stride),
                _ => strip::<E, 8>(p, p_stride, b, column, out, stride),
            };
        }
    }
}

/// Up to 32 columns of `M` rows; returns `M`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn strip<E: Stored, const M: usize>(
    p: &[f32],
    p_stride: usize,
    b: Lines<'_, E>,
    column: usize,
    out: &mut [f32],
    stride: usize,
) -> usize {
    let cols = (b.width - column).min(STRIP);
    let masks = [lanes(cols), lanes(cols.saturating_sub(LANES))];
    // An empty high half is addressed at the low one, and nothing is read or written there.
    let high = if cols > LANES { LANES } else { 0 };
    let p_at: [*const f32; M] =
        std::array::from_fn(|m| p[m * p_stride..m * p_stride + b.count].as_ptr());
    assert!((M - 1) * stride + cols <= out.len(), "rows of the result");
    assert!((b.count - 1) * b.stride + b.width <= b.data.len(), "stored rows");
    let start = out.as_mut_ptr();
    // SAFETY: row `m` of the result has `cols` columns from `m * stride` on (asserted), and the
    // masks end there.
    let mut sums: [[__m512; 2]; M] = std::array::from_fn(|m| unsafe {
        let row = start.add(m * stride);
        [_mm512_maskz_loadu_ps(masks[0], row), _mm512_maskz_loadu_ps(masks[1], row.add(high))]
    });
    for t in 0..b.count {
        // SAFETY: stored row `t` has `b.width` elements (asserted), of which the masks name those
        // from `column` on; every `p` row has `b.count` elements (sliced above).
        unsafe {
            let line = b.data.as_ptr().add(t * b.stride + column);
            let values = [E::load(line, masks[0]), E::load(line.add(high), masks[1])];
            for m in 0..M {
                let weight = _mm512_set1_ps(*p_at[m].add(t));
                sums[m][0] = _mm512_fmadd_ps(weight, values[0], sums[m][0]);
                sums[m][1] = _mm512_fmadd_ps(weight, values[1], sums[m][1]);
            }
        }
    }
    for (m, sums) in sums.into_iter().enumerate() {
        // SAFETY: as for the loads of the result.
        unsafe {
            let row = start.add(m * stride);
            _mm512_mask_storeu_ps(row, masks[0], sums[0]);
            _mm512_mask_storeu_ps(row.add(high), masks[1], sums[1]);
        }
    }
    M
}
