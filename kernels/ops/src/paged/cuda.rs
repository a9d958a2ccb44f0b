//! The cache on the device: rows written into it, blocks copied and zeroed.
//!
//! A table is a run of element offsets among those of all sequences; a row names where its run begins.
//! What an offset may be is checked where tables are filled; a kernel passes over one that would leave
//! the arena, so a dead entry costs wrong values at worst.

#[cfg(test)]
mod tests;

use super::KvLayer;
use crate::cuda::{Queue, Rows, Strided, Tensor, dim, need, shape};
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters};

/// Mirrors `WriteKvParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct WriteParams {
    rows_in: u64,
    arena: u64,
    positions: u64,
    row_tables: u64,
    tables: u64,
    count: u64,
    arena_elements: u64,
    layer_offset: u64,
    stride: u64,
    rows: u32,
    width: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `write_kv`, offsets by the kernel.
unsafe impl Parameters for WriteParams {}

/// Where the rows of a step go.
#[derive(Clone, Copy, Debug)]
pub struct Destination<'a> {
    /// The cache.
    pub arena: Tensor<'a>,
    /// u32 `[rows]`: position of each row in its sequence.
    pub positions: &'a DeviceSlice,
    /// u32 `[rows]`: index in `tables` of the first block of the row's sequence.
    pub row_tables: &'a DeviceSlice,
    /// u64: element offsets of blocks.
    pub tables: &'a DeviceSlice,
}

impl Destination<'_> {
    /// Refused where it does not say of `rows` rows where they go; blocks are checked by kernels.
    pub(crate) fn need(&self, op: &'static str, rows: usize) -> Result<(), CudaError> {
        need(op, "positions", self.positions, &[rows], 4)?;
        need(op, "row_tables", self.row_tables, &[rows], 4)
    }
}

/// Writes one row per token: those of `rows_in` have `layer.row` elements of the arena's type.
///
/// # Errors
/// When an operand is too short, or the launch fails.
pub fn write_kv(
    on: Queue<'_>,
    rows: Rows<'_>,
    rows_in: Strided<'_>,
    layer: KvLayer,
    to: &Destination<'_>,
) -> Result<(), CudaError> {
    const OP: &str = "write_kv";
    rows_in.need(OP, "rows", rows.padded, &[layer.row], to.arena.dtype.size())?;
    to.need(OP, rows.padded)?;
    let params = WriteParams {
        rows_in: rows_in.address(),
        arena: to.arena.address(),
        positions: to.positions.address(),
        row_tables: to.row_tables.address(),
        tables: to.tables.address(),
        count: rows.count_address(),
        arena_elements: to.arena.len() as u64,
        layer_offset: layer.offset as u64,
        stride: rows_in.stride as u64,
        rows: dim(OP, rows.padded)?,
        width: dim(OP, layer.row)?,
    };
    let kernel = on.kernel(to.arena.dtype.pick("write_kv_f32", "write_kv_bf16"))?;
    Launch::new(kernel, [params.rows, 1, 1], 128).on(on.stream, &params)
}

/// Mirrors `BlocksParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct BlocksParams {
    arena: u64,
    from: u64,
    to: u64,
    count: u64,
    arena_bytes: u64,
    block_bytes: u64,
    blocks: u32,
    element_bytes: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `move_blocks`, offsets by the kernel.
unsafe impl Parameters for BlocksParams {}

/// Bytes that move as one.
const PIECE: usize = 16;

/// Copies whole blocks inside the arena: `from` and `to` are u64 element offsets, `[blocks]` each. No
/// block is both read and written.
///
/// # Errors
/// When a block is not made of 16-byte pieces, an operand is too short, or the launch fails.
pub fn copy_blocks(
    on: Queue<'_>,
    blocks: Rows<'_>,
    arena: Tensor<'_>,
    block_bytes: usize,
    from: &DeviceSlice,
    to: &DeviceSlice,
) -> Result<(), CudaError> {
    move_blocks(on, blocks, arena, block_bytes, Some(from), to)
}

/// Zeroes whole blocks of the arena at the element offsets `at`, u64 `[blocks]`.
///
/// # Errors
/// As [`copy_blocks`].
pub fn zero_blocks(
    on: Queue<'_>,
    blocks: Rows<'_>,
    arena: Tensor<'_>,
    block_bytes: usize,
    at: &DeviceSlice,
) -> Result<(), CudaError> {
    move_blocks(on, blocks, arena, block_bytes, None, at)
}

fn move_blocks(
    on: Queue<'_>,
    blocks: Rows<'_>,
    arena: Tensor<'_>,
    block_bytes: usize,
    from: Option<&DeviceSlice>,
    to: &DeviceSlice,
) -> Result<(), CudaError> {
    const OP: &str = "move_blocks";
    /// Pieces that one thread moves, about.
    const EACH: usize = 4;
    if !block_bytes.is_multiple_of(PIECE) || block_bytes > arena.slice.bytes() {
        return Err(shape(OP, format!("blocks of {block_bytes} bytes")));
    }
    for (what, offsets) in [("from", from), ("to", Some(to))] {
        if let Some(offsets) = offsets {
            need(OP, what, offsets, &[blocks.padded], 8)?;
        }
    }
    let params = BlocksParams {
        arena: arena.address(),
        from: from.map_or(0, DeviceSlice::address),
        to: to.address(),
        count: blocks.count_address(),
        arena_bytes: arena.slice.bytes() as u64,
        block_bytes: block_bytes as u64,
        blocks: dim(OP, blocks.padded)?,
        element_bytes: arena.dtype.size() as u32,
    };
    let parts = dim(OP, (block_bytes / PIECE).div_ceil(256 * EACH))?;
    let grid = [parts, params.blocks, 1];
    Launch::new(on.kernel("move_blocks")?, grid, 256).on(on.stream, &params)
}
