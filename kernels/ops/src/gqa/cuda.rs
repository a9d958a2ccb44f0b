//! Launches of grouped-query attention: any rows by the tiles of `flash`, decoding rows in pieces of equal
//! work, rows of prompts by the kernel of `flash` for those, where these serve their heads; and of what lies
//! between projections and attention ([`prepare`]).

pub mod decode;
pub mod prepare;
#[cfg(test)]
mod tests;

use super::Gqa;
use crate::cuda::{Dtype, Queue, Rows, Strided, Tensor, shape};
use crate::flash::cuda::prompt::{self, Cut, Keys};
use crate::flash::cuda::{self as flash, Partials, Plan, Query, Shape, Variant};
use crate::paged::KvLayer;
use device::cuda::{CudaError, DeviceSlice};

const OP: &str = "gqa";

fn shape_of(gqa: &Gqa, dtype: Dtype) -> Shape {
    let Gqa { heads, kv_heads, head_dim, scale, window } = *gqa;
    Shape {
        dtype,
        heads,
        group: heads / kv_heads.max(1),
        q_width: head_dim,
        rest_width: 0,
        v_width: head_dim,
        key_stride: head_dim,
        value_offset: kv_heads * head_dim,
        value_stride: head_dim,
        window,
        scale,
    }
}

/// The variant for steps with or without prompt chunks, and the lines of its tiles.
#[must_use]
pub fn select(gqa: &Gqa, layer: KvLayer, dtype: Dtype, prompts: bool) -> (Variant, usize) {
    let shape = shape_of(gqa, dtype);
    let variant = shape.select(layer, prompts);
    (variant, shape.tile_lines(variant))
}

/// Who computes it.
#[derive(Clone, Copy, Debug)]
pub enum Core<'a> {
    /// Tiles over splits of the keys: any rows, any widths.
    Tiles(&'a Plan<'a>, &'a Partials),
    /// Pieces of equal work: decoding rows of the widths that [`decode::serves`] says.
    Pieces(&'a decode::Plan<'a>, &'a decode::Partials),
    /// Tiles for the rows of chunks, pieces for the others.
    Both((&'a Plan<'a>, &'a Partials), (&'a decode::Plan<'a>, &'a decode::Partials)),
}

/// The shape is one that caches hold.
fn check(gqa: &Gqa, layer: KvLayer) -> Result<(), CudaError> {
    let Gqa { heads, kv_heads, head_dim, window, .. } = *gqa;
    let divides = kv_heads > 0 && heads.is_multiple_of(kv_heads);
    if !divides || heads == 0 || window == Some(0) || layer.row != 2 * kv_heads * head_dim {
        return Err(shape(OP, format!("{gqa:?} over {layer:?}")));
    }
    Ok(())
}

/// Rows of `q`, and `out`, are `[heads * head_dim]` of the arena's type; keys and values of the rows are
/// written.
///
/// # Errors
/// When shapes do not fit, an operand is too short, or a launch fails.
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub fn attention(
    on: Queue<'_>,
    rows: Rows<'_>,
    q: Strided<'_>,
    gqa: &Gqa,
    layer: KvLayer,
    arena: Tensor<'_>,
    core: Core<'_>,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    check(gqa, layer)?;
    // Merging splits writes something into every row; pieces come after, with what holds for theirs.
    if let Core::Tiles(plan, partials) | Core::Both((plan, partials), _) = core {
        let Gqa { heads, head_dim, .. } = *gqa;
        q.need(OP, "q", rows.padded, &[heads, head_dim], arena.dtype.size())?;
        let query = Query { address: q.address(), row: q.stride, head: head_dim };
        let shape = shape_of(gqa, arena.dtype);
        flash::attention(on, rows, &shape, [query, query], layer, arena, plan, partials, out)?;
    }
    if let Core::Pieces(plan, partials) | Core::Both(_, (plan, partials)) = core {
        decode::attention(on, rows, q, gqa, layer, arena, plan, partials, out)?;
    }
    Ok(())
}

/// How prompts are cut into tiles for [`prompts`]; `None` where it does not serve them.
#[must_use]
pub const fn prompt_cut(gqa: &Gqa, layer: KvLayer, dtype: Dtype) -> Option<Cut> {
    let Gqa { heads, kv_heads, head_dim, window, .. } = *gqa;
    let served = matches!(dtype, Dtype::Bf16)
        && window.is_none()
        && kv_heads > 0
        && heads.is_multiple_of(kv_heads)
        && layer.row == 2 * kv_heads * head_dim
        && layer.offset.is_multiple_of(prompt::LINE)
        && (head_dim == 64 || head_dim == 128);
    if served { Cut::new(heads / kv_heads, head_dim) } else { None }
}

/// As [`attention`] for the segments of a plan, whose rows alone are written; blocks begin on multiples of
/// 64 elements.
///
/// # Errors
/// As [`attention`].
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub fn prompts(
    on: Queue<'_>,
    rows: Rows<'_>,
    q: Strided<'_>,
    gqa: &Gqa,
    layer: KvLayer,
    arena: Tensor<'_>,
    tables: &DeviceSlice,
    plan: &prompt::Plan<'_>,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    if prompt_cut(gqa, layer, arena.dtype).is_none() {
        return Err(shape("gqa", format!("{gqa:?} over {layer:?} for prompts")));
    }
    let Gqa { heads, kv_heads, head_dim, scale, .. } = *gqa;
    let keys = Keys::Paged { arena: arena.slice, layer, tables };
    let (rows, group, qk) = (rows.padded, heads / kv_heads, head_dim);
    let operands = prompt::Operands { rows, heads, kv_heads, group, qk, scale, q, keys, out };
    prompt::attention(on, &operands, plan)
}
