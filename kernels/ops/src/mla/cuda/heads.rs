//! Products head by head for many rows, on the tensor cores of warpgroups: queries into latent space and
//! results out of it.
//!
//! They serve bf16 heads of DeepSeek's widths (keys and values of 128, a latent of 512), any number of
//! them; other widths are launched as plain products side by side. Which tile computes a row depends on
//! the number of padded rows alone. Invariant: a tile's operands are all in shared memory at once.

#[cfg(test)]
mod tests;

use super::{Mla, OP};
use crate::cuda::{Dtype, Queue, Rows, Strided, bytes, dim, shape};
use crate::flash::cuda::Query;
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters, Swizzle, TensorMap};

const NOPE: usize = 128;
const VALUE: usize = 128;
const LATENT: usize = 512;
/// Outputs of a block, its threads, elements of a line along the inputs.
const OUTPUTS: usize = 64;
pub(super) const THREADS: u32 = 128;
const LINE: usize = 64;
/// Rows above which the products are these rather than what each block has always done.
pub(super) const MANY_ROWS: usize = 48;
/// Rows up to which tiles out of latent space are small, so that there are as many as multiprocessors.
const SMALL_ROWS: usize = 128;
/// Rows of a tile into latent space.
const TO_ROWS: usize = 64;

/// Kernels that have more shared memory than the default.
pub(crate) const LARGE: &[&str] = &["mla_heads_512x32", "mla_heads_512x64"];

/// Whether these kernels serve the widths.
pub(super) const fn serves(mla: &Mla, dtype: Dtype) -> bool {
    mla.nope == NOPE && mla.v == VALUE && mla.latent == LATENT && matches!(dtype, Dtype::Bf16)
}

/// Shared memory of a block.
pub(super) const fn shared(inputs: usize, rows: usize) -> u32 {
    (inputs / LINE * (LINE * 2 * (OUTPUTS + rows) + 8)) as u32
}

/// Mirrors `mla_heads::Params`.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
pub(super) struct Params {
    w: TensorMap,
    x: TensorMap,
    out: u64,
    count: u64,
    out_row: u64,
    rows: u32,
    heads: u32,
    outputs: u32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked by the callers.
unsafe impl Parameters for Params {}

/// Operands of a product of every head.
struct Heads<'a> {
    /// `[outputs, inputs]` for each head, `w_head` elements apart.
    w: &'a DeviceSlice,
    w_head: usize,
    /// Where a row's heads begin in `x`, from row to row and head to head.
    x: &'a DeviceSlice,
    x_at: Query,
    inputs: usize,
    outputs: usize,
    /// `[rows, heads, outputs]`.
    out: &'a DeviceSlice,
}

impl Heads<'_> {
    fn params(&self, rows: Rows<'_>, heads: usize, tile: usize) -> Result<Params, CudaError> {
        let Self { w, w_head, x, x_at, inputs, outputs, out } = *self;
        let [k, n, h] = [inputs as u64, outputs as u64, heads as u64];
        let box_of = |a: usize, b: usize| [LINE as u32, a as u32, b as u32];
        let w_strides = [1, k, w_head as u64];
        let x_dims = [k, h, rows.padded as u64];
        let x_strides = [1, x_at.head as u64, x_at.row as u64];
        let swizzle = Swizzle::Bytes128;
        Ok(Params {
            w: TensorMap::bf16_strided(w, [k, n, h], w_strides, box_of(OUTPUTS, 1), swizzle)?,
            x: TensorMap::bf16_strided(x, x_dims, x_strides, box_of(1, tile), swizzle)?,
            out: out.address(),
            count: rows.count_address(),
            out_row: bytes(OP, &[heads, outputs])? as u64,
            rows: dim(OP, rows.padded)?,
            heads: dim(OP, heads)?,
            outputs: dim(OP, outputs)?,
        })
    }

    fn launch(
        &self,
        on: Queue<'_>,
        rows: Rows<'_>,
        heads: usize,
        (name, tile): (&str, usize),
    ) -> Result<(), CudaError> {
        let params = self.params(rows, heads, tile)?;
        let items = bytes(OP, &[self.outputs / OUTPUTS, heads, rows.padded.div_ceil(tile)])?;
        Launch::new(on.kernel(name)?, [dim(OP, items)?, 1, 1], THREADS)
            .shared(shared(self.inputs, tile))
            .dependent()
            .on(on.stream, &params)
    }
}

fn into_latent<'a>(
    mla: &Mla,
    q: Strided<'a>,
    absorbed: &'a DeviceSlice,
    out: &'a DeviceSlice,
) -> Heads<'a> {
    let width = mla.nope + mla.rope;
    let x_at = Query { address: q.address(), row: q.stride, head: width };
    let w_head = LATENT * NOPE;
    Heads { w: absorbed, w_head, x: q.slice, x_at, inputs: NOPE, outputs: LATENT, out }
}

/// Parameters of [`to_latent`] as a part of another kernel, and how many blocks it takes.
pub(super) fn part(
    rows: Rows<'_>,
    mla: &Mla,
    q: Strided<'_>,
    absorbed: &DeviceSlice,
    out: &DeviceSlice,
) -> Result<(Params, usize), CudaError> {
    let items = bytes(OP, &[LATENT / OUTPUTS, mla.heads, rows.padded.div_ceil(TO_ROWS)])?;
    Ok((into_latent(mla, q, absorbed, out).params(rows, mla.heads, TO_ROWS)?, items))
}

/// Shared memory of a block of [`part`].
pub(super) const PART_SHARED: u32 = shared(NOPE, TO_ROWS);

/// `out` `[rows, heads, 512]` of rows of `q`, `[heads, 128 + rope]`; lengths are checked by the caller.
pub(super) fn to_latent(
    on: Queue<'_>,
    rows: Rows<'_>,
    mla: &Mla,
    q: Strided<'_>,
    absorbed: &DeviceSlice,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    into_latent(mla, q, absorbed, out).launch(on, rows, mla.heads, ("mla_heads_128x64", TO_ROWS))
}

/// `out` `[rows, heads, 128]` of `results` `[rows, heads, 512]`, by the value halves of `kv_b`; lengths
/// are checked by the caller.
pub(super) fn from_latent(
    on: Queue<'_>,
    rows: Rows<'_>,
    mla: &Mla,
    results: &DeviceSlice,
    kv_b: &DeviceSlice,
    out: &DeviceSlice,
) -> Result<(), CudaError> {
    if !serves(mla, Dtype::Bf16) {
        return Err(shape(OP, format!("{mla:?} head by head")));
    }
    let x_at = Query { address: results.address(), row: mla.heads * LATENT, head: LATENT };
    // The value half of head h begins behind the key half of its part.
    let values = kv_b.slice(NOPE * LATENT * 2..kv_b.bytes());
    let w_head = (NOPE + VALUE) * LATENT;
    let heads = Heads { w: &values, w_head, x: results, x_at, inputs: LATENT, outputs: VALUE, out };
    let kernel = match rows.padded {
        0..=SMALL_ROWS => ("mla_heads_512x32", 32),
        _ => ("mla_heads_512x64", 64),
    };
    heads.launch(on, rows, mla.heads, kernel)
}
