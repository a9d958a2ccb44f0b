//! Latent attention in the expanded form on a device, for prompts that lie in the step as a whole: keys
//! and values of all heads are projected up from the step's own latents, and nothing is read from the
//! cache.
//!
//! It serves no row whose sequence begins in an earlier step; those run absorbed. Invariant: a segment
//! is whole or absorbed, never both.

#[cfg(test)]
mod tests;

use super::super::Mla;
use crate::cuda::{Dtype, Queue, Rows, Tensor, dim, need, shape};
use crate::flash::cuda::{Segment, Tile};
use crate::linear::cuda::{Linear, linear};
use device::cuda::{Arena, CudaError, DeviceSlice, Launch, Parameters};

const OP: &str = "expanded mla";
pub(crate) const EXPANDED: &str = "mla_expanded";
const THREADS: u32 = 256;
/// Two stages of keys and values.
const SHARED: u32 = 86_016;
/// Rows of a tile.
pub const LINES: usize = 128;
/// Fewest rows that are worth the projection of their latents.
const LEAST: u32 = 16;

/// Whether the kernel serves the widths.
#[must_use]
pub fn serves(mla: &Mla, dtype: Dtype) -> bool {
    dtype == Dtype::Bf16 && (mla.nope, mla.rope, mla.v, mla.latent) == (128, 64, 128, 512)
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
    /// All segments, whole or not.
    pub segments: &'a DeviceSlice,
    /// Tiles of [`LINES`] rows of the whole ones.
    pub tiles: &'a DeviceSlice,
    /// How many there are.
    pub tile_count: &'a DeviceSlice,
    /// How many there can be.
    pub max_tiles: usize,
    /// Keys and values, by [`take`].
    pub expanded: &'a DeviceSlice,
}

/// Mirrors `mla_expand::Params`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    q: u64,
    up: u64,
    kv: u64,
    out: u64,
    segments: u64,
    tiles: u64,
    tile_count: u64,
    heads: u32,
    scale: f32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `attention`.
unsafe impl Parameters for Params {}

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
    need(OP, "tiles", plan.tiles, &[plan.max_tiles], size_of::<Tile>())?;
    need(OP, "tile count", plan.tile_count, &[1], 4)?;
    let tensor = |slice| Tensor::new(slice, Dtype::Bf16);
    let plain = Linear::plain(tensor(kv), kv_b, tensor(plan.expanded), latent, width);
    linear(on, rows, &Linear { x_stride: latent + rope, ..plain })?;
    let params = Params {
        q: q.address(),
        up: plan.expanded.address(),
        kv: kv.address(),
        out: out.address(),
        segments: plan.segments.address(),
        tiles: plan.tiles.address(),
        tile_count: plan.tile_count.address(),
        heads: dim(OP, heads)?,
        scale: scale * core::f32::consts::LOG2_E,
    };
    let grid = [params.heads, dim(OP, plan.max_tiles)?, 1];
    Launch::new(on.kernel(EXPANDED)?, grid, THREADS)
        .shared(SHARED)
        .dependent()
        .on(on.stream, &params)
}
