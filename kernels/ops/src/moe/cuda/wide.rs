//! Both products of experts with few launches and at the speed of reading their weights: the rows laid
//! by sorted pair, gate and up with the activation, down.
//!
//! Wants bf16 and widths in multiples of 8. Invariant: the sum of an output runs over whole tiles in
//! one block, so that it does not depend on how many tokens other experts have.

#[cfg(test)]
mod tests;

use super::GroupParams;
use crate::cuda::{Queue, bytes, dim, need};
use crate::linear::cuda::wide::{Params, Shape};
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters};

const OP: &str = "experts";
/// Pairs of a chunk of `lay_pairs`, experts that it takes, its threads.
const LAID_PAIRS: usize = 4096;
const LAID_EXPERTS: usize = 256;
const LAY: usize = 512;
/// Blocks of it on a multiprocessor, where there are many chunks.
const LAY_BLOCKS: usize = 4;
/// Threads of `gather_pairs`.
const GATHER: u32 = 256;
/// Blocks of `gather_pairs` on a multiprocessor.
const GATHER_BLOCKS: usize = 8;
/// Tokens of an expert, if all were equally busy, up to which tiles are small.
const SMALL: usize = 48;

/// Kernels that have more shared memory than the default.
pub(crate) const LARGE: &[&str] = &[
    "experts_wide_64_inner",
    "experts_wide_64_down",
    "experts_wide_256_inner",
    "experts_wide_256_down",
];

/// Which kernels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wide {
    shape: Shape,
    inner: &'static str,
    down: &'static str,
}

/// Bound by reading.
const FEW: Wide = Wide {
    shape: Shape { groups: 2, slabs: 1, rows: 64, row_box: 8, boxes: 2, share: 1 },
    inner: "experts_wide_64_inner",
    down: "experts_wide_64_down",
};
/// Bound by arithmetic.
const MANY: Wide = Wide {
    shape: Shape { groups: 2, slabs: 1, rows: 256, row_box: 32, boxes: 1, share: 1 },
    inner: "experts_wide_256_inner",
    down: "experts_wide_256_down",
};

impl Wide {
    /// For experts of `each` tokens if all were equally busy.
    pub(super) const fn select(each: usize) -> Self {
        if each <= SMALL { FEW } else { MANY }
    }

    /// Rows of a tile.
    pub(super) const fn tile_rows(self) -> usize {
        self.shape.rows
    }
}

/// Operands; lengths are checked by the caller.
#[derive(Clone, Copy)]
pub(super) struct Products<'a> {
    /// `[rows, hidden]`.
    pub(super) x: &'a DeviceSlice,
    /// `[held, 2, intermediate, hidden]`.
    pub(super) gate_up: &'a DeviceSlice,
    /// `[held, hidden, intermediate]`.
    pub(super) down: &'a DeviceSlice,
    pub(super) held: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    /// Rows there can be, and pairs.
    pub(super) max_rows: usize,
    pub(super) max_pairs: usize,
    /// How pairs are sorted.
    pub(super) group: GroupParams,
    /// `[max_pairs]`: sorted place to pair where there are many experts, else counts of chunks.
    pub(super) pairs: &'a DeviceSlice,
    pub(super) tiles: &'a DeviceSlice,
    /// Tiles and pairs there are.
    pub(super) totals: &'a DeviceSlice,
    /// `[max_pairs, intermediate]`.
    pub(super) inner: &'a DeviceSlice,
    /// `[max_pairs, hidden]`: rows of `x` first, then the result.
    pub(super) y: &'a DeviceSlice,
}

/// Mirrors `GatherParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct GatherParams {
    x: u64,
    pairs: u64,
    totals: u64,
    out: u64,
    top_k: u32,
    vectors: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `experts`.
unsafe impl Parameters for GatherParams {}

/// Mirrors `LayParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LayParams {
    x: u64,
    chosen: u64,
    count: u64,
    out: u64,
    counts: u64,
    places: u64,
    tiles: u64,
    totals: u64,
    rows: u32,
    top_k: u32,
    first: u32,
    held: u32,
    tile_rows: u32,
    vectors: u32,
    chunk_rows: u32,
    chunks: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `experts` and `lay`.
unsafe impl Parameters for LayParams {}

