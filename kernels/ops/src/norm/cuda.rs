//! Launches of the norms.

#[cfg(test)]
mod tests;

use super::Heads;
use crate::cuda::{Queue, Rows, Strided, Tensor, dim, need, shape};
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters};

/// Mirrors `NormParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    x: u64,
    residual: u64,
    weight: u64,
    out: u64,
    count: u64,
    rows: u32,
    width: u32,
    eps: f32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `launch`.
unsafe impl Parameters for Params {}

/// `out[t] = norm(x[t]) * weight`; rows have `width` elements, `weight` is f32 `[width]`. `out` may be
/// `x`.
///
/// # Errors
/// When an operand is too short, or the launch fails.
pub fn rms_norm(
    on: Queue<'_>,
    rows: Rows<'_>,
    width: usize,
    x: Tensor<'_>,
    weight: &DeviceSlice,
    eps: f32,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    launch(on, rows, width, x, None, weight, eps, out)
}

/// `residual += delta; out = norm(residual) * weight`, all of `delta`'s type. The norm is of the sum as
/// it is stored.
///
/// # Errors
/// When an operand is too short, or the launch fails.
#[allow(clippy::too_many_arguments, reason = "the operands of the op")]
pub fn add_rms_norm(
    on: Queue<'_>,
    rows: Rows<'_>,
    width: usize,
    delta: Tensor<'_>,
    residual: &DeviceSlice,
    weight: &DeviceSlice,
    eps: f32,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    launch(on, rows, width, delta, Some(residual), weight, eps, out)
}

#[allow(clippy::too_many_arguments, reason = "the operands of the op")]
fn launch(
    on: Queue<'_>,
    rows: Rows<'_>,
    width: usize,
    x: Tensor<'_>,
    residual: Option<&DeviceSlice>,
    weight: &DeviceSlice,
    eps: f32,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    const OP: &str = "rms_norm";
    let size = x.dtype.size();
    x.need(OP, "x", &[rows.padded, width])?;
    need(OP, "out", out, &[rows.padded, width], size)?;
    need(OP, "weight", weight, &[width], 4)?;
    if let Some(residual) = residual {
        need(OP, "residual", residual, &[rows.padded, width], size)?;
    }
    let params = Params {
        x: x.address(),
        residual: residual.map_or(0, DeviceSlice::address),
        weight: weight.address(),
        out: out.address(),
        count: rows.count_address(),
        rows: dim(OP, rows.padded)?,
        width: dim(OP, width)?,
        eps,
    };
    let kernel = on.kernel(x.dtype.pick("rms_norm_f32", "rms_norm_bf16"))?;
    Launch::new(kernel, [params.rows, 1, 1], 256).dependent().on(on.stream, &params)
}

/// Mirrors `HeadNormParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct HeadParams {
    x: u64,
    weight: u64,
    count: u64,
    rows: u32,
    row: u32,
    heads: u32,
    offset: u32,
    width: u32,
    stride: u32,
    eps: f32,
}
// SAFETY: mirrors the kernel's struct; heads are checked to lie inside rows, rows inside `x`.
unsafe impl Parameters for HeadParams {}

/// Norms each head by itself, in place; `weight` is f32 `[heads.width]`.
///
/// # Errors
/// When heads leave their rows, an operand is too short, or the launch fails.
pub fn head_norm(
    on: Queue<'_>,
    rows: Rows<'_>,
    x: Tensor<'_>,
    heads: &Heads,
    weight: &DeviceSlice,
    eps: f32,
) -> Result<(), CudaError> {
    const OP: &str = "head_norm";
    /// Warps of a block, a head each.
    const WARPS: usize = 4;
    check_heads(OP, rows, x, heads)?;
    need(OP, "weight", weight, &[heads.width], 4)?;
    let params = HeadParams {
        x: x.address(),
        weight: weight.address(),
        count: rows.count_address(),
        rows: dim(OP, rows.padded)?,
        row: dim(OP, heads.row)?,
        heads: dim(OP, heads.count)?,
        offset: dim(OP, heads.offset)?,
        width: dim(OP, heads.width)?,
        stride: dim(OP, heads.stride)?,
        eps,
    };
    let kernel = on.kernel(x.dtype.pick("head_norm_f32", "head_norm_bf16"))?;
    let blocks = dim(OP, (rows.padded * heads.count).div_ceil(WARPS))?;
    Launch::new(kernel, [blocks, 1, 1], 32 * WARPS as u32).dependent().on(on.stream, &params)
}

/// Heads lie inside rows, rows inside `x`.
pub(crate) fn check_heads(
    op: &'static str,
    rows: Rows<'_>,
    x: Tensor<'_>,
    heads: &Heads,
) -> Result<(), CudaError> {
    let Heads { row, count, offset, width, stride } = *heads;
    let end = count.saturating_sub(1).checked_mul(stride).and_then(|at| at.checked_add(offset));
    let end = end.and_then(|at| at.checked_add(width)).filter(|end| *end <= row || count == 0);
    let end = end.filter(|_| width <= stride).map(|end| if count == 0 { 0 } else { end });
    let end = end.ok_or_else(|| shape(op, format!("heads that leave their rows: {heads:?}")))?;
    // The last row may end with its heads.
    Strided { slice: x.slice, stride: row }.need(op, "x", rows.padded, &[end], x.dtype.size())
}
