//! All of a decoding step between the projections in front of latent attention and the one behind it,
//! in three kernels: rotation, norm, cache and queries into latent space; pieces of keys; the merge of
//! their results and values out of latent space.
//!
//! Rows of prompts have the first kernel too, without queries into latent space.
//!
//! It serves bf16 heads of DeepSeek's widths (128 + 64, values of 128, a latent of 512), any number of
//! them; others are launched op by op, few rows of short contexts in one launch by `near`. Each starts
//! reading its weights before the one in front has ended. Invariant: what is stored has the roundings of the
//! ops one by one.

#[cfg(test)]
pub(super) mod tests;

use super::decode::{self, LATENT, LINES, ROPE, WIDTH};
use super::{Mla, OP, Scratch, Weights, heads as by_heads};
use crate::cuda::{Dtype, Queue, Rows, Strided, dim, need, shape};
use crate::flash::cuda::Query;
use crate::norm::Heads;
use crate::paged::{KvLayer, cuda::Destination};
use crate::rope::{Pairing, cuda::Rope};
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters};

pub(super) const NOPE: usize = 128;
pub(super) const VALUE: usize = 128;
/// Elements of a head's query.
pub(super) const QUERY: usize = NOPE + ROPE;
/// Rows that tensor cores take at once.
const TILE: usize = 16;
const PREPARE: &str = "mla_prepare";
const PREPARE_MANY: &str = "mla_prepare_many";
const PREPARE_THREADS: u32 = 128;
/// Blocks of the first kernel to a head, and on a multiprocessor.
const PREPARE_PARTS: usize = 8;
const PREPARE_WAVES: usize = 6;
const VALUES_THREADS: u32 = 256;
/// Blocks of a head, a cluster, that merge tiles of rows together, and on a multiprocessor.
const VALUES_SHARES: usize = 8;
const VALUES_WAVES: usize = 2;

/// Whether these kernels serve the shape.
#[must_use]
pub const fn serves(mla: &Mla, layer: KvLayer, dtype: Dtype) -> bool {
    mla.nope == NOPE && mla.v == VALUE && decode::serves(mla, layer, dtype)
}

/// What the first kernel takes for granted: rotated parts of queries, the latent that is normed, the
/// rotated key.
#[must_use]
pub const fn heads(mla: &Mla) -> [Heads; 3] {
    let q = Heads {
        row: mla.heads * QUERY,
        count: mla.heads,
        offset: NOPE,
        width: ROPE,
        stride: QUERY,
    };
    let latent = Heads { row: WIDTH, count: 1, offset: 0, width: LATENT, stride: WIDTH };
    [q, latent, Heads { offset: LATENT, width: ROPE, ..latent }]
}

/// What attention of decoding rows works on.
#[derive(Clone, Copy, Debug)]
pub struct Block<'a> {
    /// Rows of `[heads * 192]`, as projected; their rotated parts are rotated in place.
    pub q: Strided<'a>,
    /// Rows of `[576]`, as projected.
    pub kv: Strided<'a>,
    /// f32 `[512]`: of the latent's norm.
    pub norm: &'a DeviceSlice,
    /// Of the norm.
    pub eps: f32,
    /// Of queries and key.
    pub rope: Rope<'a>,
    /// Where the rows' keys go, and the cache that is read.
    pub to: Destination<'a>,
    /// Where the layer lies in a block.
    pub layer: KvLayer,
    /// The two halves of `kv_b`.
    pub weights: Weights<'a>,
    /// Cut of the keys.
    pub plan: &'a decode::Plan<'a>,
    /// Partial results.
    pub partials: &'a decode::Partials,
    /// Queries and results in latent space.
    pub scratch: &'a Scratch,
    /// `[rows, heads * 128]`.
    pub out: &'a DeviceSlice,
}

/// What becomes of rows' queries and keys in front of attention, whoever computes that.
#[derive(Clone, Copy, Debug)]
pub struct Keys<'a> {
    /// Rows of `[heads * 192]`, as projected; their rotated parts are rotated in place.
    pub q: Strided<'a>,
    /// Rows of `[576]`, as projected.
    pub kv: Strided<'a>,
    /// f32 `[512]`: of the latent's norm.
    pub norm: &'a DeviceSlice,
    /// Of the norm.
    pub eps: f32,
    /// Of queries and key.
    pub rope: Rope<'a>,
    /// Where the rows' keys go.
    pub to: Destination<'a>,
    /// Where the layer lies in a block.
    pub layer: KvLayer,
}

impl<'a> Block<'a> {
    const fn keys(&self) -> Keys<'a> {
        let Self { q, kv, norm, eps, rope, to, layer, .. } = *self;
        Keys { q, kv, norm, eps, rope, to, layer }
    }
}

/// Enqueues it.
///
/// # Errors
/// When the shape is not served, an operand is too short or begins on no multiple of 16 bytes, or a launch
/// fails.
pub fn attention(
    on: Queue<'_>,
    rows: Rows<'_>,
    mla: &Mla,
    block: &Block<'_>,
) -> Result<(), CudaError> {
    prepare(on, rows, mla, block)?;
    pieces(on, rows, mla, block)?;
    values(on, rows, mla, block)
}

