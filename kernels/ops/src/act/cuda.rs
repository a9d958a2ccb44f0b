//! Launches of the element-wise ops.

#[cfg(test)]
mod tests;

use crate::cuda::{Queue, Rows, Tensor, bytes, dim, need};
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters};

/// Mirrors `ActParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    x: u64,
    out: u64,
    count: u64,
    rows: u32,
    width: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked before it is made.
unsafe impl Parameters for Params {}

/// `out[t] = silu(gate[t]) * up[t]`, where a row of `gate_up` is gate then up, `width` each.
///
/// # Errors
/// When an operand is too short, or the launch fails.
pub fn silu_mul(
    on: Queue<'_>,
    rows: Rows<'_>,
    width: usize,
    gate_up: Tensor<'_>,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    const OP: &str = "silu_mul";
    gate_up.need(OP, "gate_up", &[rows.padded, 2, width])?;
    launch(on, OP, gate_up.dtype.pick("silu_mul_f32", "silu_mul_bf16"), rows, width, gate_up, out)
}

/// `target += x`, `[rows, width]` each.
///
/// # Errors
/// When an operand is too short, or the launch fails.
pub fn add(
    on: Queue<'_>,
    rows: Rows<'_>,
    width: usize,
    x: Tensor<'_>,
    target: &DeviceSlice,
) -> Result<(), CudaError> {
    const OP: &str = "add";
    x.need(OP, "x", &[rows.padded, width])?;
    launch(on, OP, x.dtype.pick("add_f32", "add_bf16"), rows, width, x, target)
}

fn launch(
    on: Queue<'_>,
    op: &'static str,
    kernel: &'static str,
    rows: Rows<'_>,
    width: usize,
    x: Tensor<'_>,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    /// Elements that one thread handles at a time, at most.
    const WIDE: usize = 8;
    /// Blocks of a grid, at most; threads go round.
    const BLOCKS: usize = 4096;
    need(op, "out", out, &[rows.padded, width], x.dtype.size())?;
    let params = Params {
        x: x.address(),
        out: out.address(),
        count: rows.count_address(),
        rows: dim(op, rows.padded)?,
        width: dim(op, width)?,
    };
    let blocks = bytes(op, &[rows.padded, width])?.div_ceil(256 * WIDE).min(BLOCKS);
    Launch::new(on.kernel(kernel)?, [blocks as u32, 1, 1], 256).dependent().on(on.stream, &params)
}
