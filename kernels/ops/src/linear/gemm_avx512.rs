//! Many tokens: 32 outputs at a time are transposed into a panel `[in][32]` of f32, then every
//! block of twelve tokens runs against it with 24 accumulators. The panel is made once per item and
//! used for all tokens, so widening and transposing cost one part in `tokens / 12`.

use super::gemv_avx512::{Load, lanes};
use super::{PANEL, Tile};
use crate::WeightSlice;
use crate::share::Shared;
use std::arch::x86_64::*;

/// Lanes of a register; a panel is two registers wide.
const LANES: usize = 16;

pub(super) fn run(tile: &Tile<'_>, out: &Shared<'_, f32>, panel: &mut [f32]) {
    let mut row = 0;
    while row < tile.w.rows {
        let rows = (tile.w.rows - row).min(PANEL);
        // SAFETY: this variant is selected only where AVX-512 F, BW, DQ and VL were detected.
        unsafe {
            match tile.w.data {
                WeightSlice::F32(w) => pack(w, row, rows, tile.w.cols, panel),
                WeightSlice::Bf16(w) => pack(w, row, rows, tile.w.cols, panel),
                WeightSlice::F16(w) => pack(w, row, rows, tile.w.cols, panel),
            }
            sweep(tile, row, rows, panel, out);
        }
        row += rows;
    }
}

/// `panel[k][r] = w[row + r][k]`; columns of missing rows are zero.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn pack<E: Load>(w: &[E], row: usize, rows: usize, cols: usize, panel: &mut [f32]) {
    assert!(w.len() >= (row + rows) * cols && panel.len() >= PANEL * cols, "panel and weights");
    let mut k = 0;
    while k < cols {
        let mask = lanes(cols - k);
        for half in 0..2 {
            let mut square = [_mm512_setzero_ps(); LANES];
            for (r, line) in square.iter_mut().enumerate() {
                let r = half * LANES + r;
                if r < rows {
                    // SAFETY: row `row + r` exists by the assertion, and the mask ends at `cols`.
                    *line = unsafe { E::load(w.as_ptr().add((row + r) * cols + k), mask) };
                }
            }
            let square = transpose(square);
            for (i, line) in square.iter().enumerate().take((cols - k).min(LANES)) {
                let at = (k + i) * PANEL + half * LANES;
                // SAFETY: `k + i < cols`, and the panel holds `PANEL * cols` elements.
                unsafe { _mm512_storeu_ps(panel.as_mut_ptr().add(at), *line) };
            }
        }
        k += LANES;
    }
}

/// Transposes 16 x 16 in four rounds of pairwise exchanges.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn transpose(r: [__m512; LANES]) -> [__m512; LANES] {
    let mut a = [_mm512_setzero_ps(); LANES];
    for i in 0..8 {
        a[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    let pd = |x: __m512| _mm512_castps_pd(x);
    let ps = |x: __m512d| _mm512_castpd_ps(x);
    let mut b = [_mm512_setzero_ps(); LANES];
    for i in 0..4 {
        let (p, q, s, t) = (pd(a[4 * i]), pd(a[4 * i + 1]), pd(a[4 * i + 2]), pd(a[4 * i + 3]));
        b[4 * i] = ps(_mm512_unpacklo_pd(p, s));
        b[4 * i + 1] = ps(_mm512_unpackhi_pd(p, s));
        b[4 * i + 2] = ps(_mm512_unpacklo_pd(q, t));
        b[4 * i + 3] = ps(_mm512_unpackhi_pd(q, t));
    }
    // b[4g + c] holds, in 128-bit lane l, rows 4g..4g+4 of column 4l + c.
    let mut out = [_mm512_setzero_ps(); LANES];
    for c in 0..4 {
        let low = _mm512_shuffle_f32x4::<0x44>(b[c], b[4 + c]);
        let high = _mm512_shuffle_f32x4::<0xEE>(b[c], b[4 + c]);
        let low2 = _mm512_shuffle_f32x4::<0x44>(b[8 + c], b[12 + c]);
        let high2 = _mm512_shuffle_f32x4::<0xEE>(b[8 + c], b[12 + c]);
        out[c] = _mm512_shuffle_f32x4::<0x88>(low, low2);
        out[4 + c] = _mm512_shuffle_f32x4::<0xDD>(low, low2);
        out[8 + c] = _mm512_shuffle_f32x4::<0x88>(high, high2);
        out[12 + c] = _mm512_shuffle_f32x4::<0xDD>(high, high2);
    }
    out
}

/// All tokens against one panel.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn sweep(tile: &Tile<'_>, row: usize, rows: usize, panel: &[f32], out: &Shared<'_, f32>) {
    let mut token = 0;
    while token < tile.tokens {
        let left = tile.tokens - token;
        let done = match left {
            12.. => block::<12>(tile, row, rows, token, panel, out),
            8..12 => block::<8>(tile, row, rows, token, panel, out),
            4..8 => block::<4>(tile, row, rows, token, panel, out),
            2..4 => block::<2>(tile, row, rows, token, panel, out),
            _ => block::<1>(tile, row, rows, token, panel, out),
        };
        token += done;
    }
}

/// `M` tokens x 32 outputs; returns `M`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn block<const M: usize>(
    tile: &Tile<'_>,
    row: usize,
    rows: usize,
    token: usize,
    panel: &[f32],
    out: &Shared<'_, f32>,
) -> usize {
    let cols = tile.w.cols;
    assert!(panel.len() >= cols * PANEL && tile.x.len() >= (token + M) * cols, "operands");
    let x: [*const f32; M] = std::array::from_fn(|m| tile.x[(token + m) * cols..].as_ptr());
    let mut sums = [[_mm512_setzero_ps(); 2]; M];
    let mut weights = panel.as_ptr();
    for k in 0..cols {
        // SAFETY: the panel holds `cols` lines of 32, and each x row `cols` elements (asserted).
        unsafe {
            let low = _mm512_loadu_ps(weights);
            let high = _mm512_loadu_ps(weights.add(LANES));
            for m in 0..M {
                let value = _mm512_set1_ps(*x[m].add(k));
                sums[m][0] = _mm512_fmadd_ps(value, low, sums[m][0]);
                sums[m][1] = _mm512_fmadd_ps(value, high, sums[m][1]);
            }
            weights = weights.add(PANEL);
        }
    }
    let mut line = [0.0_f32; PANEL];
    for (m, sums) in sums.iter().enumerate() {
        // SAFETY: `line` holds 32 elements.
        unsafe {
            _mm512_storeu_ps(line.as_mut_ptr(), sums[0]);
            _mm512_storeu_ps(line.as_mut_ptr().add(LANES), sums[1]);
        }
        let at = tile.at + (token + m) * tile.width + row;
        // SAFETY: items write disjoint columns; each (token, panel) is visited once.
        let cells = unsafe { out.part(at, rows) };
        for (r, (cell, sum)) in cells.iter_mut().zip(line).enumerate() {
            *cell = sum + tile.bias(row + r);
        }
    }
    M
}
