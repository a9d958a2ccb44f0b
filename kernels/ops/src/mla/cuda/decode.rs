//! Decoding rows of latent attention: keys cut into pieces of equal work for all multiprocessors, two
//! kernels.
//!
//! Pieces have 16 heads of a row, or 64 where it has more than 16, by a kernel of warpgroups that reads keys
//! less often. Partial results lie in slots of 16 heads all the same. The cut is made by [`Cut`]. It serves
//! the widths of DeepSeek's models (latent 512, rope 64) in bf16; others take the tiles of `flash`.
//! Invariant: a piece reads no row of another sequence.

use super::{Mla, OP};
use crate::cuda::{Dtype, Queue, Rows, Tensor, bytes, dim, need, shape};
use crate::flash::cuda::Query;
use crate::flash::cuda::cut::{Costs, Cut, Lines, Piece, UNIT};
use crate::paged::{BLOCK, KvLayer};
use device::cuda::{Arena, CudaError, DeviceSlice, Launch, Parameters, Swizzle, TensorMap};

pub(super) const LATENT: usize = 512;
pub(super) const ROPE: usize = 64;
pub(super) const WIDTH: usize = LATENT + ROPE;
/// Heads of a slot, and of a piece where they are few.
pub(super) const LINES: usize = 16;
/// Those of a piece where there are more.
const MANY: usize = 64;
/// Elements of a line of the cache as the copy engine swizzles it; blocks begin on multiples.
pub const LINE: usize = 64;
const THREADS: u32 = 384;
const WIDE_THREADS: u32 = 384;
/// Bytes of the kernels' `Shared`.
const SHARED: u32 = 187_176;
const WIDE_SHARED: u32 = 229_920;
const MERGE_THREADS: u32 = 256;
/// Blocks of the second kernel on a multiprocessor.
const MERGE_WAVES: usize = 8;
/// Where there are more rows than [`MERGE_FEW_ROWS`], of which few are in several pieces: so few that they
/// lie beside those of the first kernel and have looked for work when it ends, if they see all at once.
const MERGE_BESIDE: usize = 2;
const MERGE_FEW_ROWS: usize = 48;
/// Blocks of the second kernel to a line, at most.
const MERGE_PARTS: usize = 8;

const COSTS: Costs = Costs { piece: 2, partial: 2, merge: 5 };
const WIDE_COSTS: Costs = Costs { piece: 4, partial: 4, merge: 8 };

const NARROW: &str = "mla_decode_16";
const WIDE: &str = "mla_decode_64";
/// Kernels that have more shared memory than the default.
pub(crate) const LARGE: [&str; 2] = [NARROW, WIDE];
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

/// How rows of so many heads are cut, and so which kernel works through their pieces.
#[must_use]
pub const fn lines(heads: usize) -> Lines {
    let narrow =
        Lines { heads, group: heads, most: LINES, slot: LINES, whole: false, costs: COSTS };
    if heads <= LINES {
        return narrow;
    }
    Lines { most: MANY, whole: true, costs: WIDE_COSTS, ..narrow }
}

/// The kernel that works through pieces of so many heads.
#[must_use]
pub const fn name(heads: usize) -> &'static str {
    if lines(heads).whole { WIDE } else { NARROW }
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

/// The cache as the copy engine sees it.
#[derive(Clone, Copy, Debug)]
pub struct CacheMap {
    /// Lines, in boxes of [`UNIT`] keys.
    pub(super) units: TensorMap,
    /// By the line where a block of the cache begins, and key: lines of all its keys.
    blocks: TensorMap,
}

/// Made once.
///
/// # Errors
/// When the arena is smaller than a block of one layer, or the driver refuses the shape.
pub fn cache_map(arena: &DeviceSlice) -> Result<CacheMap, CudaError> {
    const OF_KEY: u64 = (WIDTH / LINE) as u64;
    let (line, keys) = (LINE as u64, BLOCK as u64);
    let lines = (arena.bytes() / (LINE * 2)) as u64;
    let boxes = [LINE as u32, UNIT * OF_KEY as u32];
    let units = TensorMap::bf16(arena, [line, lines], boxes, Swizzle::Bytes128)?;
    // A box begins with a line and takes that of every other key, so none begins in the last ones.
    let dims = [line, keys, lines.saturating_sub((keys - 1) * OF_KEY)];
    let strides = [1, OF_KEY * line, line];
    let boxes = [LINE as u32, BLOCK as u32, 1];
    let blocks = TensorMap::bf16_strided(arena, dims, strides, boxes, Swizzle::Bytes128)?;
    Ok(CacheMap { units, blocks })
}

/// A step's cut on the device.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// By [`cache_map`], of the arena given beside it.
    pub map: &'a CacheMap,
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
    let beside = on.multiprocessors() * MERGE_BESIDE * MERGE_THREADS as usize;
    let few = rows.padded > MERGE_FEW_ROWS && items <= beside;
    let waves = if few { MERGE_BESIDE } else { MERGE_WAVES };
    let blocks = items.min(on.multiprocessors() * waves);
    let grid = [dim(OP, blocks)?, 1, 1];
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
    let of = lines(mla.heads);
    let (most, slots) = Cut::most(plan.decodes, of, plan.blocks);
    need(OP, "pieces", plan.pieces, &[most, Piece::WORDS], 4)?;
    need(OP, "slots", plan.slots, &[Cut::slot_entries(rows.padded, of), 2], 4)?;
    need(OP, "partial sums", &partials.sums, &[slots, LINES, LATENT], 4)?;
    need(OP, "partial masses", &partials.masses, &[slots, LINES], 8)?;
    need(OP, "out", out, &[rows.padded, mla.heads, LATENT], 2)?;
    let [q, rest] = queries;
    let params = Params {
        cache: if of.whole { plan.map.blocks } else { plan.map.units },
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
    let (threads, shared) = if of.whole { (WIDE_THREADS, WIDE_SHARED) } else { (THREADS, SHARED) };
    Launch::new(on.kernel(name(mla.heads))?, [dim(OP, plan.blocks)?, 1, 1], threads)
        .shared(shared)
        .dependent()
        .on(on.stream, &params)
}
