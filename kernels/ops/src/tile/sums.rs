//! Weights with values: every row of the result keeps a strip of columns in registers while the
//! stored rows stream by. One source for all instruction sets below AVX-512.

use super::{Lines, Stored};
use crate::simd::fused;
use device::Isa;

/// `out[m * stride + c] += sum over t of p[m * p_stride + t] * b[t][c]`, `t` ascending.
///
/// # Panics
/// When `p` or `out` end too early for `rows` rows.
#[allow(clippy::too_many_arguments, reason = "three matrices")]
pub(crate) fn sums<E: Stored>(
    isa: Isa,
    rows: usize,
    p: &[f32],
    p_stride: usize,
    b: Lines<'_, E>,
    out: &mut [f32],
    stride: usize,
) {
    if rows == 0 || b.count == 0 {
        return;
    }
    assert!((rows - 1) * p_stride + b.count <= p.len(), "a weight per row and value");
    assert!((rows - 1) * stride + b.width <= out.len(), "rows of the result");
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an `Isa` above scalar comes from detection on this processor.
        Isa::Avx512 => unsafe { super::sums_avx512::sums(rows, p, p_stride, b, out, stride) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { avx2(rows, p, p_stride, b, out, stride) },
        _ => sweep::<false, 8, E>(rows, p, p_stride, b, out, stride),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<E: Stored>(
    rows: usize,
    p: &[f32],
    p_stride: usize,
    b: Lines<'_, E>,
    out: &mut [f32],
    stride: usize,
) {
    sweep::<true, 16, E>(rows, p, p_stride, b, out, stride);
}

/// Strips of `C` columns, then single columns; two rows at a time, which is as many as compilers
/// keep in registers.
#[inline(always)]
fn sweep<const FMA: bool, const C: usize, E: Stored>(
    rows: usize,
    p: &[f32],
    p_stride: usize,
    b: Lines<'_, E>,
    out: &mut [f32],
    stride: usize,
) {
    let mut m = 0;
    while m < rows {
        let (p, out) = (&p[m * p_stride..], &mut out[m * stride..]);
        m += match rows - m {
            1 => strips::<FMA, 1, C, E>(p, p_stride, b, out, stride),
            _ => strips::<FMA, 2, C, E>(p, p_stride, b, out, stride),
        };
    }
}

/// `M` rows of the result; returns `M`.
#[inline(always)]
fn strips<const FMA: bool, const M: usize, const C: usize, E: Stored>(
    p: &[f32],
    p_stride: usize,
    b: Lines<'_, E>,
    out: &mut [f32],
    stride: usize,
) -> usize {
    let mut c = 0;
    while c + C <= b.width {
        strip::<FMA, M, C, E>(p, p_stride, b, c, out, stride);
        c += C;
    }
    while c < b.width {
        strip::<FMA, M, 1, E>(p, p_stride, b, c, out, stride);
        c += 1;
    }
    M
}

#[inline(always)]
fn strip<const FMA: bool, const M: usize, const C: usize, E: Stored>(
    p: &[f32],
    p_stride: usize,
    b: Lines<'_, E>,
    c: usize,
    out: &mut [f32],
    stride: usize,
) {
    let mut sums: [[f32; C]; M] = std::array::from_fn(|m| {
        std::array::from_fn(|i| out[m * stride + c..m * stride + c + C][i])
    });
    let p: [&[f32]; M] = std::array::from_fn(|m| &p[m * p_stride..m * p_stride + b.count]);
    #[allow(clippy::needless_range_loop, reason = "one index into M rows of weights")]
    for t in 0..b.count {
        let line = &b.data[t * b.stride + c..t * b.stride + c + C];
        let value: [f32; C] = std::array::from_fn(|i| line[i].widen());
        for m in 0..M {
            for i in 0..C {
                sums[m][i] = fused::<FMA>(p[m][t], value[i], sums[m][i]);
            }
        }
    }
    for (m, sums) in sums.iter().enumerate() {
        out[m * stride + c..m * stride + c + C].copy_from_slice(sums);
    }
}
