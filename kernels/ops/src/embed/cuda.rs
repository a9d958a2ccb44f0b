//! Launches of the embedding.

#[cfg(test)]
mod tests;

use crate::cuda::{Queue, Rows, Tensor, dim, need};
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters};

/// Mirrors `EmbedParams`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    ids: u64,
    table: u64,
    out: u64,
    count: u64,
    rows: u32,
    width: u32,
    table_rows: u32,
    first_row: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `embed`, ids by the kernel.
unsafe impl Parameters for Params {}

/// Operands of [`embed`].
#[derive(Clone, Copy, Debug)]
pub struct Embed<'a> {
    /// `[rows]`, u32.
    pub ids: &'a DeviceSlice,
    /// `[table_rows, width]`.
    pub table: Tensor<'a>,
    /// Rows of the table held here.
    pub table_rows: usize,
    /// Vocabulary entry of the first of them.
    pub first_row: usize,
    /// Elements of a row.
    pub width: usize,
    /// `[rows, width]`, of the table's type.
    pub out: &'a DeviceSlice,
}

/// `out[t] = table[ids[t] - first_row]`, zeros for ids outside of the part held here.
///
/// # Errors
/// When an operand is too short, or the launch fails.
pub fn embed(on: Queue<'_>, rows: Rows<'_>, operands: &Embed<'_>) -> Result<(), CudaError> {
    const OP: &str = "embed";
    let Embed { ids, table, table_rows, first_row, width, out } = *operands;
    need(OP, "ids", ids, &[rows.padded], 4)?;
    table.need(OP, "table", &[table_rows, width])?;
    need(OP, "out", out, &[rows.padded, width], table.dtype.size())?;
    let params = Params {
        ids: ids.address(),
        table: table.address(),
        out: out.address(),
        count: rows.count_address(),
        rows: dim(OP, rows.padded)?,
        width: dim(OP, width)?,
        table_rows: dim(OP, table_rows)?,
        first_row: dim(OP, first_row)?,
    };
    let kernel = on.kernel(table.dtype.pick("embed_f32", "embed_bf16"))?;
    Launch::new(kernel, [params.rows, 1, 1], 256).on(on.stream, &params)
}
