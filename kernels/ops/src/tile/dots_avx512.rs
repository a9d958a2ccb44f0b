//! Queries with keys on AVX-512: up to four rows of each at a time, a register of partial sums per
//! pair, folded four pairs at once.

use super::{Lines, Stored};
use crate::linear::lanes;
use std::arch::x86_64::*;

/// Lanes of a register.
const LANES: usize = 16;
/// Rows of `b` computed together.
const COLS: usize = 4;

/// # Panics
/// Never for what [`super::dots`] passes on.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn dots<E: Stored>(
    a: Lines<'_, f32>,
    b: Lines<'_, E>,
    scale: f32,
    out: &mut [f32],
    stride: usize,
) {
    for n in (0..b.count).step_by(COLS) {
        let mut m = 0;
        while m < a.count {
            m += match a.count - m {
                1 => block::<E, 1>(a, b, m, n, scale, out, stride),
                2 => block::<E, 2>(a, b, m, n, scale, out, stride),
                3 => block::<E, 3>(a, b, m, n, scale, out, stride),
                _ => block::<E, 4>(a, b, m, n, scale, out, stride),
            };
        }
    }
}

/// Rows `m..m + M` with rows `n..n + 4`, as far as they exist; returns `M`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn block<E: Stored, const M: usize>(
    a: Lines<'_, f32>,
    b: Lines<'_, E>,
    m: usize,
    n: usize,
    scale: f32,
    out: &mut [f32],
    stride: usize,
) -> usize {
    let cols = (b.count - n).min(COLS);
    let a_at: [*const f32; M] = std::array::from_fn(|i| a.line(m + i).as_ptr());
    // A missing row repeats the last one; its sums are not stored.
    let b_at: [*const E; COLS] = std::array::from_fn(|j| b.line(n + j.min(cols - 1)).as_ptr());
    let mut sums = [[_mm512_setzero_ps(); COLS]; M];
    let mut k = 0;
    while k < a.width {
        let mask = lanes(a.width - k);
        // SAFETY: every row has `a.width` elements, and the mask ends there.
        let left: [__m512; M] =
            std::array::from_fn(|i| unsafe { _mm512_maskz_loadu_ps(mask, a_at[i].add(k)) });
        for j in 0..COLS {
            // SAFETY: as above; `b` has rows of the same width.
            let right = unsafe { E::load(b_at[j].add(k), mask) };
            for i in 0..M {
                sums[i][j] = _mm512_fmadd_ps(left[i], right, sums[i][j]);
            }
        }
        k += LANES;
    }
    let scale = _mm_set1_ps(scale);
    for (i, sums) in sums.into_iter().enumerate() {
        let at = (m + i) * stride + n;
        let cells = &mut out[at..at + cols];
        // SAFETY: `cells` has `cols` elements, and the mask names no more.
        unsafe {
            let mask = (1_u8 << cols) - 1;
            _mm_mask_storeu_ps(cells.as_mut_ptr(), mask, _mm_mul_ps(fold(sums), scale));
        }
    }
    M
}

/// The sums of four registers.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn fold([a, b, c, d]: [__m512; COLS]) -> __m128 {
    let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
    let high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
    // Each 128-bit lane now holds a quarter of [a, b, c, d].
    let lanes = _mm512_add_ps(low, high);
    let half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps::<1>(lanes));
    _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half))
}
