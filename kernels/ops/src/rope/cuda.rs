//! Launches of the rotary embedding.

#[cfg(test)]
mod tests;

use super::Pairing;
use crate::cuda::{Queue, Rows, Tensor, dim, need, shape};
use crate::norm::{Heads, cuda::check_heads};
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters};

/// Mirrors `RopeParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    x: u64,
    positions: u64,
    inv_freq: u64,
    count: u64,
    rows: u32,
    row: u32,
    heads: u32,
    offset: u32,
    width: u32,
    stride: u32,
    factor: f32,
    interleaved: u32,
}
// SAFETY: mirrors the kernel's struct; heads are checked to lie inside rows, rows inside `x`.
unsafe impl Parameters for Params {}

/// Frequencies and layout, on the device.
#[derive(Clone, Copy, Debug)]
pub struct Rope<'a> {
    /// f32, one per pair.
    pub inv_freq: &'a DeviceSlice,
    /// Multiplies cosine and sine.
    pub factor: f32,
    /// Which elements form a pair.
    pub pairing: Pairing,
}

/// Rotates every head of every row, in place; `positions` is u32 `[rows]`.
///
/// # Errors
/// When heads leave their rows, an operand is too short, or the launch fails.
pub fn rope(
    on: Queue<'_>,
    rows: Rows<'_>,
    x: Tensor<'_>,
    heads: &Heads,
    positions: &DeviceSlice,
    rope: &Rope<'_>,
) -> Result<(), CudaError> {
    const OP: &str = "rope";
    /// Widest head: cosines and sines lie in shared memory.
    const MAX_WIDTH: usize = 4096;
    check_heads(OP, rows, x, heads)?;
    if !heads.width.is_multiple_of(2) || heads.width > MAX_WIDTH {
        return Err(shape(OP, format!("a width of {}", heads.width)));
    }
    need(OP, "inv_freq", rope.inv_freq, &[heads.width / 2], 4)?;
    need(OP, "positions", positions, &[rows.padded], 4)?;
    let params = Params {
        x: x.address(),
        positions: positions.address(),
        inv_freq: rope.inv_freq.address(),
        count: rows.count_address(),
        rows: dim(OP, rows.padded)?,
        row: dim(OP, heads.row)?,
        heads: dim(OP, heads.count)?,
        offset: dim(OP, heads.offset)?,
        width: dim(OP, heads.width)?,
        stride: dim(OP, heads.stride)?,
        factor: rope.factor,
        interleaved: u32::from(rope.pairing == Pairing::Interleaved),
    };
    let kernel = on.kernel(x.dtype.pick("rope_f32", "rope_bf16"))?;
    let shared = params.width * 4;
    Launch::new(kernel, [params.rows, 1, 1], 256).shared(shared).on(on.stream, &params)
}
