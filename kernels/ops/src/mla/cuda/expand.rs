//! Latent attention in the expanded form on a device, for prompts that lie in the step as a whole: keys
//! and values of all heads are projected up from the step's own latents, and nothing is read from the
//! cache.
//!
//! It serves no row whose sequence begins in an earlier step; those run absorbed. Invariant: a segment
//! is whole or absorbed, never both.

#[cfg(test)]
mod tests;

use super::super::Mla;
use crate::cuda::{Dtype, Queue, Rows, Tensor, need, shape};
use crate::flash::cuda::Segment;
use crate::flash::cuda::prompt::{self, Cut, Keys};
use crate::linear::cuda::{Linear, linear};
use device::cuda::{Arena, CudaError, DeviceSlice};

const OP: &str = "expanded mla";
/// Fewest rows that are worth the projection of their latents.
const LEAST: u32 = 16;

/// Whether the kernel serves the widths.
#[must_use]
pub fn serves(mla: &Mla, dtype: Dtype) -> bool {
    dtype == Dtype::Bf16 && (mla.nope, mla.rope, mla.v, mla.latent) == (128, 64, 128, 512)
}

/// How prompts are cut into tiles.
#[must_use]
pub const fn cut() -> Cut {
    match Cut::new(1, 192) {
        Some(cut) => cut,
        None => unreachable!(),
    }
}

/// Whether a segment is computed here: a prompt of the step alone.
#[must_use]
pub const fn is_whole(segment: &Segment) -> bool {
    segment.context == segment.len && segment.len >= LEAST
}

/// Bytes of keys and values of up to `rows` rows.
#[must_use]
pub const fn bytes(mla: &Mla, rows: usize) -> usize {
    rows * mla.heads * (mla.nope + mla.v) * 2
}

/// Cuts that memory from an arena.
///
/// # Errors
/// When the arena is used up.
pub fn take(arena: &mut Arena, mla: &Mla, rows: usize) -> Result<DeviceSlice, CudaError> {
    arena.take(OP, bytes(mla, rows))
}

/// A step's whole prompts.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// Tiles of the whole segments; of all of them `table` is `start`.
    pub prompts: prompt::Plan<'a>,
    /// Keys and values, by [`take`].
    pub expanded: &'a DeviceSlice,
}

/// `q` is `[rows, heads * 192]`, rotated; `kv` `[rows, 576]`, latents normed and keys rotated; `kv_b`
/// `[heads * 256, 512]`; rows of whole prompts in `out`, `[rows, heads * 128]`, are written.
///
/// # Errors
/// When widths are others, an operand is too short, or a launch fails.
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub fn attention(
    on: Queue<'_>,
    rows: Rows<'_>,
    mla: &Mla,
    q: &DeviceSlice,
    kv: &DeviceSlice,
    kv_b: &DeviceSlice,
    plan: &Plan<'_>,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    let Mla { heads, nope, rope, v, latent, scale } = *mla;
    if !serves(mla, Dtype::Bf16) || heads == 0 {
        return Err(shape(OP, format!("{mla:?}")));
    }
    let (padded, width) = (rows.padded, heads * (nope + v));
    need(OP, "q", q, &[padded, heads, nope + rope], 2)?;
    need(OP, "kv", kv, &[padded, latent + rope], 2)?;
    need(OP, "kv_b", kv_b, &[heads, nope + v, latent], 2)?;
    need(OP, "keys and values", plan.expanded, &[padded, width], 2)?;
    need(OP, "out", out, &[padded, heads, v], 2)?;
    let tensor = |slice| Tensor::new(slice, Dtype::Bf16);
    let plain = Linear::plain(tensor(kv), kv_b, tensor(plan.expanded), latent, width);
    linear(on, rows, &Linear { x_stride: latent + rope, ..plain })?;
    let (shared, width) = (kv, latent + rope);
    let keys = Keys::Rows { up: plan.expanded, shared, width, rows: padded };
    let kv_heads = heads;
    let operands =
        prompt::Operands { rows: padded, heads, kv_heads, qk: nope + rope, scale, q, keys, out };
    prompt::attention(on, &operands, &plan.prompts)
}
