//! Decoding rows of grouped-query attention: keys cut into pieces of equal work for all multiprocessors,
//! one kernel.
//!
//! The cut is made by `Cut`; of a row in several pieces the block that comes last adds the results. It
//! serves bf16 heads of 64 and 128 without a window; others take the tiles of `flash`. A launch begins
//! before the one in front has ended, and reads pieces, tables and what the cache holds of earlier
//! steps before waiting for it. [`attention`] takes queries and keys as they are attended to;
//! [`fused`] takes them as projected, norms and rotates them and writes the rows' keys and values.
//! Invariants: a piece reads no row of another sequence; what is stored has the roundings of the ops
//! one by one.

#[cfg(test)]
mod tests;

use super::{Gqa, OP, check};
use crate::cuda::{Dtype, Queue, Rows, Strided, Tensor, bytes, dim, need, shape};
use crate::flash::cuda::cut::{Costs, Cut, Lines, Piece, UNIT};
use crate::norm::Heads;
use crate::paged::{KvLayer, cuda::Destination};
use crate::rope::{Pairing, cuda::Rope};
use device::cuda::{Arena, CudaError, DeviceSlice, Launch, Parameters, Stream, Swizzle, TensorMap};

/// Query heads of a piece, at most.
const LINES: usize = 8;
/// Elements of a line of the cache as the copy engine swizzles it.
const LINE: usize = 64;
const THREADS: u32 = 128;
/// Blocks that share a multiprocessor.
const SHARE: usize = 2;
const COSTS: Costs = Costs { piece: 8, partial: 4, merge: 24 };

/// Kernels that may have more shared memory than the default.
pub(crate) const ALL: &[&str] =
    &["gqa_decode_64", "gqa_decode_128", "gqa_decode_fused_64", "gqa_decode_fused_128"];

/// The kernel's name, and the bytes of its `Shared`.
const fn kernel(gqa: &Gqa, fused: bool) -> (&'static str, u32) {
    match (gqa.head_dim, fused) {
        (64, false) => ("gqa_decode_64", SHARED_64),
        (64, true) => ("gqa_decode_fused_64", SHARED_64),
        (_, false) => ("gqa_decode_128", SHARED_128),
        (_, true) => ("gqa_decode_fused_128", SHARED_128),
    }
}
const SHARED_64: u32 = 104_016;
const SHARED_128: u32 = 109_040;

/// Whether these kernels serve the shape over a cache whose blocks begin on multiples of a row.
#[must_use]
pub const fn serves(gqa: &Gqa, layer: KvLayer, dtype: Dtype) -> bool {
    matches!(dtype, Dtype::Bf16)
        && matches!(gqa.head_dim, 64 | 128)
        && gqa.window.is_none()
        && gqa.kv_heads > 0
        && gqa.heads > 0
        && gqa.heads.is_multiple_of(gqa.kv_heads)
        && layer.row == 2 * gqa.kv_heads * gqa.head_dim
        && layer.offset.is_multiple_of(layer.row)
}

/// The kernel that runs a shape it serves, as fused or not.
#[must_use]
pub const fn name(gqa: &Gqa, fused: bool) -> &'static str {
    kernel(gqa, fused).0
}

/// How rows are cut.
#[must_use]
pub const fn lines(gqa: &Gqa) -> Lines {
    let kv_heads = if gqa.kv_heads == 0 { 1 } else { gqa.kv_heads };
    let group = gqa.heads / kv_heads;
    Lines { heads: gqa.heads, group, most: LINES, slot: LINES, whole: false, costs: COSTS }
}

/// Blocks that keys are cut for.
#[must_use]
pub const fn blocks(multiprocessors: usize) -> usize {
    SHARE * multiprocessors
}

/// The cache of a shape as the copy engine sees it; made once.
///
/// # Errors
/// When the driver refuses the shape.
pub fn cache_map(gqa: &Gqa, arena: &DeviceSlice) -> Result<TensorMap, CudaError> {
    let row = (2 * gqa.kv_heads * gqa.head_dim) as u64;
    let line = LINE as u64;
    let dims = [line, (arena.bytes() / 2) as u64 / row.max(1), row / line];
    let boxes = [LINE as u32, UNIT, (gqa.head_dim / LINE) as u32];
    TensorMap::bf16_strided(arena, dims, [1, row, line], boxes, Swizzle::Bytes128)
}

