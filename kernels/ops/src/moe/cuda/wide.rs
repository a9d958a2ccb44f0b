//! Both products of experts in two launches at the speed of reading their weights: gate and up with the
//! activation, then down, of rows laid by sorted pair.
//!
//! Wants bf16 and widths in multiples of 8. Invariant: the sum of an output runs over whole tiles in
//! one block, so that it does not depend on how many tokens other experts have.

#[cfg(test)]
mod tests;

use crate::cuda::{Queue, bytes, dim};
use crate::linear::cuda::wide::{Params, Shape};
use device::cuda::{CudaError, DeviceSlice, Launch};

const OP: &str = "experts";
/// Kernels that have more shared memory than the default.
pub(crate) const LARGE: &[&str] = &[INNER, DOWN];
const INNER: &str = "experts_wide_inner";
const DOWN: &str = "experts_wide_down";

const SHAPE: Shape = Shape { groups: 2, slabs: 1, rows: 64, row_box: 8, boxes: 2, share: 1 };
/// Rows of a tile.
pub(super) const ROWS: usize = SHAPE.rows;

/// Operands; lengths are checked by the caller.
#[derive(Clone, Copy)]
pub(super) struct Products<'a> {
    /// `[held, 2, intermediate, hidden]`.
    pub(super) gate_up: &'a DeviceSlice,
    /// `[held, hidden, intermediate]`.
    pub(super) down: &'a DeviceSlice,
    pub(super) held: usize,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    /// Pairs there can be.
    pub(super) max_pairs: usize,
    pub(super) tiles: &'a DeviceSlice,
    /// Tiles and pairs there are.
    pub(super) totals: &'a DeviceSlice,
    /// `[max_pairs, intermediate]`.
    pub(super) inner: &'a DeviceSlice,
    /// `[max_pairs, hidden]`: rows of `x` first, then the result.
    pub(super) y: &'a DeviceSlice,
}

/// `y = down (silu(gate x) * up x)` by sorted place, after laying.
pub(super) fn products(on: Queue<'_>, p: &Products<'_>) -> Result<(), CudaError> {
    let Products { held, hidden, intermediate, max_pairs, .. } = *p;
    let first = Params {
        w: SHAPE.pairs_map(p.gate_up, held, intermediate, hidden)?,
        x: SHAPE.x_map(p.y, max_pairs, hidden, hidden)?,
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
    };
    let second = Params {
        w: SHAPE.w_map(p.down, held, hidden, intermediate)?,
        x: SHAPE.x_map(p.inner, max_pairs, intermediate, intermediate)?,
        out: p.y.address(),
        out_stride: hidden as u64,
        outputs: dim(OP, hidden)?,
        inputs: dim(OP, intermediate)?,
        ..first
    };
    // As many blocks as run at once, and no more than there are tiles.
    let blocks = |outputs: u32| -> Result<u32, CudaError> {
        let tiles = max_pairs.saturating_mul((outputs as usize).div_ceil(SHAPE.outputs()));
        dim(OP, tiles.min(on.multiprocessors()))
    };
    for (name, params) in [(INNER, &first), (DOWN, &second)] {
        Launch::new(on.kernel(name)?, [blocks(params.outputs)?, 1, 1], SHAPE.threads())
            .shared(SHAPE.shared())
            .dependent()
            .on(on.stream, params)?;
    }
    Ok(())
}
