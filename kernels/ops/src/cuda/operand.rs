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

/// A size as kernels take it.
pub(crate) fn dim(op: &'static str, size: usize) -> Result<u32, CudaError> {
    u32::try_from(size).map_err(|_| shape(op, format!("a dimension of {size}")))
}

/// A shape that is refused.
pub(crate) fn shape(op: &'static str, why: String) -> CudaError {
    CudaError::Shape { op, why }
}
