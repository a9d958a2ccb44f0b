//! Launches of the fill.

#[cfg(test)]
mod tests;

use super::{Normal, Stored};
use crate::cuda::{Dtype, Queue, dim, shape};
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters};

/// Threads of a block.
const THREADS: usize = 256;
/// Bytes that a thread writes at once.
const WIDE: usize = 16;

/// Mirrors `FillParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    out: u64,
    elements: u64,
    key: u64,
    start: u64,
    mean: f64,
    std: f64,
    unit: f64,
    head: u32,
    stored: u32,
}
// SAFETY: mirrors the kernel's struct; it writes `elements` elements, which `fill` takes from the
// slice's length.
unsafe impl Parameters for Params {}

/// Standard deviation of a sum of eight uniform 16-bit integers, as the processor computes it.
fn unit() -> f64 {
    65536.0 * (8.0_f64 / 12.0).sqrt()
}

/// Writes elements `start..` of a tensor as `dtype`, as many as `out` holds.
///
/// # Errors
/// When `out` is no whole number of elements or lies at no multiple of one, or the launch fails.
pub fn fill(
    on: Queue<'_>,
    values: &Normal,
    start: u64,
    dtype: Dtype,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    const OP: &str = "fill";
    let (size, bytes, address) = (dtype.size(), out.bytes(), out.address());
    if !bytes.is_multiple_of(size) || !address.is_multiple_of(size as u64) {
        return Err(shape(OP, format!("{bytes} bytes at {address:#x} as {dtype:?}")));
    }
    let elements = bytes / size;
    if elements == 0 {
        return Ok(());
    }
    // Up to the first address that a wide access may have, elements are written one by one.
    let head = (address.next_multiple_of(WIDE as u64) - address) as usize / size;
    let head = head.min(elements);
    let params = Params {
        out: address,
        elements: elements as u64,
        key: values.key,
        start,
        mean: values.mean,
        std: values.std,
        unit: unit(),
        head: dim(OP, head)?,
        stored: match values.stored {
            Stored::F32 => 0,
            Stored::Bf16 => 1,
            Stored::F16 => 2,
        },
    };
    // At least one block, which also writes what is left at both ends.
    let blocks = dim(OP, ((elements - head) * size).div_ceil(THREADS * WIDE).max(1))?;
    let kernel = on.kernel(dtype.pick("fill_f32", "fill_bf16"))?;
    Launch::new(kernel, [blocks, 1, 1], THREADS as u32).on(on.stream, &params)
}
