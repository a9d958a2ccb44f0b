//! Latent attention of few rows of short contexts with all that [`super::block`] has around it, in one
//! launch: a cluster of blocks to a head.
//!
//! Every head reads all keys, so it is not for long contexts: those who launch know them and choose by
//! [`fits`]. It serves the shapes that `block` does. Invariant: what it stores in the cache has the bits
//! that `block` stores; results are its results within rounding; it is right for any contexts that
//! [`fits`] takes.

#[cfg(test)]
mod tests;

use super::Mla;
use super::OP;
use super::block::{Block, NOPE, QUERY, VALUE, aligned, serves};
use super::decode::{LATENT, ROPE, WIDTH};
use crate::cuda::{Queue, Rows, dim, need, shape};
use crate::flash::cuda::cut::UNIT;
use crate::rope::Pairing;
use device::cuda::{CudaError, Launch, Parameters, TensorMap};

/// Most rows.
pub const MOST_ROWS: usize = 2;
/// Kernels that have more shared memory than the default.
pub(crate) const LARGE: &[&str] = &[NEAR];
const NEAR: &str = "mla_near_8";
/// That multiply; a warp to a row comes with them.
const THREADS: u32 = 256;
const WARP: u32 = 32;
/// Blocks of a head, a cluster.
const BLOCKS: usize = 8;
/// Units of keys that lie in shared memory at once, a stage.
const CHUNK: usize = 2;
/// Bytes of `Shared` and of `Row`.
const SHARED: usize = 3280;
const ROW: usize = 5088;
/// Units of a block, at most, with which this is faster than `block`.
const MOST_UNITS: usize = 6;

/// Whether rows of these contexts are few and short enough.
#[must_use]
pub fn fits(contexts: impl IntoIterator<Item = usize>) -> bool {
    let (mut rows, mut units) = (0, 0);
    for context in contexts {
        rows += 1;
        units += context.div_ceil(UNIT as usize).div_ceil(BLOCKS);
    }
    rows <= MOST_ROWS && units <= MOST_UNITS
}

/// Mirrors `Params`.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
struct Params {
    cache: TensorMap,
    q: u64,
    kv: u64,
    absorbed: u64,
    kv_b: u64,
    out: u64,
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
    stages: u32,
    eps: f32,
    factor: f32,
    scale: f32,
    interleaved: u32,
    pad: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `attention`, offsets by the kernel.
unsafe impl Parameters for Params {}

/// Enqueues it, for rows that [`fits`] takes. Of `block`'s operands it looks at no cut and needs no
/// scratch; rotated parts of `q` stay as they were projected.
///
/// # Errors
/// When the shape is not served, rows are many, an operand is too short or begins on no multiple of 16
/// bytes, or the launch fails.
pub fn attention(
    on: Queue<'_>,
    rows: Rows<'_>,
    mla: &Mla,
    block: &Block<'_>,
) -> Result<(), CudaError> {
    let Block { q, kv, norm, eps, rope, to, layer, weights, plan, out, .. } = *block;
    let Mla { heads, .. } = *mla;
    if !serves(mla, layer, to.arena.dtype) || rows.padded > MOST_ROWS {
        return Err(shape(OP, format!("{} rows of {mla:?} over {layer:?} at once", rows.padded)));
    }
    q.need(OP, "q", rows.padded, &[heads, QUERY], 2)?;
    kv.need(OP, "kv", rows.padded, &[WIDTH], 2)?;
    need(OP, "absorbed weights", weights.absorbed, &[heads, LATENT, NOPE], 2)?;
    need(OP, "kv_b", weights.kv_b, &[heads, NOPE + VALUE, LATENT], 2)?;
    need(OP, "out", out, &[rows.padded, heads, VALUE], 2)?;
    need(OP, "norm", norm, &[LATENT], 4)?;
    need(OP, "inv_freq", rope.inv_freq, &[ROPE / 2], 4)?;
    to.need(OP, rows.padded)?;
    aligned([q, kv], [weights.absorbed, weights.kv_b, norm, to.arena.slice])?;
    // With one, two blocks and one of the product in front share a multiprocessor.
    let stages = rows.padded;
    let params = Params {
        cache: plan.map.units,
        q: q.address(),
        kv: kv.address(),
        absorbed: weights.absorbed.address(),
        kv_b: weights.kv_b.address(),
        out: out.address(),
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
        stages: dim(OP, stages)?,
        eps,
        factor: rope.factor,
        scale: mla.scale,
        interleaved: u32::from(rope.pairing == Pairing::Interleaved),
        pad: 0,
    };
    let keys = stages * CHUNK * UNIT as usize * WIDTH * 2;
    let shared = dim(OP, keys + SHARED + rows.padded * ROW)?;
    let grid = [dim(OP, heads * BLOCKS)?, 1, 1];
    Launch::new(on.kernel(NEAR)?, grid, THREADS + WARP * params.rows)
        .shared(shared)
        .cluster(BLOCKS as u32)
        .dependent()
        .on(on.stream, &params)
}
