//! Decoding rows of latent attention: keys cut into pieces of equal work for all multiprocessors, two
//! kernels.
//!
//! The cut is made by [`Cut`]. It serves the widths of DeepSeek's models (latent 512, rope 64) in bf16;
//! others take the tiles of `flash`. Invariant: a piece reads no row of another sequence.

use super::{Mla, OP};
use crate::cuda::{Dtype, Queue, Rows, Tensor, bytes, dim, need, shape};
use crate::flash::cuda::Query;
use crate::flash::cuda::cut::{Costs, Cut, Lines, Piece, UNIT};
use crate::paged::KvLayer;
use device::cuda::{Arena, CudaError, DeviceSlice, Launch, Parameters, Swizzle, TensorMap};

pub(super) const LATENT: usize = 512;
pub(super) const ROPE: usize = 64;
pub(super) const WIDTH: usize = LATENT + ROPE;
/// Heads of a piece.
pub(super) const LINES: usize = 16;
/// Elements of a line of the cache as the copy engine swizzles it; blocks begin on multiples.
pub const LINE: usize = 64;
const THREADS: u32 = 256;
/// Bytes of the kernel's `Shared`.
const SHARED: u32 = 169_056;
const MERGE_THREADS: u32 = 256;
/// Blocks of the second kernel on a multiprocessor.
const MERGE_WAVES: usize = 8;
/// Blocks of the second kernel to a line, at most.
const MERGE_PARTS: usize = 8;

const COSTS: Costs = Costs { piece: 2, partial: 2, merge: 5 };

/// The kernel that works through pieces.
pub const DECODE: &str = "mla_decode_16";
const MERGE: &str = "mla_decode_merge";

/// Whether this kernel serves the shape over a cache whose blocks begin on multiples of [`LINE`].
#[must_use]
pub const fn serves(mla: &Mla, layer: KvLayer, dtype: Dtype) -> bool {
    matches!(dtype, Dtype::Bf16)
        && mla.heads > 0
        && mla.latent == LATENT
        && mla.rope == ROPE
        && layer.row == WIDTH
        && layer.offset.is_multiple_of(LINE)
}

/// How rows of so many heads are cut.
#[must_use]
pub const fn lines(heads: usize) -> Lines {
    Lines { heads, group: heads, most: LINES, costs: COSTS }
}

/// Mirrors `Params`.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Params {
    cache: TensorMap,
    q: u64,
    q_rest: u64,
    out: u64,
    partial: u64,
    partial_lse: u64,
    pieces: u64,
    tables: u64,
    arena_elements: u64,
    layer_offset: u64,
    q_row: u64,
    q_head: u64,
    rest_row: u64,
    rest_head: u64,
    heads: u32,
    scale: f32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `attention`.
unsafe impl Parameters for Params {}

/// Mirrors `MergeParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct MergeParams {
    partial: u64,
    partial_lse: u64,
    slots: u64,
    out: u64,
    rows: u32,
    heads: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `attention`.
unsafe impl Parameters for MergeParams {}

/// The cache as the copy engine sees it; made once.
///
/// # Errors
/// When the driver refuses the shape.
pub fn cache_map(arena: &DeviceSlice) -> Result<TensorMap, CudaError> {
    let dims = [LINE as u64, (arena.bytes() / (LINE * 2)) as u64];
    let boxes = [LINE as u32, UNIT * (WIDTH / LINE) as u32];
    TensorMap::bf16(arena, dims, boxes, Swizzle::Bytes128)
}

/// A step's cut on the device.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// By [`cache_map`], of the arena given beside it.
    pub map: &'a TensorMap,
    /// [`Piece`] each; at least one per block.
    pub pieces: &'a DeviceSlice,
    /// [`Cut::slots`] for all padded rows.
    pub slots: &'a DeviceSlice,
    /// u64: element offsets of blocks.
    pub tables: &'a DeviceSlice,
    /// Blocks of the cut.
    pub blocks: usize,
    /// Rows that are cut, at most.
    pub decodes: usize,
}

/// Partial results.
#[derive(Clone, Debug)]
pub struct Partials {
    pub(super) sums: DeviceSlice,
    pub(super) masses: DeviceSlice,
}

