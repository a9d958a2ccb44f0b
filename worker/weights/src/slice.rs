//! Weights as typed numbers: borrowed as they lie in the file, or owned where they had to be made.
//!
//! It computes nothing. Invariant: a [`Slice`] is aligned for its element type.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A type that weights are stored in.
pub(crate) trait Element:
    Copy + Default + Send + Sync + FromBytes + IntoBytes + Immutable
{
    /// Rounds to nearest, ties to even.
    fn round(value: f32) -> Self;
    /// Rounds all of `from` into `to`, which is as long.
    fn round_all(from: &[f32], to: &mut [Self]) {
        to.iter_mut().zip(from).for_each(|(x, &value)| *x = Self::round(value));
    }
    /// The same value in single precision.
    fn widen(self) -> f32;
}

impl Element for f32 {
    fn round(value: f32) -> Self {
        value
    }

    fn widen(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    fn round(value: f32) -> Self {
        // What `from_f32` does, as a choice instead of a branch: loops of it become vectors.
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        Self::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
    }

    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Element for f16 {
    fn round(value: f32) -> Self {
        Self::from_f32(value)
    }

    fn round_all(from: &[f32], to: &mut [Self]) {
        // Uses the processor's conversion where there is one.
        to.convert_from_f32_slice(from);
    }

    fn widen(self) -> f32 {
        self.to_f32()
    }
}

/// The elements of a weight, row-major, in the type they are stored in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Slice<'a> {
    /// IEEE single precision.
    F32(&'a [f32]),
    /// The upper half of a single.
    Bf16(&'a [bf16]),
    /// IEEE half precision.
    F16(&'a [f16]),
}

impl<'a> Slice<'a> {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::Bf16(data) => data.len(),
            Self::F16(data) => data.len(),
        }
    }

    /// Number of bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match self {
            Self::F32(data) => size_of_val(*data) as u64,
            Self::Bf16(data) => size_of_val(*data) as u64,
            Self::F16(data) => size_of_val(*data) as u64,
        }
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All elements widened to single precision, which is exact for each of the types.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::F32(data) => data.to_vec(),
            Self::Bf16(data) => data.iter().map(|x| x.to_f32()).collect(),
            Self::F16(data) => data.iter().map(|x| x.to_f32()).collect(),
        }
    }
}

/// The elements of a weight that is not used as it lies in a file: dequantised, copied for
/// alignment, or made by the generator.
#[derive(Clone, Debug, PartialEq)]
pub enum Buffer {
    /// IEEE single precision.
    F32(Vec<f32>),
    /// The upper half of a single.
    Bf16(Vec<bf16>),
    /// IEEE half precision.
    F16(Vec<f16>),
}

impl Buffer {
    /// The elements.
    #[must_use]
    pub fn slice(&self) -> Slice<'_> {
        match self {
            Self::F32(data) => Slice::F32(data),
            Self::Bf16(data) => Slice::Bf16(data),
            Self::F16(data) => Slice::F16(data),
        }
    }
}

/// `len` zeros in pages that come when first touched, by the thread that fills them; a vector of a
/// type that is not the language's own would be written through here, by one.
///
/// # Panics
/// When memory is exhausted.
pub(crate) fn zeros<T: Element>(len: usize) -> Vec<T> {
    T::new_vec_zeroed(len).unwrap_or_else(|_| panic!("no memory for {len} elements"))
}

/// Little-endian bytes as numbers, without a copy; none where they are not aligned.
pub(crate) fn borrow<T: Element>(bytes: &[u8]) -> Option<&[T]> {
    // Nothing is aligned wherever it lies.
    if bytes.is_empty() { Some(&[]) } else { <[T]>::ref_from_bytes(bytes).ok() }
}

/// Little-endian bytes as numbers, one by one, whatever their alignment.
pub(crate) fn numbers<T: Element>(bytes: &[u8]) -> impl Iterator<Item = T> {
    bytes
        .chunks_exact(size_of::<T>())
        .map(|chunk| T::read_from_bytes(chunk).expect("a chunk is as long as the type"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All exponents and signs, mantissas around every tie, infinities and NaN.
    #[test]
    fn rounding_is_the_librarys() {
        let edges =
            [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1_7FFF, 0x1_8000, 0x7F_8000, 0x7F_FFFF];
        let values: Vec<f32> = (0..512u32)
            .flat_map(|high| edges.map(|low| f32::from_bits((high << 23) | low)))
            .collect();
        let mut halves = vec![f16::ZERO; values.len()];
        f16::round_all(&values, &mut halves);
        for (&value, half) in values.iter().zip(halves) {
            assert_eq!(bf16::round(value).to_bits(), bf16::from_f32(value).to_bits(), "{value:e}");
            assert_eq!(half.to_bits(), f16::from_f32(value).to_bits(), "{value:e}");
        }
    }
}
