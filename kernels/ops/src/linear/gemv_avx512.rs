//! Few tokens: each weight is read once from memory, widened in registers and used for up to four
//! tokens. Four outputs at a time keep four streams in flight. One accumulator per (output, token),
//! so the order of a sum does not depend on how many tokens there are.

use super::Tile;
use crate::WeightSlice;
use crate::share::Shared;
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Outputs computed together.
const ROWS: usize = 4;
/// Tokens computed together.
const TOKENS: usize = 4;
/// Lanes of a register.
const LANES: usize = 16;

/// Sixteen elements widened to f32.
pub(crate) trait Load: Copy {
    /// # Safety
    /// `at` must be readable for the elements that `mask` names; AVX-512 F, BW and VL must exist.
    unsafe fn load(at: *const Self, mask: __mmask16) -> __m512;
}

impl Load for f32 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(at: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_maskz_loadu_ps(mask, at) }
    }
}

impl Load for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(at: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's promise; masked-out elements are not read.
        let raw = unsafe { _mm256_maskz_loadu_epi16(mask, at.cast()) };
        // bfloat16 is the upper half of an f32.
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(raw)))
    }
}

impl Load for f16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(at: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's promise; masked-out elements are not read.
        let raw = unsafe { _mm256_maskz_loadu_epi16(mask, at.cast()) };
        _mm512_cvtph_ps(raw)
    }
}

pub(super) fn run(tile: &Tile<'_>, out: &Shared<'_, f32>) {
    // SAFETY: this variant is selected only where AVX-512 F, BW, DQ and VL were detected.
    unsafe {
        match tile.w.data {
            WeightSlice::F32(w) => stream(tile, w, out),
            WeightSlice::Bf16(w) => stream(tile, w, out),
            WeightSlice::F16(w) => stream(tile, w, out),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn stream<E: Load>(tile: &Tile<'_>, w: &[E], out: &Shared<'_, f32>) {
    let mut row = 0;
    while row < tile.w.rows {
        let rows = (tile.w.rows - row).min(ROWS);
        let mut token = 0;
        while token < tile.tokens {
            let tokens = (tile.tokens - token).min(TOKENS);
            match tokens {
                1 => block::<E, 1>(tile, w, row, rows, token, out),
                2 => block::<E, 2>(tile, w, row, rows, token, out),
                3 => block::<E, 3>(tile, w, row, rows, token, out),
                _ => block::<E, 4>(tile, w, row, rows, token, out),
            }
            token += tokens;
        }
        row += rows;
    }
}

/// `rows` (at most four) outputs for `T` tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn block<E: Load, const T: usize>(
    tile: &Tile<'_>,
    w: &[E],
    row: usize,
    rows: usize,
    token: usize,
    out: &Shared<'_, f32>,
) {
    let cols = tile.w.cols;
    // A missing row repeats the last one; its sums are not written.
    let w_at: [*const E; ROWS] =
        std::array::from_fn(|r| w[(row + r.min(rows - 1)) * cols..].as_ptr());
    let x_at: [*const f32; T] = std::array::from_fn(|t| tile.x[(token + t) * cols..].as_ptr());
    let mut sums = [[_mm512_setzero_ps(); T]; ROWS];
    let mut k = 0;
    while k < cols {
        let mask = lanes(cols - k);
        for r in 0..ROWS {
            // SAFETY: row `r` has `cols` elements, and the mask ends at `cols`.
            let weights = unsafe { E::load(w_at[r].add(k), mask) };
            for t in 0..T {
                // SAFETY: row `token + t` of x has `cols` elements, and the mask ends at `cols`.
                let x = unsafe { _mm512_maskz_loadu_ps(mask, x_at[t].add(k)) };
                sums[r][t] = _mm512_fmadd_ps(weights, x, sums[r][t]);
            }
        }
        k += LANES;
    }
    for (r, sums) in sums.iter().enumerate().take(rows) {
        for (t, sum) in sums.iter().enumerate() {
            let at = tile.at + (token + t) * tile.width + row + r;
            // SAFETY: items write disjoint columns; each (token, row) is visited once.
            let cell = unsafe { out.part(at, 1) };
            cell[0] = _mm512_reduce_add_ps(*sum) + tile.bias(row + r);
        }
    }
}

/// The mask of the next register when `left` elements are left.
#[inline]
pub(crate) fn lanes(left: usize) -> __mmask16 {
    if left >= LANES { u16::MAX } else { (1 << left) - 1 }
}
