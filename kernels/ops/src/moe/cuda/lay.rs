//! Rows of `x` laid by sorted pair of (token, choice), and the tiles that products of experts work on.
//!
//! Wants bf16 and widths in multiples of 8. It says nothing about how tiles are computed. Invariant: a
//! pair's place depends on the choices alone, and no tile is empty.

use super::GroupParams;
use crate::cuda::{Queue, bytes, dim, need};
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters};

const OP: &str = "experts";
/// Experts that `lay_pairs` takes: one for every thread.
pub(super) const MOST_EXPERTS: usize = THREADS;
/// Its threads.
const THREADS: usize = 512;
/// Pairs that it takes in one chunk.
const SORTED: usize = 2048;
/// Pairs of a chunk where there are several: small ones are sorted faster.
const CHUNK: usize = 1024;
/// Blocks of it on a multiprocessor, where there are several chunks.
const BLOCKS: usize = 4;
/// 16-byte vectors of a row that a lane of a warp copies at once, where there are several chunks.
const AT_ONCE: usize = 4;

/// Mirrors `LayParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    x: u64,
    chosen: u64,
    count: u64,
    out: u64,
    counts: u64,
    places: u64,
    tiles: u64,
    totals: u64,
    progress: u64,
    rows: u32,
    top_k: u32,
    first: u32,
    held: u32,
    tile_rows: u32,
    vectors: u32,
    chunk_rows: u32,
    chunks: u32,
    progresses: u32,
    at_once: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `experts` and `lay`.
unsafe impl Parameters for Params {}

/// Operands; lengths are checked by the caller.
#[derive(Clone, Copy)]
pub(super) struct Lay<'a> {
    /// `[rows, hidden]`.
    pub(super) x: &'a DeviceSlice,
    /// `[pairs, hidden]`.
    pub(super) to: &'a DeviceSlice,
    /// `[pairs]` of u32: counts of chunks.
    pub(super) counts: &'a DeviceSlice,
    /// u32 that are zero afterwards.
    pub(super) progress: Option<&'a DeviceSlice>,
    pub(super) hidden: usize,
    /// Rows there can be.
    pub(super) max_rows: usize,
    /// How pairs are sorted.
    pub(super) group: GroupParams,
}

/// Whether it takes so many experts, and so many of a token.
pub(super) const fn takes(held: usize, top_k: usize) -> bool {
    held <= MOST_EXPERTS && top_k <= CHUNK
}

/// Sorts the pairs by expert, and lays the rows of `x` so.
pub(super) fn lay(on: Queue<'_>, p: &Lay<'_>) -> Result<(), CudaError> {
    let GroupParams { chosen, count, places, tiles, totals, .. } = p.group;
    let GroupParams { rows, top_k, first, held, tile_rows, .. } = p.group;
    let pairs = bytes(OP, &[p.max_rows, top_k as usize])?;
    let chunk_rows = if pairs <= SORTED { p.max_rows } else { CHUNK / top_k as usize };
    let chunks = p.max_rows.div_ceil(chunk_rows.max(1)).max(1);
    if chunks > 1 {
        need(OP, "counts of chunks", p.counts, &[chunks, held as usize], 4)?;
    }
    let at_once = if chunks > 1 { AT_ONCE } else { 1 };
    let progresses = p.progress.map_or(0, DeviceSlice::bytes) / 4;
    let params = Params {
        x: p.x.address(),
        chosen,
        count,
        out: p.to.address(),
        counts: p.counts.address(),
        places,
        tiles,
        totals,
        progress: p.progress.map_or(0, DeviceSlice::address),
        rows,
        top_k,
        first,
        held,
        tile_rows,
        vectors: dim(OP, p.hidden / 8)?,
        chunk_rows: dim(OP, chunk_rows)?,
        chunks: dim(OP, chunks)?,
        progresses: dim(OP, progresses)?,
        at_once: dim(OP, at_once)?,
    };
    if chunks > 1 {
        Launch::new(on.kernel("count_pairs")?, [params.chunks, 1, 1], THREADS as u32)
            .shared(4 * held)
            .dependent()
            .on(on.stream, &params)?;
    }
    let work =
        bytes(OP, &[p.max_rows, (p.hidden / 8).div_ceil(32 * at_once)])?.div_ceil(THREADS / 32);
    let most = on.multiprocessors() * if chunks > 1 { BLOCKS } else { 1 };
    let blocks = dim(OP, (work.min(most) / chunks).max(1) * chunks)?;
    Launch::new(on.kernel("lay_pairs")?, [blocks, 1, 1], THREADS as u32)
        .shared((THREADS as u32 / 32 + 2) * 4 * held)
        .dependent()
        .on(on.stream, &params)
}
