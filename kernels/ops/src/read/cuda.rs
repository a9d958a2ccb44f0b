//! The launch of the read.

#[cfg(test)]
mod tests;

use crate::cuda::{Queue, dim, need, shape};
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters};

const OP: &str = "read";
const THREADS: u32 = 512;
/// Blocks on a multiprocessor.
const BLOCKS: usize = 4;
/// Bytes of one access.
const WIDE: usize = 16;

/// Mirrors `ReadParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    from: u64,
    out: u64,
    vectors: u64,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `read`.
unsafe impl Parameters for Params {}

/// Reads all of `from` once and adds the XOR of its 32-bit words to those of `out`, one u32: a word
/// that is XORed twice is as it was.
///
/// # Errors
/// When `from` is not made of whole 16 bytes at a multiple of 16, `out` is too short, or the launch
/// fails.
pub fn read(on: Queue<'_>, from: &DeviceSlice, out: &DeviceSlice) -> Result<(), CudaError> {
    let (address, bytes) = (from.address(), from.bytes());
    if !bytes.is_multiple_of(WIDE) || !address.is_multiple_of(WIDE as u64) {
        return Err(shape(OP, format!("{bytes} bytes at {address:#x}")));
    }
    need(OP, "out", out, &[1], 4)?;
    let params = Params { from: address, out: out.address(), vectors: (bytes / WIDE) as u64 };
    let blocks = dim(OP, on.multiprocessors() * BLOCKS)?;
    Launch::new(on.kernel("read_all")?, [blocks, 1, 1], THREADS).on(on.stream, &params)
}
