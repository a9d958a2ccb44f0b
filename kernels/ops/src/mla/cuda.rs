//! Launches of latent attention in the absorbed form, for any number of rows.
//!
//! Queries go to latent space by the transposed key half of `kv_b`, head by head; attention runs over
//! the latents as they lie in the cache; the sums come back through the value half. Prompts that lie in
//! a step as a whole can run in the expanded form, in `expand`.

pub mod block;
pub mod decode;
pub mod expand;
pub(crate) mod heads;
pub mod near;
#[cfg(test)]
mod tests;

use super::Mla;
use crate::cuda::{Dtype, Queue, Rows, Strided, Tensor, bytes, dim, need, shape};
use crate::flash::cuda::{self as flash, Partials, Plan, Query, Shape, Variant};
use crate::linear::cuda::{FEW_ROWS, Linear, linear};
use crate::paged::KvLayer;
use device::cuda::{Arena, CudaError, DeviceSlice, Launch, Parameters};

const OP: &str = "mla";

fn shape_of(mla: &Mla, dtype: Dtype) -> Shape {
    let Mla { heads, rope, latent, scale, .. } = *mla;
    Shape {
        dtype,
        heads,
        group: heads,
        q_width: latent,
        rest_width: rope,
        v_width: latent,
        key_stride: 0,
        value_offset: 0,
        value_stride: 0,
        window: None,
        scale,
    }
}

/// The variant for steps with or without prompt chunks, and the lines of its tiles.
#[must_use]
pub fn select(mla: &Mla, layer: KvLayer, dtype: Dtype, prompts: bool) -> (Variant, usize) {
    let shape = shape_of(mla, dtype);
    let variant = shape.select(layer, prompts);
    (variant, shape.tile_lines(variant))
}

/// Mirrors `AbsorbParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct AbsorbParams {
    kv_b: u64,
    out: u64,
    heads: u32,
    nope: u32,
    v: u32,
    latent: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `absorb_weights`.
unsafe impl Parameters for AbsorbParams {}

/// Elements that [`absorb_weights`] writes.
#[must_use]
pub const fn absorbed_len(mla: &Mla) -> usize {
    mla.heads * mla.latent * mla.nope
}

/// The key half of `kv_b` (`[heads * (nope + v), latent]`) as `[heads, latent, nope]`, once at load.
///
/// # Errors
/// When an operand is too short, or the launch fails.
pub fn absorb_weights(
    on: Queue<'_>,
    mla: &Mla,
    kv_b: Tensor<'_>,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    let Mla { heads, nope, v, latent, .. } = *mla;
    kv_b.need(OP, "kv_b", &[heads, nope + v, latent])?;
    need(OP, "absorbed weights", out, &[heads, latent, nope], kv_b.dtype.size())?;
    let params = AbsorbParams {
        kv_b: kv_b.address(),
        out: out.address(),
        heads: dim(OP, heads)?,
        nope: dim(OP, nope)?,
        v: dim(OP, v)?,
        latent: dim(OP, latent)?,
    };
    let kernel = on.kernel(kv_b.dtype.pick("absorb_weights_f32", "absorb_weights_bf16"))?;
    let grid = [params.latent.div_ceil(32), params.nope.div_ceil(32), params.heads];
    Launch::new(kernel, grid, 256).on(on.stream, &params)
}

/// Weights of the attention.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    /// By [`absorb_weights`].
    pub absorbed: &'a DeviceSlice,
    /// `[heads * (nope + v), latent]`.
    pub kv_b: &'a DeviceSlice,
}

/// Memory of a step, made once.
#[derive(Clone, Debug)]
pub struct Scratch {
    queries: DeviceSlice,
    results: DeviceSlice,
}

impl Scratch {
    /// Bytes of device memory for steps of up to `rows` rows.
    #[must_use]
    pub const fn bytes(mla: &Mla, dtype: Dtype, rows: usize) -> usize {
        2 * Arena::padded(rows * mla.heads * mla.latent * dtype.size())
    }

    /// Cuts it from an arena.
    ///
    /// # Errors
    /// When the arena is used up.
    pub fn take(
        arena: &mut Arena,
        mla: &Mla,
        dtype: Dtype,
        rows: usize,
    ) -> Result<Self, CudaError> {
        let latents = bytes(OP, &[rows, mla.heads, mla.latent, dtype.size()])?;
        Ok(Self {
            queries: arena.take("latent queries", latents)?,
            results: arena.take("latent results", latents)?,
        })
    }
}