/// Tiles of a block such that about `most` blocks cover all rows: as many as run at once.
const fn tiles(rows: usize, blocks_of_a_tile: usize, most: usize) -> usize {
    let all = rows.div_ceil(TILE);
    let at_once = most / blocks_of_a_tile;
    if at_once == 0 { all } else { all.div_ceil(at_once) }
}

/// Mirrors `PrepareParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct PrepareParams {
    q: u64,
    kv: u64,
    absorbed: u64,
    kv_b: u64,
    latents: u64,
    kept: u64,
    norm: u64,
    inv_freq: u64,
    arena: u64,
    positions: u64,
    row_tables: u64,
    tables: u64,
    count: u64,
    arena_elements: u64,
    layer_offset: u64,
    q_row: u64,
    kv_row: u64,
    rows: u32,
    heads: u32,
    tiles: u32,
    eps: f32,
    factor: f32,
    interleaved: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `prepare`, offsets by the kernel.
unsafe impl Parameters for PrepareParams {}

/// Mirrors `PrepareManyParams`.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
struct PrepareManyParams {
    product: by_heads::Params,
    rows: PrepareParams,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `prepare`.
unsafe impl Parameters for PrepareManyParams {}

/// Refused where rows or memory do not begin on multiples of 16 bytes, as kernels access so many at once.
pub(super) fn aligned<const N: usize>(
    rows: [Strided<'_>; 2],
    slices: [&DeviceSlice; N],
) -> Result<(), CudaError> {
    const BYTES: u64 = 16;
    for row in rows {
        let (at, apart) = (row.address(), row.stride as u64 * 2);
        if !at.is_multiple_of(BYTES) || !apart.is_multiple_of(BYTES) {
            return Err(shape(OP, format!("rows from {at:#x} on, {apart} bytes apart")));
        }
    }
    for at in slices.map(DeviceSlice::address) {
        if !at.is_multiple_of(BYTES) {
            return Err(shape(OP, format!("an operand at {at:#x}")));
        }
    }
    Ok(())
}

/// Of rows that nothing else is asked of.
fn params(rows: Rows<'_>, mla: &Mla, keys: &Keys<'_>) -> Result<PrepareParams, CudaError> {
    let Keys { q, kv, norm, eps, rope, to, layer } = *keys;
    let Mla { heads, .. } = *mla;
    if !serves(mla, layer, to.arena.dtype) {
        return Err(shape(OP, format!("{mla:?} over {layer:?} as a block")));
    }
    q.need(OP, "q", rows.padded, &[heads, QUERY], 2)?;
    kv.need(OP, "kv", rows.padded, &[WIDTH], 2)?;
    need(OP, "norm", norm, &[LATENT], 4)?;
    need(OP, "inv_freq", rope.inv_freq, &[ROPE / 2], 4)?;
    to.need(OP, rows.padded)?;
    aligned([q, kv], [norm, to.arena.slice])?;
    Ok(PrepareParams {
        q: q.address(),
        kv: kv.address(),
        absorbed: 0,
        kv_b: 0,
        latents: 0,
        kept: 0,
        norm: norm.address(),
        inv_freq: rope.inv_freq.address(),
        arena: to.arena.address(),
        positions: to.positions.address(),
        row_tables: to.row_tables.address(),
        tables: to.tables.address(),
        count: rows.count_address(),
        arena_elements: to.arena.len() as u64,
        layer_offset: layer.offset as u64,
        q_row: q.stride as u64,
        kv_row: kv.stride as u64,
        rows: dim(OP, rows.padded)?,
        heads: dim(OP, heads)?,
        tiles: 0,
        eps,
        factor: rope.factor,
        interleaved: u32::from(rope.pairing == Pairing::Interleaved),
    })
}

/// Rotates, norms and writes keys of rows whose attention is launched apart: what the cache gets is in
/// `kv` too afterwards.
///
/// # Errors
/// As [`attention`].
pub fn keys(on: Queue<'_>, rows: Rows<'_>, mla: &Mla, keys: &Keys<'_>) -> Result<(), CudaError> {
    let params = PrepareParams { kept: keys.kv.address(), ..params(rows, mla, keys)? };
    let grid = [params.rows, 1, 1];
    Launch::new(on.kernel(PREPARE)?, grid, PREPARE_THREADS).dependent().on(on.stream, &params)
}

/// The first kernel: rotates, norms, writes the rows' keys, takes queries to latent space.
///
/// # Errors
/// As [`attention`].
pub fn prepare(
    on: Queue<'_>,
    rows: Rows<'_>,
    mla: &Mla,
    block: &Block<'_>,
) -> Result<(), CudaError> {
    let Block { q, weights, scratch, .. } = *block;
    let Mla { heads, .. } = *mla;
    need(OP, "absorbed weights", weights.absorbed, &[heads, LATENT, NOPE], 2)?;
    need(OP, "kv_b", weights.kv_b, &[heads, NOPE + VALUE, LATENT], 2)?;
    need(OP, "scratch", &scratch.queries, &[rows.padded, heads, LATENT], 2)?;
    aligned([q; 2], [weights.absorbed, weights.kv_b])?;
    let of_tile = heads * PREPARE_PARTS;
    let tiles = tiles(rows.padded, of_tile, PREPARE_WAVES * on.multiprocessors());
    let params = PrepareParams {
        absorbed: weights.absorbed.address(),
        kv_b: weights.kv_b.address(),
        latents: scratch.queries.address(),
        tiles: dim(OP, tiles)?,
        ..params(rows, mla, &block.keys())?
    };
    if rows.padded > by_heads::MANY_ROWS {
        let (product, items) = by_heads::part(rows, mla, q, weights.absorbed, &scratch.queries)?;
        let params = PrepareManyParams { product, rows: params };
        let grid = [dim(OP, rows.padded.saturating_add(items))?, 1, 1];
        return Launch::new(on.kernel(PREPARE_MANY)?, grid, PREPARE_THREADS)
            .shared(by_heads::PART_SHARED)
            .dependent()
            .on(on.stream, &params);
    }
    let chunks = rows.padded.div_ceil(TILE * tiles.max(1));
    let grid = [dim(OP, rows.padded + chunks * of_tile)?, 1, 1];
    Launch::new(on.kernel(PREPARE)?, grid, PREPARE_THREADS).dependent().on(on.stream, &params)
}

/// The second kernel: attention in latent space, rows in several pieces not merged.
///
/// # Errors
/// As [`attention`].
pub fn pieces(
    on: Queue<'_>,
    rows: Rows<'_>,
    mla: &Mla,
    block: &Block<'_>,
) -> Result<(), CudaError> {
    let Block { q, to, layer, plan, partials, scratch, .. } = *block;
    let Mla { heads, .. } = *mla;
    q.need(OP, "q", rows.padded, &[heads, QUERY], 2)?;
    need(OP, "scratch", &scratch.queries, &[rows.padded, heads, LATENT], 2)?;
    let rotated = q.address() + (NOPE * 2) as u64;
    let queries = [
        Query { address: scratch.queries.address(), row: heads * LATENT, head: LATENT },
        Query { address: rotated, row: q.stride, head: QUERY },
    ];
    let results = &scratch.results;
    decode::pieces(on, rows, mla, queries, layer, to.arena, plan, partials, results)
}

/// Mirrors `ValuesParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct ValuesParams {
    results: u64,
    partial: u64,
    partial_lse: u64,
    slots: u64,
    kv_b: u64,
    out: u64,
    count: u64,
    rows: u32,
    heads: u32,
    tiles: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `values`, those of partial results where
// they are made.
unsafe impl Parameters for ValuesParams {}

/// The last kernel: merges partial results and takes the sums out of latent space.
///
/// # Errors
/// As [`attention`].
pub fn values(
    on: Queue<'_>,
    rows: Rows<'_>,
    mla: &Mla,
    block: &Block<'_>,
) -> Result<(), CudaError> {
    let Block { to, layer, weights, plan, partials, scratch, out, .. } = *block;
    let Mla { heads, .. } = *mla;
    if !serves(mla, layer, to.arena.dtype) {
        return Err(shape(OP, format!("{mla:?} over {layer:?} as a block")));
    }
    let groups = heads.div_ceil(LINES);
    need(OP, "kv_b", weights.kv_b, &[heads, NOPE + VALUE, LATENT], 2)?;
    need(OP, "slots", plan.slots, &[rows.padded, groups, 2], 4)?;
    need(OP, "scratch", &scratch.results, &[rows.padded, heads, LATENT], 2)?;
    need(OP, "out", out, &[rows.padded, heads, VALUE], 2)?;
    if rows.padded > by_heads::MANY_ROWS {
        // Few of so many rows are in several pieces.
        decode::merge(on, rows, mla, plan, partials, &scratch.results)?;
        return by_heads::from_latent(on, rows, mla, &scratch.results, weights.kv_b, out);
    }
    let of_tile = heads * VALUES_SHARES;
    let tiles = tiles(rows.padded, of_tile, VALUES_WAVES * on.multiprocessors());
    let params = ValuesParams {
        results: scratch.results.address(),
        partial: partials.sums.address(),
        partial_lse: partials.masses.address(),
        slots: plan.slots.address(),
        kv_b: weights.kv_b.address(),
        out: out.address(),
        count: rows.count_address(),
        rows: dim(OP, rows.padded)?,
        heads: dim(OP, heads)?,
        tiles: dim(OP, tiles)?,
    };
    let chunks = rows.padded.div_ceil(TILE * tiles.max(1));
    let grid = [dim(OP, chunks * of_tile)?, 1, 1];
    Launch::new(on.kernel("mla_values")?, grid, VALUES_THREADS)
        .cluster(VALUES_SHARES as u32)
        .dependent()
        .on(on.stream, &params)
}