/// Sorts the pairs by expert, and lays the rows of `x` so.
fn lay(on: Queue<'_>, p: &Products<'_>) -> Result<(), CudaError> {
    let vectors = dim(OP, p.hidden / 8)?;
    let top_k = p.group.top_k as usize;
    if p.held > LAID_EXPERTS || top_k > LAID_PAIRS {
        super::group(on, &p.group)?;
        let gather = GatherParams {
            x: p.x.address(),
            pairs: p.pairs.address(),
            totals: p.totals.address(),
            out: p.y.address(),
            top_k: p.group.top_k,
            vectors,
        };
        let blocks = dim(OP, p.max_pairs.min(GATHER_BLOCKS * on.multiprocessors()))?;
        return Launch::new(on.kernel("gather_pairs")?, [blocks, 1, 1], GATHER)
            .dependent()
            .on(on.stream, &gather);
    }
    let chunk_rows = LAID_PAIRS / top_k;
    let chunks = p.max_rows.div_ceil(chunk_rows).max(1);
    if chunks > 1 {
        need(OP, "counts of chunks", p.pairs, &[chunks, p.held], 4)?;
    }
    let GroupParams { chosen, count, places, tiles, totals, .. } = p.group;
    let GroupParams { rows, top_k, first, held, tile_rows, .. } = p.group;
    let params = LayParams {
        x: p.x.address(),
        chosen,
        count,
        out: p.y.address(),
        counts: p.pairs.address(),
        places,
        tiles,
        totals,
        rows,
        top_k,
        first,
        held,
        tile_rows,
        vectors,
        chunk_rows: dim(OP, chunk_rows)?,
        chunks: dim(OP, chunks)?,
    };
    if chunks > 1 {
        Launch::new(on.kernel("count_pairs")?, [params.chunks, 1, 1], LAY as u32)
            .shared(4 * held)
            .dependent()
            .on(on.stream, &params)?;
    }
    let work = bytes(OP, &[p.max_rows, p.hidden / 8])?.div_ceil(LAY);
    let most = on.multiprocessors() * if chunks > 1 { LAY_BLOCKS } else { 1 };
    let blocks = dim(OP, (work.min(most) / chunks).max(1) * chunks)?;
    Launch::new(on.kernel("lay_pairs")?, [blocks, 1, 1], LAY as u32)
        .shared(LAY as u32 / 32 * 4 * held)
        .dependent()
        .on(on.stream, &params)
}

/// `y = down (silu(gate x) * up x)` by sorted place, after sorting.
pub(super) fn products(wide: Wide, on: Queue<'_>, p: &Products<'_>) -> Result<(), CudaError> {
    let Products { held, hidden, intermediate, max_pairs, .. } = *p;
    let Wide { shape, inner, down } = wide;
    lay(on, p)?;
    let w = shape.pairs_map(p.gate_up, held, intermediate, hidden)?;
    let first = Params {
        w,
        second: w,
        x: shape.x_map(p.y, max_pairs, hidden, hidden)?,
        bias: 0,
        out: p.inner.address(),
        partial: 0,
        flags: 0,
        count: p.totals.address(),
        tiles: p.tiles.address(),
        out_stride: intermediate as u64,
        rows: 0,
        outputs: dim(OP, bytes(OP, &[2, intermediate])?)?,
        inputs: dim(OP, hidden)?,
        second_outputs: 0,
        second_out: 0,
        second_stride: 0,
    };
    let second = Params {
        w: shape.w_map(p.down, held, hidden, intermediate)?,
        x: shape.x_map(p.inner, max_pairs, intermediate, intermediate)?,
        out: p.y.address(),
        out_stride: hidden as u64,
        outputs: dim(OP, hidden)?,
        inputs: dim(OP, intermediate)?,
        ..first
    };
    // As many blocks as run at once, and no more than there are tiles.
    let blocks = |outputs: u32| -> Result<u32, CudaError> {
        let tiles = max_pairs.saturating_mul((outputs as usize).div_ceil(shape.outputs()));
        dim(OP, tiles.min(on.multiprocessors()))
    };
    for (name, params) in [(inner, &first), (down, &second)] {
        Launch::new(on.kernel(name)?, [blocks(params.outputs)?, 1, 1], shape.threads())
            .shared(shape.shared())
            .dependent()
            .on(on.stream, params)?;
    }
    Ok(())
}
