//! What lies between the projections of grouped-query attention and the attention itself, for any rows in
//! one launch: queries and keys normed and rotated, keys and values written into the cache.
//!
//! It serves bf16 heads of 64 and 128 whose pairs are half a head apart. Invariants: what it stores has the
//! bits of the ops one by one; keys as projected stay as they are.

#[cfg(test)]
mod tests;

use super::decode::{Projected, rotates};
use super::{Gqa, OP, check};
use crate::cuda::{Dtype, Queue, Rows, dim, need, shape};
use device::cuda::{CudaError, DeviceSlice, Launch, Parameters};

/// Threads of a block, which takes a row.
const THREADS: u32 = 96;
/// Elements of 16 bytes.
const WIDE: usize = 8;

/// Mirrors `gqa_prepare::Params`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    q: u64,
    kv: u64,
    arena: u64,
    positions: u64,
    row_tables: u64,
    tables: u64,
    count: u64,
    q_norm: u64,
    k_norm: u64,
    inv_freq: u64,
    arena_elements: u64,
    layer_offset: u64,
    q_row: u64,
    kv_row: u64,
    rows: u32,
    heads: u32,
    kv_heads: u32,
    q_eps: f32,
    k_eps: f32,
    factor: f32,
}
// SAFETY: mirrors the kernel's struct; lengths are checked in `prepare`, offsets by the kernel.
unsafe impl Parameters for Params {}

/// Queries are changed in place; blocks of the cache begin on multiples of 16 bytes.
///
/// # Errors
/// When the shape is not served, an operand is too short or begins on no multiple of 16 bytes, or the
/// launch fails.
pub fn prepare(
    on: Queue<'_>,
    rows: Rows<'_>,
    gqa: &Gqa,
    of: &Projected<'_>,
) -> Result<(), CudaError> {
    let Projected { q, kv, norms, rope, to, layer } = *of;
    let Gqa { heads, kv_heads, head_dim, .. } = *gqa;
    check(gqa, layer)?;
    let weights = norms.map(|norms| norms.map(|norm| norm.weight));
    let aligned = [q.stride, kv.stride, layer.offset].iter().all(|n| n.is_multiple_of(WIDE))
        && [q.address(), kv.address(), to.arena.address()]
            .into_iter()
            .chain(weights.iter().flatten().map(|weight| weight.address()))
            .all(|at| at.is_multiple_of(16));
    let kernel = match (head_dim, to.arena.dtype) {
        (64, Dtype::Bf16) => "gqa_prepare_64",
        (128, Dtype::Bf16) => "gqa_prepare_128",
        _ => return Err(shape(OP, format!("{gqa:?} of {:?}", to.arena.dtype))),
    };
    if !aligned || !rotates(rope.pairing) {
        return Err(shape(OP, format!("{gqa:?} over {layer:?}, {:?}", rope.pairing)));
    }
    q.need(OP, "q", rows.padded, &[heads, head_dim], 2)?;
    kv.need(OP, "kv", rows.padded, &[layer.row], 2)?;
    need(OP, "inv_freq", rope.inv_freq, &[head_dim / 2], 4)?;
    to.need(OP, rows.padded)?;
    for weight in weights.iter().flatten() {
        need(OP, "norm", weight, &[head_dim], 4)?;
    }
    let [q_norm, k_norm] = weights.map_or([0; 2], |weights| weights.map(DeviceSlice::address));
    let [q_eps, k_eps] = norms.map_or([0.0; 2], |norms| norms.map(|norm| norm.eps));
    let params = Params {
        q: q.address(),
        kv: kv.address(),
        arena: to.arena.address(),
        positions: to.positions.address(),
        row_tables: to.row_tables.address(),
        tables: to.tables.address(),
        count: rows.count_address(),
        q_norm,
        k_norm,
        inv_freq: rope.inv_freq.address(),
        arena_elements: to.arena.len() as u64,
        layer_offset: layer.offset as u64,
        q_row: q.stride as u64,
        kv_row: kv.stride as u64,
        rows: dim(OP, rows.padded)?,
        heads: dim(OP, heads)?,
        kv_heads: dim(OP, kv_heads)?,
        q_eps,
        k_eps,
        factor: rope.factor,
    };
    Launch::new(on.kernel(kernel)?, [params.rows, 1, 1], THREADS).dependent().on(on.stream, &params)
}