/// Who computes the attention between the two products.
#[derive(Clone, Copy, Debug)]
pub enum Core<'a> {
    /// Tiles over splits of the keys: any rows, any widths.
    Tiles(&'a Plan<'a>, &'a Partials),
    /// Pieces of equal work: decoding rows of the widths that [`decode::serves`] says.
    Pieces(&'a decode::Plan<'a>, &'a decode::Partials),
    /// Tiles for the rows of chunks, pieces for the others.
    Both((&'a Plan<'a>, &'a Partials), (&'a decode::Plan<'a>, &'a decode::Partials)),
}

impl<'a> Core<'a> {
    const fn tiles(self) -> Option<(&'a Plan<'a>, &'a Partials)> {
        match self {
            Self::Tiles(plan, partials) | Self::Both((plan, partials), _) => Some((plan, partials)),
            Self::Pieces(..) => None,
        }
    }

    const fn pieces(self) -> Option<(&'a decode::Plan<'a>, &'a decode::Partials)> {
        match self {
            Self::Pieces(plan, partials) | Self::Both(_, (plan, partials)) => {
                Some((plan, partials))
            }
            Self::Tiles(..) => None,
        }
    }
}

/// Rows of `q` are `[heads * (nope + rope)]`, rotated; `out` `[rows, heads * v]`; both of the arena's type.
/// Latents of the rows are written.
///
/// # Errors
/// When shapes do not fit, an operand is too short, or a launch fails.
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub fn attention(
    on: Queue<'_>,
    rows: Rows<'_>,
    q: Strided<'_>,
    weights: &Weights<'_>,
    mla: &Mla,
    layer: KvLayer,
    arena: Tensor<'_>,
    core: Core<'_>,
    scratch: &Scratch,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    let Mla { heads, nope, rope, v, latent, .. } = *mla;
    let dtype = arena.dtype;
    if heads == 0 || nope == 0 || v == 0 || latent == 0 || layer.row != latent + rope {
        return Err(shape(OP, format!("{mla:?} over {layer:?}")));
    }
    let width = nope + rope;
    let size = dtype.size();
    q.need(OP, "q", rows.padded, &[heads, width], size)?;
    need(OP, "kv_b", weights.kv_b, &[heads, nope + v, latent], size)?;
    need(OP, "out", out, &[rows.padded, heads, v], size)?;
    need(OP, "scratch", &scratch.queries, &[rows.padded, heads, latent], size)?;

    // Few rows are streamed past their weights by plain kernels.
    let by_heads = heads::serves(mla, dtype) && rows.padded > FEW_ROWS;
    if by_heads {
        heads::to_latent(on, rows, mla, q, weights.absorbed, &scratch.queries)?;
    } else {
        to_latent(on, rows, mla, (q, dtype), weights, &scratch.queries)?;
    }

    let rotated = q.address() + (nope * size) as u64;
    let queries = [
        Query { address: scratch.queries.address(), row: heads * latent, head: latent },
        Query { address: rotated, row: q.stride, head: width },
    ];
    let results = &scratch.results;
    // Merging splits writes something into every row; pieces come after, with what holds for theirs.
    if let Some((plan, partials)) = core.tiles() {
        let shape = shape_of(mla, dtype);
        flash::attention(on, rows, &shape, queries, layer, arena, plan, partials, results)?;
    }
    if let Some((plan, partials)) = core.pieces() {
        decode::attention(on, rows, mla, queries, layer, arena, plan, partials, results)?;
    }

    if by_heads {
        return heads::from_latent(on, rows, mla, results, weights.kv_b, out);
    }
    from_latent(on, rows, mla, Tensor::new(results, dtype), weights, out)
}

/// Queries into latent space, by products of any widths side by side.
fn to_latent(
    on: Queue<'_>,
    rows: Rows<'_>,
    mla: &Mla,
    (q, dtype): (Strided<'_>, Dtype),
    weights: &Weights<'_>,
    queries: &DeviceSlice,
) -> Result<(), CudaError> {
    let Mla { heads, nope, rope, latent, .. } = *mla;
    let width = nope + rope;
    let from = Tensor::new(q.slice, dtype);
    let product = Linear {
        x_stride: q.stride,
        out_stride: heads * latent,
        batch: heads,
        x_batch: width,
        w_batch: latent * nope,
        out_batch: latent,
        ..Linear::plain(from, weights.absorbed, Tensor::new(queries, dtype), nope, latent)
    };
    linear(on, rows, &product)
}

/// Results out of it.
fn from_latent(
    on: Queue<'_>,
    rows: Rows<'_>,
    mla: &Mla,
    results: Tensor<'_>,
    weights: &Weights<'_>,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    let Mla { heads, nope, v, latent, .. } = *mla;
    let size = results.dtype.size();
    // The value half of head h begins `nope` rows into its part of `kv_b`.
    let all = heads * (nope + v) * latent * size;
    let values = weights.kv_b.slice(nope * latent * size..all);
    let product = Linear {
        x_stride: heads * latent,
        out_stride: heads * v,
        batch: heads,
        x_batch: latent,
        out_batch: v,
        w_batch: (nope + v) * latent,
        ..Linear::plain(results, &values, Tensor::new(out, results.dtype), latent, v)
    };
    linear(on, rows, &product)
}