impl Partials {
    /// Bytes of device memory for so many slots.
    #[must_use]
    pub const fn bytes(slots: usize) -> usize {
        Arena::padded(slots * LINES * LATENT * 4) + Arena::padded(slots * LINES * 8)
    }

    /// Cuts them from an arena.
    ///
    /// # Errors
    /// When the arena is used up.
    pub fn take(arena: &mut Arena, slots: usize) -> Result<Self, CudaError> {
        const WHAT: &str = "partial latent attention";
        Ok(Self {
            sums: arena.take(WHAT, bytes(WHAT, &[slots, LINES, LATENT, 4])?)?,
            masses: arena.take(WHAT, bytes(WHAT, &[slots, LINES, 8])?)?,
        })
    }
}

/// Attention of latent queries (the latent part, the rotated part) over latents; `out` is
/// `[rows, heads, 512]`.
///
/// # Errors
/// When shapes do not fit, an operand is too short, or a launch fails.
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub fn attention(
    on: Queue<'_>,
    rows: Rows<'_>,
    mla: &Mla,
    queries: [Query; 2],
    layer: KvLayer,
    arena: Tensor<'_>,
    plan: &Plan<'_>,
    partials: &Partials,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    pieces(on, rows, mla, queries, layer, arena, plan, partials, out)?;
    merge(on, rows, mla, plan, partials, out)
}

/// The second kernel of [`attention`]: results of rows in several pieces.
pub(super) fn merge(
    on: Queue<'_>,
    rows: Rows<'_>,
    mla: &Mla,
    plan: &Plan<'_>,
    partials: &Partials,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    let merge = MergeParams {
        partial: partials.sums.address(),
        partial_lse: partials.masses.address(),
        slots: plan.slots.address(),
        out: out.address(),
        rows: dim(OP, rows.padded)?,
        heads: dim(OP, mla.heads)?,
    };
    let items = rows.padded * mla.heads * MERGE_PARTS;
    let grid = [dim(OP, items.min(on.multiprocessors() * MERGE_WAVES))?, 1, 1];
    Launch::new(on.kernel(MERGE)?, grid, MERGE_THREADS).dependent().on(on.stream, &merge)
}

/// The first kernel of [`attention`]: results of rows in one piece, partial results of the others.
#[allow(clippy::too_many_arguments, reason = "the operands of attention")]
pub(super) fn pieces(
    on: Queue<'_>,
    rows: Rows<'_>,
    mla: &Mla,
    queries: [Query; 2],
    layer: KvLayer,
    arena: Tensor<'_>,
    plan: &Plan<'_>,
    partials: &Partials,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    if !serves(mla, layer, arena.dtype) {
        return Err(shape(OP, format!("{mla:?} over {layer:?} in pieces")));
    }
    let (most, slots) = Cut::most(plan.decodes, lines(mla.heads), plan.blocks);
    need(OP, "pieces", plan.pieces, &[most, Piece::WORDS], 4)?;
    need(OP, "slots", plan.slots, &[Cut::slot_entries(rows.padded, lines(mla.heads)), 2], 4)?;
    need(OP, "partial sums", &partials.sums, &[slots, LINES, LATENT], 4)?;
    need(OP, "partial masses", &partials.masses, &[slots, LINES], 8)?;
    need(OP, "out", out, &[rows.padded, mla.heads, LATENT], 2)?;
    let [q, rest] = queries;
    let params = Params {
        cache: *plan.map,
        q: q.address,
        q_rest: rest.address,
        out: out.address(),
        partial: partials.sums.address(),
        partial_lse: partials.masses.address(),
        pieces: plan.pieces.address(),
        tables: plan.tables.address(),
        arena_elements: arena.len() as u64,
        layer_offset: layer.offset as u64,
        q_row: q.row as u64,
        q_head: q.head as u64,
        rest_row: rest.row as u64,
        rest_head: rest.head as u64,
        heads: dim(OP, mla.heads)?,
        scale: mla.scale,
    };
    let grid = [dim(OP, plan.blocks)?, 1, 1];
    Launch::new(on.kernel(DECODE)?, grid, THREADS).shared(SHARED).dependent().on(on.stream, &params)
}