/// A step's cut on the device.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// By [`cache_map`], of the arena given beside it.
    pub map: &'a TensorMap,
    /// [`Piece`] each; at least one per block.
    pub pieces: &'a DeviceSlice,
    /// u64: element offsets of blocks.
    pub tables: &'a DeviceSlice,
    /// Blocks of the cut.
    pub blocks: usize,
    /// Rows that are cut, at most.
    pub decodes: usize,
}

/// Partial results, and how many of a row there are so far.
#[derive(Clone, Debug)]
pub struct Partials {
    sums: DeviceSlice,
    masses: DeviceSlice,
    arrived: DeviceSlice,
}

impl Partials {
    /// Bytes of device memory for so many slots.
    #[must_use]
    pub const fn bytes(slots: usize, head_dim: usize) -> usize {
        Arena::padded(slots * LINES * head_dim * 4)
            + Arena::padded(slots * LINES * 8)
            + Arena::padded(slots * 4)
    }

    /// Cuts them from an arena; what counts is zero from here on.
    ///
    /// # Errors
    /// When the arena is used up, or the fill fails.
    pub fn take(
        arena: &mut Arena,
        stream: &Stream,
        slots: usize,
        head_dim: usize,
    ) -> Result<Self, CudaError> {
        const WHAT: &str = "partial grouped attention";
        let partials = Self {
            sums: arena.take(WHAT, bytes(WHAT, &[slots, LINES, head_dim, 4])?)?,
            masses: arena.take(WHAT, bytes(WHAT, &[slots, LINES, 8])?)?,
            arrived: arena.take(WHAT, bytes(WHAT, &[slots, 4])?)?,
        };
        stream.fill(&partials.arrived, 0)?;
        Ok(partials)
    }
}

/// Mirrors `Params`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    cache: TensorMap,
    q: u64,
    kv: u64,
    arena: u64,
    out: u64,
    partial: u64,
    partial_lse: u64,
    arrived: u64,
    pieces: u64,
    tables: u64,
    q_norm: u64,
    k_norm: u64,
    inv_freq: u64,
    arena_elements: u64,
    layer_offset: u64,
    q_row: u64,
    kv_row: u64,
    row: u32,
    heads: u32,
    scale: f32,
    q_eps: f32,
    k_eps: f32,
    factor: f32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `attention` and `fused`.
unsafe impl Parameters for Params {}

#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
fn params(
    rows: Rows<'_>,
    q: Strided<'_>,
    gqa: &Gqa,
    layer: KvLayer,
    arena: Tensor<'_>,
    plan: &Plan<'_>,
    partials: &Partials,
    out: &DeviceSlice,
) -> Result<Params, CudaError> {
    check(gqa, layer)?;
    if !serves(gqa, layer, arena.dtype) {
        return Err(shape(OP, format!("{gqa:?} over {layer:?} in pieces")));
    }
    let Gqa { heads, head_dim, scale, .. } = *gqa;
    let (most, slots) = Cut::most(plan.decodes, lines(gqa), plan.blocks);
    q.need(OP, "q", rows.padded, &[heads, head_dim], 2)?;
    need(OP, "out", out, &[rows.padded, heads, head_dim], 2)?;
    need(OP, "pieces", plan.pieces, &[most, Piece::WORDS], 4)?;
    need(OP, "partial sums", &partials.sums, &[slots, LINES, head_dim], 4)?;
    need(OP, "partial masses", &partials.masses, &[slots, LINES], 8)?;
    need(OP, "counters", &partials.arrived, &[slots], 4)?;
    Ok(Params {
        cache: *plan.map,
        q: q.address(),
        kv: 0,
        arena: arena.address(),
        out: out.address(),
        partial: partials.sums.address(),
        partial_lse: partials.masses.address(),
        arrived: partials.arrived.address(),
        pieces: plan.pieces.address(),
        tables: plan.tables.address(),
        q_norm: 0,
        k_norm: 0,
        inv_freq: 0,
        arena_elements: arena.len() as u64,
        layer_offset: layer.offset as u64,
        q_row: q.stride as u64,
        kv_row: 0,
        row: dim(OP, layer.row)?,
        heads: dim(OP, heads)?,
        scale,
        q_eps: 0.0,
        k_eps: 0.0,
        factor: 1.0,
    })
}

