//! Launches of the element-wise ops.

#[cfg(test)]
mod tests;

use crate::cuda::{Queue, Rows, Tensor, bytes, dim, need};
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters};

/// Elements that one thread handles at a time, at most, and threads of a block.
const WIDE: usize = 8;
const THREADS: usize = 256;
/// Blocks of a grid, and along its rows, at most; threads go round.
const BLOCKS: usize = 4096;
const ROWS: usize = 32_768;

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
    let kernel = gate_up.dtype.pick("silu_mul_f32", "silu_mul_bf16");
    let of_row = width.div_ceil(THREADS * WIDE);
    launch(on, OP, kernel, rows, width, gate_up, out, [of_row, rows.padded.min(ROWS), 1])
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
    let blocks = bytes(OP, &[rows.padded, width])?.div_ceil(THREADS * WIDE).min(BLOCKS);
    launch(on, OP, x.dtype.pick("add_f32", "add_bf16"), rows, width, x, target, [blocks, 1, 1])
}

#[allow(clippy::too_many_arguments, reason = "the operands of the op")]
fn launch(
    on: Queue<'_>,
    op: &'static str,
    kernel: &'static str,
    rows: Rows<'_>,
    width: usize,
    x: Tensor<'_>,
    out: &DeviceSlice,
    grid: [usize; 3],
) -> Result<(), CudaError> {
    need(op, "out", out, &[rows.padded, width], x.dtype.size())?;
    let params = Params {
        x: x.address(),
        out: out.address(),
        count: rows.count_address(),
        rows: dim(op, rows.padded)?,
        width: dim(op, width)?,
    };
    let [x, y, z] = grid;
    let grid = [dim(op, x)?, dim(op, y)?, dim(op, z)?];
    Launch::new(on.kernel(kernel)?, grid, THREADS as u32).dependent().on(on.stream, &params)
}
