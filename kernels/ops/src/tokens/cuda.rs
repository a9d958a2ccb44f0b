//! Launches in front of a step's first op and behind its draws.

#[cfg(test)]
mod tests;

use crate::cuda::{Queue, Rows, dim, need};
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters};

/// Threads of a block.
const THREADS: u32 = 256;
/// Words of a change: the entry, then its 64 bits, the lower ones first.
pub const CHANGE_WORDS: usize = 3;

/// Mirrors `BeginParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct BeginParams {
    staged: u64,
    last: u64,
    ids: u64,
    count: u64,
    changes: u64,
    changed: u64,
    tables: u64,
    rows: u32,
    slots: u32,
    most_changes: u32,
    entries: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `begin`, slots and entries by the
// kernel.
unsafe impl Parameters for BeginParams {}

/// Operands of [`begin`].
#[derive(Clone, Copy, Debug)]
pub struct Begin<'a> {
    /// u32 `[rows]`: tokens, or slots with [`super::OF_SLOT`].
    pub staged: &'a DeviceSlice,
    /// u32 `[slots]`: the token last drawn for each.
    pub last: &'a DeviceSlice,
    /// u32 `[rows]`, written: tokens.
    pub ids: &'a DeviceSlice,
    /// u32 `[changes, 3]`, see [`CHANGE_WORDS`].
    pub changes: &'a DeviceSlice,
    /// One u32: how many of them there are.
    pub changed: &'a DeviceSlice,
    /// u64 `[entries]`, changed.
    pub tables: &'a DeviceSlice,
}

/// Writes the ids of a step, and what changed in block tables. No entry is named twice.
///
/// # Errors
/// When an operand is too short, or the launch fails.
pub fn begin(on: Queue<'_>, rows: Rows<'_>, operands: &Begin<'_>) -> Result<(), CudaError> {
    const OP: &str = "begin_step";
    let Begin { staged, last, ids, changes, changed, tables } = *operands;
    need(OP, "staged ids", staged, &[rows.padded], 4)?;
    need(OP, "ids", ids, &[rows.padded], 4)?;
    need(OP, "number of changes", changed, &[1], 4)?;
    let params = BeginParams {
        staged: staged.address(),
        last: last.address(),
        ids: ids.address(),
        count: rows.count_address(),
        changes: changes.address(),
        changed: changed.address(),
        tables: tables.address(),
        rows: dim(OP, rows.padded)?,
        slots: dim(OP, last.bytes() / 4)?,
        most_changes: dim(OP, changes.bytes() / (4 * CHANGE_WORDS))?,
        entries: dim(OP, tables.bytes() / 8)?,
    };
    // Usually few change; an admission with a long cached prefix goes around a few times.
    let blocks = params.rows.div_ceil(THREADS).max(params.most_changes.div_ceil(THREADS).min(8));
    Launch::new(on.kernel("begin_step")?, [blocks, 1, 1], THREADS).on(on.stream, &params)
}

/// Mirrors `KeepParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct KeepParams {
    tokens: u64,
    kept: u64,
    count: u64,
    last: u64,
    rows: u32,
    slots: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `keep`, slots by the kernel.
unsafe impl Parameters for KeepParams {}

/// `last[kept[i]] = tokens[i]` where `kept[i]` is a slot. No slot is named twice.
///
/// # Errors
/// When an operand is too short, or the launch fails.
pub fn keep(
    on: Queue<'_>,
    rows: Rows<'_>,
    tokens: &DeviceSlice,
    kept: &DeviceSlice,
    last: &DeviceSlice,
) -> Result<(), CudaError> {
    const OP: &str = "keep_tokens";
    need(OP, "tokens", tokens, &[rows.padded], 4)?;
    need(OP, "slots", kept, &[rows.padded], 4)?;
    let params = KeepParams {
        tokens: tokens.address(),
        kept: kept.address(),
        count: rows.count_address(),
        last: last.address(),
        rows: dim(OP, rows.padded)?,
        slots: dim(OP, last.bytes() / 4)?,
    };
    let blocks = params.rows.div_ceil(THREADS);
    Launch::new(on.kernel("keep_tokens")?, [blocks, 1, 1], THREADS).on(on.stream, &params)
}
