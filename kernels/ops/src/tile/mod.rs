//! The two small matrix products that attention is made of: queries with keys (`a b^T`), and
//! weights with values (`p b`), for a few rows against up to a block of stored rows.
//!
//! `b` is read in the type it is stored in. Invariant: an element of a result is summed in an order
//! that depends on the instruction set alone, not on how many rows are computed together, so that
//! one query row gives the same bits alone and among others.

#[cfg(target_arch = "x86_64")]
mod dots_avx512;
mod sums;
#[cfg(target_arch = "x86_64")]
mod sums_avx512;
#[cfg(test)]
mod tests;

pub(crate) use sums::sums;

use crate::simd::{Element, dot};
use device::Isa;

/// Elements that both products can read.
#[cfg(target_arch = "x86_64")]
pub(crate) trait Stored: Element + crate::linear::Load + Sync {}
#[cfg(target_arch = "x86_64")]
impl<E: Element + crate::linear::Load + Sync> Stored for E {}
/// Elements that both products can read.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) trait Stored: Element + Sync {}
#[cfg(not(target_arch = "x86_64"))]
impl<E: Element + Sync> Stored for E {}

/// Equally long rows at equal distances.
#[derive(Clone, Copy)]
pub(crate) struct Lines<'a, E> {
    data: &'a [E],
    count: usize,
    width: usize,
    stride: usize,
}

impl<'a, E> Lines<'a, E> {
    /// `count` rows of `width` elements, the first at the start of `data`.
    ///
    /// # Panics
    /// When `data` ends before the last row does.
    pub(crate) fn new(data: &'a [E], count: usize, width: usize, stride: usize) -> Self {
        let end = if count == 0 { 0 } else { (count - 1) * stride + width };
        assert!(end <= data.len(), "{count} rows of {width} every {stride} in {}", data.len());
        Self { data, count, width, stride }
    }

    /// Row `i`.
    pub(crate) fn line(&self, i: usize) -> &'a [E] {
        &self.data[i * self.stride..i * self.stride + self.width]
    }

    /// Some consecutive rows.
    pub(crate) fn lines(&self, range: std::ops::Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.count, "rows of the block");
        let start = (range.start * self.stride).min(self.data.len());
        Self { data: &self.data[start..], count: range.len(), ..*self }
    }
}

/// `out[m * stride + n] = scale * a[m] . b[n]`.
///
/// # Panics
/// When the rows differ in width or `out` ends too early.
pub(crate) fn dots<E: Stored>(
    isa: Isa,
    a: Lines<'_, f32>,
    b: Lines<'_, E>,
    scale: f32,
    out: &mut [f32],
    stride: usize,
) {
    assert_eq!(a.width, b.width, "rows of one width");
    if a.count == 0 || b.count == 0 {
        return;
    }
    assert!(b.count <= stride && (a.count - 1) * stride + b.count <= out.len(), "products");
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: this instruction set comes from detection on this processor.
        Isa::Avx512 => unsafe { dots_avx512::dots(a, b, scale, out, stride) },
        _ => {
            for m in 0..a.count {
                for n in 0..b.count {
                    out[m * stride + n] = scale * dot(isa, a.line(m), b.line(n));
                }
            }
        }
    }
}