fn launch(
    on: Queue<'_>,
    gqa: &Gqa,
    plan: &Plan<'_>,
    fused: bool,
    params: &Params,
) -> Result<(), CudaError> {
    let (name, shared) = kernel(gqa, fused);
    let grid = [dim(OP, plan.blocks)?, 1, 1];
    Launch::new(on.kernel(name)?, grid, THREADS).shared(shared).dependent().on(on.stream, params)
}

/// Rows of the cut alone: those of `q`, and `out`, are `[heads * head_dim]`; keys and values of the rows are
/// written.
///
/// # Errors
/// When the shape is not served, an operand is too short, or the launch fails.
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub fn attention(
    on: Queue<'_>,
    rows: Rows<'_>,
    q: Strided<'_>,
    gqa: &Gqa,
    layer: KvLayer,
    arena: Tensor<'_>,
    plan: &Plan<'_>,
    partials: &Partials,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    let params = params(rows, q, gqa, layer, arena, plan, partials, out)?;
    launch(on, gqa, plan, false, &params)
}

/// Norm of a head's elements.
#[derive(Clone, Copy, Debug)]
pub struct HeadNorm<'a> {
    /// f32 `[head_dim]`.
    pub weight: &'a DeviceSlice,
    /// Added to the mean square.
    pub eps: f32,
}

/// What attention of rows that only decode works on.
#[derive(Clone, Copy, Debug)]
pub struct Projected<'a> {
    /// Rows of `[heads * head_dim]`.
    pub q: Strided<'a>,
    /// Rows of `[2 * kv_heads * head_dim]`: keys, then values.
    pub kv: Strided<'a>,
    /// Of queries and of keys, where the model has them.
    pub norms: Option<[HeadNorm<'a>; 2]>,
    /// Of both; the elements of a pair are half a head apart.
    pub rope: Rope<'a>,
    /// The cache, where the rows' keys and values go.
    pub to: Destination<'a>,
    /// Where the layer lies in a block.
    pub layer: KvLayer,
}

/// Queries and keys that [`fused`] takes for granted.
#[must_use]
pub const fn heads(gqa: &Gqa) -> [Heads; 2] {
    let Gqa { heads, kv_heads, head_dim, .. } = *gqa;
    let q =
        Heads { row: heads * head_dim, count: heads, offset: 0, width: head_dim, stride: head_dim };
    [q, Heads { row: 2 * kv_heads * head_dim, count: kv_heads, ..q }]
}

/// Whether [`fused`] rotates so.
#[must_use]
pub const fn rotates(pairing: Pairing) -> bool {
    matches!(pairing, Pairing::Halves)
}

/// Norms, rotation, cache and attention of a step whose segments all have one row.
///
/// # Errors
/// When the shape is not served, an operand is too short, or the launch fails.
pub fn fused(
    on: Queue<'_>,
    rows: Rows<'_>,
    gqa: &Gqa,
    of: &Projected<'_>,
    plan: &Plan<'_>,
    partials: &Partials,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    let Projected { q, kv, norms, rope, to, layer } = *of;
    let params = params(rows, q, gqa, layer, to.arena, plan, partials, out)?;
    if !rotates(rope.pairing) {
        return Err(shape(OP, format!("{:?} in pieces", rope.pairing)));
    }
    kv.need(OP, "kv", rows.padded, &[layer.row], 2)?;
    need(OP, "inv_freq", rope.inv_freq, &[gqa.head_dim / 2], 4)?;
    for norm in norms.iter().flatten() {
        need(OP, "norm", norm.weight, &[gqa.head_dim], 4)?;
    }
    let [q_norm, k_norm] = norms.map_or([0; 2], |norms| norms.map(|norm| norm.weight.address()));
    let [q_eps, k_eps] = norms.map_or([0.0; 2], |norms| norms.map(|norm| norm.eps));
    let params = Params {
        kv: kv.address(),
        kv_row: kv.stride as u64,
        q_norm,
        k_norm,
        inv_freq: rope.inv_freq.address(),
        q_eps,
        k_eps,
        factor: rope.factor,
        ..params
    };
    launch(on, gqa, plan, true, &params)
}
