//! Checks of operands on the host: every size that a launch relies on, with names.

use device::cuda::{CudaError, DeviceSlice};

/// The product of `factors`.
pub(crate) fn bytes(op: &'static str, factors: &[usize]) -> Result<usize, CudaError> {
    factors
        .iter()
        .try_fold(1_usize, |product, factor| product.checked_mul(*factor))
        .ok_or_else(|| shape(op, format!("{factors:?} elements")))
}

/// Refused where `slice` has fewer than `factors` multiplied elements of `size` bytes.
pub(crate) fn need(
    op: &'static str,
    what: &'static str,
    slice: &DeviceSlice,
    factors: &[usize],
    size: usize,
) -> Result<(), CudaError> {
    let elements = bytes(op, factors)?;
    let needed = bytes(op, &[elements, size])?;
    let got = slice.bytes();
    if got < needed { Err(CudaError::Operand { op, what, needed, got }) } else { Ok(()) }
}

/// Rows that begin `stride` elements apart: rows as they are, or a part of wider ones.
#[derive(Clone, Copy, Debug)]
pub struct Strided<'a> {
    /// From the first element on.
    pub slice: &'a DeviceSlice,
    /// From row to row, in elements.
    pub stride: usize,
}

impl<'a> Strided<'a> {
    /// Rows of so many elements with nothing between them.
    #[must_use]
    pub const fn dense(slice: &'a DeviceSlice, width: usize) -> Self {
        Self { slice, stride: width }
    }

    pub(crate) fn address(self) -> u64 {
        self.slice.address()
    }

    /// Refused where it does not hold `rows` rows of as many elements of `size` bytes as `factors` multiply
    /// to.
    pub(crate) fn need(
        self,
        op: &'static str,
        what: &'static str,
        rows: usize,
        factors: &[usize],
        size: usize,
    ) -> Result<(), CudaError> {
        let width = bytes(op, factors)?;
        let Some(before) = rows.checked_sub(1) else { return Ok(()) };
        if width > self.stride {
            return Err(shape(op, format!("{what} of {width} elements every {}", self.stride)));
        }
        let all = bytes(op, &[before, self.stride])?.checked_add(width);
        let all = all.ok_or_else(|| shape(op, format!("{rows} rows of {what}")))?;
        need(op, what, self.slice, &[all], size)
    }
}

/// Whether memory of two operands has no byte in common.
pub(crate) fn apart(a: &DeviceSlice, b: &DeviceSlice) -> bool {
    let end = |of: &DeviceSlice| of.address() + of.bytes() as u64;
    end(a) <= b.address() || end(b) <= a.address()
}

/// A size as kernels take it.
pub(crate) fn dim(op: &'static str, size: usize) -> Result<u32, CudaError> {
    u32::try_from(size).map_err(|_| shape(op, format!("a dimension of {size}")))
}

/// A shape that is refused.
pub(crate) fn shape(op: &'static str, why: String) -> CudaError {
    CudaError::Shape { op, why }
}
